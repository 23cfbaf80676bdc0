"""The MLP memory backward (SPEC section 5). J1, J2 are the gradients of the state that a chunk leaves; ``P = L o (Q K')``.

    mlp_readout   the read-out again;  dUq = LN-vjp(w dO; Uq);  N1 = -L o (dUq U1')                         parallel over chunks
    mlp_pre       dAq = gamma (dUq S1') + N1 A;  dZq = gelu'(Zq) dAq;  N2 = -L o (dZq U2');
                  dQ = dO + gamma (dZq W2) + N2 K;  RA = N1' Aq;  R1 = -(L o Aq A')' dUq;  R2 = -P' dZq      parallel over chunks
    mlp_seq       dU1 = R1 - dec (A J1);  dU2 = R2 - dec (K J2')                                            last chunk first
                  dGz = eta dU2;  dGu = eta dU1 + (gelu'(Z) dGz) S1
                  (dE, dU) = vjp of the inner gradient and of the prediction for dGu
                  dA = RA - (dec U1) J1' + dU S1';  dZ = gelu'(Z) dA + gelu''(Z) Ga dGz
                  dK = N2' Q + dE + dZ W2 - (dec U2) J2
                  J1 <- gamma_C J1 + Aq' (gamma dUq) + (gelu'(Z) dGz)' Gu + A' dU
                  J2 <- gamma_C J2 + (gamma dZq)' Q + dZ' K

with ``U1 = eta Gu, U2 = eta Gz`` as in mlp_fwd.py. The chunks are taken in groups of segments between kept states, the last group first:
`mlp_chain` runs a group's segments again, all at once, then these three. A group has as many chunks as fill a chip, so the memory between
the kernels does not grow with the sequence. What passes between them is in the dtype of the operands, except where it is normalised.

Gradients of log-decays are summed over pairs as in linear_bwd.py, of both matrices. Of LayerNorm's parameters every head of every
sequence keeps its own sum.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import bias as biases
from .decays import chunk_decays
from .decays_bwd import decay_gradient
from .launch import Problem, launch
from .mlp_fwd import apart, recompute, together
from .mlp_math import (
    crossing,
    decayed_scores,
    decayed_scores_transposed,
    gelu,
    gelu_curve,
    gelu_slope,
    layer_norm_vjp,
    normalised,
    row_mean,
)
from .tiles import (
    LENGTHS,
    dot,
    inside,
    load_delta,
    load_gamma,
    load_gate,
    load_to_end,
    load_total,
    pair_decay,
    rounded,
    sequence_of,
    slot_of,
    store,
)

#: chunks x heads of a group, at least: several for every multiprocessor of the largest chips
CROWD = 1024


@triton.jit(do_not_specialize=LENGTHS)
def mlp_readout(
    q, k, lr, decays, ln_weight, grad_out,
    states, hidden, updates,
    inner_grad, hidden_q, grad_sums, scores, grad_scores, grad_norm, rows_pairs,
    cu_seqlens,
    T, H, ROW, FIRST, GROUP,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh,
    D: tl.constexpr, Hd: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr, DTYPE: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """Of one chunk: ``Ga``, ``Zq``, ``dUq``, ``L o Aq A'``, ``N1``, and its shares of dw, db and d log alpha."""
    NH: tl.constexpr = (Hd + BH - 1) // BH
    SIZE: tl.constexpr = Hd * D
    place = tl.program_id(0).to(tl.int64)
    i_h = tl.program_id(1).to(tl.int64)
    i_n, i_c = place // GROUP, FIRST + place % GROUP
    i_b, bos, eos = sequence_of(i_n, cu_seqlens, T)
    t0 = bos + i_c * C
    if t0 >= eos:
        return
    place = place * H + i_h
    o_c, o_d = tl.arange(0, C), tl.arange(0, BD)
    m_t, m_d = t0 + o_c < eos, inside(o_d, D, BD)
    m_td = m_t[:, None] & m_d[None, :]
    o_g, o_cd, o_cc = o_c * H, o_c[:, None] * D + o_d[None, :], o_c[:, None] * C + o_c[None, :]
    row = (i_b * T + t0) * H + i_h
    q += i_b * stride_qb + i_h * stride_qh + t0 * stride_qt
    k += i_b * stride_kb + i_h * stride_kh + t0 * stride_kt
    states += place * 2 * SIZE
    hidden += place * C * Hd
    inner_grad += place * C * Hd
    hidden_q += place * C * Hd

    b_q = tl.load(q + o_c[:, None] * stride_qt + o_d[None, :], mask=m_td, other=0.0)  # [C, BD]
    b_k = tl.load(k + o_c[:, None] * stride_kt + o_d[None, :], mask=m_td, other=0.0)  # [C, BD]
    store(scores + place * C * C + o_cc, decayed_scores(b_q, b_k, decays, None, ROW, row, H, C, o_c, m_t), None)
    tl.debug_barrier()
    b_p = tl.load(scores + place * C * C + o_cc)  # [t, s]
    b_gu = tl.load(updates + place * C * D + o_cd, mask=m_d[None, :], other=0.0)  # [C, BD]
    b_lr, b_gamma = load_gate(lr, row, o_g, m_t), load_gamma(decays, row, o_g, m_t, C)  # [C]
    b_uq = tl.zeros((C, BD), tl.float32)
    b_scores = tl.zeros((C, C), tl.float32)  # Aq A'
    for i in tl.range(0, NH, disable_licm=True):
        o_h = i * BH + tl.arange(0, BH)
        m_h = inside(o_h, Hd, BH)
        o_hd, m_hd = o_h[:, None] * D + o_d[None, :], m_h[:, None] & m_d[None, :]
        o_ch = o_c[:, None] * Hd + o_h[None, :]
        b_s1 = tl.load(states + o_hd, mask=m_hd, other=0.0)  # [BH, BD]
        b_w2 = tl.load(states + SIZE + o_hd, mask=m_hd, other=0.0)  # [BH, BD]
        b_z = tl.load(hidden + o_ch, mask=m_h[None, :], other=0.0).to(tl.float32)  # [C, BH]
        b_ga = dot(b_gu, tl.trans(b_s1))  # [C, BH]
        store(inner_grad + o_ch, b_ga, m_h[None, :])
        b_u2 = rounded(b_ga * gelu_slope(b_z) * b_lr[:, None], DTYPE)
        b_zq = dot(b_q, tl.trans(b_w2)) * b_gamma[:, None] - dot(b_p, b_u2)
        store(hidden_q + o_ch, b_zq, m_h[None, :])
        b_aq = rounded(gelu(b_zq), DTYPE)
        b_uq += dot(b_aq, b_s1)
        b_scores += dot(b_aq, tl.trans(rounded(gelu(b_z), DTYPE)))
    b_decay = pair_decay(decays, None, ROW, row, H, C, o_c[:, None], o_c[None, :], m_t[:, None], m_t[None, :])  # [t, s]
    tl.debug_barrier()
    b_gu = tl.load(updates + place * C * D + o_cd, mask=m_d[None, :], other=0.0)  # [C, BD]
    b_u1 = rounded(b_gu.to(tl.float32) * b_lr[:, None], DTYPE)  # [C, BD]
    b_p1 = rounded(b_scores * b_decay, DTYPE)
    store(scores + place * C * C + o_cc, b_p1, None)
    b_xq, b_inverse = normalised(b_uq * b_gamma[:, None] - dot(b_p1, b_u1), m_d, D, EPS)

    b_do = tl.load(grad_out + row * D + o_g[:, None] * D + o_d[None, :], mask=m_td, other=0.0).to(tl.float32)  # [C, BD]
    tl.store(grad_norm + place * 2 * D + o_d, tl.sum(b_do * b_xq, 0), mask=m_d)
    tl.store(grad_norm + place * 2 * D + D + o_d, tl.sum(b_do, 0), mask=m_d)
    b_weight = tl.load(ln_weight + i_h * D + o_d, mask=m_d, other=0.0)[None, :]
    b_du = rounded(layer_norm_vjp(b_xq, b_inverse, b_do * b_weight, m_d, D), DTYPE)  # [C, BD]
    store(grad_sums + place * C * D + o_cd, b_du, m_d[None, :])
    b_n = -dot(b_du, tl.trans(b_u1)) * b_decay  # [t, s]
    store(grad_scores + place * C * C + o_cc, b_n, None)
    if decays is not None:
        tl.store(rows_pairs + row + o_g, crossing(b_n * b_scores, o_c), mask=m_t)


@triton.jit(do_not_specialize=LENGTHS)
def mlp_pre(
    q, k, lr, decays, grad_out,
    states, hidden, updates, inner_grad, hidden_q, grad_sums, scores, grad_scores,
    grad_hidden_q, from_hidden, from_updates, from_inner, grad_q, rows_read, rows_pairs,
    cu_seqlens,
    T, H, ROW, FIRST, GROUP,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh,
    D: tl.constexpr, Hd: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Of one chunk: dQ, and what the output alone asks of A (RA), U1 (R1) and U2 (R2). ``grad_scores`` is N1 before and N2 after."""
    NH: tl.constexpr = (Hd + BH - 1) // BH
    SIZE: tl.constexpr = Hd * D
    place = tl.program_id(0).to(tl.int64)
    i_h = tl.program_id(1).to(tl.int64)
    i_n, i_c = place // GROUP, FIRST + place % GROUP
    i_b, bos, eos = sequence_of(i_n, cu_seqlens, T)
    t0 = bos + i_c * C
    if t0 >= eos:
        return
    place = place * H + i_h
    o_c, o_d = tl.arange(0, C), tl.arange(0, BD)
    m_t, m_d = t0 + o_c < eos, inside(o_d, D, BD)
    m_td = m_t[:, None] & m_d[None, :]
    o_g, o_cd = o_c * H, o_c[:, None] * D + o_d[None, :]
    o_td = o_g[:, None] * D + o_d[None, :]
    o_cc, o_cc_transposed = o_c[:, None] * C + o_c[None, :], o_c[None, :] * C + o_c[:, None]
    row = (i_b * T + t0) * H + i_h
    q += i_b * stride_qb + i_h * stride_qh + t0 * stride_qt
    k += i_b * stride_kb + i_h * stride_kh + t0 * stride_kt
    states += place * 2 * SIZE
    scores += place * C * C
    grad_scores += place * C * C
    of_chunk = place * C * Hd

    b_q = tl.load(q + o_c[:, None] * stride_qt + o_d[None, :], mask=m_td, other=0.0)  # [C, BD]
    b_k = tl.load(k + o_c[:, None] * stride_kt + o_d[None, :], mask=m_td, other=0.0)  # [C, BD]
    b_du = tl.load(grad_sums + place * C * D + o_cd, mask=m_d[None, :], other=0.0)  # [C, BD], dUq
    b_p1 = tl.load(scores + o_cc_transposed)  # [s, t]
    store(from_updates + place * C * D + o_cd, -dot(b_p1, b_du), m_d[None, :])  # R1
    b_n1, b_n1_transposed = tl.load(grad_scores + o_cc), tl.load(grad_scores + o_cc_transposed)  # [t, s], [s, t]
    b_lr, b_gamma = load_gate(lr, row, o_g, m_t), load_gamma(decays, row, o_g, m_t, C)  # [C]
    b_p = rounded(decayed_scores_transposed(b_q, b_k, decays, None, ROW, row, H, C, o_c, m_t), DTYPE)  # [s, t]
    b_read = tl.zeros((C,), tl.float32)
    b_n2 = tl.zeros((C, C), tl.float32)  # dZq U2'
    b_dq = tl.zeros((C, BD), tl.float32)
    for i in tl.range(0, NH, disable_licm=True):
        o_h = i * BH + tl.arange(0, BH)
        m_h = inside(o_h, Hd, BH)
        o_hd, m_hd = o_h[:, None] * D + o_d[None, :], m_h[:, None] & m_d[None, :]
        o_ch = of_chunk + o_c[:, None] * Hd + o_h[None, :]
        b_s1 = tl.load(states + o_hd, mask=m_hd, other=0.0)  # [BH, BD]
        b_zq = tl.load(hidden_q + o_ch, mask=m_h[None, :], other=0.0).to(tl.float32)  # [C, BH]
        b_z = tl.load(hidden + o_ch, mask=m_h[None, :], other=0.0).to(tl.float32)  # [C, BH]
        b_aq = gelu(b_zq)
        b_da = dot(b_du, tl.trans(b_s1)) * b_gamma[:, None]  # [C, BH], dAq
        b_read += tl.sum(b_da * b_aq, 1)
        b_da += dot(b_n1, rounded(gelu(b_z), DTYPE))
        store(from_hidden + o_ch, dot(b_n1_transposed, rounded(b_aq, DTYPE)), m_h[None, :])  # RA
        b_dz = rounded(gelu_slope(b_zq) * b_da, DTYPE)  # [C, BH], dZq
        store(grad_hidden_q + o_ch, b_dz, m_h[None, :])
        store(from_inner + o_ch, -dot(b_p, b_dz), m_h[None, :])  # R2
        b_ga = tl.load(inner_grad + o_ch, mask=m_h[None, :], other=0.0).to(tl.float32)  # [C, BH]
        b_n2 += dot(b_dz, tl.trans(rounded(b_ga * gelu_slope(b_z) * b_lr[:, None], DTYPE)))
        b_w2 = tl.load(states + SIZE + o_hd, mask=m_hd, other=0.0)  # [BH, BD]
        b_dq += dot(b_dz, b_w2)
    b_dq *= b_gamma[:, None]
    b_decay = pair_decay(decays, None, ROW, row, H, C, o_c[:, None], o_c[None, :], m_t[:, None], m_t[None, :])  # [t, s]
    b_n2 *= -b_decay
    tl.debug_barrier()  # N1 has been read
    store(grad_scores + o_cc, b_n2, None)
    if decays is not None:
        b_read += tl.sum(b_dq * b_q.to(tl.float32), 1)
        tl.store(rows_read + row + o_g, b_read, mask=m_t)
        tl.store(rows_pairs + row + o_g, crossing(b_n2 * dot(b_q, tl.trans(b_k)), o_c), mask=m_t)
    b_dq += dot(rounded(b_n2, DTYPE), b_k)
    b_do = tl.load(grad_out + row * D + o_td, mask=m_td, other=0.0).to(tl.float32)  # [C, BD]
    store(grad_q + row * D + o_td, b_do + b_dq, m_td)


@triton.jit(do_not_specialize=LENGTHS)
def mlp_seq(
    q, k, v, lr, decays, delta, ln_weight, ln_bias,
    states, hidden, updates, sums, inner_grad, hidden_q, grad_sums, grad_scores, grad_norm,
    grad_hidden_q, from_hidden, from_updates, from_inner, row_sums, grad_sum,
    grad_memory, grad_k, grad_v, grad_delta, grad_layer_norm, rows_lr, rows_delta, rows_kept, inner,
    cu_seqlens, first_slot,
    T, H, CHUNKS, ROW, SLOTS, FIRST, GROUP,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    D: tl.constexpr, Hd: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr, DTYPE: tl.constexpr, EPS: tl.constexpr,
    BIAS: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
    READS: tl.constexpr, COUPLED: tl.constexpr, DELTA: tl.constexpr,
):  # fmt: skip
    """J1 and J2, in place in ``grad_memory``, from the last chunk of a group to its first.

    A chunk is four passes over the hidden units (dGu, dZ, J1, J2 with dK) and, after the first, one over its tokens for what LayerNorm
    and the bias do to a row. ``from_inner`` becomes dGz, ``from_hidden`` dZ.
    """
    NH: tl.constexpr = (Hd + BH - 1) // BH
    SIZE: tl.constexpr = Hd * D
    BR: tl.constexpr = 16  # tokens that go through LayerNorm at once
    i_n = tl.program_id(0).to(tl.int64)
    i_h = tl.program_id(1).to(tl.int64)
    i_b, bos, eos = sequence_of(i_n, cu_seqlens, T)
    last = tl.minimum(((eos - bos + C - 1) // C).to(tl.int32), FIRST + GROUP)
    slot = slot_of(i_n, first_slot, CHUNKS)

    o_c, o_d = tl.arange(0, C), tl.arange(0, BD)
    m_d = inside(o_d, D, BD)
    o_g, o_cd = o_c * H, o_c[:, None] * D + o_d[None, :]
    o_td = o_g[:, None] * D + o_d[None, :]
    q += i_b * stride_qb + i_h * stride_qh
    k += i_b * stride_kb + i_h * stride_kh
    v += i_b * stride_vb + i_h * stride_vh
    grad_memory += (i_n * H + i_h) * 2 * SIZE
    row_sums += (i_n * H + i_h) * 2 * C * D
    grad_sum += (i_n * H + i_h) * C * D
    grad_layer_norm += (i_n * H + i_h) * 2 * D

    for i_r in tl.range(0, last - FIRST, disable_licm=True):
        i_c = last - 1 - i_r
        place = (i_n * GROUP + i_c - FIRST) * H + i_h
        t0 = bos + i_c * C
        m_t = t0 + o_c < eos
        m_td = m_t[:, None] & m_d[None, :]
        row = (i_b * T + t0) * H + i_h
        of_chunk = place * C * Hd
        p_w = states + place * 2 * SIZE
        b_lr = load_gate(lr, row, o_g, m_t)  # [C]
        b_to_end = load_to_end(decays, ROW, row, o_g, m_t, C)  # [C]
        gamma = load_total(decays, row, (tl.minimum(eos - t0, C) - 1) * H)
        b_k = tl.load(k + t0 * stride_kt + o_c[:, None] * stride_kt + o_d[None, :], mask=m_td, other=0.0)  # [C, BD]

        # dGu
        b_aj = tl.zeros((C, BD), tl.float32)
        b_dgu = tl.zeros((C, BD), tl.float32)
        b_dlr = tl.zeros((C,), tl.float32)
        b_kept = tl.zeros((C,), tl.float32)
        for i in tl.range(0, NH, disable_licm=True):
            o_h = i * BH + tl.arange(0, BH)
            m_h = inside(o_h, Hd, BH)
            o_hd, m_hd = o_h[:, None] * D + o_d[None, :], m_h[:, None] & m_d[None, :]
            o_ch = of_chunk + o_c[:, None] * Hd + o_h[None, :]
            b_z = tl.load(hidden + o_ch, mask=m_h[None, :], other=0.0).to(tl.float32)  # [C, BH]
            b_slope = gelu_slope(b_z)
            b_j1 = rounded(tl.load(grad_memory + o_hd, mask=m_hd, other=0.0), DTYPE)  # [BH, BD]
            b_j2 = rounded(tl.load(grad_memory + SIZE + o_hd, mask=m_hd, other=0.0), DTYPE)  # [BH, BD]
            b_aj += dot(rounded(gelu(b_z), DTYPE), b_j1)
            b_kj = dot(b_k, tl.trans(b_j2)) * b_to_end[:, None]  # [C, BH]
            b_du = tl.load(from_inner + o_ch, mask=m_h[None, :], other=0.0).to(tl.float32) - b_kj  # [C, BH], dU2
            b_gz = tl.load(inner_grad + o_ch, mask=m_h[None, :], other=0.0).to(tl.float32) * b_slope
            b_dlr += tl.sum(b_du * b_gz, 1)
            b_kept -= tl.sum(b_kj * b_gz, 1)
            b_dgz = b_du * b_lr[:, None]
            store(from_inner + o_ch, b_dgz, m_h[None, :])
            b_s1 = tl.load(p_w + o_hd, mask=m_hd, other=0.0)  # [BH, BD]
            b_dgu += dot(rounded(b_slope * b_dgz, DTYPE), b_s1)

        tl.store(row_sums + o_cd, b_aj, mask=m_d[None, :])
        tl.store(row_sums + C * D + o_cd, b_dgu, mask=m_d[None, :])
        tl.store(rows_lr + row + o_g, b_dlr, mask=m_t)
        if decays is not None:
            tl.store(rows_kept + row + o_g, b_kept, mask=m_t)
        tl.debug_barrier()

        # through Gu = (g - mean(g) - x mean(g o x)) / deviation with g = psi w, to psi, x and the deviation; some tokens at a time
        b_weight = tl.load(ln_weight + i_h * D + o_d, mask=m_d, other=0.0)[None, :]  # [1, BD]
        b_bias = tl.load(ln_bias + i_h * D + o_d, mask=m_d, other=0.0)[None, :]  # [1, BD]
        p_norm = grad_norm + place * 2 * D
        b_dweight = tl.load(p_norm + o_d, mask=m_d, other=0.0) + tl.load(grad_layer_norm + o_d, mask=m_d, other=0.0)  # [BD]
        b_dbias = tl.load(p_norm + D + o_d, mask=m_d, other=0.0) + tl.load(grad_layer_norm + D + o_d, mask=m_d, other=0.0)  # [BD]
        for i in tl.range(0, C // BR, disable_licm=True):
            o_r = i * BR + tl.arange(0, BR)
            m_r = t0 + o_r < eos
            m_rd, p_rd = m_r[:, None] & m_d[None, :], o_r[:, None] * D + o_d[None, :]
            o_rg = row + o_r * H
            o_rd = row * D + o_r[:, None] * (H * D) + o_d[None, :]
            b_x, b_inverse = normalised(tl.load(sums + place * C * D + p_rd, mask=m_d[None, :], other=0.0), m_d, D, EPS)  # [BR, BD]
            b_e = -tl.load(v + (t0 + o_r)[:, None] * stride_vt + o_d[None, :], mask=m_rd, other=0.0).to(tl.float32)  # [BR, BD]
            if READS:
                b_kr = tl.load(k + (t0 + o_r)[:, None] * stride_kt + o_d[None, :], mask=m_rd, other=0.0).to(tl.float32)
                b_e = tl.where(m_rd, b_e + b_kr + b_x * b_weight + b_bias, 0.0)
            b_square = 0.0
            if COUPLED:
                b_square = tl.sum(b_e * b_e, 1)[:, None]  # [BR, 1]
            b_delta = load_delta(delta, row, o_r * H, o_rd - row * D, m_r, m_rd, D, DELTA)
            b_psi = biases.value(b_e, b_square, b_delta, BIAS, P0, P1, P2)
            b_gu = layer_norm_vjp(b_x, b_inverse, b_psi * b_weight, m_d, D)  # [BR, BD]
            b_eta, b_dec = load_gate(lr, row, o_r * H, m_r), load_to_end(decays, ROW, row, o_r * H, m_r, BR)  # [BR]
            b_ar = tl.load(row_sums + p_rd, mask=m_d[None, :], other=0.0) * b_dec[:, None]  # dec (A J1)
            b_du1 = tl.load(from_updates + place * C * D + p_rd, mask=m_d[None, :], other=0.0).to(tl.float32) - b_ar  # dU1
            tl.store(rows_lr + o_rg, tl.load(rows_lr + o_rg, mask=m_r, other=0.0) + tl.sum(b_du1 * b_gu, 1), mask=m_r)
            if decays is not None:
                b_rest = tl.load(rows_kept + o_rg, mask=m_r, other=0.0)
                tl.store(rows_kept + o_rg, b_eta * (b_rest - tl.sum(b_ar * b_gu, 1)), mask=m_r)
            b_g = tl.load(row_sums + C * D + p_rd, mask=m_d[None, :], other=0.0) + b_du1 * b_eta[:, None]  # dGu

            b_dx = -b_inverse * (b_g * row_mean(b_psi * b_weight * b_x, D) + b_psi * b_weight * row_mean(b_g * b_x, D))
            b_dpsi = layer_norm_vjp(b_x, b_inverse, b_g, m_d, D)
            b_dweight += tl.sum(b_dpsi * b_psi, 0)
            b_dpsi *= b_weight
            b_de = b_dpsi * biases.slope(b_e, b_square, b_delta, BIAS, P0, P1, P2)  # [BR, BD]
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
            store(grad_sum + p_rd, b_ds, m_d[None, :])
        tl.store(grad_layer_norm + o_d, b_dweight, mask=m_d)
        tl.store(grad_layer_norm + D + o_d, b_dbias, mask=m_d)
        tl.debug_barrier()

        # dZ
        b_gu = tl.load(updates + place * C * D + o_cd, mask=m_d[None, :], other=0.0)  # [C, BD]
        b_u1_end = rounded(b_gu.to(tl.float32) * (b_lr * b_to_end)[:, None], DTYPE)  # [C, BD]
        b_du = tl.load(grad_sum + o_cd, mask=m_d[None, :], other=0.0)  # [C, BD]
        product = 0.0
        for i in tl.range(0, NH, disable_licm=True):
            o_h = i * BH + tl.arange(0, BH)
            m_h = inside(o_h, Hd, BH)
            o_hd, m_hd = o_h[:, None] * D + o_d[None, :], m_h[:, None] & m_d[None, :]
            o_ch = of_chunk + o_c[:, None] * Hd + o_h[None, :]
            b_j = tl.load(grad_memory + o_hd, mask=m_hd, other=0.0)  # [BH, BD]
            b_s1 = tl.load(p_w + o_hd, mask=m_hd, other=0.0)  # [BH, BD]
            product += tl.sum(b_j * b_s1.to(tl.float32))
            b_da = tl.load(from_hidden + o_ch, mask=m_h[None, :], other=0.0).to(tl.float32)
            b_da += dot(b_du, tl.trans(b_s1)) - dot(b_u1_end, tl.trans(rounded(b_j, DTYPE)))  # [C, BH]
            b_z = tl.load(hidden + o_ch, mask=m_h[None, :], other=0.0).to(tl.float32)  # [C, BH]
            b_dgz = tl.load(from_inner + o_ch, mask=m_h[None, :], other=0.0).to(tl.float32)  # [C, BH]
            b_ga = tl.load(inner_grad + o_ch, mask=m_h[None, :], other=0.0).to(tl.float32)  # [C, BH]
            store(from_hidden + o_ch, gelu_slope(b_z) * b_da + gelu_curve(b_z) * b_ga * b_dgz, m_h[None, :])
        tl.debug_barrier()

        # J1
        b_gu = tl.load(updates + place * C * D + o_cd, mask=m_d[None, :], other=0.0)  # [C, BD]
        b_du = tl.load(grad_sum + o_cd, mask=m_d[None, :], other=0.0)  # [C, BD]
        b_gamma = load_gamma(decays, row, o_g, m_t, C)  # [C]
        b_duq = tl.load(grad_sums + place * C * D + o_cd, mask=m_d[None, :], other=0.0).to(tl.float32)
        b_duq = rounded(b_duq * b_gamma[:, None], DTYPE)  # [C, BD]
        for i in tl.range(0, NH, disable_licm=True):
            o_h = i * BH + tl.arange(0, BH)
            m_h = inside(o_h, Hd, BH)
            o_hd, m_hd = o_h[:, None] * D + o_d[None, :], m_h[:, None] & m_d[None, :]
            o_hc = of_chunk + o_c[None, :] * Hd + o_h[:, None]
            b_zq = tl.load(hidden_q + o_hc, mask=m_h[:, None], other=0.0).to(tl.float32)  # [BH, C]
            b_j = tl.load(grad_memory + o_hd, mask=m_hd, other=0.0) * gamma + dot(rounded(gelu(b_zq), DTYPE), b_duq)  # [BH, BD]
            b_z = tl.load(hidden + o_hc, mask=m_h[:, None], other=0.0).to(tl.float32)  # [BH, C]
            b_dgz = tl.load(from_inner + o_hc, mask=m_h[:, None], other=0.0).to(tl.float32)  # [BH, C]
            b_j += dot(rounded(gelu_slope(b_z) * b_dgz, DTYPE), b_gu) + dot(rounded(gelu(b_z), DTYPE), b_du)
            tl.store(grad_memory + o_hd, b_j, mask=m_hd)
        tl.debug_barrier()

        # J2 and dK
        b_q = tl.load(q + t0 * stride_qt + o_c[:, None] * stride_qt + o_d[None, :], mask=m_td, other=0.0)  # [C, BD]
        b_n = tl.load(grad_scores + place * C * C + o_c[None, :] * C + o_c[:, None])  # [s, t]
        b_dk = dot(b_n, b_q)  # [C, BD]
        if READS:
            b_dk -= tl.load(grad_v + row * D + o_td, mask=m_td, other=0.0).to(tl.float32)  # dE = -dV
        b_k = tl.load(k + t0 * stride_kt + o_c[:, None] * stride_kt + o_d[None, :], mask=m_td, other=0.0)  # [C, BD]
        b_q = rounded(b_q.to(tl.float32) * b_gamma[:, None], DTYPE)
        for i in tl.range(0, NH, disable_licm=True):
            o_h = i * BH + tl.arange(0, BH)
            m_h = inside(o_h, Hd, BH)
            o_hd, m_hd = o_h[:, None] * D + o_d[None, :], m_h[:, None] & m_d[None, :]
            o_ch = of_chunk + o_c[:, None] * Hd + o_h[None, :]
            b_z = tl.load(hidden + o_ch, mask=m_h[None, :], other=0.0).to(tl.float32)  # [C, BH]
            b_ga = tl.load(inner_grad + o_ch, mask=m_h[None, :], other=0.0).to(tl.float32)  # [C, BH]
            b_dz = tl.load(from_hidden + o_ch, mask=m_h[None, :], other=0.0)  # [C, BH]
            b_dzq = tl.load(grad_hidden_q + o_ch, mask=m_h[None, :], other=0.0)  # [C, BH]
            b_j = tl.load(grad_memory + SIZE + o_hd, mask=m_hd, other=0.0)  # [BH, BD]
            b_w2 = tl.load(p_w + SIZE + o_hd, mask=m_hd, other=0.0)  # [BH, BD]
            b_u2_end = rounded(b_ga * gelu_slope(b_z) * (b_lr * b_to_end)[:, None], DTYPE)  # [C, BH]
            b_dk += dot(b_dz, b_w2) - dot(b_u2_end, rounded(b_j, DTYPE))
            product += tl.sum(b_j * b_w2.to(tl.float32))
            b_j = b_j * gamma + dot(tl.trans(b_dzq), b_q) + dot(tl.trans(b_dz), b_k)
            tl.store(grad_memory + SIZE + o_hd, b_j, mask=m_hd)
        store(grad_k + row * D + o_td, b_dk, m_td)
        if decays is not None:
            tl.store(inner + (slot + i_c) * H + i_h, product)
        tl.debug_barrier()


# --------------------------------------------------------------------------------------------------------------- launcher


class Between(NamedTuple):
    """What the three kernels hand to each other, for every chunk of a group and head."""

    inner_grad: Tensor  # [chunks, H, C, Hd]   Ga
    hidden_q: Tensor  # [chunks, H, C, Hd]   Zq
    grad_hidden_q: Tensor  # [chunks, H, C, Hd]   dZq
    from_hidden: Tensor  # [chunks, H, C, Hd]   RA, then dZ
    from_inner: Tensor  # [chunks, H, C, Hd]   R2, then dGz
    from_updates: Tensor  # [chunks, H, C, D]   R1
    grad_sums: Tensor  # [chunks, H, C, D]   dUq
    scores: Tensor  # [chunks, H, C, C]   L o Aq A'
    grad_scores: Tensor  # [chunks, H, C, C]   N1, then N2
    grad_norm: Tensor  # [chunks, H, 2, D] float32   shares of dw, db

    @staticmethod
    def of(p: Problem, chunks: int) -> Between:
        wide = [p.empty(chunks, p.heads, p.chunk_size, p.hidden) for _ in range(5)]
        narrow = [p.empty(chunks, p.heads, p.chunk_size, p.value_dim) for _ in range(2)]
        square = [p.empty(chunks, p.heads, p.chunk_size, p.chunk_size) for _ in range(2)]
        return Between(*wide, *narrow, *square, p.empty(chunks, p.heads, 2, p.value_dim, dtype=torch.float32))

    def only(self, *names: str) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in names}


def backward(p: Problem, checkpoints: Tensor, every: int, grad_out: Tensor, grad_state: list[Tensor]) -> dict:
    """Gradients by argument name, ``state`` for the initial matrices ``[N, H, D, Hd]`` and ``[N, H, Hd, D]``."""
    decays, grad_out = chunk_decays(p), grad_out.contiguous()
    float32, decaying, per_token = torch.float32, decays is not None, p.bias["DELTA"] == 1

    def rows(count: int, wanted: bool = True) -> Tensor | None:
        return p.empty(count, p.batch, p.tokens, p.heads, dtype=float32) if wanted else None

    rows_lr, rows_delta, rows_kept = rows(1), rows(1, per_token), rows(1, decaying)
    rows_read, rows_pairs = rows(1, decaying), rows(2, decaying)
    inner = p.empty(1, p.slots.count, p.heads, dtype=float32) if decaying else None
    grad_q, grad_k, grad_v = (p.per_token(p.value_dim) for _ in range(3))
    grad_delta = p.per_token(p.value_dim, dtype=float32) if p.bias["DELTA"] == 2 else None
    grad_memory = together(grad_state or tuple(torch.zeros_like(x) for x in p.call.state.dual))
    grad_layer_norm = p.empty(p.sequences, p.heads, 2, p.value_dim, dtype=float32).zero_()
    row_sums = p.empty(p.sequences, p.heads, 2, p.chunk_size, p.value_dim, dtype=float32)
    grad_sum = p.empty(p.sequences, p.heads, p.chunk_size, p.value_dim)

    longest = -(-p.tokens // (p.chunk_size * every))  # segments of a sequence, at most
    count = min(longest, -(-CROWD // (every * p.sequences * p.heads)))
    between = Between.of(p, p.sequences * count * every)
    for first in reversed(range(0, longest, count)):
        group = recompute(p, decays, checkpoints, every, first, count)
        of_chunk = dict(states=group.states, hidden=group.hidden, updates=group.updates)
        common = dict(k=p.k, lr=p.lr, decays=decays, cu_seqlens=p.cu_seqlens, ROW=p.row, FIRST=first * every, GROUP=count * every)
        common |= dict(q=p.q, **p.strides("q", "k"))
        sizes = {name: x for name, x in p.sizes.items() if name != "EPS"}
        chunks = p.sequences * count * every
        launch(
            mlp_readout, p, chunks, "hidden",
            ln_weight=p.layer_norm["ln_weight"], grad_out=grad_out, **of_chunk,
            **between.only("inner_grad", "hidden_q", "grad_sums", "scores", "grad_scores", "grad_norm"),
            rows_pairs=None if rows_pairs is None else rows_pairs[0], **common, **p.sizes,
        )  # fmt: skip
        launch(
            mlp_pre, p, chunks, "hidden",
            grad_out=grad_out, **of_chunk, **between.only("inner_grad", "hidden_q", "grad_sums", "scores", "grad_scores"),
            **between.only("grad_hidden_q", "from_hidden", "from_updates", "from_inner"), grad_q=grad_q,
            rows_read=rows_read, rows_pairs=None if rows_pairs is None else rows_pairs[1], **common, **sizes,
        )  # fmt: skip
        launch(
            mlp_seq, p, p.sequences, "hidden",
            v=p.v, delta=p.delta, **p.layer_norm, **of_chunk, sums=group.sums,
            **{name: x for name, x in between._asdict().items() if name != "scores"}, row_sums=row_sums, grad_sum=grad_sum,
            grad_memory=grad_memory, grad_k=grad_k, grad_v=grad_v, grad_delta=grad_delta, grad_layer_norm=grad_layer_norm,
            rows_lr=rows_lr, rows_delta=rows_delta, rows_kept=rows_kept, inner=inner,
            first_slot=p.slots.first, CHUNKS=p.slots.per_sequence, SLOTS=p.slots.count, **common,
            **p.strides("v"), **p.sizes, **p.bias,
        )  # fmt: skip

    grads = {"q": grad_q, "k": grad_k, "v": grad_v, "lr": rows_lr[0], "state": list(apart(grad_memory))}
    grads["ln_weight"], grads["ln_bias"] = grad_layer_norm.sum(0).unbind(1)
    if decaying:
        grads["log_decay"] = decay_gradient(p, decays, rows_read, rows_pairs.sum(0, keepdim=True), rows_kept, inner, p.chunk_size)
    if p.delta is not None:
        grads["delta"] = rows_delta[0] if per_token else grad_delta
    return grads
