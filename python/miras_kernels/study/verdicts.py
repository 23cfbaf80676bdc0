"""What is a difference: medians, spreads, and a verdict on two contestants that met the same streams."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence

__all__ = ["CONFIDENCE", "MATERIAL", "Verdict", "compare", "interval_rank", "spread"]

CONFIDENCE = 0.99  # of the interval of a median difference
MATERIAL = 0.01  # a smaller difference of relative errors or accuracies is a tie, however sure


def interval_rank(count: int) -> tuple[int, float]:
    """Which order statistics bound the median of ``count`` numbers, whatever their distribution.

    The interval from the r-th smallest to the r-th largest misses the median with probability ``2 P(Binomial(count, 1/2) < r)``. Returns
    the largest r for which that is at most ``1 - CONFIDENCE``, or 1 (all the numbers) where there are too few, and the interval's coverage.
    """
    missed = lambda r: 2 * sum(math.comb(count, i) for i in range(r)) / 2**count
    rank = max((r for r in range(1, count // 2 + 1) if missed(r) <= 1 - CONFIDENCE), default=1)
    return rank, 1 - missed(rank)


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) < 2:
        return (values[0],) * 3
    return tuple(statistics.quantiles(values, n=4, method="inclusive"))


@dataclasses.dataclass(frozen=True)
class Verdict:
    """How one contestant did against another: the median of paired differences, positive where the first is better, and its interval."""

    difference: float
    low: float
    high: float

    @property
    def outcome(self) -> str:
        """ "better", "worse", or "tie": the interval reaches zero, or the difference is too small to matter."""
        if abs(self.difference) < MATERIAL or self.low <= 0 <= self.high:
            return "tie"
        return "better" if self.difference > 0 else "worse"


def compare(first: Sequence[float], second: Sequence[float], *, less_is_better: bool) -> Verdict:
    """Compare repeats that are paired: the i-th of both met the same stream."""
    sign = -1 if less_is_better else 1
    differences = sorted(sign * (a - b) for a, b in zip(first, second, strict=True))
    rank, _ = interval_rank(len(differences))
    return Verdict(statistics.median(differences), differences[rank - 1], differences[-rank])
