"""What the calls into the CUDA C++ library share: tensors as its structs have them, and launches."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

__all__ = ["TOKEN_TYPES", "Tokens", "address", "aligned", "contiguous", "launch"]

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
