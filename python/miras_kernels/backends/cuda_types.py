"""What the calls into the CUDA C++ library share: tensors as its structs have them, and launches."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..call import Call
from ..tables.biases import TABLE as BIASES
from ..tables.biases import CustomBias

__all__ = ["TOKEN_TYPES", "Tokens", "address", "aligned", "contiguous", "floats", "launch", "packed_slots", "refuses_chunks"]

#: the numbers of MirasTokenType
TOKEN_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Tokens(ctypes.Structure):
    """MirasTokens of csrc/cuda/step.h."""

    _fields_: ClassVar = [("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("batch", "token", "head"))]

    @staticmethod
    def of(x: Tensor) -> Tokens:
        return Tokens(x.data_ptr(), *x.stride()[:3])


def contiguous(x: Tensor | None) -> Tensor | None:
    """A gate or LayerNorm parameter as the kernels take it."""
    return None if x is None else x.detach().to(torch.float32).contiguous()


def aligned(x: Tensor) -> Tensor:
    """q, k or v with neighbouring channels and rows that begin at multiples of 16 bytes."""
    x, whole = x.detach(), 16 // x.element_size()
    fits = x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(stride % whole == 0 for stride in x.stride()[:-1])
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def floats(numbers: Sequence[float]) -> ctypes.Array[ctypes.c_float]:
    return (ctypes.c_float * len(numbers))(*numbers)


def refuses_chunks(call: Call) -> str | None:
    """Why no chain of either memory can read a call in chunks, or None."""
    if call.q.dtype not in (torch.bfloat16, torch.float16):
        return f"it reads chunks of bfloat16 or float16 inputs, got {call.q.dtype}"
    if reason := call.exceeds("cuda"):
        return reason
    if call.bias.tag not in BIASES or isinstance(call.bias, CustomBias):
        return f"it reads chunks with the built-in biases only, got {call.bias.name}"
    if call.state.open_chunk is not None:
        return "it does not continue inside a chunk"
    return None


def packed_slots(call: Call, every: int) -> tuple[Tensor | None, Tensor | None, int]:
    """``cu_seqlens`` in int64, the slot of every packed sequence's first checkpoint (None without them), and tokens of a slot."""
    segment = call.chunk_size * max(every, 1)
    if call.cu_seqlens is None:
        return None, None, segment
    cu_seqlens = call.cu_seqlens.to(torch.int64).contiguous()
    slots = (cu_seqlens.diff() + segment - 1) // segment
    return cu_seqlens, slots.cumsum(0) - slots if every else None, segment


def address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def launch(library: Any, function: Callable, struct: ctypes.Structure, device: torch.device) -> None:
    """Call a function of the library on the device's current stream.

    Raises:
        RuntimeError: with CUDA's message.
    """
    on_device = device.type == "cuda"
    with torch.cuda.device(device) if on_device else contextlib.nullcontext():
        error = function(ctypes.byref(struct), torch.cuda.current_stream().cuda_stream if on_device else None)
    if error:
        raise RuntimeError(f"cuda: a launch failed: {library.miras_cuda_error(error).decode()}")
