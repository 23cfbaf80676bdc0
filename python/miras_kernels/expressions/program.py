"""A straight-line program: what every backend computes for a user's expression."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["OPERATIONS", "Program", "evaluate", "values"]

#: Every operation and its number of operands; a backend knows these and no other. Comparisons give 1 or 0; ``where`` chooses its second
#: operand where the first is not 0, whatever the other one is (NaN, infinity). ``power(x, c)`` has x >= 0, a constant c > 0, and is 0 at
#: x = 0. A NaN operand gives NaN, also for ``min`` and ``max``.
OPERATIONS = {
    "add": 2,
    "sub": 2,
    "mul": 2,
    "div": 2,
    "neg": 1,
    "abs": 1,
    "sign": 1,
    "sqrt": 1,
    "exp": 1,
    "log": 1,
    "tanh": 1,
    "min": 2,
    "max": 2,
    "power": 2,
    "le": 2,
    "lt": 2,
    "where": 3,
}


class Program(NamedTuple):
    """Values are numbered: the inputs first, then the constants, then the results of the instructions in their order."""

    inputs: tuple[str, ...]
    constants: tuple[float, ...]
    #: (operation, numbers of its operands...)
    instructions: tuple[tuple, ...]
    #: numbers of the values that the program is for
    outputs: tuple[int, ...]

    def depends(self, *inputs: int) -> tuple[bool, ...]:
        """For every value, whether it depends on one of these inputs."""
        found = [i in inputs for i in range(len(self.inputs) + len(self.constants))]
        for _, *operands in self.instructions:
            found.append(any(found[x] for x in operands))
        return tuple(found)

    def varies(self) -> tuple[bool, ...]:
        """For every value, whether it depends on the first input: the others are the same along a row."""
        return self.depends(0)


def evaluate(program: Program, *inputs: Tensor | None) -> list[Tensor]:
    """The outputs of a program in PyTorch.

    Args:
        inputs: in the order of ``program.inputs``, of dtype float32 or float64, and broadcastable; None for one that is not used.

    Returns:
        One tensor per output; each has the shape that its operands broadcast to.
    """
    found = values(program, *inputs)
    return [found[x] for x in program.outputs]


def values(program: Program, *inputs: Tensor | None) -> list[Tensor]:
    """Of the inputs, the constants and the instructions."""
    like = next(x for x in inputs if x is not None)
    found: list[Tensor] = [*inputs, *(like.new_tensor(x) for x in program.constants)]  # type: ignore[list-item]
    for operation, *operands in program.instructions:
        found.append(_TORCH[operation](*(found[x] for x in operands)))
    return found


_TORCH: dict[str, Callable[..., Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "neg": torch.neg,
    "abs": torch.abs,
    "sign": lambda a: torch.where(a.isnan(), a, torch.sign(a)),  # torch.sign(NaN) is 0
    "sqrt": torch.sqrt,
    "exp": torch.exp,
    "log": torch.log,
    "tanh": torch.tanh,
    "min": torch.minimum,
    "max": torch.maximum,
    "power": torch.pow,
    "le": lambda a, b: (a <= b).to(a.dtype),
    "lt": lambda a, b: (a < b).to(a.dtype),
    "where": lambda condition, a, b: torch.where(condition != 0, a, b),
}
