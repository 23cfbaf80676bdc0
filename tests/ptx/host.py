"""Launches: tensors become the machine's global memory, their views the bytes that may be touched."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from . import compiling
from .counts import Counts
from .machine import Machine
from .parse import parse
from .shadow import INITIALISED, VALID, Report, Reports, Space
from .translate import Program

__all__ = ["Faults", "Launch", "on_machine", "poisoned"]

#: what fresh memory is filled with: not a number in float32, bfloat16 and float16. Eight such bytes count as uninitialised
POISON = 0x7FA7
FIRST, GAP = 0x7F00_0000_0000, 512
#: threads that run side by side
THREADS = 4096


class Faults(AssertionError):
    """The reports of a launch."""

    def __init__(self, reports: list[Report]):
        super().__init__("\n".join(map(str, reports)))
        self.reports = reports


@functools.lru_cache(64)
def program(ptx: str, entry: str = r"[\w$]+") -> Program:
    return Program(parse(ptx, entry))


class Memory:
    """The storages of tensors, side by side with gaps between."""

    def __init__(self, tensors: list[Tensor], granule: int, reports: Reports):
        self.places: dict[int, tuple[int, np.ndarray]] = {}
        size = GAP
        for x in tensors:
            key, storage = x.untyped_storage().data_ptr(), x.untyped_storage()
            if key not in self.places:
                size = -(-size // 64) * 64 + key % 64
                self.places[key] = (size, torch.empty(0, dtype=torch.uint8).set_(storage).numpy())
                size += storage.nbytes() + GAP
        flat = np.full(-(-size // 64) * 32, POISON, np.uint16).view(np.uint8)
        for place, data in self.places.values():
            flat[place : place + data.size] = data
        self.space = Space("global", flat, FIRST, granule, reports)
        valid = np.zeros(flat.size, bool)
        for x in tensors:
            _mark(valid, self.offset(x), x)
        fresh = flat.view(np.uint64) == np.uint64(POISON * 0x1_0001_0001_0001)
        state = np.where(valid.reshape(-1, granule).all(1), VALID, 0) | np.where(fresh.repeat(8 // granule), 0, INITIALISED)
        self.space.state[:] = state

    def offset(self, x: Tensor) -> int:
        return self.places[x.untyped_storage().data_ptr()][0] + x.storage_offset() * x.element_size()

    def argument(self, x, pointers: dict[int, Tensor]):
        """An argument with addresses of this memory."""
        if isinstance(x, Tensor):
            return FIRST + self.offset(x)
        if not isinstance(x, bytes):
            return x
        words = np.frombuffer(x[: len(x) // 8 * 8], np.uint64).copy()
        for address, tensor in pointers.items():
            words[words == address] = FIRST + self.offset(tensor)
        return words.tobytes() + x[words.nbytes :]

    def back(self) -> None:
        for place, data in self.places.values():
            data[:] = self.space.data[place : place + data.size]


def _mark(valid: np.ndarray, offset: int, x: Tensor) -> None:
    if x.numel():
        shape = (*x.shape, x.element_size())
        strides = (*(s * x.element_size() for s in x.stride()), 1)
        np.lib.stride_tricks.as_strided(valid[offset:], shape, strides)[...] = True


@dataclasses.dataclass(frozen=True)
class Launch:
    """PTX, its parameters in order (CPU tensors and numbers; the rest are null pointers), the grid, bytes of shared memory."""

    ptx: str
    arguments: list
    grid: tuple[int, ...]
    shared: int = 0
    entry: str = r"[\w$]+"
    pointers: dict[int, Tensor] = dataclasses.field(default_factory=dict)  # in structs, which are arguments of type bytes
    name: str = ""  # of a Triton kernel and its configuration
    cluster: int = 1  # CTAs of a cluster, along the grid's first axis

    def run(
        self,
        counting: bool = False,
        made: Program | None = None,
        most: int = 2**31,
        machine: Callable[..., Machine] = Machine,
        chip=None,
        heads: int | None = None,
    ) -> tuple[list[Report], Counts | None]:
        """
        Args:
            made: another program than that of the PTX. most: only so many CTAs, the first ones.
            chip: whose latencies the counts' clock takes (bench/gpu/chips.py).
            heads: only the programs of the first heads, where the grid's second axis has them.
        """
        made = made or program(self.ptx, self.entry)
        reports = Reports(made.kernel.name, made.kernel.instructions, made.kernel.threads)
        memory = Memory([*self.pointers.values(), *(x for x in self.arguments if isinstance(x, Tensor))], made.granule, reports)
        values = [memory.argument(x, self.pointers) for x in self.arguments]
        names = [name for name, _ in made.kernel.parameters]
        parameters = dict(zip(names, [*values, *[0] * (len(names) - len(values))], strict=True))
        grid = (*self.grid, 1, 1)[:3]
        assert grid[0] % self.cluster == 0
        ctas = np.arange(min(grid[0] * min(grid[1], heads or grid[1]) * grid[2], -(-most // self.cluster) * self.cluster))
        batch = max(THREADS // made.kernel.threads // self.cluster, 1) * self.cluster
        counts = Counts(made, memory.space, chip) if counting or chip is not None else None
        for i in range(0, len(ctas), batch):
            machine(made, memory.space, reports, parameters, ctas[i : i + batch], grid, self.shared, counts, self.cluster).run()
        memory.back()
        return list(reports.found.values()), counts

    def copy(self) -> Launch:
        """With the same bits in storages of its own."""
        copies: dict[int, torch.UntypedStorage] = {}
        of = lambda x: copies.setdefault(x.untyped_storage().data_ptr(), x.untyped_storage().clone())
        moved = lambda x: torch.empty(0, dtype=x.dtype).set_(of(x), x.storage_offset(), x.shape, x.stride())
        arguments = [moved(x) if isinstance(x, Tensor) else x for x in self.arguments]
        return dataclasses.replace(self, arguments=arguments, pointers={address: moved(x) for address, x in self.pointers.items()})


@contextlib.contextmanager
def on_machine(
    architecture: str, before: Callable[[Launch], None] | None = None, instead: Callable[[Launch], None] | None = None
) -> Iterator[None]:
    """Within it ``backend="triton"`` runs CPU tensors on the machine, compiled for ``sm_80`` or ``sm_90``; a report raises `Faults`.

    Args:
        before: called with each launch before it runs. instead: called with each launch, which then does not run.
    """
    from miras_kernels.kernels.common import launch

    from miras_kernels.backends import triton as backend

    def start(kernel, grid, config, device, shared, own) -> None:
        if 0 in grid:
            return
        arguments = launch.by_name(kernel, shared, own)
        made = compiling.compiled(kernel, arguments, config, architecture)
        given = Launch(made.ptx, made.taken(arguments), grid, made.shared, name=f"{kernel.__name__} {config}")
        if before is not None:
            before(given)
        if instead is not None:
            instead(given)
        elif reports := given.run()[0]:
            raise Faults(reports)

    changes = ((launch, "start", start), (launch, "architecture", lambda device: architecture), (backend, "interpreted", lambda: True))
    with _replaced(*changes), poisoned():
        yield


@contextlib.contextmanager
def _replaced(*changes: tuple) -> Iterator[None]:
    before = [(where, name, getattr(where, name)) for where, name, _ in changes]
    for where, name, new in changes:
        setattr(where, name, new)
    try:
        yield
    finally:
        for where, name, old in before:
            setattr(where, name, old)


def poisoned():
    """Fresh tensors are filled with POISON."""

    def filled(make: Callable) -> Callable:
        @functools.wraps(make)
        def function(*args, **kwargs):
            x = make(*args, **kwargs)
            if x.device.type == "cpu" and x.numel() and x.is_contiguous():
                data = torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage()).numpy()
                data[: data.size // 2 * 2].view(np.uint16)[:] = POISON
            return x

        return function

    return _replaced(
        (torch, "empty_like", filled(torch.empty_like)),
        (torch.Tensor, "new_empty", filled(torch.Tensor.new_empty)),
        (torch, "empty", filled(torch.empty)),
    )
