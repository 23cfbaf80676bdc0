"""The opcodes without memory: each with all its suffixes, and the numpy expression that does it."""

from __future__ import annotations

import re
from collections.abc import Callable

__all__ = ["OPS", "find", "wgmma", "width"]

OPS: dict[str, Callable] = {}
INTEGERS = ("s16", "u16", "s32", "u32", "s64", "u64")
BITS = ("b16", "b32", "b64")
#: numpy's operator, and whether numbers that cannot be ordered fulfil it
COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
UNSIGNED = {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}


def find(opcode: str) -> Callable | None:
    return OPS.get(opcode)


def width(opcode: str) -> int:
    """Bytes of one word that a load or store moves."""
    return int(re.search(r"\.[bsuf](\d+)$", opcode)[1]) // 8


def wgmma(x) -> str | None:
    """The method of matrix.Products for an instruction of its kind."""
    if re.fullmatch(r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k16\.f32\.(bf16|f16)\.\1", x.opcode):
        return "issue"
    kinds = {"wgmma.fence": "fence", "wgmma.commit_group": "commit", "wgmma.wait_group": "wait"}
    return kinds.get(x.opcode.removesuffix(".sync.aligned"))


def simple(opcode: str, expression: str, *kinds: str) -> None:
    """``expression`` in {a}, {b}, {c}: operands of ``kinds``; the first kind is the result's."""

    def emit(e) -> None:
        to, *given = e.ins.operands
        if len(given) != len(kinds) - 1:
            raise e.unknown("unknown operands")
        values = [e.get(x, kind) for x, kind in zip(given, kinds[1:], strict=True)]
        if opcode.startswith(("shl", "shr")) and not e.is_array(given[1]) and int(given[1], 0) < int(kinds[0][1:]):
            e.put(to, f"({values[0]} {'<<' if opcode[2] == 'l' else '>>'} {int(given[1], 0)})", kinds[0])
            return
        e.put(to, expression.format(**dict(zip("abcd", values, strict=False))), kinds[0], scalar=not any(map(e.is_array, given)))

    OPS[opcode] = emit


def unsigned(kind: str) -> str:
    return "u" + kind[1:]


def integers() -> None:
    for t in INTEGERS:
        u, bits = unsigned(t), int(t[1:])
        for name, sign in (("add", "+"), ("sub", "-"), ("mul.lo", "*")):
            simple(f"{name}.{t}", f"({{a}} {sign} {{b}})", u, u, u)
        simple(f"mad.lo.{t}", "({a} * {b} + {c})", u, u, u, u)
        simple(f"min.{t}", "np.minimum({a}, {b})", t, t, t)
        simple(f"max.{t}", "np.maximum({a}, {b})", t, t, t)
        simple(f"div.{t}", "A.divided({a}, {b})", t, t, t)
        simple(f"rem.{t}", "A.remainder({a}, {b})", t, t, t)
        simple(f"shr.{t}", "A.shifted_right({a}, {b})", t, t, "u32")
        if bits >= 32:
            simple(f"bfe.{t}", "A.bit_field({a}, {b}, {c})", t, t, "u32", "u32")
        if t[0] == "s":
            simple(f"neg.{t}", "(-{a})", t, t)
            simple(f"abs.{t}", "np.abs({a})", t, t)
        if bits < 64:
            kind = {"s": "int", "u": "uint"}[t[0]]
            wide = f"{t[0]}{2 * bits}"
            product = f"np.multiply({{a}}, {{b}}, dtype=np.{kind}{2 * bits})"
            simple(f"mul.wide.{t}", product, wide, t, t)
            simple(f"mad.wide.{t}", f"({product} + {{c}})", wide, t, t, wide)
            simple(f"mul.hi.{t}", f"({product} >> {bits}).astype(np.{kind}{bits})", t, t, t)
        else:
            simple(f"mul.hi.{t}", f"A.upper({{a}}, {{b}}, {t[0] == 's'})", u, u, u)
        for name, sign in COMPARISONS.items():
            simple(f"setp.{name}.{t}", f"({{a}} {sign} {{b}})", "pred", t, t)
        for name, sign in UNSIGNED.items():
            simple(f"setp.{name}.{t}", f"({{a}} {sign} {{b}})", "pred", u, u)


def bits() -> None:
    for t in (*BITS, "pred"):
        for name, sign in (("and", "&"), ("or", "|"), ("xor", "^")):
            simple(f"{name}.{t}", f"({{a}} {sign} {{b}})", t, t, t)
        simple(f"not.{t}", "(~{a})", t, t)
    for t in BITS:
        simple(f"shl.{t}", "A.shifted_left({a}, {b})", t, t, "u32")
        simple(f"shr.{t}", "A.shifted_right({a}, {b})", t, t, "u32")
        simple(f"setp.eq.{t}", "({a} == {b})", "pred", t, t)
        simple(f"setp.ne.{t}", "({a} != {b})", "pred", t, t)
    for t in (*BITS, *INTEGERS, "f32", "f64"):
        if t[0] == "f":
            simple(f"selp.{t}", f"np.where({{c}}, {{a}}, {{b}}).astype('f{int(t[1:]) // 8}', copy=False)", t, t, t, "pred")
        else:
            kind = "b" + t[1:]
            simple(f"selp.{t}", "np.where({c}, {a}, {b})", kind, kind, kind, "pred")
        OPS[f"mov.{t}"] = move
    simple("mov.pred", "{a}", "pred", "pred")
    simple("bfi.b32", "A.inserted({a}, {b}, {c}, {d})", "b32", "b32", "b32", "u32", "u32")
    simple("prmt.b32", "A.permuted({a}, {b}, {c})", "b32", "b32", "b32", "u32")
    for side, left in (("l", True), ("r", False)):
        simple(f"shf.{side}.wrap.b32", f"A.funnel({{a}}, {{b}}, {{c}}, {left})", "b32", "b32", "b32", "u32")
    OPS["lop3.b32"] = lop3
    for t in ("bf16", "f16"):
        for name, sign, mask in (("neg", "^", 0x8000), ("abs", "&", 0x7FFF)):
            simple(f"{name}.{t}", f"({{a}} {sign} np.uint16({mask}))", "b16", "b16")
            simple(f"{name}.{t}x2", f"({{a}} {sign} np.uint32({mask << 16 | mask}))", "b32", "b32")
        for name in ("num", "nan", *COMPARISONS, *(f"{x}u" for x in COMPARISONS)):
            OPS[f"setp.{name}.{t}"] = OPS[f"setp.{name}.{t}x2"] = compare_halves


def compare_halves(e) -> None:
    """Of 16-bit floats, or of two at once: the lower ones first."""
    to, a, b = e.ins.operands
    _, name, kind = e.ins.opcode.split(".")
    sign, pair = COMPARISONS.get(name[:2]), kind.endswith("x2")
    if pair != isinstance(to, tuple):
        raise e.unknown("unknown operands")
    for i, result in enumerate(to if pair else (to,)):
        x, y = (e.get(operand, "b32" if pair else "b16") for operand in (a, b))
        x, y = (f"A.from_{kind.removesuffix('x2')}({f'({z} >> {16 * i}).astype(np.uint16)' if pair else z})" for z in (x, y))
        equal = f"(({x} == {x}) & ({y} == {y}))"
        forms = {"num": equal, "nan": f"(~{equal})", f"{name[:2]}u": f"(({x} {sign} {y}) | ~{equal})"}
        e.put(result, forms.get(name, f"(({x} {sign} {y}) & {equal})"), "pred", scalar=not (e.is_array(a) or e.is_array(b)))


def lop3(e) -> None:
    to, *given, lut = e.ins.operands
    e.put(to, "A.logic({}, {}, {}, {})".format(*(e.get(x, "b32") for x in given), int(lut, 0)), "b32")


def move(e) -> None:
    """Also of halves: ``{low, high}`` on either side."""
    kind = e.ins.opcode.split(".")[1]
    to, of = e.ins.operands
    kind = kind if kind[0] == "f" and not isinstance(of, tuple) and of.startswith("0") else "b" + kind[1:]
    total = int(kind[1:])
    if isinstance(of, tuple):
        part = total // len(of)
        terms = [f"({e.get(x, f'b{part}')}.astype(np.uint{total}) << np.uint{total}({i * part}))" for i, x in enumerate(of)]
        e.put(to, "(" + " | ".join(terms) + ")", kind)
    elif isinstance(to, tuple):
        part, whole = total // len(to), e.get(of, kind)
        for i, x in enumerate(to):
            if x != "_":
                e.put(x, f"({whole} >> np.uint{total}({i * part})).astype(np.uint{part})", f"b{part}")
    else:
        names = [name for name, _ in e.program.kernel.parameters]
        if of in names:
            of = str(names.index(of) << 16)
        symbol = of in e.program.kernel.shared
        e.put(to, f"np.uint{total}({e.get(of, kind)})" if symbol else e.get(of, kind), kind, scalar=symbol or not e.is_array(of))


def floats() -> None:
    for ftz in ("", ".ftz"):
        flush = "A.flushed" if ftz else ""
        a, b, c = (f"{flush}({{{x}}})" if ftz else f"{{{x}}}" for x in "abc")
        for rn in ("", ".rn"):
            for name, sign in (("add", "+"), ("sub", "-"), ("mul", "*")):
                simple(f"{name}{rn}{ftz}.f32", f"{flush}({a} {sign} {b})", "f32", "f32", "f32")
        simple(f"fma.rn{ftz}.f32", f"{flush}(A.fma({a}, {b}, {c}))", "f32", "f32", "f32", "f32")
        for form in ("rn", "full", "approx"):
            simple(f"div.{form}{ftz}.f32", f"{flush}({a} / {b})", "f32", "f32", "f32")
        for form in ("rn", "approx"):
            simple(f"sqrt.{form}{ftz}.f32", f"{flush}(np.sqrt({a}))", "f32", "f32")
            simple(f"rcp.{form}{ftz}.f32", f"{flush}(A.rcp({a}))", "f32", "f32")
        for name, function in (("ex2", "ex2"), ("lg2", "lg2"), ("rsqrt", "rsqrt"), ("sin", "sin"), ("cos", "cos")):
            simple(f"{name}.approx{ftz}.f32", f"{flush}(A.{function}({a}))", "f32", "f32")
        simple(f"neg{ftz}.f32", f"(-{a})", "f32", "f32")
        simple(f"abs{ftz}.f32", f"np.abs({a})", "f32", "f32")
        for name, numpy in (("min", "np.fmin"), ("max", "np.fmax"), ("min.NaN", "np.minimum"), ("max.NaN", "np.maximum")):
            order = name.split(".")
            simple(".".join([order[0] + ftz, *order[1:], "f32"]), f"{numpy}({a}, {b})", "f32", "f32", "f32")
        for name, sign in COMPARISONS.items():
            ordered = f"(({a} {sign} {b}) & ({a} == {a}) & ({b} == {b}))" if name == "ne" else f"({a} {sign} {b})"
            simple(f"setp.{name}{ftz}.f32", ordered, "pred", "f32", "f32")
            either = f"(({a} {sign} {b}) | ({a} != {a}) | ({b} != {b}))"
            simple(f"setp.{name}u{ftz}.f32", either, "pred", "f32", "f32")
        simple(f"setp.nan{ftz}.f32", f"(({a} != {a}) | ({b} != {b}))", "pred", "f32", "f32")
        simple(f"setp.num{ftz}.f32", f"(({a} == {a}) & ({b} == {b}))", "pred", "f32", "f32")
        for form, function in (("rmi", "np.floor"), ("rpi", "np.ceil"), ("rni", "np.rint"), ("rzi", "np.trunc")):
            simple(f"cvt.{form}{ftz}.f32.f32", f"{function}({a})", "f32", "f32")
            for t in ("s32", "u32", "s64"):
                kind = f"np.{'int' if t[0] == 's' else 'uint'}{t[1:]}"
                simple(f"cvt.{form}{ftz}.{t}.f32", f"A.truncated({function}({a}), {kind})", t, "f32")
    simple("fma.rm.f32", "A.fma_down({a}, {b}, {c})", "f32", "f32", "f32", "f32")
    simple("cvt.sat.f32.f32", "np.nan_to_num(np.clip({a}, np.float32(0), np.float32(1)))", "f32", "f32")
    simple("copysign.f32", "np.copysign({b}, {a})", "f32", "f32", "f32")
    simple("tanh.approx.f32", "A.tanh({a})", "f32", "f32")


def doubles() -> None:
    for rn in ("", ".rn"):
        for name, sign in (("add", "+"), ("sub", "-"), ("mul", "*")):
            simple(f"{name}{rn}.f64", f"({{a}} {sign} {{b}})", "f64", "f64", "f64")
    simple("fma.rn.f64", "({a} * {b} + {c})", "f64", "f64", "f64", "f64")
    simple("div.rn.f64", "({a} / {b})", "f64", "f64", "f64")
    simple("neg.f64", "(-{a})", "f64", "f64")
    simple("abs.f64", "np.abs({a})", "f64", "f64")
    simple("cvt.f64.f32", "{a}.astype(np.float64)", "f64", "f32")
    simple("cvt.rn.f32.f64", "{a}.astype(np.float32)", "f32", "f64")
    simple("cvt.rzi.f64.f64", "np.trunc({a})", "f64", "f64")
    for name, sign in COMPARISONS.items():
        ordered = f"(({{a}} {sign} {{b}}) & ({{a}} == {{a}}) & ({{b}} == {{b}}))" if name == "ne" else f"({{a}} {sign} {{b}})"
        simple(f"setp.{name}.f64", ordered, "pred", "f64", "f64")
        simple(f"setp.{name}u.f64", f"(({{a}} {sign} {{b}}) | ({{a}} != {{a}}) | ({{b}} != {{b}}))", "pred", "f64", "f64")


def conversions() -> None:
    wide = (*INTEGERS, "s8", "u8")
    for to in wide:
        for of in wide:
            OPS[f"cvt.{to}.{of}"] = convert
    for t in ("s32", "u32", "s64", "u64"):
        simple(f"cvt.rn.f32.{t}", "{a}.astype(np.float32)", "f32", t)
    for t in ("bf16", "f16"):
        simple(f"cvt.f32.{t}", f"A.from_{t}({{a}})", "f32", "b16")
        simple(f"cvt.rn.{t}.f32", f"A.to_{t}({{a}})", "b16", "f32")
        simple(f"cvt.rn.{t}x2.f32", f"A.pair(A.to_{t}({{a}}), A.to_{t}({{b}}))", "b32", "f32", "f32")
    for t in ("u64", "u32"):
        for where in ("to.global", "global", "to.shared", "shared"):
            simple(f"cvta.{where}.{t}", "{a}", t, t)


def convert(e) -> None:
    """Between integers: the source is extended by its sign, or cut off."""
    _, to, of = e.ins.opcode.split(".")
    a, b = e.ins.operands
    kind = "np.{}{}".format("int" if to[0] == "s" else "uint", to[1:])
    value = e.get(b, of, wider=True)
    if of[0] == "s" and e.program.kernel.registers.get(b, 0) > int(of[1:]):
        value = f"{e.get(b, 'b' + of[1:], wider=True)}.view(np.int{of[1:]})"
    e.put(a, f"{value}.astype({kind})", to)


for _fill in (integers, bits, floats, doubles, conversions):
    _fill()
