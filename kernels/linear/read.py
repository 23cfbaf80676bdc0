"""The output of the linear memory and its gradient in the updates (docs/mathematics.md, sections 2 and 6), parallel over chunks.

    linear_output   O = gamma (Q S) - (L o Q K') U,  U = eta psi(E)       forward, after the chain
    linear_du_bwd   R = -(L o Q K')' dO;  dS = -L o (dO U')               backward, before the chain

Under a retention gate the primal W replaces S and rho scales the chunk's own writes. With momentum M replaces L, and
``O = gamma (Q W) + rho (b (Q S_0) - (M o Q K') U)`` with the momentum matrix S_0 at the chunk's start; the
gradient of M is ``gM = -rho (dO U') o Q K'``. channel.py replaces both kernels where log-decays go by channel.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.chunks import chunk_of, chunk_program, token_of
from ..common.gates import CARRY, load_gamma, load_gate, load_scale, load_update, pair_decay
from ..common.launch import Problem, launch
from ..common.tiles import LENGTHS, dot, fitted, fitted_dot, inside, load_tile, pair_products, rounded, store, wide


@triton.jit(do_not_specialize=LENGTHS)
def linear_output(
    q, k, v, lr, decays, pairs, scores, delta, position,
    states, errors, squares, momenta, scales, out,
    cu_seqlens, first_slot, slot_owner,
    T, H, CHUNKS, ROW,
    q_strides, k_strides, v_strides,
    TOKENS: tl.constexpr, C: tl.constexpr, BC: tl.constexpr,
    Dk: tl.constexpr, Dv: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DTYPE: tl.constexpr,
    BIAS: tl.constexpr, CHANNEL_LR: tl.constexpr,
):  # fmt: skip
    """A tile ``[BC, BV]`` of one chunk's output: reads of the initial state, then of the chunk's own writes, block by block."""
    ROW = wide(ROW)
    NV: tl.constexpr = (Dv + BV - 1) // BV
    NC: tl.constexpr = C // BC
    i_v, i_r, i_slot, i_h = chunk_program(NV, NC)
    i_b, t0, bos, eos = chunk_of(i_slot, position, cu_seqlens, first_slot, slot_owner, T, CHUNKS, TOKENS, C)
    if first_slot is not None:
        if t0 >= eos:  # an unused slot
            return

    o_t, o_v = i_r * BC + tl.arange(0, BC), i_v * BV + tl.arange(0, BV)
    m_t, m_v = (t0 + o_t < eos) & (t0 + o_t >= bos), inside(o_v, Dv, BV)
    row = (i_b * T + t0) * H + i_h
    q = token_of(q, q_strides, i_b, t0, i_h)
    k = token_of(k, k_strides, i_b, t0, i_h)
    v = token_of(v, v_strides, i_b, t0, i_h)
    place = i_slot * H + i_h
    states += place * Dk * Dv
    rho = load_scale(scales, place)
    if pairs is not None:
        pairs += place * C * C
    if scores is not None:
        scores += place * C * C

    b_o = tl.zeros((BC, BV), tl.float32)
    for i_k in range(0, (Dk + BK - 1) // BK):
        o_k = i_k * BK + tl.arange(0, BK)
        m_k = inside(o_k, Dk, BK)
        b_q = load_tile(q, q_strides.t, o_t, o_k, m_t, m_k)  # [BC, BK]
        b_w = load_tile(states, Dv, o_k, o_v, m_k, m_v)  # [BK, BV]
        b_o += fitted_dot(b_q, b_w, DTYPE)
    b_o *= load_gamma(decays, row, o_t * H, m_t, BC)[:, None]
    if momenta is not None:
        b_carried = tl.zeros((BC, BV), tl.float32)
        for i_k in range(0, (Dk + BK - 1) // BK):
            o_k = i_k * BK + tl.arange(0, BK)
            m_k = inside(o_k, Dk, BK)
            b_q = load_tile(q, q_strides.t, o_t, o_k, m_t, m_k)  # [BC, BK]
            p_s = momenta + place * Dk * Dv + o_k[:, None] * Dv + o_v[None, :]
            b_carried += fitted_dot(b_q, tl.load(p_s, mask=m_k[:, None] & m_v[None, :], other=0.0), DTYPE)
        b_o += b_carried * (load_gate(decays + CARRY * ROW, row, o_t * H, m_t) * rho)[:, None]
    for i_s in range(0, i_r + 1):
        o_s = i_s * BC + tl.arange(0, BC)
        m_s = (t0 + o_s < eos) & (t0 + o_s >= bos)
        if scores is not None:
            b_p = tl.load(scores + o_t[:, None] * C + o_s[None, :])
        else:
            b_p = pair_products(q, q_strides.t, o_t, m_t, k, k_strides.t, o_s, m_s, BC, Dk, BK)  # [t, s]
        b_p *= pair_decay(decays, pairs, ROW, row, H, C, o_t[:, None], o_s[None, :], m_t[:, None], m_s[None, :])
        if scales is not None:
            b_p *= rho
        b_u = load_update(
            v, v_strides.t, lr, delta, errors, squares, row, H, o_s, o_v, m_s, m_v,
            Dv, BIAS, CHANNEL_LR,
        )  # [BC, BV]  # fmt: skip
        b_o -= fitted_dot(rounded(b_p, DTYPE), b_u, DTYPE)
    store(out + row * Dv + o_t[:, None] * (H * Dv) + o_v[None, :], b_o, m_t[:, None] & m_v[None, :])


@triton.jit(do_not_specialize=LENGTHS)
def linear_du_bwd(
    q, k, v, lr, decays, pairs, scores, delta,
    errors, squares, scales, grad_out, from_out, grad_scores, rows_pairs, grad_pairs,
    cu_seqlens, first_slot, slot_owner,
    T, H, CHUNKS, ROW,
    q_strides, k_strides, v_strides,
    TOKENS: tl.constexpr, C: tl.constexpr, BC: tl.constexpr,
    Dk: tl.constexpr, Dv: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DTYPE: tl.constexpr,
    BIAS: tl.constexpr, CHANNEL_LR: tl.constexpr,
):  # fmt: skip
    """A block ``[BC, Dv]`` of R, the gradient of one chunk's updates from its output, and its columns of dS, gM and their sums.

    ``grad_scores, grad_pairs [slots, H, C, C]``: dS without rho, and with momentum gM without the next chunk's share; their blocks on and
    below the diagonal. ``rows_pairs [blocks, B, T, H]``, for a log-decay without momentum: at token t the sum of ``dS o Q K'`` over pairs
    of a read after t and one of the block's writes up to t.
    """
    ROW = wide(ROW)
    NV: tl.constexpr = (Dv + BV - 1) // BV
    NC: tl.constexpr = C // BC
    i_r, _, i_slot, i_h = chunk_program(NC, 1)
    i_b, t0, _, eos = chunk_of(i_slot, None, cu_seqlens, first_slot, slot_owner, T, CHUNKS, TOKENS, C)
    if first_slot is not None:
        if t0 >= eos:  # an unused slot
            return
    o_s = i_r * BC + tl.arange(0, BC)
    m_s = t0 + o_s < eos
    row = (i_b * T + t0) * H + i_h
    q = token_of(q, q_strides, i_b, t0, i_h)
    k = token_of(k, k_strides, i_b, t0, i_h)
    v = token_of(v, v_strides, i_b, t0, i_h)
    grad_out += row * Dv
    from_out += row * Dv
    place = i_slot * H + i_h
    grad_scores += place * C * C
    if pairs is not None:
        pairs += place * C * C
        grad_pairs += place * C * C
    if scores is not None:
        scores += place * C * C

    b_after = tl.zeros((BC,), tl.float32)  # dS o Q K' of later blocks, summed over their reads
    for i in range(0, NC - i_r):
        i_t = NC - 1 - i
        o_t = i_t * BC + tl.arange(0, BC)
        m_t = t0 + o_t < eos
        o_st = o_t[None, :] * C + o_s[:, None]
        if scores is not None:
            b_p = tl.load(scores + o_st)
        else:
            b_p = pair_products(k, k_strides.t, o_s, m_s, q, q_strides.t, o_t, m_t, BC, Dk, BK)  # [s, t]
        b_l = pair_decay(decays, pairs, ROW, row, H, C, o_t[None, :], o_s[:, None], m_t[None, :], m_s[:, None])
        b_ds = tl.zeros((BC, BC), tl.float32)
        for i_v in range(0, NV):
            o_v = i_v * BV + tl.arange(0, BV)
            m_v = inside(o_v, Dv, BV)
            b_do = load_tile(grad_out, H * Dv, o_t, o_v, m_t, m_v)  # [BC, BV]
            if NC == 1:
                b_r = -dot(rounded(b_p * b_l, DTYPE), b_do)  # [BC, BV]
                store(from_out + o_s[:, None] * (H * Dv) + o_v[None, :], b_r, m_s[:, None] & m_v[None, :])
            b_u = load_update(
                v, v_strides.t, lr, delta, errors, squares, row, H, o_s, o_v, m_s, m_v,
                Dv, BIAS, CHANNEL_LR,
            )  # [BC, BV]  # fmt: skip
            b_u, scale = fitted(b_u, DTYPE)
            b_ds -= dot(b_u, tl.trans(b_do)) * scale
        if pairs is not None:
            tl.store(grad_pairs + o_st, b_p * b_ds * load_scale(scales, place))
        b_ds *= b_l
        store(grad_scores + o_st, b_ds, True)
        if rows_pairs is not None:
            b_pairs = b_p * b_ds * load_scale(scales, place)
            b_crossing = tl.where(o_t[None, :] > o_s[:, None], tl.cumsum(b_pairs, 1, reverse=True) + b_after[:, None], 0.0)
            tl.store(rows_pairs + i_r.to(tl.int64) * ROW + row + (o_t - 1) * H, tl.sum(b_crossing, 0), mask=m_t & (o_t > 0))
            b_after += tl.sum(b_pairs, 1)
    if NC > 1:
        for i_v in range(0, NV):
            o_v = i_v * BV + tl.arange(0, BV)
            m_v = inside(o_v, Dv, BV)
            b_r = tl.zeros((BC, BV), tl.float32)
            for i_t in range(i_r, NC):
                o_t = i_t * BC + tl.arange(0, BC)
                m_t = t0 + o_t < eos
                b_p = pair_products(k, k_strides.t, o_s, m_s, q, q_strides.t, o_t, m_t, BC, Dk, BK)  # [s, t]
                b_p *= pair_decay(decays, pairs, ROW, row, H, C, o_t[None, :], o_s[:, None], m_t[None, :], m_s[:, None])
                b_r -= dot(rounded(b_p, DTYPE), load_tile(grad_out, H * Dv, o_t, o_v, m_t, m_v))
            store(from_out + o_s[:, None] * (H * Dv) + o_v[None, :], b_r, m_s[:, None] & m_v[None, :])


# -------------------------------------------------------------------------------------------------------------- launchers


def output(p: Problem) -> Tensor:
    """``[B, T, H, Dv]``. The problem shares the weights of the call and the chain's outputs, here and below."""
    out = p.result(p.value_dim)
    launch(linear_output, p, p.slots.count * p.blocks, "value", dict(out=out))
    return out


class ScoreGradients(NamedTuple):
    """Outputs of :func:`linear_du_bwd`."""

    from_out: Tensor  # [B, T, H, Dv]   R, without the factor rho
    grad_scores: Tensor  # [slots, H, C, C]   dS, likewise; float32 for float16 and where decays go by key channel
    rows_pairs: Tensor | None  # [blocks, B, T, H] float32   with a decay and no momentum
    grad_pairs: Tensor | None  # [slots, H, C, C] float32   gM, with momentum


def score_gradients(p: Problem) -> ScoreGradients:
    """Run :func:`linear_du_bwd`; the problem also shares ``grad_out``."""
    square, float32, moving = (p.slots.count, p.heads, p.rows, p.rows), torch.float32, p.momentum is not None
    grads = ScoreGradients(
        p.per_token(p.value_dim), p.empty(*square, dtype=float32 if p.q.dtype == torch.float16 or p.key.keyed else None),
        p.empty(p.blocks, p.batch, p.tokens, p.heads, dtype=float32) if p.log_decay is not None and not moving else None,
        p.empty(*square, dtype=float32) if moving else None,
    )  # fmt: skip
    launch(linear_du_bwd, p, p.slots.count * p.blocks, "head", grads._asdict())
    return grads
