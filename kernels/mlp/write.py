"""The writes of a chunk of the MLP memory, and the gradients of its matrices: stages of the chains (docs/mathematics.md, sections 9, 10).

    S1 <- gamma_C S1 - A' (dec eta Gu);   W2 <- gamma_C W2 - (dec eta Gz)' K                                write

    J1 <- gamma_C J1 + Aq' (gamma dUq) + (gelu'(Z) dGz)' Gu + A' dU                                         first_matrix_bwd
    dK = N2' Q + dE + dZ W2 - (dec U2) J2;  J2 <- gamma_C J2 + (gamma dZq)' Q + dZ' K                       second_matrix_bwd

With momentum ``dec`` is M_C, and

    S1 += b_C M1;  W2 += b_C M2;  M1 <- pi_C M1 - A' (Theta_C eta Gu);  M2 <- pi_C M2 - (Theta_C eta Gz)' K
    JS1 <- b_C J1 + pi_C JS1 + rho1 Aq' (b dUq);   JS2 <- b_C J2 + pi_C JS2 + rho2 (b dZq)' Q

With a retention gate the gradient of the matrices is gathered in ``grad_primal``, and `pull_back` (mirror.py) adds ``phi'(A)'`` of it to
J1 and J2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.chunks import HEAD, of_chunk
from ..common.gates import CARRY, load_gamma, load_gate, load_to_end, load_total
from ..common.tiles import dot, inside, load_tile, rounded, store
from .math import gelu, gelu_slope, lanes


@triton.jit
def save(memory, checkpoint, i_c, MATRICES: tl.constexpr, D: tl.constexpr, Hd: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr):
    """Copy all matrices to a checkpoint."""
    o_d = lanes(BD, i_c, 0)
    m_d = inside(o_d, D, BD)
    for i in tl.range(0, (Hd + BH - 1) // BH, disable_licm=True):
        o_h = i * BH + lanes(BH, i_c, 0)
        o_hd, m_hd = o_h[:, None] * D + o_d[None, :], inside(o_h, Hd, BH)[:, None] & m_d[None, :]
        for matrix in tl.static_range(MATRICES):
            tl.store(checkpoint + matrix * Hd * D + o_hd, tl.load(memory + matrix * Hd * D + o_hd, mask=m_hd, other=0.0), mask=m_hd)


@triton.jit
def write(
    k, lr, decays, moves, memory, predicting, moving, p_z, p_gu, p_duals, p_momenta, stride_kt, ROW, row, H, t0, bos, eos, i_c,
    D: tl.constexpr, Hd: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr, DTYPE: tl.constexpr, PART: tl.constexpr,
    RETENTION: tl.constexpr,
):  # fmt: skip
    """All matrices after the chunk, in place; copies the duals and momenta before it, for a segment."""
    SIZE: tl.constexpr = Hd * D
    o_c, o_d = lanes(C, i_c, 7), lanes(BD, i_c, 7)
    m_t, m_d = of_chunk(t0 + o_c, bos, eos, PART), inside(o_d, D, BD)
    o_g = o_c * H
    b_gu = tl.load(p_gu + o_c[:, None] * D + o_d[None, :], mask=m_d[None, :], other=0.0)  # [C, BD]
    b_k = load_tile(k, stride_kt, o_c, o_d, m_t, m_d)  # [C, BD]
    b_end = load_gate(lr, row, o_g, m_t) * load_to_end(decays, ROW, row, o_g, m_t, C)  # [C]
    last = (tl.minimum(eos - t0, C) - 1) * H
    gamma = load_total(decays, row, last)
    b_u_end = rounded(b_gu.to(tl.float32) * b_end[:, None], DTYPE)
    if moving is not None:
        b_step = load_gate(lr, row, o_g, m_t) * load_gate(moves + ROW, row, o_g, m_t)  # [C]
        carry, pi = load_total(decays + CARRY * ROW, row, last), load_total(moves, row, last)
        b_u_step = rounded(b_gu.to(tl.float32) * b_step[:, None], DTYPE)
    for i in tl.range(0, (Hd + BH - 1) // BH, disable_licm=True):
        o_h = i * BH + lanes(BH, i_c, 7)
        m_h = inside(o_h, Hd, BH)
        o_hd, m_hd = o_h[:, None] * D + o_d[None, :], m_h[:, None] & m_d[None, :]
        b_z = tl.load(p_z + o_c[None, :] * Hd + o_h[:, None], mask=m_h[:, None], other=0.0).to(tl.float32)  # [BH, C]
        b_s1 = tl.load(memory + o_hd, mask=m_hd, other=0.0)  # [BH, BD]
        b_w2 = tl.load(memory + SIZE + o_hd, mask=m_hd, other=0.0)  # [BH, BD]
        b_back = b_s1
        if PART == HEAD or not RETENTION.is_identity:
            b_back = tl.load(predicting + o_hd, mask=m_hd, other=0.0)
        if p_duals is not None:
            tl.store(p_duals + o_hd, b_s1, mask=m_hd)
            tl.store(p_duals + SIZE + o_hd, b_w2, mask=m_hd)
        b_a, b_gz = rounded(gelu(b_z), DTYPE), dot(rounded(b_back, DTYPE), tl.trans(b_gu)) * gelu_slope(b_z)  # [BH, C]
        b_s1 = b_s1 * gamma - dot(b_a, b_u_end)
        b_w2 = b_w2 * gamma - dot(rounded(b_gz * b_end[None, :], DTYPE), b_k)
        if moving is not None:
            b_m1 = tl.load(moving + o_hd, mask=m_hd, other=0.0)  # [BH, BD]
            b_m2 = tl.load(moving + SIZE + o_hd, mask=m_hd, other=0.0)  # [BH, BD]
            b_s1 += b_m1 * carry
            b_w2 += b_m2 * carry
            if p_momenta is not None:
                store(p_momenta + o_hd, b_m1, m_hd)
                store(p_momenta + SIZE + o_hd, b_m2, m_hd)
            tl.store(moving + o_hd, b_m1 * pi - dot(b_a, b_u_step), mask=m_hd)
            tl.store(moving + SIZE + o_hd, b_m2 * pi - dot(rounded(b_gz * b_step[None, :], DTYPE), b_k), mask=m_hd)
        tl.store(memory + o_hd, b_s1, mask=m_hd)
        tl.store(memory + SIZE + o_hd, b_w2, mask=m_hd)


@triton.jit
def inner_products(p_memory, p_duals, p_moving, p_momenta, i_c, D: tl.constexpr, Hd: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr):
    """``<J, A>, <J, S>, <JS, S>`` of both matrices, with the duals and momenta before the chunk; the last two are 0 without momentum."""
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
def first_matrix_bwd(
    decays, moves, p_memory, p_moving, p_primal, p_z, p_zq, p_inner, p_gu, p_du, p_duq, rho, ROW, row, H, t0, eos, i_c,
    D: tl.constexpr, Hd: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """J1 of the chunk before, or with a gate dW1 in ``p_primal``; JS1, with momentum."""
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
def second_matrix_bwd(
    q, k, lr, decays, moves, p_memory, p_moving, p_primal, p_w, p_z, p_ga, p_dz, p_dzq, p_scores, p_dv, grad_k, rho,
    stride_qt, stride_kt, ROW, row, H, t0, eos, i_c,
    D: tl.constexpr, Hd: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr, DTYPE: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """dK; J2 of the chunk before, or with a gate dW2 in ``p_primal``; JS2, with momentum. Returns ``<J2, W2>``.

    Pointers to matrices point to the second of two.
    """
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
    if BIAS.reads_memory:
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
