"""The MLP memory backward's chain, the last chunk first (mlp_bwd.py has what comes before). J1, J2: gradients of what a chunk leaves.

    dU1 = R1 - dec (A J1);  dU2 = R2 - dec (K J2');  dGz = eta dU2;  dGu = eta dU1 + (gelu'(Z) dGz) S1     ask_update
    (dE, dU) = vjp of the inner gradient and of the prediction for dGu                                   through_rows
    dA = RA - (dec U1) J1' + dU S1';  dZ = gelu'(Z) dA + gelu''(Z) Ga dGz                                ask_hidden
    J1 <- gamma_C J1 + Aq' (gamma dUq) + (gelu'(Z) dGz)' Gu + A' dU                                      carry_first
    dK = N2' Q + dE + dZ W2 - (dec U2) J2;  J2 <- gamma_C J2 + (gamma dZq)' Q + dZ' K                    carry_second

Without a retention gate J1 and J2 gain the gradient of the matrices as it is. With one it is gathered in ``grad_primal``, and they gain
``phi'(A)'`` of it and what d rho asks (pull_back). With momentum ``dec`` is M_C; the gradients JS1, JS2 of the momenta ask of U what J1, J2
do, with Theta_C for dec; and

    JS1 <- b_C J1 + pi_C JS1 + rho1 Aq' (b dUq);   JS2 <- b_C J2 + pi_C JS2 + rho2 (b dZq)' Q
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import bias as biases
from . import retention as retentions
from .chunks import sequence_of, slot_of
from .gates import CARRY, load_delta, load_gamma, load_gate, load_to_end, load_total
from .mlp_math import ROWS, gelu, gelu_curve, gelu_slope, lanes, layer_norm_vjp, normalised, row_mean
from .tiles import LENGTHS, dot, inside, load_tile, rounded, store


@triton.jit
def inner_products(p_memory, p_duals, p_moving, p_momenta, i_c, D: tl.constexpr, Hd: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr):
    """``<J, A>, <J, S>, <JS, S>`` of both matrices, with the duals and momenta before the chunk; 0 without momenta."""
    o_d = lanes(BD, i_c, 0)
    m_d = inside(o_d, D, BD)
    product, product_carry, product_pi = 0.0, 0.0, 0.0
    for i in tl.range(0, (Hd + BH - 1) // BH, disable_licm=True):
        o_h = i * BH + lanes(BH, i_c, 0)
        o_hd, m_hd = o_h[:, None] * D + o_d[None, :], inside(o_h, Hd, BH)[:, None] & m_d[None, :]
        for matrix in tl.static_range(2):
            b_j = tl.load(p_memory + matrix * Hd * D + o_hd, mask=m_hd, other=0.0)  # [BH, BD]
            product += tl.sum(b_j * tl.load(p_duals + matrix * Hd * D + o_hd, mask=m_hd, other=0.0).to(tl.float32))
            if p_moving is not None:
                b_m = tl.load(p_momenta + matrix * Hd * D + o_hd, mask=m_hd, other=0.0).to(tl.float32)  # [BH, BD]
                product_carry += tl.sum(b_j * b_m)
                product_pi += tl.sum(tl.load(p_moving + matrix * Hd * D + o_hd, mask=m_hd, other=0.0) * b_m)
    return product, product_carry, product_pi


@triton.jit
def ask_update(
    k, lr, decays, moves, p_memory, p_moving, p_w, p_z, p_ga, p_inner, p_sums, rows_lr, rows_kept, rows_step,
    stride_kt, ROW, row, H, t0, eos, i_c,
    D: tl.constexpr, Hd: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """dGz in ``p_inner``; ``A J1``, ``(gelu'(Z) dGz) S1`` and ``A JS1`` in ``p_sums [3, C, D]``; what dU2 adds to the rows of gates."""
    o_c, o_d = lanes(C, i_c, 1), lanes(BD, i_c, 1)
    m_t, m_d = t0 + o_c < eos, inside(o_d, D, BD)
    o_g = o_c * H
    b_lr, b_to_end = load_gate(lr, row, o_g, m_t), load_to_end(decays, ROW, row, o_g, m_t, C)  # [C]
    b_k = load_tile(k, stride_kt, o_c, o_d, m_t, m_d)  # [C, BD]
    b_aj = tl.zeros((C, BD), tl.float32)
    b_dgu = tl.zeros((C, BD), tl.float32)
    b_dlr = tl.zeros((C,), tl.float32)
    b_kept = tl.zeros((C,), tl.float32)
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
        b_kept -= tl.sum(b_kj * b_gz, 1)
        b_dgz = b_du * b_lr[:, None]
        store(p_inner + o_ch, b_dgz, m_h[None, :])
        b_s1 = tl.load(p_w + o_hd, mask=m_hd, other=0.0)  # [BH, BD]
        b_dgu += dot(rounded(b_slope * b_dgz, DTYPE), b_s1)
    o_cd = o_c[:, None] * D + o_d[None, :]
    tl.store(p_sums + o_cd, b_aj, mask=m_d[None, :])
    tl.store(p_sums + C * D + o_cd, b_dgu, mask=m_d[None, :])
    tl.store(rows_lr + row + o_g, b_dlr, mask=m_t)
    if rows_kept is not None:
        tl.store(rows_kept + row + o_g, b_kept, mask=m_t)
    if p_moving is not None:
        tl.store(p_sums + 2 * C * D + o_cd, b_ajm, mask=m_d[None, :])
        tl.store(rows_step + row + o_g, b_stepped, mask=m_t)


@triton.jit
def through_rows(
    k, v, lr, decays, moves, delta, ln_weight, ln_bias, p_u, p_sums, p_updates, p_norm, p_du,
    grad_v, grad_delta, grad_layer_norm, rows_lr, rows_delta, rows_kept, rows_step,
    stride_kt, stride_vt, ROW, row, H, t0, eos, i_c,
    D: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, EPS: tl.constexpr,
    BIAS: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
    READS: tl.constexpr, COUPLED: tl.constexpr, DELTA: tl.constexpr,
):  # fmt: skip
    """Through ``Gu = (g - mean(g) - x mean(g o x)) / deviation``, g = psi w, to psi, x and the deviation; ``ROWS`` tokens at a time."""
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
        if READS:
            b_kr = load_tile(k, stride_kt, o_r, o_d, m_r, m_d).to(tl.float32)
            b_e = tl.where(m_rd, b_e + b_kr + b_x * b_weight + b_bias, 0.0)
        b_square = 0.0
        if COUPLED:
            b_square = tl.sum(b_e * b_e, 1)[:, None]  # [ROWS, 1]
        b_delta = load_delta(delta, row, o_g, o_rd, m_r, m_rd, D, DELTA)
        b_psi = biases.value(b_e, b_square, b_delta, BIAS, P0, P1, P2)
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
        if rows_kept is not None:
            b_rest = tl.load(rows_kept + o_rg, mask=m_r, other=0.0)
            tl.store(rows_kept + o_rg, b_eta * (b_rest - tl.sum(b_ar * b_gu, 1)), mask=m_r)
        b_g = tl.load(p_sums + C * D + p_rd, mask=m_d[None, :], other=0.0) + b_du1 * b_eta[:, None]  # dGu

        b_dx = -b_inverse * (b_g * row_mean(b_psi * b_weight * b_x, D) + b_psi * b_weight * row_mean(b_g * b_x, D))
        b_dpsi = layer_norm_vjp(b_x, b_inverse, b_g, m_d, D)
        b_dweight += tl.sum(b_dpsi * b_psi, 0)
        b_dpsi *= b_weight
        b_de = b_dpsi * biases.slope(b_e, b_square, b_delta, BIAS, P0, P1, P2)  # [ROWS, BD]
        if COUPLED:
            b_de += biases.pull(b_square, b_delta, BIAS, P0) * tl.sum(b_dpsi * b_e, 1)[:, None] * b_e
        if DELTA > 0:
            b_dd = b_dpsi * biases.slope_delta(b_e, b_square, b_delta, BIAS, P0)
            if DELTA == 2:
                tl.store(grad_delta + o_rd, b_dd, mask=m_rd)
            else:
                tl.store(rows_delta + o_rg, tl.sum(b_dd, 1), mask=m_r)
        store(grad_v + o_rd, -b_de, m_rd)
        if READS:  # ... and through the prediction K + x w + b
            b_dx += b_de * b_weight
            b_dweight += tl.sum(b_de * b_x, 0)
            b_dbias += tl.sum(b_de, 0)
        b_ds = layer_norm_vjp(b_x, b_inverse, b_dx, m_d, D) - b_inverse * b_x * row_mean(b_g * b_gu, D)  # dU
        store(p_du + p_rd, b_ds, m_d[None, :])
    tl.store(grad_layer_norm + o_d, b_dweight, mask=m_d)
    tl.store(grad_layer_norm + D + o_d, b_dbias, mask=m_d)


@triton.jit
def ask_hidden(
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


@triton.jit
def carry_first(
    decays, moves, p_memory, p_moving, p_primal, p_z, p_zq, p_inner, p_gu, p_du, p_duq, rho, ROW, row, H, t0, eos, i_c,
    D: tl.constexpr, Hd: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """J1 of the chunk before, or with a gate dW1 in ``p_primal``; JS1."""
    o_c, o_d = lanes(C, i_c, 4), lanes(BD, i_c, 4)
    m_t, m_d = t0 + o_c < eos, inside(o_d, D, BD)
    o_g, o_cd = o_c * H, o_c[:, None] * D + o_d[None, :]
    last = (tl.minimum(eos - t0, C) - 1) * H
    gamma = load_total(decays, row, last)
    b_gu = tl.load(p_gu + o_cd, mask=m_d[None, :], other=0.0)  # [C, BD]
    b_du = tl.load(p_du + o_cd, mask=m_d[None, :], other=0.0)  # [C, BD]
    b_gamma = load_gamma(decays, row, o_g, m_t, C)  # [C]
    b_duq = tl.load(p_duq + o_cd, mask=m_d[None, :], other=0.0).to(tl.float32)
    if p_moving is not None:
        carry, pi = load_total(decays + CARRY * ROW, row, last), load_total(moves, row, last)
        b_duq_carry = rounded(b_duq * (load_gate(decays + CARRY * ROW, row, o_g, m_t) * rho)[:, None], DTYPE)  # [C, BD]
    b_duq = rounded(b_duq * b_gamma[:, None], DTYPE)  # [C, BD]
    for i in tl.range(0, (Hd + BH - 1) // BH, disable_licm=True):
        o_h = i * BH + lanes(BH, i_c, 4)
        m_h = inside(o_h, Hd, BH)
        o_hd, m_hd = o_h[:, None] * D + o_d[None, :], m_h[:, None] & m_d[None, :]
        o_hc = o_c[None, :] * Hd + o_h[:, None]
        b_aq = rounded(gelu(tl.load(p_zq + o_hc, mask=m_h[:, None], other=0.0).to(tl.float32)), DTYPE)  # [BH, C]
        b_j = tl.load(p_memory + o_hd, mask=m_hd, other=0.0)  # [BH, BD]
        if p_moving is not None:
            b_jm = tl.load(p_moving + o_hd, mask=m_hd, other=0.0)  # [BH, BD]
            tl.store(p_moving + o_hd, b_j * carry + b_jm * pi + dot(b_aq, b_duq_carry), mask=m_hd)
        b_dw = dot(b_aq, b_duq)  # [BH, BD]
        if p_primal is None:
            b_dw += b_j * gamma
        b_z = tl.load(p_z + o_hc, mask=m_h[:, None], other=0.0).to(tl.float32)  # [BH, C]
        b_dgz = tl.load(p_inner + o_hc, mask=m_h[:, None], other=0.0).to(tl.float32)  # [BH, C]
        b_dw += dot(rounded(gelu_slope(b_z) * b_dgz, DTYPE), b_gu) + dot(rounded(gelu(b_z), DTYPE), b_du)
        if p_primal is None:
            tl.store(p_memory + o_hd, b_dw, mask=m_hd)
        else:
            tl.store(p_primal + o_hd, b_dw, mask=m_hd)


@triton.jit
def carry_second(
    q, k, lr, decays, moves, p_memory, p_moving, p_primal, p_w, p_z, p_ga, p_dz, p_dzq, p_scores, p_dv, grad_k, rho,
    stride_qt, stride_kt, ROW, row, H, t0, eos, i_c,
    D: tl.constexpr, Hd: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr, DTYPE: tl.constexpr, READS: tl.constexpr,
):  # fmt: skip
    """dK; J2 of the chunk before, or with a gate dW2 in ``p_primal``; JS2; returns ``<J2, W2>``. Pointers to the second of two matrices."""
    o_c, o_d = lanes(C, i_c, 5), lanes(BD, i_c, 5)
    m_t, m_d = t0 + o_c < eos, inside(o_d, D, BD)
    m_td, o_g = m_t[:, None] & m_d[None, :], o_c * H
    o_td = o_g[:, None] * D + o_d[None, :]
    last = (tl.minimum(eos - t0, C) - 1) * H
    gamma = load_total(decays, row, last)
    b_lr, b_to_end = load_gate(lr, row, o_g, m_t), load_to_end(decays, ROW, row, o_g, m_t, C)  # [C]
    b_q = load_tile(q, stride_qt, o_c, o_d, m_t, m_d)  # [C, BD]
    b_n = tl.load(p_scores + o_c[None, :] * C + o_c[:, None])  # [s, t]
    b_dk = dot(b_n, b_q)  # [C, BD]
    if READS:
        b_dk -= tl.load(p_dv + o_td, mask=m_td, other=0.0).to(tl.float32)  # dE = -dV
    b_k = load_tile(k, stride_kt, o_c, o_d, m_t, m_d)  # [C, BD]
    if p_moving is not None:
        carry, pi = load_total(decays + CARRY * ROW, row, last), load_total(moves, row, last)
        b_q_carry = rounded(b_q.to(tl.float32) * (load_gate(decays + CARRY * ROW, row, o_g, m_t) * rho)[:, None], DTYPE)  # [C, BD]
        b_step = b_lr * load_gate(moves + ROW, row, o_g, m_t)  # [C]
    b_q = rounded(b_q.to(tl.float32) * load_gamma(decays, row, o_g, m_t, C)[:, None], DTYPE)
    product = 0.0
    for i in tl.range(0, (Hd + BH - 1) // BH, disable_licm=True):
        o_h = i * BH + lanes(BH, i_c, 5)
        m_h = inside(o_h, Hd, BH)
        o_hd, m_hd = o_h[:, None] * D + o_d[None, :], m_h[:, None] & m_d[None, :]
        o_ch = o_c[:, None] * Hd + o_h[None, :]
        b_z = tl.load(p_z + o_ch, mask=m_h[None, :], other=0.0).to(tl.float32)  # [C, BH]
        b_ga = tl.load(p_ga + o_ch, mask=m_h[None, :], other=0.0).to(tl.float32)  # [C, BH]
        b_dz = tl.load(p_dz + o_ch, mask=m_h[None, :], other=0.0)  # [C, BH]
        b_dzq = tl.load(p_dzq + o_ch, mask=m_h[None, :], other=0.0)  # [C, BH]
        b_j = tl.load(p_memory + o_hd, mask=m_hd, other=0.0)  # [BH, BD]
        b_w2 = tl.load(p_w + o_hd, mask=m_hd, other=0.0)  # [BH, BD]
        b_u2_end = rounded(b_ga * gelu_slope(b_z) * (b_lr * b_to_end)[:, None], DTYPE)  # [C, BH]
        b_dk += dot(b_dz, b_w2) - dot(b_u2_end, rounded(b_j, DTYPE))
        if p_moving is not None:
            b_jm = tl.load(p_moving + o_hd, mask=m_hd, other=0.0)  # [BH, BD]
            b_dk -= dot(rounded(b_ga * gelu_slope(b_z) * b_step[:, None], DTYPE), rounded(b_jm, DTYPE))
            tl.store(p_moving + o_hd, b_j * carry + b_jm * pi + dot(tl.trans(b_dzq), b_q_carry), mask=m_hd)
        product += tl.sum(b_j * b_w2.to(tl.float32))
        b_dw = dot(tl.trans(b_dzq), b_q)  # [BH, BD]
        if p_primal is None:
            b_dw += b_j * gamma
        b_dw += dot(tl.trans(b_dz), b_k)
        if p_primal is None:
            tl.store(p_memory + o_hd, b_dw, mask=m_hd)
        else:
            tl.store(p_primal + o_hd, b_dw, mask=m_hd)
    store(grad_k + o_td, b_dk, m_td)
    return product


@triton.jit
def pull_back(
    p_memory, p_primal, p_duals, p_w, gamma, grad_rho1, grad_rho2, rho1, rho2, i_c,
    D: tl.constexpr, Hd: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr, RETENTION: tl.constexpr, R0: tl.constexpr, R1: tl.constexpr,
):  # fmt: skip
    """``J <- gamma_C J + phi'(A)' dW``, and d rho with it. A row of W1 is a column of its tiles, as in `mirror`."""
    SIZE: tl.constexpr = Hd * D
    o_d = lanes(BD, i_c, 6)
    m_d = inside(o_d, D, BD)
    b_along1, b_along2 = tl.zeros((BD,), tl.float32), tl.zeros((BD,), tl.float32)
    if RETENTION == retentions.ROWS or RETENTION == retentions.ENTIRE:
        for i in tl.range(0, (Hd + BH - 1) // BH, disable_licm=True):
            o_h = i * BH + lanes(BH, i_c, 6)
            o_hd, m_hd = o_h[:, None] * D + o_d[None, :], inside(o_h, Hd, BH)[:, None] & m_d[None, :]
            b_g1, b_a1 = tl.load(p_primal + o_hd, mask=m_hd, other=0.0), tl.load(p_duals + o_hd, mask=m_hd, other=0.0)  # [BH, BD]
            b_w1 = tl.load(p_w + o_hd, mask=m_hd, other=0.0).to(tl.float32)  # [BH, BD]
            b_along1 += tl.sum(retentions.along(b_g1, b_a1, b_w1, RETENTION), 0)
            if RETENTION == retentions.ENTIRE:
                b_g2, b_a2 = tl.load(p_primal + SIZE + o_hd, mask=m_hd, other=0.0), tl.load(p_duals + SIZE + o_hd, mask=m_hd, other=0.0)
                b_along2 += tl.sum(retentions.along(b_g2, b_a2, b_a2, RETENTION), 0)
    along1, along2 = b_along1[None, :], b_along2[None, :]
    if RETENTION == retentions.ENTIRE:
        along1, along2 = tl.sum(b_along1, 0) + grad_rho1, tl.sum(b_along2, 0) + grad_rho2
    for i in tl.range(0, (Hd + BH - 1) // BH, disable_licm=True):
        o_h = i * BH + lanes(BH, i_c, 7)
        o_hd, m_hd = o_h[:, None] * D + o_d[None, :], inside(o_h, Hd, BH)[:, None] & m_d[None, :]
        b_g1, b_a1 = tl.load(p_primal + o_hd, mask=m_hd, other=0.0), tl.load(p_duals + o_hd, mask=m_hd, other=0.0)  # [BH, BD]
        b_w1 = tl.load(p_w + o_hd, mask=m_hd, other=0.0).to(tl.float32)  # [BH, BD]
        b_j1 = tl.load(p_memory + o_hd, mask=m_hd, other=0.0) * gamma
        tl.store(p_memory + o_hd, b_j1 + retentions.pull(b_g1, b_a1, b_w1, along1, rho1, RETENTION, R0, R1), mask=m_hd)
        b_g2, b_a2 = tl.load(p_primal + SIZE + o_hd, mask=m_hd, other=0.0), tl.load(p_duals + SIZE + o_hd, mask=m_hd, other=0.0)
        b_w2 = tl.load(p_w + SIZE + o_hd, mask=m_hd, other=0.0).to(tl.float32)  # [BH, BD]
        b_along = along2
        if RETENTION == retentions.ROWS:
            b_along = tl.sum(retentions.along(b_g2, b_a2, b_w2, RETENTION), 1)[:, None]  # [BH, 1]
        b_j2 = tl.load(p_memory + SIZE + o_hd, mask=m_hd, other=0.0) * gamma
        tl.store(p_memory + SIZE + o_hd, b_j2 + retentions.pull(b_g2, b_a2, b_w2, b_along, rho2, RETENTION, R0, R1), mask=m_hd)


@triton.jit(do_not_specialize=LENGTHS)
def mlp_seq(
    q, k, v, lr, decays, moves, delta, ln_weight, ln_bias,
    states, duals, momenta, scales, hidden, updates, sums, inner_grad, hidden_q, grad_sums, grad_scores, grad_norm, grad_scales,
    grad_hidden_q, from_hidden, from_updates, from_inner, row_sums, grad_sum,
    grad_memory, grad_primal, grad_k, grad_v, grad_delta, grad_layer_norm, rows_lr, rows_delta, rows_kept, rows_step, inner,
    cu_seqlens, first_slot,
    T, H, CHUNKS, ROW, SLOTS, FIRST, GROUP,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    D: tl.constexpr, Hd: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr, DTYPE: tl.constexpr, EPS: tl.constexpr,
    BIAS: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
    READS: tl.constexpr, COUPLED: tl.constexpr, DELTA: tl.constexpr,
    RETENTION: tl.constexpr, R0: tl.constexpr, R1: tl.constexpr, MOMENTUM: tl.constexpr,
):  # fmt: skip
    """J1, J2 (and JS1, JS2), in place in ``grad_memory``, from the last chunk of a group to its first.

    ``from_inner`` becomes dGz, ``from_hidden`` dZ. ``row_sums``, ``grad_sum`` and ``grad_primal`` hold one chunk.
    """
    SIZE: tl.constexpr = Hd * D
    MATRICES: tl.constexpr = 4 if MOMENTUM else 2
    GATED: tl.constexpr = RETENTION != retentions.L2
    i_n = tl.program_id(0).to(tl.int64)
    i_h = tl.program_id(1).to(tl.int64)
    i_b, bos, eos = sequence_of(i_n, cu_seqlens, T)
    last = tl.minimum(((eos - bos + C - 1) // C).to(tl.int32), FIRST + GROUP)
    slot = slot_of(i_n, first_slot, CHUNKS)
    own = i_n * H + i_h
    q += i_b * stride_qb + i_h * stride_qh
    k += i_b * stride_kb + i_h * stride_kh
    v += i_b * stride_vb + i_h * stride_vh
    ln_weight += i_h * D
    ln_bias += i_h * D
    grad_memory += own * MATRICES * SIZE
    row_sums += own * (3 if MOMENTUM else 2) * C * D
    grad_sum += own * C * D
    grad_layer_norm += own * 2 * D
    moving, moving2 = None, None
    if MOMENTUM:
        moving, moving2 = grad_memory + 2 * SIZE, grad_memory + 3 * SIZE
    primal, primal2 = None, None
    if GATED:
        primal, primal2 = grad_primal + own * 2 * SIZE, grad_primal + (own * 2 + 1) * SIZE

    for i_r in tl.range(0, last - FIRST, disable_licm=True):
        i_c = last - 1 - i_r
        place = (i_n * GROUP + i_c - FIRST) * H + i_h
        t0 = bos + i_c * C
        row = (i_b * T + t0) * H + i_h
        p_q, p_k, p_v = q + t0 * stride_qt, k + t0 * stride_kt, v + t0 * stride_vt
        of_chunk, of_tokens = place * C * Hd, place * C * D
        p_w, p_z, p_ga, p_inner, p_hidden = (
            states + place * 2 * SIZE, hidden + of_chunk, inner_grad + of_chunk, from_inner + of_chunk, from_hidden + of_chunk
        )  # fmt: skip
        p_gu = updates + of_tokens
        rho1, rho2 = 1.0, 1.0
        if scales is not None:
            rho1, rho2 = tl.load(scales + place * 2), tl.load(scales + place * 2 + 1)

        if inner is not None and (GATED or MOMENTUM):
            p_duals, p_momenta = p_w, None
            if GATED:
                p_duals = duals + place * 2 * SIZE
            if MOMENTUM:
                p_momenta = momenta + place * 2 * SIZE
            product, product_carry, product_pi = inner_products(grad_memory, p_duals, moving, p_momenta, i_c, D, Hd, BD, BH)
            p_of_inner = inner + (slot + i_c) * H + i_h
            tl.store(p_of_inner, product)
            if MOMENTUM:
                tl.store(p_of_inner + SLOTS * H, product_carry)
                tl.store(p_of_inner + 2 * SLOTS * H, product_pi)
        ask_update(
            p_k, lr, decays, moves, grad_memory, moving, p_w, p_z, p_ga, p_inner, row_sums, rows_lr, rows_kept, rows_step,
            stride_kt, ROW, row, H, t0, eos, i_c, D, Hd, C, BD, BH, DTYPE,
        )  # fmt: skip
        tl.debug_barrier()
        through_rows(
            p_k, p_v, lr, decays, moves, delta, ln_weight, ln_bias, sums + of_tokens, row_sums, from_updates + of_tokens,
            grad_norm + place * 2 * D, grad_sum, grad_v + row * D, grad_delta + row * D if DELTA == 2 else None, grad_layer_norm,
            rows_lr, rows_delta, rows_kept, rows_step, stride_kt, stride_vt, ROW, row, H, t0, eos, i_c,
            D, C, BD, EPS, BIAS, P0, P1, P2, READS, COUPLED, DELTA,
        )  # fmt: skip
        tl.debug_barrier()
        product = ask_hidden(
            lr, decays, moves, grad_memory, moving, p_w, p_z, p_ga, p_inner, p_hidden, p_gu, grad_sum, ROW, row, H, t0, eos, i_c,
            D, Hd, C, BD, BH, DTYPE,
        )  # fmt: skip
        tl.debug_barrier()
        carry_first(
            decays, moves, grad_memory, moving, primal, p_z, hidden_q + of_chunk, p_inner, p_gu, grad_sum, grad_sums + of_tokens, rho1,
            ROW, row, H, t0, eos, i_c, D, Hd, C, BD, BH, DTYPE,
        )  # fmt: skip
        tl.debug_barrier()
        product += carry_second(
            p_q, p_k, lr, decays, moves, grad_memory + SIZE, moving2, primal2, p_w + SIZE, p_z, p_ga, p_hidden, grad_hidden_q + of_chunk,
            grad_scores + place * C * C, grad_v + row * D, grad_k + row * D, rho2, stride_qt, stride_kt, ROW, row, H, t0, eos, i_c,
            D, Hd, C, BD, BH, DTYPE, READS,
        )  # fmt: skip
        if inner is not None and not (GATED or MOMENTUM):
            tl.store(inner + (slot + i_c) * H + i_h, product)
        tl.debug_barrier()
        if GATED:
            grad_rho1, grad_rho2 = 0.0, 0.0
            if scales is not None:
                grad_rho1, grad_rho2 = tl.load(grad_scales + place * 2), tl.load(grad_scales + place * 2 + 1)
            gamma = load_total(decays, row, (tl.minimum(eos - t0, C) - 1) * H)
            p_duals = duals + place * 2 * SIZE
            pull_back(
                grad_memory, primal, p_duals, p_w, gamma, grad_rho1, grad_rho2, rho1, rho2, i_c, D, Hd, BD, BH, RETENTION, R0, R1
            )  # fmt: skip
            tl.debug_barrier()
