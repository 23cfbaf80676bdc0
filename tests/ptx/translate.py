"""Basic blocks to Python functions: a table from opcodes to numpy. What is not in the table is refused with its line."""

from __future__ import annotations

import bisect
import copy
import dataclasses
import re
from collections.abc import Callable

import numpy as np

from . import arithmetic, matrix, memory_ops, table
from .parse import Address, Instruction, Kernel, Unknown

__all__ = ["Block", "Program", "names"]

STORED = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
VIEWS = {"f16": "f2", "f32": "f4", "f64": "f8", **{f"s{n}": f"i{n // 8}" for n in (8, 16, 32, 64)}}
TOGETHER = ("shfl", "vote", "bar.warp", "barrier.cluster", "ldmatrix", "stmatrix", "mma", "wgmma")
SPECIAL = re.compile(r"%(n?tid|n?ctaid)\.[xyz]|%laneid|%cluster_n?ctarank")
WAIT = re.compile(r"barrier\.cluster\.wait(\.acquire)?(\.aligned)?")


@dataclasses.dataclass
class Block:
    """A block as a function of the registers that it needs, giving those that it leaves.

    Attributes:
        end: how it ends, and the target of a branch. last: its last instruction.
        touches: registers of products that it reads or writes, by more than a mov, and where.
        together: whether it has an instruction that all threads of a warp take together.
    """

    run: Callable
    needs: list[str]
    leaves: list[str]
    end: tuple[str, int]
    first: int
    last: int
    instruction: Instruction
    touches: dict[str, int]
    defines: set[str]
    together: bool


class Program:
    """A kernel translated. ``granule``: the bytes of its narrowest access."""

    def __init__(self, kernel: Kernel):
        self.kernel = kernel
        self.cuts = self.starts()
        self.block_of = {start: i for i, start in enumerate(self.cuts)}
        self.product_registers = matrix.product_registers(kernel)
        sizes = [table.width(x.opcode) for x in kernel.instructions if x.opcode.startswith(("ld.shared", "ld.global", "st."))]
        self.granule = min([4, *sizes])
        emitted = [Emitter(self, start, end) for start, end in zip(self.cuts, [*self.cuts[1:], len(kernel.instructions)], strict=True)]
        leaves = self.live(emitted)
        self.blocks = [x.finish(leaves[i]) for i, x in enumerate(emitted)]

    def without(self, at: int) -> Program:
        """The same program without an instruction that gives no register: a barrier, wait, fence or commit."""
        made, i = copy.copy(self), bisect.bisect(self.cuts, at) - 1
        made.blocks, block = list(self.blocks), self.blocks[i]
        made.blocks[i] = Emitter(self, block.first, block.last + 1, at).finish(set(block.leaves))
        return made

    def dtype(self, register: str):
        return np.uint32 if register not in self.kernel.registers else STORED[self.kernel.registers[register]]

    def starts(self) -> list[int]:
        """Where blocks begin: at labels that are branched to, and after whatever ends one."""
        instructions, found = self.kernel.instructions, {0}
        for i, x in enumerate(instructions):
            if ends(x):
                found.add(i + 1)
            if x.opcode.startswith("wgmma."):
                found.add(i)
            if x.opcode.startswith("bra"):
                found.add(self.kernel.labels[x.operands[0]])
        return sorted(i for i in found if i < len(instructions))

    def live(self, blocks: list[Emitter]) -> list[set[str]]:
        """Registers that some block after each block needs."""
        into: list[set[str]] = [set(x.needs) for x in blocks]
        out: list[set[str]] = [set() for _ in blocks]
        changed = True
        while changed:
            changed = False
            for i in reversed(range(len(blocks))):
                kind, target = blocks[i].end
                after = [i + 1] if i + 1 < len(blocks) and not (kind in ("branch", "exit") and blocks[i].always) else []
                after += [target] if kind == "branch" else []
                new = set().union(*(into[j] for j in after)) if after else set()
                if new != out[i]:
                    out[i], changed = new, True
                    into[i] = set(blocks[i].needs) | (new - blocks[i].defined)
        return out


def ends(x: Instruction) -> bool:
    return x.opcode.startswith(("bra", "bar.sync", "barrier.sync", "barrier.cluster.wait", "wgmma.")) or x.opcode in ("ret", "exit")


class Emitter:
    """One block as Python source."""

    def __init__(self, program: Program, start: int, end: int, without: int = -1):
        self.program, self.start, self.stop = program, start, end
        self.lines: list[str] = []
        self.needs: dict[str, None] = {}
        self.defined: set[str] = set()
        self.touches: dict[str, int] = {}
        self.constants: dict[str, object] = {}
        self.end, self.always, self.taken = ("next", 0), False, "None"
        for self.at in range(start, end):
            self.ins = program.kernel.instructions[self.at]
            if self.at != without:
                self.instruction()

    def instruction(self) -> None:
        x = self.ins
        if ends(x):
            self.ending()
            return
        emit = table.find(x.opcode)
        if emit is None:
            raise Unknown("unknown instruction", x.line, x.text)
        if not x.opcode.startswith("mov"):
            for name in names(x.operands):
                if name in self.program.product_registers:
                    self.touches[name] = self.at
        emit(self)

    def ending(self) -> None:
        x = self.ins
        self.always = x.guard is None
        if x.opcode.startswith("wgmma."):
            for name in matrix.needs(x):
                if name in self.program.kernel.registers:
                    self.read(name)
            for name in matrix.results(x):
                self.defined.add(name)
            kind = table.wgmma(x)
            if kind is None or not self.always:
                raise self.unknown("unknown instruction")
            self.end = (kind, 0)
        elif x.opcode.startswith("bra"):
            self.end = ("branch", self.program.block_of[self.program.kernel.labels[x.operands[0]]])
        elif x.opcode in ("ret", "exit"):
            self.end = ("exit", 0)
        elif x.opcode in ("bar.sync", "barrier.sync") and x.operands == ("0",) and self.always:
            self.end = ("barrier", 0)
        elif WAIT.fullmatch(x.opcode) and self.always:
            self.end = ("cluster", 0)
        else:
            raise Unknown("unknown form of a barrier", x.line, x.text)
        if not self.always:
            self.taken = self.guard()

    def finish(self, wanted: set[str]) -> Block:
        leaves = sorted(x for x in self.defined & wanted if self.end[0] != "issue")
        arguments = ", ".join(["m", "ix", "n", *map(variable, self.needs)])
        results = "".join(f"{variable(x)}, " for x in leaves)
        source = f"def run({arguments}):\n" + "\n".join(f"    {x}" for x in self.lines) + f"\n    return {self.taken}, ({results})\n"
        given = {"np": np, "A": arithmetic, "X": matrix, **self.constants}
        instructions = self.program.kernel.instructions
        last, together = instructions[self.stop - 1], any(x.opcode.startswith(TOGETHER) for x in instructions[self.start : self.stop])
        exec(compile(source, f"<{self.program.kernel.name} {self.start}>", "exec"), given)
        return Block(
            given["run"], list(self.needs), leaves, self.end, self.start, self.stop - 1, last, self.touches, set(self.defined), together
        )

    # ------------------------------------------------------------------------------------------------- operands as Python

    def unknown(self, why: str) -> Unknown:
        return Unknown(why, self.ins.line, self.ins.text)

    def is_array(self, operand) -> bool:
        return operand in self.program.kernel.registers or SPECIAL.fullmatch(operand) is not None

    def read(self, name: str) -> str:
        if name not in self.defined:
            self.needs[name] = None
        return variable(name)

    def constant(self, value) -> str:
        name = f"k{len(self.constants)}"
        self.constants[name] = value
        return name

    def guard(self) -> str:
        name, negated = self.ins.guard
        return f"(~{self.read(name)})" if negated else self.read(name)

    def get(self, operand, kind: str, wider: bool = False) -> str:
        """An operand as an array of a PTX type, or as a scalar if it is immediate."""
        width, registers = int(kind[1:]) if kind != "pred" else 1, self.program.kernel.registers
        if operand in registers:
            if registers[operand] != width and not (wider and registers[operand] > width):
                raise Unknown(f"{operand} is no {kind}", self.ins.line, self.ins.text)
            value = self.read(operand)
            if registers[operand] != width:
                value = f"{value}.astype(np.uint{width})"
            return f"{value}.view('{VIEWS[kind]}')" if kind in VIEWS else value
        if SPECIAL.fullmatch(operand) and width == 32:
            return self.read(operand)
        if operand in self.program.kernel.shared:
            return f"m.symbols['{operand}']"
        return self.constant(immediate(operand, kind, self.ins))

    def put(self, operand: str, value: str, kind: str, scalar: bool = False) -> None:
        """Assign; a value of a narrower signed type is extended."""
        registers = self.program.kernel.registers
        width = registers.get(operand)
        own = int(kind[1:]) if kind != "pred" else 1
        if width is None or width < own:
            raise Unknown(f"{operand} cannot hold {kind}", self.ins.line, self.ins.text)
        if scalar:
            value = f"np.full(n, {value})"
        if width > own:
            value = f"{value}.astype(np.{'int' if kind[0] == 's' else 'uint'}{width})"
        if kind in VIEWS or width > own:
            value = f"{value}.view(np.uint{width})"
        if self.ins.guard is not None:
            guard = self.guard()
            value = f"np.where({guard}, {value}, {self.old(operand)})"
        self.assign(operand, value)

    def old(self, operand: str) -> str:
        """What a guarded instruction leaves where its guard is false."""
        return self.read(operand)

    def assign(self, operand: str, value: str) -> None:
        self.defined.add(operand)
        self.lines.append(f"{variable(operand)} = {value}")

    def address(self, operand: Address, bits: int) -> str:
        base = self.get(operand.base, f"u{bits}")
        if base.startswith("m.symbols"):
            base = f"np.full(n, {base}, np.uint{bits})"
        if operand.offset == 0:
            return base
        return f"({base} + {self.constant(STORED[bits](operand.offset % 2**bits))})"


def variable(name: str) -> str:
    return name.strip("%").replace(".", "_")


def immediate(text: str, kind: str, ins: Instruction):
    """A literal as a numpy scalar."""
    if kind == "pred" and re.fullmatch(r"-?\d+", text):
        return np.bool_(int(text) != 0)
    if kind == "pred":
        raise Unknown(f"unknown operand {text}", ins.line, ins.text)
    width = int(kind[1:])
    if found := re.fullmatch(r"0[fF]([0-9A-Fa-f]{8})", text):
        bits, own = int(found[1], 16), 32
    elif found := re.fullmatch(r"0[dD]([0-9A-Fa-f]{16})", text):
        bits, own = int(found[1], 16), 64
    elif re.fullmatch(r"-?(0[xX][0-9A-Fa-f]+|\d+)U?", text):
        bits, own = int(text.rstrip("U"), 0), width
    else:
        raise Unknown(f"unknown operand {text}", ins.line, ins.text)
    if own != width or (kind[0] == "f" and own == width and not re.match("0[fFdD]", text)):
        raise Unknown(f"{text} is no {kind}", ins.line, ins.text)
    value = STORED[width](bits % 2**width)
    return value.view(VIEWS[kind]) if kind in VIEWS else value


def names(operands):
    for x in operands:
        if isinstance(x, tuple):
            yield from names(x)
        else:
            yield x.base if isinstance(x, Address) else x


memory_ops.register(table.OPS)
