"""Small products in Triton: every layout that a compiler chooses for them is its own, not ours."""

import triton
import triton.language as tl


@triton.jit
def product(a, b, c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, A_ROWS: tl.constexpr, B_ROWS: tl.constexpr):
    """``c [M, N] = A B``; each operand lies in memory by rows, or by columns."""
    o_m, o_n, o_k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    if A_ROWS:  # noqa: SIM108  a constant
        x = tl.load(a + o_m[:, None] * K + o_k[None, :])
    else:
        x = tl.trans(tl.load(a + o_k[:, None] * M + o_m[None, :]))
    if B_ROWS:  # noqa: SIM108
        y = tl.load(b + o_k[:, None] * N + o_n[None, :])
    else:
        y = tl.trans(tl.load(b + o_n[:, None] * K + o_k[None, :]))
    tl.store(c + o_m[:, None] * N + o_n[None, :], tl.dot(x, y, input_precision="ieee"))


@triton.jit
def two_products(a, b, c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """``c [M, N] = rounded(A B) B'B``: the first product is an operand of the second, in registers."""
    o_m, o_n, o_k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    x, y = tl.load(a + o_m[:, None] * K + o_k[None, :]), tl.load(b + o_k[:, None] * N + o_n[None, :])
    left = tl.dot(x, y).to(x.dtype)  # [M, N]
    right = tl.dot(tl.trans(y), y).to(x.dtype)  # [N, N]
    tl.store(c + o_m[:, None] * N + o_n[None, :], tl.dot(left, right))


@triton.jit
def long_product(a, b, c, L, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """A loop over L keys whose loads the compiler makes asynchronous."""
    o_m, o_n, o_k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    total = tl.zeros((M, N), tl.float32)
    for k in range(0, L, K):
        x = tl.load(a + o_m[:, None] * L + k + o_k[None, :])
        y = tl.load(b + (k + o_k)[:, None] * N + o_n[None, :])
        total += tl.dot(x, y)
    tl.store(c + o_m[:, None] * N + o_n[None, :], total)
