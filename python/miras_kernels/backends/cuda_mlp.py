"""The forward of the MLP memory in CUDA C++, ``csrc/cuda/mlp_chain.cu``: a call's tensors as the kernel takes them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..call import Call
from ..tables.biases import Bias
from ..tables.retention import CustomRetention, Retention
from . import checkpoints_like, may_end_open, multiprocessors
from .cuda_types import TOKEN_TYPES, Tokens, address, aligned, contiguous, floats, launch, packed_slots

__all__ = ["Chain", "forward", "refuses"]


class Chain(ctypes.Structure):
    """MirasMlpChain of csrc/cuda/mlp_chain.h, which describes the fields."""

    TOKENS = ("q", "k", "v", "out")
    POINTERS = ("lr", "log_decay", "delta", "momentum", "ln_weight", "ln_bias", "cu_seqlens", "first_slot", "state", "start",
                "open_log_decay", "checkpoints")  # fmt: skip
    NUMBERS = ("bias", "retention", "token_type", "N", "T", "H", "Hd", "C", "every", "slots_per_sequence", "blocks")
    _fields_: ClassVar = [
        *((name, Tokens) for name in TOKENS),
        *((name, ctypes.c_void_p) for name in POINTERS),
        ("ln_eps", ctypes.c_float),
        ("bias_params", ctypes.c_float * Bias.MAX_PARAMETERS),
        ("retention_params", ctypes.c_float * Retention.MAX_PARAMETERS),
        *((name, ctypes.c_int32) for name in NUMBERS),
    ]
    #: the fields whose offsets miras_mlp_chain_layout returns, after the size of the struct
    MARKS = ("q", "lr", "checkpoints", "ln_eps", "bias", "blocks")

    @classmethod
    def layout(cls) -> list[int]:
        return [ctypes.sizeof(cls), *(getattr(cls, name).offset for name in cls.MARKS)]


def refuses(library: Any, call: Call) -> str | None:
    """Why this chain cannot read a call that chains can, or None."""
    if isinstance(call.retention, CustomRetention):
        return f"it reads chunks with the built-in retention gates only, got {call.retention.name}"
    if call.delta is not None and call.delta.dim() == 4:
        return "it reads chunks with a delta per token, got one per channel"
    if library is None:  # no call runs
        return None
    momentum = call.momentum is not None
    if momentum and not call.retention.is_identity:
        return f"it reads chunks with momentum without a retention gate, got {call.retention.name}"
    shared = library.miras_mlp_momentum_shared if momentum else library.miras_mlp_chain_shared
    needed = shared(call.hidden, call.chunk_size)
    if momentum and not needed:
        return f"it reads chunks with momentum of 64 tokens at hidden 256, got {call.chunk_size} at hidden {call.hidden}"
    if call.q.is_cuda:
        has = library.miras_shared_limit(call.q.device.index)
        if needed > has:
            return f"it needs {needed} bytes of shared memory per block for hidden {call.hidden}, chunk {call.chunk_size}, got {has}"
    return None


def tensors_of(call: Call, every: int) -> dict[str, Tensor | None]:
    """What both directions read of a call, by the struct's names."""
    cu_seqlens, first_slot, _ = packed_slots(call, every)
    named = {name: contiguous(getattr(call, name)) for name in ("lr", "log_decay", "delta", "momentum", "ln_weight", "ln_bias")}
    return named | dict(cu_seqlens=cu_seqlens, first_slot=first_slot)


def struct(call: Call, tensors: dict[str, Tensor | None], tokens: dict[str, Tensor], every: int) -> Chain:
    """``tensors`` must live as long as the struct is used."""
    length, heads = call.q.shape[1:3]
    n = len(call.state.dual[0])
    return Chain(
        *(Tokens.of(tokens[name]) for name in Chain.TOKENS), *(address(tensors.get(name)) for name in Chain.POINTERS),
        ln_eps=call.ln_eps, bias_params=floats(call.bias.padded), retention_params=floats(call.retention.padded),
        bias=call.bias.tag, retention=call.retention.tag, token_type=TOKEN_TYPES[call.q.dtype], N=n, T=length, H=heads, Hd=call.hidden,
        C=call.chunk_size, every=max(every, 1), slots_per_sequence=-(-length // (call.chunk_size * max(every, 1))),
        blocks=blocks(n * heads, multiprocessors(call.q.device)) if call.retention.is_identity else 1,
    )  # fmt: skip


def blocks(heads: int, multiprocessors: int) -> int:
    """Blocks of a head, of those sizes that may have two (mlp_chain.h, kBlocksOf): two if each still has a multiprocessor of its own.

    Args:
        heads: sequences x heads.
    """
    return 2 if 2 * heads <= multiprocessors else 1


def forward(library: Any, call: Call, checkpoint_every: int) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """See :class:`~miras_kernels.backends.Backend`."""
    state = packed(call.state.matrices())
    out = torch.empty_like(call.v, memory_format=torch.contiguous_format)
    if call.cu_seqlens is not None:  # on the device it may end before T
        out.zero_()
    start = torch.empty_like(state[:, :, :2], memory_format=torch.contiguous_format) if may_end_open(call) else None
    open_log_decay = None if start is None else state.new_empty(state.shape[:2])
    saved = checkpoints_like(call, checkpoint_every)
    results = dict(state=state, start=start, open_log_decay=open_log_decay, checkpoints=saved[0] if saved else None)
    tensors, tokens = tensors_of(call, checkpoint_every) | results, tokens_of(call) | dict(out=out)
    launch(library, library.miras_mlp_chain, struct(call, tensors, tokens, checkpoint_every), call.q.device)
    if not call.output_final_state:
        return out, [], saved
    final = matrices(state)
    if start is not None and open_log_decay is not None:
        final += [*matrices(start), open_log_decay]
    return out, final, saved


def tokens_of(call: Call) -> dict[str, Tensor]:
    return {name: aligned(getattr(call, name)) for name in ("q", "k", "v")}


def packed(matrices: Sequence[Tensor]) -> Tensor:
    """W1, W2 (with momentum M1, M2) as ``[N, H, 2 or 4, Hd, D]``; a copy."""
    return torch.stack([x if i % 2 else x.transpose(-1, -2) for i, x in enumerate(matrices)], 2)


def matrices(state: Tensor) -> list[Tensor]:
    """The inverse of :func:`packed`."""
    return [(x if i % 2 else x.transpose(-1, -2)).contiguous() for i, x in enumerate(state.unbind(2))]
