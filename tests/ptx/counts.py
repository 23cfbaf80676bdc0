"""What a launch executes: instructions by class, barriers, tensor FLOP, wavefronts of shared memory, sectors and bytes of global memory."""

from __future__ import annotations

import collections
import re

import numpy as np

from .clock import Clock, kind_of, product_flop

__all__ = ["Counts"]


class Counts:
    """Attributes:
    issued: instructions by kind, one for each warp. barriers: bar.sync of a CTA's first warp, over all CTAs. flop: of matrix instructions.
    wavefronts: of shared memory, 32 banks of 4 bytes each. sectors: 32 bytes of global memory that a warp's access touches, from L2.
    bytes: of global memory that were read and that were written, each once: from and to DRAM, if L2 keeps them for the launch.
    clock: with a chip, the modelled time of the first CTA.
    """

    def __init__(self, program, memory, chip=None):
        self.program, self.memory = program, memory
        self.blocks: dict[int, int] = collections.Counter()
        self.wavefronts = self.sectors = 0
        self.touched = {kind: np.zeros(memory.state.size, bool) for kind in ("read", "written")}
        self.clock = None if chip is None else Clock(program, chip)

    def block(self, block, threads: np.ndarray, first: bool) -> None:
        """``threads``: of the batch. ``first``: whether it has the launch's first CTA."""
        self.blocks[block.first] += np.unique(threads // 32).size if threads.size % 32 else threads.size // 32
        if self.clock is not None and first:
            self.clock.block(block, np.unique(threads[threads < self.program.kernel.threads] // 32).tolist())

    def access(self, space: str, at: int, local: np.ndarray, offset: np.ndarray, size: int, writes: bool = False) -> None:
        """Warps take 128 bytes of shared memory at once: a quarter of a warp where each lane takes 16."""
        if space == "global":
            self.sectors += np.unique((local // 32 << 40) + (offset >> 5)).size
            granules, _ = self.memory.granules(offset, size)
            if self.clock is not None and not writes:
                self.clock.missed[at] = not (self.touched["read"][granules] | self.touched["written"][granules]).all()
            self.touched["written" if writes else "read"][granules] = True
            return
        lanes = 32 * 4 // max(size, 4)
        turn = local // lanes
        words = (offset[:, None] >> 2) + np.arange(max(size // 4, 1))
        keys = np.unique((turn[:, None] << 40) + words)
        _, per_bank = np.unique((keys >> 40 << 5) + (keys & 31), return_counts=True)
        banks = np.unique((keys >> 40 << 5) + (keys & 31)) >> 5
        starts = np.flatnonzero(np.r_[True, banks[1:] != banks[:-1]])
        self.wavefronts += int(np.maximum.reduceat(per_bank, starts).sum()) if per_bank.size else 0

    def executed(self):
        """Every instruction, and how many warps executed it."""
        for block in self.program.blocks:
            for x in self.program.kernel.instructions[block.first : block.last + 1]:
                yield x, self.blocks[block.first]

    @property
    def issued(self) -> dict[str, int]:
        found: dict[str, int] = collections.Counter()
        for x, count in self.executed():
            found[kind_of(x.opcode)] += count
        return dict(found)

    @property
    def barriers(self) -> int:
        warps = -(-self.program.kernel.threads // 32)
        return sum(count for x, count in self.executed() if x.opcode.startswith("bar") and "arrive" not in x.opcode) // warps

    @property
    def flop(self) -> int:
        return sum(product_flop(x.opcode) * count // (4 if x.opcode.startswith("wgmma") else 1) for x, count in self.executed())

    @property
    def operands(self) -> int:
        """Wavefronts of the operands that wgmma reads from shared memory: B, and A unless it is in registers."""
        total = 0
        for x, count in self.executed():
            if shape := re.search(r"wgmma\.mma.*\.m(\d+)n(\d+)k(\d+)", x.opcode):
                m, n, k = map(int, shape.groups())
                total += (n + (0 if isinstance(x.operands[1], tuple) else m)) * k * 2 // 128 * count // 4
        return total

    @property
    def bytes(self) -> int:
        return sum(int(x.sum()) for x in self.touched.values()) << self.memory.shift

    def table(self) -> dict[str, int]:
        return self.issued | {"flop": self.flop, "wavefronts": self.wavefronts, "sectors": self.sectors}
