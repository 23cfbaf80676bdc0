"""The worst conditioned systems of exact steps in blocks: one key in every token, and the largest stable steps."""

from __future__ import annotations

import torch

from miras_kernels.testing import Case

__all__ = ["EqualKeys"]


class EqualKeys(Case):
    """The same key again and again, with steps up to 2 / |k|^2; some keys and steps are zero. The name says |k|^2 times the step."""

    def _draw(self, seed):
        inputs = super()._draw(seed)
        with torch.no_grad():
            k = inputs.tensors["k"]
            k.copy_(k[:, :1].expand_as(k))
            inputs.tensors["lr"].copy_(float(self.name) / k.square().sum(-1))
            k[:, 7::11] = 0.0
            inputs.tensors["lr"][:, 3::13] = 0.0
        return inputs
