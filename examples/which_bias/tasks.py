"""Streams of key-value pairs, each with one difficulty that has a few levels: one table, and the place to add another.

A task draws, for a level and a seed, pairs in the order in which they are read, and the queries that follow. Keys are unit vectors of
``DIM`` channels; values have the norm ``sqrt(DIM)``, so that a channel has size 1. The same seed draws the same keys at every level.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor

__all__ = ["DIM", "TABLE", "Stream", "Task", "draw"]

DIM = 32
KEYS = 16  # in the tasks that do not vary it: half of what a DIM x DIM matrix can store exactly
READS = 6  # how often each pair is read in the tasks that repeat pairs
OUTLIER = 10.0  # norm of a wrong value over that of a right one


@dataclasses.dataclass(frozen=True)
class Stream:
    """Pairs, and the queries that follow them.

    Attributes:
        keys, values: ``[T, DIM]``, in the order of reading.
        queries, answers: ``[Q, DIM]``.
        candidates: ``[M, DIM]``, values of equal norm, among which the nearest to an answer is looked up.
        right: ``[Q]``, the index of the right candidate.
    """

    keys: Tensor
    values: Tensor
    queries: Tensor
    answers: Tensor
    candidates: Tensor
    right: Tensor


@dataclasses.dataclass(frozen=True)
class Task:
    """A row of the table.

    Attributes:
        title, about: heading and description on the page.
        levels: from easy to hard; ``unit`` is the format of one.
        draw: ``(level, generator) -> Stream``.
    """

    name: str
    title: str
    about: str
    levels: tuple[float, ...]
    unit: str
    draw: Callable[[float, Generator], Stream]

    def level(self, value: float) -> str:
        """A level, formatted."""
        return self.unit.format(value)


def draw(task: Task, level: float, seeds: Sequence[int]) -> Stream:
    """A task's streams for several seeds, stacked: ``[S, T, DIM]`` and so on."""
    streams = [task.draw(level, Generator().manual_seed(seed)) for seed in seeds]
    return Stream(*(torch.stack([getattr(s, field.name) for s in streams]) for field in dataclasses.fields(Stream)))


def _unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x, dim=-1)


def _keys(count: int, g: Generator) -> Tensor:
    return _unit(torch.randn(count, DIM, generator=g))


def _values(count: int, g: Generator) -> Tensor:
    return DIM**0.5 * _keys(count, g)


def _rounds(g: Generator) -> Tensor:
    """Indices of keys ``[READS * KEYS]``: ``READS`` rounds over all keys, each in a random order."""
    return torch.rand(READS, KEYS, generator=g).argsort(-1).flatten()


def _asked(keys: Tensor, values: Tensor, written_keys: Tensor, written_values: Tensor) -> Stream:
    """A stream in which every key is queried once, and the candidates are all values."""
    return Stream(written_keys, written_values, keys, values, values, torch.arange(len(keys)))


def _load(level: float, g: Generator) -> Stream:
    count = round(level * DIM)
    keys, values = _keys(count, g), _values(count, g)
    return _asked(keys, values, keys, values)


def _outliers(level: float, g: Generator) -> Stream:
    keys, values, order = _keys(KEYS, g), _values(KEYS, g), _rounds(g)
    wrong = torch.rand(len(order), 1, generator=g) < level
    return _asked(keys, values, keys[order], torch.where(wrong, OUTLIER * _values(len(order), g), values[order]))


def _value_noise(level: float, g: Generator) -> Stream:
    keys, values, order = _keys(KEYS, g), _values(KEYS, g), _rounds(g)
    return _asked(keys, values, keys[order], values[order] + level * torch.randn(len(order), DIM, generator=g))


def _key_noise(level: float, g: Generator) -> Stream:
    keys, values, order = _keys(KEYS, g), _values(KEYS, g), _rounds(g)
    seen = lambda x: _unit(x + level * DIM**-0.5 * torch.randn(x.shape, generator=g))
    stream = _asked(keys, values, seen(keys[order]), values[order])
    return dataclasses.replace(stream, queries=seen(keys))


def _collisions(level: float, g: Generator) -> Stream:
    own, values, order = _keys(KEYS, g), _values(KEYS, g), _rounds(g)
    shared = _keys(KEYS // 4, g).repeat_interleave(4, 0)
    keys = _unit(level**0.5 * shared + (1 - level) ** 0.5 * own)
    return _asked(keys, values, keys[order], values[order])


def _prominence(level: float, g: Generator) -> Stream:
    keys, values, wrong = _keys(KEYS, g), _values(KEYS, g), _values(KEYS, g)
    times = torch.ones(KEYS, dtype=torch.int64)
    times[: KEYS // 2] += int(level)
    order = torch.arange(KEYS).repeat_interleave(times)
    order = order[torch.rand(len(order), generator=g).argsort()]
    last = torch.zeros(KEYS, dtype=torch.int64).scatter_reduce(0, order, torch.arange(len(order)), "amax")
    newest = (torch.arange(len(order)) == last[order])[:, None]
    stream = _asked(keys, values, keys[order], torch.where(newest, values[order], wrong[order]))
    return dataclasses.replace(stream, candidates=torch.cat([values, wrong[: KEYS // 2]]))


def _drift(level: float, g: Generator) -> Stream:
    keys, values, order = _keys(KEYS, g), _values(KEYS, g), _rounds(g)
    written = []
    for _ in range(READS):
        values = DIM**0.5 * _unit((1 - level) ** 0.5 * values + level**0.5 * _values(KEYS, g))
        written.append(values)
    of_round = torch.stack(written).gather(1, order.view(READS, KEYS, 1).expand(-1, -1, DIM))
    return _asked(keys, values, keys[order], of_round.flatten(0, 1))


def _stream(level: float, g: Generator) -> Stream:
    count = int(level)
    keys, values = _keys(count, g), _values(count, g)
    recent = torch.arange(count - KEYS, count)
    return Stream(keys, values, keys[recent], values[recent], values, recent)


_EACH = f"{KEYS} pairs, each read {READS} times in random orders"

#: name -> task
TABLE: dict[str, Task] = {
    task.name: task
    for task in (
        Task("load", "Clean recall against load", f"pairs with random keys, each read once; load is pairs / {DIM}",
             (0.25, 0.5, 1.0, 2.0, 4.0), "load {:g}", _load),
        Task("outliers", "Grossly wrong values", f"{_EACH}; a share of the readings has a random value {OUTLIER:g} times as large",
             (0.05, 0.1, 0.2, 0.4), "{:.0%} wrong", _outliers),
        Task("value noise", "Noisy values", f"{_EACH}; Gaussian noise on every value, relative to the size of a channel",
             (1.0, 2.0, 4.0), "noise {:g}", _value_noise),
        Task("key noise", "Noisy keys", f"{_EACH}; Gaussian noise on every key and query, relative to the norm of a key",
             (0.5, 1.0, 2.0), "noise {:g}", _key_noise),
        Task("collisions", "Keys that collide", f"{_EACH}; keys come in groups of four with a cosine between any two of a group",
             (0.5, 0.8, 0.95), "cosine {:g}", _collisions),
        Task("prominence", "A wrong pair repeated", f"{KEYS} pairs; half of the keys come with one wrong value several times, then once "
             "with the right one; the wrong values are candidates too", (1, 4, 16), "{:g} to 1", _prominence),
        Task("drift", "A mapping that drifts", f"{_EACH}; a share of every value is new in each round; queries ask for the latest values",
             (0.1, 0.3, 1.0), "{:.0%} new", _drift),
        Task("stream", "A long stream", f"random pairs, each read once; queries ask for the last {KEYS}, the candidates are all values",
             (32, 64, 128, 256), "{:g} pairs", _stream),
    )
}  # fmt: skip
