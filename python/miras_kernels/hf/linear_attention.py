"""The linear attention of models in transformers, run by this library's kernels.

The layers of Qwen3-Next, Qwen3.5, OLMo hybrid and Kimi Linear call functions of their own modules for the delta rule and the convolution
before it. :func:`accelerate` gives the layers of one model a subclass whose ``forward`` is the same code with other functions in the place
of those: no module of transformers is changed, parameters and their names stay, and ``accelerate(model, False)`` gives the class back.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import types
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from ..interop.fla import chunk_gated_delta_rule, chunk_kda
from ..layers.functional import convolve, depthwise
from .attention import PACKED_CACHE

__all__ = ["accelerate"]

Model = TypeVar("Model", bound=nn.Module)


def accelerate(model: Model, enable: bool = True) -> Model:
    """Run the linear-attention layers of a model on this library's kernels, in place.

    For Qwen3-Next, Qwen3.5 (dense and mixture of experts), OLMo hybrid and Kimi Linear in transformers 5.20 or later. Weights, caches
    (also static ones) and ``generate`` stay as they are; results are equal up to rounding. Documents packed by ``cu_seq_lens_q`` are kept
    apart, on CPUs too, where transformers refuses them or (Kimi Linear) mixes them; they need ``use_cache=False``.

    Args:
        model: any module with such layers, wrapped or not.
        enable: False undoes it.

    Returns:
        The same model.

    Raises:
        TypeError, ValueError: the model has no such layers, or the installed version of transformers writes them in another way. The
            model is then unchanged.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a module with linear-attention layers, got {type(model).__name__}")
    if not isinstance(enable, bool):
        raise TypeError(f"enable: expected True or False, got {enable!r}")
    classes = {module: _classes(type(module)) for module in model.modules()}
    found = {module: pair for module, pair in classes.items() if pair is not None}
    if not found:
        raise ValueError(f"model: expected one with layers of {', '.join(_LAYERS.values())}, got {type(model).__name__} without any")
    for module, (plain, fast) in found.items():
        module.__class__ = fast if enable else plain
    return model


# ------------------------------------------------------------------------------------------- what layers call instead


def gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor | None = None,
    output_final_state: bool = False, use_qk_l2norm_in_kernel: bool = False, cu_seqlens: Tensor | None = None, **_: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """What the layers call with all tokens, and with single ones; they hand down every keyword that the model got."""
    _check_packed(cu_seqlens, output_final_state)
    return chunk_gated_delta_rule(
        query, key, value, g, beta, None, initial_state, output_final_state, use_qk_l2norm_in_kernel, cu_seqlens=cu_seqlens
    )


def kimi_delta_attention(
    query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor | None = None,
    output_final_state: bool = False, use_qk_l2norm_in_kernel: bool = False, cu_seq_lens_q: Tensor | None = None, **_: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    _check_packed(cu_seq_lens_q, output_final_state)
    return chunk_kda(query, key, value, g, beta, None, initial_state, output_final_state, use_qk_l2norm_in_kernel, cu_seqlens=cu_seq_lens_q)


def _check_packed(cu_seqlens: Tensor | None, output_final_state: bool) -> None:
    if cu_seqlens is not None and output_final_state:
        raise ValueError(PACKED_CACHE)


def convolution(
    hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, *,
    cu_seq_lens_q: Tensor | None = None, seq_idx: Tensor | None = None, **_: Any,
) -> Tensor:  # fmt: skip
    """Depthwise causal convolution of ``[B, channels, T]``, that of packed documents apart."""
    if seq_idx is not None and cu_seq_lens_q is None:
        raise ValueError("seq_idx: expected cu_seq_lens_q as well, to tell where packed documents begin, got None")
    x = hidden_states.to(weight.dtype).transpose(1, 2)
    taps = weight.shape[-1]
    out = depthwise(x, weight, taps - 1) if cu_seq_lens_q is None else convolve(x, weight, None, cu_seq_lens_q)[0]
    out = (out if bias is None else out + bias).transpose(1, 2)
    if activation == "silu" and not (torch.is_grad_enabled() and out.requires_grad):
        out = F.silu(out, inplace=True)  # new memory for a long sequence costs more than the function
    elif activation is not None:
        out = ACT2FN[activation](out)
    return out.to(hidden_states.dtype)


_GATED: dict[str, Callable] = {
    "torch_chunk_gated_delta_rule": gated_delta_rule,
    "torch_recurrent_gated_delta_rule": gated_delta_rule,
    "causal_conv1d_fn": convolution,
}
_KIMI: dict[str, Callable] = {
    "chunk_kimi_delta_attention": kimi_delta_attention,
    "recurrent_kimi_delta_attention": kimi_delta_attention,
    "causal_conv1d_fn": convolution,
}

# --------------------------------------------------------------------------------------------------- layers' classes

#: transformers' module -> the class of its linear-attention layers
_LAYERS = {
    f"transformers.models.{name}.modeling_{name}": cls
    for name, cls in {
        "qwen3_next": "Qwen3NextGatedDeltaNet",
        "qwen3_5": "Qwen3_5GatedDeltaNet",
        "qwen3_5_moe": "Qwen3_5MoeGatedDeltaNet",
        "olmo_hybrid": "OlmoHybridGatedDeltaNet",
        "kimi_linear": "KimiLinearDeltaAttention",
    }.items()
}
_PREFIX = "Miras"


def _classes(cls: type) -> tuple[type, type] | None:
    """A layer's class as transformers has it and as :func:`accelerate` does, from either; None for other modules."""
    plain = cls.__base__ if cls.__module__ == __name__ else cls
    assert plain is not None
    if _LAYERS.get(plain.__module__) != plain.__name__:
        return None
    return plain, _fast(plain)


@functools.cache
def _fast(plain: type) -> type:
    functions = _KIMI if plain.__name__.startswith("Kimi") else _GATED
    forward = _with(functions, plain.forward)  # type: ignore[attr-defined]
    return type(_PREFIX + plain.__name__, (plain,), {"forward": forward, "__module__": __name__, "__doc__": plain.__doc__})


def __getattr__(name: str) -> type:
    """The classes that :func:`accelerate` made, for pickle."""
    for module, cls in _LAYERS.items():
        if name == _PREFIX + cls:
            return _fast(getattr(importlib.import_module(module), cls))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _with(functions: dict[str, Callable], function: Callable) -> Callable:
    """A function that calls other ones by the global names in ``functions``, in the same wrappers as ``function``."""
    inner = getattr(function, "__wrapped__", None)
    if inner is None:
        missing = sorted(set(functions) - set(function.__code__.co_names))
        if missing:
            raise ValueError(
                f"model: the layers of transformers {transformers.__version__} call no function {', '.join(missing)}; expected those of "
                "5.20 to 5.24"
            )
        # Without a module's name torch.compile looks functions up in this dictionary, and not in the module.
        namespace = {name: x for name, x in {**function.__globals__, **functions}.items() if name != "__name__"}
        return _copy(function, namespace, function.__closure__)
    replaced = _with(functions, inner)
    cells = function.__closure__ or ()
    if not any(cell.cell_contents is inner for cell in cells):
        raise ValueError(f"model: transformers {transformers.__version__} wraps its layers in a way that is not known here")
    closure = tuple(types.CellType(replaced) if cell.cell_contents is inner else cell for cell in cells)
    copy = _copy(function, function.__globals__, closure)
    copy.__wrapped__ = replaced  # type: ignore[attr-defined]
    return copy


def _copy(function: Callable, namespace: dict[str, Any], closure: tuple | None) -> Callable:
    copy = types.FunctionType(function.__code__, namespace, function.__name__, function.__defaults__, closure)
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__dict__.update(vars(function))
    copy.__module__, copy.__qualname__, copy.__doc__ = __name__, function.__qualname__, function.__doc__
    copy.__annotations__ = inspect.get_annotations(function)
    return copy
