"""Expressions as a graph whose equal parts are one node, and their derivatives.

A node is a number (its index); operands come before the nodes that use them. Only rewrites that keep or improve accuracy are made, and none
searches: the graph of a derivative has a bounded number of nodes per node of the expression.
"""

from __future__ import annotations

import math

from .known import FOLD, above_zero, at_least_zero
from .program import Program

__all__ = ["Graph"]

#: Operations, expressions and derivatives together; a program beyond it would not be a short one.
MAX_NODES = 600

_COMMUTES = ("add", "mul")


class Graph:
    """Nodes of expressions over ``inputs``, the names of what they are functions of.

    Args:
        inputs: names, the first of which varies along a row (the error, or an entry of the dual).
        nonnegative: those of them that are never negative.
    """

    def __init__(self, inputs: tuple[str, ...], nonnegative: tuple[str, ...] = ()) -> None:
        self.inputs = inputs
        self.nonnegative_inputs = nonnegative
        self._nodes: list[tuple] = []
        self._signs: list[tuple[bool, bool]] = []  # of every node: whether it is known to be >= 0, and > 0
        self._index: dict[tuple, int] = {}
        self._varies: list[bool] = []  # along a row: whether it depends on the first input
        for name in inputs:
            self._node("input", name)

    def input(self, name: str) -> int:
        return self.inputs.index(name)

    def number(self, value: float) -> int:
        """A constant; ``ValueError`` unless float32 can hold it."""
        value = float(value)
        if not math.isfinite(value) or abs(value) > 3.4e38 or 0 < abs(value) < 1.2e-38:
            raise ValueError(f"a number is out of float32's range: {value:g}")
        return self._node("number", value + 0.0)  # +0.0: there is no -0

    def apply(self, operation: str, *operands: int) -> int:
        """The node of an operation, simplified."""
        values = [self._value(x) for x in operands]
        if None not in values:
            try:
                return self.number(FOLD[operation](*values))
            except (ArithmeticError, ValueError, TypeError) as error:  # TypeError: a fractional power of a negative number is complex
                raise ValueError(f"{operation}({', '.join(f'{x:g}' for x in values)}) is not a finite number") from error
        simpler = getattr(self, f"_{operation}", None)
        found = simpler(*operands) if simpler else None
        if found is not None:
            return found
        return self._node(operation, *(sorted(operands) if operation in _COMMUTES else operands))

    def depends(self, node: int, name: str) -> bool:
        """Whether an input occurs in the expression of a node."""
        return self.input(name) in self._reachable([node])

    def derivative(self, node: int, name: str) -> int:
        """The derivative in an input: almost everywhere, and that of the chosen argument for min, max, where and clip.

        Where it does not exist: 0 for abs, sign, sqrt and fractional powers at 0; the first argument's at a tie of min and max.
        """
        source, zero = self.input(name), self.number(0)
        known: dict[int, int] = {}
        for i in sorted(self._reachable([node])):
            operation, *operands = self._nodes[i]
            if operation in ("input", "number"):
                known[i] = self.number(1) if i == source else zero
            elif all(known[x] == zero for x in operands):
                known[i] = zero
            else:
                known[i] = self._differentiate(i, operation, operands, [known[x] for x in operands])
        return known[node]

    def substitute(self, node: int, old: int, new: int) -> int:
        """The expression of a node with every occurrence of ``old`` replaced by ``new``, which does not depend on other nodes of it."""
        known = {old: new}
        for i in sorted(self._reachable([node])):
            operation, *operands = self._nodes[i]
            if i not in known:
                known[i] = i if operation in ("input", "number") else self.apply(operation, *(known[x] for x in operands))
        return known[node]

    def program(self, *outputs: int) -> Program:
        """What a backend computes to get the nodes ``outputs``."""
        outputs = tuple(self._lower(x) for x in outputs)
        used = sorted(self._reachable(outputs))
        constants = [i for i in used if self._nodes[i][0] == "number"]
        place = {i: i for i in range(len(self.inputs))} | {node: len(self.inputs) + i for i, node in enumerate(constants)}
        instructions: list[tuple] = []
        for i in used:
            if i not in place:
                operation, *operands = self._nodes[i]
                place[i] = len(self.inputs) + len(constants) + len(instructions)
                instructions.append((operation, *(place[x] for x in operands)))
        return Program(self.inputs, tuple(self._nodes[i][1] for i in constants), tuple(instructions), tuple(place[x] for x in outputs))

    # ---------------------------------------------------------------- nodes

    def _node(self, *key) -> int:
        if key not in self._index:
            if len(self._nodes) >= MAX_NODES:
                raise ValueError(f"too long: with its derivatives it has more than {MAX_NODES} operations")
            self._index[key] = len(self._nodes)
            self._nodes.append(key)
            leaf = key[0] in ("input", "number")
            self._varies.append(key[-1] == self.inputs[0] if leaf else any(self._varies[x] for x in key[1:]))
            self._signs.append((at_least_zero(self, *key), above_zero(self, *key)))
        return self._index[key]

    def _value(self, node: int) -> float | None:
        operation, *operands = self._nodes[node]
        return operands[0] if operation == "number" else None

    def _is(self, node: int, operation: str) -> bool:
        return self._nodes[node][0] == operation

    def _operands(self, node: int) -> tuple[int, ...]:
        return self._nodes[node][1:]

    def _reachable(self, nodes) -> set[int]:
        found, waiting = set(), list(nodes)
        while waiting:
            i = waiting.pop()
            if i not in found:
                found.add(i)
                if not (self._is(i, "input") or self._is(i, "number")):
                    waiting += self._operands(i)
        return found

    def _lower(self, node: int) -> int:
        """cosh and log(cosh) in terms of exp, now that derivatives have been simplified."""
        for i in sorted(self._reachable([node])):
            if self._nodes[i][0] in ("cosh", "logcosh"):
                x = self._operands(i)[0]
                if self._is(i, "cosh"):
                    both = self.apply("add", self.apply("exp", x), self.apply("exp", self.apply("neg", x)))
                    lower = self.apply("mul", self.number(0.5), both)
                else:  # |x| + log((1 + exp(-2 |x|)) / 2)
                    x = self.apply("abs", x)
                    tail = self.apply("exp", self.apply("mul", self.number(-2), x))
                    half = self.apply("mul", self.number(0.5), self.apply("add", self.number(1), tail))
                    lower = self.apply("add", x, self.apply("log", half))
                return self._lower(self.substitute(node, i, lower))
        return node

    # ---------------------------------------------------------------- signs

    def nonnegative(self, node: int) -> bool:
        """Whether the expression is known to be >= 0 for all inputs."""
        return self._signs[node][0]

    def positive(self, node: int) -> bool:
        """Whether the expression is known to be > 0 for all inputs."""
        return self._signs[node][1]

    # ---------------------------------------------------------------- simplification: one method per operation, None if there is none

    def _add(self, a, b):
        if self._value(a) == 0:
            return b
        if self._value(b) == 0:
            return a
        if self._is(b, "neg"):
            return self.apply("sub", a, self._operands(b)[0])
        if self._is(a, "neg"):
            return self.apply("sub", b, self._operands(a)[0])
        return None

    def _sub(self, a, b):
        if a == b:
            return self.number(0)
        if self._value(b) == 0:
            return a
        if self._value(a) == 0:
            return self.apply("neg", b)
        return self.apply("add", a, self._operands(b)[0]) if self._is(b, "neg") else None

    def _neg(self, a):
        if self._is(a, "neg"):
            return self._operands(a)[0]
        return self.apply("sub", *reversed(self._operands(a))) if self._is(a, "sub") else None

    def _mul(self, a, b):
        if self._value(b) is not None:
            a, b = b, a
        number = self._value(a)
        if number == 0:
            return a
        if number == 1:
            return b
        if number == -1:
            return self.apply("neg", b)
        if self._is(a, "neg"):
            return self.apply("neg", self.apply("mul", self._operands(a)[0], b))
        if self._is(b, "neg"):
            if number is not None:
                return self.apply("mul", self.number(-number), self._operands(b)[0])
            return self.apply("neg", self.apply("mul", a, self._operands(b)[0]))
        if number is not None and self._is(b, "mul"):
            for x, rest in (self._operands(b), reversed(self._operands(b))):
                inner = self._value(x)
                if inner is not None:
                    return self.apply("mul", self.number(number * inner), rest)
        for x, product in ((a, b), (b, a)):
            if not self._varies[x]:
                return self._once_per_row(product, lambda factor, x=x: self.apply("mul", x, factor))
        return None

    def _div(self, a, b):
        if self._value(a) == 0:
            return a
        number = self._value(b)
        if number == 0:
            raise ValueError("division by 0")
        if number is not None:
            return self.apply("mul", self.number(1 / number), a)
        if self._is(a, "neg"):
            return self.apply("neg", self.apply("div", self._operands(a)[0], b))
        found = self._without(a, b, set())
        if found is None and not self._varies[b]:
            return self._once_per_row(a, lambda factor: self.apply("div", factor, b))
        return found

    def _once_per_row(self, product, change):
        """``x change(factor)`` for the product of x and a factor that is the same along a row, unlike x; or None."""
        if self._is(product, "mul"):
            for x, factor in (self._operands(product), reversed(self._operands(product))):
                if self._varies[x] and not self._varies[factor]:
                    return self.apply("mul", x, change(factor))
        return None

    def _without(self, product, factor, seen):
        """``product / factor`` if factor is one of the product's factors: finite where both overflow or are 0."""
        if product == factor:
            return self.number(1)
        if self._is(product, "mul") and product not in seen:
            seen.add(product)
            for x, rest in (self._operands(product), reversed(self._operands(product))):
                found = self._without(x, factor, seen)
                if found is not None:
                    return self.apply("mul", found, rest)
        return None

    def _abs(self, a):
        if self._is(a, "neg"):
            return self.apply("abs", self._operands(a)[0])
        return a if self.nonnegative(a) else None

    def _sign(self, a):
        return self.number(1) if self.positive(a) else None

    def _sqrt(self, a):
        if self._is(a, "mul") and self._operands(a)[0] == self._operands(a)[1]:
            return self.apply("abs", self._operands(a)[0])
        if not self.nonnegative(a):
            raise ValueError("the argument of sqrt may be negative: write abs(...), max(..., 0) or a square")
        return None

    def _log(self, a):
        if self._is(a, "exp"):
            return self._operands(a)[0]
        if self._is(a, "cosh"):  # finite where cosh overflows
            return self._node("logcosh", *self._operands(a))
        if not self.positive(a):
            raise ValueError("the argument of log may be 0 or negative: add a positive number to an abs(...) or a square")
        return None

    def _cosh(self, a):
        return self.apply("cosh", self._operands(a)[0]) if self._is(a, "neg") else None

    def _min(self, a, b):
        return a if a == b else None

    _max = _min

    def _le(self, a, b):
        return self.number(1) if a == b else None

    def _lt(self, a, b):
        return self.number(0) if a == b else None

    def _where(self, condition, a, b):
        if a == b:
            return a
        if self._value(condition) is not None:
            return a if self._value(condition) else b
        if self._varies[condition] or not (self._varies[a] or self._varies[b]):
            return None
        factors = [self._factor_of_first(x) for x in (a, b)]
        return None if None in factors else self.apply("mul", 0, self.apply("where", condition, *factors))

    def _factor_of_first(self, node):
        """What the first input is multiplied by, if that is the same along a row; or None."""
        if node == 0 or self._value(node) == 0:
            return self.number(1 if node == 0 else 0)
        if self._is(node, "mul") and 0 in self._operands(node):
            factor = self._operands(node)[self._operands(node)[0] == 0]
            return None if self._varies[factor] else factor
        return None

    def _power(self, base, exponent):
        number = self._value(exponent)
        if number is None:
            raise ValueError("the exponent of ** must be a number or a named number")
        if number < 0:
            return self.apply("div", self.number(1), self.apply("power", base, self.number(-number)))
        if number == int(number) and number <= 8:
            return self._whole_power(base, int(number))
        if not self.nonnegative(base):
            raise ValueError("the base of a power with this exponent may be negative: write abs(...) ** exponent")
        if number == int(number) + 0.5 and number <= 4:
            return self.apply("mul", self._whole_power(base, int(number)), self.apply("sqrt", base))
        return None

    def _whole_power(self, base, exponent):
        if exponent == 0:
            return self.number(1)
        if exponent == 2 and self._is(base, "abs"):
            base = self._operands(base)[0]
        half = self._whole_power(base, exponent // 2) if exponent > 1 else None
        if half is None:
            return base
        square = self.apply("mul", half, half)
        return self.apply("mul", square, base) if exponent % 2 else square

    # ---------------------------------------------------------------- derivatives

    def _differentiate(self, node, operation, operands, grads):
        """The derivative of one operation, from those of its operands."""
        apply, number = self.apply, self.number
        x, dx = operands[0], grads[0]
        if operation in ("add", "sub"):
            return apply(operation, dx, grads[1])
        if operation == "mul":
            if operands[0] == operands[1]:
                return apply("mul", number(2), apply("mul", x, dx))
            return apply("add", apply("mul", dx, operands[1]), apply("mul", x, grads[1]))
        if operation == "div":
            return apply("div", apply("sub", dx, apply("mul", node, grads[1])), operands[1])
        if operation == "neg":
            return apply("neg", dx)
        if operation == "abs":
            return apply("mul", apply("sign", x), dx)
        if operation in ("sign", "le", "lt"):
            return number(0)
        if operation == "exp":
            return apply("mul", node, dx)
        if operation == "log":
            return apply("div", dx, x)
        if operation == "tanh":
            return apply("mul", apply("mul", apply("sub", number(1), node), apply("add", number(1), node)), dx)
        if operation == "cosh":
            return apply("mul", node, apply("mul", apply("tanh", x), dx))
        if operation == "logcosh":
            return apply("mul", apply("tanh", x), dx)
        if operation == "sqrt":
            return self._unless_zero(x, apply("div", apply("mul", number(0.5), dx), node))
        if operation == "power":
            return self._unless_zero(x, apply("div", apply("mul", apply("mul", operands[1], node), dx), x))
        if operation == "min":
            return apply("where", apply("le", *operands), *grads)
        if operation == "max":
            return apply("where", apply("le", operands[1], operands[0]), *grads)
        return apply("where", x, *grads[1:])  # where

    def _unless_zero(self, x, derivative):
        """``derivative``, or 0 where ``x`` is 0."""
        if self.positive(x):
            return derivative
        return self.apply("where", self.apply("lt", self.number(0), x), derivative, self.number(0))
