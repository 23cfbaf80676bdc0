"""The backward of the MLP memory in CUDA C++, ``csrc/cuda/mlp_backward.h``: a call's tensors as its two kernels take them."""

from __future__ import annotations

import ctypes
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..call import Call
from .cuda_mlp import Chain, matrices, packed, struct, tensors_of, tokens_of
from .cuda_types import Tokens, address, aligned, launch
from .groups import Groups

__all__ = ["Backward", "backward", "refuses"]

GATES = ("lr", "log_decay", "delta")


class Backward(ctypes.Structure):
    """MirasMlpBackward of csrc/cuda/mlp_backward.h, which describes the fields."""

    TOKENS = ("grad_out", "grad_q", "grad_k", "grad_v")
    POINTERS = (*(f"grad_{name}" for name in GATES), "segments", "slots", "sequence_places", "handed", "norm_shares", "grad_norm")
    _fields_: ClassVar = [
        ("chain", Chain),
        *((name, Tokens) for name in TOKENS),
        *((name, ctypes.c_void_p) for name in POINTERS),
        ("places", ctypes.c_int32),
        ("zero", ctypes.c_int32),
    ]
    #: the fields whose offsets miras_mlp_backward_layout returns, after the size of the struct
    MARKS = ("grad_out", "grad_lr", "segments", "grad_norm", "places")

    @classmethod
    def layout(cls) -> list[int]:
        return [ctypes.sizeof(cls), *(getattr(cls, name).offset for name in cls.MARKS)]


def refuses(library: Any, call: Call) -> str | None:
    """Why these kernels cannot compute the gradients of a call that the forward serves, or None."""
    if not call.retention.is_identity:
        return f"it computes gradients without a retention gate, got {call.retention.name}"
    if library is None:  # no call runs
        return None
    if call.momentum is not None:
        return "it computes no gradients with momentum"
    needed = library.miras_mlp_backward_shared(call.hidden, call.chunk_size)
    if not needed:
        at = f"chunks of {call.chunk_size} at hidden {call.hidden}"
        return f"it computes gradients in chunks of 16 or 32 tokens, or of 64 at hidden 128 or 256, got {at}"
    if call.q.is_cuda and needed > (has := library.miras_shared_limit(call.q.device.index)):
        return f"its backward needs {needed} bytes of shared memory per block, got {has}"
    return None


def backward(library: Any, call: Call, every: int, saved: list[Tensor], grad_out: Tensor, grad_state: list[Tensor]) -> dict:
    """See :class:`~miras_kernels.backends.Backend`."""
    heads, device = call.q.shape[2], call.q.device
    # beyond the end that cu_seqlens has on the device nothing is written
    empty = torch.empty_like if call.cu_seqlens is None else torch.zeros_like
    tokens = {f"grad_{name}": empty(getattr(call, name), memory_format=torch.contiguous_format) for name in ("q", "k", "v")}
    given = [name for name in GATES if getattr(call, name) is not None]
    gates = {f"grad_{name}": empty(getattr(call, name), memory_format=torch.contiguous_format, dtype=torch.float32) for name in given}
    state = packed(grad_state or [torch.zeros_like(x) for x in call.state.dual])  # [N, H, 2, Hd, D]
    groups = Groups.of(call, every)
    count, places = groups.slots.shape
    handed = torch.empty(places, every, heads, library.miras_mlp_handed(call.hidden, call.chunk_size), dtype=torch.uint8, device=device)
    norm_shares, grad_norm = state.new_empty(places, heads, 2, call.v.shape[-1]), state.new_zeros(len(state), heads, 2, call.v.shape[-1])
    inputs = tensors_of(call, every) | dict(state=state, checkpoints=saved[0])
    read = tokens_of(call) | dict(out=aligned(grad_out))  # as long as their addresses are used
    chain = struct(call, inputs, read, every)
    of_tokens = [Tokens.of(x) for x in (read["out"], *tokens.values())]
    for i in reversed(range(count)):
        group = dict(segments=groups.segments[i], slots=groups.slots[i], sequence_places=groups.places[i])
        work = gates | group | dict(handed=handed, norm_shares=norm_shares, grad_norm=grad_norm)
        both = Backward(chain, *of_tokens, *(address(work.get(name)) for name in Backward.POINTERS), places=places)
        launch(library, library.miras_mlp_replay, both, device)
        launch(library, library.miras_mlp_reverse, both, device)
    weight, bias = grad_norm.sum(0).unbind(1)
    named = {name.removeprefix("grad_"): x for name, x in (tokens | gates).items()}
    return named | {"ln_weight": weight, "ln_bias": bias, "state": matrices(state)}
