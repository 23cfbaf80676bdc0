"""Calls of :func:`~miras_kernels.linear_memory` like an earlier one, without gradients: a few tokens where every token is a chunk, as
decoding makes them, or whole sequences. What follows from shapes, dtypes and settings was checked by the earlier call; the kernels check
the rest. In Python this would take a tenth of the time of a thousand tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import dispatch, verification
from ..call import Call
from ..options import options
from ..state import MemoryState
from ..tracing import is_plain_eager

__all__ = ["remember", "repeat"]

_CPU = torch.device("cpu")
_MOST = 64


@dataclasses.dataclass
class _Earlier:
    run: Callable[..., tuple[Tensor, Any] | None]  # the output, and the dual after the tokens or None
    verified: dict  # the results of verification that the backend was chosen by
    output_final_state: bool
    inplace_state: bool


_earlier: dict[tuple, _Earlier] = {}


def repeat(
    settings: tuple, q: Tensor, k: Tensor, v: Tensor, lr: Tensor, log_decay: Tensor | None, delta: float | Tensor | None,
    initial_state: MemoryState | Tensor | tuple[Tensor] | None,
) -> tuple[Tensor, MemoryState | None] | None:  # fmt: skip
    """The result of a call like an earlier one; None if there was none, or if it differs in more than the tensors' values and strides."""
    if not is_plain_eager(()) or not _earlier or torch.is_autocast_enabled("cpu"):
        return None
    dual: Any = initial_state
    if type(initial_state) is MemoryState:
        if initial_state.momentum is not None or initial_state.open_chunk is not None or len(initial_state.dual) != 1:
            return None
        dual = initial_state.dual[0]
    given = [x for x in (q, k, v, lr, dual, log_decay, delta) if x is not None and type(x) is not float]
    grad = torch.is_grad_enabled()
    for x in given:
        if type(x) is not Tensor or x.is_neg() or (grad and x.requires_grad):
            return None
    try:
        earlier = _earlier.get((settings, options.check_values, q.shape, v.shape))
    except TypeError:  # settings that cannot be hashed are wrong
        return None
    if earlier is None or earlier.verified is not verification.results("cpp", _CPU):
        return None
    found = earlier.run(q, k, v, lr, log_decay, delta, dual)
    if found is None:
        return None
    out, after = found
    if earlier.inplace_state:
        if not dual.is_inference():
            torch.autograd.graph.increment_version(dual)
        return out, initial_state if type(initial_state) is MemoryState else MemoryState((after,))
    return out, MemoryState((after,)) if earlier.output_final_state else None


def remember(settings: tuple, call: Call) -> None:
    """Let calls like this one, which the C++ kernels served, be repeated."""
    run = dispatch.BACKENDS["cpp"].repeated(call) if is_plain_eager(call.differentiable()) else None  # type: ignore[attr-defined]
    if run is None:
        return
    if len(_earlier) >= _MOST:
        _earlier.clear()
    key = (settings, options.check_values, call.q.shape, call.v.shape)
    _earlier[key] = _Earlier(run, verification.results("cpp", _CPU), call.output_final_state, call.inplace_state)
