"""What the machine that executes PTX computes and counts, on kernels written by hand."""

from __future__ import annotations

import collections
import fractions
import types

import numpy as np
import pytest
import torch

from ptx import arithmetic
from ptx.handwritten import ints, kernel, run
from ptx.host import Launch
from ptx.parse import Unknown, parse

# ------------------------------------------------------------------------------------------------------------------- syntax


@pytest.mark.parametrize(
    "line",
    [
        "min.bf16 %h1, %h2, %h3;",
        "add.f33 %r1, %r2, %r3;",
        "bar.sync 1, 64;",
        "frobnicate %r1;",
        "add.s32 %r1, %d1, %r2;",
        "mov.b32 %r1, %clock;",
    ],
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
    assert torch.equal(packed[:, 1].nan_to_num(7), a.bfloat16().nan_to_num(7)) and torch.equal(
        packed[:, 0].nan_to_num(7), b.bfloat16().nan_to_num(7)
    )
    for name, wanted in (("lt", a < b), ("ltu", ~(a >= b)), ("ne", (a != b) & ~(a.isnan() | b.isnan())), ("neu", a != b)):
        x, y = a.clone(), b.clone()
        body = f"ld.global.b32 %r7, [%d3]; ld.global.b32 %r8, [%d4]; setp.{name}.f32 %p1, %r7, %r8;"
        body += "selp.b32 %r9, 1, 0, %p1; st.global.b32 [%d3], %r9;"
        assert run(body, x, y, threads=32) == []
        assert torch.equal(x.view(torch.int32) == 1, wanted), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_comparisons_of_two_halves(dtype):
    a = torch.tensor([1.5, -2.0, float("nan"), 4.0] * 16).to(dtype)
    b = torch.tensor([1.5, -3.0, 3.0, float("nan"), 5.0, 1.5, -3.0, 2.0] * 8).to(dtype)
    kind = "bf16x2" if dtype == torch.bfloat16 else "f16x2"
    for name, wanted in (("lt", a < b), ("geu", ~(a < b)), ("ne", (a != b) & ~(a.isnan() | b.isnan())), ("nan", a.isnan() | b.isnan())):
        x, y = a.clone().view(torch.int32), b.clone().view(torch.int32)
        body = f"ld.global.b32 %r7, [%d3]; ld.global.b32 %r8, [%d4]; setp.{name}.{kind} %p1|%p2, %r7, %r8;"
        body += "selp.b32 %r9, 1, 0, %p1; selp.b32 %r10, 2, 0, %p2; add.s32 %r9, %r9, %r10; st.global.b32 [%d3], %r9;"
        assert run(body, x, y, threads=32) == []
        assert x.tolist() == (wanted.reshape(-1, 2).int() @ torch.tensor([1, 2], dtype=torch.int32)).tolist(), name


@pytest.mark.parametrize("kind", ["u4", "i4", "u8", "i8"])
def test_bit_fields(kind):
    """Bit by bit, as the definition of PTX has them."""
    words = np.random.default_rng(0).integers(0, 256, (100, int(kind[1])), np.uint8).view(kind)[:, 0]
    bits = 8 * int(kind[1])
    for place, length in ((5, 9), (16, 16), (20, 40), (31, 1), (40, 30), (3, 0), (0, 64), (63, 255), (200, 8)):
        found = arithmetic.bit_field(words, np.uint32(place), np.uint32(length)).view(f"u{kind[1]}")
        for word, value in zip(words.tolist(), found.tolist(), strict=True):
            above = word >> min(place + length - 1, bits - 1) & 1 if kind[0] == "i" and length else 0
            given = [word >> place + i & 1 if i < length and place + i < bits else above for i in range(bits)]
            assert value == sum(x << i for i, x in enumerate(given)), (place, length)


def test_bits_of_fields_and_bytes():
    a = ints(32)
    x = a.clone()
    assert run("ld.global.b32 %r7, [%d3]; bfe.s32 %r8, %r7, 5, 9; st.global.b32 [%d3], %r8;", x, a.clone(), threads=32) == []
    assert x.tolist() == [((v >> 5) & 511) - 512 * ((v >> 13) & 1) for v in a.tolist()]
    x = a.clone()
    assert run("ld.global.b32 %r7, [%d3]; prmt.b32 %r8, %r7, 0, 0x7701U; st.global.b32 [%d3], %r8;", x, a.clone(), threads=32) == []
    assert [v % 2**32 for v in x.tolist()] == [(v >> 8 & 255) | (v & 255) << 8 for v in a.tolist()]


# ------------------------------------------------------------------------------------------------------- control and shuffles


def test_lines_that_are_inlined_in_each_other():
    lines = ".loc 1 5 1, function_name $x, inlined_at 1 6 1\n.loc 1 6 1, function_name $x, inlined_at 1 5 1\n"
    found = parse(kernel("", prologue=f"\n{lines}\nmov.b32 %r7, 1;") + '.file 1 "a.py"\n')
    assert found.instructions[0].source == "a.py:6"


def test_a_shuffle_waits_for_its_warp():
    """Half of every warp takes a way that lies behind the shuffle."""
    body = """
        and.b32 %r7, %r1, 31; mov.b32 %r8, %r1;
        setp.lt.u32 %p1, %r7, 16;
        @%p1 bra $LATER;
    $MEET:
        shfl.sync.bfly.b32 %r9, %r8, 16, 31, -1;
        st.global.b32 [%d3], %r9;
        ret;
    $LATER:
        add.s32 %r8, %r1, 100;
        bra.uni $MEET;
    """
    a = torch.zeros(64, dtype=torch.int32)
    assert run(body, a, ints(64)) == []
    assert a.tolist() == [(i ^ 16) + (100 if i % 32 >= 16 else 0) for i in range(64)]


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


# ------------------------------------------------------------------------------------------------------------------- counts


def counted(body: str) -> dict[str, int]:
    reports, counts = Launch(kernel(body), [ints(1024), ints(1024)], (2,), 8192).run(counting=True)
    assert reports == []
    return counts.table()


@pytest.mark.parametrize(
    ("store", "wavefronts"),
    [
        ("st.shared.b32 [%r6], %r1;", 1),
        ("shl.b32 %r7, %r4, 1; add.s32 %r7, %r5, %r7; st.shared.b32 [%r7], %r1;", 2),  # every second bank
        ("shl.b32 %r7, %r4, 2; add.s32 %r7, %r5, %r7; st.shared.v4.b32 [%r7], {%r1, %r1, %r1, %r1};", 4),
        ("mov.b32 %r7, 0; st.shared.b32 [%r5], %r7;", 1),
        ("and.b32 %r8, %r1, 7; shl.b32 %r7, %r8, 7; add.s32 %r7, %r5, %r7; mov.b32 %r8, 0; st.shared.b32 [%r7], %r8;", 8),  # one bank
    ],
)
def test_wavefronts_of_shared_memory(store, wavefronts):
    assert counted(store)["wavefronts"] == 4 * wavefronts  # of two warps in two CTAs


def test_sectors_and_instructions():
    found = counted("ld.global.b32 %r7, [%d3]; bar.sync 0; shl.b32 %r8, %r1, 5; mad.wide.u32 %d5, %r8, 1, %d2; ld.global.b32 %r9, [%d5];")
    assert found["sectors"] == 4 * (4 + 32) and found["global"] == 4 * 2 and found["barrier"] == 4
    assert found["flop"] == 0 and found["control"] == 4


def cycles(body: str) -> float:
    """Of the clock for two CTAs of two warps."""
    latencies = collections.defaultdict(lambda: 4, barrier=20)
    chip = types.SimpleNamespace(issue=4, tensor=4096, latencies=latencies)
    _, counts = Launch(kernel(body), [ints(1024), ints(1024)], (2,), 8192).run(chip=chip)
    return counts.clock.now


def test_the_clock_waits_at_a_barrier_for_the_last_warp():
    """Work of one warp takes as long, whichever it is; that of the other one beside it takes nothing."""
    work = "add.s32 %r7, %r7, 1; " * 50  # 4 cycles each
    part = lambda condition, label: f"setp.{condition}.u32 %p1, %r1, 32; @%p1 bra {label}; mov.b32 %r7, 0; {work} {label}: bar.sync 0; "
    none, first, last = (cycles(x) for x in ("setp.ge.u32 %p1, %r1, 32; bar.sync 0;", part("ge", "A"), part("lt", "A")))
    assert first == last >= none + 4 * 50
    # both between two barriers; one after the other, with a barrier in between
    both = f"setp.ge.u32 %p1, %r1, 32; mov.b32 %r7, 0; @%p1 bra A; {work} bra B; A: {work} B: bar.sync 0;"
    assert cycles(both) < first + 20 < first + 4 * 50 <= cycles(part("ge", "A") + part("lt", "B"))
