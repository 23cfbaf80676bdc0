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

import torch
import triton
from triton import knobs
from triton.backends.compiler import BaseBackend
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver

try:
    from triton._C.libtriton import native_specialize_impl
except ImportError:
    native_specialize_impl = None

__all__ = ["Shared", "by_name", "run"]

VERSIONS = ((3, 6), (3, 9))
KNOWN = native_specialize_impl is not None and VERSIONS[0] <= tuple(map(int, triton.__version__.split(".")[:2])) <= VERSIONS[1]
#: tile sizes, which every launch has
BLOCKS = frozenset(("BV", "BK", "BD", "BH"))
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
        of_values = [
            _of_tuple(x) if isinstance(x, tuple) else native_specialize_impl(BaseBackend, x, False, True, True)
            for x in self._values.values()
        ]
        key = (*self.all, *of_values, *self._constants.values())
        return _kinds.get(key) or _kinds.setdefault(key, next(_numbers) + 1)

    def is_constant(self, name: str) -> bool:
        return name in self._constants


def _specialised(values) -> map:
    """The specialisation of every argument: its type, whether it is None or 1, whether 16 divides it."""
    return map(native_specialize_impl, itertools.repeat(BaseBackend), values, _never, _always, _always)


#: a tuple's takes several times as long as a number's, and most strides come again
_of_tuple = functools.lru_cache(MOST)(lambda x: next(_specialised([x])))


@functools.lru_cache(MOST)
def _picker(names: tuple[str, ...], constants: frozenset[str]) -> Callable[[dict], object]:
    """The values of those names that are constants."""
    chosen = [name for name in names if name in constants]
    return operator.itemgetter(*chosen) if chosen else lambda own: None


_signatures: dict[int, Signature] = {}


def _signature(kernel) -> Signature:
    found = _signatures.get(id(kernel))
    if found is None:
        constants = frozenset(parameter.name for parameter in kernel.params if parameter.is_constexpr)
        found = _signatures[id(kernel)] = Signature(kernel, constants, operator.itemgetter(*kernel.arg_names))
    return found


def by_name(kernel, shared: Shared, own: dict) -> dict:
    """All arguments of a kernel. Tile sizes in ``own`` that it does not name are left out."""
    if unknown := own.keys() - set(kernel.arg_names) - BLOCKS:
        raise TypeError(f"{kernel.__name__} takes no {', '.join(sorted(unknown))}")
    given = shared.all | own
    return {name: given[name] for name in kernel.arg_names}


def _is_watched(kernel) -> bool:
    """Whether anyone wants to see launches, or changes what is compiled."""
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    hooks = getattr(enter, "calls", enter) or getattr(leave, "calls", leave) or kernel.pre_run_hooks
    return hooks or runtime.add_stages_inspection_hook is not None


def run(kernel, grid: tuple[int, ...], config, device: torch.device, options: Callable, shared: Shared, own: dict) -> None:
    """Launch on the current stream of a device, which is the current one.

    Args:
        options: gives Triton's options for a configuration on a device.
        own: the arguments that ``shared`` does not have, or has otherwise.
    """
    if not KNOWN or type(kernel) is not triton.JITFunction or _is_watched(kernel):
        kernel[grid](**by_name(kernel, shared, own), **options(config, device))
        return
    signature, names, active = _signature(kernel), tuple(own), driver.active
    index = active.get_current_device()
    key = (
        id(kernel), id(active), index, config, knobs.runtime.debug, knobs.compilation.instrumentation_mode, shared.kind,
        names, _picker(names, signature.constants)(own), *_specialised(own.values()),
    )  # fmt: skip
    bound = _bound.get(key)
    if bound is None:
        compiled = kernel[grid](**by_name(kernel, shared, own), **options(config, device))
        if isinstance(compiled, CompiledKernel) and _agrees(signature, index, shared, own):
            if len(_bound) + len(_kinds) > MOST:
                _bound.clear()
                _kinds.clear()
            _bound[key] = Bound(compiled, compiled.run, compiled.function, compiled.packed_metadata)
        return
    x, y, z = (*grid, 1, 1)[:3]
    stream = active.get_current_stream(index)
    bound.run(x, y, z, stream, bound.function, bound.metadata, None, None, None, *signature.values(shared.all | own))


def _agrees(signature: Signature, device: int, shared: Shared, own: dict) -> bool:
    """Whether the key tells apart whatever Triton does, and Triton passes the same arguments in the same order."""
    *_, target, _, binder = signature.kernel.device_caches[device]
    if target.backend != "cuda":
        return False
    given = by_name(signature.kernel, shared, own)
    bound, specialised, _ = binder(**given)
    if [*map(id, bound.values())] != [*map(id, signature.values(shared.all | own))]:
        return False
    for parameter, theirs in zip(signature.kernel.params, specialised, strict=True):
        name = parameter.name
        if parameter.is_constexpr:
            if not (name in own or shared.is_constant(name)):
                return False
        elif not parameter.do_not_specialize and tuple(_specialised([given[name]])) != (theirs,):
            return False
    return True
