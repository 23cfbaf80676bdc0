"""Clusters on the machine that executes PTX: distributed shared memory and the cluster's barrier, on kernels written by hand."""

from __future__ import annotations

import collections
import types

import pytest
import torch

from ptx.handwritten import ints, kernel, run
from ptx.host import Launch
from ptx.machine import Hang
from ptx.parse import Unknown

BARRIER = "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;"
#: every thread's number to the neighbour's place in reverse order, by way of shared memory
READS = """
    ld.global.b32 %r7, [%d3];
    st.shared.b32 [%r6], %r7;
    mov.u32 %r8, %cluster_ctarank;
    xor.b32 %r8, %r8, 1;
    mapa.shared::cluster.u32 %r9, %r5, %r8;
    sub.s32 %r10, 252, %r4;
    add.s32 %r9, %r9, %r10;
    {first}
    ld.shared::cluster.b32 %r11, [%r9];
    {last}
    st.global.b32 [%d3], %r11;
"""
WRITES = """
    mov.u32 %r8, %cluster_ctarank;
    xor.b32 %r8, %r8, 1;
    mapa.shared::cluster.u32 %r9, %r6, %r8;
    {first}
    st.shared::cluster.b32 [%r9], %r3;
    {last}
    ld.shared.b32 %r11, [%r6];
    st.global.b32 [%d3], %r11;
"""
BOTH = dict(first=BARRIER, last=BARRIER)


def clusters(body: str, ctas: int = 4, size: int = 2, count: int = 64) -> list[str]:
    return run(body, ints(ctas * count), ints(ctas * count), ctas=ctas, cluster=size)


def test_a_neighbours_shared_memory():
    a = ints(256)
    x = a.clone()
    assert run(READS.format(**BOTH), x, a.clone(), ctas=4, cluster=2) == []
    assert torch.equal(x.reshape(2, 2, 64), a.reshape(2, 2, 64).flip(1, 2))
    assert run(WRITES.format(**BOTH), x, a.clone(), ctas=4, cluster=2) == []
    assert torch.equal(x.reshape(2, 2, 64), torch.arange(256, dtype=torch.int32).reshape(2, 2, 64).flip(1))


def test_every_cta_of_larger_clusters():
    """More CTAs than run side by side; each reads from the last of its cluster."""
    body = READS.replace("xor.b32 %r8, %r8, 1", "mov.u32 %r8, %cluster_nctarank; sub.s32 %r8, %r8, 1").format(**BOTH)
    x = ints(64 * 4 * 20)
    wanted = x.reshape(20, 4, 64)[:, 3:].flip(2).expand(-1, 4, -1)
    assert run(body, x, x.clone(), ctas=80, cluster=4) == []
    assert torch.equal(x.reshape(20, 4, 64), wanted)


@pytest.mark.parametrize("barrier", ["", "bar.sync 0;"])
def test_what_only_the_barrier_of_the_cluster_orders(barrier):
    begun = "touches shared memory of a CTA that may not have begun"
    kinds = clusters(READS.format(first=barrier, last=BARRIER))
    assert set(kinds) == {begun, "race: read after write (shared)"}
    assert clusters(READS.format(first=BARRIER, last=barrier)) == ["a CTA ends before others have finished with its shared memory"]
    again = READS.format(first=BARRIER, last=barrier + "st.shared.b32 [%r6], %r1;" + BARRIER)
    assert clusters(again) == ["race: write after read (shared)"]
    assert clusters(again.replace(barrier + "st.shared", BARRIER + "st.shared")) == []
    assert "race: read after write (shared)" in clusters(WRITES.format(first=BARRIER, last=barrier))
    assert clusters(WRITES.format(first=barrier, last=BARRIER)) == [begun]
    before = "st.shared.b32 [%r6], %r1;" + WRITES.format(first=BARRIER + "{}", last=BARRIER)
    assert clusters(before.format("")) == []
    assert clusters(before.format("ld.shared.b32 %r12, [%r6];" + barrier)) == ["race: write after read (shared)"]


def test_it_orders_the_threads_of_a_cta_too():
    swap = "st.shared.b32 [%r6], %r1; {} sub.s32 %r7, 252, %r4; add.s32 %r7, %r5, %r7; ld.shared.b32 %r8, [%r7]; {} st.shared.b32 [%r6], 5;"
    assert clusters(swap.format(BARRIER, BARRIER)) == []
    assert clusters(swap.format("bar.sync 0;", BARRIER)) == []
    assert clusters(swap.format("", BARRIER)) == ["race: read after write (shared)"]
    assert clusters(swap.format(BARRIER, "")) == ["race: write after read (shared)"]


def test_what_comes_between_arriving_and_waiting_is_not_ordered():
    arrive, wait = BARRIER.split("; ")
    body = READS.format(first=BARRIER, last="{} " + BARRIER)
    store = "st.shared.b32 [%r6], %r1;"
    assert clusters(body.format(f"{arrive}; mov.b32 %r12, 5; {wait} {store}")) == []
    assert clusters(body.format(f"{arrive}; {store} {wait}")) == ["race: write after read (shared)"]


def test_nothing_orders_clusters_or_global_memory_of_ctas():
    swap = "xor.b32 %r7, %r2, 1; mad.lo.s32 %r7, %r7, 64, %r1; mad.wide.u32 %d5, %r7, 4, %d1; st.global.b32 [%d3], %r1; {} "
    assert clusters(swap.format(BARRIER) + "ld.global.b32 %r8, [%d5];", size=1) == ["race: read after write (global)"]
    own = "xor.b32 %r7, %r3, 63; mad.wide.u32 %d5, %r7, 4, %d1; st.global.b32 [%d3], %r1; {} ld.global.b32 %r8, [%d5];"
    assert clusters(own.format(BARRIER)) == []
    assert clusters(own.format("")) == ["race: read after write (global)"]


def test_addresses_outside():
    third = "mapa.shared::cluster.u32 %r9, %r5, 2;" + BARRIER + "ld.shared::cluster.b32 %r11, [%r9];"
    assert clusters(third) == ["out of bounds (shared)"]
    mapped = "mapa.shared::cluster.u32 %r9, %r6, 1;" + BARRIER + "ld.shared.b32 %r11, [%r9];"
    assert clusters(mapped) == ["out of bounds (shared)"]  # it is no address of the CTA's own window
    own = "st.shared.b32 [%r6], 1;" + BARRIER + "ld.shared::cluster.b32 %r11, [%r6];"
    assert clusters(own) == []
    assert clusters(READS.format(**BOTH).replace("st.shared.b32 [%r6], %r7;", "")) == ["reads uninitialised memory (shared)"]


def test_a_barrier_that_not_all_reach():
    arrive, wait = BARRIER.split("; ")
    assert clusters(f"{arrive}; {arrive}; {wait}") == ["arrives at a cluster's barrier again before it has waited"]
    assert clusters(wait) == ["waits at a cluster's barrier without having arrived"]
    some = "and.b32 %r7, %r2, 1; setp.eq.b32 %p1, %r7, 0; @%p1 bra $END;" + BARRIER + "$END: {}"
    assert clusters(some.format("")) == ["a barrier that threads which have ended do not reach"]
    with pytest.raises(Hang, match=r"128 threads .*barrier.cluster"):
        clusters("and.b32 %r7, %r2, 1; setp.eq.b32 %p1, %r7, 0; $LOOP: @%p1 bra $LOOP;" + BARRIER)


def test_what_is_not_known_is_refused():
    for line in ("barrier.cluster.arrive.relaxed;", "barrier.cluster.wait.relaxed;", "@%p1 " + BARRIER, "mapa.u64 %d5, %d1, 1;"):
        with pytest.raises(Unknown):
            clusters(line)


def test_shares_of_a_launch():
    """Whole clusters run, however few CTAs are asked for."""
    launch = Launch(kernel(READS.format(**BOTH)), [ints(256), ints(256)], (4,), 4096, cluster=2)
    reports, counts = launch.run(counting=True, most=1)
    assert reports == [] and counts.barriers == 4 and counts.table()["wavefronts"] == 2 * 2 * 2


def test_the_clock_waits_for_another_multiprocessor():
    """From the arrival at the barrier on; what a block does between arriving and waiting costs nothing more."""
    latencies = collections.defaultdict(lambda: 4, cluster=180)
    chip = types.SimpleNamespace(issue=4, tensor=4096, latencies=latencies)
    arrive, wait = (x.rstrip(";") + "; " for x in BARRIER.split("; "))

    def cycles(barrier: str) -> float:
        launch = Launch(kernel(barrier), [ints(256), ints(256)], (4,), 4096, cluster=2)
        return launch.run(chip=chip)[1].clock.now

    work = "add.s32 %r7, %r7, 1; " * 50  # 4 cycles each
    alone, barrier = cycles("mov.b32 %r7, 0;"), cycles("mov.b32 %r7, 0;" + arrive + wait)
    assert 180 <= barrier - alone < 190
    assert cycles("mov.b32 %r7, 0;" + arrive + work + wait) - cycles("mov.b32 %r7, 0;" + work) < 10
