"""The MLP memory's prediction and inner gradient of one chunk, and their backward: stages of the chains (docs/mathematics.md, section 9).

    Z = K W2';  A = gelu(Z);  U = A S1                                                                      predict
    E = K + LN(U) - V;  g = psi(E);  Gu = LN-vjp(w g)                                                       inner_gradient

    dU1 = R1 - dec (A J1);  dU2 = R2 - dec (K J2');  dGz = eta dU2;  dGu = eta dU1 + (gelu'(Z) dGz) S1      update_bwd
    (dE, dU) = vjp of the inner gradient and of the prediction at dGu                                       inner_gradient_bwd
    dA = RA - (dec U1) J1' + dU S1';  dZ = gelu'(Z) dA + gelu''(Z) Ga dGz                                   hidden_bwd

J1, J2 are the gradients of the matrices after the chunk. With momentum ``dec`` is M_C, and the gradients JS1, JS2 of the momentum matrices
enter as J1, J2 do, with Theta_C for dec.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common import bias as biases
from ..common.chunks import of_chunk
from ..common.gates import load_delta, load_gate, load_to_end
from ..common.tiles import dot, inside, load_tile, rounded, store
from .math import ROWS, gelu, gelu_curve, gelu_slope, lanes, layer_norm_vjp, normalised, row_mean


@triton.jit
def predict(
    k, predicting, p_z, p_u, p_w, stride_kt, t0, bos, eos, i_c,
    D: tl.constexpr, Hd: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr, DTYPE: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Z and U of a chunk; copies the matrices to ``p_w`` unless that is None."""
    SIZE: tl.constexpr = Hd * D
    o_c, o_d = lanes(C, i_c, 2), lanes(BD, i_c, 2)
    m_t, m_d = of_chunk(t0 + o_c, bos, eos, PART), inside(o_d, D, BD)
    b_k = load_tile(k, stride_kt, o_c, o_d, m_t, m_d)  # [C, BD]
    b_u = tl.zeros((C, BD), tl.float32)
    for i in tl.range(0, (Hd + BH - 1) // BH, disable_licm=True):
        o_h = i * BH + lanes(BH, i_c, 2)
        m_h = inside(o_h, Hd, BH)
        o_hd, m_hd = o_h[:, None] * D + o_d[None, :], m_h[:, None] & m_d[None, :]
        b_s1 = tl.load(predicting + o_hd, mask=m_hd, other=0.0)  # [BH, BD]
        b_w2 = tl.load(predicting + SIZE + o_hd, mask=m_hd, other=0.0)  # [BH, BD]
        b_z = dot(b_k, tl.trans(rounded(b_w2, DTYPE)))  # [C, BH]
        store(p_z + o_c[:, None] * Hd + o_h[None, :], b_z, m_h[None, :])
        b_u += dot(rounded(gelu(b_z), DTYPE), rounded(b_s1, DTYPE))
        if p_w is not None:
            store(p_w + o_hd, b_s1, m_hd)
            store(p_w + SIZE + o_hd, b_w2, m_hd)
    tl.store(p_u + o_c[:, None] * D + o_d[None, :], b_u, mask=m_d[None, :])


@triton.jit
def inner_gradient(
    k, v, delta, ln_weight, ln_bias, p_u, p_gu, stride_kt, stride_vt, row, H, t0, bos, eos, i_c,
    D: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, EPS: tl.constexpr, PART: tl.constexpr,
    BIAS: tl.constexpr,
):  # fmt: skip
    """Gu of a chunk, ``ROWS`` tokens at a time."""
    o_d = lanes(BD, i_c, 3)
    m_d = inside(o_d, D, BD)
    b_weight = tl.load(ln_weight + o_d, mask=m_d, other=0.0)[None, :]  # [1, BD]
    b_bias = tl.load(ln_bias + o_d, mask=m_d, other=0.0)[None, :]  # [1, BD]
    for i in tl.range(0, C // ROWS, disable_licm=True):
        o_r = i * ROWS + lanes(ROWS, i_c, 3)
        m_r = of_chunk(t0 + o_r, bos, eos, PART)
        m_rd, o_rd, o_g = m_r[:, None] & m_d[None, :], o_r[:, None] * D + o_d[None, :], o_r * H
        b_x, b_inverse = normalised(tl.load(p_u + o_rd, mask=m_d[None, :], other=0.0), m_d, D, EPS)  # [ROWS, BD]
        b_e = -load_tile(v, stride_vt, o_r, o_d, m_r, m_d).to(tl.float32)  # [ROWS, BD]
        if BIAS.reads_memory:
            b_k = load_tile(k, stride_kt, o_r, o_d, m_r, m_d).to(tl.float32)  # [ROWS, BD]
            b_e = tl.where(m_rd, b_e + b_k + b_x * b_weight + b_bias, 0.0)
        b_square = 0.0
        if BIAS.row_coupled:
            b_square = tl.sum(b_e * b_e, 1)[:, None]  # [ROWS, 1]
        b_delta = load_delta(delta, row, o_g, o_g[:, None] * D + o_d[None, :], m_r, m_rd, D, BIAS)
        b_psi = biases.value(b_e, b_square, b_delta, BIAS)
        store(p_gu + o_rd, layer_norm_vjp(b_x, b_inverse, b_psi * b_weight, m_d, D), m_d[None, :])


@triton.jit
def update_bwd(
    k, lr, decays, moves, p_memory, p_moving, p_w, p_z, p_ga, p_inner, p_sums, rows_lr, rows_to_end, rows_step,
    stride_kt, ROW, row, H, t0, eos, i_c,
    D: tl.constexpr, Hd: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """dGz in ``p_inner``; ``A J1``, ``(gelu'(Z) dGz) S1`` and ``A JS1`` in ``p_sums [3, C, D]``; dU2's share of the gates' row sums."""
    o_c, o_d = lanes(C, i_c, 1), lanes(BD, i_c, 1)
    m_t, m_d = t0 + o_c < eos, inside(o_d, D, BD)
    o_g = o_c * H
    b_lr, b_to_end = load_gate(lr, row, o_g, m_t), load_to_end(decays, ROW, row, o_g, m_t, C)  # [C]
    b_k = load_tile(k, stride_kt, o_c, o_d, m_t, m_d)  # [C, BD]
    b_aj = tl.zeros((C, BD), tl.float32)
    b_dgu = tl.zeros((C, BD), tl.float32)
    b_dlr = tl.zeros((C,), tl.float32)
    b_end_sum = tl.zeros((C,), tl.float32)
    if p_moving is not None:
        b_step = load_gate(moves + ROW, row, o_g, m_t)  # [C]
        b_ajm = tl.zeros((C, BD), tl.float32)
        b_stepped = tl.zeros((C,), tl.float32)
    for i in tl.range(0, (Hd + BH - 1) // BH, disable_licm=True):
        o_h = i * BH + lanes(BH, i_c, 1)
        m_h = inside(o_h, Hd, BH)
        o_hd, m_hd = o_h[:, None] * D + o_d[None, :], m_h[:, None] & m_d[None, :]
        o_ch = o_c[:, None] * Hd + o_h[None, :]
        b_z = tl.load(p_z + o_ch, mask=m_h[None, :], other=0.0).to(tl.float32)  # [C, BH]
        b_slope = gelu_slope(b_z)
        b_j1 = rounded(tl.load(p_memory + o_hd, mask=m_hd, other=0.0), DTYPE)  # [BH, BD]
        b_j2 = rounded(tl.load(p_memory + Hd * D + o_hd, mask=m_hd, other=0.0), DTYPE)  # [BH, BD]
        b_aj += dot(rounded(gelu(b_z), DTYPE), b_j1)
        b_kj = dot(b_k, tl.trans(b_j2))  # [C, BH]
        b_gz = tl.load(p_ga + o_ch, mask=m_h[None, :], other=0.0).to(tl.float32) * b_slope
        b_du = tl.load(p_inner + o_ch, mask=m_h[None, :], other=0.0).to(tl.float32)  # [C, BH], dU2
        if p_moving is None:
            b_kj *= b_to_end[:, None]
            b_du -= b_kj
        else:
            b_jm1 = rounded(tl.load(p_moving + o_hd, mask=m_hd, other=0.0), DTYPE)  # [BH, BD]
            b_jm2 = rounded(tl.load(p_moving + Hd * D + o_hd, mask=m_hd, other=0.0), DTYPE)  # [BH, BD]
            b_ajm += dot(rounded(gelu(b_z), DTYPE), b_jm1)
            b_kjm = dot(b_k, tl.trans(b_jm2))  # [C, BH]
            b_stepped -= tl.sum(b_kjm * b_gz, 1)
            b_du -= b_kj * b_to_end[:, None] + b_kjm * b_step[:, None]
        b_dlr += tl.sum(b_du * b_gz, 1)
        b_end_sum -= tl.sum(b_kj * b_gz, 1)
        b_dgz = b_du * b_lr[:, None]
        store(p_inner + o_ch, b_dgz, m_h[None, :])
        b_s1 = tl.load(p_w + o_hd, mask=m_hd, other=0.0)  # [BH, BD]
        b_dgu += dot(rounded(b_slope * b_dgz, DTYPE), b_s1)
    o_cd = o_c[:, None] * D + o_d[None, :]
    tl.store(p_sums + o_cd, b_aj, mask=m_d[None, :])
    tl.store(p_sums + C * D + o_cd, b_dgu, mask=m_d[None, :])
    tl.store(rows_lr + row + o_g, b_dlr, mask=m_t)
    if rows_to_end is not None:
        tl.store(rows_to_end + row + o_g, b_end_sum, mask=m_t)
    if p_moving is not None:
        tl.store(p_sums + 2 * C * D + o_cd, b_ajm, mask=m_d[None, :])
        tl.store(rows_step + row + o_g, b_stepped, mask=m_t)


@triton.jit
def inner_gradient_bwd(
    k, v, lr, decays, moves, delta, ln_weight, ln_bias, p_u, p_sums, p_updates, p_norm, p_du,
    grad_v, grad_delta, grad_layer_norm, rows_lr, rows_delta, rows_to_end, rows_step,
    stride_kt, stride_vt, ROW, row, H, t0, eos, i_c,
    D: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, EPS: tl.constexpr,
    BIAS: tl.constexpr,
):  # fmt: skip
    """Backward of ``Gu = (g - mean(g) - x mean(g o x)) / deviation``, g = psi w, to psi, x and the deviation, ``ROWS`` tokens at a time."""
    o_d = lanes(BD, i_c, 2)
    m_d = inside(o_d, D, BD)
    b_weight = tl.load(ln_weight + o_d, mask=m_d, other=0.0)[None, :]  # [1, BD]
    b_bias = tl.load(ln_bias + o_d, mask=m_d, other=0.0)[None, :]  # [1, BD]
    b_dweight = tl.load(p_norm + o_d, mask=m_d, other=0.0) + tl.load(grad_layer_norm + o_d, mask=m_d, other=0.0)  # [BD]
    b_dbias = tl.load(p_norm + D + o_d, mask=m_d, other=0.0) + tl.load(grad_layer_norm + D + o_d, mask=m_d, other=0.0)  # [BD]
    for i in tl.range(0, C // ROWS, disable_licm=True):
        o_r = i * ROWS + lanes(ROWS, i_c, 2)
        m_r = t0 + o_r < eos
        m_rd, p_rd, o_g = m_r[:, None] & m_d[None, :], o_r[:, None] * D + o_d[None, :], o_r * H
        o_rg, o_rd = row + o_g, o_r[:, None] * (H * D) + o_d[None, :]
        b_x, b_inverse = normalised(tl.load(p_u + p_rd, mask=m_d[None, :], other=0.0), m_d, D, EPS)  # [ROWS, BD]
        b_e = -load_tile(v, stride_vt, o_r, o_d, m_r, m_d).to(tl.float32)  # [ROWS, BD]
        if BIAS.reads_memory:
            b_kr = load_tile(k, stride_kt, o_r, o_d, m_r, m_d).to(tl.float32)
            b_e = tl.where(m_rd, b_e + b_kr + b_x * b_weight + b_bias, 0.0)
        b_square = 0.0
        if BIAS.row_coupled:
            b_square = tl.sum(b_e * b_e, 1)[:, None]  # [ROWS, 1]
        b_delta = load_delta(delta, row, o_g, o_rd, m_r, m_rd, D, BIAS)
        b_psi = biases.value(b_e, b_square, b_delta, BIAS)
        b_gu = layer_norm_vjp(b_x, b_inverse, b_psi * b_weight, m_d, D)  # [ROWS, BD]
        b_eta, b_dec = load_gate(lr, row, o_g, m_r), load_to_end(decays, ROW, row, o_g, m_r, ROWS)  # [ROWS]
        b_ar = tl.load(p_sums + p_rd, mask=m_d[None, :], other=0.0)  # A J1
        b_du1 = tl.load(p_updates + p_rd, mask=m_d[None, :], other=0.0).to(tl.float32)  # dU1
        if rows_step is None:
            b_ar *= b_dec[:, None]
            b_du1 -= b_ar
        else:
            b_am = tl.load(p_sums + 2 * C * D + p_rd, mask=m_d[None, :], other=0.0)  # A JS1
            b_du1 -= b_ar * b_dec[:, None] + b_am * load_gate(moves + ROW, row, o_g, m_r)[:, None]
            b_rest = tl.load(rows_step + o_rg, mask=m_r, other=0.0)
            tl.store(rows_step + o_rg, b_eta * (b_rest - tl.sum(b_am * b_gu, 1)), mask=m_r)
        tl.store(rows_lr + o_rg, tl.load(rows_lr + o_rg, mask=m_r, other=0.0) + tl.sum(b_du1 * b_gu, 1), mask=m_r)
        if rows_to_end is not None:
            b_rest = tl.load(rows_to_end + o_rg, mask=m_r, other=0.0)
            tl.store(rows_to_end + o_rg, b_eta * (b_rest - tl.sum(b_ar * b_gu, 1)), mask=m_r)
        b_g = tl.load(p_sums + C * D + p_rd, mask=m_d[None, :], other=0.0) + b_du1 * b_eta[:, None]  # dGu

        b_dx = -b_inverse * (b_g * row_mean(b_psi * b_weight * b_x, D) + b_psi * b_weight * row_mean(b_g * b_x, D))
        b_dpsi = layer_norm_vjp(b_x, b_inverse, b_g, m_d, D)
        b_dweight += tl.sum(b_dpsi * b_psi, 0)
        b_dpsi *= b_weight
        b_de = b_dpsi * biases.slope(b_e, b_square, b_delta, BIAS)  # [ROWS, BD]
        if BIAS.row_coupled:
            b_de += tl.sum(b_dpsi * biases.pull(b_e, b_square, b_delta, BIAS), 1)[:, None] * b_e
        if BIAS.delta > 0:
            b_dd = b_dpsi * biases.slope_delta(b_e, b_square, b_delta, BIAS)
            if BIAS.delta == 2:
                tl.store(grad_delta + o_rd, b_dd, mask=m_rd)
            else:
                tl.store(rows_delta + o_rg, tl.sum(b_dd, 1), mask=m_r)
        store(grad_v + o_rd, -b_de, m_rd)
        if BIAS.reads_memory:  # ... and of the prediction K + x w + b
            b_dx += b_de * b_weight
            b_dweight += tl.sum(b_de * b_x, 0)
            b_dbias += tl.sum(b_de, 0)
        b_ds = layer_norm_vjp(b_x, b_inverse, b_dx, m_d, D) - b_inverse * b_x * row_mean(b_g * b_gu, D)  # dU
        store(p_du + p_rd, b_ds, m_d[None, :])
    tl.store(grad_layer_norm + o_d, b_dweight, mask=m_d)
    tl.store(grad_layer_norm + D + o_d, b_dbias, mask=m_d)


@triton.jit
def hidden_bwd(
    lr, decays, moves, p_memory, p_moving, p_w, p_z, p_ga, p_inner, p_hidden, p_gu, p_du, ROW, row, H, t0, eos, i_c,
    D: tl.constexpr, Hd: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """dZ in ``p_hidden``; returns ``<J1, W1'>``."""
    o_c, o_d = lanes(C, i_c, 3), lanes(BD, i_c, 3)
    m_t, m_d = t0 + o_c < eos, inside(o_d, D, BD)
    o_g, o_cd = o_c * H, o_c[:, None] * D + o_d[None, :]
    b_lr, b_to_end = load_gate(lr, row, o_g, m_t), load_to_end(decays, ROW, row, o_g, m_t, C)  # [C]
    b_gu = tl.load(p_gu + o_cd, mask=m_d[None, :], other=0.0)  # [C, BD]
    b_u1_end = rounded(b_gu.to(tl.float32) * (b_lr * b_to_end)[:, None], DTYPE)  # [C, BD]
    if p_moving is not None:
        b_step = b_lr * load_gate(moves + ROW, row, o_g, m_t)  # [C]
        b_u1_step = rounded(b_gu.to(tl.float32) * b_step[:, None], DTYPE)  # [C, BD]
    b_du = tl.load(p_du + o_cd, mask=m_d[None, :], other=0.0)  # [C, BD]
    product = 0.0
    for i in tl.range(0, (Hd + BH - 1) // BH, disable_licm=True):
        o_h = i * BH + lanes(BH, i_c, 3)
        m_h = inside(o_h, Hd, BH)
        o_hd, m_hd = o_h[:, None] * D + o_d[None, :], m_h[:, None] & m_d[None, :]
        o_ch = o_c[:, None] * Hd + o_h[None, :]
        b_j = tl.load(p_memory + o_hd, mask=m_hd, other=0.0)  # [BH, BD]
        b_s1 = tl.load(p_w + o_hd, mask=m_hd, other=0.0)  # [BH, BD]
        product += tl.sum(b_j * b_s1.to(tl.float32))
        b_da = tl.load(p_hidden + o_ch, mask=m_h[None, :], other=0.0).to(tl.float32)
        b_da += dot(b_du, tl.trans(b_s1)) - dot(b_u1_end, tl.trans(rounded(b_j, DTYPE)))  # [C, BH]
        if p_moving is not None:
            b_jm = rounded(tl.load(p_moving + o_hd, mask=m_hd, other=0.0), DTYPE)  # [BH, BD]
            b_da -= dot(b_u1_step, tl.trans(b_jm))
        b_z = tl.load(p_z + o_ch, mask=m_h[None, :], other=0.0).to(tl.float32)  # [C, BH]
        b_dgz = tl.load(p_inner + o_ch, mask=m_h[None, :], other=0.0).to(tl.float32)  # [C, BH]
        b_ga = tl.load(p_ga + o_ch, mask=m_h[None, :], other=0.0).to(tl.float32)  # [C, BH]
        store(p_hidden + o_ch, gelu_slope(b_z) * b_da + gelu_curve(b_z) * b_ga * b_dgz, m_h[None, :])
    return product
