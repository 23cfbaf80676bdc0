"""Attentional biases on the device: psi(e), the gradient of the inner loss in the prediction, and its derivatives.

Value and derivatives of a bias stand side by side, chosen by the constexpr integer ``BIAS``: the names and numbers of the tags, the
parameters ``P0, P1, P2`` and the equations are those of ``python/miras_kernels/tables/biases.py`` and ``csrc/bias.h``. The kernels know no bias:

    value(e, square, delta)         psi(e)
    slope(e, square, delta)         the diagonal part of d psi / d e
    slope_delta(e, square, delta)   d psi / d delta
    pull(square, delta)             d psi / d e = diag(slope) + pull e e'         (for biases that couple a row)

so that, for an incoming y:  dE = slope y + pull (e . y) e,  d delta = sum slope_delta y.
The last three broadcast against ``e [C, BV]``; ``square [C, 1]`` is ``||e||^2`` over the whole row (only read by biases that couple it);
``delta [C, 1]`` or ``[C, BV]``. psi(0) = 0 for all of them: padding stays zero. NaN stays NaN: comparisons must leave it, and tl.minimum
and tl.maximum drop it unless told not to.

Adding a bias: docs/adding-a-bias.md.
"""

import triton.language as tl

import triton

DOT = tl.constexpr(0)
L2 = tl.constexpr(1)
L1 = tl.constexpr(2)
LP = tl.constexpr(3)
LP_SMOOTH = tl.constexpr(4)
HUBER_COORDINATE = tl.constexpr(5)
HUBER_NORM = tl.constexpr(6)
HUBER_SWITCH = tl.constexpr(7)
ROBUST_L2 = tl.constexpr(8)


@triton.jit
def tanh(x):
    """tanh to a few units in the last place: a polynomial near 0, where the other form cancels."""
    t = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - t) / (1.0 + t)
    y = x * x
    near = 1.0 + y * (-0.33333333 + y * (0.13333333 + y * -0.053968254))
    return tl.where(tl.abs(x) < 0.2, x * near, tl.where(x < 0, -far, far))


@triton.jit
def sech2(x):
    """1 - tanh^2 without cancellation."""
    t = tl.exp(-2.0 * tl.abs(x))
    return 4.0 * t / ((1.0 + t) * (1.0 + t))


@triton.jit
def power(x, EXPONENT: tl.constexpr):
    """``x^EXPONENT`` for x >= 0; 0^EXPONENT is 0, and 1 for EXPONENT = 0. That of NaN is NaN."""
    if EXPONENT == 0.0:
        return tl.where(x == x, 1.0, x)
    elif EXPONENT == 0.5:
        return tl.sqrt(x)
    elif EXPONENT == 1.0:
        return x
    elif EXPONENT == 2.0:
        return x * x
    else:
        return tl.where(x > 0, tl.exp2(EXPONENT * tl.log2(tl.where(x > 0, x, 1.0))), x * 0.0)


@triton.jit
def value(e, square, delta, BIAS: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr):
    if BIAS == DOT or BIAS == L2:  # for the dot product the kernels pass e = -v
        return e
    elif BIAS == L1:
        return tanh(P0 * e)
    elif BIAS == LP:
        return P0 * power(tl.abs(e), P0 - 1) * tl.where(e < 0, -1.0, 1.0)
    elif BIAS == LP_SMOOTH:
        return P0 * tanh(P1 * e) * power(e * e + P2, (P0 - 1) / 2)
    elif BIAS == HUBER_COORDINATE:
        return tl.maximum(tl.minimum(e, delta, propagate_nan=tl.PropagateNan.ALL), -delta, propagate_nan=tl.PropagateNan.ALL)
    elif BIAS == HUBER_NORM:
        return e * tl.where(square <= delta * delta, 1.0, delta * inverse_norm(square))
    elif BIAS == HUBER_SWITCH:
        return tl.where(square <= delta * delta, e, delta * tanh(P0 * e))
    else:
        tl.static_assert(BIAS == ROBUST_L2, "a bias without a value")
        return e * (1.0 + delta * inverse_norm(square + P0))


@triton.jit
def slope(e, square, delta, BIAS: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr):
    if BIAS == DOT or BIAS == L2:
        return 1.0
    elif BIAS == L1:
        return P0 * sech2(P0 * e)
    elif BIAS == LP:
        return (P0 * (P0 - 1)) * power(tl.abs(e), P0 - 2)
    elif BIAS == LP_SMOOTH:
        m = e * e + P2
        return P0 * power(m, (P0 - 3) / 2) * (P1 * sech2(P1 * e) * m + (P0 - 1) * tanh(P1 * e) * e)
    elif BIAS == HUBER_COORDINATE:
        return tl.where(tl.abs(e) <= delta, 1.0, 0.0)
    elif BIAS == HUBER_NORM:
        return tl.where(square <= delta * delta, 1.0, delta * inverse_norm(square))
    elif BIAS == HUBER_SWITCH:
        return tl.where(square <= delta * delta, 1.0, delta * P0 * sech2(P0 * e))
    else:
        tl.static_assert(BIAS == ROBUST_L2, "a bias without a slope")
        return 1.0 + delta * inverse_norm(square + P0)


@triton.jit
def slope_delta(e, square, delta, BIAS: tl.constexpr, P0: tl.constexpr):
    if BIAS == HUBER_COORDINATE:
        return tl.where(tl.abs(e) <= delta, 0.0, tl.where(e < 0, -1.0, 1.0))
    elif BIAS == HUBER_NORM:
        return tl.where(square <= delta * delta, 0.0, inverse_norm(square)) * e
    elif BIAS == HUBER_SWITCH:
        return tl.where(square <= delta * delta, 0.0, tanh(P0 * e))
    else:
        tl.static_assert(BIAS == ROBUST_L2, "a bias that uses delta, without its derivative")
        return e * inverse_norm(square + P0)


@triton.jit
def pull(square, delta, BIAS: tl.constexpr, P0: tl.constexpr):
    if BIAS == HUBER_NORM:
        r = inverse_norm(square)
        return tl.where(square <= delta * delta, 0.0, -delta * r * r * r)
    elif BIAS == HUBER_SWITCH:  # the switch itself has no gradient
        return square * 0.0
    else:
        tl.static_assert(BIAS == ROBUST_L2, "a bias that couples a row, without its pull")
        r = inverse_norm(square + P0)
        return -delta * r * r * r


@triton.jit
def inverse_norm(square):
    """``1 / ||e||`` from ``||e||^2``; finite at 0, where no branch reads it."""
    return 1.0 / tl.sqrt(tl.where(square == 0, 1.0, square))
