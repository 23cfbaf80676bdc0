"""Which barriers, waits, fences and commits a launch needs, from all its accesses: independently of what reports faults."""

from __future__ import annotations

import re

import numpy as np

from .host import Launch
from .machine import Machine
from .matrix import Products
from .shadow import EPOCH
from .translate import names

__all__ = ["KINDS", "Trace", "traced"]

#: what is deleted
KINDS = (
    "bar.sync", "cp.async.wait_group", "cp.async.commit_group", "fence.proxy.async", "wgmma.fence", "wgmma.commit_group",
    "wgmma.wait_group", "barrier.cluster.arrive", "barrier.cluster.wait",
)  # fmt: skip
#: who needs an asynchronous copy to have been waited for, and a group to have been committed
USERS = {
    "cp.async.wait_group": re.compile(r"ld\.shared|st\.shared|ldmatrix|stmatrix|cp\.async\.c[ag]|wgmma\.mma"),
    "cp.async.commit_group": re.compile(r"cp\.async\.wait"),
}


class Trace(Machine):
    """One batch of CTAs, whose threads do not diverge at barriers, waits, fences and commits.

    Attributes:
        needed: waits, fences and commits without which something later is wrong. ends: the barrier after an epoch of a CTA.
        busy: waits and commits of copies that had some. path: blocks in the order of their execution.
        accesses: to global and to shared memory: granules, places (CTA and epoch), threads, turns of their warps, whether they write.
    """

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.needed: set[int] = set()
        self.busy: set[int] = set()
        self.path: list[int] = []
        self.ends: dict[tuple[int, int], int] = {}
        self.turns = np.zeros(self.local.size, np.int32)
        self.accesses: tuple[list, list] = ([], [])
        self.memory.note, self.shared.note = (self.noting(x) for x in self.accesses)
        self.written, self.fences = np.zeros(self.shared.state.size, np.int64), [(0, -1)]  # fences: times and instructions
        self.products: _Products = _Products(self)

    def noting(self, accesses: list):
        def note(granules, count: int, who, writes: np.ndarray, write: bool) -> None:
            local = who.local.repeat(count)
            accesses.append((granules, (who.cta.repeat(count) << 20) + self.epochs()[local], local, self.turns[local], writes))
            if write and accesses is self.accesses[1]:
                self.written[granules] = len(accesses)
                self.products.overwritten(granules)

        return note

    def step(self, block, place: int, threads: np.ndarray) -> None:
        self.path.append(place)
        if block.end[0] != "issue":
            used = {name for x in self.program.kernel.instructions[block.first : block.last + 1] for name in names(x.operands)}
            self.products.used(used)
        super().step(block, place, threads)

    def epochs(self) -> np.ndarray:
        """Barriers of its CTA and of its cluster that each thread has passed."""
        return (self.stamp >> EPOCH) + self.cluster.waits

    def barrier(self, at: int, after: int, threads: np.ndarray) -> None:
        before = self.epochs()[:: self.size]
        super().barrier(at, after, threads)
        for cta in np.flatnonzero(before != self.epochs()[:: self.size]):
            self.ends[int(cta), int(before[cta])] = at

    def warp_barrier(self, ix) -> None:
        super().warp_barrier(ix)
        self.turns[slice(None) if ix is None else ix] += 1

    def wait(self, at: int, ix, pending: int) -> None:
        before = sum(x.offset.size for x in self.copies)
        super().wait(at, ix, pending)
        if before != sum(x.offset.size for x in self.copies):
            self.busy.add(at)

    def commit(self, at: int, ix) -> None:
        if any((x.group == self.committed[x.who.local]).any() for x in self.copies):
            self.busy.add(at)
        super().commit(at, ix)

    def fence(self, at: int, ix) -> None:
        self.fences.append((len(self.accesses[1]), at))
        super().fence(at, ix)

    # ------------------------------------------------------------------------------------------------------------- questions

    def needs(self, at: int, kind: str) -> bool:
        if kind.startswith("barrier.cluster"):
            return True
        if kind == "bar.sync":
            return self.orders(at)
        return at in self.needed or (at in self.busy and not self.followed(at, kind))

    def orders(self, at: int) -> bool:
        """Whether, on the two sides of a barrier, different threads touch one granule, one of them writing other bits."""
        span, count = {}, 0
        for cta in range(self.batch):
            for epoch in range(1, int(self.epochs()[cta * self.size]) + 1):
                count += self.ends.get((cta, epoch - 1)) != at
                span[cta, epoch] = count
        sizes = np.bincount(list(span.values()))
        merged = {(cta << 20) + epoch: label for (cta, epoch), label in span.items() if sizes[label] > 1}
        places = np.array(sorted(merged), np.int64)
        labels = np.array([merged[x] for x in places], np.int64)
        for accesses in self.accesses:
            chosen = [tuple(part[here] for part in x) for x in accesses if (here := np.isin(x[1], places)).any()]
            if chosen:
                granules, place, thread, turn, writes = (np.concatenate(x) for x in zip(*chosen, strict=True))
                if conflict((granules << 24) + labels[np.searchsorted(places, place)], place, thread, turn, writes):
                    return True
        return False

    def followed(self, at: int, kind: str) -> bool:
        """Whether, wherever an instruction is executed, another of its kind comes before all that need it."""
        instructions, waiting = self.program.kernel.instructions, False
        for block in map(self.program.blocks.__getitem__, self.path):
            for i in range(block.first, block.last + 1):
                if waiting and USERS[kind].match(instructions[i].opcode):
                    return False
                if instructions[i].opcode.startswith(kind):
                    waiting = i == at
        return True


def conflict(key: np.ndarray, place: np.ndarray, thread: np.ndarray, turn: np.ndarray, writes: np.ndarray) -> bool:
    """Whether accesses with one key are by different threads, in different places, one of them a write, and not ordered within a warp."""
    order = np.argsort(key, kind="stable")
    key, place, thread, turn, writes = (x[order] for x in (key, place, thread, turn, writes))
    starts = np.flatnonzero(np.r_[True, key[1:] != key[:-1]])
    ends = lambda x: (np.minimum.reduceat(x, starts), np.maximum.reduceat(x, starts))
    (least, most), (first, last) = ends(thread), ends(place)
    bad = np.logical_or.reduceat(writes, starts) & (least != most) & (first != last)
    if (bad & (least // 32 != most // 32)).any():
        return True
    if not bad.any() or (turn == 0).all():
        return bool(bad.any())
    inside = bad.repeat(np.diff(np.r_[starts, key.size]))
    _, key = np.unique(np.stack([key, turn])[:, inside], axis=1, return_inverse=True)
    return conflict(key.ravel(), place[inside], thread[inside], np.zeros(key.size, np.int32), writes[inside])


class _Products(Products):
    """Attributes:
    groups: of products that were committed and not waited for: the commit, registers and granules. late: what the last wait has completed,
    until the next wait: the wait, its groups' commits, registers and granules.
    """

    def __init__(self, m: Trace):
        super().__init__(m)
        self.open: tuple[set, set] = (set(), set())
        self.groups: list[tuple[int, set, set]] = []
        self.late: list[tuple[int, set, set, set]] = []
        self.stale, self.last = set(), -1  # registers that were touched before the last wgmma.fence

    def fence(self, x, threads: np.ndarray, at: int) -> None:
        if not self.fenced[threads].all():
            self.m.needed.add(at)
        self.stale, self.last = {name for name, flags in self.dirty.items() if flags[threads].any()}, at
        super().fence(x, threads, at)

    def check_registers(self, d, a, threads: np.ndarray, at: int) -> None:
        if not self.stale.isdisjoint((*d, *a)):
            self.m.needed.add(self.last)
        self.open[0].update((*d, *a))
        super().check_registers(d, a, threads, at)

    def check_fences(self, granules: np.ndarray, who, at: int) -> None:
        times = np.array([time for time, _ in self.m.fences])
        only = np.searchsorted(times, self.m.written[granules], "left") == len(times) - 1
        if (only & (self.m.written[granules] > 0)).any():
            self.m.needed.add(self.m.fences[-1][1])
        self.open[1].update(granules.tolist())
        super().check_fences(granules, who, at)

    def commit(self, x, threads: np.ndarray, at: int) -> None:
        self.groups.append((at, *self.open))
        self.open = (set(), set())
        super().commit(x, threads, at)

    def wait(self, x, threads: np.ndarray, at: int) -> None:
        pending = int(x.operands[0])
        done, self.groups = self.groups[: len(self.groups) - pending], self.groups[len(self.groups) - pending :]
        commits, registers, granules = zip(*done, strict=True) if done else ((), (), ())
        self.late = [(at, set(commits), set().union(*registers), set().union(*granules))]
        super().wait(x, threads, at)

    def used(self, registers: set) -> None:
        self.mark(1, registers)

    def overwritten(self, granules: np.ndarray) -> None:
        if self.late and self.late[0][3]:
            self.mark(2, set(granules.tolist()))

    def mark(self, part: int, touched: set) -> None:
        for at, commits, *parts in self.late:
            if not parts[part - 1].isdisjoint(touched):
                self.m.needed.update((at, *commits))


def traced(launch: Launch, most: int) -> Trace:
    """A run of a copy of a launch, of its first CTAs."""
    made: list[Trace] = []

    def machine(*arguments) -> Trace:
        made.append(Trace(*arguments))
        return made[-1]

    launch.copy().run(most=most, machine=machine)
    assert len(made) == 1
    return made[0]
