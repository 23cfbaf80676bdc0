"""Attentional biases on the device: psi(e), the gradient of the inner loss in the prediction, and its derivatives.

The value and the derivatives of a bias stand side by side, chosen by ``BIAS.tag``: tags, parameters ``p0, p1, p2`` and equations are those
of ``python/miras_kernels/tables/biases.py`` and ``csrc/bias.h``. Kernels never compare tags; they ask for the traits in :class:`Bias`.

    value(e, square, delta)         psi(e)
    slope(e, square, delta)         the diagonal part of d psi / d e
    slope_delta(e, square, delta)   d psi / d delta
    pull(e, square, delta)          2 d psi / d square                            (for biases that couple a row)

so that d psi / d e = diag(slope) + pull e', and for an incoming y:  dE = slope y + (pull . y) e,  d delta = sum slope_delta y.
The last three broadcast against ``e [C, BV]``; ``square [C, 1]`` is ``||e||^2`` over the whole row (read only by biases that couple it);
``delta [C, 1]`` or ``[C, BV]``. psi(0) = 0 for all biases, so padding stays zero. NaN must stay NaN: tl.minimum and
tl.maximum drop it unless told to propagate it.

Adding a bias: docs/adding-a-bias.md.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import triton
import triton.language as tl

from . import programs
from .elementary import power, sech2, tanh

DOT = tl.constexpr(0)
L2 = tl.constexpr(1)
L1 = tl.constexpr(2)
LP = tl.constexpr(3)
LP_SMOOTH = tl.constexpr(4)
HUBER_COORDINATE = tl.constexpr(5)
HUBER_NORM = tl.constexpr(6)
HUBER_SWITCH = tl.constexpr(7)
ROBUST_L2 = tl.constexpr(8)
CUSTOM = tl.constexpr(9)


class Bias(NamedTuple):
    """A bias as the kernels take it: one constant, ``BIAS``."""

    tag: int
    p0: float
    p1: float
    p2: float
    reads_memory: bool  # the dot product does not
    row_coupled: bool  # psi of one value depends on the whole row of errors
    delta: int  # 0: none, 1: a threshold per token, 2: one per token and value channel
    psi: str = ""  # of a CustomBias: its value, as text (programs.py)
    derivatives: str = ""  # slope, pull and slope_delta

    @staticmethod
    @functools.lru_cache(256)
    def of(bias, delta: int) -> Bias:
        """From a row of tables/biases.py; ``delta`` as in the field."""
        texts = () if bias.tag != CUSTOM.value else map(programs.text_of, (bias.programs.psi, bias.programs.derivatives))
        return Bias(bias.tag, *bias.padded, bias.reads_memory, bias.row_coupled, delta, *texts)


@triton.jit
def value(e, square, delta, BIAS: tl.constexpr):
    if BIAS.tag == DOT or BIAS.tag == L2:  # for the dot product the kernels pass e = -v
        return e
    elif BIAS.tag == L1:
        return tanh(BIAS.p0 * e)
    elif BIAS.tag == LP:
        return BIAS.p0 * power(tl.abs(e), BIAS.p0 - 1) * tl.where(e < 0, -1.0, 1.0)
    elif BIAS.tag == LP_SMOOTH:
        return BIAS.p0 * tanh(BIAS.p1 * e) * power(e * e + BIAS.p2, (BIAS.p0 - 1) / 2)
    elif BIAS.tag == HUBER_COORDINATE:
        return tl.maximum(tl.minimum(e, delta, propagate_nan=tl.PropagateNan.ALL), -delta, propagate_nan=tl.PropagateNan.ALL)
    elif BIAS.tag == HUBER_NORM:
        return e * tl.where(square <= delta * delta, 1.0, delta * inverse_norm(square))
    elif BIAS.tag == HUBER_SWITCH:
        return tl.where(square <= delta * delta, e, delta * tanh(BIAS.p0 * e))
    elif BIAS.tag == ROBUST_L2:
        return e * (1.0 + delta * inverse_norm(square + BIAS.p0))
    else:
        tl.static_assert(BIAS.tag == CUSTOM, "a bias needs a value")
        return programs.run((e, square, delta), programs.constant(BIAS.psi), 0)


@triton.jit
def slope(e, square, delta, BIAS: tl.constexpr):
    if BIAS.tag == DOT or BIAS.tag == L2:
        return 1.0
    elif BIAS.tag == L1:
        return BIAS.p0 * sech2(BIAS.p0 * e)
    elif BIAS.tag == LP:
        return (BIAS.p0 * (BIAS.p0 - 1)) * power(tl.abs(e), BIAS.p0 - 2)
    elif BIAS.tag == LP_SMOOTH:
        m = e * e + BIAS.p2
        return BIAS.p0 * power(m, (BIAS.p0 - 3) / 2) * (BIAS.p1 * sech2(BIAS.p1 * e) * m + (BIAS.p0 - 1) * tanh(BIAS.p1 * e) * e)
    elif BIAS.tag == HUBER_COORDINATE:
        return tl.where(tl.abs(e) <= delta, 1.0, 0.0)
    elif BIAS.tag == HUBER_NORM:
        return tl.where(square <= delta * delta, 1.0, delta * inverse_norm(square))
    elif BIAS.tag == HUBER_SWITCH:
        return tl.where(square <= delta * delta, 1.0, delta * BIAS.p0 * sech2(BIAS.p0 * e))
    elif BIAS.tag == ROBUST_L2:
        return 1.0 + delta * inverse_norm(square + BIAS.p0)
    else:
        tl.static_assert(BIAS.tag == CUSTOM, "a bias needs a slope")
        return programs.run((e, square, delta), programs.constant(BIAS.derivatives), 0)


@triton.jit
def slope_delta(e, square, delta, BIAS: tl.constexpr):
    if BIAS.tag == HUBER_COORDINATE:
        return tl.where(tl.abs(e) <= delta, 0.0, tl.where(e < 0, -1.0, 1.0))
    elif BIAS.tag == HUBER_NORM:
        return tl.where(square <= delta * delta, 0.0, inverse_norm(square)) * e
    elif BIAS.tag == HUBER_SWITCH:
        return tl.where(square <= delta * delta, 0.0, tanh(BIAS.p0 * e))
    elif BIAS.tag == ROBUST_L2:
        return e * inverse_norm(square + BIAS.p0)
    else:
        tl.static_assert(BIAS.tag == CUSTOM, "a bias that uses delta needs a slope_delta")
        return programs.run((e, square, delta), programs.constant(BIAS.derivatives), 2)


@triton.jit
def pull(e, square, delta, BIAS: tl.constexpr):
    if BIAS.tag == HUBER_NORM:
        r = inverse_norm(square)
        return tl.where(square <= delta * delta, 0.0, -delta * r * r * r) * e
    elif BIAS.tag == HUBER_SWITCH:  # the switch has no gradient
        return e * 0.0
    elif BIAS.tag == ROBUST_L2:
        r = inverse_norm(square + BIAS.p0)
        return -delta * r * r * r * e
    else:
        tl.static_assert(BIAS.tag == CUSTOM, "a bias that couples a row needs a pull")
        return programs.run((e, square, delta), programs.constant(BIAS.derivatives), 1)


@triton.jit
def inverse_norm(square):
    """``1 / ||e||`` from ``||e||^2``; finite at 0, where no branch reads it."""
    return 1.0 / tl.sqrt(tl.where(square == 0, 1.0, square))
