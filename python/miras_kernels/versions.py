"""The versions of other packages that the tests run with; none is imported."""

from __future__ import annotations

import re

#: transformers: the oldest and the newest version tested; every patch release of the newest is included
TRANSFORMERS = ("5.4", "5.24")


def minor(version: str) -> tuple[int, ...]:
    """``"5.24.0"`` to ``(5, 24)``."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def in_tested_range(version: str) -> bool:
    """Whether this version of transformers lies between those that the tests run with."""
    oldest, newest = map(minor, TRANSFORMERS)
    return oldest <= minor(version) <= newest
