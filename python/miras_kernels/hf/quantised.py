"""Memories in models whose linear layers are quantised, by whatever library: weights are recognised by what they are, not by who made them.

A memory's own parameters are never quantised. With ``init="from_attention"`` it calls the attention layer's quantised projections as
modules, which must pass gradients on to their inputs.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from .hosts import Host, device_of

__all__ = ["check_projections", "leave_out_memories"]

#: the name under which a quantisation's configuration lists the modules that it leaves out
_FIELDS = ("llm_int8_skip_modules", "modules_to_not_convert", "skip_modules")
#: what transformers leaves out if nothing is listed: the heads
_HEADS = ("lm_head", "embed_out", "score", "classifier", "qa_outputs")
_MEMORIES = r".*\.memory"  # a regular expression, as transformers reads them


def is_quantised(module: nn.Module) -> bool:
    """Whether a linear layer may do more than multiply by an ordinary parameter of floating-point numbers."""
    weight = getattr(module, "weight", None)
    return type(module) not in (nn.Linear, Conv1D) or type(weight) is not nn.Parameter or not weight.is_floating_point()


def check_projections(attention: nn.Module, host: Host, index: int, dtype: torch.dtype, sizes: tuple[int, int]) -> None:
    """Refuse quantised projections that a memory could not be trained with.

    Args:
        sizes: channels of the inputs of the projections of queries, keys and values, and of the output projection.

    Raises:
        ValueError: a projection does not pass gradients on (quantised activations, for example), or fails.
    """
    for name in (*(host.projections or ()), host.output):
        module = getattr(attention, name)
        if not is_quantised(module):
            continue
        size = sizes[name == host.output]
        try:
            with torch.enable_grad():
                x = torch.ones(2, 3, size, dtype=dtype, device=device_of(module), requires_grad=True)
                y = module(x)
                torch.autograd.grad(y, x, y.new_ones(2, y.shape[-1], 3).mT)  # with the strides that a convolution's gradient has
        except Exception as error:
            kind = f"{type(module).__name__} with a weight of type {type(getattr(module, 'weight', None)).__name__}"
            raise ValueError(
                f"init: 'from_attention' trains a memory through the projections of attention, but {name} of layer {index} ({kind}) passes "
                f"no gradients on: {str(error).rstrip('.')}. Expected weights that the forward dequantises, and that are frozen "
                "(requires_grad_(False)); or init='new'"
            ) from error


def leave_out_memories(quantization: Any) -> Any:
    """A copy of a quantisation's configuration (an object or a dict) that does not quantise memories; None for None.

    Raises:
        ValueError: the method has no list of modules that it leaves out.
    """
    if quantization is None:
        return None
    found = copy.deepcopy(quantization)
    values = found if isinstance(found, dict) else vars(found)
    field = next((name for name in _FIELDS if name in values), None)
    if field is None:
        method = values.get("quant_method", type(found).__name__)
        raise ValueError(
            f"quantization_config: memories are not quantised; expected one of the fields {', '.join(_FIELDS)}, which say what {method} "
            f"leaves out, got {', '.join(values)}"
        )
    left_out = values.get(field)
    if _MEMORIES not in (left_out or ()):
        values[field] = [*(_HEADS if left_out is None else left_out), _MEMORIES]
    return found


def leave_out_of(config: PreTrainedConfig) -> None:
    """The same, in place, for the configuration of a model."""
    if getattr(config, "quantization_config", None) is not None:
        config.quantization_config = leave_out_memories(config.quantization_config)
