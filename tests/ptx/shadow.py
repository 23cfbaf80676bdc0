"""Shadow memory: who wrote and who read each granule, whether it is initialised, and whether asynchronous data are on their way.

A granule is as many bytes as the kernel's narrowest access. Two accesses of one granule by different threads, at least one of them a
write, are a race unless a barrier lies between: `bar.sync` orders the threads of a CTA (its epoch), `bar.warp.sync` those of a warp,
and nothing orders the CTAs of one launch, but those of a cluster its barrier (cluster.py). Writes of equal bits by several threads are no
race.
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
WRITES, READS = 0, 1


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
        writer, reader, written_at, read_at: the last accesses; of shared memory in clusters those by threads of each rank, one rank's after
        another's. phases: where there are clusters, the arrivals + 1 of the last writers and readers at the cluster's barrier.
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
        self.ranks, self.phases = 1, []
        self.note: Callable | None = None  # of trace.py, told of every access
        self.views = {1: data, 2: data.view(np.uint16), 4: data.view(np.uint32), 8: data.view(np.uint64)}

    def order_clusters(self, ranks: int) -> None:
        self.ranks = ranks
        for name in ("writer", "reader", "written_at", "read_at"):
            setattr(self, name, np.tile(getattr(self, name)[: self.state.size], ranks))
        self.phases = [np.zeros(self.writer.size, np.int32) for _ in range(2)]

    def places(self, address: np.ndarray, who, size: int, at: int, owner=None) -> tuple[np.ndarray, np.ndarray]:
        """``(offsets into data, whether they may be used)``; reports what lies outside of all tensors, or is misaligned. ``owner``: CTAs
        whose shared memory it is, if not the threads'."""
        offset = (address.astype(np.uint64) - np.uint64(self.first)).view(np.int64)
        limit = (self.stride or self.data.size) - size
        bad = (offset < 0) | (offset > limit) | (offset & (size - 1) != 0)
        if bad.any():
            i = int(bad.argmax())
            kind = "misaligned access" if 0 <= offset[i] <= limit else "out of bounds"
            self.reports.add(f"{kind} ({self.name})", at, thread=int(who.thread[i]), note=f"{int(offset[i])} of {limit + size} bytes")
            offset = np.where(bad, 0, offset)
        if self.stride:
            offset = offset + (who.cta if owner is None else owner) * self.stride
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
        g, of_barrier = self.planes(g, count, who)
        self.check("race: read after write", WRITES, g, now, thread, at, of_barrier)
        before = self.reader[g]
        alone = not before.any() if not self.stride else not (((before ^ now) & ~FLAGS) >> EPOCH == 0).any()
        mine = now if alone else self.joined(before, now, thread, self.since(READS, g, of_barrier))
        self.reader[g] = mine
        self.read_at[g] = at
        lost = np.flatnonzero(self.reader[g] != mine)
        self.mark(READS, g, of_barrier)
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
        self.state[g] = (state | INITIALISED) & ~np.uint8(ARRIVING)
        self.fences[g] = who.fences(count)
        g, of_barrier = self.planes(g, count, who)
        self.check("race: write after write", WRITES, g, now, thread, at, of_barrier, ~same)
        self.check("race: write after read", READS, g, now, thread, at, of_barrier, ~same)
        self.writer[g] = now
        self.written_at[g] = at
        self.mark(WRITES, g, of_barrier)

    def check(self, kind: str, which: int, g: np.ndarray, now, thread, at: int, of_barrier, chosen=True) -> None:
        """Reports accesses that are not ordered after the last writes or reads."""
        last, places = ((self.writer, self.written_at), (self.reader, self.read_at))[which]
        before = last[g]
        unordered = self.unordered(before, now, thread, self.since(which, g, of_barrier)) & chosen
        if unordered.any():
            self.race(kind, unordered, g, before, places, thread, at)
        for rank in range(1, self.ranks):  # of the other CTAs of the cluster
            other = (g + rank * self.state.size) % self.writer.size
            if (unordered := self.since(which, other, of_barrier) & chosen).any():
                self.race(kind, unordered, other, last[other], places, thread, at)

    def planes(self, g: np.ndarray, count: int, who) -> tuple[np.ndarray, tuple | None]:
        """Where the accesses of these threads' ranks are noted; and, in clusters, their arrivals and waits at the barrier."""
        if not self.phases:
            return g, None
        rank, arrivals, waits = who.phases(count)
        return g + rank % self.ranks * self.state.size, (arrivals, waits)

    def since(self, which: int, g: np.ndarray, of_barrier: tuple | None):
        """Whether the last access came after the barrier of the cluster that this one's threads waited at last."""
        return True if of_barrier is None else self.phases[which][g] > of_barrier[1]

    def mark(self, which: int, g: np.ndarray, of_barrier: tuple | None) -> None:
        if of_barrier is not None:
            np.maximum.at(self.phases[which], g, of_barrier[0] + 1)

    def unordered(self, before: np.ndarray, now: np.ndarray, thread: np.ndarray, since) -> np.ndarray:
        """Whether an access was by another thread, without a barrier between."""
        other, size = (before & THREAD) - 1, self.reports.size
        same_epoch = (((before & ~FLAGS) >> EPOCH) == (now >> EPOCH)) & since
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

    def joined(self, before: np.ndarray, now: np.ndarray, thread: np.ndarray, since) -> np.ndarray:
        other, size = (before & THREAD) - 1, self.reports.size
        same = (before != 0) & (((before & ~FLAGS) >> EPOCH) == (now >> EPOCH)) & (other // size == thread // size) & since
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
