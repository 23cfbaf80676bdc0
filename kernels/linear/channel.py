"""Log-decays by value channel, ``[B, T, H, Dv]``: parallel kernels of the linear memory (docs/mathematics.md, section 8).

Every channel v has its own ``gamma_tv`` and ``M_ts,v`` (decays.py; ``M = L`` without momentum), so its pairs are no matrix product:

    channel_scores                    X = Q K'
    channel_output                    o_tv = gamma_tv (W q_t)_v + rho (b_tv (S q_t)_v - sum_s M_ts,v X_ts U_sv)
    channel_du_bwd                    R_sv = -sum_t M_ts,v X_ts dO_tv;   dX_ts = -sum_v M_ts,v dO_tv U_sv
    channel_decay_bwd                 d log alpha_tv, and its sums for d theta

The kernels go through the pairs token by token with a tile ``M_t [C, BV]`` of all earlier tokens, ``M_t = alpha_t M_{t-1} + Theta_t``:
products of numbers in [0, 1] and no exponential of a difference, whatever the decays. A decay's gradient is the sum over the pairs that it
lies between. With ``M_rs = sum_u L_ru Theta_us`` these are pairs of a read r and an earlier token u with weight ``L_ru,v``:

    d log alpha_tv = sum_{r >= t} gamma_rv (W q_r)_v dO_rv + gamma_Cv <J, A>_v + sum_{r >= t > u} h_ru,v + sum_{u < t} h_u,v
    h_ru,v = rho dO_rv L_ru,v (pi_u (S q_r)_v - sum_s Theta_us X_rs U_sv)
    h_u,v = L_Cu,v (pi_u <J, S>_v - sum_s Theta_us (J k_s)_v U_sv)
    gTheta_us = -rho sum_rv L_ru,v dO_rv X_rs U_sv - sum_v L_Cu,v (J k_s)_v U_sv
    gpi_u = rho sum_rv L_ru,v dO_rv (S q_r)_v + sum_v L_Cu,v <J, S>_v

Without momentum ``Theta = 1`` and pi = 0. The chains are those of chain_streamed.py, with weights by channel; `linear_dqk_bwd`
computes dQ and dK from the dX of `channel_du_bwd`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.chunks import chunk_of, chunk_program, token_of
from ..common.gates import CARRY, load_gate, load_scale, load_update
from ..common.launch import Problem, launch, tiles
from ..common.tiles import LENGTHS, dot, fitted_dot, inside, load_tile, only_if, pair_products, store, wide


@triton.jit
def next_weights(b_m, log_decay, steps, row, i_t, o_s, o_v, valid, m_v, H, Dv: tl.constexpr, C: tl.constexpr):
    """``M_t [C, BV]`` from ``M_{t-1}``, or ``L_t`` where `steps` (the chunk's Theta) is None; unchanged for tokens outside the sequence."""
    b_alpha = tl.exp(tl.load(log_decay + (row + i_t * H) * Dv + o_v, mask=only_if(valid, m_v), other=0.0))  # [BV]
    if steps is None:
        return tl.where(only_if(valid, o_s == i_t)[:, None], 1.0, b_m * b_alpha[None, :])
    else:
        return tl.where(valid, b_m * b_alpha[None, :] + tl.load(steps + i_t * C + o_s)[:, None], b_m)


@triton.jit(do_not_specialize=LENGTHS)
def channel_scores(
    q, k, position, scores,
    cu_seqlens, first_slot, slot_owner,
    T, H, CHUNKS,
    q_strides, k_strides,
    TOKENS: tl.constexpr, C: tl.constexpr, BC: tl.constexpr, Dk: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A block ``[BC, BC]`` of one chunk's ``Q K' [t, s]``."""
    NC: tl.constexpr = C // BC
    i_s, i_r, i_slot, i_h = chunk_program(NC, NC)
    i_b, t0, bos, eos = chunk_of(i_slot, position, cu_seqlens, first_slot, slot_owner, T, CHUNKS, TOKENS, C)
    if first_slot is not None:
        if t0 >= eos:  # an unused slot
            return
    o_t, o_s = i_r * BC + tl.arange(0, BC), i_s * BC + tl.arange(0, BC)
    m_t, m_s = (t0 + o_t < eos) & (t0 + o_t >= bos), (t0 + o_s < eos) & (t0 + o_s >= bos)
    q = token_of(q, q_strides, i_b, t0, i_h)
    k = token_of(k, k_strides, i_b, t0, i_h)
    b_x = pair_products(q, q_strides.t, o_t, m_t, k, k_strides.t, o_s, m_s, BC, Dk, BK)
    tl.store(scores + (i_slot * H + i_h) * C * C + o_t[:, None] * C + o_s[None, :], b_x)


@triton.jit(do_not_specialize=LENGTHS)
def channel_output(
    q, v, lr, log_decay, decays, steps, delta, position,
    states, errors, squares, momenta, scales, scores, out,
    cu_seqlens, first_slot, slot_owner,
    T, H, CHUNKS, ROW,
    q_strides, v_strides,
    TOKENS: tl.constexpr, C: tl.constexpr, Dk: tl.constexpr, Dv: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DTYPE: tl.constexpr,
    BIAS: tl.constexpr, CHANNEL_LR: tl.constexpr,
):  # fmt: skip
    """A tile ``[C, BV]`` of one chunk's output."""
    ROW = wide(ROW)
    NV: tl.constexpr = (Dv + BV - 1) // BV
    i_v, _, i_slot, i_h = chunk_program(NV, 1)
    i_b, t0, bos, eos = chunk_of(i_slot, position, cu_seqlens, first_slot, slot_owner, T, CHUNKS, TOKENS, C)
    if first_slot is not None:
        if t0 >= eos:  # an unused slot
            return
    o_t, o_v = tl.arange(0, C), i_v * BV + tl.arange(0, BV)
    m_t, m_v = (t0 + o_t < eos) & (t0 + o_t >= bos), inside(o_v, Dv, BV)
    m_tv = m_t[:, None] & m_v[None, :]
    row = (i_b * T + t0) * H + i_h
    o_tv = (o_t * (H * Dv))[:, None] + o_v[None, :]
    place = i_slot * H + i_h
    q = token_of(q, q_strides, i_b, t0, i_h)
    v = token_of(v, v_strides, i_b, t0, i_h)
    scores += place * C * C
    rho = load_scale(scales, place)
    if steps is not None:
        steps += place * C * C

    b_o = tl.zeros((C, BV), tl.float32)
    b_carried = tl.zeros((C, BV), tl.float32)
    for i_k in range(0, (Dk + BK - 1) // BK):
        o_k = i_k * BK + tl.arange(0, BK)
        m_k = inside(o_k, Dk, BK)
        b_q = load_tile(q, q_strides.t, o_t, o_k, m_t, m_k)  # [C, BK]
        o_kv, m_kv = place * Dk * Dv + o_k[:, None] * Dv + o_v[None, :], m_k[:, None] & m_v[None, :]
        b_o += fitted_dot(b_q, tl.load(states + o_kv, mask=m_kv, other=0.0), DTYPE)
        if momenta is not None:
            b_carried += fitted_dot(b_q, tl.load(momenta + o_kv, mask=m_kv, other=0.0), DTYPE)
    b_o *= tl.load(decays + row * Dv + o_tv, mask=m_tv, other=0.0)
    if momenta is not None:
        b_o += b_carried * (tl.load(decays + (CARRY * ROW + row) * Dv + o_tv, mask=m_tv, other=0.0) * rho)
    b_u = load_update(
        v, v_strides.t, lr, delta, errors, squares, row, H, o_t, o_v, m_t, m_v,
        Dv, BIAS, CHANNEL_LR,
    )  # [C, BV]  # fmt: skip
    b_u *= rho
    b_m = tl.zeros((C, BV), tl.float32)  # M_t [s, v]
    for i_t in range(0, C):
        valid = (t0 + i_t < eos) & (t0 + i_t >= bos)
        b_m = next_weights(b_m, log_decay, steps, row, i_t, o_t, o_v, valid, m_v, H, Dv, C)
        b_x = tl.load(scores + i_t * C + o_t)  # [C]
        b_o -= tl.where((o_t == i_t)[:, None], tl.sum(b_m * b_u * b_x[:, None], 0)[None, :], 0.0)
    store(out + row * Dv + o_tv, b_o, m_tv)


@triton.jit(do_not_specialize=LENGTHS)
def channel_du_bwd(
    v, lr, log_decay, steps, delta, errors, squares, scores, grad_out, from_out, grad_scores,
    cu_seqlens, first_slot, slot_owner,
    T, H, CHUNKS, SLOTS,
    v_strides,
    TOKENS: tl.constexpr, C: tl.constexpr, Dv: tl.constexpr, BV: tl.constexpr,
    BIAS: tl.constexpr, CHANNEL_LR: tl.constexpr,
):  # fmt: skip
    """A tile ``[C, BV]`` of R, and its share of dX in ``grad_scores [tiles, slots, H, C, C]``."""
    SLOTS = wide(SLOTS)
    NV: tl.constexpr = (Dv + BV - 1) // BV
    i_v, _, i_slot, i_h = chunk_program(NV, 1)
    i_b, t0, _, eos = chunk_of(i_slot, None, cu_seqlens, first_slot, slot_owner, T, CHUNKS, TOKENS, C)
    if first_slot is not None:
        if t0 >= eos:  # an unused slot
            return
    o_s, o_v = tl.arange(0, C), i_v * BV + tl.arange(0, BV)
    m_s, m_v = t0 + o_s < eos, inside(o_v, Dv, BV)
    row = (i_b * T + t0) * H + i_h
    v = token_of(v, v_strides, i_b, t0, i_h)
    scores += (i_slot * H + i_h) * C * C
    grad_scores += ((i_v * SLOTS + i_slot) * H + i_h) * C * C
    if steps is not None:
        steps += (i_slot * H + i_h) * C * C
    b_u = load_update(
        v, v_strides.t, lr, delta, errors, squares, row, H, o_s, o_v, m_s, m_v,
        Dv, BIAS, CHANNEL_LR,
    )  # [C, BV]  # fmt: skip
    b_r = tl.zeros((C, BV), tl.float32)
    b_m = tl.zeros((C, BV), tl.float32)  # M_t [s, v]
    for i_t in range(0, C):
        valid = t0 + i_t < eos
        b_m = next_weights(b_m, log_decay, steps, row, i_t, o_s, o_v, valid, m_v, H, Dv, C)
        b_do = tl.load(grad_out + (row + i_t * H) * Dv + o_v, mask=only_if(valid, m_v), other=0.0).to(tl.float32)  # [BV]
        b_md = b_m * b_do[None, :]
        b_r -= b_md * tl.load(scores + i_t * C + o_s)[:, None]
        tl.store(grad_scores + i_t * C + o_s, -tl.sum(b_md * b_u, 1))
    store(from_out + row * Dv + (o_s * (H * Dv))[:, None] + o_v[None, :], b_r, m_s[:, None] & m_v[None, :])


@triton.jit(do_not_specialize=LENGTHS)
def channel_decay_bwd(
    q, k, v, lr, log_decay, decays, moves, steps, delta,
    states, duals, momenta, errors, squares, scales, scores, grad_states, grad_out, grad_log_decay, grad_steps, rows_carry,
    cu_seqlens, first_slot, slot_owner,
    T, H, CHUNKS, ROW, SLOTS,
    q_strides, k_strides, v_strides,
    TOKENS: tl.constexpr, C: tl.constexpr, Dk: tl.constexpr, Dv: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DTYPE: tl.constexpr,
    BIAS: tl.constexpr, CHANNEL_LR: tl.constexpr,
):  # fmt: skip
    """A tile ``[C, BV]`` of one chunk's d log alpha; with momentum also its share of gTheta and gpi, one row per tile."""
    ROW, SLOTS = wide(ROW), wide(SLOTS)
    NV: tl.constexpr = (Dv + BV - 1) // BV
    i_v, _, i_slot, i_h = chunk_program(NV, 1)
    i_b, t0, _, eos = chunk_of(i_slot, None, cu_seqlens, first_slot, slot_owner, T, CHUNKS, TOKENS, C)
    if first_slot is not None:
        if t0 >= eos:  # an unused slot
            return
    o_s, o_v = tl.arange(0, C), i_v * BV + tl.arange(0, BV)
    m_s, m_v = t0 + o_s < eos, inside(o_v, Dv, BV)
    m_sv = m_s[:, None] & m_v[None, :]
    row = (i_b * T + t0) * H + i_h
    o_sv = (o_s * (H * Dv))[:, None] + o_v[None, :]
    place = i_slot * H + i_h
    q = token_of(q, q_strides, i_b, t0, i_h)
    k = token_of(k, k_strides, i_b, t0, i_h)
    v = token_of(v, v_strides, i_b, t0, i_h)
    scores += place * C * C
    if duals is None:
        duals = states

    b_read = tl.zeros((C, BV), tl.float32)  # W q
    b_end_sum = tl.zeros((C, BV), tl.float32)  # J k
    b_inner = tl.zeros((BV,), tl.float32)  # <J, A>
    b_carried = tl.zeros((C, BV), tl.float32)  # S q
    b_inner_carry = tl.zeros((BV,), tl.float32)  # <J, S>
    for i_k in range(0, (Dk + BK - 1) // BK):
        o_k = i_k * BK + tl.arange(0, BK)
        m_k = inside(o_k, Dk, BK)
        m_kv = m_k[:, None] & m_v[None, :]
        o_kv = place * Dk * Dv + o_k[:, None] * Dv + o_v[None, :]
        b_q = load_tile(q, q_strides.t, o_s, o_k, m_s, m_k)  # [C, BK]
        b_k = load_tile(k, k_strides.t, o_s, o_k, m_s, m_k)  # [C, BK]
        b_j = tl.load(grad_states + o_kv, mask=m_kv, other=0.0)  # [BK, BV]
        b_read += fitted_dot(b_q, tl.load(states + o_kv, mask=m_kv, other=0.0), DTYPE)
        b_end_sum += fitted_dot(b_k, b_j, DTYPE)
        b_inner += tl.sum(b_j * tl.load(duals + o_kv, mask=m_kv, other=0.0), 0)
        if momenta is not None:
            b_s0 = tl.load(momenta + o_kv, mask=m_kv, other=0.0)  # [BK, BV]
            b_carried += fitted_dot(b_q, b_s0, DTYPE)
            b_inner_carry += tl.sum(b_j * b_s0, 0)
    b_u = load_update(
        v, v_strides.t, lr, delta, errors, squares, row, H, o_s, o_v, m_s, m_v,
        Dv, BIAS, CHANNEL_LR,
    )  # [C, BV]  # fmt: skip
    b_do = tl.load(grad_out + row * Dv + o_sv, mask=m_sv, other=0.0).to(tl.float32)  # [C, BV]
    b_read *= b_do * tl.load(decays + row * Dv + o_sv, mask=m_sv, other=0.0)
    b_end_sum *= -b_u
    b_do *= load_scale(scales, place)
    if momenta is not None:
        b_theta = tl.load(steps + place * C * C + o_s[:, None] * C + o_s[None, :])  # Theta [u, s]
        b_pi = load_gate(moves, row, o_s * H, m_s)  # [C]
        b_gtheta = tl.zeros((C, C), tl.float32)  # [u, s]
        b_gpi = tl.zeros((C,), tl.float32)

    b_crossing = tl.zeros((C, BV), tl.float32)  # at u: the sum of h over later tokens
    b_l = tl.zeros((C, BV), tl.float32)  # L_t [u, v]
    for i_t in range(0, C + 1):  # the last row: gradients from the next chunk
        valid = (i_t < C) & (t0 + i_t < eos)
        b_l = next_weights(b_l, log_decay, None, row, i_t, o_s, o_v, valid, m_v, H, Dv, C)
        b_at = only_if(i_t < C, o_s == i_t)[:, None]
        b_out = tl.where(i_t < C, tl.sum(tl.where(b_at, b_do, 0.0), 0), 1.0)  # [BV]
        b_x = tl.load(scores + i_t * C + o_s, mask=only_if(i_t < C, m_s), other=0.0)  # [C]
        b_writes = tl.where(i_t < C, -b_x[:, None] * b_u, b_end_sum)  # [s, v]
        b_weight = b_l * b_out[None, :]  # [u, v]
        if momenta is None:
            b_h = b_weight * b_writes
        else:
            b_first = tl.where(i_t < C, tl.sum(tl.where(b_at, b_carried, 0.0), 0), b_inner_carry)  # [BV]
            b_h = b_weight * (dot(b_theta, b_writes) + b_pi[:, None] * b_first[None, :])
            b_gtheta += dot(b_weight, tl.trans(b_writes))
            b_gpi += tl.sum(b_weight * b_first[None, :], 1)
        b_crossing += tl.where(o_s[:, None] < i_t, tl.cumsum(b_h, 0), 0.0)
    if momenta is not None:
        p_steps = grad_steps + ((i_v * SLOTS + i_slot) * H + i_h) * C * C
        tl.store(p_steps + o_s[:, None] * C + o_s[None, :], b_gtheta)
        tl.store(rows_carry + i_v.to(tl.int64) * ROW + row + o_s * H, b_gpi, mask=m_s)
    p_grad = grad_log_decay + row * Dv + o_sv
    tl.store(p_grad + H * Dv, b_crossing, mask=((t0 + o_s + 1 < eos) & (o_s < C - 1))[:, None] & m_v[None, :])
    tl.debug_barrier()
    last = tl.minimum(eos - t0, C) - 1
    b_inner *= tl.load(decays + (row + last * H) * Dv + o_v, mask=only_if(last >= 0, m_v), other=0.0)
    b_before = tl.load(p_grad, mask=m_sv & (o_s > 0)[:, None], other=0.0)
    tl.debug_barrier()
    tl.store(p_grad, b_before + tl.cumsum(b_read, 0, reverse=True) + b_inner[None, :], mask=m_sv)


# -------------------------------------------------------------------------------------------------------------- launchers


def chunk_scores(p: Problem) -> Tensor:
    """``Q K' [slots, H, C, C]`` float32."""
    scores = p.empty(p.slots.count, p.heads, p.rows, p.rows, dtype=torch.float32)
    launch(channel_scores, p, p.slots.count * p.blocks**2, "head", dict(scores=scores))
    return scores


def output(p: Problem) -> Tensor:
    """``[B, T, H, Dv]``. The problem shares the weights of the call and the chain's outputs, here and below."""
    out = p.result(p.value_dim)
    launch(channel_output, p, p.slots.count, "value", dict(scores=chunk_scores(p), out=out))
    return out


def du_from_output(p: Problem, scores: Tensor) -> tuple[Tensor, Tensor]:
    """R ``[B, T, H, Dv]`` and dX ``[slots, H, C, C]`` float32, without the factor rho; the problem also shares ``grad_out``."""
    from_out = p.per_token(p.value_dim)
    grad_scores = p.empty(tiles("channel_du_bwd", p, "value"), *scores.shape, dtype=torch.float32)
    launch(channel_du_bwd, p, p.slots.count, "value", dict(scores=scores, from_out=from_out, grad_scores=grad_scores))
    return from_out, grad_scores.sum(0)


def decay_gradient(p: Problem, scores: Tensor, grad_states: Tensor) -> tuple[Tensor, ...]:
    """d log alpha ``[B, T, H, Dv]``; with momentum also gTheta ``[slots, H, C, C]`` and gpi ``[B, T, H]`` for `momentum_weights_bwd`."""
    grad, partial = p.result(p.value_dim, dtype=torch.float32), [None, None]
    if p.momentum is not None:
        count = tiles("channel_decay_bwd", p, "value")
        partial = [p.empty(count, *shape, dtype=torch.float32) for shape in (scores.shape, p.momentum.shape)]
    own = dict(scores=scores, grad_states=grad_states, grad_log_decay=grad, grad_steps=partial[0], rows_carry=partial[1])
    launch(channel_decay_bwd, p, p.slots.count, "value", own)
    return grad, *(x.sum(0) for x in partial if x is not None)
