"""Launches of compiled kernels without the work that Triton's own launch repeats every time.

``kernel[grid](...)`` binds some 48 arguments by name, specialises each one and finds the compiled kernel by all of them, which takes longer
than many kernels run. Here the compiled kernel that Triton's launch returned is kept under what it depends on: dtypes and alignments of
tensors, types of numbers, values of constants. Arguments that a call's launches share are read once; what is the same for all arguments of
the same names and types (:class:`Layout`) is worked out once in a process. The first launch under every key is Triton's; there the keys are
compared with what Triton's binder makes of the same arguments, and on any difference the kernel is always launched by Triton. So it is
where this module does not know Triton's internals: an unknown version, an AMD GPU, the interpreter, or hooks that want to see launches.

Tensors are given to Triton's launcher as addresses, which are read here in any case. It would read them again, and ask the driver for each
tensor whether the device can access it: the public functions have checked that.

Everything here that is internal to Triton is the same in versions 3.6 to 3.9. ``TRITON_*`` variables count when a kernel is compiled.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Container
from typing import NamedTuple

import torch
import triton
from torch import Tensor
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
#: compiled kernels that are kept; a process has a few dozen
MOST = 4096
#: of a tensor's address, in bytes: what Triton tells apart
ALIGNMENT = 16

_kernels: list[CompiledKernel] = []
_address, _dtype = Tensor.data_ptr, operator.attrgetter("dtype")
_past_alignment = (ALIGNMENT - 1).__and__


class Bound(NamedTuple):
    """A compiled kernel as its launcher takes it; ``kernel`` keeps the code loaded."""

    kernel: CompiledKernel
    run: Callable
    function: object
    metadata: object


def _specialised(x) -> tuple:
    """What Triton tells apart of an argument: its type, whether it is None or 1, whether 16 divides it."""
    return native_specialize_impl(BaseBackend, x, False, True, True)


#: of numbers and strides, most of which come again
_of_number = functools.lru_cache(MOST, typed=True)(_specialised)


def _alignment(addresses: tuple[int, ...]) -> bool | tuple[bool, ...]:
    """Which addresses are aligned; True: all of them, as is usual."""
    return not any(map(_past_alignment, addresses)) or tuple(x % ALIGNMENT == 0 for x in addresses)


def _picker(places: list[int]) -> Callable[[tuple], tuple]:
    """The values at those places."""
    if len(places) > 1:
        return operator.itemgetter(*places)
    return (lambda values: (values[places[0]],)) if places else (lambda values: ())


class Kind:
    """Arguments that compiled kernels do not tell apart. ``layouts``: of those that were read after them, by names, types and all else."""

    def __init__(self, names: tuple[str, ...]):
        self.names, self.layouts = names, {}


class Layout:
    """How arguments of the same names and types are read.

    ``names``: of the values that :meth:`read` gives, with those before them. ``found``: by what it says of the values, their kinds, or the
    compiled kernels for a launch's own arguments.
    """

    def __init__(self, before: Kind, names: tuple[str, ...], types: tuple[type, ...], constants: Container[str]):
        places: dict[str, list[int]] = {"tensors": [], "numbers": [], "constants": [], "none": []}
        for i, (name, x) in enumerate(zip(names, types, strict=True)):
            kind = "tensors" if issubclass(x, Tensor) else "none" if x is type(None) else "numbers"
            places["constants" if name in constants else kind].append(i)
        self.names, self.found = before.names + tuple(names[i] for found in places.values() for i in found), {}
        self.tensors, self.numbers, self.constants, _ = map(_picker, places.values())
        self.others = _picker([i for kind, found in places.items() if kind != "tensors" for i in found])
        self.only_tensors = not (places["numbers"] or places["constants"])

    def read(self, values: tuple) -> tuple[tuple, tuple]:
        """The values, with addresses for tensors, and what of them a compiled kernel depends on."""
        tensors = self.tensors(values)
        addresses = tuple(map(_address, tensors))
        key = (_alignment(addresses), *map(_dtype, tensors))
        if not self.only_tensors:
            key += (*map(_of_number, self.numbers(values)), *self.constants(values))
        return addresses + self.others(values), key


#: before all arguments; what launches have shown so far is kept here
_none = Kind(())


class Site(Layout):
    """Launches of a kernel with shared arguments of one kind, and own ones that have the same names and types."""

    def __init__(self, kernel, before: Kind, own: dict):
        constants = BLOCKS.union(parameter.name for parameter in kernel.params if parameter.is_constexpr)
        super().__init__(before, tuple(own), tuple(map(type, own.values())), constants)
        self.kernel = kernel  # so that its id stays its own
        places = {name: i for i, name in enumerate(self.names)}  # a launch's own arguments take the place of shared ones
        self.arguments = operator.itemgetter(*(places[name] for name in kernel.arg_names))


class Shared:
    """Arguments that several launches share, by name, after others that more launches share.

    ``constants`` are those that no kernel takes at run time.
    """

    def __init__(self, values: dict, constants: dict | None = None, before: Shared | None = None):
        self._values, self._constants, self.before, self._read = values, constants or {}, before, None

    @property
    def all(self) -> dict:
        return (self.before.all if self.before else {}) | self._values | self._constants

    def is_constant(self, name: str) -> bool:
        return name in self._constants or (self.before is not None and self.before.is_constant(name))

    def read(self) -> tuple[tuple, Kind]:
        """The values as :class:`Layout` reads them, and their kind; the first time they are asked for."""
        if self._read is None:
            given, before = self.before.read() if self.before else ((), _none)
            arguments = self._values | self._constants if self._constants else self._values
            values = tuple(arguments.values())
            where = (len(self._constants), *arguments, *map(type, values))  # constants are the last ones
            layout = before.layouts.get(where)
            if layout is None:
                layout = before.layouts[where] = Layout(before, tuple(arguments), tuple(map(type, values)), self._constants)
            more, key = layout.read(values)
            kind = layout.found.get(key)
            if kind is None:
                kind = layout.found[key] = Kind(layout.names)
            self._read = given + more, kind
        return self._read


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
    active, values, (given, kind) = driver.active, tuple(own.values()), shared.read()
    index = active.get_current_device()
    where = (
        id(kernel), active, index, config, knobs.runtime.debug, knobs.compilation.instrumentation_mode, *own, *map(type, values),
    )  # fmt: skip
    site = kind.layouts.get(where)
    if site is None:
        by_name(kernel, shared, own)  # names them if some are unknown
        site = kind.layouts[where] = Site(kernel, kind, own)
    more, key = site.read(values)
    bound = site.found.get(key)
    if bound is None:
        compiled = kernel[grid](**by_name(kernel, shared, own), **options(config, device))
        if isinstance(compiled, CompiledKernel) and _agrees(kernel, index, shared, own):
            if len(_kernels) >= MOST:
                _kernels.clear()
                _none.layouts.clear()
            _kernels.append(compiled)
            site.found[key] = Bound(compiled, compiled.run, compiled.function, compiled.packed_metadata)
        return
    x, y = grid if len(grid) == 2 else (*grid, 1)
    _, launch, function, metadata = bound
    launch(x, y, 1, active.get_current_stream(index), function, metadata, None, None, None, *site.arguments(given + more))


def _agrees(kernel, device: int, shared: Shared, own: dict) -> bool:
    """Whether the keys tell apart whatever Triton does, and Triton passes the same arguments in the same order."""
    *_, target, _, binder = kernel.device_caches[device]
    if target.backend != "cuda":
        return False
    given = by_name(kernel, shared, own)
    bound, specialised, _ = binder(**given)
    if [*bound] != [*kernel.arg_names] or any(bound[name] is not x for name, x in given.items()):
        return False
    for parameter, theirs in zip(kernel.params, specialised, strict=True):
        name, x = parameter.name, given[parameter.name]
        if parameter.is_constexpr:
            if not (name in own or shared.is_constant(name)):
                return False
        elif not parameter.do_not_specialize:
            if _specialised(x) != theirs:
                return False
            if isinstance(x, Tensor) and ("D" in theirs[1]) != (_alignment((x.data_ptr(),)) is True):
                return False
    return True
