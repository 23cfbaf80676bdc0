"""Dynamic counts of a launch: instructions by class, barriers, tensor FLOP, wavefronts of shared memory, sectors of global memory."""

from __future__ import annotations

import collections
import re

import numpy as np

__all__ = ["Counts", "kind_of"]

#: the first pattern that an opcode begins with
KINDS = {
    "tensor": r"mma|wgmma\.mma",
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


class Counts:
    """Attributes:
    issued: instructions by kind, one for each warp. flop: of matrix instructions. wavefronts: of shared memory, 32 banks of 4 bytes
    each. sectors: of global memory, 32 bytes each.
    """

    def __init__(self, program):
        self.program = program
        self.blocks: dict[int, int] = collections.Counter()
        self.wavefronts = self.sectors = self.accesses = 0

    def block(self, block, threads: np.ndarray) -> None:
        self.blocks[block.first] += np.unique(threads // 32).size if threads.size % 32 else threads.size // 32

    def access(self, space: str, at: int, local: np.ndarray, offset: np.ndarray, size: int) -> None:
        """Warps take 128 bytes of shared memory at once: a quarter of a warp where each lane takes 16."""
        self.accesses += 1
        if space == "global":
            sectors = np.unique((local // 32 << 40) + (offset >> 5))
            self.sectors += sectors.size
            return
        lanes = 32 * 4 // max(size, 4)
        turn = local // lanes
        words = (offset[:, None] >> 2) + np.arange(max(size // 4, 1))
        keys = np.unique((turn[:, None] << 40) + words)
        _, per_bank = np.unique((keys >> 40 << 5) + (keys & 31), return_counts=True)
        banks = np.unique((keys >> 40 << 5) + (keys & 31)) >> 5
        starts = np.flatnonzero(np.r_[True, banks[1:] != banks[:-1]])
        self.wavefronts += int(np.maximum.reduceat(per_bank, starts).sum()) if per_bank.size else 0

    @property
    def issued(self) -> dict[str, int]:
        found: dict[str, int] = collections.Counter()
        for block in self.program.blocks:
            for x in self.program.kernel.instructions[block.first : block.last + 1]:
                found[kind_of(x.opcode)] += self.blocks[block.first]
        return dict(found)

    @property
    def flop(self) -> int:
        """A wgmma is issued by each of four warps."""
        total = 0
        for block in self.program.blocks:
            for x in self.program.kernel.instructions[block.first : block.last + 1]:
                if shape := re.search(r"mma.*\.m(\d+)n(\d+)k(\d+)", x.opcode):
                    each = 2 * int(shape[1]) * int(shape[2]) * int(shape[3])
                    total += each * self.blocks[block.first] // (4 if x.opcode.startswith("wgmma") else 1)
        return total

    def table(self) -> dict[str, int]:
        return self.issued | {"flop": self.flop, "wavefronts": self.wavefronts, "sectors": self.sectors}
