"""Whether PyTorch computes plainly, or traces, transforms or intercepts operators."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

__all__ = ["is_plain_eager"]


def is_plain_eager(tensors: Iterable[Tensor]) -> bool:
    """Whether this is eager PyTorch on ordinary tensors with data: no tracing, fake tensors, transforms or dispatch modes."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or _get_current_dispatch_mode() is not None:
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    return all(type(x) in (Tensor, torch.nn.Parameter) and not x.is_meta and not x.is_neg() for x in tensors)
