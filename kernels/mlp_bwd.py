"""The MLP memory backward (SPEC section 5). J1, J2 are the gradients of the state that a chunk leaves; ``P = L o (Q K')``.

    mlp_readout   the read-out again;  dUq = LN-vjp(w dO; Uq);  N1 = -L o (dUq U1')                         parallel over chunks
    mlp_pre       dAq = gamma (dUq S1') + N1 A;  dZq = gelu'(Zq) dAq;  N2 = -L o (dZq U2');
                  dQ = dO + gamma (dZq W2) + N2 K;  RA = N1' Aq;  R1 = -(L o Aq A')' dUq;  R2 = -P' dZq      parallel over chunks
    mlp_seq       J1, J2, dK, dV and the rest, the last chunk first (mlp_seq.py)

with ``U1 = eta Gu, U2 = eta Gz`` as in mlp_fwd.py. The chunks are taken in groups of segments between kept states, the last group first:
`mlp_chain` runs a group's segments again, all at once, then these three. A group has as many chunks as fill a chip, so the memory between
the kernels does not grow with the sequence. What passes between them is in the dtype of the operands, except where it is normalised.

With momentum L becomes M, and Uq, Zq gain ``b (Aq S1)`` and ``b (Q S2)`` of the carried momenta; a gate's rho scales these and what L
or M multiplies, and is part of N1, N2, R1 and R2. Its gradient is ``sum(own writes o dUq)``, those of both matrices.

Without momentum gradients of log-decays are summed over pairs as in linear_bwd.py, of both matrices. With momentum both matrices' shares of
gM and gb are added up for decays_bwd.py. Of LayerNorm's parameters every head of every sequence keeps its own sum.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import retention as retentions
from .chunks import sequence_of, slot_of
from .decays import chunk_weights
from .decays_bwd import decay_gradient, gate_gradients
from .gates import CARRY, load_gamma, load_gate, pair_decay
from .launch import Problem, launch
from .mlp_fwd import apart, recompute, together
from .mlp_math import crossing, gelu, gelu_slope, lanes, layer_norm_vjp, normalised
from .mlp_seq import mlp_seq
from .tiles import LENGTHS, dot, inside, load_tile, rounded, store

#: chunks x heads of a group, at least: several for every multiprocessor of the largest chips
CROWD = 1024


@triton.jit(do_not_specialize=LENGTHS)
def mlp_readout(
    q, k, lr, decays, ln_weight, grad_out,
    states, momenta, scales, hidden, updates, pairs,
    inner_grad, hidden_q, grad_sums, scores, grad_scores, grad_norm, weights, rows_pairs, grad_pairs, rows_carry, grad_scales,
    cu_seqlens, first_slot,
    T, H, CHUNKS, ROW, FIRST, GROUP,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh,
    D: tl.constexpr, Hd: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr, DTYPE: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """Of one chunk: ``Ga``, ``Zq``, ``dUq``, ``rho1 L o Aq A'``, ``N1``, and its shares of dw, db and the gates' gradients.

    ``weights`` becomes L, or M from ``pairs``.
    """
    SIZE: tl.constexpr = Hd * D
    place = tl.program_id(0).to(tl.int64)
    i_h = tl.program_id(1).to(tl.int64)
    i_n, i_c = place // GROUP, (FIRST + place % GROUP).to(tl.int32)
    i_b, bos, eos = sequence_of(i_n, cu_seqlens, T)
    t0 = bos + i_c * C
    if t0 >= eos:
        return
    place = place * H + i_h
    slot = (slot_of(i_n, first_slot, CHUNKS) + i_c) * H + i_h
    row = (i_b * T + t0) * H + i_h
    q += i_b * stride_qb + i_h * stride_qh + t0 * stride_qt
    k += i_b * stride_kb + i_h * stride_kh + t0 * stride_kt
    states += place * 2 * SIZE
    if momenta is not None:
        momenta += place * 2 * SIZE
    hidden += place * C * Hd
    updates += place * C * D
    inner_grad += place * C * Hd
    hidden_q += place * C * Hd
    scores += place * C * C
    weights += place * C * C
    rho1, rho2 = 1.0, 1.0
    if scales is not None:
        rho1, rho2 = tl.load(scales + place * 2), tl.load(scales + place * 2 + 1)

    o_c, o_d = lanes(C, i_c, 0), lanes(BD, i_c, 0)
    m_t, m_d = t0 + o_c < eos, inside(o_d, D, BD)
    o_cc = o_c[:, None] * C + o_c[None, :]
    b_q = load_tile(q, stride_qt, o_c, o_d, m_t, m_d)  # [C, BD]
    b_k = load_tile(k, stride_kt, o_c, o_d, m_t, m_d)  # [C, BD]
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
    b_q = load_tile(q, stride_qt, o_c, o_d, m_t, m_d)  # [C, BD]
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
def mlp_pre(
    q, k, lr, decays, grad_out,
    states, momenta, scales, hidden, updates, inner_grad, hidden_q, grad_sums, scores, grad_scores, weights,
    grad_hidden_q, from_hidden, from_updates, from_inner, grad_q, rows_read, rows_pairs, grad_pairs, rows_carry, grad_scales,
    cu_seqlens, first_slot,
    T, H, CHUNKS, ROW, FIRST, GROUP,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh,
    D: tl.constexpr, Hd: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Of one chunk: dQ, and what the output alone asks of A (RA), U1 (R1) and U2 (R2). ``grad_scores`` is N1 before and N2 after."""
    SIZE: tl.constexpr = Hd * D
    place = tl.program_id(0).to(tl.int64)
    i_h = tl.program_id(1).to(tl.int64)
    i_n, i_c = place // GROUP, (FIRST + place % GROUP).to(tl.int32)
    i_b, bos, eos = sequence_of(i_n, cu_seqlens, T)
    t0 = bos + i_c * C
    if t0 >= eos:
        return
    place = place * H + i_h
    slot = (slot_of(i_n, first_slot, CHUNKS) + i_c) * H + i_h
    row = (i_b * T + t0) * H + i_h
    q += i_b * stride_qb + i_h * stride_qh + t0 * stride_qt
    k += i_b * stride_kb + i_h * stride_kh + t0 * stride_kt
    states += place * 2 * SIZE
    if momenta is not None:
        momenta += place * 2 * SIZE
    scores += place * C * C
    grad_scores += place * C * C
    weights += place * C * C
    of_chunk = place * C * Hd
    rho1, rho2 = 1.0, 1.0
    if scales is not None:
        rho1, rho2 = tl.load(scales + place * 2), tl.load(scales + place * 2 + 1)

    # R1 and P'
    o_c, o_d = lanes(C, i_c, 0), lanes(BD, i_c, 0)
    m_t, m_d = t0 + o_c < eos, inside(o_d, D, BD)
    m_td = m_t[:, None] & m_d[None, :]
    o_cd, o_cc_transposed = o_c[:, None] * D + o_d[None, :], o_c[None, :] * C + o_c[:, None]
    b_du = tl.load(grad_sums + place * C * D + o_cd, mask=m_d[None, :], other=0.0)  # [C, BD], dUq
    b_p1 = tl.load(scores + o_cc_transposed)  # [s, t]
    store(from_updates + place * C * D + o_cd, -dot(b_p1, b_du), m_d[None, :])  # R1
    b_q = load_tile(q, stride_qt, o_c, o_d, m_t, m_d)  # [C, BD]
    b_k = load_tile(k, stride_kt, o_c, o_d, m_t, m_d)  # [C, BD]
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
        o_ch = of_chunk + o_c[:, None] * Hd + o_h[None, :]
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
    b_q = load_tile(q, stride_qt, o_c, o_d, m_t, m_d)  # [C, BD]
    b_k = load_tile(k, stride_kt, o_c, o_d, m_t, m_d)  # [C, BD]
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
    scores: Tensor  # [chunks, H, C, C]   rho1 L o Aq A', then P'
    grad_scores: Tensor  # [chunks, H, C, C]   N1, then N2
    weights: Tensor  # [chunks, H, C, C] float32   L, with momentum M
    grad_norm: Tensor  # [chunks, H, 2, D] float32   shares of dw, db
    grad_scales: Tensor | None  # [chunks, H, 2] float32   d rho

    @staticmethod
    def of(p: Problem, chunks: int) -> Between:
        wide = [p.empty(chunks, p.heads, p.chunk_size, p.hidden) for _ in range(5)]
        narrow = [p.empty(chunks, p.heads, p.chunk_size, p.value_dim) for _ in range(2)]
        square = [p.empty(chunks, p.heads, p.chunk_size, p.chunk_size, dtype=x) for x in (None, None, torch.float32)]
        scaled = p.key.retention == retentions.ENTIRE.value
        rest = [p.empty(chunks, p.heads, *x, dtype=torch.float32) if x else None for x in ((2, p.value_dim), (2,) if scaled else None)]
        return Between(*wide, *narrow, *square, *rest)

    def only(self, *names: str) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in names}


def backward(p: Problem, checkpoints: Tensor, every: int, grad_out: Tensor, grad_state: list[Tensor]) -> dict:
    """Gradients by argument name, ``state`` for the initial matrices: ``[N, H, D, Hd]`` and ``[N, H, Hd, D]``, then their momenta."""
    weights, grad_out = chunk_weights(p, backward=True), grad_out.contiguous()
    decays, moving = weights.decays, p.key.momentum
    float32, decaying, per_token = torch.float32, p.log_decay is not None, p.bias["DELTA"] == 1

    def rows(count: int, wanted: bool = True) -> Tensor | None:
        return p.empty(count, p.batch, p.tokens, p.heads, dtype=float32) if wanted else None

    rows_lr, rows_delta, rows_kept = rows(1), rows(1, per_token), rows(1, decaying or moving)
    rows_read, rows_pairs = rows(1, decaying), rows(2, decaying and not moving)
    rows_carry, rows_step = rows(1, moving), rows(1, moving)
    grad_pairs = p.empty(p.slots.count, p.heads, p.chunk_size, p.chunk_size, dtype=float32) if moving else None
    inner = p.empty(3 if moving else 1, p.slots.count, p.heads, dtype=float32) if decaying or moving else None
    grad_q, grad_k, grad_v = (p.per_token(p.value_dim) for _ in range(3))
    grad_delta = p.per_token(p.value_dim, dtype=float32) if p.bias["DELTA"] == 2 else None
    grad_memory = together(tuple(grad_state) or tuple(torch.zeros_like(x) for x in p.call.state.matrices()))
    grad_primal = torch.empty_like(grad_memory[:, :, :2]) if p.key.retention else None
    grad_layer_norm = p.empty(p.sequences, p.heads, 2, p.value_dim, dtype=float32).zero_()
    row_sums = p.empty(p.sequences, p.heads, 3 if moving else 2, p.chunk_size, p.value_dim, dtype=float32)
    grad_sum = p.empty(p.sequences, p.heads, p.chunk_size, p.value_dim)

    longest = -(-p.tokens // (p.chunk_size * every))  # segments of a sequence, at most
    count = min(longest, -(-CROWD // (every * p.sequences * p.heads)))
    between = Between.of(p, p.sequences * count * every)
    for first in reversed(range(0, longest, count)):
        group = recompute(p, weights, checkpoints, every, first, count)
        common = dict(q=p.q, k=p.k, lr=p.lr, decays=decays, cu_seqlens=p.cu_seqlens, first_slot=p.slots.first, CHUNKS=p.slots.per_sequence)
        common |= dict(ROW=p.row, FIRST=first * every, GROUP=count * every, **p.strides("q", "k"))
        common |= dict(states=group.states, momenta=group.momenta, scales=group.scales, hidden=group.hidden, updates=group.updates)
        sizes = {name: x for name, x in p.sizes.items() if name != "EPS"}
        chunks = p.sequences * count * every
        shares = dict(grad_pairs=grad_pairs, rows_carry=rows_carry, **between.only("grad_scales"))
        launch(
            mlp_readout, p, chunks, "hidden",
            ln_weight=p.layer_norm["ln_weight"], grad_out=grad_out, pairs=weights.pairs,
            **between.only("inner_grad", "hidden_q", "grad_sums", "scores", "grad_scores", "grad_norm", "weights"),
            rows_pairs=None if rows_pairs is None else rows_pairs[0], **shares, **common, **p.sizes,
        )  # fmt: skip
        launch(
            mlp_pre, p, chunks, "hidden",
            grad_out=grad_out, **between.only("inner_grad", "hidden_q", "grad_sums", "scores", "grad_scores", "weights"),
            **between.only("grad_hidden_q", "from_hidden", "from_updates", "from_inner"), grad_q=grad_q,
            rows_read=rows_read, rows_pairs=None if rows_pairs is None else rows_pairs[1], **shares, **common, **sizes,
        )  # fmt: skip
        launch(
            mlp_seq, p, p.sequences, "hidden",
            v=p.v, delta=p.delta, moves=weights.moves, **p.layer_norm, duals=group.duals, sums=group.sums,
            **{name: x for name, x in between._asdict().items() if name not in ("scores", "weights")}, row_sums=row_sums, grad_sum=grad_sum,
            grad_memory=grad_memory, grad_primal=grad_primal, grad_k=grad_k, grad_v=grad_v, grad_delta=grad_delta,
            grad_layer_norm=grad_layer_norm,
            rows_lr=rows_lr, rows_delta=rows_delta, rows_kept=rows_kept, rows_step=rows_step, inner=inner, SLOTS=p.slots.count, **common,
            **p.strides("v"), **p.sizes, **p.bias, **p.retention, MOMENTUM=moving,
        )  # fmt: skip

    grads = {"q": grad_q, "k": grad_k, "v": grad_v, "lr": rows_lr[0], "state": list(apart(grad_memory))}
    grads["ln_weight"], grads["ln_bias"] = grad_layer_norm.sum(0).unbind(1)
    if moving:
        added = {"rows_read": None if rows_read is None else rows_read[0], "rows_kept": rows_kept[0]}
        grads |= gate_gradients(p, weights, grad_pairs, rows_step=rows_step[0], rows_carry=rows_carry[0], inner=inner, **added)
    elif decaying:
        grads["log_decay"] = decay_gradient(p, decays, rows_read, rows_pairs.sum(0, keepdim=True), rows_kept, inner, p.chunk_size)
    if p.delta is not None:
        grads["delta"] = rows_delta[0] if per_token else grad_delta
    return grads
