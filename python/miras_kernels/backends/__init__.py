"""The implementations of the memories: the reference, C++, Triton and CUDA C++; and what dispatch needs of each."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..call import Call

__all__ = ["BACKENDS", "Backend", "checkpoints_like", "may_end_open", "multiprocessors"]


class Backend(Protocol):
    """What dispatch and autograd call. All tensors are plain: no autograd graph reaches a backend."""

    name: str
    #: what "auto" does with a backend that has not been verified on this machine: "use", "warn" (and use) or "skip"
    unverified: str
    #: the variants of the delta rule (:attr:`Call.variants`) that it serves
    variants: tuple[str, ...]

    def files(self) -> list[Path]:
        """The files that its kernels are read from."""

    def environment(self, device: torch.device) -> dict[str, str]:
        """What else its results on a device depend on, by name, beside PyTorch and the device's name and driver."""

    def decodes(self, call: Call) -> bool:
        """Whether it reads a call without gradients token by token."""

    def decodes_decay_first(self, call: Call) -> bool:
        """Whether its decoding steps take the decay of such a token, which comes first, to the state themselves."""

    def block_tokens(self, call: Call) -> int:
        """The tokens of a block if it takes the exact steps of a call in blocks (docs/mathematics.md, section 13), else 0."""

    def unavailable(self) -> str | None:
        """Why this backend cannot run on this machine, or None."""

    def runs_on(self, device: torch.device) -> bool:
        """Whether it takes tensors on this device."""

    def operands(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype in which it multiplies inputs of a dtype: error budgets follow from it."""

    def refuses(self, call: Call, differentiate: bool) -> str | None:
        """Why it cannot serve this call, or None."""

    def refuses_backward(self, call: Call) -> str | None:
        """Why another backend computes the gradients of a call that it serves, or None."""

    def refuses_steps(self, call: Call) -> str | None:
        """Why it cannot decode such tokens, or None."""

    def stepper(self, call: Call) -> Callable:
        """See :func:`miras_kernels.dispatch.stepper`."""

    def forward(self, call: Call, checkpoint_every: int) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """``(out, final state tensors in MemoryState order, saved)``; with ``checkpoint_every == 0`` there will be no backward."""

    def saved_like(self, call: Call, checkpoint_every: int) -> list[Tensor]:
        """Empty tensors shaped like what ``forward`` saves, from shapes alone."""

    def backward(self, call: Call, checkpoint_every: int, saved: list[Tensor], grad_out: Tensor, grad_state: list[Tensor]) -> dict:
        """Gradients by argument name, and as ``state`` those of the initial matrices: a list in the order of
        :meth:`MemoryState.matrices`, like ``grad_state``, the gradients of the final ones, which is empty if they are all zero.
        """


#: every backend by name; filled by miras_kernels/memory.py
BACKENDS: dict[str, Backend] = {}


def checkpoints_like(call: Call, every: int) -> list[Tensor]:
    """Empty checkpoints: the matrices at the start of every ``every``-th chunk; none if ``every`` is 0.

    ``[slots, H, Dk, Dv]``, with momentum ``[slots, H, 2, Dk, Dv]``: the dual, then S. An MLP memory has ``[slots, H, 2, Hd, D]``, W1
    transposed and W2, with momentum ``[slots, H, 4, Hd, D]``. Packed sequences need at most one slot more each.
    """
    if not every:
        return []
    dual, tokens, segment = call.state.dual[0], call.q.shape[1], call.chunk_size * every
    n, h, rows, columns = dual.shape
    slots = n * -(-tokens // segment) if call.cu_seqlens is None else n + tokens // segment
    matrices = len(call.state.matrices())
    several = () if matrices == 1 else (matrices,)
    return [dual.new_empty(slots, h, *several, columns, rows)]


def may_end_open(call: Call) -> bool:
    """Whether sequences can end inside a chunk, as far as shapes tell, so that the final state needs an open chunk."""
    resumes = call.state.open_chunk is not None
    return call.output_final_state and (resumes or call.cu_seqlens is not None or call.q.shape[1] % call.chunk_size != 0)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many a GPU has; more than any for another device, as in a recording."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2**31
