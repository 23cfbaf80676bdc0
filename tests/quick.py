"""Covering samples of test cases: every value of every property occurs, and every pair of values of some properties."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence

import pytest
import torch

from miras_kernels.testing import Case

#: the mark of the cases that only `make test-slow` runs; on a GPU all run
SLOW = () if torch.cuda.is_available() else pytest.mark.slow
#: the properties of which every pair of values occurs: they change the kernels' loops and masks together
PAIRED = ("retention", "momentum", "decay", "packed")


def properties(case: Case) -> dict[str, object]:
    """The properties of a case that matter to a kernel; the sizes are one property, since the registry varies them together."""
    names = ("memory", "retention", "momentum", "decay", "lr", "initial", "layout", "keys")
    bias = {"bias": case.bias, "delta": case.delta if case.bias.needs_delta else None}
    sizes = (case.key_dim, case.value_dim, case.hidden if case.memory == "mlp" else 0, case.chunk_size, case.tokens < case.chunk_size)
    return {name: getattr(case, name) for name in names} | bias | {"packed": case.lengths is not None, "sizes": sizes}


def covered(case: Case) -> set:
    """The values, and pairs of values, of a case; separate for each memory, since the memories share no kernel."""
    found = properties(case)
    pairs = itertools.combinations(PAIRED, 2)
    return {(case.memory, *x) for x in found.items()} | {(case.memory, a, found[a], b, found[b]) for a, b in pairs}


def sample(cases: Iterable[Case], start: int = 0) -> list[Case]:
    """A small set of cases (chosen greedily) that covers what all of them cover; another ``start`` gives another set."""
    left = list(cases)
    left = left[start % len(left) :] + left[: start % len(left)]
    missing, chosen = set().union(*map(covered, left)), []
    while missing:
        best = max(left, key=lambda case: len(covered(case) & missing))  # the first, if several are equal
        missing -= covered(best)
        chosen.append(best)
    return chosen


def slow(*values: object):
    """Parameters that only `make test-slow` runs."""
    return pytest.param(*values, marks=SLOW)


def or_slow(cases: Sequence[Case], quick: Iterable[Case]) -> list:
    """All cases as parameters; those not in ``quick`` are slow."""
    names = {case.name for case in quick}
    return [pytest.param(case, id=case.name, marks=() if case.name in names else SLOW) for case in cases]


def combinations(*factors: Sequence, quick: Callable[..., bool]) -> list:
    """All combinations of the factors as parameters; ``quick(*indices of the values)`` tells which are not slow."""
    found = []
    for places in itertools.product(*(range(len(factor)) for factor in factors)):
        values = [factor[place] for factor, place in zip(factors, places, strict=True)]
        found.append(tuple(values) if quick(*places) else slow(*values))
    return found
