"""Retention gates on the device: the mirror map phi from a dual A to its primal W, the scale rho of a chunk's own writes, derivatives.

Value and derivative of a gate stand side by side, chosen by the constexpr integer ``RETENTION``: the tags, the parameters ``R0, R1``
and the equations are those of ``python/miras_kernels/tables/retention.py`` and ``csrc/retention.h``. The kernels know no gate, only what it
couples: every entry by itself, the rows of A (``ROWS``), or the whole matrix (``ENTIRE``):

    term(a, shift)               a summand of ``total``, the sum that the gate couples by: over a row or the whole matrix
    floor()                      what ``total`` starts from
    scale(total)                 rho
    primal(a, shift, total)      W = phi(A)
    pull(g, a, w, along, rho)    phi'(A)^T G: the gradient of A, for the gradient G of W
    along(g, a, w)               a summand of ``along``, a sum over the same entries that ``pull`` needs

``shift`` is the row's maximum (only read by gates that couple rows), so that no exponential overflows. Where rho depends on A its own
gradient d rho belongs to ``along`` as well: dA = pull(G, A, W, sum along + d rho, rho). Sums may have any shape that broadcasts against the
tiles; which axis of a tile is a row is the kernel's affair. phi(0) need not be 0: padding is masked wherever W is summed or kept.

Adding a gate: docs/adding-a-gate.md.
"""

import triton.language as tl

import triton

from . import bias as biases

L2 = tl.constexpr(0)
LQ = tl.constexpr(1)
KL = tl.constexpr(2)
ELASTIC = tl.constexpr(3)
SIGMOID = tl.constexpr(4)

#: the gates that couple the rows of A, and those that couple all of it
ROWS = tl.constexpr(2)
ENTIRE = tl.constexpr(1)
#: below any dual, and finite: what a masked entry counts as in a row's maximum
BOTTOM = tl.constexpr(-3.0e38)


@triton.jit
def power(x, EXPONENT: tl.constexpr):
    """``x^EXPONENT`` for x >= 0 (x > 0 where it is negative), by products where that is exact."""
    if EXPONENT == 3.0:
        return x * x * x
    elif EXPONENT == 4.0:
        return (x * x) * (x * x)
    elif EXPONENT == -0.5:
        return 1.0 / tl.sqrt(x)
    else:
        return biases.power(x, EXPONENT)


@triton.jit
def term(a, shift, RETENTION: tl.constexpr, R0: tl.constexpr, R1: tl.constexpr):
    if RETENTION == LQ:
        return power(tl.abs(a), R0)
    else:
        tl.static_assert(RETENTION == KL, "a gate that couples entries, without the sum")
        return tl.exp(a - shift)


@triton.jit
def floor(RETENTION: tl.constexpr, R0: tl.constexpr, R1: tl.constexpr):
    if RETENTION == LQ:
        return R1**R0
    else:
        return 0.0


@triton.jit
def scale(total, RETENTION: tl.constexpr, R0: tl.constexpr, R1: tl.constexpr):
    if RETENTION == LQ:
        return power(total, (2.0 - R0) / R0)
    else:
        return total * 0.0 + 1.0


@triton.jit
def primal(a, shift, total, RETENTION: tl.constexpr, R0: tl.constexpr, R1: tl.constexpr):
    if RETENTION == L2:
        return a
    elif RETENTION == LQ:
        return a * scale(total, RETENTION, R0, R1)
    elif RETENTION == KL:
        return tl.exp(a - shift) * (R0 / total)
    elif RETENTION == ELASTIC:
        return tl.where(a > R0, a - R0, tl.where(a < -R0, a + R0, a * 0.0))
    else:
        tl.static_assert(RETENTION == SIGMOID, "a gate without a mirror map")
        return sigmoid(a)


@triton.jit
def along(g, a, w, RETENTION: tl.constexpr):
    if RETENTION == LQ:
        return g * a
    else:
        tl.static_assert(RETENTION == KL, "a gate that couples entries, without the sum of its derivative")
        return g * w


@triton.jit
def pull(g, a, w, along, rho, RETENTION: tl.constexpr, R0: tl.constexpr, R1: tl.constexpr):
    if RETENTION == L2:
        return g
    elif RETENTION == LQ:
        if R0 == 2.0:
            return g
        else:  # (q - 2) rho / total, total from rho
            slope = (R0 - 2.0) * power(rho, 2.0 * (R0 - 1.0) / (R0 - 2.0))
            return rho * g - (slope * along) * power(tl.abs(a), R0 - 1.0) * tl.where(a < 0, -1.0, 1.0)
    elif RETENTION == KL:
        return w * (g - along / R0)
    elif RETENTION == ELASTIC:
        return tl.where(tl.abs(a) > R0, g, 0.0)
    else:
        tl.static_assert(RETENTION == SIGMOID, "a gate without a derivative")
        return g * sigmoid(a) * sigmoid(-a)


@triton.jit
def sigmoid(a):
    """1 / (1 + exp(-a)) from the exponential that cannot overflow."""
    t = tl.exp(-tl.abs(a))
    return tl.where(a < 0, t, 1.0) / (1.0 + t)
