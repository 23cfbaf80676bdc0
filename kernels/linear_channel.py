"""A log-decay for every value channel, ``[B, T, H, Dv]``: what replaces the parallel stages of the linear memory.

Every channel v has its own ``gamma_tv`` and ``L_ts,v``, so a chunk's pairs are no matrix product any more:

    channel_decay        gamma_tv;  gamma_Cv / gamma_sv
    channel_scores       X = Q K'
    channel_output       o_tv = gamma_tv (W q_t)_v - rho sum_s L_ts,v X_ts U_sv
    channel_pre          R_sv = -sum_t L_ts,v X_ts dO_tv;   dX_ts = -sum_v L_ts,v dO_tv U_sv
    channel_decay_grad   d log alpha_tv = sum_{r >= t} gamma_rv (W q_r)_v dO_rv - rho sum_{r >= t > s} L_rs,v X_rs dO_rv U_sv
                                          - sum_{s < t} L_Cs,v (J k_s)_v U_sv + gamma_Cv <J, A>_v

The pairs are walked token by token with a tile ``L_t [C, BV]`` of all earlier tokens, ``L_t = alpha_t L_{t-1}`` with a row of ones for
the token itself: products of numbers in [0, 1], no exponential of a difference, whatever the decays. The chains are those of linear_stream.py, whose
weights are rows of channels then; dQ and dK come from `linear_epi`, which reads dX instead of making it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Problem, launch
from .tiles import (
    LENGTHS,
    dot,
    inside,
    load_scale,
    load_update,
    only_if,
    owner_of,
    rounded,
    sequence_of,
    store,
)


@triton.jit
def chunk_of(i_slot, position, cu_seqlens, first_slot, slot_owner, T, CHUNKS, C: tl.constexpr):
    """``(batch row, first token of a slot's chunk, bos, eos)``; an empty chunk for a spare slot."""
    i_n, i_c = owner_of(i_slot, first_slot, slot_owner, CHUNKS)
    if first_slot is not None:
        spare = i_n < 0
        i_n = tl.maximum(i_n, 0)
    i_b, bos, eos = sequence_of(i_n, cu_seqlens, T)
    t0 = bos + i_c * C
    if position is not None:
        t0 -= tl.load(position + i_n)
    if first_slot is not None:
        t0 = tl.where(spare, eos, t0)
    return i_b, t0, bos, eos


@triton.jit
def next_decay(b_l, log_decay, row, i_t, o_s, o_v, valid, m_v, H, Dv: tl.constexpr):
    """``L_t [C, BV]`` from ``L_{t-1}``; unchanged by a token that is not there."""
    b_alpha = tl.exp(tl.load(log_decay + (row + i_t * H) * Dv + o_v, mask=only_if(valid, m_v), other=0.0))  # [BV]
    return tl.where(only_if(valid, o_s == i_t)[:, None], 1.0, b_l * b_alpha[None, :])


@triton.jit(do_not_specialize=LENGTHS)
def channel_decay(
    log_decay, position, decays,
    cu_seqlens, first_slot, slot_owner,
    T, H, CHUNKS, ROW,
    Dk: tl.constexpr, Dv: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """``decays [2, B, T, H, Dv]``: gamma_tv and gamma_Cv / gamma_sv, each summed from its own end."""
    NV: tl.constexpr = (Dv + BV - 1) // BV
    i_v, i_h = tl.program_id(0) % NV, tl.program_id(1).to(tl.int64)
    i_slot = (tl.program_id(0) // NV).to(tl.int64)
    i_b, t0, bos, eos = chunk_of(i_slot, position, cu_seqlens, first_slot, slot_owner, T, CHUNKS, C)
    o_t, o_v = tl.arange(0, C), i_v * BV + tl.arange(0, BV)
    m_v = inside(o_v, Dv, BV)[None, :]
    m_t = ((t0 + o_t < eos) & (t0 + o_t >= bos))[:, None] & m_v
    m_next = ((t0 + o_t + 1 < eos) & (t0 + o_t + 1 >= bos) & (o_t < C - 1))[:, None] & m_v
    o_tv = ((i_b * T + t0) * H + i_h) * Dv + (o_t * (H * Dv))[:, None] + o_v[None, :]
    b_g = tl.load(log_decay + o_tv, mask=m_t, other=0.0)  # [C, BV]
    b_next = tl.load(log_decay + H * Dv + o_tv, mask=m_next, other=0.0)
    tl.store(decays + o_tv, tl.exp(tl.cumsum(b_g, 0)), mask=m_t)
    tl.store(decays + ROW * Dv + o_tv, tl.exp(tl.cumsum(b_next, 0, reverse=True)), mask=m_t)


@triton.jit(do_not_specialize=LENGTHS)
def channel_scores(
    q, k, position, scores,
    cu_seqlens, first_slot, slot_owner,
    T, H, CHUNKS,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh,
    Dk: tl.constexpr, Dv: tl.constexpr, C: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """A block ``[BC, BC]`` of one chunk's ``Q K' [t, s]``."""
    NC: tl.constexpr = C // BC
    i_s, i_r = tl.program_id(0) % NC, tl.program_id(0) // NC % NC
    i_slot = (tl.program_id(0) // (NC * NC)).to(tl.int64)
    i_h = tl.program_id(1).to(tl.int64)
    i_b, t0, bos, eos = chunk_of(i_slot, position, cu_seqlens, first_slot, slot_owner, T, CHUNKS, C)
    o_t, o_s = i_r * BC + tl.arange(0, BC), i_s * BC + tl.arange(0, BC)
    m_t, m_s = (t0 + o_t < eos) & (t0 + o_t >= bos), (t0 + o_s < eos) & (t0 + o_s >= bos)
    q += i_b * stride_qb + i_h * stride_qh + t0 * stride_qt
    k += i_b * stride_kb + i_h * stride_kh + t0 * stride_kt
    b_x = tl.zeros((BC, BC), tl.float32)
    for i_k in range(0, (Dk + BK - 1) // BK):
        o_k = i_k * BK + tl.arange(0, BK)
        m_k = inside(o_k, Dk, BK)
        b_q = tl.load(q + o_t[:, None] * stride_qt + o_k[None, :], mask=m_t[:, None] & m_k[None, :], other=0.0)  # [BC, BK]
        b_k = tl.load(k + o_s[:, None] * stride_kt + o_k[None, :], mask=m_s[:, None] & m_k[None, :], other=0.0)  # [BC, BK]
        b_x += dot(b_q, tl.trans(b_k))
    tl.store(scores + (i_slot * H + i_h) * C * C + o_t[:, None] * C + o_s[None, :], b_x)


@triton.jit(do_not_specialize=LENGTHS)
def channel_output(
    q, v, lr, log_decay, decays, delta, position,
    states, errors, squares, scales, scores, out,
    cu_seqlens, first_slot, slot_owner,
    T, H, CHUNKS,
    stride_qb, stride_qt, stride_qh, stride_vb, stride_vt, stride_vh,
    Dk: tl.constexpr, Dv: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DTYPE: tl.constexpr,
    BIAS: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
    READS: tl.constexpr, COUPLED: tl.constexpr, DELTA: tl.constexpr, CHANNEL_LR: tl.constexpr,
):  # fmt: skip
    """A tile ``[C, BV]`` of one chunk's output."""
    NV: tl.constexpr = (Dv + BV - 1) // BV
    i_v, i_h = tl.program_id(0) % NV, tl.program_id(1).to(tl.int64)
    i_slot = (tl.program_id(0) // NV).to(tl.int64)
    i_b, t0, bos, eos = chunk_of(i_slot, position, cu_seqlens, first_slot, slot_owner, T, CHUNKS, C)
    o_t, o_v = tl.arange(0, C), i_v * BV + tl.arange(0, BV)
    m_t, m_v = (t0 + o_t < eos) & (t0 + o_t >= bos), inside(o_v, Dv, BV)
    m_tv = m_t[:, None] & m_v[None, :]
    row = (i_b * T + t0) * H + i_h
    o_tv = (o_t * (H * Dv))[:, None] + o_v[None, :]
    place = i_slot * H + i_h
    q += i_b * stride_qb + i_h * stride_qh + t0 * stride_qt
    v += i_b * stride_vb + i_h * stride_vh + t0 * stride_vt
    scores += place * C * C

    b_o = tl.zeros((C, BV), tl.float32)
    for i_k in range(0, (Dk + BK - 1) // BK):
        o_k = i_k * BK + tl.arange(0, BK)
        m_k = inside(o_k, Dk, BK)
        b_q = tl.load(q + o_t[:, None] * stride_qt + o_k[None, :], mask=m_t[:, None] & m_k[None, :], other=0.0)  # [C, BK]
        p_w = states + place * Dk * Dv + o_k[:, None] * Dv + o_v[None, :]
        b_o += dot(b_q, rounded(tl.load(p_w, mask=m_k[:, None] & m_v[None, :], other=0.0), DTYPE))
    b_o *= tl.load(decays + row * Dv + o_tv, mask=m_tv, other=0.0)
    b_u = load_update(
        v, stride_vt, lr, delta, errors, squares, row, H, o_t, o_v, m_t, m_v,
        Dv, BIAS, P0, P1, P2, READS, COUPLED, DELTA, CHANNEL_LR,
    )  # [C, BV]  # fmt: skip
    b_u *= load_scale(scales, place)
    b_l = tl.zeros((C, BV), tl.float32)  # L_t [s, v]
    for i_t in range(0, C):
        valid = (t0 + i_t < eos) & (t0 + i_t >= bos)
        b_l = next_decay(b_l, log_decay, row, i_t, o_t, o_v, valid, m_v, H, Dv)
        b_x = tl.load(scores + i_t * C + o_t)  # [C]
        b_o -= tl.where((o_t == i_t)[:, None], tl.sum(b_l * b_u * b_x[:, None], 0)[None, :], 0.0)
    store(out + row * Dv + o_tv, b_o, m_tv)


@triton.jit(do_not_specialize=LENGTHS)
def channel_pre(
    v, lr, log_decay, delta, errors, squares, scores, grad_out, from_out, grad_scores,
    cu_seqlens, first_slot, slot_owner,
    T, H, CHUNKS, SLOTS,
    stride_vb, stride_vt, stride_vh,
    Dk: tl.constexpr, Dv: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DTYPE: tl.constexpr,
    BIAS: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
    READS: tl.constexpr, COUPLED: tl.constexpr, DELTA: tl.constexpr, CHANNEL_LR: tl.constexpr,
):  # fmt: skip
    """A tile ``[C, BV]`` of R, and its share of dX, to ``grad_scores [tiles, slots, H, C, C]``."""
    NV: tl.constexpr = (Dv + BV - 1) // BV
    i_v, i_h = tl.program_id(0) % NV, tl.program_id(1).to(tl.int64)
    i_slot = (tl.program_id(0) // NV).to(tl.int64)
    i_b, t0, _, eos = chunk_of(i_slot, None, cu_seqlens, first_slot, slot_owner, T, CHUNKS, C)
    o_s, o_v = tl.arange(0, C), i_v * BV + tl.arange(0, BV)
    m_s, m_v = t0 + o_s < eos, inside(o_v, Dv, BV)
    row = (i_b * T + t0) * H + i_h
    v += i_b * stride_vb + i_h * stride_vh + t0 * stride_vt
    scores += (i_slot * H + i_h) * C * C
    grad_scores += ((i_v * SLOTS + i_slot) * H + i_h) * C * C
    b_u = load_update(
        v, stride_vt, lr, delta, errors, squares, row, H, o_s, o_v, m_s, m_v,
        Dv, BIAS, P0, P1, P2, READS, COUPLED, DELTA, CHANNEL_LR,
    )  # [C, BV]  # fmt: skip
    b_r = tl.zeros((C, BV), tl.float32)
    b_l = tl.zeros((C, BV), tl.float32)  # L_t [s, v]
    for i_t in range(0, C):
        valid = t0 + i_t < eos
        b_l = next_decay(b_l, log_decay, row, i_t, o_s, o_v, valid, m_v, H, Dv)
        b_do = tl.load(grad_out + (row + i_t * H) * Dv + o_v, mask=only_if(valid, m_v), other=0.0).to(tl.float32)  # [BV]
        b_ld = b_l * b_do[None, :]
        b_r -= b_ld * tl.load(scores + i_t * C + o_s)[:, None]
        tl.store(grad_scores + i_t * C + o_s, -tl.sum(b_ld * b_u, 1))
    store(from_out + row * Dv + (o_s * (H * Dv))[:, None] + o_v[None, :], b_r, m_s[:, None] & m_v[None, :])


@triton.jit(do_not_specialize=LENGTHS)
def channel_decay_grad(
    q, k, v, lr, log_decay, decays, delta,
    states, duals, errors, squares, scales, scores, grad_states, grad_out, grad_log_decay,
    cu_seqlens, first_slot, slot_owner,
    T, H, CHUNKS, ROW,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    Dk: tl.constexpr, Dv: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DTYPE: tl.constexpr,
    BIAS: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
    READS: tl.constexpr, COUPLED: tl.constexpr, DELTA: tl.constexpr, CHANNEL_LR: tl.constexpr,
):  # fmt: skip
    """A tile ``[C, BV]`` of one chunk's d log alpha, summed over just the pairs that each decay lies between."""
    NV: tl.constexpr = (Dv + BV - 1) // BV
    i_v, i_h = tl.program_id(0) % NV, tl.program_id(1).to(tl.int64)
    i_slot = (tl.program_id(0) // NV).to(tl.int64)
    i_b, t0, _, eos = chunk_of(i_slot, None, cu_seqlens, first_slot, slot_owner, T, CHUNKS, C)
    o_s, o_v = tl.arange(0, C), i_v * BV + tl.arange(0, BV)
    m_s, m_v = t0 + o_s < eos, inside(o_v, Dv, BV)
    m_sv = m_s[:, None] & m_v[None, :]
    row = (i_b * T + t0) * H + i_h
    o_sv = (o_s * (H * Dv))[:, None] + o_v[None, :]
    place = i_slot * H + i_h
    q += i_b * stride_qb + i_h * stride_qh + t0 * stride_qt
    k += i_b * stride_kb + i_h * stride_kh + t0 * stride_kt
    v += i_b * stride_vb + i_h * stride_vh + t0 * stride_vt
    scores += place * C * C
    if duals is None:
        duals = states

    b_read = tl.zeros((C, BV), tl.float32)  # W q
    b_kept = tl.zeros((C, BV), tl.float32)  # J k
    b_inner = tl.zeros((BV,), tl.float32)  # <J, A>
    for i_k in range(0, (Dk + BK - 1) // BK):
        o_k = i_k * BK + tl.arange(0, BK)
        m_k = inside(o_k, Dk, BK)
        m_sk, m_kv = m_s[:, None] & m_k[None, :], m_k[:, None] & m_v[None, :]
        o_kv = place * Dk * Dv + o_k[:, None] * Dv + o_v[None, :]
        b_q = tl.load(q + o_s[:, None] * stride_qt + o_k[None, :], mask=m_sk, other=0.0)  # [C, BK]
        b_k = tl.load(k + o_s[:, None] * stride_kt + o_k[None, :], mask=m_sk, other=0.0)  # [C, BK]
        b_j = tl.load(grad_states + o_kv, mask=m_kv, other=0.0)  # [BK, BV]
        b_read += dot(b_q, rounded(tl.load(states + o_kv, mask=m_kv, other=0.0), DTYPE))
        b_kept += dot(b_k, rounded(b_j, DTYPE))
        b_inner += tl.sum(b_j * tl.load(duals + o_kv, mask=m_kv, other=0.0), 0)
    b_u = load_update(
        v, stride_vt, lr, delta, errors, squares, row, H, o_s, o_v, m_s, m_v,
        Dv, BIAS, P0, P1, P2, READS, COUPLED, DELTA, CHANNEL_LR,
    )  # [C, BV]  # fmt: skip
    b_do = tl.load(grad_out + row * Dv + o_sv, mask=m_sv, other=0.0).to(tl.float32)
    b_read *= b_do * tl.load(decays + row * Dv + o_sv, mask=m_sv, other=0.0)
    b_kept *= b_u * tl.load(decays + ROW * Dv + row * Dv + o_sv, mask=m_sv, other=0.0)
    b_crossing = -tl.cumsum(b_kept, 0)  # at s: what lies after s
    b_u *= load_scale(scales, place)
    b_l = tl.zeros((C, BV), tl.float32)  # L_t [s, v]
    for i_t in range(0, C):
        valid = t0 + i_t < eos
        b_l = next_decay(b_l, log_decay, row, i_t, o_s, o_v, valid, m_v, H, Dv)
        b_dt = tl.load(grad_out + (row + i_t * H) * Dv + o_v, mask=only_if(valid, m_v), other=0.0).to(tl.float32)  # [BV]
        b_pairs = b_l * b_u * b_dt[None, :] * tl.load(scores + i_t * C + o_s)[:, None]
        b_crossing -= tl.where((o_s < i_t)[:, None], tl.cumsum(b_pairs, 0), 0.0)
    p_grad = grad_log_decay + row * Dv + o_sv
    tl.store(p_grad + H * Dv, b_crossing, mask=((t0 + o_s + 1 < eos) & (o_s < C - 1))[:, None] & m_v[None, :])
    tl.debug_barrier()
    last = tl.minimum(eos - t0, C) - 1
    b_inner *= tl.load(decays + (row + last * H) * Dv + o_v, mask=only_if(last >= 0, m_v), other=0.0)
    b_before = tl.load(p_grad, mask=m_sv & (o_s > 0)[:, None], other=0.0)
    tl.debug_barrier()
    tl.store(p_grad, b_before + tl.cumsum(b_read, 0, reverse=True) + b_inner[None, :], mask=m_sv)


# -------------------------------------------------------------------------------------------------------------- launchers


def decays_by_channel(p: Problem) -> Tensor:
    """gamma_tv and gamma_Cv / gamma_sv, ``[2, B, T, H, Dv]`` float32."""
    decays = p.empty(2, p.batch, p.tokens, p.heads, p.value_dim, dtype=torch.float32)
    arguments = dict(log_decay=p.log_decay, position=p.position, decays=decays, ROW=p.row)
    launch(channel_decay, p, p.slots.count, "value", **arguments, **p.tables(), **p.sizes)
    return decays


def chunk_scores(p: Problem) -> Tensor:
    """``Q K' [slots, H, C, C]`` float32."""
    scores = p.empty(p.slots.count, p.heads, p.chunk_size, p.chunk_size, dtype=torch.float32)
    launch(
        channel_scores, p, p.slots.count * p.blocks**2, "head",
        q=p.q, k=p.k, position=p.position, scores=scores, **p.tables(), **p.strides("q", "k"), **p.sizes, BC=p.block,
    )  # fmt: skip
    return scores


def output(p: Problem, decays: Tensor, chain, out: Tensor) -> None:
    launch(
        channel_output, p, p.slots.count, "value",
        q=p.q, v=p.v, lr=p.lr, log_decay=p.log_decay, decays=decays, delta=p.delta, position=p.position,
        **chain.only("states", "errors", "squares", "scales"), scores=chunk_scores(p), out=out,
        **p.tables(), **p.strides("q", "v"), **p.sizes, **p.bias,
    )  # fmt: skip


def pre(p: Problem, chain, scores: Tensor, grad_out: Tensor, from_out: Tensor) -> Tensor:
    """R to ``from_out [B, T, H, Dv]``; returns dX ``[slots, H, C, C]`` float32, less rho."""
    tiles = p.key.tiles("channel_pre", p.config("channel_pre"), "value")
    grad_scores = p.empty(tiles, *scores.shape, dtype=torch.float32)
    launch(
        channel_pre, p, p.slots.count, "value",
        v=p.v, lr=p.lr, log_decay=p.log_decay, delta=p.delta, errors=chain.errors, squares=chain.squares, scores=scores,
        grad_out=grad_out, from_out=from_out, grad_scores=grad_scores, SLOTS=p.slots.count,
        **p.tables(), **p.strides("v"), **p.sizes, **p.bias,
    )  # fmt: skip
    return grad_scores.sum(0)


def decay_gradient(p: Problem, decays: Tensor, chain, scores: Tensor, grad_states: Tensor, grad_out: Tensor) -> Tensor:
    """d log alpha ``[B, T, H, Dv]``."""
    grad = torch.empty_like(p.log_decay)
    launch(
        channel_decay_grad, p, p.slots.count, "value",
        q=p.q, k=p.k, v=p.v, lr=p.lr, log_decay=p.log_decay, decays=decays, delta=p.delta,
        **chain.only("states", "duals", "errors", "squares", "scales"), scores=scores, grad_states=grad_states, grad_out=grad_out,
        grad_log_decay=grad, **p.tables(), ROW=p.row, **p.strides("q", "k", "v"), **p.sizes, **p.bias,
    )  # fmt: skip
    return grad
