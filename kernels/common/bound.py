"""Launches of compiled kernels without the work that Triton's own launch repeats every time.

``kernel[grid](...)`` binds some 48 arguments by name, specialises each one and finds the compiled kernel by all of them, which takes longer
than many kernels run. Here arguments that a call's launches share are specialised once, by Triton's own function, and the compiled kernel
that Triton's launch returned is kept under the specialisations. The first launch under every key is Triton's; there they are compared with
what Triton's binder makes of the same arguments, and on any difference the kernel is always launched by Triton. So it is where this
module does not know Triton's internals: an unknown version, an AMD GPU, the interpreter, or hooks that want to see launches.

Everything here that is internal to Triton is the same in versions 3.6 to 3.9. ``TRITON_*`` variables count when a kernel is compiled.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable
from typing import NamedTuple

import triton
from triton import knobs
from triton.backends.compiler import BaseBackend
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver

try:
    from triton._C.libtriton import native_specialize_impl
except ImportError:
    native_specialize_impl = None

__all__ = ["Shared", "run", "signature_of"]

VERSIONS = ((3, 6), (3, 9))
KNOWN = native_specialize_impl is not None and VERSIONS[0] <= tuple(map(int, triton.__version__.split(".")[:2])) <= VERSIONS[1]
#: specialisations and compiled kernels that are kept; a program has a few dozen
MOST = 4096

_kinds: dict[tuple, int] = {}
_bound: dict[tuple, Bound] = {}
_numbers = itertools.count()
_always, _never = itertools.repeat(True), itertools.repeat(False)


class Bound(NamedTuple):
    """A compiled kernel as its launcher takes it; ``kernel`` keeps the code loaded."""

    kernel: CompiledKernel
    run: Callable
    function: object
    metadata: object


class Signature(NamedTuple):
    """A kernel's parameters. It holds the kernel, so that its id stays its own."""

    kernel: triton.JITFunction
    names: frozenset[str]
    constants: frozenset[str]
    values: Callable[[dict], tuple]


class Shared:
    """Arguments that several launches share, by name; ``constants`` are those that no kernel takes at run time."""

    def __init__(self, values: dict, constants: dict):
        self.all = values | constants
        self._values, self._constants = values, constants

    @functools.cached_property
    def kind(self) -> int:
        """A number that stands for the names, specialisations and constants."""
        key = (*self.all, *_specialised(self._values.values()), *self._constants.values())
        return _kinds.get(key) or _kinds.setdefault(key, next(_numbers) + 1)

    def is_constant(self, name: str) -> bool:
        return name in self._constants


def _specialised(values) -> map:
    """The specialisation of every argument: its type, whether it is None or 1, whether 16 divides it."""
    return map(native_specialize_impl, itertools.repeat(BaseBackend), values, _never, _always, _always)


@functools.lru_cache(MOST)
def _picker(names: tuple[str, ...], constants: frozenset[str]) -> Callable[[dict], object]:
    """The values of those names that are constants."""
    chosen = [name for name in names if name in constants]
    return operator.itemgetter(*chosen) if chosen else lambda own: None


_signatures: dict[int, Signature] = {}


def signature_of(kernel) -> Signature:
    found = _signatures.get(id(kernel))
    if found is None:
        constants = frozenset(parameter.name for parameter in getattr(kernel, "params", ()) if parameter.is_constexpr)
        found = Signature(kernel, frozenset(kernel.arg_names), constants, operator.itemgetter(*kernel.arg_names))
        _signatures[id(kernel)] = found
    return found


def _is_watched(kernel) -> bool:
    """Whether anyone wants to see launches, or changes what is compiled."""
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    hooks = getattr(enter, "calls", enter) or getattr(leave, "calls", leave) or kernel.pre_run_hooks
    return bool(hooks) or getattr(runtime, "add_stages_inspection_hook", None) is not None


def run(kernel, grid: tuple[int, ...], config, options: Callable[[], dict], shared: Shared, own: dict) -> None:
    """Launch on the current device and stream. ``own``: the arguments that ``shared`` does not have, or has otherwise."""
    given = shared.all | own
    if not KNOWN or type(kernel) is not triton.JITFunction or _is_watched(kernel):
        kernel[grid](**{name: given[name] for name in kernel.arg_names}, **options())
        return
    signature, names, active = signature_of(kernel), tuple(own), driver.active
    device = active.get_current_device()
    key = (
        id(kernel), id(active), device, config, knobs.runtime.debug, knobs.compilation.instrumentation_mode, shared.kind,
        names, _picker(names, signature.constants)(own), *_specialised(own.values()),
    )  # fmt: skip
    bound = _bound.get(key)
    if bound is None:
        compiled = kernel[grid](**{name: given[name] for name in kernel.arg_names}, **options())
        if isinstance(compiled, CompiledKernel) and _agrees(signature, device, given, shared, own):
            if len(_bound) + len(_kinds) > MOST:
                _bound.clear()
                _kinds.clear()
            _bound[key] = Bound(compiled, compiled.run, compiled.function, compiled.packed_metadata)
        return
    x, y, z = (*grid, 1, 1)[:3]
    stream = active.get_current_stream(device)
    bound.run(x, y, z, stream, bound.function, bound.metadata, None, None, None, *signature.values(given))


def _agrees(signature: Signature, device: int, given: dict, shared: Shared, own: dict) -> bool:
    """Whether the key tells apart whatever Triton does, and Triton passes the same arguments in the same order."""
    *_, target, _, binder = signature.kernel.device_caches[device]
    if target.backend != "cuda":
        return False
    bound, specialised, _ = binder(**{name: given[name] for name in signature.kernel.arg_names})
    if [*map(id, bound.values())] != [*map(id, signature.values(given))]:
        return False
    for parameter, theirs in zip(signature.kernel.params, specialised, strict=True):
        name = parameter.name
        if parameter.is_constexpr:
            if not (name in own or shared.is_constant(name)):
                return False
        elif not parameter.do_not_specialize and tuple(_specialised([given[name]])) != (theirs,):
            return False
    return True
