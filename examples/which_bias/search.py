"""Streams of pairs: search each method's hyperparameters on some streams, report the best of them on others."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from . import methods, tasks
from .results import Cell

__all__ = ["Budget", "measure", "seeds", "tune"]

METRICS = ("error", "accuracy")
BOXES = (1 / 6, 1 / 12, 1 / 24)  # half-width of the box around the best points, on every axis, in each later round of the search


@dataclasses.dataclass(frozen=True)
class Budget:
    """How much every method gets, the same for all.

    Attributes:
        points: hyperparameters tried anywhere in their ranges; each later round tries half as many around the best ones.
        tuning, repeats: streams for the search, and other streams for the report.
    """

    points: int
    tuning: int
    repeats: int


def seeds(seed: int, budget: Budget) -> tuple[list[int], list[int]]:
    """Seeds of the streams for tuning, and of those for reporting; they are disjoint, and different for every ``seed``."""
    first = 2_000_000 * seed
    return list(range(first, first + budget.tuning)), list(range(first + 1_000_000, first + 1_000_000 + budget.repeats))


def measure(task: str, level: float, names: Sequence[str], budget: Budget, seed: int) -> list[Cell]:
    """Search and report methods at one level of a task."""
    tuning, reporting = ((tasks.draw(tasks.TABLE[task], level, some), some) for some in seeds(seed, budget))
    cells = []
    for method in map(methods.TABLE.__getitem__, names):
        best = tune(method, budget, *tuning)
        scores = methods.score(methods.read(method, best, *reporting), reporting[0])
        values = {metric: [round(x, 3) for x in scores[metric][i].tolist()] for i, metric in enumerate(METRICS)}
        chosen = {axis: float(f"{x[0]:.3g}") for axis, x in method.choices(best).items()}
        cells.append(Cell(task, level, method.name, **values, chosen=chosen))
    return cells


def tune(method: methods.Method, budget: Budget, stream: tasks.Stream, seeds: list[int]) -> Tensor:
    """The best point for the error and the best for the accuracy, ``[2, axes]``."""
    axes = len(method.axes)
    if axes == 0:
        return torch.zeros(2, 0)
    evenly = lambda count: torch.quasirandom.SobolEngine(axes, scramble=True, seed=count).draw(count)
    points = evenly(budget.points)
    scores = methods.score(methods.read(method, points, stream, seeds), stream)
    for box in BOXES:
        around = (2 * evenly(budget.points // 4) - 1) * box
        near = torch.cat([(point + around).clamp(0, 1) for point in points[_best(scores)]])
        more = methods.score(methods.read(method, near, stream, seeds), stream)
        points, scores = torch.cat([points, near]), {name: torch.cat([scores[name], more[name]]) for name in scores}
    return points[_best(scores)]


def _best(scores: dict[str, Tensor]) -> Tensor:
    """The points of the lowest mean error and of the highest mean accuracy (among equals the one of the lowest error)."""
    error, accuracy = (scores[name].double().mean(-1) for name in METRICS)
    most = torch.where(accuracy == accuracy.max(), error, torch.inf)
    return torch.stack([error.argmin(), most.argmin()])
