"""The recall tasks: search each contestant's choices on some streams, report them on others."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from . import contestants, tasks

__all__ = ["Budget", "Cell", "measure", "seeds"]

METRICS = ("error", "accuracy")
BOXES = (1 / 6, 1 / 12, 1 / 24)  # how far around the best points so far each later round of the search looks, on every axis


@dataclasses.dataclass(frozen=True)
class Budget:
    """How much every contestant gets, the same for all.

    Attributes:
        points: choices that are tried anywhere; each later round tries a half as many around the best ones.
        tuning, repeats: streams that choices are tried on, and other ones that the best are reported on.
    """

    points: int
    tuning: int
    repeats: int


@dataclasses.dataclass(frozen=True)
class Cell:
    """One contestant at one level of a task.

    Attributes:
        error, accuracy: of every repeat; each with the choices that were best for it.
        chosen: those for the error, by axis.
    """

    task: str
    level: float
    contestant: str
    error: list[float]
    accuracy: list[float]
    chosen: dict[str, float]


def seeds(seed: int, budget: Budget) -> tuple[list[int], list[int]]:
    """Seeds of the streams for tuning, and of those for reporting: none is in both, whatever the study's seed."""
    first = 2_000_000 * seed
    return list(range(first, first + budget.tuning)), list(range(first + 1_000_000, first + 1_000_000 + budget.repeats))


def measure(task: str, level: float, names: Sequence[str], budget: Budget, seed: int) -> list[Cell]:
    """Search and report contestants at a level of a task."""
    row, (tuning, reporting) = tasks.TABLE[task], seeds(seed, budget)
    streams = [(tasks.draw(row, level, some), some) for some in (tuning, reporting)]
    return [_measure(task, level, contestants.TABLE[name], budget, *streams) for name in names]


def _measure(task: str, level: float, contestant: contestants.Contestant, budget: Budget, tuning: tuple, reporting: tuple) -> Cell:
    best = _search(contestant, budget, *tuning)
    scores = contestants.score(contestants.read(contestant, best, *reporting), reporting[0])
    chosen = {axis: float(f"{x[0]:.3g}") for axis, x in contestant.choices(best).items()}
    values = {metric: [round(x, 3) for x in scores[metric][i].tolist()] for i, metric in enumerate(METRICS)}
    return Cell(task, level, contestant.name, **values, chosen=chosen)


def _search(contestant: contestants.Contestant, budget: Budget, stream: tasks.Stream, seeds: list[int]) -> Tensor:
    """The best point for the error and the best for the accuracy, ``[2, axes]``."""
    axes = len(contestant.axes)
    if axes == 0:
        return torch.zeros(2, 0)
    evenly = lambda count: torch.quasirandom.SobolEngine(axes, scramble=True, seed=count).draw(count)
    points = evenly(budget.points)
    scores = contestants.score(contestants.read(contestant, points, stream, seeds), stream)
    for box in BOXES:
        around = (2 * evenly(budget.points // 4) - 1) * box
        near = torch.cat([(point + around).clamp(0, 1) for point in points[_best(scores)]])
        more = contestants.score(contestants.read(contestant, near, stream, seeds), stream)
        points, scores = torch.cat([points, near]), {name: torch.cat([scores[name], more[name]]) for name in scores}
    return points[_best(scores)]


def _best(scores: dict[str, Tensor]) -> Tensor:
    """Which point has the least mean error, and which the greatest mean accuracy (of several: the least error among them)."""
    error, accuracy = (scores[name].double().mean(-1) for name in METRICS)
    most = torch.where(accuracy == accuracy.max(), error, torch.inf)
    return torch.stack([error.argmin(), most.argmin()])
