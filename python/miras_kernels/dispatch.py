"""Which backend serves a call, and why the others do not.

Each device type has an ordered list of backends, fastest first. ``"auto"`` takes the first that can serve the call, unless verification
found it wrong on this machine (:mod:`miras_kernels.verification`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch

from . import verification
from .backends import BACKENDS
from .call import Call

__all__ = ["BACKENDS", "NAMES", "candidates", "choose", "explain", "stepper", "unavailable", "unserved"]

NAMES = ("auto", "reference", "cpp", "triton", "cuda")

#: fastest first, by device type; every other device runs the reference
_BY_DEVICE = {"cpu": ("cpp", "reference"), "cuda": ("cuda", "triton", "reference")}


def candidates(device: torch.device) -> tuple[str, ...]:
    """The backends that "auto" considers for tensors on this device, fastest first."""
    return _BY_DEVICE.get(device.type, ("reference",))


def unavailable(name: str) -> str | None:
    """Why a backend cannot run on this machine, or None."""
    return BACKENDS[name].unavailable()


def _cannot_run(name: str, call: Call) -> str | None:
    """Why a backend cannot run on the call's device or has nothing for its memory, or None."""
    reason = unavailable(name)
    if reason is None and not BACKENDS[name].runs_on(call.q.device):
        reason = f"it does not run on {call.q.device.type} tensors"
    if reason is None and name != "reference" and name not in call.memory.kernels:
        reason = f"it has no kernels for {call.memory.title}"
    return reason


def _refusal(name: str, call: Call, differentiate: bool) -> str | None:
    reason = _cannot_run(name, call) or unserved(name, call)
    return reason if reason is not None else BACKENDS[name].refuses(call, differentiate)


def unserved(name: str, call: Call) -> str | None:
    """Which option of the delta rule a backend does not serve, or None."""
    lacks = [option for option in call.lasting_variants if option not in BACKENDS[name].variants]
    return f"it does not serve {lacks[0]}" if lacks else None


def _distrust_reason(name: str, call: Call, *, steps: bool = False, differentiate: bool = False, warn: bool = False) -> str | None:
    """Why "auto" skips a backend that could serve the call, or a decoder's ``steps`` like it; or None."""
    backend, device = BACKENDS[name], call.q.device
    if backend.unverified == "use" and not verification.known(name, device):
        return None
    mode = verification.DECODE if steps or (not differentiate and backend.decodes(call)) else verification.SEQUENCE
    what = verification.configuration(call.memory.name, call.bias, call.retention, call.q.dtype, mode)
    sizes = verification.sizes(int(call.q.shape[-1]), int(call.v.shape[-1]), call.hidden, call.chunk_size)
    return verification.distrust_reason(name, device, what, sizes, backend.unverified, warn)


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
        reasons[name] = reasons[name] or _distrust_reason(name, call, differentiate=differentiate)
    reasons.algorithms = {name: _algorithm(name, call, differentiate) for name, reason in reasons.items() if reason is None}
    return reasons


def _algorithm(name: str, call: Call, differentiate: bool) -> str:
    if not differentiate and BACKENDS[name].decodes(call):
        return "token by token"
    size = BACKENDS[name].block_tokens(call)
    found = f"exact steps in blocks of {size} tokens" if size else f"chunks of {call.chunk_size} tokens"
    elsewhere = BACKENDS[name].refuses_backward(call) if differentiate else None
    return f"{found}; the Triton kernels do the backward: {elsewhere}" if elsewhere else found


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
        if _refusal(name, call, differentiate) is None and _distrust_reason(name, call, differentiate=differentiate, warn=True) is None:
            return name
    raise AssertionError("the reference serves every call")


def stepper(backend: str, call: Call) -> Callable:
    """Decoding steps for calls like this one: ``run(buffers, q, k, v, lr, log_decay, delta, momentum, out)``, where buffers are
    :class:`miras_kernels.decode.buffers.Buffers` and gates are tensors.

    ``run`` may have two methods. ``bind(buffers)`` returns a faster ``step(q, k, v, lr, log_decay, delta, momentum, out)`` for these
    buffers that checks its arguments: it returns the output, or does nothing and returns None if they are not like the call's.
    ``on_value()`` decodes the call itself from its state, a value, and returns what :func:`miras_kernels.decode.read` does.

    Raises:
        ValueError: a backend that cannot decode such tokens, with its reason.
    """
    for name in candidates(call.q.device) if backend == "auto" else (backend,):
        reason = _cannot_run(name, call) or BACKENDS[name].refuses_steps(call)
        if reason is None and (backend != "auto" or _distrust_reason(name, call, steps=True, warn=True) is None):
            return BACKENDS[name].stepper(call)
        if backend != "auto" or name == "reference":
            raise ValueError(f"backend: {backend!r} cannot decode this: {reason}")
    raise AssertionError("the reference is the last candidate on every device")
