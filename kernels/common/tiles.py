"""Loads, products and stores of tiles; the legend of names and dimensions is in kernels/README.md."""

import triton
import triton.language as tl

#: arguments that depend on lengths or the batch: kernels are not specialised to their values
LENGTHS = ("T", "t", "CHUNKS", "SEGMENTS", "EVERY", "SLOTS", "READ_ROWS", "END_ROWS")
#: the interpreter has no bfloat16 arithmetic: there a bfloat16 operand is a float32 tile of bfloat16 numbers
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def wide(x):
    """An integer argument as int64: Triton passes it as int32 where it fits, and its products would wrap."""
    return tl.cast(x, tl.int64)


@triton.jit
def trips(N: tl.constexpr, H):
    """``N`` where the compiler cannot know it, so that it does not unroll a loop and keep all iterations' tiles in registers."""
    return N + (H >> 31)


@triton.jit
def inside(o, D: tl.constexpr, BLOCK: tl.constexpr):
    """Mask of the offsets below D; constant where whole tiles cover it."""
    if D % BLOCK == 0:
        return tl.full((BLOCK,), True, tl.int1)
    else:
        return o < D


@triton.jit
def only_if(condition, mask):
    """``mask`` if a scalar condition holds, else all False. (Triton 3.9's interpreter makes ``mask & condition`` int32.)"""
    return tl.where(condition, mask, False)


@triton.jit
def load_tile(x, stride, o_r, o_c, m_r, m_c):
    """Rows ``o_r`` and columns ``o_c`` of a matrix with row stride ``stride``; 0 outside the masks."""
    return tl.load(x + o_r[:, None] * stride + o_c[None, :], mask=m_r[:, None] & m_c[None, :], other=0.0)


@triton.jit
def store(pointers, x, mask):
    """Store a float32 tile in the pointers' dtype, rounded to nearest even."""
    tl.store(pointers, rounded(x, pointers.dtype.element_ty).to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """``x`` in the dtype of the operands, rounded to nearest even."""
    if INTERPRETED and DTYPE == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        return bits.to(tl.float32, bitcast=True)
    else:
        return x.to(DTYPE)


@triton.jit
def dot(x, y):
    """``x @ y`` with float32 accumulation: tensor cores for 16-bit operands, plain float32 for float32 ones."""
    if INTERPRETED:
        return tl.dot(x.to(tl.float32), y.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(x, y, input_precision="ieee")


@triton.jit
def fitted(x, DTYPE: tl.constexpr):
    """``(x / scale in the dtype of the operands, scale)``: scale is a power of two, and 1 unless the tile exceeds float16's range."""
    if DTYPE == tl.float16:
        exponent = (tl.max(tl.abs(x)).to(tl.int32, bitcast=True) >> 23) - 127
        more = tl.maximum(exponent - 14, 0)  # scale is 1 for numbers below 2^15
        return (x * ((127 - more) << 23).to(tl.float32, bitcast=True)).to(DTYPE), ((127 + more) << 23).to(tl.float32, bitcast=True)
    else:
        return rounded(x, DTYPE), 1.0


@triton.jit
def fitted_dot(x, y, DTYPE: tl.constexpr):
    """``x @ y`` in the dtype of the operands, with y in float32."""
    if DTYPE == tl.float16:
        b_y, scale = fitted(y, DTYPE)
        return dot(x, b_y) * scale
    else:
        return dot(x, rounded(y, DTYPE))


@triton.jit
def split_dot(x, y, DTYPE: tl.constexpr):
    """``x @ y`` with x in float32 and y in the dtype of the operands. At 16 bits x is taken in two parts and loses about 2^-16."""
    if DTYPE == tl.float32:
        return dot(x, y)
    else:
        b_high, scale = fitted(x, DTYPE)
        b_low = rounded(x * (1.0 / scale) - b_high.to(tl.float32), DTYPE)
        return (dot(b_low, y) + dot(b_high, y)) * scale


@triton.jit
def pair_products(
    x, stride_x, o_x, m_x, y, stride_y, o_y, m_y, BC: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """``X Y' [BC, BC]``, float32, of rows of two matrices with ``D`` columns, ``BLOCK`` of them at a time."""
    b_xy = tl.zeros((BC, BC), tl.float32)
    for i in range(0, (D + BLOCK - 1) // BLOCK):
        o_d = i * BLOCK + tl.arange(0, BLOCK)
        m_d = inside(o_d, D, BLOCK)
        b_x = load_tile(x, stride_x, o_x, o_d, m_x, m_d)  # [BC, BLOCK]
        b_y = load_tile(y, stride_y, o_y, o_d, m_y, m_d)  # [BC, BLOCK]
        b_xy += dot(b_x, tl.trans(b_y))
    return b_xy
