"""Matrix instructions: ldmatrix, stmatrix, mma.sync, wgmma.

Products of 16-bit numbers are exact; a product's sum over k and its addend are added in float64 and rounded once to float32. A GPU rounds
more often, in an order that is not documented.

A wgmma computes when it is issued, but its registers and operands are watched until it has been waited for.
"""

from __future__ import annotations

import re

import numpy as np

from .arithmetic import from_bf16, from_f16
from .parse import Unknown
from .shadow import EPOCH, IN_USE, THREAD

__all__ = ["Products", "load", "mma", "needs", "product_registers", "results", "store"]


def numbers(bits: np.ndarray, kind: str) -> np.ndarray:
    return (from_bf16 if kind == "bf16" else from_f16)(bits).astype(np.float64)


# ------------------------------------------------------------------------------------------------------- mma.sync and its loads


def rows_of(m, at: int, ix, address: np.ndarray, count: int):
    """Lane ``8 i + r`` has the address of row r of matrix i."""
    who = m.who(ix)
    m.warps(who.local, at)
    chosen = np.flatnonzero(np.arange(len(address)) % 32 < 8 * count)
    offset, good = m.shared.places(address[chosen], who[chosen], 16, at)
    return who[chosen], offset, good


def load(m, at: int, ix, address: np.ndarray, count: int, trans: bool) -> list[np.ndarray]:
    who, offset, good = rows_of(m, at, ix, address, count)
    m.shared.read(*m.shared.granules(offset[good], 16), who[good], at)
    if m.counts is not None:
        m.counts.access("shared", at, who.local, offset, 16)
    tiles = m.shared.views[2].reshape(-1, 8)[offset // 16].reshape(-1, count, 8, 8)
    if trans:
        tiles = np.ascontiguousarray(tiles.swapaxes(2, 3))
    words = tiles.view(np.uint32).reshape(-1, count, 32)
    return [np.ascontiguousarray(words[:, i]).ravel() for i in range(count)]


def store(m, at: int, ix, address: np.ndarray, values: list[np.ndarray], trans: bool) -> None:
    count = len(values)
    who, offset, good = rows_of(m, at, ix, address, count)
    words = np.stack([x.reshape(-1, 32) for x in values], 1).reshape(-1, count, 8, 4)
    if trans:
        words = np.ascontiguousarray(np.ascontiguousarray(words).view(np.uint16).swapaxes(2, 3)).view(np.uint32)
    if m.counts is not None:
        m.counts.access("shared", at, who.local, offset, 16)
    m.write(m.shared, who[good], offset[good], np.ascontiguousarray(words.reshape(-1, 4)[good]), at)


def fragment(registers: list[np.ndarray]) -> np.ndarray:
    """``[warps, registers, 8, 8]``: lane L holds row L / 4, columns 2 (L % 4) and the next, of every register."""
    words = np.stack([x.reshape(-1, 32) for x in registers], 1)
    return np.ascontiguousarray(words).view(np.uint16).reshape(-1, len(registers), 8, 8)


def rows_and_keys(registers: list[np.ndarray]) -> np.ndarray:
    """A: register j has rows 8 (j & 1) and keys 8 (j >> 1) on. ``[warps, 16, keys]``."""
    tiles = fragment(registers)
    tiles = tiles.reshape(len(tiles), -1, 2, 8, 8).transpose(0, 2, 3, 1, 4)
    return tiles.reshape(len(tiles), 16, -1)


def mma(m, at: int, ix, shape: str, kind: str, a: list, b: list, c: list) -> list[np.ndarray]:
    m.warps(m.who(ix).local, at)
    if (len(a), len(b)) != {"m16n8k16": (4, 2), "m16n8k8": (2, 1)}[shape]:
        raise RuntimeError(f"registers of {m.program.kernel.instructions[at]}")
    left = numbers(rows_and_keys(a), kind)
    right = numbers(fragment(b).transpose(0, 2, 1, 3).reshape(len(left), 8, -1), kind)
    total = np.matmul(left, right.swapaxes(1, 2))  # [warps, 16, 8]
    # register j: row 8 (j >> 1) + L / 4, column 2 (L % 4) + (j & 1)
    total = total.reshape(-1, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3).reshape(4, -1)
    return [(total[j] + c[j]).astype(np.float32) for j in range(4)]


# ------------------------------------------------------------------------------------------------------------------------ wgmma


def needs(x) -> list[str]:
    """Registers that an instruction of the wgmma family reads."""
    if not x.opcode.startswith("wgmma.mma_async"):
        return []
    d, a, b, scale, *_ = x.operands
    return [*(() if scale == "0" else d), *(a if isinstance(a, tuple) else (a,)), b, scale]


def results(x) -> tuple:
    return x.operands[0] if x.opcode.startswith("wgmma.mma_async") else ()


def product_registers(kernel) -> set[str]:
    """D and A of every wgmma."""
    found = set()
    for x in kernel.instructions:
        if x.opcode.startswith("wgmma.mma_async"):
            found |= set(x.operands[0]) | (set(x.operands[1]) if isinstance(x.operands[1], tuple) else set())
    return found


class Products:
    """What the wgmma of a batch have in flight.

    Attributes:
        flying: for each register of a product and each thread, 1 + the group that it belongs to; 0: none. dirty: 1 + the instruction
        that touched the register after the last wgmma.fence.
    """

    def __init__(self, m):
        self.m, total = m, m.local.size
        self.watched = m.program.product_registers
        self.flying: dict[str, np.ndarray] = {}
        self.reading: dict[str, np.ndarray] = {}
        self.dirty = {x: np.zeros(total, np.int32) for x in self.watched}
        self.fenced = np.zeros(total, bool)
        self.committed = np.zeros(total, np.int64)
        self.operands: list[tuple[np.ndarray, np.ndarray, np.ndarray, int]] = []  # leaders, groups, granules, instruction

    def touched(self, block, threads: np.ndarray) -> None:
        if not self.watched:
            return
        for name, flags in self.flying.items():
            if (name in block.needs or name in block.defines) and block.end[0] != "issue" and flags[threads].any():
                self.report("touches a register of a wgmma that was not waited for", block.touches.get(name, block.first), threads)
        for name, flags in self.reading.items():
            if name in block.defines and flags[threads].any():
                self.report("overwrites a register of a wgmma that was not waited for", block.touches.get(name, block.first), threads)
        for name, at in block.touches.items():
            self.dirty[name][threads] = at + 1

    def report(self, kind: str, at: int, threads: np.ndarray, other: int = -1) -> None:
        self.m.reports.add(kind, at, other, int(self.m.everyone.thread[threads[0]]))

    def fence(self, x, threads: np.ndarray, at: int) -> None:
        self.fenced[threads] = True
        for flags in self.dirty.values():
            flags[threads] = 0

    def commit(self, x, threads: np.ndarray, at: int) -> None:
        self.committed[threads] += 1

    def wait(self, x, threads: np.ndarray, at: int) -> None:
        pending = int(x.operands[0])
        for flags in (*self.flying.values(), *self.reading.values()):
            here = flags[threads]
            flags[threads] = np.where(here <= self.committed[threads] - pending, 0, here)
        left = []
        for leaders, groups, granules, issued in self.operands:
            done = np.isin(leaders, threads) & (groups < self.committed[leaders] - pending)
            self.m.shared.state[granules[done]] &= ~np.uint8(IN_USE)
            if not done.all():
                left.append((leaders[~done], groups[~done], granules[~done], issued))
        self.operands = left
        for _, _, granules, _ in left:
            self.m.shared.state[granules] |= IN_USE

    def end(self) -> None:
        if self.operands:
            leaders, _, _, issued = self.operands[0]
            self.report("the kernel ends before a wgmma is waited for", issued, leaders)

    def issue(self, x, threads: np.ndarray, at: int) -> None:
        m = self.m
        if threads.size % 128 or (threads.reshape(-1, 128)[:, [0, -1]] % 128 != [0, 127]).any():
            raise RuntimeError(f"not all threads of a warpgroup are at {x}")
        d, a, b, scale, *rest = x.operands
        n, kind = re.fullmatch(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16\.f32\.(bf16|f16)\.\2", x.opcode).groups()
        in_registers = isinstance(a, tuple)
        if rest[:2] != ["1", "1"] or len(rest) != (3 if in_registers else 4) or x.guard is not None or len(d) != int(n) // 2:
            raise Unknown("unknown form", x.line, x.text)
        self.check_registers(d, a if in_registers else (), threads, at)
        registers = m.registers
        if in_registers:
            left = rows_and_keys([registers[name][threads] for name in a])  # [4 groups, 16, 16]
            left = left.reshape(-1, 64, 16)
        else:
            left = self.operand(registers[a][threads], 64, rest[2] == "1", threads, at, x)
        right = self.operand(registers[b][threads], int(n), rest[-1] == "1", threads, at, x)
        total = np.matmul(numbers(left, kind), numbers(right, kind).swapaxes(1, 2))  # [groups, 64, n]
        # register j: row 16 warp + L / 4 + 8 ((j >> 1) & 1), column 8 (j >> 2) + 2 (L % 4) + (j & 1)
        total = total.reshape(-1, 4, 2, 8, int(n) // 8, 4, 2).transpose(4, 2, 6, 0, 1, 3, 5).reshape(len(d), -1)
        adds = registers[scale][threads] if scale in registers else np.full(threads.size, scale != "0")
        for j, name in enumerate(d):
            before = registers.get(name, m.undefined(name)).copy()
            sums = np.where(adds, before[threads].view(np.float32).astype(np.float64), 0.0) + total[j]
            before[threads] = sums.astype(np.float32).view(np.uint32)
            registers[name] = before
            self.flag(self.flying, name, threads)
        for name in a if in_registers else ():
            self.flag(self.reading, name, threads)

    def flag(self, flags: dict, name: str, threads: np.ndarray) -> None:
        flags.setdefault(name, np.zeros(self.m.local.size, np.int64))[threads] = self.committed[threads] + 1

    def check_registers(self, d, a, threads: np.ndarray, at: int) -> None:
        if not self.fenced[threads].all():
            self.report("a wgmma without a wgmma.fence before it", at, threads)
        for name in (*d, *a):
            if self.dirty[name][threads].any():
                self.report("a register was touched after the last wgmma.fence", at, threads, int(self.dirty[name][threads].max()) - 1)

    def operand(self, descriptors: np.ndarray, rows: int, transposed: bool, threads: np.ndarray, at: int, x) -> np.ndarray:
        """``[groups, rows, 16]`` 16-bit words of shared memory."""
        m = self.m
        each = descriptors.reshape(-1, 128)
        if (each != each[:, :1]).any():
            raise RuntimeError(f"the threads of a warpgroup have different descriptors at {x}")
        address = addresses(each[:, 0], rows, transposed, x)
        leaders = threads.reshape(-1, 128)[:, 0]
        who = m.everyone[leaders.repeat(rows * 16)]
        offset, good = m.shared.places(address.ravel(), who, 2, at)
        granules = offset[good] >> m.shared.shift
        granules, first = np.unique(granules, return_index=True)
        who = who[good][first]
        m.shared.read(granules, 1, who, at)
        self.check_fences(granules, who, at)
        m.shared.state[granules] |= IN_USE
        self.operands.append((who.local, self.committed[who.local], granules, at))
        return m.shared.views[2][offset // 2].reshape(-1, rows, 16)

    def check_fences(self, granules: np.ndarray, who, at: int) -> None:
        """The writer must have fenced after it wrote, or this warpgroup after a barrier that followed the write."""
        m = self.m
        writer = m.shared.writer[granules]
        thread = who.cta * m.size + np.maximum((writer & THREAD) - 1, 0) % m.size
        by_writer = m.fenced[thread] > m.shared.fences[granules]
        by_reader = m.fenced_at[who.local] > (writer >> EPOCH)
        bad = (writer != 0) & ~by_writer & ~by_reader
        if bad.any():
            i = int(bad.argmax())
            written = int(m.shared.written_at[granules[i]])
            kind = "a wgmma reads what no fence.proxy.async followed"
            m.reports.add(kind, at, written, int(who.thread[i]), int(writer[i] & THREAD) - 1)


def addresses(descriptors: np.ndarray, rows: int, transposed: bool, x) -> np.ndarray:
    """Where element ``[i, k]`` of each descriptor's operand lies, ``[groups, rows, 16]``; ``transposed``: i runs fastest in memory."""
    field = lambda low: ((descriptors >> np.uint64(low)) & np.uint64(0x3FFF)).astype(np.int64)[:, None, None] * 16
    start, leading, stride = field(0), field(16), field(32)
    swizzle = int(descriptors[0] >> np.uint64(62))
    if (descriptors >> np.uint64(62) != swizzle).any() or ((descriptors >> np.uint64(49)) & np.uint64(7)).any():
        raise Unknown("unknown descriptor", x.line, x.text)
    width, mask = {0: (16, 0), 1: (128, 7), 2: (64, 3), 3: (32, 1)}[swizzle]
    i, k = np.arange(rows)[None, :, None], np.arange(16)[None, None, :]
    if transposed:
        where = start + (2 * i // width) * leading + (k // 8) * stride + (k % 8) * width + 2 * i % width
    elif swizzle == 0:
        where = start + (i // 8) * stride + (i % 8) * 16 + (k // 8) * leading + 2 * (k % 8)
    else:
        where = start + (i // 8) * stride + (i % 8) * width + 2 * k
    return where ^ (((where >> 7) & mask) << 4)
