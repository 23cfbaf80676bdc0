"""The measured results: stored as JSON (``docs/which-bias.json``), and the comparisons that the page and the plots show."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import statistics
from collections.abc import Iterable, Sequence

from . import methods, tasks

__all__ = ["CONFIDENCE", "MATERIAL", "Cell", "Results", "Run", "compare", "interval_rank"]

FORMAT = 1
THOUSAND = 1000  # errors and accuracies are stored in thousandths
CONFIDENCE = 0.99  # of the interval of a median difference
MATERIAL = 0.01  # a smaller difference of relative errors or accuracies counts as a tie


@dataclasses.dataclass(frozen=True)
class Cell:
    """One method at one level of a task.

    Attributes:
        error, accuracy: of every reported stream, each with the hyperparameters that were best for it.
        chosen: the hyperparameters that were best for the error, by axis.
    """

    task: str
    level: float
    method: str
    error: list[float]
    accuracy: list[float]
    chosen: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained model.

    Attributes:
        rate: the learning rate that was best on the tuning seed.
        accuracy: by the number of pairs in the sequence.
    """

    memory: str
    seed: int
    rate: float
    accuracy: dict[int, float]


def interval_rank(count: int) -> tuple[int, float]:
    """Which order statistics bound the median of ``count`` numbers, whatever their distribution.

    The interval from the r-th smallest to the r-th largest misses the median with probability ``2 P(Binomial(count, 1/2) < r)``. Returns
    the largest r for which that is at most ``1 - CONFIDENCE`` (1 if there are too few numbers for any), and the interval's coverage.
    """
    missed = lambda r: 2 * sum(math.comb(count, i) for i in range(r)) / 2**count
    rank = max((r for r in range(1, count // 2 + 1) if missed(r) <= 1 - CONFIDENCE), default=1)
    return rank, 1 - missed(rank)


def compare(first: Sequence[float], second: Sequence[float], *, less_is_better: bool) -> str:
    """ "better", "worse" or "tie": ``first`` against ``second``, whose i-th values come from the same stream or seed.

    It is a tie if the interval of the median of the paired differences contains zero, or if that median is below :data:`MATERIAL`.
    """
    sign = -1 if less_is_better else 1
    differences = sorted(sign * (a - b) for a, b in zip(first, second, strict=True))
    rank, _ = interval_rank(len(differences))
    median = statistics.median(differences)
    if abs(median) < MATERIAL or differences[rank - 1] <= 0 <= differences[-rank]:
        return "tie"
    return "better" if median > 0 else "worse"


@dataclasses.dataclass(frozen=True)
class Results:
    """What was measured.

    Attributes:
        about: seed, budgets, versions and the time taken, by name.
        cells: of the tasks on streams of pairs.
        runs: trained models.
    """

    about: dict
    cells: list[Cell]
    runs: list[Run]

    def dump(self) -> str:
        """JSON: a line for each method at each level of a task, and for each trained model."""
        line, rows = functools.partial(json.dumps, separators=(",", ":")), ",\n".join
        whole = lambda values: [round(THOUSAND * x) for x in values]
        places: dict[tuple, list[str]] = {}
        for c in self.cells:
            row = f"{line(c.method)}:{line([whole(c.error), whole(c.accuracy), c.chosen])}"
            places.setdefault((c.task, c.level), []).append(row)
        cells = [f'{{"task":{line(t)},"level":{line(x)},"rows":{{\n{rows(some)}\n}}}}' for (t, x), some in places.items()]
        runs = [line(dataclasses.asdict(r) | {"accuracy": {n: round(THOUSAND * x) for n, x in r.accuracy.items()}}) for r in self.runs]
        lists = [f'"{name}":[\n{rows(some)}\n]' for name, some in (("recall", cells), ("trained", runs))]
        return rows([f'{{"format":{FORMAT}', f'"about":{json.dumps(self.about)}', *lists]) + "}\n"

    @classmethod
    def load(cls, text: str) -> Results:
        """The inverse of :meth:`dump`.

        Raises:
            ValueError: the text does not have this format.
        """
        found = json.loads(text)
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise ValueError(f"expected the JSON of this study, format {FORMAT}, got {text[:40]!r}")
        parts = lambda values: [x / THOUSAND for x in values]
        cells = [
            Cell(place["task"], place["level"], name, parts(error), parts(accuracy), chosen)
            for place in found["recall"]
            for name, (error, accuracy, chosen) in place["rows"].items()
        ]
        runs = [Run(**r | {"accuracy": {int(n): x / THOUSAND for n, x in r["accuracy"].items()}}) for r in found["trained"]]
        return cls(found["about"], cells, runs)

    # ---------------------------------------------------------------------------------------------- streams of pairs

    @functools.cached_property
    def _values(self) -> dict[tuple, list[float]]:
        return {(c.task, c.level, c.method, metric): getattr(c, metric) for c in self.cells for metric in ("error", "accuracy")}

    @functools.cached_property
    def levels(self) -> dict[str, list[float]]:
        """Measured levels of every measured task, in the order of the table."""
        found = {name: sorted({c.level for c in self.cells if c.task == name}) for name in tasks.TABLE}
        return {name: levels for name, levels in found.items() if levels}

    @functools.cached_property
    def names(self) -> list[str]:
        """Measured methods, in the order of the table."""
        measured = {c.method for c in self.cells}
        return [name for name in methods.TABLE if name in measured]

    @functools.cached_property
    def memories(self) -> list[str]:
        """The methods whose state has a fixed size."""
        return [name for name in self.names if methods.TABLE[name].kind != "baseline"]

    def values(self, task: str, level: float, name: str, metric: str) -> list[float]:
        """One value for each reported stream."""
        return self._values[task, level, name, metric]

    def median(self, task: str, level: float, name: str, metric: str) -> float:
        return statistics.median(self.values(task, level, name, metric))

    def compare(self, task: str, level: float, first: str, second: str, metric: str) -> str:
        pair = (self.values(task, level, name, metric) for name in (first, second))
        return compare(*pair, less_is_better=metric == "error")

    def best(self, task: str, level: float, metric: str, names: Iterable[str]) -> str:
        """The one of the best median."""
        sign = 1 if metric == "error" else -1
        return min(names, key=lambda name: sign * self.median(task, level, name, metric))

    def leaders(self, task: str, level: float, metric: str) -> list[str]:
        """The memory of the best median, and those that tie with it."""
        best = self.best(task, level, metric, self.memories)
        return [name for name in self.memories if name == best or self.compare(task, level, name, best, metric) == "tie"]

    # ------------------------------------------------------------------------------------------------ trained models

    @functools.cached_property
    def trained(self) -> list[str]:
        """Trained memories, in the order in which they ran."""
        return list(dict.fromkeys(run.memory for run in self.runs))

    def trained_values(self, memory: str, pairs: int) -> list[float]:
        """Accuracies of a trained memory, one for each seed."""
        return [run.accuracy[pairs] for run in self.runs if run.memory == memory]

    def trained_leaders(self, pairs: int) -> list[str]:
        """The trained memory of the best median accuracy, and those that tie with it."""
        values = {name: self.trained_values(name, pairs) for name in self.trained}
        best = max(values, key=lambda name: statistics.median(values[name]))
        return [name for name in values if name == best or compare(values[name], values[best], less_is_better=False) == "tie"]
