"""What :func:`~miras_kernels.hf.accelerate` gives a model, in the form that the ``kernels`` package loads from a local folder::

    from kernels import Mode, kernelize, use_kernel_mapping
    from miras_kernels.hf.hub import write_kernels

    with use_kernel_mapping(write_kernels(folder), inherit_mapping=False):
        kernelize(model, mode=Mode.INFERENCE, device="cpu")

transformers decorates the functions that these replace where it accepts the installed version of ``kernels``. They are replaced for all
models of the process, unlike by ``accelerate``. ``transformers.KernelConfig`` and ``from_pretrained(use_kernels=True, kernel_config=...)``
refuse CPUs (5.20 to 5.24), so that ``kernelize`` is called directly.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .. import __version__
from . import linear_attention

__all__ = ["LAYERS", "write_kernels"]


class chunk_gated_delta_rule(nn.Module):
    can_torch_compile = True

    def forward(self, query, key, value, g, beta, chunk_size=64, initial_state=None, output_final_state=False,
                use_qk_l2norm_in_kernel=False, **rest) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        return linear_attention.gated_delta_rule(
            query, key, value, g, beta, initial_state, output_final_state, use_qk_l2norm_in_kernel, **rest
        )


class fused_recurrent_gated_delta_rule(nn.Module):
    can_torch_compile = True

    def forward(self, query, key, value, g, beta, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=False,
                **rest) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        return linear_attention.gated_delta_rule(
            query, key, value, g, beta, initial_state, output_final_state, use_qk_l2norm_in_kernel, **rest
        )


class chunk_kda(nn.Module):
    can_torch_compile = True

    def forward(self, query, key, value, g, beta, chunk_size=64, initial_state=None, output_final_state=False,
                use_qk_l2norm_in_kernel=False, **rest) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        return linear_attention.kimi_delta_attention(
            query, key, value, g, beta, initial_state, output_final_state, use_qk_l2norm_in_kernel, **rest
        )


class fused_recurrent_kda(nn.Module):
    can_torch_compile = True

    def forward(self, query, key, value, g, beta, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=False,
                **rest) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        return linear_attention.kimi_delta_attention(
            query, key, value, g, beta, initial_state, output_final_state, use_qk_l2norm_in_kernel, **rest
        )


class causal_conv1d_fn(nn.Module):
    can_torch_compile = True

    def forward(self, hidden_states, weight, bias=None, activation=None, **rest) -> Tensor:
        return linear_attention.convolution(hidden_states, weight, bias, activation, **rest)


#: by the names under which transformers looks for them
LAYERS = {
    layer.__name__: layer
    for layer in (chunk_gated_delta_rule, fused_recurrent_gated_delta_rule, chunk_kda, fused_recurrent_kda, causal_conv1d_fn)
}


def write_kernels(folder: str | Path) -> dict[str, dict[str, Any]]:
    """Write a repository of kernels for CPUs that loads this package's functions, and return its mapping for ``use_kernel_mapping``.

    Raises:
        ImportError: ``kernels`` is not installed.
    """
    LocalLayerRepository = importlib.import_module("kernels").LocalLayerRepository  # not this repository's folder of that name

    variant = Path(folder) / "build" / "torch-cpu"
    variant.mkdir(parents=True, exist_ok=True)
    metadata = {
        "id": f"miras_kernels_{__version__.replace('.', '_')}_torch_cpu", "name": "miras-kernels", "version": 1, "license": "Apache-2.0",
        "python-depends": [], "backend": {"type": "cpu"},
    }  # fmt: skip
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=1), "utf-8")
    (variant / "__init__.py").write_text("from miras_kernels.hf import hub as layers\n", "utf-8")
    return {name: {"cpu": LocalLayerRepository(Path(folder), layer_name=name)} for name in LAYERS}
