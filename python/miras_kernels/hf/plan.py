"""Which layers of a model have memories, and of what kind: the field ``miras`` of its configuration.

The field is JSON with a version number, as ``config.json`` needs it. It stores all values of a preset, not its name, so that a saved model
does not change when a preset does::

    {"version": 1, "memories": [{"layers": [0, 2], "mode": "replace", "init": "new", "num_heads": 4, "head_dim": 64, "conv_width": 4,
                                 "gate_rank": 16, "preset": {"bias": {"type": "Huber", "kind": "switch", "sharpness": 10.0}, ...}}]}

The ``backend`` is not part of the model and is not saved.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from ..layers import Preset
from ..tables import biases, retention

__all__ = ["INITS", "MODES", "VERSION", "Memories", "indices", "read", "write"]

VERSION = 1
INITS = ("new", "from_attention")
MODES = ("replace", "parallel")
_TABLES: dict[str, dict] = {"bias": biases.TABLE, "retention": retention.TABLE}


@dataclasses.dataclass(frozen=True)
class Memories:
    """Layers with the same kind of memory: the arguments of :func:`~miras_kernels.hf.replace_attention`, resolved."""

    layers: tuple[int, ...]
    preset: Preset
    num_heads: int
    head_dim: int | None
    conv_width: int = 4
    gate_rank: int = 16
    init: str = "new"
    mode: str = "replace"

    def to_json(self) -> dict:
        """A JSON object, see the module's docstring."""
        rule = {field.name: getattr(self.preset, field.name) for field in dataclasses.fields(Preset)}
        for name, table in _TABLES.items():
            rule[name] = _row_to_json(name, rule[name], table)
        return {**dataclasses.asdict(self), "layers": list(self.layers), "preset": rule}

    @staticmethod
    def from_json(data: dict) -> Memories:
        """The inverse of :meth:`to_json`."""
        rule = {name: _row_from_json(x, _TABLES[name]) if name in _TABLES else x for name, x in data["preset"].items()}
        return Memories(**{**data, "layers": tuple(data["layers"]), "preset": Preset(**rule)})


def read(config: object) -> list[Memories]:
    """The memories of a configuration; none if it has no field ``miras``.

    Raises:
        ValueError: the field has another version.
    """
    field = getattr(config, "miras", None)
    if field is None:
        return []
    if field.get("version") != VERSION:
        raise ValueError(
            f"config.miras: expected version {VERSION}, got {field.get('version')!r}; it was written by another version of miras_kernels"
        )
    return [Memories.from_json(data) for data in field["memories"]]


def write(memories: Iterable[Memories]) -> dict:
    """The field ``miras`` of a configuration."""
    return {"version": VERSION, "memories": [group.to_json() for group in memories]}


def indices(layers: object, count: int, taken: Iterable[int] = ()) -> tuple[int, ...]:
    """The argument ``layers`` as indices, for a model of ``count`` layers of which ``taken`` have memories already.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    if layers is None or (isinstance(layers, str) and layers == "all"):
        chosen = tuple(range(count))
    elif isinstance(layers, str) or not isinstance(layers, Iterable):
        raise TypeError(f"layers: expected None, 'all' or layer indices, got {layers!r}")
    else:
        chosen = tuple(layers)
    if not chosen:
        raise ValueError("layers: expected at least one layer index, got none")
    for i in chosen:
        if isinstance(i, bool) or not isinstance(i, int):
            raise TypeError(f"layers: expected integers, got {i!r}")
        if not 0 <= i < count:
            raise ValueError(f"layers: expected indices from 0 to {count - 1}, got {i}")
        if i in taken:
            raise ValueError(f"layers: layer {i} has been replaced already")
    if len(set(chosen)) != len(chosen):
        raise ValueError(f"layers: expected every index once, got {list(chosen)}")
    return chosen


def _row_to_json(name: str, row: Any, table: dict) -> dict:
    if type(row) not in map(type, table.values()):
        raise ValueError(f"preset: expected a {name} of miras_kernels itself, which a configuration can store; got {type(row).__name__}")
    return {"type": type(row).__name__, **dataclasses.asdict(row)}


def _row_from_json(data: dict, table: dict) -> Any:
    kinds = {type(row).__name__: type(row) for row in table.values()}
    data = dict(data)
    return kinds[data.pop("type")].from_fields(data)
