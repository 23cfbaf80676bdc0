"""The MLP memory forward (SPEC section 5): one program a sequence and head, walking its chunks.

    W = phi(A), rho of both duals, for a gate other than L2                                   mirror
    P = L o Q K'                                                                              weigh
    Z = K W2';  A = gelu(Z);  U = A S1                                                        predict
    E = K + LN(U) - V;  g = psi(E);  Gu = LN-vjp(w g)                                         inner_gradient
    Ga = Gu S1';  Gz = Ga o gelu'(Z);  Zq = gamma (Q W2') - P (eta Gz);  Aq = gelu(Zq)
    Uq = gamma (Aq S1) - (L o Aq A') (eta Gu)                                                 read
    O = Q + LN(Uq)                                                                            put_out
    S1 <- gamma_C S1 - A' (dec eta Gu);   W2 <- gamma_C W2 - (dec eta Gz)' K                  write

``S1 = W1' [Hd, D]`` and ``W2 [Hd, D]`` lie side by side in ``memory [.., 2, Hd, D]`` float32, which belongs to the program: it is
read and written in place, ``BH`` hidden units at a time, and never grows, so that it stays in the caches of the chip. Three passes over
the hidden units make a chunk: predict, read, write. The barriers between the stages order what threads wrote for each other.

With a gate `memory` holds the duals, and all products but those of `write` take their phi, which `mirror` puts into ``states``; what a
token reads of its own chunk is scaled by rho. With momentum `memory [.., 4, Hd, D]` holds M1', M2 of both matrices as well, L is M of
decays.py, and

    Zq += b (Q M2');  Uq += b (Aq M1')       S1 <- gamma_C S1 + b_C M1 - A' (M_C eta Gu)      M1 <- pi_C M1 - A' (Theta_C eta Gu)

No tile that a matrix product left in registers is transposed into another product: the compilers of several Triton releases get
that wrong. Where a product needs it, the transposed tile is computed (``Ga'``) or read back from memory (``Z'``, ``Gu'``).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import bias as biases
from . import retention as retentions
from .chunks import BODY, HEAD, SEGMENT, TAIL, WHOLE, of_chunk, part_of, sequence_of, slot_of
from .decays import Weights, chunk_weights
from .final_state import Final, open_chunk_end
from .gates import CARRY, load_delta, load_gamma, load_gate, load_to_end, load_total, pair_decay
from .launch import Problem, launch
from .mlp_math import ROWS, gelu, gelu_slope, lanes, layer_norm_vjp, normalised
from .tiles import LENGTHS, dot, inside, load_tile, rounded, store


@triton.jit
def keep(memory, kept, i_c, MATRICES: tl.constexpr, D: tl.constexpr, Hd: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr):
    """All matrices to ``kept``, as they stand."""
    o_d = lanes(BD, i_c, 0)
    m_d = inside(o_d, D, BD)
    for i in tl.range(0, (Hd + BH - 1) // BH, disable_licm=True):
        o_h = i * BH + lanes(BH, i_c, 0)
        o_hd, m_hd = o_h[:, None] * D + o_d[None, :], inside(o_h, Hd, BH)[:, None] & m_d[None, :]
        for matrix in tl.static_range(MATRICES):
            tl.store(kept + matrix * Hd * D + o_hd, tl.load(memory + matrix * Hd * D + o_hd, mask=m_hd, other=0.0), mask=m_hd)


@triton.jit
def mirror(
    memory, p_w, i_c,
    D: tl.constexpr, Hd: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr, RETENTION: tl.constexpr, R0: tl.constexpr, R1: tl.constexpr,
):  # fmt: skip
    """``phi`` of both duals to ``p_w``; returns their rho. A row of W1 is a column of S1, a row of W2 one of ``memory``.

    S1 is read through a LayerNorm alone, for which the mean of its row is nothing. Where all of W1 lies about 1/2 that mean is taken off:
    rounding it would be an error as large as what is left.
    """
    SIZE: tl.constexpr = Hd * D
    PADDING: tl.constexpr = retentions.BOTTOM if RETENTION == retentions.ROWS else 0.0
    o_d = lanes(BD, i_c, 8)
    m_d = inside(o_d, D, BD)
    b_shift1 = tl.full((BD,), retentions.BOTTOM, tl.float32)
    b_total1, b_total2 = tl.zeros((BD,), tl.float32), tl.zeros((BD,), tl.float32)
    if RETENTION == retentions.ROWS or RETENTION == retentions.ENTIRE:
        for i in tl.range(0, (Hd + BH - 1) // BH, disable_licm=True):
            o_h = i * BH + lanes(BH, i_c, 8)
            o_hd, m_hd = o_h[:, None] * D + o_d[None, :], inside(o_h, Hd, BH)[:, None] & m_d[None, :]
            b_a1 = tl.load(memory + o_hd, mask=m_hd, other=PADDING)  # [BH, BD]
            if RETENTION == retentions.ROWS:
                b_larger = tl.maximum(b_shift1, tl.max(b_a1, 0))
                b_total1 = b_total1 * tl.exp(b_shift1 - b_larger)
                b_shift1 = b_larger
            b_total1 += tl.sum(retentions.term(b_a1, b_shift1[None, :], RETENTION, R0, R1), 0)
            if RETENTION == retentions.ENTIRE:
                b_a2 = tl.load(memory + SIZE + o_hd, mask=m_hd, other=PADDING)  # [BH, BD]
                b_total2 += tl.sum(retentions.term(b_a2, 0.0, RETENTION, R0, R1), 0)
    rho1, rho2 = 1.0, 1.0
    total1, total2 = b_total1[None, :], b_total2[None, :]
    if RETENTION == retentions.ENTIRE:
        total1 = tl.sum(b_total1, 0) + retentions.floor(RETENTION, R0, R1)
        total2 = tl.sum(b_total2, 0) + retentions.floor(RETENTION, R0, R1)
        rho1, rho2 = retentions.scale(total1, RETENTION, R0, R1), retentions.scale(total2, RETENTION, R0, R1)
    for i in tl.range(0, (Hd + BH - 1) // BH, disable_licm=True):
        o_h = i * BH + lanes(BH, i_c, 9)
        o_hd, m_hd = o_h[:, None] * D + o_d[None, :], inside(o_h, Hd, BH)[:, None] & m_d[None, :]
        b_a1 = tl.load(memory + o_hd, mask=m_hd, other=PADDING)  # [BH, BD]
        b_w1 = retentions.primal(b_a1, b_shift1[None, :], total1, RETENTION, R0, R1)
        if RETENTION == retentions.SIGMOID:
            b_w1 = tl.where(m_hd, b_w1 - (tl.sum(tl.where(m_hd, b_w1, 0.0), 1) / D)[:, None], 0.0)
        store(p_w + o_hd, b_w1, m_hd)
        b_a2 = tl.load(memory + SIZE + o_hd, mask=m_hd, other=PADDING)  # [BH, BD]
        b_shift2 = tl.max(b_a2, 1)[:, None]
        b_total = total2
        if RETENTION == retentions.ROWS:
            b_total = tl.sum(retentions.term(b_a2, b_shift2, RETENTION, R0, R1), 1)[:, None]  # [BH, 1]
        store(p_w + SIZE + o_hd, retentions.primal(b_a2, b_shift2, b_total, RETENTION, R0, R1), m_hd)
    return rho1, rho2


@triton.jit
def weigh(
    q, k, decays, p_pairs, p_scores, stride_qt, stride_kt, ROW, row, H, t0, bos, eos, i_c,
    D: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, PART: tl.constexpr, MOMENTUM: tl.constexpr,
):  # fmt: skip
    """L (with momentum it is there: M) and ``L o Q K'`` of a chunk, for the read."""
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
def predict(
    k, predicting, p_z, p_u, p_w, stride_kt, t0, bos, eos, i_c,
    D: tl.constexpr, Hd: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr, DTYPE: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Z and U of a chunk; copies the matrices to ``p_w``, if there is one."""
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
    BIAS: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
    READS: tl.constexpr, COUPLED: tl.constexpr, DELTA: tl.constexpr,
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
        if READS:
            b_k = load_tile(k, stride_kt, o_r, o_d, m_r, m_d).to(tl.float32)  # [ROWS, BD]
            b_e = tl.where(m_rd, b_e + b_k + b_x * b_weight + b_bias, 0.0)
        b_square = 0.0
        if COUPLED:
            b_square = tl.sum(b_e * b_e, 1)[:, None]  # [ROWS, 1]
        b_delta = load_delta(delta, row, o_g, o_g[:, None] * D + o_d[None, :], m_r, m_rd, D, DELTA)
        b_psi = biases.value(b_e, b_square, b_delta, BIAS, P0, P1, P2)
        store(p_gu + o_rd, layer_norm_vjp(b_x, b_inverse, b_psi * b_weight, m_d, D), m_d[None, :])


@triton.jit
def read(
    q, lr, decays, reading, predicting, moving, rho1, rho2,
    p_z, p_gu, p_pairs, p_scores, p_u, stride_qt, ROW, row, H, t0, bos, eos, i_c,
    D: tl.constexpr, Hd: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr, DTYPE: tl.constexpr, PART: tl.constexpr,
    RETENTION: tl.constexpr,
):  # fmt: skip
    """Uq, in the place of U. ``reading`` is what a token reads before writes of its chunk, ``predicting`` where gradients are taken."""
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
        b_own = dot(b_p, b_gz)  # [C, BH], what the chunk has written so far, up to its sign
        if moving is not None:
            b_m2 = rounded(tl.load(moving + Hd * D + o_hd, mask=m_hd, other=0.0), DTYPE)  # [BH, BD]
            b_own -= dot(b_q, tl.trans(b_m2)) * b_carry[:, None]
        if RETENTION == retentions.ENTIRE:
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
    if RETENTION == retentions.ENTIRE:
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


@triton.jit
def write(
    k, lr, decays, moves, memory, predicting, moving, p_z, p_gu, p_duals, p_momenta, stride_kt, ROW, row, H, t0, bos, eos, i_c,
    D: tl.constexpr, Hd: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr, DTYPE: tl.constexpr, PART: tl.constexpr,
    RETENTION: tl.constexpr,
):  # fmt: skip
    """All matrices at the chunk's end, in place; a segment's duals and momenta before."""
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
        if PART == HEAD or RETENTION != retentions.L2:
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


@triton.jit(do_not_specialize=LENGTHS)
def mlp_chain(
    q, k, v, lr, decays, moves, delta, ln_weight, ln_bias,
    memory, opened, readouts, opened_scales, position,
    hidden, updates, pairs, scores, checkpoints, states, duals, momenta, scales, sums, out,
    cu_seqlens, first_slot, first_segment,
    T, H, CHUNKS, ROW, SEGMENTS, EVERY, FIRST, GROUP,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    D: tl.constexpr, Hd: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr, DTYPE: tl.constexpr, EPS: tl.constexpr,
    PART: tl.constexpr,
    BIAS: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
    READS: tl.constexpr, COUPLED: tl.constexpr, DELTA: tl.constexpr,
    RETENTION: tl.constexpr, R0: tl.constexpr, R1: tl.constexpr, MOMENTUM: tl.constexpr,
):  # fmt: skip
    """One memory through the chunks of one sequence, or of one of its segments.

    A segment (``PART == SEGMENT``) keeps of every chunk what the backward reads: ``states`` before it (the primals), Z in ``hidden``, Gu
    in ``updates``, U in ``sums``; with a gate also ``duals``, and rho in ``scales`` if it has one; with momentum ``momenta``.
    Otherwise these hold one chunk, and ``out`` is written.
    """
    SIZE: tl.constexpr = Hd * D
    MATRICES: tl.constexpr = 4 if MOMENTUM else 2
    GATED: tl.constexpr = RETENTION != retentions.L2
    i_s = tl.program_id(0).to(tl.int64)
    i_h = tl.program_id(1).to(tl.int64)
    i_n, i_segment = i_s, i_s * 0
    if PART == SEGMENT:
        i_n, i_segment = i_s // GROUP, FIRST + i_s % GROUP
    i_b, bos, eos = sequence_of(i_n, cu_seqlens, T)
    origin, first, last = part_of(i_n, i_segment, bos, eos, position, EVERY, C, PART)
    segment_slot = slot_of(i_n, first_segment, SEGMENTS)
    q += i_b * stride_qb + i_h * stride_qh
    k += i_b * stride_kb + i_h * stride_kh
    v += i_b * stride_vb + i_h * stride_vh
    ln_weight += i_h * D
    ln_bias += i_h * D
    memory += (i_s * H + i_h) * MATRICES * SIZE
    moving = None
    if MOMENTUM:
        moving = memory + 2 * SIZE

    for i_c in tl.range(first, last, disable_licm=True):
        t0 = origin + i_c * C
        row = (i_b * T + t0) * H + i_h  # of the chunk's first token in the contiguous [B, T, H, ...] tensors
        p_q, p_k, p_v = q + t0 * stride_qt, k + t0 * stride_kt, v + t0 * stride_vt
        place = i_s
        if PART == SEGMENT:
            place = i_s * EVERY + i_c - first
        place = place * H + i_h
        p_z, p_gu, p_u = hidden + place * C * Hd, updates + place * C * D, sums + place * C * D
        p_copy, p_duals, p_momenta = None, None, None
        if PART == SEGMENT and not GATED:
            p_copy = states + place * 2 * SIZE
        if PART == SEGMENT and GATED:
            p_duals = duals + place * 2 * SIZE
        if PART == SEGMENT and MOMENTUM:
            p_momenta = momenta + place * 2 * SIZE
        if checkpoints is not None:
            if i_c % EVERY == 0:
                keep(memory, checkpoints + ((segment_slot + i_c // EVERY) * H + i_h) * MATRICES * SIZE, i_c, MATRICES, D, Hd, BD, BH)

        predicting, reading = memory, memory
        rho1, rho2 = 1.0, 1.0
        if PART == HEAD:  # a chunk that was open before takes its gradients at its own start
            predicting = opened + place * 2 * SIZE
            if GATED:
                reading = readouts + place * 2 * SIZE
            if RETENTION == retentions.ENTIRE:
                rho1, rho2 = tl.load(opened_scales + place * 2), tl.load(opened_scales + place * 2 + 1)
        elif GATED:
            predicting = states + place * 2 * SIZE
            reading = predicting
            rho1, rho2 = mirror(memory, predicting, i_c, D, Hd, BD, BH, RETENTION, R0, R1)
            if scales is not None:
                tl.store(scales + place * 2, rho1)
                tl.store(scales + place * 2 + 1, rho2)
            tl.debug_barrier()

        if out is not None:
            p_pairs, p_scores = pairs + place * C * C, scores + place * C * C
            if MOMENTUM:
                p_pairs = pairs + ((slot_of(i_n, first_slot, CHUNKS) + i_c) * H + i_h) * C * C
            weigh(p_q, p_k, decays, p_pairs, p_scores, stride_qt, stride_kt, ROW, row, H, t0, bos, eos, i_c, D, C, BD, PART, MOMENTUM)
        predict(p_k, predicting, p_z, p_u, p_copy, stride_kt, t0, bos, eos, i_c, D, Hd, C, BD, BH, DTYPE, PART)
        tl.debug_barrier()
        inner_gradient(
            p_k, p_v, delta, ln_weight, ln_bias, p_u, p_gu, stride_kt, stride_vt, row, H, t0, bos, eos, i_c,
            D, C, BD, EPS, PART, BIAS, P0, P1, P2, READS, COUPLED, DELTA,
        )  # fmt: skip
        tl.debug_barrier()
        if out is not None:
            read(
                p_q, lr, decays, reading, predicting, moving, rho1, rho2,
                p_z, p_gu, p_pairs, p_scores, p_u, stride_qt, ROW, row, H, t0, bos, eos, i_c,
                D, Hd, C, BD, BH, DTYPE, PART, RETENTION,
            )  # fmt: skip
            tl.debug_barrier()
            put_out(p_q, ln_weight, ln_bias, p_u, out + row * D, stride_qt, H, t0, bos, eos, i_c, D, C, BD, EPS, PART)
            tl.debug_barrier()
        write(
            p_k, lr, decays, moves, memory, predicting, moving, p_z, p_gu, p_duals, p_momenta, stride_kt, ROW, row, H, t0, bos, eos, i_c,
            D, Hd, C, BD, BH, DTYPE, PART, RETENTION,
        )  # fmt: skip
        tl.debug_barrier()


# --------------------------------------------------------------------------------------------------------------- launcher


class Group(NamedTuple):
    """What a group of segments leaves for the backward: for every chunk of ``[N, segments, every]`` and head ..."""

    states: Tensor  # [chunks, H, 2, Hd, D]   W1' and W2 before the chunk
    hidden: Tensor  # [chunks, H, C, Hd]   Z
    updates: Tensor  # [chunks, H, C, D]   Gu
    sums: Tensor  # [chunks, H, C, D] float32   U
    duals: Tensor | None  # [chunks, H, 2, Hd, D] float32   what the states are phi of
    momenta: Tensor | None  # [chunks, H, 2, Hd, D]
    scales: Tensor | None  # [chunks, H, 2] float32   rho


def forward(p: Problem, every: int, wants_final: bool, may_end_open: bool) -> tuple[Tensor, Final | None, Tensor | None]:
    """``(out, final state, checkpoints)``: all matrices of every ``every``-th chunk ``[slots, H, 2 or 4, Hd, D]`` float32, if every > 0."""
    weights, out, memory = chunk_weights(p), p.per_token(p.value_dim), together(p.call.state.matrices())
    segments = p.pieces(p.chunk_size * max(every, 1))
    checkpoints = p.empty(segments.count, *memory.shape[1:], dtype=torch.float32) if every else None

    def walk(part: int) -> None:
        opened = _opened(p) if part == HEAD.value else dict(opened=None, readouts=None, opened_scales=None)
        chunk, float32 = (p.sequences, p.heads, p.chunk_size), torch.float32
        _launch_chain(
            p, p.sequences, part, decays=weights.decays, moves=weights.moves, memory=memory, **opened,
            hidden=p.empty(*chunk, p.hidden), updates=p.empty(*chunk, p.value_dim), sums=p.empty(*chunk, p.value_dim, dtype=float32),
            pairs=p.empty(*chunk, p.chunk_size, dtype=float32) if weights.pairs is None else weights.pairs,
            scores=p.empty(*chunk, p.chunk_size), states=p.empty(*memory.shape[:2], 2, *memory.shape[3:]) if p.key.retention else None,
            checkpoints=checkpoints, duals=None, momenta=None, scales=None, out=out,
            first_segment=segments.first, SEGMENTS=segments.per_sequence, EVERY=max(every, 1), FIRST=0, GROUP=1,
        )  # fmt: skip

    if p.position is None and not may_end_open:
        walk(WHOLE.value)
        after = apart(memory)
        return out, Final(after[:2], momentum=after[2:]) if wants_final else None, checkpoints
    if p.position is not None:
        walk(HEAD.value)
    walk(BODY.value)
    start = apart(memory[:, :, :2].clone())
    walk(TAIL.value)
    after = apart(memory)
    return out, Final(after[:2], *open_chunk_end(p, start), after[2:]), checkpoints


def recompute(p: Problem, weights: Weights, checkpoints: Tensor, every: int, first: int, count: int) -> Group:
    """Segments ``first ... first + count`` of every sequence again, all at once."""
    segments = p.pieces(p.chunk_size * every)
    of_group = torch.arange(first, first + count, device=checkpoints.device)
    starts = segments.first if segments.first is not None else torch.arange(p.sequences, device=checkpoints.device) * segments.per_sequence
    memory = checkpoints[(starts[:, None] + of_group).flatten().clamp_max(segments.count - 1)]
    chunks, c, float32 = p.sequences * count * every, p.chunk_size, torch.float32
    matrices = (chunks, p.heads, 2, p.hidden, p.value_dim)
    group = Group(
        p.empty(*matrices), p.empty(chunks, p.heads, c, p.hidden), p.empty(chunks, p.heads, c, p.value_dim),
        p.empty(chunks, p.heads, c, p.value_dim, dtype=float32),
        p.empty(*matrices, dtype=float32) if p.key.retention else None, p.empty(*matrices) if p.key.momentum else None,
        p.empty(chunks, p.heads, 2, dtype=float32) if p.key.retention == retentions.ENTIRE.value else None,
    )  # fmt: skip
    _launch_chain(
        p, p.sequences * count, SEGMENT.value, decays=weights.decays, moves=weights.moves, memory=memory,
        opened=None, readouts=None, opened_scales=None, **group._asdict(), pairs=None, scores=None, checkpoints=None, out=None,
        first_segment=segments.first, SEGMENTS=segments.per_sequence, EVERY=every, FIRST=first, GROUP=count,
    )  # fmt: skip
    return group


def together(matrices: tuple[Tensor, ...]) -> Tensor:
    """``W1 [N, H, D, Hd], W2 [N, H, Hd, D], momenta likewise -> [N, H, 2 or 4, Hd, D]``, the first of a pair transposed; a copy."""
    return torch.stack([x if i % 2 else x.transpose(-1, -2) for i, x in enumerate(matrices)], 2)


def apart(memory: Tensor) -> tuple[Tensor, ...]:
    """The inverse of :func:`together`; views."""
    return tuple(x if i % 2 else x.transpose(-1, -2) for i, x in enumerate(memory.unbind(2)))


def _opened(p: Problem) -> dict[str, Tensor | None]:
    """Of the chunk that a call resumes in: its primals, what its tokens read before writes of their own, and rho.

    The read-out of token t is ``gamma_t (gamma W_0 + rho (A - gamma A_0))`` with A_0 the dual at the chunk's start, A as it stands, and
    gamma the decay between them.
    """
    opened, gate = p.call.state.open_chunk, p.call.retention
    if not p.key.retention:
        return dict(opened=together(opened.start), readouts=None, opened_scales=None)
    gamma = opened.log_decay.exp()[..., None, None]
    rhos = [gate.rho(x) for x in opened.start]
    primals = [gate.phi(x) for x in opened.start]
    pairs = zip(p.call.state.dual, opened.start, primals, rhos, strict=True)
    readouts = tuple(gamma * w + rho * (a - gamma * start) for a, start, w, rho in pairs)
    return dict(opened=together(tuple(primals)), readouts=together(readouts), opened_scales=torch.stack([x[..., 0, 0] for x in rhos], 2))


def _launch_chain(p: Problem, units: int, part: int, **arguments) -> None:
    launch(
        mlp_chain, p, units, "hidden",
        q=p.q, k=p.k, v=p.v, lr=p.lr, delta=p.delta, **p.layer_norm, position=p.position, cu_seqlens=p.cu_seqlens, ROW=p.row,
        first_slot=p.slots.first, CHUNKS=p.slots.per_sequence,
        **p.strides("q", "k", "v"), PART=part, **p.sizes, **p.bias, **p.retention, MOMENTUM=p.key.momentum, **arguments,
    )  # fmt: skip
