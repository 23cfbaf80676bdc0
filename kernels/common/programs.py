"""Straight-line programs (``python/miras_kernels/expressions/program.py``) on the device: unrolled while a kernel is compiled.

A kernel receives a program as text, a constant whose hash Python keeps: ``"1.0;mul 2 2;add 3 4;out 5"`` gives the value 3 the number 1,
value 4 the product of value 2 with itself, value 5 the sum of the two, which is the first output. Inputs have the first numbers.

A value has the shape that its operands broadcast to: what is the same along a row is computed once per row. Operations that an output does
not need, or that several outputs share, are left to the compiler, which drops or merges them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...expressions import Program
from . import elementary


def text_of(program: Program) -> str:
    lines = [repr(x) for x in program.constants]
    lines += [" ".join(map(str, x)) for x in program.instructions]
    return ";".join([*lines, " ".join(["out", *map(str, program.outputs)])])


@triton.constexpr_function
def constant(x):
    """A member of a constant tuple as a constant, which a function may take as an argument."""
    return x


@triton.constexpr_function
def length(text):
    """How many values have a line of their own."""
    return text.count(";")


@triton.constexpr_function
def number_of(text, i):
    """A line's number, or None if it is an operation."""
    line = text.split(";")[i]
    return None if " " in line else float(line)


@triton.constexpr_function
def name_of(text, i):
    return text.split(";")[i].split()[0]


@triton.constexpr_function
def operand_of(text, i, j):
    """Which value an operation's operand j is; the last one again beyond that."""
    operands = text.split(";")[i].split()[1:]
    return int(operands[min(j, len(operands) - 1)])


@triton.jit
def run(inputs, TEXT: tl.constexpr, OUTPUT: tl.constexpr):
    """An output of a program. Inputs that it does not use may be anything."""
    values = inputs
    for i in tl.static_range(length(TEXT)):
        if number_of(TEXT, i) is not None:
            values = values + (number_of(TEXT, i),)
        else:
            a, b, c = values[operand_of(TEXT, i, 0)], values[operand_of(TEXT, i, 1)], values[operand_of(TEXT, i, 2)]
            values = values + (operation(a, b, c, name_of(TEXT, i)),)
    return values[operand_of(TEXT, length(TEXT), OUTPUT)]


@triton.jit
def operation(a, b, c, NAME: tl.constexpr):
    """One operation of ``OPERATIONS``. Comparisons give booleans, which count as 1 and 0."""
    if NAME == "add":
        return a + b
    elif NAME == "sub":
        return a - b
    elif NAME == "mul":
        return a * b
    elif NAME == "div":
        return a / b
    elif NAME == "neg":
        return -a
    elif NAME == "abs":
        return tl.abs(a)
    elif NAME == "sign":
        return tl.where(a > 0, 1.0, tl.where(a < 0, -1.0, a))  # 0 and NaN are their own
    elif NAME == "sqrt":
        return tl.sqrt(a)
    elif NAME == "exp":
        return tl.exp(a)
    elif NAME == "log":
        return tl.log(a)
    elif NAME == "tanh":
        return elementary.tanh(a)
    elif NAME == "min":
        return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)
    elif NAME == "max":
        return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
    elif NAME == "power":
        return elementary.power(a, b)
    elif NAME == "le":
        return a <= b
    elif NAME == "lt":
        return a < b
    else:
        tl.static_assert(NAME == "where", "an operation needs a branch")
        return tl.where(a != 0, b, c)
