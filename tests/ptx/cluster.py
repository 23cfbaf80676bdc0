"""Clusters of CTAs: their barrier, and the shared memory of the others (distributed shared memory).

An address of a cluster's shared memory is that of the CTA, with its rank + 1 in the upper byte; 0 there is the own CTA. What a thread did
before it arrives at the barrier is known to every thread that has waited: two accesses by different threads are ordered if the first one's
thread had arrived less often than the second one's has waited. So an access leaves its thread's number of arrivals, by rank.
"""

from __future__ import annotations

import numpy as np

__all__ = ["Cluster"]

RANK = 24
#: arrivals of a thread that has ended
ENDED = 1 << 30


class Cluster:
    """Of a machine's CTAs, ``size`` of them in each cluster.

    Attributes:
        rank: of each thread's CTA. arrivals, waits: of each thread. used: of each CTA, the most arrivals + 1 of threads of other CTAs when
        they touched its shared memory.
    """

    def __init__(self, machine, size: int):
        self.m, self.size = machine, size
        self.rank = machine.everyone.cta % size
        self.arrivals, self.waits = (np.zeros(machine.local.size, np.int32) for _ in range(2))
        self.used = np.zeros(machine.batch, np.int32)
        machine.registers["%cluster_ctarank"] = self.rank.astype(np.uint32)
        machine.registers["%cluster_nctarank"] = np.full(machine.local.size, size, np.uint32)

    def report(self, kind: str, at: int, threads: np.ndarray) -> None:
        if threads.size:
            self.m.reports.add(kind, at, thread=int(self.m.everyone.thread[threads[0]]))

    # ------------------------------------------------------------------------------------------------------------ memory

    def locate(self, address: np.ndarray, who, at: int) -> tuple[np.ndarray, np.ndarray]:
        """Addresses within CTAs, and the CTAs."""
        window = (address >> RANK).astype(np.int64)
        own = who.cta - self.rank[who.local]
        target = np.where(window == 0, who.cta, own + window - 1)
        bad = window > self.size
        target[bad] = who.cta[bad]
        away = np.flatnonzero(target != who.cta)
        local = who.local[away]
        self.report("touches shared memory of a CTA that may not have begun", at, local[self.waits[local] == 0])
        self.report("touches shared memory of a CTA that has ended", at, local[self.m.left[target[away]] == 0])
        np.maximum.at(self.used, target[away], self.arrivals[local] + 1)
        return np.where(bad, 0xFFFFFFFF, address & ((1 << RANK) - 1)).astype(np.uint32), target

    # ----------------------------------------------------------------------------------------------------------- barrier

    def arrive(self, at: int, ix) -> None:
        threads = self.m.who(ix).local
        self.m.warps(threads, at)
        self.report("arrives at a cluster's barrier again before it has waited", at, threads[self.arrivals[threads] != self.waits[threads]])
        self.arrivals[threads] += 1
        self.release()

    def wait(self, at: int, after: int, threads: np.ndarray) -> None:
        without = self.arrivals[threads] == self.waits[threads]
        self.report("waits at a cluster's barrier without having arrived", at, threads[without])
        self.m.go(after, threads[without])
        clusters = self.m.everyone.cta[threads] // self.size
        for i in np.unique(clusters[~without]):
            self.m.waiting.setdefault(-1 - i, []).append((at, after, threads[~without & (clusters == i)]))
        self.release()

    def release(self) -> None:
        """Lets threads go on whose barrier all have arrived at."""
        count = self.m.size * self.size
        for key in [x for x in self.m.waiting if x < 0]:
            all_of = slice((-1 - key) * count, -key * count)
            least, left = self.arrivals[all_of].min(), []
            for at, after, threads in self.m.waiting[key]:
                if not (done := self.waits[threads] < least).all():
                    left.append((at, after, threads[~done]))
                if (self.arrivals[all_of] == ENDED).any():
                    self.report("a barrier that threads which have ended do not reach", at, threads[done])
                self.waits[threads[done]] += 1
                self.m.go(after, threads[done])
            if left:
                self.m.waiting[key] = left
            else:
                del self.m.waiting[key]

    def end(self, at: int, threads: np.ndarray) -> None:
        for cta in np.unique(threads // self.m.size):
            here = threads[threads // self.m.size == cta]
            if self.m.left[cta] == 0:
                early = here[self.waits[here] < self.used[cta]]
                self.report("a CTA ends before others have finished with its shared memory", at, early)
        self.arrivals[threads] = ENDED
        self.release()
