"""PTX text to instructions. Only syntax: translate.py decides which opcodes are known."""

from __future__ import annotations

import dataclasses
import re

__all__ = ["Address", "Instruction", "Kernel", "Unknown", "parse"]

#: storage of a register, by the declared type's last two digits
WIDTHS = {"pred": 1, "b8": 8, "b16": 16, "b32": 32, "b64": 64}


SHARED = re.compile(r"\.shared\s+(?:\.align\s+\d+\s+)?\.b8\s+([\w$]+)\[(\d*)\]")


class Unknown(NotImplementedError):
    """PTX that the machine does not know."""

    def __init__(self, what: str, line: int, text: str):
        super().__init__(f"{what}, in line {line} of the PTX: {text.strip()}")


@dataclasses.dataclass(frozen=True)
class Address:
    """``[base + offset]``: a register, a parameter or a symbol."""

    base: str
    offset: int


@dataclasses.dataclass
class Instruction:
    """Operands are names, immediates (as text), an :class:`Address`, or a tuple of operands.

    Attributes:
        guard: the predicate register and whether it is negated, or None. line: of the PTX. source: ``file:line`` of the kernel.
    """

    opcode: str
    operands: tuple
    guard: tuple[str, bool] | None
    line: int
    text: str
    source: str

    def __str__(self) -> str:
        return f"{self.source or 'line ' + str(self.line)} `{re.sub(r'[{][^}]{60,}[}]', '{...}', self.text)}`"


@dataclasses.dataclass
class Kernel:
    """Attributes:
    parameters: (name, type). registers: width in bits by name. labels: index of an instruction by name. shared: bytes by symbol.
    """

    name: str
    parameters: list[tuple[str, str]]
    registers: dict[str, int]
    instructions: list[Instruction]
    labels: dict[str, int]
    shared: dict[str, int]
    threads: int


def parse(text: str, entry: str = r"[\w$]+") -> Kernel:
    """An entry of a module by its name, a regular expression; the first that fits."""
    header = re.search(rf"\.entry\s+({entry})\s*\((.*?)\)([^{{]*)\{{", text, re.S)
    if header is None:
        raise ValueError(f"there is no .entry {entry} in this PTX")
    name, parameters, directives = header.groups()
    known = [(m[2], m[1]) for m in re.finditer(r"\.param\s+\.(\w+)[^,]*?(\w+)(?:\[\d+\])?\s*(?:,|$)", parameters.strip())]
    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", directives)
    files = {m[1]: m[2].rsplit("/", 1)[-1] for m in re.finditer(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', text, re.M)}
    shared = {m[1]: int(m[2] or 0) for m in SHARED.finditer(text, 0, text.index(".entry"))}
    kernel = Kernel(name, known, {}, [], {}, shared, int(threads[1]) if threads else 0)
    _Body(kernel, files).read(text, header.end())
    return kernel


class _Body:
    def __init__(self, kernel: Kernel, files: dict[str, str]):
        self.kernel, self.files, self.scopes, self.count = kernel, files, [{}], 0
        self.source, self.inline, self.inlined = "", None, {}

    def read(self, text: str, start: int) -> None:
        line, at = text.count("\n", 0, start) + 1, start
        while True:
            blank = re.compile(r"[ \t\r\n]+|//[^\n]*").match(text, at)
            if blank:
                self.comment(blank[0])
                line, at = line + blank[0].count("\n"), blank.end()
            elif text[at] == "{":
                self.scopes.append({})
                self.count, at = self.count + 1, at + 1
            elif text[at] == "}":
                self.scopes.pop()
                at += 1
                if not self.scopes:
                    return
            elif label := re.compile(r"([$\w]+):(?!:)").match(text, at):
                self.kernel.labels[label[1]] = len(self.kernel.instructions)
                at = label.end()
            elif text.startswith((".loc", ".file"), at):
                end = text.index("\n", at)
                self.location(text[at:end])
                at = end
            else:
                end = text.index(";", at)
                self.statement(re.sub(r"//[^\n]*", " ", text[at:end]).strip(), line)
                line, at = line + text.count("\n", at, end), end + 1

    def comment(self, text: str) -> None:
        """Inside inline assembly Triton counts lines on: its first line is the right one."""
        if "begin inline asm" in text:
            self.inline = 0
        elif "end inline asm" in text:
            self.inline = None

    def location(self, text: str) -> None:
        if self.inline is None or self.inline == 0:
            found = re.match(r"\.loc\s+(\d+ \d+ \d+)(?:.*inlined_at (\d+ \d+ \d+))?", text)
            self.inlined[found[1]] = found[2]
            self.source = self.where(found[1])
        if self.inline is not None:
            self.inline += 1

    def where(self, place: str) -> str:
        """``file:line``, and in which lines of other files it is inlined; compilers write cycles."""
        names, last, seen = [], None, set()
        while place and place not in seen and len(names) < 5:
            seen.add(place)
            file, line, _ = place.split()
            if file != last:
                names.append(f"{self.files.get(file, file)}:{line}")
            last, place = file, self.inlined.get(place)
        return " in ".join(names)

    def statement(self, text: str, line: int) -> None:
        if text.startswith(".reg") or (text.startswith(".param") and len(self.scopes) > 1):
            self.declare(text, line)
            return
        if shared := SHARED.fullmatch(text):
            self.kernel.shared[shared[1]] = int(shared[2])
            return
        if text.startswith(".pragma"):
            return
        if text.startswith("."):
            raise Unknown("unknown directive", line, text)
        found = re.match(r"(?:@(!?)([%\w]+)\s+)?([a-z][\w.:]*)\s*(.*)", text, re.S)
        if found is None:
            raise Unknown("not an instruction", line, text)
        negated, guard, opcode, rest = found.groups()
        operands = tuple(self.operand(x, line, text) for x in _split(rest))
        shown = re.sub(r"\s+", " ", text)
        given = None if guard is None else (self.name(guard), negated == "!")
        self.kernel.instructions.append(Instruction(opcode, operands, given, line, shown, self.source))

    def declare(self, text: str, line: int) -> None:
        _, kind, names = text.split(None, 2)
        width = WIDTHS.get(re.sub(r"^[usf](?=\d)", "b", kind[1:]))
        if width is None:
            raise Unknown("unknown type of register", line, text)
        for name in names.split(","):
            several = re.fullmatch(r"(%?\w+)<(\d+)>", name.strip())
            for one in [f"{several[1]}{i}" for i in range(int(several[2]))] if several else [name.strip()]:
                unique = one if one.startswith("%") and len(self.scopes) == 1 else f"%{one.strip('%')}_in{self.count}"
                self.scopes[-1][one] = unique
                self.kernel.registers[unique] = width

    def name(self, text: str) -> str:
        for scope in reversed(self.scopes):
            if text in scope:
                return scope[text]
        return text

    def operand(self, text: str, line: int, whole: str):
        if text.startswith(("{", "(")):
            return tuple(self.operand(x, line, whole) for x in _split(text.strip("{}() \n")))
        if text.startswith("["):
            inside = re.fullmatch(r"\[\s*([%$\w.]+)\s*(?:([+-])\s*(-?\w+))?\s*\]", text)
            if inside is None:
                raise Unknown("unknown address", line, whole)
            offset = int(inside[3] or "0", 0)
            return Address(self.name(inside[1]), -offset if inside[2] == "-" else offset)
        if "|" in text:
            return tuple(self.name(x.strip()) for x in text.split("|"))
        if text.startswith("!"):
            raise Unknown("negated operand", line, whole)
        return self.name(text)


def _split(text: str) -> list[str]:
    """At commas outside of brackets."""
    found, depth, last = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "{[(") - (c in "}])")
        if c == "," and depth == 0:
            found.append(text[last:i].strip())
            last = i + 1
    rest = text[last:].strip()
    return [*found, rest] if rest else found
