"""Where expressions have kinks: errors near them are on either side, as rounding decides, and their results cannot be judged."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from ..expressions import Program, evaluate, values
from ..tables.bias import Bias
from ..tables.custom import CustomBias, CustomRetention
from ..tables.retention import Retention

__all__ = ["Probe", "ProbeGate", "has_kinks"]

_COMPARING = ("abs", "sign", "min", "max", "le", "lt")


def has_kinks(row: Bias | Retention) -> bool:
    """Whether a row is an expression whose value or slope jumps where two numbers that it compares are equal."""
    return any(_comparisons(program, row) for program in _programs(row))


def _programs(row: Bias | Retention) -> tuple[Program, ...]:
    if isinstance(row, CustomBias):
        return row.programs.psi, row.programs.derivatives
    return (row.programs.primal, row.programs.slope) if isinstance(row, CustomRetention) else ()


@functools.lru_cache(maxsize=256)
def _comparisons(program: Program, row: CustomBias | CustomRetention) -> tuple[tuple[int, int | None], ...]:
    """The operands of every comparison that decides by more than delta; of ``abs`` and ``sign`` alone (compared with 0)."""
    decides = program.depends(*(i for i, name in enumerate(program.inputs) if name != "delta"))
    found = []
    for operation, a, *rest in program.instructions:
        if operation in _COMPARING and any(decides[x] for x in (a, *rest)):
            if a == 0 and not rest and _smooth_at_zero(row):
                continue  # abs(e) as in e / (1 + abs(e))
            found.append((a, rest[0] if rest else None))
    return tuple(dict.fromkeys(found))


@functools.lru_cache(maxsize=256)
def _smooth_at_zero(row: CustomBias | CustomRetention) -> bool:
    """Whether nothing jumps where the first input is 0."""
    ones = torch.ones(4, 4, dtype=torch.float64)
    others = (ones * torch.tensor([0.1, 0.5, 1.0, 3.0]), ones * torch.tensor([[0.2], [0.5], [1.0], [2.0]]))
    sides = [
        [x for program in _programs(row) for x in evaluate(program, e * ones, *others[: len(program.inputs) - 1])] for e in (-1e-9, 1e-9)
    ]
    return all(torch.allclose(a, b, rtol=1e-6, atol=1e-6) for a, b in zip(*sides, strict=True))


def _distance(row: CustomBias | CustomRetention, *inputs: Tensor | None) -> float:
    """The smallest distance between two numbers that are compared, relative to their size if it is above 1.

    It is 0 for equal numbers, as those of padding, and then they are equal after the same roundings too: these do not count.
    """
    least = math.inf
    for program in _programs(row):
        pairs, found = _comparisons(program, row), values(program, *inputs)
        for a, b in ((found[i], found[j] if j is not None else torch.zeros((), dtype=found[i].dtype)) for i, j in pairs):
            distance = (a - b).abs() / torch.maximum(a.abs(), b.abs()).clamp_min(1)
            least = min(least, distance[distance > 0].amin().item() if (distance > 0).any() else math.inf)
    return least


class Probe(Bias):
    """A :class:`CustomBias` that records how close errors come to its kinks."""

    def __init__(self, bias: CustomBias) -> None:
        object.__setattr__(self, "bias", bias)
        object.__setattr__(self, "distances", [])

    def psi(self, pred, v, delta):
        e = pred - v
        norm2 = (e * e).sum(-1, keepdim=True)
        self.distances.append(_distance(self.bias, e, norm2, delta))  # type: ignore[attr-defined]
        return self.bias.psi(pred, v, delta)  # type: ignore[attr-defined]


class ProbeGate(Retention):
    """The same for the entries of the dual and a :class:`CustomRetention`."""

    def __init__(self, gate: CustomRetention) -> None:
        object.__setattr__(self, "gate", gate)
        object.__setattr__(self, "distances", [])

    def phi(self, dual):
        self.distances.append(_distance(self.gate, dual))  # type: ignore[attr-defined]
        return self.gate.phi(dual)  # type: ignore[attr-defined]
