"""What the machine that executes PTX reports, on kernels written by hand."""

from __future__ import annotations

import pytest
import torch

from ptx.handwritten import ints, kernel, run
from ptx.host import POISON, Launch
from ptx.machine import Hang

# ----------------------------------------------------------------------------------------------------------- shared memory

REVERSED = """
    ld.global.b32 %r7, [%d3];
    st.shared.b32 [%r6], %r7;
    {barrier}
    sub.s32 %r8, 63, %r1;
    shl.b32 %r8, %r8, 2;
    add.s32 %r8, %r5, %r8;
    ld.shared.b32 %r9, [%r8];
    st.global.b32 [%d3], %r9;
"""


def test_a_race_within_a_cta():
    a = ints(128)
    x = a.clone()
    assert run(REVERSED.format(barrier="bar.sync 0;"), x, a.clone(), ctas=2) == []
    assert torch.equal(x.reshape(2, 64), a.reshape(2, 64).flip(1))
    assert run(REVERSED.format(barrier=""), a.clone(), a.clone()) == ["race: read after write (shared)"]


def test_a_report_names_kernel_instructions_and_threads():
    reports, _ = Launch(kernel(REVERSED.format(barrier="")), [ints(64), ints(64)], (1,), 4096).run()
    assert len(reports) == 1
    assert "ld.shared.b32 %r9" in reports[0].instruction and "st.shared.b32 [%r6]" in reports[0].other
    assert "in k:" in str(reports[0]) and "thread 0 of CTA 0, before it thread 63 of CTA 0" in str(reports[0])


def test_a_barrier_of_a_warp_orders_its_warp_only():
    near = REVERSED.replace("63, %r1", "31, %r1")
    body = "setp.gt.u32 %p1, %r1, 31; @%p1 bra $END;" + near.format(barrier="{barrier}") + "$END:"
    assert run(body.format(barrier="bar.warp.sync -1;"), ints(64), ints(64)) == []
    assert run(body.format(barrier=""), ints(64), ints(64)) == ["race: read after write (shared)"]
    assert run(REVERSED.format(barrier="bar.warp.sync -1;"), ints(64), ints(64)) == ["race: read after write (shared)"]


def test_a_write_after_a_read():
    body = REVERSED.format(barrier="bar.sync 0;") + "{barrier} st.shared.b32 [%r6], %r1;"
    assert run(body.format(barrier="bar.sync 0;"), ints(64), ints(64)) == []
    assert run(body.format(barrier=""), ints(64), ints(64)) == ["race: write after read (shared)"]


def test_a_write_after_a_read_by_several_threads_at_once():
    """The last of them writes; nothing orders it after the others."""
    body = (
        "st.shared.b32 [%r5], 5; bar.sync 0; ld.shared.b32 %r7, [%r5]; {barrier} setp.eq.u32 %p1, %r1, 63; @%p1 st.shared.b32 [%r5], %r1;"
    )
    assert run(body.format(barrier="bar.sync 0;"), ints(64), ints(64)) == []
    assert run(body.format(barrier=""), ints(64), ints(64)) == ["race: write after read (shared)"]


def test_several_threads_store_to_one_address():
    equal = "mov.b32 %r7, 5; st.shared.b32 [%r5], %r7; bar.sync 0; ld.shared.b32 %r8, [%r5]; st.global.b32 [%d3], %r8;"
    assert run(equal, ints(64), ints(64)) == []
    assert run(equal.replace("mov.b32 %r7, 5;", "mov.b32 %r7, %r1;"), ints(64), ints(64)) == [
        "threads store different bits to one address (shared)"
    ]


def test_uninitialised_and_out_of_bounds():
    assert run("ld.shared.b32 %r7, [%r6];", ints(64), ints(64)) == ["reads uninitialised memory (shared)"]
    assert run("ld.shared.b32 %r7, [%r6+4096];", ints(64), ints(64)) == ["out of bounds (shared)"]
    assert run("ld.global.b32 %r7, [%d3+4];", ints(64), ints(64)) == ["out of bounds (global)"]
    assert run("ld.global.b32 %r7, [%d3+-8];", ints(64), ints(64)) == ["out of bounds (global)"]
    assert run("ld.global.b32 %r7, [%d3+-1000000];", ints(64), ints(64)) == ["out of bounds (global)"]
    assert run("ld.global.v2.b32 {%r7, %r8}, [%d3];", ints(66), ints(64)) == ["misaligned access (global)"]


def test_fresh_memory_is_uninitialised():
    fresh = torch.full((128,), POISON, dtype=torch.int16).view(torch.int32)
    fresh[:40] = 1
    assert run("ld.global.b32 %r7, [%d3];", fresh, ints(64)) == ["reads uninitialised memory (global)"]
    fresh[40:] = 1
    assert run("ld.global.b32 %r7, [%d3];", fresh, ints(64)) == []


def test_only_the_bytes_of_a_view_may_be_touched():
    whole = ints(256).reshape(64, 4)
    body = "mad.wide.u32 %d5, %r1, 16, %d1; ld.global.b32 %r7, [%d5]; ld.global.b32 %r8, [%d5+{offset}];"
    assert run(body.format(offset=4), whole[:, :2], ints(64)) == []
    assert run(body.format(offset=8), whole[:, :2], ints(64)) == ["out of bounds (global)"]


# ------------------------------------------------------------------------------------------------------------ global memory


def test_nothing_orders_the_ctas_of_a_launch():
    swap = "xor.b32 %r7, %r2, 1; mad.lo.s32 %r7, %r7, 64, %r1; mad.wide.u32 %d5, %r7, 4, %d1; st.global.b32 [%d3], %r1; bar.sync 0; "
    assert run(swap + "ld.global.b32 %r8, [%d5];", ints(128), ints(128), ctas=2) == ["race: read after write (global)"]
    mine = swap.replace("%d5, %r7", "%d5, %r3")
    assert run(mine + "ld.global.b32 %r8, [%d5];", ints(128), ints(128), ctas=2) == []
    same = "mad.wide.u32 %d5, %r1, 4, %d1; st.global.b32 [%d5], {value};"
    assert run(same.format(value="%r1"), ints(64), ints(64), ctas=2) == []


def test_ctas_that_write_different_bits():
    """In one batch of CTAs, and in different ones."""
    body = "mad.wide.u32 %d5, %r1, 4, %d1; st.global.b32 [%d5], %r2;"
    for ctas in (2, 200):
        kinds = run(body, ints(64), ints(64), ctas=ctas)
        assert set(kinds) <= {"threads store different bits to one address (global)", "race: write after write (global)"} and kinds


# ------------------------------------------------------------------------------------------------------------------ barriers


def test_a_barrier_that_not_all_threads_reach():
    body = "setp.lt.u32 %p1, %r1, {}; @%p1 bra $THERE; bar.sync 0; bra.uni $END; $THERE: bar.sync 0; $END:"
    assert run(body.format(16), ints(64), ints(64)) == ["threads of a warp meet at different barriers"]
    assert run(body.format(32), ints(64), ints(64)) == []
    body = "setp.lt.u32 %p1, %r1, 32; @%p1 ret; bar.sync 0;"
    assert run(body, ints(64), ints(64)) == ["a barrier that threads which have ended do not reach"]


def test_a_hang_is_an_error():
    """One thread never leaves a loop and the others wait for it: blocks are counted, not seconds."""
    body = "setp.eq.b32 %p1, %r1, 0; $LOOP: @%p1 bra $LOOP; bar.sync 0;"
    with pytest.raises(Hang, match="63 threads .*bar.sync 0`; 1 thread .*bra"):
        run(body, ints(64), ints(64))


# ------------------------------------------------------------------------------------------------------- asynchronous copies

COPIED = """
    setp.lt.u32 %p1, %r1, 40;
    selp.b32 %r7, 4, 0, %p1;
    cp.async.ca.shared.global [ %r6 + 0 ], [ %d3 + 0 ], 0x4, %r7;
    {commit}
    {wait}
    {barrier}
    xor.b32 %r8, %r4, 252;
    add.s32 %r8, %r5, %r8;
    ld.shared.b32 %r9, [%r8];
    st.global.b32 [%d4], %r9;
"""
EARLY = {
    "touches data of an asynchronous copy that was not waited for (shared)",
    "the kernel ends before an asynchronous copy is waited for",
}
PARTS = dict(commit="cp.async.commit_group;", wait="cp.async.wait_group 0;", barrier="bar.sync 0;")


def test_asynchronous_copies():
    a, b = ints(64), ints(64, 1)
    assert run(COPIED.format(**PARTS), a, b) == []
    assert b.tolist() == [a[63 - i].item() if 63 - i < 40 else 0 for i in range(64)]


@pytest.mark.parametrize(
    ("part", "text", "kinds"),
    [
        (
            "wait",
            "",
            EARLY,
        ),
        (
            "wait",
            "cp.async.wait_group 1;",
            EARLY,
        ),
        (
            "commit",
            "",
            EARLY,
        ),
        ("barrier", "", {"race: read after write (shared)"}),
    ],
)
def test_faults_of_asynchronous_copies(part, text, kinds):
    body = COPIED.format(**{**PARTS, part: text})
    assert set(run(body, ints(64), ints(64, 1))) == kinds


def test_a_launch_can_be_repeated():
    first = Launch(kernel(REVERSED.format(barrier="bar.sync 0;")), [ints(64), ints(64)], (1,), 4096)
    again = first.copy()
    assert again.run()[0] == [] and not torch.equal(first.arguments[0], again.arguments[0])
    first.run()
    assert torch.equal(first.arguments[0], again.arguments[0])
