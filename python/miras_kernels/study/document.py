"""The results of a study: what the page and the plots are functions of, as JSON that stays small and compares line by line."""

from __future__ import annotations

import dataclasses
import functools
import json
import statistics
from collections.abc import Iterable

from . import contestants, tasks
from .mqar import Run
from .recall import Cell
from .verdicts import Verdict, compare

__all__ = ["Document"]

FORMAT = 1
THOUSAND = 1000  # errors and accuracies are stored in thousandths


_rows = ",\n".join


@dataclasses.dataclass(frozen=True)
class Document:
    """What was measured.

    Attributes:
        about: seed, budgets, versions and the time taken, by name.
        cells: of the recall tasks.
        runs: trained models.
    """

    about: dict
    cells: list[Cell]
    runs: list[Run]

    def dump(self) -> str:
        """JSON: a line for each contestant at each level of a task, and for each trained model."""
        line, whole = functools.partial(json.dumps, separators=(",", ":")), lambda values: [round(THOUSAND * x) for x in values]
        places: dict[tuple, list[str]] = {}
        for c in self.cells:
            row = f"{line(c.contestant)}:{line([whole(c.error), whole(c.accuracy), c.chosen])}"
            places.setdefault((c.task, c.level), []).append(row)
        cells = [f'{{"task":{line(t)},"level":{line(x)},"rows":{{\n{_rows(rows)}\n}}}}' for (t, x), rows in places.items()]
        runs = [line(dataclasses.asdict(r) | {"accuracy": {n: round(THOUSAND * x) for n, x in r.accuracy.items()}}) for r in self.runs]
        lists = [f'"{name}":[\n{_rows(rows)}\n]' for name, rows in (("recall", cells), ("trained", runs))]
        return _rows([f'{{"format":{FORMAT}', f'"about":{json.dumps(self.about)}', *lists]) + "}\n"

    @classmethod
    def load(cls, text: str) -> Document:
        """Undo :meth:`dump`.

        Raises:
            ValueError: if the text is none of this format.
        """
        found = json.loads(text)
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise ValueError(f"expected the JSON of a study, format {FORMAT}, got {text[:40]!r}")
        parts = lambda values: [x / THOUSAND for x in values]
        cells = [
            Cell(place["task"], place["level"], name, parts(error), parts(accuracy), chosen)
            for place in found["recall"]
            for name, (error, accuracy, chosen) in place["rows"].items()
        ]
        runs = [Run(**r | {"accuracy": {int(n): x / THOUSAND for n, x in r["accuracy"].items()}}) for r in found["trained"]]
        return cls(found["about"], cells, runs)

    # ---------------------------------------------------------------------------------------------- the recall tasks

    @functools.cached_property
    def _values(self) -> dict[tuple, list[float]]:
        return {(c.task, c.level, c.contestant, metric): getattr(c, metric) for c in self.cells for metric in ("error", "accuracy")}

    @functools.cached_property
    def levels(self) -> dict[str, list[float]]:
        """Measured levels of every measured task, in the order of the table."""
        found = {name: sorted({c.level for c in self.cells if c.task == name}) for name in tasks.TABLE}
        return {name: levels for name, levels in found.items() if levels}

    @functools.cached_property
    def names(self) -> list[str]:
        """Contestants, in the order of the table."""
        measured = {c.contestant for c in self.cells}
        return [name for name in contestants.TABLE if name in measured]

    @functools.cached_property
    def memories(self) -> list[str]:
        """The contestants whose state does not grow."""
        return [name for name in self.names if contestants.TABLE[name].kind != "reader"]

    def values(self, task: str, level: float, name: str, metric: str) -> list[float]:
        """A contestant's repeats."""
        return self._values[task, level, name, metric]

    def median(self, task: str, level: float, name: str, metric: str) -> float:
        return statistics.median(self.values(task, level, name, metric))

    def compare(self, task: str, level: float, first: str, second: str, metric: str) -> Verdict:
        """How the first contestant did against the second."""
        pair = (self.values(task, level, name, metric) for name in (first, second))
        return compare(*pair, less_is_better=metric == "error")

    def ranked(self, task: str, level: float, metric: str, names: Iterable[str]) -> list[str]:
        """Contestants by their medians, the best one first."""
        sign = 1 if metric == "error" else -1
        return sorted(names, key=lambda name: sign * self.median(task, level, name, metric))

    def leaders(self, task: str, level: float, metric: str) -> list[str]:
        """The best memory by its median, and those that are level with it, in the order of their medians."""
        best, *others = self.ranked(task, level, metric, self.memories)
        return [best, *(name for name in others if self.compare(task, level, name, best, metric).outcome == "tie")]

    # --------------------------------------------------------------------------------------------- the trained models

    @functools.cached_property
    def trained(self) -> list[str]:
        """Trained memories, in the order in which they ran."""
        return list(dict.fromkeys(run.memory for run in self.runs))

    def trained_values(self, memory: str, pairs: int) -> list[float]:
        """Accuracies of a trained memory by seed."""
        return [run.accuracy[pairs] for run in self.runs if run.memory == memory]

    def trained_compare(self, first: str, second: str, pairs: int) -> Verdict:
        return compare(self.trained_values(first, pairs), self.trained_values(second, pairs), less_is_better=False)

    def trained_leaders(self, pairs: int) -> list[str]:
        """The trained memory of the greatest median accuracy, and those that are level with it."""
        best, *others = sorted(self.trained, key=lambda name: -statistics.median(self.trained_values(name, pairs)))
        return [best, *(name for name in others if self.trained_compare(name, best, pairs).outcome == "tie")]
