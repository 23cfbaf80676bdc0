"""What is known of an expression whatever its inputs are: values of constants, and signs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .graph import Graph

__all__ = ["FOLD", "above_zero", "at_least_zero"]

#: the value of an operation of numbers
FOLD: dict[str, Callable[..., float]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "neg": lambda a: -a,
    "abs": abs,
    "sign": lambda a: float((a > 0) - (a < 0)),
    "sqrt": math.sqrt,
    "exp": math.exp,
    "log": math.log,
    "tanh": math.tanh,
    "cosh": math.cosh,
    "logcosh": lambda a: abs(a) + math.log((1 + math.exp(-2 * abs(a))) / 2),
    "min": min,
    "max": max,
    "power": lambda a, b: a**b,
    "le": lambda a, b: float(a <= b),
    "lt": lambda a, b: float(a < b),
    "where": lambda c, a, b: a if c else b,
}


def at_least_zero(graph: Graph, operation: str, *operands) -> bool:
    """Whether a node is known to be >= 0 for all inputs."""
    if operation == "number":
        return operands[0] >= 0
    if operation == "input":
        return operands[0] in graph.nonnegative_inputs
    if operation in ("abs", "sqrt", "exp", "cosh", "logcosh", "power", "le", "lt"):
        return True
    if operation == "mul" and operands[0] == operands[1]:
        return True
    if operation in ("add", "mul", "div", "min"):
        return all(map(graph.nonnegative, operands))
    if operation == "max":
        return any(map(graph.nonnegative, operands))
    return operation == "where" and all(map(graph.nonnegative, operands[1:]))


def above_zero(graph: Graph, operation: str, *operands) -> bool:
    """Whether a node is known to be > 0 for all inputs."""
    if operation == "number":
        return operands[0] > 0
    if operation in ("exp", "cosh"):
        return True
    if operation == "add":
        return all(map(graph.nonnegative, operands)) and any(map(graph.positive, operands))
    if operation in ("mul", "div", "sqrt", "power", "min"):
        return all(map(graph.positive, operands if operation != "power" else operands[:1]))
    if operation == "max":
        return any(map(graph.positive, operands))
    return operation == "where" and all(map(graph.positive, operands[1:]))
