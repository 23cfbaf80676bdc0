"""A batch of CTAs executing: registers are arrays over all its threads, a basic block is one Python function (translate.py).

The block with the lowest number of all that have threads runs first, for all threads that are there: threads that diverged meet again
where their paths do. Where a warp acts together (a shuffle, a matrix product) its threads wait for each other. A barrier ends a block; its
threads wait until all of their CTA have come.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from . import matrix
from .cluster import RANK, Cluster
from .shadow import ARRIVING, VALID, Reports, Space
from .translate import Block, Program

__all__ = ["Hang", "Machine"]

#: bytes of the address space of parameters that each of them has
PARAMETER = 1 << 16


#: blocks that a batch of CTAs executes at most
STEPS = 200_000


class Hang(RuntimeError):
    """Threads wait at a barrier that not all threads of their CTA reach."""


@dataclasses.dataclass
class Who:
    """The threads of an access, in its order: number in the batch, CTA in the batch, number in the grid."""

    machine: Machine
    local: np.ndarray
    cta: np.ndarray
    thread: np.ndarray

    def stamps(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        now = self.machine.stamp[self.local] + (self.thread + 1)
        return (now, self.thread) if count == 1 else (now.repeat(count), self.thread.repeat(count))

    def phases(self, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The rank in the cluster, arrivals at its barrier and waits."""
        of = self.machine.cluster
        return of.rank[self.local].repeat(count), of.arrivals[self.local].repeat(count), of.waits[self.local].repeat(count)

    def fences(self, count: int) -> np.ndarray:
        return self.machine.fenced[self.local].repeat(count)

    def __getitem__(self, chosen) -> Who:
        return Who(self.machine, self.local[chosen], self.cta[chosen], self.thread[chosen])


@dataclasses.dataclass
class Copy:
    """A cp.async on its way: for each of its threads the group that it belongs to."""

    who: Who
    group: np.ndarray
    offset: np.ndarray
    values: np.ndarray  # [threads, bytes]
    at: int


def whole_warps(threads: np.ndarray) -> bool:
    return threads.size % 32 == 0 and bool((threads.reshape(-1, 32)[:, [0, -1]] % 32 == [0, 31]).all())


class Machine:
    """Attributes:
    stamp: the barriers that a thread has passed, as shadow.py stores them. fenced: proxy fences of a thread, and the epoch of the last.
    """

    def __init__(
        self, program: Program, memory: Space, reports: Reports, parameters: dict, ctas: np.ndarray, grid, shared: int, counts, cluster=1
    ):
        self.program, self.memory, self.reports, self.parameters, self.counts = program, memory, reports, parameters, counts
        size = self.size = program.kernel.threads
        self.batch, total = len(ctas), len(ctas) * size
        self.local = np.arange(total)
        lane = np.tile(np.arange(size), self.batch)
        cta = np.arange(self.batch).repeat(size)
        self.everyone = Who(self, self.local, cta, ctas.repeat(size) * size + lane)
        static = sum(-(-x // 16) * 16 for x in program.kernel.shared.values())
        stride = -(-(static + shared + 1024) // 1024) * 1024
        self.shared = Space("shared", np.zeros(stride * self.batch, np.uint8), 0, program.granule, reports, stride)
        if cluster > 1:
            if program.product_registers:
                raise NotImplementedError("wgmma in a cluster")
            memory.order_clusters(1), self.shared.order_clusters(cluster)
        self.symbols, place, state = {}, 1024, self.shared.state.reshape(self.batch, -1)
        for name, bytes_ in sorted(program.kernel.shared.items(), key=lambda x: x[1] == 0):  # what is extern comes last
            self.symbols[name] = place
            state[:, place >> self.shared.shift : place + (bytes_ or shared) >> self.shared.shift] = VALID
            place = -(-(place + bytes_) // 16) * 16
        self.registers = {f"%tid.{a}": np.zeros(total, np.uint32) for a in "yz"} | {"%tid.x": lane.astype(np.uint32)}
        self.registers["%laneid"] = (lane % 32).astype(np.uint32)
        places = np.unravel_index(ctas, grid[::-1])[::-1]
        for axis, place, extent in zip("xyz", places, grid, strict=True):
            self.registers[f"%ctaid.{axis}"] = place.repeat(size).astype(np.uint32)
            self.registers[f"%nctaid.{axis}"] = np.full(total, extent, np.uint32)
            self.registers[f"%ntid.{axis}"] = np.full(total, size if axis == "x" else 1, np.uint32)
        self.stamp = np.ones(total, np.int64) << 44
        self.fenced, self.fenced_at = np.zeros(total, np.int32), np.zeros(total, np.int64)
        self.committed, self.copies = np.zeros(total, np.int64), []
        self.products = matrix.Products(self)
        self.ready: dict[int, np.ndarray] = {}
        self.waiting: dict[int, list[tuple[int, int, np.ndarray]]] = {}  # by CTA: barriers, the blocks after them, the threads at them
        self.left = np.full(self.batch, size)
        self.cluster = Cluster(self, cluster)

    # ------------------------------------------------------------------------------------------------------- scheduling

    def run(self) -> None:
        self.ready[0], steps = self.local, 0
        with np.errstate(all="ignore"):
            while self.ready:
                place, steps = self.next(), steps + 1
                if steps > STEPS:
                    raise Hang(f"{self.program.kernel.name} does not end: {self.missing()}")
                threads = self.ready.pop(place)
                self.step(self.program.blocks[place], place, threads)
        if self.waiting:
            raise Hang(f"{self.program.kernel.name} waits for threads that do not come: {self.missing()}")
        if self.copies:
            copy = self.copies[0]
            self.reports.add("the kernel ends before an asynchronous copy is waited for", copy.at, thread=int(copy.who.thread[0]))
        self.products.end()

    def next(self) -> int:
        places = sorted(self.ready)
        return next((x for x in places if not self.program.blocks[x].together or whole_warps(self.ready[x])), places[0])

    def missing(self) -> str:
        """Where the threads are that have not ended."""
        starts = ((self.program.blocks[place].first, threads) for place, threads in self.ready.items())
        found = []
        for at, threads in (*starts, *((at, x) for waiting in self.waiting.values() for at, _, x in waiting)):
            first = self.reports.place(self.everyone.thread[threads[0]])
            count = "1 thread" if threads.size == 1 else f"{threads.size} threads"
            found.append(f"{count} ({first}) at {self.program.kernel.instructions[at]}")
        return "; ".join(found[:8])

    def go(self, place: int, threads: np.ndarray) -> None:
        if threads.size:
            if place in self.ready:
                threads = np.sort(np.concatenate([self.ready[place], threads]))
            self.ready[place] = threads

    def step(self, block: Block, place: int, threads: np.ndarray) -> None:
        everyone = threads.size == self.local.size
        ix = None if everyone else threads
        given = [self.registers[name] if name in self.registers else self.undefined(name) for name in block.needs]
        if not everyone:
            given = [x[threads] for x in given]
        self.products.touched(block, threads)
        taken, results = block.run(self, ix, threads.size, *given)
        if self.counts is not None:
            self.counts.block(block, threads, self.everyone.thread[0] == 0)
        for name, x in zip(block.leaves, results, strict=True):
            if everyone:
                self.registers[name] = x
            else:
                if name not in self.registers:
                    self.registers[name] = self.undefined(name)
                whole = self.registers[name].copy()  # other registers may share it
                whole[threads] = x
                self.registers[name] = whole
        self.end(block, place, threads, taken)

    def parameter(self, base, offset: int, kind):
        """A launch's argument of the type that is asked for, or a field of it: ``base`` is its name, or addresses of it."""
        if not isinstance(base, str):
            offset += int(base[0] % PARAMETER)
            base = list(self.parameters)[int(base[0]) // PARAMETER]
        value = self.parameters[base]
        if isinstance(value, bytes):
            return np.frombuffer(value, kind, 1, offset)[0]
        return np.asarray(value).astype(kind)

    def undefined(self, name: str) -> np.ndarray:
        return np.zeros(self.local.size, self.program.dtype(name))

    def end(self, block: Block, place: int, threads: np.ndarray, taken) -> None:
        kind, target = block.end
        if kind == "next":
            self.go(place + 1, threads)
        elif kind == "branch":
            if taken is None:
                self.go(target, threads)
            else:
                self.go(target, threads[taken])
                self.go(place + 1, threads[~taken])
        elif kind == "barrier":
            self.barrier(block.last, place + 1, threads)
        elif kind == "cluster":
            self.cluster.wait(block.last, place + 1, threads)
        elif kind == "exit":
            gone = np.ones(threads.size, bool) if taken is None else taken
            self.left -= np.bincount(threads[gone] // self.size, minlength=self.batch)
            self.cluster.end(block.last, threads[gone])
            self.go(place + 1, threads[~gone])
        else:
            getattr(self.products, kind)(block.instruction, threads, block.last)
            self.go(place + 1, threads)

    def barrier(self, at: int, after: int, threads: np.ndarray) -> None:
        if threads.size == self.local.size:
            self.stamp[:] = ((self.stamp >> 44) + 1) << 44
            self.go(after, threads)
            return
        ctas = threads // self.size
        for cta in np.unique(ctas):
            here = threads[ctas == cta]
            for other, _, before in self.waiting.get(cta, ()):
                if other != at and np.intersect1d(before // 32, here // 32).size:  # warps of a CTA may
                    self.reports.add("threads of a warp meet at different barriers", at, other, int(self.everyone.thread[here[0]]))
            waiting = [*self.waiting.pop(cta, ()), (at, after, here)]
            count = sum(x.size for _, _, x in waiting)
            if count == self.left[cta] < self.size:
                self.reports.add("a barrier that threads which have ended do not reach", at, thread=int(self.everyone.thread[here[0]]))
            if count < self.left[cta]:
                self.waiting[cta] = waiting
                continue
            for _, place, released in waiting:
                self.stamp[released] = ((self.stamp[released] >> 44) + 1) << 44
                self.go(place, released)

    def warp_barrier(self, ix) -> None:
        self.warps(self.who(ix).local, -1)
        self.stamp[slice(None) if ix is None else ix] += 1 << 28

    def warps(self, threads: np.ndarray, at: int) -> None:
        """Every thread of the warps must be here."""
        if not whole_warps(threads):
            raise RuntimeError(f"not all threads of a warp are at {self.program.kernel.instructions[at]}")

    def who(self, ix) -> Who:
        return self.everyone if ix is None else self.everyone[ix]

    # ----------------------------------------------------------------------------------------------------------- memory

    def mapped(self, address: np.ndarray, rank: np.ndarray) -> np.ndarray:
        """mapa: the address in the shared memory of a CTA of the cluster."""
        return (address & np.uint32((1 << RANK) - 1)) | ((rank + np.uint32(1)) << np.uint32(RANK))

    def places(self, name: str, at: int, address, who: Who, size: int) -> tuple[Space, np.ndarray, np.ndarray]:
        if name == "cluster":
            address, owner = self.cluster.locate(address, who, at)
            return self.shared, *self.shared.places(address, who, size, at, owner)
        space = self.shared if name == "shared" else self.memory
        return space, *space.places(address, who, size, at)

    def load(self, name: str, at: int, ix, address, size: int, count: int, guard, before) -> list[np.ndarray]:
        """``count`` neighbouring words of ``size`` bytes for every thread; ``before`` where the guard is false."""
        who, n = self.who(ix), len(address)
        if guard is not None:
            chosen = np.flatnonzero(guard)
            who, address = who[chosen], address[chosen]
        space, offset, good = self.places(name, at, address, who, size * count)
        if not good.all():
            who, offset = who[good], offset[good]
            chosen = np.flatnonzero(good) if guard is None else chosen[good]
            guard = guard if guard is not None else good
            before = before or [0] * count
        space.read(*space.granules(offset, size * count), who, at)
        if self.counts is not None:
            self.counts.access(space.name, at, who.local, offset, size * count)
        words = space.views[size].reshape(-1, count)[offset // (size * count)]
        if guard is None:
            return list(np.ascontiguousarray(words.T))
        results = []
        for j in range(count):
            x = np.zeros(n, words.dtype) if before is None or np.isscalar(before[j]) else before[j].copy()
            x[chosen] = words[:, j]
            results.append(x)
        return results

    def store(self, name: str, at: int, ix, address, size: int, values: list[np.ndarray], guard) -> None:
        who, count = self.who(ix), len(values)
        words = np.stack(values, 1)
        if guard is not None:
            who, address, words = who[guard], address[guard], words[guard]
        space, offset, good = self.places(name, at, address, who, size * count)
        if not good.all():
            who, offset, words = who[good], offset[good], words[good]
        if self.counts is not None:
            self.counts.access(space.name, at, who.local, offset, size * count, writes=True)
        self.write(space, who, offset, words, at)

    def write(self, space: Space, who: Who, offset: np.ndarray, words: np.ndarray, at: int, asynchronous: bool = False) -> None:
        """Words side by side of each thread; reports if several threads write different bits to one place."""
        size, count = words.dtype.itemsize, words.shape[1]
        memory, rows = space.views[size].reshape(-1, count), offset // (size * count)
        g, granules = space.granules(offset, size * count)
        same = np.ascontiguousarray(memory[rows] == words)
        same = same.repeat(granules // count, 1) if granules >= count else same.reshape(-1, granules, count // granules).all(2)
        memory[rows] = words
        lost = (memory[rows] != words).any(1)
        if lost.any():
            i = int(lost.argmax())
            winner = np.flatnonzero((rows == rows[i]) & ~lost)
            other = int(who.thread[winner[0]]) if winner.size else -1
            self.reports.add(f"threads store different bits to one address ({space.name})", at, at, int(who.thread[i]), other)
        # equal bits again, or by another lane of this instruction, are no race
        space.write(g, granules, who, at, same.ravel(), asynchronous)

    def shuffle(self, mode: str, at: int, ix, x, b, clamp, members) -> tuple[np.ndarray, np.ndarray]:
        self.warps(self.who(ix).local, at)
        clamp = np.unique(clamp)
        if clamp.size > 1 or (np.asarray(members) != 0xFFFFFFFF).any():
            raise RuntimeError(f"threads that differ at {self.program.kernel.instructions[at]}")
        clamp = clamp[0]
        x, lane = x.reshape(-1, 32), np.arange(32)
        b = np.broadcast_to(b, x.size).reshape(-1, 32).astype(np.int64) & 31
        mask, limit = (int(clamp) >> 8) & 31, int(clamp) & 31
        low, high = lane & mask, (lane & mask) | (limit & ~mask)
        source = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": low | (b & ~mask)}[mode]
        inside = source >= high if mode == "up" else source <= high
        source = np.where(inside, source, lane)
        return np.take_along_axis(x, source, 1).ravel(), inside.ravel()

    # ------------------------------------------------------------------------------------------------------------ cp.async

    def copy(self, at: int, ix, to, of, size: int, given, guard) -> None:
        """A cp.async is issued: the source is read now, the destination must not be touched until it is waited for."""
        who = self.who(ix)
        given = np.broadcast_to(np.uint32(size) if given is None else given, len(to))
        if guard is not None:
            who, to, of, given = who[guard], to[guard], of[guard], given[guard]
        offset, good = self.shared.places(to, who, size, at)
        if not good.all():
            who, offset, of, given = who[good], offset[good], of[good], given[good]
        values = np.zeros((len(offset), size), np.uint8)
        for bytes_ in np.unique(given):
            if bytes_:
                rows = np.flatnonzero(given == bytes_)
                source, fine = self.memory.places(of[rows], who[rows], int(bytes_), at)
                self.memory.read(*self.memory.granules(source[fine], int(bytes_)), who[rows][fine], at)
                if self.counts is not None:
                    self.counts.access("global", at, who.local[rows][fine], source[fine], int(bytes_))
                values[rows, :bytes_] = self.memory.data[source[:, None] + np.arange(bytes_)]
        if self.counts is not None:
            self.counts.access("shared", at, who.local, offset, size, writes=True)
        g, count = self.shared.granules(offset, size)
        self.shared.write(g, count, who, at, np.zeros(g.size, bool))
        self.shared.state[g] |= ARRIVING
        self.shared.views[4][(offset[:, None] + np.arange(0, size, 4)) // 4] = 0x7FA77FA7
        self.copies.append(Copy(who, self.committed[who.local].copy(), offset, values, at))

    def commit(self, at: int, ix) -> None:
        self.committed[slice(None) if ix is None else ix] += 1

    def wait(self, at: int, ix, pending: int) -> None:
        """Write what has arrived, as its issuing thread: other threads still need a barrier."""
        here = np.zeros(self.local.size, bool)
        here[slice(None) if ix is None else ix] = True
        left = []
        for copy in self.copies:
            done = here[copy.who.local] & (copy.group < self.committed[copy.who.local] - pending)
            if done.any():
                self.arrive(copy.who[done], copy.offset[done], copy.values[done], copy.at)
            if not done.all():
                rest = ~done
                left.append(Copy(copy.who[rest], copy.group[rest], copy.offset[rest], copy.values[rest], copy.at))
        self.copies = left

    def arrive(self, who: Who, offset: np.ndarray, values: np.ndarray, at: int) -> None:
        self.write(self.shared, who, offset, np.ascontiguousarray(values).view(np.uint32), at, True)

    def fence(self, at: int, ix) -> None:
        """fence.proxy.async: what this thread knows of is visible to wgmma."""
        chosen = slice(None) if ix is None else ix
        self.fenced[chosen] += 1
        self.fenced_at[chosen] = self.stamp[chosen] >> 44
