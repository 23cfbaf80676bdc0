"""Retention gates on the device: the mirror map phi from a dual A to its primal W, the scale rho of a chunk's own writes, derivatives.

The value and the derivative of a gate stand side by side, chosen by ``RETENTION.tag``: tags, parameters ``r0, r1`` and equations are
those of ``python/miras_kernels/tables/retention.py`` and ``csrc/retention.h``. Kernels never compare tags; they ask for the traits in
:class:`Retention`, which say whether a gate couples the entries of a row, those of the whole matrix, or none:

    primal(a, shift, total)      W = phi(A);  total = floor() + sum of term over the row or the matrix
    term(a, shift)               a summand of ``total``
    floor()                      the initial value of ``total``
    scale(total)                 rho
    pull(g, a, w, along, rho)    phi'(A)^T G: the gradient of A for the gradient G of W;  along = d rho + sum of along over the same entries
    along(g, a, w)               a summand of ``along``

``shift`` is the row's maximum (read only by gates that couple rows), so that no exponential overflows. Sums may have any shape that
broadcasts against the tiles, and the kernel decides which axis of a tile is a row. phi(0) need not be 0: padding is masked wherever W is
summed or stored.

Adding a gate: docs/adding-a-gate.md.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import triton
import triton.language as tl

from . import elementary, programs

L2 = tl.constexpr(0)
LQ = tl.constexpr(1)
KL = tl.constexpr(2)
ELASTIC = tl.constexpr(3)
SIGMOID = tl.constexpr(4)
CUSTOM = tl.constexpr(5)

#: below any dual, and finite: stands for masked entries in a row's maximum
BOTTOM = tl.constexpr(-3.0e38)


class Retention(NamedTuple):
    """A retention gate as the kernels take it: one constant, ``RETENTION``."""

    tag: int
    r0: float
    r1: float
    is_identity: bool  # phi(A) = A: no separate primal
    row_coupled: bool  # an entry of W depends on its row of A
    matrix_coupled: bool  # ... on the whole matrix
    has_rho: bool  # rho is not 1
    is_offset: bool  # phi(0) is not 0 although no entries are coupled: all of W may lie near one value

    phi: str = ""  # of a CustomRetention: its mirror map, as text (programs.py)
    slope: str = ""  # ... and its derivative

    @staticmethod
    @functools.lru_cache(256)
    def of(gate) -> Retention:
        """From a row of tables/retention.py."""
        traits = (gate.is_identity, gate.row_coupled, gate.matrix_coupled, gate.has_rho, gate.is_offset)
        texts = () if gate.tag != CUSTOM.value else map(programs.text_of, (gate.programs.primal, gate.programs.slope))
        return Retention(gate.tag, *gate.padded, *traits, *texts)


@triton.jit
def power(x, EXPONENT: tl.constexpr):
    """``x^EXPONENT`` for x >= 0 (x > 0 if the exponent is negative)."""
    if EXPONENT == 3.0:
        return x * x * x
    elif EXPONENT == 4.0:
        return (x * x) * (x * x)
    elif EXPONENT == -0.5:
        return 1.0 / tl.sqrt(x)
    else:
        return elementary.power(x, EXPONENT)


@triton.jit
def term(a, shift, RETENTION: tl.constexpr):
    if RETENTION.tag == LQ:
        return power(tl.abs(a), RETENTION.r0)
    else:
        tl.static_assert(RETENTION.tag == KL, "a gate that couples entries needs a term")
        return tl.exp(a - shift)


@triton.jit
def floor(RETENTION: tl.constexpr):
    if RETENTION.tag == LQ:
        return RETENTION.r1**RETENTION.r0
    else:
        return 0.0


@triton.jit
def scale(total, RETENTION: tl.constexpr):
    if RETENTION.tag == LQ:
        return power(total, (2.0 - RETENTION.r0) / RETENTION.r0)
    else:
        return total * 0.0 + 1.0


@triton.jit
def primal(a, shift, total, RETENTION: tl.constexpr):
    if RETENTION.tag == L2:
        return a
    elif RETENTION.tag == LQ:
        return a * scale(total, RETENTION)
    elif RETENTION.tag == KL:
        return tl.exp(a - shift) * (RETENTION.r0 / total)
    elif RETENTION.tag == ELASTIC:
        return tl.where(a > RETENTION.r0, a - RETENTION.r0, tl.where(a < -RETENTION.r0, a + RETENTION.r0, a * 0.0))
    elif RETENTION.tag == SIGMOID:
        return sigmoid(a)
    else:
        tl.static_assert(RETENTION.tag == CUSTOM, "a gate needs a mirror map")
        return programs.run((a,), programs.constant(RETENTION.phi), 0)


@triton.jit
def along(g, a, w, RETENTION: tl.constexpr):
    if RETENTION.tag == LQ:
        return g * a
    else:
        tl.static_assert(RETENTION.tag == KL, "a gate that couples entries needs a summand of its derivative")
        return g * w


@triton.jit
def pull(g, a, w, along, rho, RETENTION: tl.constexpr):
    if RETENTION.tag == L2:
        return g
    elif RETENTION.tag == LQ:
        if RETENTION.r0 == 2.0:
            return g
        else:  # (q - 2) rho / total, total from rho
            slope = (RETENTION.r0 - 2.0) * power(rho, 2.0 * (RETENTION.r0 - 1.0) / (RETENTION.r0 - 2.0))
            return rho * g - (slope * along) * power(tl.abs(a), RETENTION.r0 - 1.0) * tl.where(a < 0, -1.0, 1.0)
    elif RETENTION.tag == KL:
        return w * (g - along / RETENTION.r0)
    elif RETENTION.tag == ELASTIC:
        return tl.where(tl.abs(a) > RETENTION.r0, g, 0.0)
    elif RETENTION.tag == SIGMOID:
        return g * sigmoid(a) * sigmoid(-a)
    else:
        tl.static_assert(RETENTION.tag == CUSTOM, "a gate needs a derivative")
        return g * programs.run((a,), programs.constant(RETENTION.slope), 0)


@triton.jit
def sigmoid(a):
    """``1 / (1 + exp(-a))``, without an exponential that overflows."""
    t = tl.exp(-tl.abs(a))
    return tl.where(a < 0, t, 1.0) / (1.0 + t)
