"""The chain of the linear memory in CUDA C++, ``csrc/cuda/linear_chain.h``: which calls it serves, and its launch."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..call import Call
from ..tables.biases import Bias
from . import checkpoints_like, may_end_open

__all__ = ["LinearChain", "forward", "refusal"]

#: the numbers of MirasTokenType
TOKEN_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
#: head dimensions of the keys, the unit of those of the values, and the values of the largest block, which a bias may couple
KEYS, UNIT, COUPLED = (64, 128), 16, 64


class Tokens(ctypes.Structure):
    """MirasTokens of csrc/cuda/step.h."""

    _fields_: ClassVar = [("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("batch", "token", "head"))]

    @staticmethod
    def of(x: Tensor) -> Tokens:
        return Tokens(x.data_ptr(), *x.stride()[:3])


class LinearChain(ctypes.Structure):
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
    #: the fields whose offsets miras_linear_chain_layout returns, after the size of the struct
    MARKS = ("q", "lr", "initial_sequence", "final", "T", "bias_params", "bias", "values")

    @classmethod
    def layout(cls) -> list[int]:
        return [ctypes.sizeof(cls), *(getattr(cls, name).offset for name in cls.MARKS)]


def refusal(call: Call) -> str | None:
    """Why the chain does not serve a call of a linear memory, apart from the limits in tables/memories.py; or None."""
    keys, values = call.q.shape[-1], call.v.shape[-1]
    by_channel = [name for name in ("lr", "log_decay") if getattr(call, name) is not None and getattr(call, name).dim() == 4]
    if call.q.dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bfloat16 or float16 inputs, or decodes; got {call.q.dtype}"
    if keys not in KEYS or values % UNIT:
        return f"it needs {' or '.join(map(str, KEYS))} keys and a multiple of {UNIT} values, got {keys} and {values}"
    if not call.retention.is_identity:
        return f"it takes L2Retention alone, got {call.retention!r}"
    if call.momentum is not None:
        return "it takes no momentum"
    if by_channel:
        return f"it takes gates by token, got {by_channel[0]} by channel"
    if call.bias.row_coupled and values > COUPLED:
        return f"for a bias that couples a row it takes at most {COUPLED} values, got {values}"
    if call.state.open_chunk is not None:
        return "it does not resume inside a chunk"
    return None


def forward(library: Any, call: Call, every: int) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """As :meth:`Backend.forward`; the checkpoints are those of the Triton kernels.

    Raises:
        RuntimeError: the launch failed, with CUDA's message.
    """
    n, heads, values, keys = call.state.dual[0].shape
    q, k, v = (_aligned(x) for x in (call.q, call.k, call.v))
    lr, log_decay, delta = (None if x is None else x.detach().to(torch.float32).contiguous() for x in (call.lr, call.log_decay, call.delta))
    initial, cu_seqlens = call.state.dual[0].detach(), None if call.cu_seqlens is None else call.cu_seqlens.to(torch.int64).contiguous()
    out = call.v.new_empty(call.v.shape)
    if cu_seqlens is not None:
        out.zero_()  # it may end before T
    state = functools.partial(initial.new_empty, n, heads, values, keys)
    final, start = (state() if wanted else None for wanted in (call.output_final_state, may_end_open(call)))
    checkpoints, slots, first_slot = checkpoints_like(call, every), 0, None
    if every:
        from miras_kernels.kernels.common.launch import Slots

        segments = Slots.of(cu_seqlens, n, call.q.shape[1], call.chunk_size * every)
        slots, first_slot = segments.per_sequence, segments.first
    chain = LinearChain(
        *map(Tokens.of, (q, k, v, out)), *map(_address, (lr, log_decay, delta, initial)), *initial.stride(),
        *map(_address, (final, start, checkpoints[0] if checkpoints else None, cu_seqlens, first_slot)),
        T=call.q.shape[1], bias_params=(ctypes.c_float * Bias.MAX_PARAMETERS)(*call.bias.padded), bias=call.bias.tag,
        token_type=TOKEN_TYPES[call.q.dtype], N=n, H=heads, K=keys, V=values, C=call.chunk_size, slots=slots, every=every,
        delta_per_channel=delta is not None and delta.dim() == 4, values=_block_values(call),
    )  # fmt: skip
    with torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext():
        error = library.miras_linear_chain(ctypes.byref(chain), torch.cuda.current_stream().cuda_stream if q.is_cuda else None)
    if error:
        raise RuntimeError(f"cuda: launching the chain failed: {library.miras_cuda_error(error).decode()}")
    if final is None:
        return out, [], checkpoints
    if start is None:
        return out, [final], checkpoints
    from miras_kernels.kernels.common.final_state import open_chunk_end

    (start,), open_decay = open_chunk_end(call, (start,))
    return out, [final, start, open_decay], checkpoints


def _block_values(call: Call) -> int:
    """Values of a block: 64, or 32 where those would leave too many multiprocessors without a block."""
    values, heads = call.v.shape[-1], call.state.dual[0].shape[0] * call.q.shape[2]
    if values <= 32:
        return 32
    fills = 8 * heads * -(-values // 64) >= 7 * multiprocessors(call.q.device)
    return 64 if call.bias.row_coupled or fills else 32


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2**31


def _aligned(x: Tensor) -> Tensor:
    """q, k or v with neighbouring channels, and tokens that begin at multiples of 16 bytes."""
    x = x.detach()
    aligned = x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(s * x.element_size() % 16 == 0 for s in x.stride()[:3])
    return x if aligned else x.clone(memory_format=torch.contiguous_format)


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()
