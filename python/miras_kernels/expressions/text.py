"""The text of an expression: Python's own parser, and of its syntax tree only what is listed here."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Mapping

from .graph import Graph

__all__ = ["FUNCTIONS", "MAX_LENGTH", "parse"]

MAX_LENGTH = 1000
_OTHER = re.compile(r"[^\w.+\-*/(),<>=\s]", re.ASCII)
MAX_DEPTH = 50

#: Functions and their number of arguments (None: two or more).
FUNCTIONS: dict[str, int | None] = {
    "abs": 1,
    "sign": 1,
    "sqrt": 1,
    "exp": 1,
    "log": 1,
    "tanh": 1,
    "cosh": 1,
    "min": None,
    "max": None,
    "where": 3,
    "clip": 3,
}
_BINARY = {ast.Add: "add", ast.Sub: "sub", ast.Mult: "mul", ast.Div: "div", ast.Pow: "power"}
#: operation, and whether its operands change places
_COMPARE = {ast.LtE: ("le", False), ast.Lt: ("lt", False), ast.GtE: ("le", True), ast.Gt: ("lt", True)}


def parse(text: str, graph: Graph, parameters: Mapping[str, float]) -> int:
    """The node of an expression in a graph.

    Args:
        text: at most ``MAX_LENGTH`` ASCII characters: numbers, the graph's inputs, the names of ``parameters``, ``+ - * / **``,
            parentheses, the functions of ``FUNCTIONS``, and comparisons (``< <= > >=``) as the first argument of ``where``.
        parameters: values of named numbers.

    Raises:
        TypeError: the text is not a string.
        ValueError: anything else that is not such an expression; the message says what and at which column.
    """
    if not isinstance(text, str):
        raise TypeError(f"an expression must be a string, got {type(text).__name__}")
    if len(text) > MAX_LENGTH:
        raise ValueError(f"an expression has at most {MAX_LENGTH} characters, got {len(text)}")
    other = _OTHER.search(text)
    if other:
        raise _at(text, other.start() + 1, f"{other[0]!r} is not part of an expression")
    _check_depth(text)
    line = re.sub(r"\s", " ", text)  # one line of ASCII, so that Python's columns are those of the text
    indent = len(line) - len(line.lstrip())
    try:
        with warnings.catch_warnings():  # Python's, of what is refused below anyway: 1if e else 2
            warnings.simplefilter("ignore")
            tree = ast.parse(line.strip(), mode="eval")
    except SyntaxError as error:
        raise _at(text, min(indent + (error.offset or 1), len(text) + 1), "not an expression") from None
    except (ValueError, MemoryError, RecursionError) as error:  # too long a number; too deep for this Python's parser
        raise _at(text, indent + 1, f"not an expression ({error})") from None
    try:
        return _Reader(text, graph, parameters).read(tree.body, 1)
    except _Positioned as error:
        raise ValueError(str(error)) from None


def _check_depth(text: str) -> None:
    depth = 0
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth > MAX_DEPTH:
            raise _at(text, i + 1, f"more than {MAX_DEPTH} parentheses inside each other")


def _at(text: str, column: int, problem: str) -> ValueError:
    shown = text if len(text) <= 100 else text[:97] + "..."
    return ValueError(f"{problem}, at column {column} of {shown!r}")


class _Reader:
    def __init__(self, text: str, graph: Graph, parameters: Mapping[str, float]) -> None:
        self.text, self.graph, self.parameters = text, graph, parameters
        self.indent = len(text) - len(text.lstrip())

    def fail(self, node: ast.AST, problem: str) -> ValueError:
        return _at(self.text, getattr(node, "col_offset", 0) + self.indent + 1, problem)

    def read(self, node: ast.AST, depth: int) -> int:
        if depth > 2 * MAX_DEPTH:
            raise _Positioned(self.fail(node, f"more than {2 * MAX_DEPTH} operations inside each other"))
        try:
            return self._read(node, depth + 1)
        except _Positioned:
            raise
        except ValueError as error:
            raise _Positioned(str(error if " at column " in str(error) else self.fail(node, str(error)))) from None

    def _read(self, node: ast.AST, depth: int) -> int:
        apply = self.graph.apply
        if isinstance(node, ast.Constant):
            if isinstance(node.value, bool) or not isinstance(node.value, (int, float)):
                raise ValueError(f"expected a number, got {node.value!r}"[:80])
            try:
                return self.graph.number(float(node.value))
            except OverflowError:
                raise ValueError("a number is out of range") from None
        if isinstance(node, ast.Name):
            return self._name(node.id)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.UAdd, ast.USub)):
            x = self.read(node.operand, depth)
            return apply("neg", x) if isinstance(node.op, ast.USub) else x
        if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
            return apply(_BINARY[type(node.op)], self.read(node.left, depth), self.read(node.right, depth))
        if isinstance(node, ast.Call):
            return self._call(node, depth)
        if isinstance(node, ast.Compare):
            raise ValueError("a comparison can only be the first argument of where(condition, a, b)")
        raise ValueError("expected numbers, names, + - * / **, parentheses and functions")

    def _name(self, name: str) -> int:
        if name in self.graph.inputs:
            return self.graph.input(name)
        if name in self.parameters:
            return self.graph.number(self.parameters[name])
        known = ", ".join([*self.graph.inputs, *self.parameters])
        if name in FUNCTIONS:
            raise ValueError(f"{name} is a function and needs arguments")
        raise ValueError(f"unknown name {name!r} (known: {known}; functions: {', '.join(FUNCTIONS)})")

    def _call(self, node: ast.Call, depth: int) -> int:
        name = node.func.id if isinstance(node.func, ast.Name) else None
        if name not in FUNCTIONS:
            raise ValueError(f"unknown function (known: {', '.join(FUNCTIONS)})")
        if node.keywords or any(isinstance(x, ast.Starred) for x in node.args):
            raise ValueError(f"{name} takes positional arguments only")
        count = FUNCTIONS[name]
        if len(node.args) != count if count else len(node.args) < 2:
            raise ValueError(f"{name} takes {count or 'two or more'} argument{'s' if count != 1 else ''}, got {len(node.args)}")
        if name == "where":
            return self.graph.apply("where", self._condition(node.args[0], depth), *(self.read(x, depth) for x in node.args[1:]))
        operands = [self.read(x, depth) for x in node.args]
        if name == "clip":  # a tie counts as inside
            return self.graph.apply("max", self.graph.apply("min", operands[0], operands[2]), operands[1])
        while count is None and len(operands) > 2:
            operands[:2] = [self.graph.apply(name, *operands[:2])]
        return self.graph.apply(name, *operands)

    def _condition(self, node: ast.AST, depth: int) -> int:
        if not isinstance(node, ast.Compare) or len(node.ops) != 1 or type(node.ops[0]) not in _COMPARE:
            raise self.fail(node, "the first argument of where must be one comparison with <, <=, > or >=")
        operation, swap = _COMPARE[type(node.ops[0])]
        pair = [self.read(node.left, depth), self.read(node.comparators[0], depth)]
        return self.graph.apply(operation, *(reversed(pair) if swap else pair))


class _Positioned(ValueError):
    """An error whose message has its column."""
