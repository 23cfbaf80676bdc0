"""The read-out of the MLP memory: stages of `mlp_chain_fwd`, and its backward in two kernels, parallel over chunks
(docs/mathematics.md, sections 9 and 10).

    P = L o Q K'                                                                              weigh
    Zq = gamma (Q W2') - P (eta Gz);  Aq = gelu(Zq);  Uq = gamma (Aq S1) - (L o Aq A') U1     read
    O = Q + LN(Uq)                                                                            put_out

    the same recomputed;  dUq = LN-vjp(w dO; Uq);  N1 = -L o (dUq U1')                        mlp_read_bwd
    dAq = gamma (dUq S1') + N1 A;  dZq = gelu'(Zq) dAq;  N2 = -L o (dZq U2');                 mlp_dq_bwd
    dQ = dO + gamma (dZq W2) + N2 K;  RA = N1' Aq;  R1 = -(L o Aq A')' dUq;  R2 = -P' dZq

with ``U1 = eta Gu, U2 = eta Gz``. With momentum M replaces L, and Zq, Uq gain ``b (Q M2')`` and ``b (Aq M1')`` of the momentum matrices.
A gate's rho scales these terms and those with L or M, and is part of N1, N2, R1 and R2; its gradient is ``sum(own writes o dUq)`` for both
matrices.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.chunks import HEAD, group_program, of_chunk, slot_of, token_of
from ..common.gates import CARRY, load_gamma, load_gate, load_scales, pair_decay
from ..common.tiles import LENGTHS, dot, inside, load_tile, rounded, store, wide
from .math import ROWS, crossing, gelu, gelu_slope, lanes, layer_norm_vjp, normalised


@triton.jit
def weigh(
    q, k, decays, p_pairs, p_scores, stride_qt, stride_kt, ROW, row, H, t0, bos, eos, i_c,
    D: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, PART: tl.constexpr, MOMENTUM: tl.constexpr,
):  # fmt: skip
    """L (with momentum M, which is given) and ``L o Q K'`` of a chunk, for `read`."""
    o_c, o_d = lanes(C, i_c, 1), lanes(BD, i_c, 1)
    m_t, m_d = of_chunk(t0 + o_c, bos, eos, PART), inside(o_d, D, BD)
    o_cc = o_c[:, None] * C + o_c[None, :]
    b_q = load_tile(q, stride_qt, o_c, o_d, m_t, m_d)  # [C, BD]
    b_k = load_tile(k, stride_kt, o_c, o_d, m_t, m_d)  # [C, BD]
    if MOMENTUM:
        b_pairs = tl.load(p_pairs + o_cc)  # [t, s]
    else:
        b_pairs = pair_decay(decays, None, ROW, row, H, C, o_c[:, None], o_c[None, :], m_t[:, None], m_t[None, :])  # [t, s]
        tl.store(p_pairs + o_cc, b_pairs)
    store(p_scores + o_cc, dot(b_q, tl.trans(b_k)) * b_pairs, None)


@triton.jit
def read(
    q, lr, decays, reading, predicting, moving, rho1, rho2,
    p_z, p_gu, p_pairs, p_scores, p_u, stride_qt, ROW, row, H, t0, bos, eos, i_c,
    D: tl.constexpr, Hd: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr, DTYPE: tl.constexpr, PART: tl.constexpr,
    RETENTION: tl.constexpr,
):  # fmt: skip
    """Uq, in place of U. Tokens read the matrices ``reading``; the inner gradients are those of the matrices ``predicting``."""
    o_c, o_d = lanes(C, i_c, 4), lanes(BD, i_c, 4)
    m_t, m_d = of_chunk(t0 + o_c, bos, eos, PART), inside(o_d, D, BD)
    o_g, o_cd, o_cc = o_c * H, o_c[:, None] * D + o_d[None, :], o_c[:, None] * C + o_c[None, :]
    b_gu = tl.load(p_gu + o_cd, mask=m_d[None, :], other=0.0)  # [C, BD]
    b_lr = load_gate(lr, row, o_g, m_t)  # [C]
    b_gamma = load_gamma(decays, row, o_g, m_t, C)  # [C]
    b_q = load_tile(q, stride_qt, o_c, o_d, m_t, m_d)  # [C, BD]
    b_p = tl.load(p_scores + o_cc)  # [t, s]
    if moving is not None:
        b_carry = load_gate(decays + CARRY * ROW, row, o_g, m_t)  # [C]
        b_carried = tl.zeros((C, BD), tl.float32)
    b_uq = tl.zeros((C, BD), tl.float32)
    b_scores = tl.zeros((C, C), tl.float32)  # Aq A'
    for i in tl.range(0, (Hd + BH - 1) // BH, disable_licm=True):
        o_h = i * BH + lanes(BH, i_c, 4)
        m_h = inside(o_h, Hd, BH)
        o_hd, m_hd = o_h[:, None] * D + o_d[None, :], m_h[:, None] & m_d[None, :]
        b_z = tl.load(p_z + o_c[:, None] * Hd + o_h[None, :], mask=m_h[None, :], other=0.0).to(tl.float32)  # [C, BH]
        b_back = rounded(tl.load(predicting + o_hd, mask=m_hd, other=0.0), DTYPE)  # [BH, BD]
        b_gz = rounded(dot(b_gu, tl.trans(b_back)) * gelu_slope(b_z) * b_lr[:, None], DTYPE)  # [C, BH]
        b_w2 = rounded(tl.load(reading + Hd * D + o_hd, mask=m_hd, other=0.0), DTYPE)  # [BH, BD]
        b_own = dot(b_p, b_gz)  # [C, BH], the chunk's own writes so far, negated
        if moving is not None:
            b_m2 = rounded(tl.load(moving + Hd * D + o_hd, mask=m_hd, other=0.0), DTYPE)  # [BH, BD]
            b_own -= dot(b_q, tl.trans(b_m2)) * b_carry[:, None]
        if RETENTION.has_rho:
            b_own *= rho2
        b_zq = dot(b_q, tl.trans(b_w2)) * b_gamma[:, None] - b_own
        b_aq = rounded(gelu(b_zq), DTYPE)
        if PART == HEAD:
            b_back = rounded(tl.load(reading + o_hd, mask=m_hd, other=0.0), DTYPE)
        b_uq += dot(b_aq, b_back)
        if moving is not None:
            b_carried += dot(b_aq, rounded(tl.load(moving + o_hd, mask=m_hd, other=0.0), DTYPE))
        b_scores += dot(b_aq, tl.trans(rounded(gelu(b_z), DTYPE)))
    tl.debug_barrier()
    o_c, o_d = lanes(C, i_c, 5), lanes(BD, i_c, 5)
    m_t, m_d = of_chunk(t0 + o_c, bos, eos, PART), inside(o_d, D, BD)
    o_g, o_cd = o_c * H, o_c[:, None] * D + o_d[None, :]
    b_scores *= tl.load(p_pairs + o_c[:, None] * C + o_c[None, :])
    b_u1 = tl.load(p_gu + o_cd, mask=m_d[None, :], other=0.0).to(tl.float32) * load_gate(lr, row, o_g, m_t)[:, None]  # [C, BD]
    b_own = dot(rounded(b_scores, DTYPE), rounded(b_u1, DTYPE))
    if moving is not None:
        b_own -= b_carried * load_gate(decays + CARRY * ROW, row, o_g, m_t)[:, None]
    if RETENTION.has_rho:
        b_own *= rho1
    b_uq = b_uq * load_gamma(decays, row, o_g, m_t, C)[:, None] - b_own
    tl.store(p_u + o_cd, b_uq, mask=m_d[None, :])


@triton.jit
def put_out(
    q, ln_weight, ln_bias, p_u, out, stride_qt, H, t0, bos, eos, i_c,
    D: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, EPS: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """``O = Q + LN(U)``, ``ROWS`` tokens at a time."""
    o_d = lanes(BD, i_c, 6)
    m_d = inside(o_d, D, BD)
    b_weight = tl.load(ln_weight + o_d, mask=m_d, other=0.0)[None, :]  # [1, BD]
    b_bias = tl.load(ln_bias + o_d, mask=m_d, other=0.0)[None, :]  # [1, BD]
    for i in tl.range(0, C // ROWS, disable_licm=True):
        o_r = i * ROWS + lanes(ROWS, i_c, 6)
        m_r = of_chunk(t0 + o_r, bos, eos, PART)
        b_x, _ = normalised(tl.load(p_u + o_r[:, None] * D + o_d[None, :], mask=m_d[None, :], other=0.0), m_d, D, EPS)  # [ROWS, BD]
        b_q = load_tile(q, stride_qt, o_r, o_d, m_r, m_d).to(tl.float32)  # [ROWS, BD]
        store(out + o_r[:, None] * (H * D) + o_d[None, :], b_q + b_x * b_weight + b_bias, m_r[:, None] & m_d[None, :])


@triton.jit(do_not_specialize=LENGTHS)
def mlp_read_bwd(
    q, k, lr, decays, ln_weight, grad_out,
    states, momenta, scales, hidden, updates, pairs,
    inner_grad, hidden_q, grad_sums, scores, grad_scores, grad_norm, weights, rows_pairs, grad_pairs, rows_carry, grad_scales,
    cu_seqlens, first_slot, group_segments,
    T, H, CHUNKS, ROW, EVERY,
    q_strides, k_strides,
    D: tl.constexpr, Hd: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr, DTYPE: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """Of one chunk: ``Ga``, ``Zq``, ``dUq``, ``rho1 L o Aq A'``, ``N1``, and its shares of dw, db and the gates' gradients.

    Stores L, or M from ``pairs``, in ``weights``.
    """
    ROW = wide(ROW)
    SIZE: tl.constexpr = Hd * D
    i_n, i_b, i_h, i_c, t0, eos, place = group_program(group_segments, cu_seqlens, T, EVERY, C)
    if t0 >= eos:
        return
    place = place * H + i_h
    slot = (slot_of(i_n, first_slot, CHUNKS) + i_c) * H + i_h
    row = (i_b * T + t0) * H + i_h
    q = token_of(q, q_strides, i_b, t0, i_h)
    k = token_of(k, k_strides, i_b, t0, i_h)
    states += place * 2 * SIZE
    if momenta is not None:
        momenta += place * 2 * SIZE
    hidden += place * C * Hd
    updates += place * C * D
    inner_grad += place * C * Hd
    hidden_q += place * C * Hd
    scores += place * C * C
    weights += place * C * C
    rho1, rho2 = load_scales(scales, place)

    o_c, o_d = lanes(C, i_c, 0), lanes(BD, i_c, 0)
    m_t, m_d = t0 + o_c < eos, inside(o_d, D, BD)
    o_cc = o_c[:, None] * C + o_c[None, :]
    b_q = load_tile(q, q_strides.t, o_c, o_d, m_t, m_d)  # [C, BD]
    b_k = load_tile(k, k_strides.t, o_c, o_d, m_t, m_d)  # [C, BD]
    if pairs is not None:
        b_decay = tl.load(pairs + slot * C * C + o_cc)  # [t, s]
    else:
        b_decay = pair_decay(decays, None, ROW, row, H, C, o_c[:, None], o_c[None, :], m_t[:, None], m_t[None, :])  # [t, s]
    tl.store(weights + o_cc, b_decay)
    store(scores + o_cc, dot(b_q, tl.trans(b_k)) * b_decay, None)
    tl.debug_barrier()

    o_c, o_d = lanes(C, i_c, 1), lanes(BD, i_c, 1)
    m_t, m_d = t0 + o_c < eos, inside(o_d, D, BD)
    o_g = o_c * H
    b_q = load_tile(q, q_strides.t, o_c, o_d, m_t, m_d)  # [C, BD]
    b_p = tl.load(scores + o_c[:, None] * C + o_c[None, :])  # [t, s]
    b_gu = tl.load(updates + o_c[:, None] * D + o_d[None, :], mask=m_d[None, :], other=0.0)  # [C, BD]
    b_lr, b_gamma = load_gate(lr, row, o_g, m_t), load_gamma(decays, row, o_g, m_t, C)  # [C]
    b_uq = tl.zeros((C, BD), tl.float32)
    b_scores = tl.zeros((C, C), tl.float32)  # Aq A'
    if momenta is not None:
        b_carry = load_gate(decays + CARRY * ROW, row, o_g, m_t)  # [C]
        b_carried = tl.zeros((C, BD), tl.float32)
    for i in tl.range(0, (Hd + BH - 1) // BH, disable_licm=True):
        o_h = i * BH + lanes(BH, i_c, 1)
        m_h = inside(o_h, Hd, BH)
        o_hd, m_hd = o_h[:, None] * D + o_d[None, :], m_h[:, None] & m_d[None, :]
        o_ch = o_c[:, None] * Hd + o_h[None, :]
        b_s1 = tl.load(states + o_hd, mask=m_hd, other=0.0)  # [BH, BD]
        b_w2 = tl.load(states + SIZE + o_hd, mask=m_hd, other=0.0)  # [BH, BD]
        b_z = tl.load(hidden + o_ch, mask=m_h[None, :], other=0.0).to(tl.float32)  # [C, BH]
        b_ga = dot(b_gu, tl.trans(b_s1))  # [C, BH]
        store(inner_grad + o_ch, b_ga, m_h[None, :])
        b_u2 = rounded(b_ga * gelu_slope(b_z) * b_lr[:, None], DTYPE)
        b_own = dot(b_p, b_u2)  # [C, BH]
        if momenta is not None:
            b_own -= dot(b_q, tl.trans(tl.load(momenta + SIZE + o_hd, mask=m_hd, other=0.0))) * b_carry[:, None]
        if scales is not None:
            b_own *= rho2
        b_zq = dot(b_q, tl.trans(b_w2)) * b_gamma[:, None] - b_own
        store(hidden_q + o_ch, b_zq, m_h[None, :])
        b_aq = rounded(gelu(b_zq), DTYPE)
        b_uq += dot(b_aq, b_s1)
        if momenta is not None:
            b_carried += dot(b_aq, tl.load(momenta + o_hd, mask=m_hd, other=0.0))
        b_scores += dot(b_aq, tl.trans(rounded(gelu(b_z), DTYPE)))
    tl.debug_barrier()

    o_c, o_d = lanes(C, i_c, 2), lanes(BD, i_c, 2)
    m_t, m_d = t0 + o_c < eos, inside(o_d, D, BD)
    o_g, o_cd, o_cc = o_c * H, o_c[:, None] * D + o_d[None, :], o_c[:, None] * C + o_c[None, :]
    b_gu = tl.load(updates + o_cd, mask=m_d[None, :], other=0.0)  # [C, BD]
    b_u1 = rounded(b_gu.to(tl.float32) * load_gate(lr, row, o_g, m_t)[:, None], DTYPE)  # [C, BD]
    b_decay = tl.load(weights + o_cc)  # [t, s]
    b_p1 = rounded(b_scores * b_decay, DTYPE)
    b_own = -dot(b_p1, b_u1)  # [C, BD]
    if momenta is not None:
        b_own += b_carried * load_gate(decays + CARRY * ROW, row, o_g, m_t)[:, None]
    store(scores + o_cc, b_scores * b_decay * rho1 if scales is not None else b_scores * b_decay, None)
    b_xq, b_inverse = normalised(b_uq * load_gamma(decays, row, o_g, m_t, C)[:, None] + b_own * rho1, m_d, D, EPS)

    b_do = load_tile(grad_out + row * D, D, o_g, o_d, m_t, m_d).to(tl.float32)  # [C, BD]
    tl.store(grad_norm + place * 2 * D + o_d, tl.sum(b_do * b_xq, 0), mask=m_d)
    tl.store(grad_norm + place * 2 * D + D + o_d, tl.sum(b_do, 0), mask=m_d)
    b_weight = tl.load(ln_weight + i_h * D + o_d, mask=m_d, other=0.0)[None, :]
    b_du = layer_norm_vjp(b_xq, b_inverse, b_do * b_weight, m_d, D)  # [C, BD]
    if scales is not None:
        tl.store(grad_scales + place * 2, tl.sum(b_du * b_own))
    if momenta is not None:
        tl.store(rows_carry + row + o_g, rho1 * tl.sum(b_du * b_carried, 1), mask=m_t)
    b_du = rounded(b_du, DTYPE)
    store(grad_sums + place * C * D + o_cd, b_du, m_d[None, :])
    b_n = -dot(b_du, tl.trans(b_u1))  # [t, s]
    if scales is not None:
        b_n *= rho1
    if grad_pairs is not None:
        tl.store(grad_pairs + slot * C * C + o_cc, b_n * b_scores)
    b_n *= b_decay
    store(grad_scores + place * C * C + o_cc, b_n, None)
    if rows_pairs is not None:
        tl.store(rows_pairs + row + o_g, crossing(b_n * b_scores, o_c), mask=m_t)


@triton.jit(do_not_specialize=LENGTHS)
def mlp_dq_bwd(
    q, k, lr, decays, grad_out,
    states, momenta, scales, hidden, inner_grad, hidden_q, grad_sums, scores, grad_scores, weights,
    grad_hidden_q, from_hidden, from_updates, from_inner, grad_q, rows_read, rows_pairs, grad_pairs, rows_carry, grad_scales,
    cu_seqlens, first_slot, group_segments,
    T, H, CHUNKS, ROW, EVERY,
    q_strides, k_strides,
    D: tl.constexpr, Hd: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Of one chunk: dQ, and the gradients of A (RA), U1 (R1) and U2 (R2) from the output. ``grad_scores``: N1 before, N2 after."""
    ROW = wide(ROW)
    SIZE: tl.constexpr = Hd * D
    i_n, i_b, i_h, i_c, t0, eos, place = group_program(group_segments, cu_seqlens, T, EVERY, C)
    if t0 >= eos:
        return
    place = place * H + i_h
    slot = (slot_of(i_n, first_slot, CHUNKS) + i_c) * H + i_h
    row = (i_b * T + t0) * H + i_h
    q = token_of(q, q_strides, i_b, t0, i_h)
    k = token_of(k, k_strides, i_b, t0, i_h)
    states += place * 2 * SIZE
    if momenta is not None:
        momenta += place * 2 * SIZE
    scores += place * C * C
    grad_scores += place * C * C
    weights += place * C * C
    at_hidden = place * C * Hd
    rho1, rho2 = load_scales(scales, place)

    # R1 and P'
    o_c, o_d = lanes(C, i_c, 0), lanes(BD, i_c, 0)
    m_t, m_d = t0 + o_c < eos, inside(o_d, D, BD)
    m_td = m_t[:, None] & m_d[None, :]
    o_cd, o_cc_transposed = o_c[:, None] * D + o_d[None, :], o_c[None, :] * C + o_c[:, None]
    b_du = tl.load(grad_sums + place * C * D + o_cd, mask=m_d[None, :], other=0.0)  # [C, BD], dUq
    b_p1 = tl.load(scores + o_cc_transposed)  # [s, t]
    store(from_updates + place * C * D + o_cd, -dot(b_p1, b_du), m_d[None, :])  # R1
    b_q = load_tile(q, q_strides.t, o_c, o_d, m_t, m_d)  # [C, BD]
    b_k = load_tile(k, k_strides.t, o_c, o_d, m_t, m_d)  # [C, BD]
    b_p = dot(b_k, tl.trans(b_q)) * tl.load(weights + o_cc_transposed)  # [s, t]
    if scales is not None:
        b_p *= rho2
    tl.debug_barrier()  # P1 has been read
    store(scores + o_c[:, None] * C + o_c[None, :], b_p, None)
    tl.debug_barrier()

    # the pass over the hidden units
    o_c, o_d = lanes(C, i_c, 1), lanes(BD, i_c, 1)
    m_t, m_d = t0 + o_c < eos, inside(o_d, D, BD)
    o_g, o_cc, o_cc_transposed = o_c * H, o_c[:, None] * C + o_c[None, :], o_c[None, :] * C + o_c[:, None]
    b_du = tl.load(grad_sums + place * C * D + o_c[:, None] * D + o_d[None, :], mask=m_d[None, :], other=0.0)  # [C, BD], dUq
    b_n1, b_n1_transposed = tl.load(grad_scores + o_cc), tl.load(grad_scores + o_cc_transposed)  # [t, s], [s, t]
    b_p = tl.load(scores + o_cc)  # [s, t]
    b_lr, b_gamma = load_gate(lr, row, o_g, m_t), load_gamma(decays, row, o_g, m_t, C)  # [C]
    b_read = tl.zeros((C,), tl.float32)
    b_n2 = tl.zeros((C, C), tl.float32)  # dZq U2'
    b_dq = tl.zeros((C, BD), tl.float32)
    if momenta is not None:
        b_carry = load_gate(decays + CARRY * ROW, row, o_g, m_t)  # [C]
        if scales is not None:
            b_carry *= rho1
        b_carried = tl.zeros((C, BD), tl.float32)
    for i in tl.range(0, (Hd + BH - 1) // BH, disable_licm=True):
        o_h = i * BH + lanes(BH, i_c, 1)
        m_h = inside(o_h, Hd, BH)
        o_hd, m_hd = o_h[:, None] * D + o_d[None, :], m_h[:, None] & m_d[None, :]
        o_ch = at_hidden + o_c[:, None] * Hd + o_h[None, :]
        b_s1 = tl.load(states + o_hd, mask=m_hd, other=0.0)  # [BH, BD]
        b_zq = tl.load(hidden_q + o_ch, mask=m_h[None, :], other=0.0).to(tl.float32)  # [C, BH]
        b_z = tl.load(hidden + o_ch, mask=m_h[None, :], other=0.0).to(tl.float32)  # [C, BH]
        b_aq = gelu(b_zq)
        b_da = dot(b_du, tl.trans(b_s1)) * b_gamma[:, None]  # [C, BH], dAq
        b_read += tl.sum(b_da * b_aq, 1)
        if momenta is not None:
            b_da += dot(b_du, tl.trans(tl.load(momenta + o_hd, mask=m_hd, other=0.0))) * b_carry[:, None]
        b_da += dot(b_n1, rounded(gelu(b_z), DTYPE))
        store(from_hidden + o_ch, dot(b_n1_transposed, rounded(b_aq, DTYPE)), m_h[None, :])  # RA
        b_dz = rounded(gelu_slope(b_zq) * b_da, DTYPE)  # [C, BH], dZq
        store(grad_hidden_q + o_ch, b_dz, m_h[None, :])
        store(from_inner + o_ch, -dot(b_p, b_dz), m_h[None, :])  # R2
        b_ga = tl.load(inner_grad + o_ch, mask=m_h[None, :], other=0.0).to(tl.float32)  # [C, BH]
        b_n2 += dot(b_dz, tl.trans(rounded(b_ga * gelu_slope(b_z) * b_lr[:, None], DTYPE)))
        b_w2 = tl.load(states + SIZE + o_hd, mask=m_hd, other=0.0)  # [BH, BD]
        b_dq += dot(b_dz, b_w2)
        if momenta is not None:
            b_carried += dot(b_dz, tl.load(momenta + SIZE + o_hd, mask=m_hd, other=0.0))
    tl.debug_barrier()  # N1 has been read

    o_c, o_d = lanes(C, i_c, 2), lanes(BD, i_c, 2)
    m_t, m_d = t0 + o_c < eos, inside(o_d, D, BD)
    m_td, o_g = m_t[:, None] & m_d[None, :], o_c * H
    o_td, o_cc = o_g[:, None] * D + o_d[None, :], o_c[:, None] * C + o_c[None, :]
    b_q = load_tile(q, q_strides.t, o_c, o_d, m_t, m_d)  # [C, BD]
    b_k = load_tile(k, k_strides.t, o_c, o_d, m_t, m_d)  # [C, BD]
    b_dq *= load_gamma(decays, row, o_g, m_t, C)[:, None]
    if rows_read is not None:
        tl.store(rows_read + row + o_g, b_read + tl.sum(b_dq * b_q.to(tl.float32), 1), mask=m_t)
    b_decay = tl.load(weights + o_cc)  # [t, s]
    b_own = 0.0
    if momenta is not None:
        b_row = tl.sum(b_carried * b_q.to(tl.float32), 1)  # [C], dZq . (S2 q)
        b_carry = load_gate(decays + CARRY * ROW, row, o_g, m_t)  # [C]
        b_own = tl.sum(b_row * b_carry)
        tl.store(rows_carry + row + o_g, tl.load(rows_carry + row + o_g, mask=m_t, other=0.0) + b_row * rho2, mask=m_t)
        b_dq += b_carried * (b_carry * rho2)[:, None]
    if scales is not None or grad_pairs is not None:
        b_pairs = -b_n2 * dot(b_q, tl.trans(b_k))  # [t, s]
        if scales is not None:
            tl.store(grad_scales + place * 2 + 1, tl.sum(b_pairs * b_decay) + b_own)
        if grad_pairs is not None:
            p_pairs = grad_pairs + slot * C * C + o_cc
            tl.store(p_pairs, tl.load(p_pairs) + b_pairs * rho2)
    b_n2 *= -b_decay
    if scales is not None:
        b_n2 *= rho2
    store(grad_scores + o_cc, b_n2, None)
    if rows_pairs is not None:
        tl.store(rows_pairs + row + o_g, crossing(b_n2 * dot(b_q, tl.trans(b_k)), o_c), mask=m_t)
    b_dq += dot(rounded(b_n2, DTYPE), b_k)
    b_do = tl.load(grad_out + row * D + o_td, mask=m_td, other=0.0).to(tl.float32)  # [C, BD]
    store(grad_q + row * D + o_td, b_do + b_dq, m_td)
