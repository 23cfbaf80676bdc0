"""The forward of the linear memory in CUDA C++, ``csrc/cuda/linear_chain.h``: which calls it serves, and its launch. Its backward, from the
checkpoints that it saves, is cuda_linear_backward.py's or that of the Triton kernels."""

from __future__ import annotations

import ctypes
import functools
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..call import Call
from ..tables import memories
from ..tables.biases import Bias
from . import checkpoints_like, may_end_open, multiprocessors
from .cuda_types import TOKEN_TYPES, Tokens, address, aligned, contiguous, floats, launch, packed_slots

__all__ = ["Chain", "forward", "refuses"]

#: head dimensions of the keys, the unit of those of the values, and the values of the largest block, which a bias may couple
KEYS, UNIT, COUPLED = (64, 128), 16, 64


class Chain(ctypes.Structure):
    """MirasLinearChain of csrc/cuda/linear_chain.h, which describes the fields."""

    _fields_: ClassVar = [
        *((name, Tokens) for name in ("q", "k", "v", "out")),
        *((name, ctypes.c_void_p) for name in ("lr", "log_decay", "delta", "initial")),
        *((f"initial_{axis}", ctypes.c_int64) for axis in ("sequence", "head", "value", "key")),
        *((name, ctypes.c_void_p) for name in ("final", "start", "checkpoints", "cu_seqlens", "first_slot")),
        ("T", ctypes.c_int64),
        ("bias_params", ctypes.c_float * Bias.MAX_PARAMETERS),
        *((name, ctypes.c_int32) for name in ("bias", "token_type", "N", "H", "K", "V", "C", "slots", "every")),
        *((name, ctypes.c_int32) for name in ("delta_per_channel", "values")),
    ]
    #: the fields whose offsets miras_linear_chain_layout returns, after the size of the struct; then come the limits
    MARKS = ("q", "lr", "initial_sequence", "final", "T", "bias_params", "bias", "values")

    @classmethod
    def layout(cls) -> list[int]:
        limits = memories.LINEAR.kernels["cuda"].sequences
        assert limits is not None and isinstance(limits.chunk, tuple)
        return [ctypes.sizeof(cls), *(getattr(cls, name).offset for name in cls.MARKS), limits.head, max(limits.chunk), COUPLED]


def refuses(library: Any, call: Call) -> str | None:
    """Why this chain cannot read a call that chains can, or None."""
    if not call.retention.is_identity:
        return f"it reads chunks without a retention gate, got {call.retention.name}"
    keys, values = call.q.shape[-1], call.v.shape[-1]
    if call.momentum is not None:
        return "it reads chunks without momentum"
    if keys not in KEYS or values % UNIT:
        return f"it reads chunks with {' or '.join(map(str, KEYS))} keys and a multiple of {UNIT} values, got {keys} and {values}"
    for name, x in (("lr", call.lr), ("log_decay", call.log_decay)):
        if x is not None and x.dim() == 4:
            return f"it reads chunks with gates per token, got {name} per channel"
    if call.bias.row_coupled and values > COUPLED:
        return f"for a bias that couples a row it reads chunks of at most {COUPLED} values, got {values}"
    return None


def forward(library: Any, call: Call, every: int) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """See :class:`~miras_kernels.backends.Backend`."""
    n, heads, values, keys = call.state.dual[0].shape
    q, k, v = (aligned(x) for x in (call.q, call.k, call.v))
    lr, log_decay, delta = (contiguous(x) for x in (call.lr, call.log_decay, call.delta))
    initial, (cu_seqlens, first_slot, segment) = call.state.dual[0].detach(), packed_slots(call, every)
    out = call.v.new_empty(call.v.shape)
    if cu_seqlens is not None:
        out.zero_()  # it may end before T
    state = functools.partial(initial.new_empty, n, heads, values, keys)
    final, start = (state() if wanted else None for wanted in (call.output_final_state, may_end_open(call)))
    checkpoints = checkpoints_like(call, every)
    chain = Chain(
        *map(Tokens.of, (q, k, v, out)), *map(address, (lr, log_decay, delta, initial)), *initial.stride(),
        *map(address, (final, start, checkpoints[0] if checkpoints else None, cu_seqlens, first_slot)),
        T=call.q.shape[1], bias_params=floats(call.bias.padded), bias=call.bias.tag,
        token_type=TOKEN_TYPES[call.q.dtype], N=n, H=heads, K=keys, V=values, C=call.chunk_size, slots=-(-call.q.shape[1] // segment),
        every=max(every, 1),
        delta_per_channel=delta is not None and delta.dim() == 4,
        values=block_values(call.q.dtype, values, n * heads, call.bias.row_coupled, multiprocessors(call.q.device)),
    )  # fmt: skip
    launch(library, library.miras_linear_chain, chain, call.q.device)
    if final is None:
        return out, [], checkpoints
    if start is None:
        return out, [final], checkpoints
    from miras_kernels.kernels.common.final_state import open_chunk_end

    (start,), open_decay = open_chunk_end(call, (start,))
    return out, [final, start, open_decay], checkpoints


def block_values(dtype: torch.dtype, values: int, heads: int, coupled: bool, multiprocessors: int) -> int:
    """Values of a block: 64, or in bfloat16 32 where those would leave too many multiprocessors without a block.

    Args:
        heads: sequences x heads. coupled: the bias couples a row.
    """
    if dtype == torch.float16:
        return 64
    if values <= 32:
        return 32
    return 64 if coupled or 8 * heads * -(-values // 64) >= 7 * multiprocessors else 32
