"""gelu in its tanh form and LayerNorm, with the derivatives that the MLP memory's inner gradient and its backward need."""

import triton
import triton.language as tl

TWICE_ROOT = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)
CUBIC = tl.constexpr(0.044715)
#: tokens per block of LayerNorm
ROWS = tl.constexpr(16)


@triton.jit
def lanes(N: tl.constexpr, i_c, STAGE: tl.constexpr):
    """``0 ... N - 1``, for one stage of chunk ``i_c``.

    Adds a zero that the compiler cannot fold (``i_c`` is below ``chunks`` of tables/memories.py), a different one in every stage.
    Otherwise it would keep offsets, addresses and masks in registers from one stage or chunk to the next, and spill.
    """
    return tl.arange(0, N) + (i_c >> (30 - STAGE)) * 1024


@triton.jit
def sigmoid_of_gelu(x):
    """``s`` with gelu(x) = x s: the logistic function of ``y = 2 sqrt(2/pi) (x + 0.044715 x^3)``."""
    return 1.0 / (1.0 + tl.exp(tl.minimum(-x * (1.0 + x * x * CUBIC) * TWICE_ROOT, 80.0)))


@triton.jit
def gelu(x):
    return x * sigmoid_of_gelu(x)


@triton.jit
def gelu_slope(x):
    """gelu'"""
    s = sigmoid_of_gelu(x)
    return s + x * s * (1.0 - s) * (1.0 + x * x * (3.0 * CUBIC)) * TWICE_ROOT


@triton.jit
def gelu_curve(x):
    """gelu''"""
    s = sigmoid_of_gelu(x)
    y1, y2 = (1.0 + x * x * (3.0 * CUBIC)) * TWICE_ROOT, x * (6.0 * CUBIC * TWICE_ROOT)
    return s * (1.0 - s) * (2.0 * y1 + x * ((1.0 - 2.0 * s) * y1 * y1 + y2))


@triton.jit
def row_mean(x, D: tl.constexpr):
    """``[C, 1]``: the mean of each row; padding must be zero."""
    return (tl.sum(x, 1) / D)[:, None]


@triton.jit
def normalised(u, m_d, D: tl.constexpr, EPS: tl.constexpr):
    """``(x [C, BD], 1 / deviation [C, 1])`` of LayerNorm over the D channels that ``m_d`` marks."""
    centred = tl.where(m_d[None, :], u - row_mean(u, D), 0.0)
    inverse = 1.0 / tl.sqrt(row_mean(centred * centred, D) + EPS)
    return centred * inverse, inverse


@triton.jit
def layer_norm_vjp(x, inverse, grad, m_d, D: tl.constexpr):
    """Input gradient of LayerNorm without its affine part, for the gradient of its output ``x``. Linear and symmetric in ``grad``."""
    return tl.where(m_d[None, :], inverse * (grad - row_mean(grad, D) - x * row_mean(grad * x, D)), 0.0)


@triton.jit
def crossing(b_pairs, o_c):
    """``[C]``: at s the sum of all pairs of a read after s and a write up to s."""
    return tl.sum(tl.where(o_c[:, None] > o_c[None, :], tl.cumsum(b_pairs, 1), 0.0), 0)
