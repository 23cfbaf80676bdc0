"""Shadow memory: who wrote and who read each granule, whether it is initialised, and whether asynchronous data are on their way.

A granule is as many bytes as the kernel's narrowest access. Two accesses of one granule by different threads, at least one of them a
write, are a race unless a barrier lies between: `bar.sync` orders the threads of a CTA (its epoch), `bar.warp.sync` those of a warp,
and nothing orders the CTAs of one launch. Writes of equal bits by several threads are no race.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

__all__ = ["Report", "Reports", "Space"]

#: bits of a granule's state
VALID, INITIALISED, ARRIVING, IN_USE = 1, 2, 4, 8
READY = VALID | INITIALISED

#: last access: epoch << 44 | warp's epoch << 28 | thread + 1. Of readers also whether there were several, in which scope
EPOCH, WARP_EPOCH, THREAD = 44, 28, (1 << 28) - 1
IN_WARP, IN_CTA, IN_GRID = 1 << 60, 1 << 61, 1 << 62
FLAGS = IN_WARP | IN_CTA | IN_GRID


@dataclasses.dataclass(frozen=True)
class Report:
    """What is wrong with a launch: the kind of fault, the two instructions (or one) and two of the threads."""

    kind: str
    kernel: str
    instruction: str
    other: str
    threads: str

    def __str__(self) -> str:
        second = f"\n      after {self.other}" if self.other else ""
        return f"{self.kind} in {self.kernel}: {self.threads}\n         at {self.instruction}{second}"


class Reports:
    """Each pair of instructions once."""

    def __init__(self, kernel: str, instructions, threads_per_cta: int):
        self.kernel, self.instructions, self.size = kernel, instructions, threads_per_cta
        self.found: dict[tuple, Report] = {}

    def add(self, kind: str, at: int, other: int = -1, thread: int = -1, before: int = -1, note: str = "") -> None:
        key = (kind, at, other)
        if key not in self.found:
            where = f"thread {self.place(thread)}" if thread >= 0 else "some thread"
            where += f", before it thread {self.place(before)}" if before >= 0 else ""
            where += f" ({note})" if note else ""
            second = str(self.instructions[other]) if other >= 0 else ""
            self.found[key] = Report(kind, self.kernel, str(self.instructions[at]), second, where)

    def place(self, thread: int) -> str:
        return f"{thread % self.size} of CTA {thread // self.size}"


class Space:
    """Global memory, or the shared memory of a batch of CTAs.

    Attributes:
        data: bytes. first: the address of the first one; shared memory of CTA i begins ``i * stride`` bytes after it.
    """

    def __init__(self, name: str, data: np.ndarray, first: int, granule: int, reports: Reports, stride: int = 0):
        assert data.dtype == np.uint8 and data.size % 16 == 0
        self.name, self.data, self.first, self.reports, self.stride = name, data, first, reports, stride
        self.shift = granule.bit_length() - 1
        count = data.size >> self.shift
        self.state = np.zeros(count, np.uint8)
        self.writer, self.reader = np.zeros(count, np.int64), np.zeros(count, np.int64)
        self.written_at, self.read_at = np.zeros(count, np.int32), np.zeros(count, np.int32)
        self.fences = np.zeros(count, np.int32)  # proxy fences of the writer before its write
        self.note: Callable | None = None  # of trace.py, told of every access
        self.views = {1: data, 2: data.view(np.uint16), 4: data.view(np.uint32), 8: data.view(np.uint64)}

    def places(self, address: np.ndarray, who, size: int, at: int) -> tuple[np.ndarray, np.ndarray]:
        """``(offsets into data, whether they may be used)``; reports what lies outside of all tensors, or is misaligned."""
        offset = (address.astype(np.uint64) - np.uint64(self.first)).view(np.int64)
        limit = (self.stride or self.data.size) - size
        bad = (offset < 0) | (offset > limit) | (offset & (size - 1) != 0)
        if bad.any():
            i = int(bad.argmax())
            kind = "misaligned access" if 0 <= offset[i] <= limit else "out of bounds"
            self.reports.add(f"{kind} ({self.name})", at, thread=int(who.thread[i]), note=f"{int(offset[i])} of {limit + size} bytes")
            offset = np.where(bad, 0, offset)
        if self.stride:
            offset = offset + who.cta * self.stride
        return offset, ~bad

    def granules(self, offset: np.ndarray, size: int) -> tuple[np.ndarray, int]:
        """The granules of accesses of ``size`` bytes, those of one access side by side, and how many each has."""
        count = max(size >> self.shift, 1)
        first = offset >> self.shift
        return (first if count == 1 else (first[:, None] + np.arange(count)).ravel()), count

    def read(self, g: np.ndarray, count: int, who, at: int, initialised: bool = True) -> None:
        state = self.state[g]
        if ((state & (READY | ARRIVING)) != READY).any():
            self.bad_state(state, g, count, who, at, READY if initialised else VALID)
        now, thread = who.stamps(count)
        if self.note is not None:
            self.note(g, count, who, np.zeros(g.size, bool), False)
        writer = self.writer[g]
        unordered = self.unordered(writer, now, thread)
        if unordered.any():
            self.race("race: read after write", unordered, g, writer, self.written_at, thread, at)
        before = self.reader[g]
        alone = not before.any() if not self.stride else not (((before ^ now) & ~FLAGS) >> EPOCH == 0).any()
        mine = now if alone else self.joined(before, now, thread)
        self.reader[g] = mine
        self.read_at[g] = at
        lost = np.flatnonzero(self.reader[g] != mine)
        if lost.size:  # several threads of this instruction read one granule
            g, thread = g[lost], thread[lost]
            last, size = (self.reader[g] & THREAD) - 1, self.reports.size
            scope = np.where(last // size != thread // size, IN_GRID, np.where(last // 32 != thread // 32, IN_CTA, IN_WARP))
            for flag in (IN_WARP, IN_CTA, IN_GRID):
                self.reader[g[scope == flag]] |= flag

    def write(self, g: np.ndarray, count: int, who, at: int, same: np.ndarray, asynchronous: bool = False) -> None:
        """``same``: whether memory has these bits already."""
        state = self.state[g]
        if (state & (VALID | ARRIVING | IN_USE) != VALID).any() and not asynchronous:
            self.bad_state(state, g, count, who, at, VALID)
        now, thread = who.stamps(count)
        if self.note is not None:
            self.note(g, count, who, ~same, True)
        writer, reader = self.writer[g], self.reader[g]
        unordered = self.unordered(writer, now, thread) & ~same
        if unordered.any():
            self.race("race: write after write", unordered, g, writer, self.written_at, thread, at)
        unordered = self.unordered(reader, now, thread) & ~same
        if unordered.any():
            self.race("race: write after read", unordered, g, reader, self.read_at, thread, at)
        self.state[g] = (state | INITIALISED) & ~np.uint8(ARRIVING)
        self.writer[g] = now
        self.written_at[g] = at
        self.fences[g] = who.fences(count)

    def unordered(self, before: np.ndarray, now: np.ndarray, thread: np.ndarray) -> np.ndarray:
        """Whether an access was by another thread, without a barrier between."""
        other, size = (before & THREAD) - 1, self.reports.size
        same_epoch = ((before & ~FLAGS) >> EPOCH) == (now >> EPOCH)
        candidates = same_epoch & ((other != thread) | (before & FLAGS != 0))
        if not self.stride:
            candidates |= (before != 0) & ((other // size != thread // size) | (before & IN_GRID != 0))
        if not candidates.any():
            return candidates
        found = (before != 0) & candidates
        one_warp = (other // 32 == thread // 32) & (before & (IN_CTA | IN_GRID) == 0)
        ordered = ((before >> WARP_EPOCH) & 0xFFFF) < ((now >> WARP_EPOCH) & 0xFFFF)
        alone = (other == thread) & (before & FLAGS == 0)
        return found & ~(one_warp & ordered) & ~alone

    def joined(self, before: np.ndarray, now: np.ndarray, thread: np.ndarray) -> np.ndarray:
        other, size = (before & THREAD) - 1, self.reports.size
        same = (before != 0) & (((before & ~FLAGS) >> EPOCH) == (now >> EPOCH)) & (other // size == thread // size)
        flags = np.where(same, before & FLAGS, before & IN_GRID)
        flags |= np.where(same & (other != thread), np.where(other // 32 == thread // 32, IN_WARP, IN_CTA), 0)
        flags |= np.where((before != 0) & (other // size != thread // size), IN_GRID, 0)
        return now | flags

    def race(self, kind: str, bad, g, before, instructions, thread, at: int) -> None:
        places = np.flatnonzero(bad)
        _, first = np.unique(instructions[g[places]], return_index=True)
        for i in places[first]:
            self.reports.add(f"{kind} ({self.name})", at, int(instructions[g[i]]), int(thread[i]), int((before[i] & THREAD) - 1))

    def bad_state(self, state, g, count: int, who, at: int, wanted: int) -> None:
        kinds = (
            ((state & VALID) == 0, "out of bounds", False),
            ((state & ARRIVING) != 0, "touches data of an asynchronous copy that was not waited for", True),
            (((state & READY) == VALID) & (wanted == READY) & (state & ARRIVING == 0), "reads uninitialised memory", False),
            (((state & IN_USE) != 0) & (wanted == VALID), "writes an operand of a wgmma that was not waited for", True),
        )
        for bad, kind, known in kinds:
            if bad.any():
                i = int(bad.argmax())
                self.reports.add(f"{kind} ({self.name})", at, int(self.written_at[g[i]]) if known else -1, int(who.thread[i // count]))
