"""The opcodes that reach beyond one thread: memory, shuffles, fences, matrices."""

from __future__ import annotations

from collections.abc import Callable

from .parse import Address, Unknown

__all__ = ["register"]

#: cache modifiers, which change no result
MODIFIERS = ("", ".nc", ".ca", ".cg", ".cs", ".L1::evict_last", ".L1::evict_first", ".L1::no_allocate", ".wb")
WORDS = [f"{t}{n}" for n in (8, 16, 32, 64) for t in "bus"] + ["f32", "f64"]
BITS = {"shared": 32, "cluster": 32, "global": 64}


def register(ops: dict[str, Callable]) -> None:
    for word in WORDS:
        for count in ("", ".v2", ".v4"):
            ops[f"ld.param{count}.{word}"] = parameter
        ops[f"st.param.{word}"] = pass_parameter
        for count in ("", ".v2", ".v4"):
            for form in ("shared", "shared::cta", "shared::cluster"):
                ops[f"ld.{form}{count}.{word}"] = load
                ops[f"st.{form}{count}.{word}"] = store
            for modifier in MODIFIERS:
                ops[f"ld.global{modifier}{count}.{word}"] = load
                ops[f"st.global{modifier}{count}.{word}"] = store
    for mode in ("up", "down", "bfly", "idx"):
        ops[f"shfl.sync.{mode}.b32"] = shuffle
    ops["call.uni"] = ops["call"] = function
    ops["vote.sync.ballot.b32"] = ops["vote.sync.any.pred"] = ops["vote.sync.all.pred"] = vote
    ops["bar.warp.sync"] = lambda e: call(e, "m.warp_barrier(ix)")
    for form in (".release", "", ".release.aligned", ".aligned"):
        ops[f"barrier.cluster.arrive{form}"] = lambda e: call(e, f"m.cluster.arrive({e.at}, ix)")
    ops["mapa.shared::cluster.u32"] = mapped
    for scope in ("", ".shared::cta"):
        ops[f"fence.proxy.async{scope}"] = lambda e: call(e, f"m.fence({e.at}, ix)")
    ops["cp.async.commit_group"] = lambda e: call(e, f"m.commit({e.at}, ix)")
    ops["cp.async.wait_all"] = lambda e: call(e, f"m.commit({e.at}, ix); m.wait({e.at}, ix, 0)")
    ops["cp.async.wait_group"] = lambda e: call(e, f"m.wait({e.at}, ix, {int(e.ins.operands[0])})", 1)
    for form in ("ca.shared.global", "cg.shared.global"):
        for hint in ("", ".L2::128B", ".L2::256B"):
            ops[f"cp.async.{form}{hint}"] = copy
    for count in (1, 2, 4):
        for form in ("", ".trans"):
            ops[f"ldmatrix.sync.aligned.m8n8.x{count}{form}.shared.b16"] = load_matrix
            ops[f"stmatrix.sync.aligned.m8n8.x{count}{form}.shared.b16"] = store_matrix
    for kind in ("bf16", "f16"):
        for k in (8, 16):
            ops[f"mma.sync.aligned.m16n8k{k}.row.col.f32.{kind}.{kind}.f32"] = product


def call(e, line: str, operands: int = 0) -> None:
    if e.ins.guard is not None or (len(e.ins.operands) != operands and e.ins.opcode != "bar.warp.sync"):
        raise e.unknown("unknown form")
    e.lines.append(line)


def parameter(e) -> None:
    """From a parameter by name, from one whose address is in a register, or what a call returned."""
    to, address = e.ins.operands
    kind, base = e.ins.opcode.split(".")[-1], address.base
    if e.ins.guard is not None:
        raise e.unknown("a guarded parameter")
    if base.startswith(("%retval", "%param")):
        e.put(to, e.get(base, kind), kind)
        return
    letter, width = ("int" if kind[0] == "s" else "float" if kind[0] == "f" else "uint"), int(kind[1:])
    place = e.read(base) if base in e.program.kernel.registers else repr(base)
    for i, x in enumerate(listed(to)):
        e.put(x, f"np.full(n, m.parameter({place}, {address.offset + i * width // 8}, np.{letter}{width}))", kind)


def pass_parameter(e) -> None:
    """To a function that is called."""
    address, of = e.ins.operands
    kind = e.ins.opcode.split(".")[-1]
    e.put(address.base, e.get(of, kind), kind, scalar=not e.is_array(of))


def function(e) -> None:
    """Of the library that nvcc links, pow alone: in float64, whatever its own code is."""
    to, name, given = e.ins.operands
    if name != "__internal_accurate_pow":
        raise e.unknown("unknown function")
    a, b = (e.get(x, "f64") for x in given)
    e.put(to[0], f"np.power({a}, {b})", "f64")


def mapped(e) -> None:
    to, of, rank = e.ins.operands
    array = e.is_array(of) or e.is_array(rank)
    e.put(to, f"m.mapped({e.get(of, 'u32')}, {e.get(rank, 'u32')})", "u32", scalar=not array)


def guard(e) -> str:
    return "None" if e.ins.guard is None else e.guard()


def listed(operand) -> tuple:
    return operand if isinstance(operand, tuple) else (operand,)


def space_of(e) -> str:
    return e.ins.opcode.split(".")[1].removesuffix("::cta").removeprefix("shared::")


def load(e) -> None:
    to, address = e.ins.operands
    kind, space, targets = e.ins.opcode.split(".")[-1], space_of(e), listed(to)
    size = int(kind[1:]) // 8
    before = "None"
    held = [x for x in targets if e.program.kernel.registers.get(x) == 8 * size]
    if e.ins.guard is not None and len(held) == len(targets):
        before = "[" + ", ".join(map(e.old, targets)) + "]"
    place = e.address(address, BITS[space])
    e.lines.append(f"got = m.load('{space}', {e.at}, ix, {place}, {size}, {len(targets)}, {guard(e)}, {before})")
    given, e.ins = e.ins, _unguarded(e.ins)
    for i, x in enumerate(targets):
        kind = kind if len(held) < len(targets) else f"b{8 * size}"
        if e.program.kernel.registers.get(x) is None or (given.guard is not None and len(held) < len(targets)):
            raise Unknown("unknown target of a load", given.line, given.text)
        e.put(x, f"got[{i}].view('i{size}')" if kind[0] == "s" else f"got[{i}]", kind)
    e.ins = given


def _unguarded(ins):
    import dataclasses

    return dataclasses.replace(ins, guard=None)


def store(e) -> None:
    address, of = e.ins.operands
    kind, space = e.ins.opcode.split(".")[-1], space_of(e)
    values = ", ".join(value(e, x, f"b{kind[1:]}" if kind[0] != "f" or e.is_array(x) else kind) for x in listed(of))
    e.lines.append(f"m.store('{space}', {e.at}, ix, {e.address(address, BITS[space])}, {int(kind[1:]) // 8}, [{values}], {guard(e)})")


def value(e, operand, kind: str) -> str:
    text = e.get(operand, kind, wider=True)
    return text if e.is_array(operand) else f"np.full(n, {text})"


def shuffle(e) -> None:
    to, of, b, clamp, members = e.ins.operands
    if e.ins.guard is not None:
        raise e.unknown("a guarded shuffle")
    mode, given = e.ins.opcode.split(".")[2], ", ".join(e.get(x, "u32") for x in (of, b, clamp, members))
    e.lines.append(f"got = m.shuffle('{mode}', {e.at}, ix, {given})")
    results = listed(to)
    e.put(results[0], "got[0]", "b32")
    if len(results) > 1:
        e.put(results[1], "got[1]", "pred")


def vote(e) -> None:
    to, of, members = e.ins.operands
    if members not in ("-1", "0xffffffff") or e.ins.guard is not None:
        raise e.unknown("unknown members of a vote")
    mode, x = e.ins.opcode.split(".")[2], e.get(of, "pred")
    e.lines.append(f"m.warps(m.who(ix).local, {e.at})")
    if mode == "ballot":
        e.put(to, f"A.ballot({x})", "b32")
    else:
        e.put(to, f"{x}.reshape(-1, 32).{mode}(1).repeat(32)", "pred")


def copy(e) -> None:
    to, of, size, *given = e.ins.operands
    if not isinstance(to, Address) or not isinstance(of, Address) or len(given) > 1:
        raise e.unknown("unknown operands")
    count = e.get(given[0], "u32") if given else "None"
    e.lines.append(f"m.copy({e.at}, ix, {e.address(to, 32)}, {e.address(of, 64)}, {int(size, 0)}, {count}, {guard(e)})")


def load_matrix(e) -> None:
    to, address = e.ins.operands
    if e.ins.guard is not None:
        raise e.unknown("a guarded ldmatrix")
    targets = listed(to)
    e.lines.append(f"got = X.load(m, {e.at}, ix, {e.address(address, 32)}, {len(targets)}, {'.trans' in e.ins.opcode})")
    for i, x in enumerate(targets):
        e.put(x, f"got[{i}]", "b32")


def store_matrix(e) -> None:
    address, of = e.ins.operands
    if e.ins.guard is not None:
        raise e.unknown("a guarded stmatrix")
    values = ", ".join(e.get(x, "b32") for x in listed(of))
    e.lines.append(f"X.store(m, {e.at}, ix, {e.address(address, 32)}, [{values}], {'.trans' in e.ins.opcode})")


def product(e) -> None:
    to, a, b, c = e.ins.operands
    if e.ins.guard is not None:
        raise e.unknown("a guarded mma")
    _, _, _, shape, _, _, _, kind, *_ = e.ins.opcode.split(".")
    groups = [", ".join(value(e, x, "f32" if i == 2 else "b32") for x in given) for i, given in enumerate((a, b, c))]
    e.lines.append(f"got = X.mma(m, {e.at}, ix, '{shape}', '{kind}', [{groups[0]}], [{groups[1]}], [{groups[2]}])")
    for i, x in enumerate(to):
        e.put(x, f"got[{i}]", "f32")
