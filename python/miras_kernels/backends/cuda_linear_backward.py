"""The backward of the linear memory in CUDA C++, ``csrc/cuda/linear_reverse.h``: which calls it serves, and its launch."""

from __future__ import annotations

import ctypes
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..call import Call
from ..tables.biases import Bias
from . import multiprocessors
from .cuda_linear import KEYS
from .cuda_types import TOKEN_TYPES, Tokens, address, aligned, contiguous, floats, launch, packed_slots

__all__ = ["Backward", "backward", "refuses"]

GATES = ("lr", "log_decay", "delta")


class Backward(ctypes.Structure):
    """MirasLinearReverse of csrc/cuda/linear_reverse.h, which describes the fields."""

    _fields_: ClassVar = [
        *((name, Tokens) for name in ("q", "k", "v", "grad_out")),
        *((name, ctypes.c_void_p) for name in ("grad_q", "grad_k", "grad_v", *GATES, *(f"grad_{name}" for name in GATES))),
        *((name, ctypes.c_void_p) for name in ("checkpoints", "grad_final", "grad_initial", "states", "cu_seqlens", "first_slot")),
        ("T", ctypes.c_int64),
        ("bias_params", ctypes.c_float * Bias.MAX_PARAMETERS),
        *((name, ctypes.c_int32) for name in ("bias", "token_type", "N", "H", "K", "V", "C", "slots", "every", "kept")),
        ("delta_per_channel", ctypes.c_int32),
    ]
    #: the fields whose offsets miras_linear_backward_layout returns, after the size of the struct
    MARKS = ("q", "grad_q", "lr", "checkpoints", "states", "T", "bias_params", "bias", "delta_per_channel")

    @classmethod
    def layout(cls) -> list[int]:
        return [ctypes.sizeof(cls), *(getattr(cls, name).offset for name in cls.MARKS)]


def refuses(library: Any, call: Call) -> str | None:
    """Why this kernel does not compute the gradients of a call that the forward serves, or None."""
    keys, values, heads = call.q.shape[-1], call.v.shape[-1], call.state.dual[0].shape[0] * call.q.shape[2]
    if call.q.dtype != torch.bfloat16:
        return f"its backward takes bfloat16 inputs, got {call.q.dtype}"
    if keys != values:
        return f"its backward takes as many values as keys, {' or '.join(map(str, KEYS))}, got {keys} and {values}"
    if call.q.is_cuda:
        needed, has = library.miras_linear_reverse_shared(keys, call.chunk_size), library.miras_shared_limit(call.q.device.index)
        if needed > has:
            return f"its backward needs {needed} bytes of shared memory per block for head {keys}, chunk {call.chunk_size}, got {has}"
        count = multiprocessors(call.q.device)
        if 3 * heads < 2 * count * -(-heads // count):
            return f"its backward takes a multiprocessor for each sequence and head: {heads} of them leave too many of {count} idle"
    return None


def backward(library: Any, call: Call, every: int, saved: list[Tensor], grad_out: Tensor, grad_state: list[Tensor]) -> dict:
    """See :class:`~miras_kernels.backends.Backend`."""
    n, heads, values, keys = call.state.dual[0].shape
    tokens = call.q.shape[1]
    # beyond the end that cu_seqlens has on the device nothing is written
    empty = torch.empty_like if call.cu_seqlens is None else torch.zeros_like
    of_tokens = {name: empty(getattr(call, name), memory_format=torch.contiguous_format) for name in ("q", "k", "v")}
    gates = {name: contiguous(getattr(call, name)) for name in GATES}
    of_gates = {name: None if x is None else empty(x) for name, x in gates.items()}
    read = [aligned(x) for x in (call.q, call.k, call.v, grad_out)]  # as long as their addresses are used
    cu_seqlens, first_slot, segment = packed_slots(call, every)
    grad_final = contiguous(grad_state[0]) if grad_state else None
    grad_initial = torch.empty_like(call.state.dual[0], memory_format=torch.contiguous_format)
    kept = min(every, max(1, -(-tokens // call.chunk_size)))
    states = call.q.new_empty(n, heads, kept, values, keys)
    chain = Backward(
        *map(Tokens.of, read), *map(address, (*of_tokens.values(), *gates.values(), *of_gates.values())),
        *map(address, (saved[0], grad_final, grad_initial, states, cu_seqlens, first_slot)),
        T=tokens, bias_params=floats(call.bias.padded), bias=call.bias.tag, token_type=TOKEN_TYPES[call.q.dtype], N=n, H=heads, K=keys,
        V=values, C=call.chunk_size, slots=-(-tokens // segment), every=every, kept=kept,
        delta_per_channel=call.delta is not None and call.delta.dim() == 4,
    )  # fmt: skip
    launch(library, library.miras_linear_reverse, chain, call.q.device)
    return of_tokens | {name: x for name, x in of_gates.items() if x is not None} | {"state": [grad_initial]}
