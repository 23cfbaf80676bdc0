"""Elementary functions of tiles, and their derivatives."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """tanh, accurate to a few units in the last place: a polynomial near 0, where the closed form cancels."""
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
    """``x^EXPONENT`` for x >= 0; 0^EXPONENT is 0, and 1 for EXPONENT = 0. NaN stays NaN."""
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
