"""Base of biases and retention gates: a name, a tag, parameters with ranges, and their encoding in an operator's schema."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

__all__ = ["Row", "decode", "number"]


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a table. Instances are immutable and hashable."""

    name: ClassVar[str] = ""
    #: its number in C++, CUDA and Triton
    tag: ClassVar[int] = -1
    #: the number of parameters that kernels take
    MAX_PARAMETERS: ClassVar[int] = 0
    #: tag and parameters in one string. Neither this nor `padded` is a field: they follow from the fields
    code: ClassVar[str]
    #: the parameters, padded with zeros to MAX_PARAMETERS, as kernels take them
    padded: ClassVar[tuple[float, ...]]

    def __post_init__(self) -> None:
        self._check()
        given, most = self.parameters, self.MAX_PARAMETERS
        if len(given) > most:
            raise ValueError(
                f"{type(self).__name__}: expected at most {most} parameters, as many as kernels take, got {len(given)}: {given}"
            )
        object.__setattr__(self, "padded", (*given, *(0.0,) * (most - len(given))))
        object.__setattr__(self, "code", " ".join([str(self.tag), *map(repr, given)]))

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> Any:
        """From the values of its fields by name, as JSON has them."""
        return cls(**fields)

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickle from the fields alone: earlier versions stored other attributes too."""
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, state[field.name])
        self.__post_init__()

    def _check(self) -> None:
        """Refuse parameters out of range; convert the others to float."""

    @property
    def parameters(self) -> tuple[float, ...]:
        """The numbers that a kernel needs besides the tag, in the order of the dataclass' fields."""
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))


def number(owner: object, name: str, value: object, low: float, *, open_: bool = True) -> float:
    """A finite float parameter of ``owner`` above ``low`` (or equal to it, if not ``open_``)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{type(owner).__name__}: {name} must be a number, got {type(value).__name__}")
    value = float(value) if abs(value) < 1e308 or value != value else math.inf  # a whole number may be too large for a float
    if not math.isfinite(value) or value < low or (open_ and value == low):
        raise ValueError(f"{type(owner).__name__}: {name} must be a finite number {'>' if open_ else '>='} {low:g}, got {value:g}")
    return value


def decode(code: str) -> tuple[int, list[float]]:
    """Tag and parameters from :attr:`Row.code`."""
    tag, *parameters = code.split()
    return int(tag), [float(x) for x in parameters]
