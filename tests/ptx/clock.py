"""The time of a launch's first CTA if it had its multiprocessor alone: each warp issues in order, an instruction when its operands are
ready, and waits at a barrier for the last warp.

A model: the latencies are those of a chip in bench/gpu/chips.py; each warp has the tensor cores of a quarter of the multiprocessor; data
that the launch has not touched before come from DRAM, others from L2; the other CTAs of a cluster come to its barrier at the same time.
"""

from __future__ import annotations

import collections
import copy
import re
from collections.abc import Iterable

from .parse import Address, Instruction

__all__ = ["Clock", "kind_of", "product_flop"]

#: the first pattern that an opcode begins with
KINDS = {
    "tensor": r"mma|wgmma\.mma",
    "cluster": r"(ld|st)\.shared::cluster|barrier\.cluster",
    "barrier": r"bar\.|barrier|fence|wgmma|cp\.async\.(commit|wait)",
    "shared": r"(ld|st)\.shared|ldmatrix|stmatrix",
    "global": r"(ld|st)\.global|cp\.async",
    "shuffle": r"shfl|vote",
    "special": r"(ex2|lg2|rcp|rsqrt|sqrt|sin|cos|tanh|div)\.",
    "fma": r"(fma|mul|add|sub).*\.f32",
    "move": r"mov|ld\.param|cvta",
    "convert": r"cvt",
    "control": r"bra|ret|exit",
    "float": r".*\.f(16|32|64)|.*\.bf16",
    "integer": r".*",
}


def kind_of(opcode: str) -> str:
    return next(kind for kind, pattern in KINDS.items() if re.match(pattern, opcode))


def product_flop(opcode: str) -> int:
    """Of one mma, or of one wgmma, which four warps issue together."""
    shape = re.search(r"mma.*\.m(\d+)n(\d+)k(\d+)", opcode)
    return 2 * int(shape[1]) * int(shape[2]) * int(shape[3]) if shape else 0


def _names(operand) -> list[str]:
    if isinstance(operand, tuple):
        return [name for x in operand for name in _names(x)]
    return [operand.base] if isinstance(operand, Address) else [operand]


class _Step:
    """An instruction as the clock takes it."""

    def __init__(self, at: int, x: Instruction):
        self.at, self.kind, self.opcode = at, kind_of(x.opcode), x.opcode
        results = not x.opcode.startswith(("st", "red", "bar", "fence", "cp.", "bra", "ret", "exit", "wgmma"))
        self.results = _names(x.operands[0]) if results and x.operands else []
        rest = x.operands[1:] if results or self.opcode.startswith("wgmma.mma") else x.operands
        self.sources = [name for operand in rest for name in _names(operand) if name.startswith("%")]
        self.sources += [x.guard[0]] if x.guard else []
        self.flop = product_flop(x.opcode)
        self.pending = int(x.operands[0]) if re.match(r"(cp\.async|wgmma)\.wait_group", x.opcode) else 0


class Clock:
    """``missed``: loads that touched data for the first time, by instruction; set by the counts."""

    def __init__(self, program, chip):
        self.missed: dict[int, bool] = {}
        #: warps that executed the same blocks share one
        self.times = {tuple(range(-(-program.kernel.threads // 32))): _Warps(program, chip, self.missed)}

    def block(self, block, warps: Iterable[int]) -> None:
        """``warps``: those of the first CTA that execute it."""
        given = set(warps)
        for of in list(self.times):
            inside = tuple(x for x in of if x in given)
            if not inside:
                continue
            if inside != of:
                self.times[tuple(x for x in of if x not in given)] = self.times[of].copy()
                self.times[inside] = self.times.pop(of)
            if self.times[inside].waits:  # all warps have come to the barrier
                meeting = [x for x in self.times.values() if x.waits]
                last = max(x.now for x in meeting)
                for x in meeting:
                    x.now, x.waits = last, False
            self.times[inside].block(block)

    @property
    def now(self) -> float:
        """Clock cycles until the last warp ends."""
        return max(x.now for x in self.times.values())


class _Warps:
    """Warps of a CTA at the same place. ``waits``: at a barrier."""

    def __init__(self, program, chip, missed: dict[int, bool]):
        self.program, self.chip, self.now, self.waits, self.missed = program, chip, 0.0, False, missed
        #: cycles between two instructions of a warp, since four schedulers serve all warps of a CTA
        self.step = max(program.kernel.threads / 32 / chip.issue, 1.0)
        self.ready: dict[str, float] = collections.defaultdict(float)
        self.free = 0.0  # when the tensor cores are
        self.met = 0.0  # when another block knows that this one has arrived at the cluster's barrier
        self.open = {"cp.async": 0.0, "wgmma": 0.0}  # when the instructions that are not committed yet end
        self.groups: dict[str, list[float]] = {"cp.async": [], "wgmma": []}
        self.steps: dict[int, list[_Step]] = {}

    def copy(self) -> _Warps:
        other = copy.copy(self)
        other.ready, other.open = self.ready.copy(), dict(self.open)
        other.groups = {unit: list(x) for unit, x in self.groups.items()}
        return other

    def block(self, block) -> None:
        if block.first not in self.steps:
            instructions = self.program.kernel.instructions
            self.steps[block.first] = [_Step(at, instructions[at]) for at in range(block.first, block.last + 1)]
        for step in self.steps[block.first]:
            self.issue(step)

    def issue(self, step: _Step) -> None:
        self.now = max([self.now, *(self.ready[name] for name in step.sources)])
        end = self.now + self.latency(step)
        for name in step.results:
            self.ready[name] = end
        unit = "wgmma" if step.opcode.startswith("wgmma") else "cp.async"
        if "commit_group" in step.opcode:
            self.groups[unit].append(self.open[unit])
            self.open[unit] = 0.0
        elif "wait_group" in step.opcode:
            groups = self.groups[unit]
            done = len(groups) - step.pending
            self.now = max([self.now, *groups[: max(done, 0)]])
            self.groups[unit] = groups[max(done, 0) :]
        elif step.opcode.startswith(("wgmma.mma", "cp.async")):
            self.open[unit] = max(self.open[unit], end)
        elif step.opcode.startswith("barrier.cluster.arrive"):
            self.met = end
        elif step.opcode.startswith("barrier.cluster.wait"):
            self.now, self.waits = max(self.now, self.met), True
        elif step.opcode.startswith("bar") and not re.search(r"\.(warp|arrive)", step.opcode):
            self.now, self.waits = end, True
        self.now += self.step

    def latency(self, step: _Step) -> float:
        of = self.chip.latencies
        if step.flop:
            begin = max(self.now, self.free)
            self.free = begin + step.flop / self.chip.tensor * (1 if step.opcode.startswith("wgmma") else 4)
            return self.free - self.now + of["tensor"]
        if step.kind == "global":
            return of["dram"] if self.missed.get(step.at) else of["global"]
        return of[step.kind]
