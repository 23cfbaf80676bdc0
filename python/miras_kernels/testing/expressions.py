"""Random attentional biases and retention gates that are written as expressions: strategies of hypothesis.

Their slopes are bounded, and they are what somebody might write: errors that are damped, cut off or chosen by their size.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import torch

from ..expressions import evaluate
from ..tables.custom import CustomBias, CustomRetention

__all__ = ["biases", "derivative_error", "gates"]

#: An error's slope beyond it would make step sizes very small.
STEEPEST = 20.0


def biases():
    """A strategy for :class:`~miras_kernels.CustomBias`."""
    from hypothesis import strategies as st

    sizes: Any
    dampings: Any
    errors: Any
    number, join = _numbers(st), _joiner(st)
    size, damping, error = st.deferred(lambda: sizes), st.deferred(lambda: dampings), st.deferred(lambda: errors)
    sizes = st.one_of(
        join("abs(e) / {}", number), join("(e / {})**2", number), join("norm2 / {}", number), st.just("norm2 / delta**2"),
        join("sqrt(norm2) / {}", number), join("e**2 / (delta + {})", number), join("sqrt({} + {})", size, number),
        join("log(1 + {})", size), join("({} + {})", size, size), join("{} * {}", damping, size), join("({})**{}", size, number),
    )  # fmt: skip
    dampings = st.one_of(
        join("1 / (1 + {})", size), join("exp(-({}))", size), join("1 / sqrt({} + {})", number, size), join("tanh({} + {})", number, size),
        join("min(1, {} / ({} + {}))", number, number, size), join("where({} <= {}, 1, 0.5)", size, number),
        join("where({0} <= {1}, 1, {1} / ({0}))", size, number), join("1 / cosh(min({}, 20))", size), join("{} * {}", damping, damping),
    )  # fmt: skip
    errors = st.one_of(
        st.just("e"), join("e * {}", damping), join("{} * ({})", number, error), join("tanh({} * ({}))", number, error),
        join("clip({0}, -{1}, {1})", error, number), join("clip({}, -delta, delta)", error), join("({} + {})", error, error),
        join("max({}, {})", error, error), join("min({}, {})", error, error), join("sign(e) * min(abs({}), {})", error, number),
        join("sign(e) * log(1 + {})", size.filter(lambda text: text.startswith("abs(e)"))),
        join("where({} < {}, {}, {})", size, number, error, error),
    )  # fmt: skip
    of_entry = st.one_of(
        join("log(cosh({} * e)) / {}", number, number), join("log(1 + (e / {})**2)", number), join("sqrt({} + e**2)", number),
        join("where(abs(e) <= {0}, 0.5 * e**2, {0} * (abs(e) - 0.5 * {0}))", number), join("max(abs(e) - {}, 0)**2", number),
        st.just("delta**2 * (sqrt(1 + (e / delta)**2) - 1)"),
    )  # fmt: skip
    of_row = st.one_of(
        join("-exp(-norm2 / {})", number), join("log(1 + norm2 / {})", number), st.just("sqrt(norm2 + delta**2)"), st.just("norm2 / 2"),
    )  # fmt: skip
    losses = st.one_of(of_entry, join("{} + {}", of_entry, of_entry), of_row, join("{} + {}", of_row, of_row))
    return st.one_of(_rows(st, errors, CustomBias), _rows(st, losses, lambda text, **values: CustomBias(loss=text, **values)))


def gates():
    """A strategy for :class:`~miras_kernels.CustomRetention`."""
    from hypothesis import strategies as st

    entries: Any
    number, join, entry = _numbers(st), _joiner(st), st.deferred(lambda: entries)
    # thresholds are small: where they leave almost nothing of W, budgets know too little of the rounding of what is left
    entries = st.one_of(
        st.just("A"), join("({0}) / (1 + abs({0}) / {1})", entry, number), join("{} * tanh({})", number, entry),
        join("clip({0}, -{1}, {1})", entry, number), join("max({}, 0.1 * A)", entry), join("A / sqrt(1 + (A / {})**2)", number),
        join("sign(A) * log(1 + abs(A) / {})", number), join("sign(A) * max(abs(A) - 0.15 * {}, 0)", number),
        join("0.5 + 0.5 * tanh({})", entry),
        join("({} + {})", entry, entry), join("where(abs(A) <= {0}, A, sign(A) * {0})", number),
    )  # fmt: skip
    return _rows(st, entries, CustomRetention)


def _numbers(st):
    """Positive numbers as kernels take them: literals and names."""
    return st.sampled_from(["0.5", "1", "1.5", "2", "3", "a", "b"])


def _joiner(st):
    """``join(template, *strategies)``: texts with their parts filled in."""
    return lambda template, *parts: st.tuples(*parts).map(lambda texts: template.format(*texts))


def _rows(st, texts, make: Callable):
    """Rows of those texts that a constructor takes without a warning, with random values of their names."""
    value = st.floats(0.25, 3.0, width=32)

    def row(drawn: tuple):
        text, *values = drawn
        used = {name: x for name, x in zip("ab", values, strict=True) if re.search(rf"\b{name}\b", text)}
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            try:
                found = make(text, **used)
            except (ValueError, UserWarning):  # too long, or one of those that are refused for good reasons
                return None
        return found if _flat(found) else None

    @st.composite  # its repr is short
    def rows(draw):
        return draw(st.tuples(texts.filter(lambda text: len(text) <= 300), value, value).map(row).filter(lambda row: row is not None))

    return rows()


def _flat(row: CustomBias | CustomRetention) -> bool:
    x = torch.linspace(-3, 3, 601, dtype=torch.float64)[:, None]
    if isinstance(row, CustomRetention):
        a = x.requires_grad_()
        (slope,) = torch.autograd.grad(row.phi(a).sum(), a)
    else:
        slope = row.psi_vjp(x, torch.zeros_like(x), torch.ones_like(x), torch.ones_like(x))[0]
    return bool(slope.abs().max() <= STEEPEST)


def derivative_error(row: CustomBias | CustomRetention) -> float:
    """The largest difference between the derivatives of a row and autograd's through its value, at random points, in float64.

    Autograd is wrong at a few points: where a function is not differentiable, and where it multiplies infinity by 0.
    """
    generator = torch.Generator().manual_seed(0)
    e, y, delta = (torch.randn(64, 6, generator=generator, dtype=torch.float64) for _ in range(3))
    e, delta = e.requires_grad_(), (0.2 + delta[:, :1].abs()).requires_grad_()
    if isinstance(row, CustomRetention):
        wanted = torch.autograd.grad(evaluate(row.programs.primal, e)[0], e, y)
        found = torch.autograd.grad(row.phi(e), e, y)
    else:
        psi = evaluate(row.programs.psi, e, (e * e).sum(-1, keepdim=True), delta)[0].expand_as(e)
        leaves = (e, delta) if row.needs_delta else (e,)
        wanted, found = (
            torch.autograd.grad(value, leaves, y, materialize_grads=True) for value in (psi, row.psi(e, torch.zeros_like(e), delta))
        )
    errors = [((a - b).abs() / (1 + b.abs()))[b.isfinite()] for a, b in zip(found, wanted, strict=True)]
    return max(float(x.max()) for x in errors)
