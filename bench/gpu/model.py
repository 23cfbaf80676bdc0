"""A modelled time of each launch, from its counts and a chip's published constants (chips.py). It is a model, not a measurement.

A launch takes as long as its slowest resource: the rates of a multiprocessor times the programs of the one with the most, DRAM and L2 for
all of them together, or the latency of one program times the rounds in which they run. What overlaps badly is not modelled.
"""

from __future__ import annotations

import dataclasses
import math

from .chips import Chip

__all__ = ["FIELDS", "Row", "resident", "time"]

#: what is counted of a launch; of all programs together, but for `latency`
FIELDS = ("programs", "issued", "special", "flop", "wavefronts", "sectors", "bytes", "barriers", "latency")


@dataclasses.dataclass(frozen=True)
class Row:
    """A launch. Attributes by `FIELDS`: counts at two numbers of tokens, between and beyond which they are linear.

    Attributes:
        heads: of which these counts are. threads, registers (per thread), shared (bytes): of a program.
    """

    kernel: str
    heads: int
    threads: int
    registers: int
    shared: int
    counts: dict[str, tuple[float, float]]

    def at(self, field: str, between: tuple[int, int], tokens: int) -> float:
        low, high = self.counts[field]
        return low + (high - low) * (tokens - between[0]) / (between[1] - between[0])


def resident(row: Row, chip: Chip) -> int:
    """Programs of a launch that fit on a multiprocessor together. Registers are given to warps in units of 256."""
    warps = -(-row.threads // 32)
    registers = chip.registers // (warps * -(-row.registers * 32 // 256) * 256)
    shared = (chip.shared_bytes + 1024) // (row.shared + 1024)
    return min(registers, shared, chip.threads // row.threads, chip.programs)


def time(row: Row, chip: Chip, between: tuple[int, int], batch: int, tokens: int, heads: int) -> dict[str, float]:
    """Seconds that each resource would take alone, by its name."""
    times = batch * heads / row.heads
    of = {field: row.at(field, between, tokens) * times for field in FIELDS if field != "latency"}
    each = -(-math.ceil(of["programs"]) // chip.multiprocessors)  # programs of the busiest multiprocessor
    busiest = each / of["programs"] / chip.clock
    rounds = -(-each // resident(row, chip))
    return {
        "issue": of["issued"] / chip.issue * busiest,
        "special": of["special"] / chip.special * busiest,
        "tensor": of["flop"] / chip.tensor * busiest,
        "shared": of["wavefronts"] / chip.shared * busiest,
        "L2": of["sectors"] * 32 / (chip.l2 * chip.multiprocessors * chip.clock),
        "DRAM": of["bytes"] / chip.dram,
        "latency": rounds * row.at("latency", between, tokens) / chip.clock,
    }
