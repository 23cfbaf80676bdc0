"""Which backend serves a call, and why the others do not.

A backend is an object with the attributes of :class:`Backend`. Choice goes by the device of the tensors: each device has an
ordered list of backends, fastest first, and ``"auto"`` takes the first that can serve the call and that was not found wrong on this
machine (:mod:`miras_kernels.verification`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from . import verification
from .call import Call

__all__ = ["BACKENDS", "NAMES", "Backend", "candidates", "choose", "explain", "kept_states_like", "unavailable"]


class Backend(Protocol):
    """What dispatch and autograd need of a backend. All tensors are plain: no autograd graph reaches a backend."""

    name: str
    #: what "auto" does where it has not been verified on this machine: "take", "warn" (and take) or "leave"
    unverified: str
    #: the options of the delta rule (:attr:`Call.variants`) that it serves
    variants: tuple[str, ...]

    def files(self) -> list[Path]:
        """What its kernels are read from."""

    def environment(self, device: torch.device) -> dict[str, str]:
        """What else its results on a device depend on, by name, beside PyTorch and the device's name and driver."""

    def decodes(self, call: Call) -> bool:
        """Whether it reads a call without gradients token by token."""

    def block_tokens(self, call: Call) -> int:
        """The tokens of a block where it takes the exact steps of a call in blocks (docs/mathematics.md, section 13), else 0."""

    def unavailable(self) -> str | None:
        """Why this backend cannot run here at all, or None."""

    def runs_on(self, device: torch.device) -> bool:
        """Whether it takes tensors on this device."""

    def operands(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of the numbers it multiplies, for inputs of a dtype: what its rounding errors are judged by."""

    def refuses(self, call: Call, differentiate: bool) -> str | None:
        """Why it cannot serve this call, or None."""

    def refuses_steps(self, call: Call) -> str | None:
        """Why it cannot read such tokens one by one, or None."""

    def stepper(self, call: Call) -> Callable:
        """See :func:`stepper`."""

    def forward(self, call: Call, checkpoint_every: int) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """``(out, final state tensors in MemoryState order, saved)``; ``checkpoint_every == 0``: no backward will come."""

    def saved_like(self, call: Call, checkpoint_every: int) -> list[Tensor]:
        """Empty tensors shaped like what ``forward`` saves, from shapes alone."""

    def backward(self, call: Call, checkpoint_every: int, saved: list[Tensor], grad_out: Tensor, grad_state: list[Tensor]) -> dict:
        """Gradients by argument name, ``state`` for the initial matrices: a list in the order of :meth:`MemoryState.matrices`, like
        ``grad_state``, the gradients of the final ones, which may be empty: zero.
        """


def stepper(backend: str, call: Call) -> Callable:
    """Who reads a few tokens in place: ``run(buffers, q, k, v, lr, log_decay, delta, momentum, out)``, see :mod:`miras_kernels.decode`.

    Where it has a method ``bind(buffers)``, that returns a faster ``step(q, k, v, lr, log_decay, delta, momentum, out)`` for these buffers,
    which looks at its arguments itself: it returns the output, or None, having done nothing, where they are not like the call's.

    Raises:
        ValueError: a named backend that cannot.
    """
    for name in candidates(call.q.device) if backend == "auto" else (backend,):
        reason = _unusable(name, call) or BACKENDS[name].refuses_steps(call)
        if reason is None and (backend != "auto" or _doubt(name, call, steps=True, warn=True) is None):
            return BACKENDS[name].stepper(call)
        if backend != "auto" or name == "reference":
            raise ValueError(f"backend: {backend!r} cannot decode this: {reason}")
    raise AssertionError("unreachable: the reference is the last candidate")


def kept_states_like(call: Call, every: int) -> list[Tensor]:
    """Where a kernel keeps the matrices of every ``every``-th chunk's start for its backward, empty; nothing if every is 0.

    ``[slots, H, Dk, Dv]``, with momentum ``[slots, H, 2, Dk, Dv]``: the dual, then S. An MLP memory has ``[slots, H, 2, Hd, D]``, W1
    transposed and W2, with momentum ``[slots, H, 4, Hd, D]``. Packed sequences need at most one slot more each.
    """
    if not every:
        return []
    dual, tokens, span = call.state.dual[0], call.q.shape[1], call.chunk_size * every
    n, h, rows, columns = dual.shape
    slots = n * -(-tokens // span) if call.cu_seqlens is None else n + tokens // span
    matrices = len(call.state.matrices())
    several = () if matrices == 1 else (matrices,)
    return [dual.new_empty(slots, h, *several, columns, rows)]


#: every backend name, in no order; filled by the modules that implement them (see miras_kernels/memory.py)
BACKENDS: dict[str, Backend] = {}
NAMES = ("auto", "reference", "cpp", "triton", "cuda")

#: fastest first, by device type; every other device runs the reference
_BY_DEVICE = {"cpu": ("cpp", "reference"), "cuda": ("cuda", "triton", "reference")}


def candidates(device: torch.device) -> tuple[str, ...]:
    """The backends that "auto" considers for tensors on this device, fastest first."""
    return _BY_DEVICE.get(device.type, ("reference",))


def unavailable(name: str) -> str | None:
    """Why a backend cannot run on this machine, or None."""
    return BACKENDS[name].unavailable()


def _unusable(name: str, call: Call) -> str | None:
    reason = unavailable(name)
    if reason is None and not BACKENDS[name].runs_on(call.q.device):
        reason = f"it does not run on {call.q.device.type} tensors"
    if reason is None and name != "reference" and name not in call.memory.kernels:
        reason = f"it has no kernels for {call.memory.title}"
    return reason


def _refusal(name: str, call: Call, differentiate: bool) -> str | None:
    reason = _unusable(name, call) or _unserved(name, call)
    return reason if reason is not None else BACKENDS[name].refuses(call, differentiate)


def _unserved(name: str, call: Call) -> str | None:
    """Which option of the delta rule a backend lacks, or None."""
    lacks = [option for option in call.variants if option not in BACKENDS[name].variants]
    return f"it does not serve {lacks[0]}" if lacks else None


def _doubt(name: str, call: Call, *, steps: bool = False, differentiate: bool = False, warn: bool = False) -> str | None:
    """Why "auto" leaves a backend alone that could serve the call, or a decoder's ``steps`` like it; or None."""
    backend, device = BACKENDS[name], call.q.device
    if backend.unverified == "take" and not verification.known(name, device):
        return None
    mode = verification.DECODE if steps or (not differentiate and backend.decodes(call)) else verification.SEQUENCE
    what = verification.configuration(call.memory.name, call.bias, call.retention, call.q.dtype, mode)
    sizes = verification.sizes(int(call.q.shape[-1]), int(call.v.shape[-1]), call.hidden, call.chunk_size)
    return verification.doubt(name, device, what, sizes, backend.unverified, warn)


class Explanation(dict):
    """For every backend the reason why "auto" does not take it, or None.

    Attributes:
        algorithms: how each one that can serve the call would compute it, by name.
    """

    algorithms: dict[str, str]


def explain(call: Call, differentiate: bool) -> Explanation:
    """What each backend says about a call; those for its device come first."""
    first = candidates(call.q.device)
    reasons = Explanation({name: _refusal(name, call, differentiate) for name in (*first, *(n for n in NAMES[1:] if n not in first))})
    for name in first:
        reasons[name] = reasons[name] or _doubt(name, call, differentiate=differentiate)
    reasons.algorithms = {name: _algorithm(name, call, differentiate) for name, reason in reasons.items() if reason is None}
    return reasons


def _algorithm(name: str, call: Call, differentiate: bool) -> str:
    if not differentiate and BACKENDS[name].decodes(call):
        return "token by token"
    size = BACKENDS[name].block_tokens(call)
    return f"exact steps in blocks of {size} tokens" if size else f"chunks of {call.chunk_size} tokens"


#: backends whose absence "auto" mentions once: what is missing, and for which tensors
_EXPECTED = {"cpp": ("C++ kernels", "CPU tensors"), "triton": ("Triton kernels", "CUDA tensors")}
_warned: set[str] = set()


def choose(backend: str, call: Call, differentiate: bool) -> str:
    """The backend that serves the call.

    Raises:
        ValueError: an unknown name, or a named backend that cannot serve the call, with its reason.
    """
    if backend not in NAMES:
        raise ValueError(f"backend: expected one of {', '.join(map(repr, NAMES))}, got {backend!r}")
    if backend != "auto":
        reason = _refusal(backend, call, differentiate)
        if reason is not None:
            raise ValueError(f"backend: {backend!r} cannot serve this call: {reason}")
        return backend
    for name in candidates(call.q.device):
        missing = unavailable(name)
        if missing is not None and name in _EXPECTED and name not in _warned and not torch.compiler.is_compiling():
            _warned.add(name)
            kernels, tensors = _EXPECTED[name]
            warnings.warn(f"miras_kernels: the {kernels} are missing, so {tensors} take the slower reference: {missing}", stacklevel=4)
        if _refusal(name, call, differentiate) is None and _doubt(name, call, differentiate=differentiate, warn=True) is None:
            return name
    raise AssertionError("the reference serves every call")
