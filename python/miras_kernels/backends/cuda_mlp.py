"""The forward of the MLP memory in CUDA C++, ``csrc/cuda/mlp_chain.cu``: a call's tensors as the kernel takes them. The Triton kernels do
its backward, from the checkpoints that it saves."""

from __future__ import annotations

import ctypes
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..call import Call
from ..tables.biases import TABLE as BIASES
from ..tables.biases import Bias, CustomBias
from . import BACKENDS, checkpoints_like
from .cuda_types import TOKEN_TYPES, Tokens, address, aligned, contiguous, launch

__all__ = ["Chain", "forward", "refuses"]


class Chain(ctypes.Structure):
    """MirasMlpChain of csrc/cuda/mlp_chain.h, which describes the fields."""

    TOKENS = ("q", "k", "v", "out")
    POINTERS = ("lr", "log_decay", "delta", "ln_weight", "ln_bias", "cu_seqlens", "first_slot", "state", "start", "open_log_decay",
                "checkpoints")  # fmt: skip
    NUMBERS = ("bias", "token_type", "N", "T", "H", "Hd", "C", "every", "slots_per_sequence")
    _fields_: ClassVar = [
        *((name, Tokens) for name in TOKENS),
        *((name, ctypes.c_void_p) for name in POINTERS),
        ("ln_eps", ctypes.c_float),
        ("bias_params", ctypes.c_float * Bias.MAX_PARAMETERS),
        *((name, ctypes.c_int32) for name in NUMBERS),
    ]
    #: the fields whose offsets miras_mlp_chain_layout returns, after the size of the struct
    MARKS = ("q", "lr", "checkpoints", "ln_eps", "bias", "slots_per_sequence")

    @classmethod
    def layout(cls) -> list[int]:
        return [ctypes.sizeof(cls), *(getattr(cls, name).offset for name in cls.MARKS)]


def refuses(library: Any, call: Call, differentiate: bool) -> str | None:
    """Why the chain cannot read a call, or None."""
    if call.q.dtype not in (torch.bfloat16, torch.float16):
        return f"it reads chunks of bfloat16 or float16 inputs, got {call.q.dtype}"
    if reason := call.exceeds("cuda"):
        return reason
    if not call.retention.is_identity:
        return f"it reads chunks without a retention gate, got {call.retention.name}"
    if call.momentum is not None:
        return "it reads chunks without momentum"
    if call.bias.tag not in BIASES or isinstance(call.bias, CustomBias):
        return f"it reads chunks with the built-in biases only, got {call.bias.name}"
    if call.delta is not None and call.delta.dim() == 4:
        return "it reads chunks with a delta per token, got one per channel"
    if call.state.open_chunk is not None:
        return "it does not continue inside a chunk"
    if call.q.is_cuda and library is not None:
        needed, has = library.miras_mlp_chain_shared(call.hidden, call.chunk_size), library.miras_shared_limit(call.q.device.index)
        if needed > has:
            return f"it needs {needed} bytes of shared memory per block for hidden {call.hidden}, chunk {call.chunk_size}, got {has}"
    if differentiate:  # its backward is Triton's
        triton = BACKENDS["triton"]
        reason = triton.unavailable() or triton.refuses(call, True)
        return None if reason is None else f"the Triton kernels do its backward: {reason}"
    return None


def forward(library: Any, call: Call, checkpoint_every: int) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """See :class:`~miras_kernels.backends.Backend`."""
    tokens, heads = call.q.shape[1:3]
    packed = call.cu_seqlens is not None
    cu_seqlens = None if call.cu_seqlens is None else call.cu_seqlens.to(torch.int64).contiguous()
    w1, w2 = call.state.dual
    state = torch.stack([w1.transpose(-1, -2), w2], 2)  # [N, H, 2, Hd, D]
    out = torch.empty_like(call.v, memory_format=torch.contiguous_format)
    if packed:  # cu_seqlens on the device may end before T
        out.zero_()
    may_end_open = call.output_final_state and (packed or tokens % call.chunk_size != 0)
    start = torch.empty_like(state) if may_end_open else None
    open_log_decay = state.new_empty(state.shape[:2]) if may_end_open else None
    saved, first_slot, segment = checkpoints_like(call, checkpoint_every), None, call.chunk_size * max(checkpoint_every, 1)
    if saved and cu_seqlens is not None:
        slots = (cu_seqlens.diff() + segment - 1) // segment
        first_slot = slots.cumsum(0) - slots
    tensors = dict(
        lr=contiguous(call.lr), log_decay=contiguous(call.log_decay), delta=contiguous(call.delta),
        ln_weight=contiguous(call.ln_weight), ln_bias=contiguous(call.ln_bias), cu_seqlens=cu_seqlens, first_slot=first_slot,
        state=state, start=start, open_log_decay=open_log_decay, checkpoints=saved[0] if saved else None,
    )  # fmt: skip
    q, k, v = (aligned(x) for x in (call.q, call.k, call.v))
    chain = Chain(
        *map(Tokens.of, (q, k, v, out)), *(address(tensors[name]) for name in Chain.POINTERS),
        ln_eps=call.ln_eps, bias_params=(ctypes.c_float * Bias.MAX_PARAMETERS)(*call.bias.padded),
        bias=call.bias.tag, token_type=TOKEN_TYPES[call.q.dtype], N=len(state), T=tokens, H=heads, Hd=call.hidden, C=call.chunk_size,
        every=max(checkpoint_every, 1), slots_per_sequence=-(-tokens // segment),
    )  # fmt: skip
    launch(library, library.miras_mlp_chain, chain, call.q.device)
    if not call.output_final_state:
        return out, [], saved
    final = [*_matrices(state)]
    if start is not None and open_log_decay is not None:
        final += [*_matrices(start), open_log_decay]
    return out, final, saved


def _matrices(state: Tensor) -> tuple[Tensor, Tensor]:
    """W1 and W2 of ``[N, H, 2, Hd, D]``."""
    return state[:, :, 0].transpose(-1, -2).contiguous(), state[:, :, 1].contiguous()
