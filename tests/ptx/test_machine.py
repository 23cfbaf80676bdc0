"""The machine that executes PTX, on kernels written by hand."""

from __future__ import annotations

import dataclasses
import fractions
import textwrap

import numpy as np
import pytest
import torch

from ptx import arithmetic
from ptx.host import POISON, Launch
from ptx.machine import Hang
from ptx.parse import Unknown

REGISTERS = ".reg .pred %p<9>; .reg .b16 %h<9>; .reg .b32 %r<40>; .reg .b64 %d<20>;"
#: every thread's element of the 32-bit tensors a and b: addresses %d1, %d2; %r1 is the thread, %r2 the CTA
PROLOGUE = """
    ld.param.b64 %d1, [k_param_0];
    ld.param.b64 %d2, [k_param_1];
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, %ctaid.x;
    mov.u32 %r3, %ntid.x;
    mad.lo.s32 %r3, %r2, %r3, %r1;
    mad.wide.u32 %d3, %r3, 4, %d1;
    mad.wide.u32 %d4, %r3, 4, %d2;
    shl.b32 %r4, %r1, 2;
    mov.b32 %r5, smem;
    add.s32 %r6, %r5, %r4;
"""


def kernel(body: str, threads: int = 64, prologue: str = PROLOGUE) -> str:
    return textwrap.dedent(f"""
        .version 8.0
        .target sm_90a
        .extern .shared .align 16 .b8 smem[];
        .visible .entry k(.param .u64 k_param_0, .param .u64 k_param_1)
        .reqntid {threads}
        {{
            {REGISTERS}
            {prologue}
            {body}
            ret;
        }}
        """)


def run(body: str, *tensors: torch.Tensor, threads: int = 64, ctas: int = 1, shared: int = 4096, prologue: str = PROLOGUE) -> list[str]:
    """The kinds of fault that are reported."""
    reports, _ = Launch(kernel(body, threads, prologue), list(tensors), (ctas,), shared).run()
    return [x.kind for x in reports]


def ints(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31, (count,), dtype=torch.int32, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------------------------- syntax


@pytest.mark.parametrize(
    "line",
    ["setp.lt.bf16 %p1, %h1, %h2;", "add.f33 %r1, %r2, %r3;", "bar.sync 1, 64;", "frobnicate %r1;", "add.s32 %r1, %d1, %r2;", "mov.b32 %r1, %clock;"],
)
def test_what_is_not_known_is_refused_with_its_line(line):
    text = kernel(line)
    number = next(i for i, x in enumerate(text.split("\n"), 1) if line in x)
    with pytest.raises(Unknown, match=f"in line {number} of the PTX"):
        Launch(text, [ints(64), ints(64)], (1,), 4096).run()


# --------------------------------------------------------------------------------------------------------------- arithmetic


def binary(opcode: str, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    a, b = a.clone(), b.clone()
    body = f"ld.global.b32 %r7, [%d3]; ld.global.b32 %r8, [%d4]; {opcode} %r9, %r7, %r8; st.global.b32 [%d3], %r9;"
    assert run(body, a, b, threads=len(a)) == []
    return a


@pytest.mark.parametrize(
    ("opcode", "function"),
    {
        "add.s32": lambda a, b: a + b,
        "mul.lo.s32": lambda a, b: a * b,
        "mul.hi.s32": lambda a, b: (a * b) >> 32,
        "mul.hi.u32": lambda a, b: ((a % 2**32) * (b % 2**32)) >> 32,
        "div.s32": lambda a, b: int(fractions.Fraction(a, b)) if b else 0,
        "rem.s32": lambda a, b: a - b * int(fractions.Fraction(a, b)) if b else a,
        "min.u32": lambda a, b: min(a % 2**32, b % 2**32),
        "max.s32": max,
        "shl.b32": lambda a, b: a << (b % 2**32) if b % 2**32 < 32 else 0,
        "shr.u32": lambda a, b: (a % 2**32) >> (b % 2**32) if b % 2**32 < 32 else 0,
        "shr.s32": lambda a, b: a >> min(b % 2**32, 31),
    }.items(),
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_integers(opcode, function):
    a, b = ints(64), ints(64, 1)
    if opcode.startswith("sh"):
        b = b % 40
    if opcode.startswith(("div", "rem")):
        b = torch.where(b % 3 == 0, b % 17 + 1, b)
    found = binary(opcode, a, b)
    wanted = [function(x, y) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    assert [x % 2**32 for x in found.tolist()] == [x % 2**32 for x in wanted]


def test_upper_half_of_64_bits():
    a, b = (np.random.default_rng(i).integers(0, 2**64, 100, np.uint64) for i in range(2))
    for signed in (False, True):
        value = lambda x, signed=signed: int(x) - 2**64 * (signed and int(x) >= 2**63)
        wanted = [(value(x) * value(y) >> 64) % 2**64 for x, y in zip(a, b, strict=True)]
        assert arithmetic.upper(a, b, signed).tolist() == wanted


def test_fma_rounds_once():
    """Against rational arithmetic, on sums that lie half-way between two numbers in float64."""
    random = np.random.default_rng(0)
    a, b = (random.standard_normal(4000).astype(np.float32) for _ in range(2))
    c = (random.standard_normal(4000) * 2.0 ** random.integers(-40, 40, 4000)).astype(np.float32)
    a[:1000], b[:1000] = 1 + random.integers(0, 2**12, 1000) * 2.0**-12, 1 + 2.0**-12
    c[:1000] = random.choice([1, -1], 1000) * 2.0**-60
    found = arithmetic.fma(a, b, c)
    for x, y, z, got in zip(a, b, c, found, strict=True):
        exact = fractions.Fraction(float(x)) * fractions.Fraction(float(y)) + fractions.Fraction(float(z))
        near = [got, np.nextafter(got, np.float32(np.inf)), np.nextafter(got, np.float32(-np.inf))]
        errors = [abs(fractions.Fraction(float(v)) - exact) for v in near]
        assert errors[0] == min(errors)
        if errors.count(errors[0]) > 1:
            assert got.view(np.uint32) % 2 == 0


@pytest.mark.filterwarnings("ignore:overflow")
def test_sixteen_bits_as_torch_rounds_them():
    x = ints(200_000).view(torch.float32)
    x = torch.cat([x[x.isfinite()], torch.tensor([float("inf"), -float("inf"), 0.0, -0.0, 65519.99, 65520.0, 6e-8, 2.0**-133])])
    for dtype, there, back in ((torch.bfloat16, "to_bf16", "from_bf16"), (torch.float16, "to_f16", "from_f16")):
        bits = getattr(arithmetic, there)(x.numpy())
        assert np.array_equal(bits, x.to(dtype).view(torch.uint16).numpy())
        assert np.array_equal(getattr(arithmetic, back)(bits), x.to(dtype).float().numpy())


def test_packed_conversion_and_comparison_with_nan():
    a, b = torch.tensor([1.5, -2.0, float("nan"), 4.0] * 8), torch.tensor([1.0, float("nan"), 3.0, 5.0] * 8)
    packed = binary("cvt.rn.bf16x2.f32", a, b).view(torch.bfloat16).reshape(-1, 2)  # the first operand is the upper half
    assert torch.equal(packed[:, 1].nan_to_num(7), a.bfloat16().nan_to_num(7)) and torch.equal(packed[:, 0].nan_to_num(7), b.bfloat16().nan_to_num(7))
    for name, wanted in (("lt", a < b), ("ltu", ~(a >= b)), ("ne", (a != b) & ~(a.isnan() | b.isnan())), ("neu", a != b)):
        x, y = a.clone(), b.clone()
        body = f"ld.global.b32 %r7, [%d3]; ld.global.b32 %r8, [%d4]; setp.{name}.f32 %p1, %r7, %r8; selp.b32 %r9, 1, 0, %p1; st.global.b32 [%d3], %r9;"
        assert run(body, x, y, threads=32) == []
        assert torch.equal(x.view(torch.int32) == 1, wanted), name


def test_bits_of_fields_and_bytes():
    a = ints(32)
    x = a.clone()
    assert run("ld.global.b32 %r7, [%d3]; bfe.s32 %r8, %r7, 5, 9; st.global.b32 [%d3], %r8;", x, a.clone(), threads=32) == []
    assert x.tolist() == [((v >> 5) & 511) - 512 * ((v >> 13) & 1) for v in a.tolist()]
    x = a.clone()
    assert run("ld.global.b32 %r7, [%d3]; prmt.b32 %r8, %r7, 0, 0x7701U; st.global.b32 [%d3], %r8;", x, a.clone(), threads=32) == []
    assert [v % 2**32 for v in x.tolist()] == [(v >> 8 & 255) | (v & 255) << 8 for v in a.tolist()]


# ------------------------------------------------------------------------------------------------------- control and shuffles


def test_divergent_threads_meet_again():
    """Thread i turns a loop i times, with a branch inside; then all meet at a barrier."""
    body = """
        mov.b32 %r10, 0; mov.b32 %r11, 0;
    $LOOP:
        setp.ge.u32 %p1, %r10, %r1;
        @%p1 bra $DONE;
        and.b32 %r12, %r10, 1;
        setp.eq.b32 %p2, %r12, 0;
        @%p2 bra $EVEN;
        add.s32 %r11, %r11, 100;
        bra.uni $NEXT;
    $EVEN:
        add.s32 %r11, %r11, 1;
    $NEXT:
        add.s32 %r10, %r10, 1;
        bra.uni $LOOP;
    $DONE:
        bar.sync 0;
        st.global.b32 [%d3], %r11;
    """
    a = torch.zeros(128, dtype=torch.int32)
    assert run(body, a, ints(128), ctas=2) == []
    assert a.tolist() == [(i + 1) // 2 + 100 * (i // 2) for i in range(64)] * 2


@pytest.mark.parametrize(
    ("mode", "b", "clamp", "source"),
    [
        ("bfly", 5, 31, lambda i: i ^ 5),
        ("up", 3, 0, lambda i: i - 3 if i >= 3 else i),
        ("down", 4, 31, lambda i: i + 4 if i < 28 else i),
        ("idx", 9, 31, lambda i: 9),
        ("bfly", 3, 0x1C1F - 0x1C00 + 0x1C00, lambda i: i ^ 3),
        ("up", 1, 0x1800, lambda i: i - 1 if i % 8 else i),
        ("idx", 2, 0x181F, lambda i: i // 8 * 8 + 2),
    ],
)
def test_shuffles(mode, b, clamp, source):
    a = ints(64)
    x = a.clone()
    body = f"ld.global.b32 %r7, [%d3]; shfl.sync.{mode}.b32 %r8, %r7, {b}, {clamp}, -1; st.global.b32 [%d3], %r8;"
    assert run(body, x, a.clone()) == []
    assert x.tolist() == [a[i // 32 * 32 + source(i % 32)].item() for i in range(64)]


def test_guarded_loads_and_stores():
    a, b = ints(64), ints(64, 1)
    x, y = a.clone(), b.clone()
    body = """
        setp.lt.u32 %p1, %r1, 10;
        mov.b32 %r7, 42;
        @%p1 ld.global.b32 %r7, [%d4];
        setp.lt.u32 %p2, %r1, 20;
        @!%p2 bra $END;
        st.global.b32 [%d3], %r7;
    $END:
    """
    assert run(body, x, y) == []
    assert x[:10].tolist() == b[:10].tolist() and x[10:20].tolist() == [42] * 10 and torch.equal(x[20:], a[20:])


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


def test_several_threads_store_to_one_address():
    equal = "mov.b32 %r7, 5; st.shared.b32 [%r5], %r7; bar.sync 0; ld.shared.b32 %r8, [%r5]; st.global.b32 [%d3], %r8;"
    assert run(equal, ints(64), ints(64)) == []
    assert run(equal.replace("mov.b32 %r7, 5;", "mov.b32 %r7, %r1;"), ints(64), ints(64)) == ["threads store different bits to one address (shared)"]


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
    body = "setp.lt.u32 %p1, %r1, 32; @%p1 bra $THERE; bar.sync 0; bra.uni $END; $THERE: bar.sync 0; $END:"
    assert run(body, ints(64), ints(64)) == ["threads of a CTA meet at different barriers"]
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
PARTS = dict(commit="cp.async.commit_group;", wait="cp.async.wait_group 0;", barrier="bar.sync 0;")


def test_asynchronous_copies():
    a, b = ints(64), ints(64, 1)
    assert run(COPIED.format(**PARTS), a, b) == []
    assert b.tolist() == [a[63 - i].item() if 63 - i < 40 else 0 for i in range(64)]


@pytest.mark.parametrize(
    ("part", "text", "kinds"),
    [
        ("wait", "", {"touches data of an asynchronous copy that was not waited for (shared)", "the kernel ends before an asynchronous copy is waited for"}),
        ("wait", "cp.async.wait_group 1;", {"touches data of an asynchronous copy that was not waited for (shared)", "the kernel ends before an asynchronous copy is waited for"}),
        ("commit", "", {"touches data of an asynchronous copy that was not waited for (shared)", "the kernel ends before an asynchronous copy is waited for"}),
        ("barrier", "", {"race: read after write (shared)"}),
    ],
)
def test_faults_of_asynchronous_copies(part, text, kinds):
    body = COPIED.format(**{**PARTS, part: text})
    assert set(run(body, ints(64), ints(64, 1))) == kinds


def test_a_launch_can_be_repeated():
    first = Launch(kernel(REVERSED.format(barrier="bar.sync 0;")), [ints(64), ints(64)], (1,), 4096)
    again = first.copy()
    assert dataclasses.replace(again).run()[0] == [] and not torch.equal(first.arguments[0], again.arguments[0])
    first.run()
    assert torch.equal(first.arguments[0], again.arguments[0])
