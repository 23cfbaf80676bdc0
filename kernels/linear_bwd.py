"""The linear memory backward (SPEC section 2), in three stages; J is the gradient of the next chunk's state.

    linear_pre   R = -P' dO,  P = L o (Q K')                                                          parallel over chunks
    linear_seq   dU = R - dec (K J);  dE = psi'(E) (eta dU);  J <- gamma_C J + Q' (gamma dO) + K' dE  sequential, last chunk first
    linear_epi   dS = -L o (dO U');  dQ = gamma (dO S') + dS K;  dK = dE S' - (dec U) J' + dS' Q      parallel over chunks

Before them `linear_state` computes S and E again, between the states that the forward kept. ``dV = -dE`` leaves `linear_seq` as
a result and is read by `linear_epi` as dE.

Under a retention gate S is the primal W and J the gradient of the dual, R and dS are scaled by rho; with momentum L is M, and J has its
pair JS: see linear_stream.py. The gradients of the gates come from sums that these kernels leave (decays_bwd.py).

A token's log-decay scales whatever the state at the chunk's start and earlier tokens left to later reads and to the next
chunk. Its gradient is summed over just these pairs, from the products themselves:

    d log alpha_t = sum_{r >= t} gamma_r q_r'S dO_r  +  sum_{r >= t > s} (dS o Q K')_rs  -  sum_{s < t} dec_s U_s'(J'k_s)  +  gamma_C <J, S>

The shorter forms in the literature, ``cumsum(q.dq - k.dk)``, subtract numbers of order 1 where the result may be any power
smaller. Sums over values or keys are left as partial ones, a row of ``[R, B, T, H]`` for each tile, and added afterwards: no atomics,
the same bits every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import bias as biases
from . import linear_channel
from .chunks import chunk_of, end_of, sequence_of, slot_of
from .decays import Weights, chunk_weights
from .decays_bwd import decay_gradient, gate_gradients, pair_gradient
from .gates import (
    CARRY,
    load_delta,
    load_error,
    load_gamma,
    load_gate,
    load_lr,
    load_row_weights,
    load_scale,
    load_square,
    load_to_end,
    load_total,
    load_update,
    pair_decay,
)
from .launch import Problem, launch, tiles
from .linear_fwd import recompute
from .linear_stream import linear_seq_streamed
from .tiles import LENGTHS, dot, inside, load_tile, pair_products, rounded, store


@triton.jit(do_not_specialize=LENGTHS)
def linear_pre(
    q, k, decays, pairs, grad_out, from_out,
    cu_seqlens, first_slot, slot_owner,
    T, H, CHUNKS, ROW,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh,
    TOKENS: tl.constexpr, C: tl.constexpr, BC: tl.constexpr,
    Dk: tl.constexpr, Dv: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """A tile ``[BC, BV]`` of R: what the output alone asks of one chunk's updates."""
    NV: tl.constexpr = (Dv + BV - 1) // BV
    NC: tl.constexpr = C // BC
    i_v, i_r = tl.program_id(0) % NV, tl.program_id(0) // NV % NC
    i_slot = (tl.program_id(0) // (NV * NC)).to(tl.int64)
    i_h = tl.program_id(1).to(tl.int64)
    i_b, t0, _, eos = chunk_of(i_slot, None, cu_seqlens, first_slot, slot_owner, T, CHUNKS, TOKENS, C)
    if first_slot is not None:
        if t0 >= eos:  # a spare slot
            return
    o_s, o_v = i_r * BC + tl.arange(0, BC), i_v * BV + tl.arange(0, BV)
    m_s, m_v = t0 + o_s < eos, inside(o_v, Dv, BV)
    row = (i_b * T + t0) * H + i_h
    q += i_b * stride_qb + i_h * stride_qh + t0 * stride_qt
    k += i_b * stride_kb + i_h * stride_kh + t0 * stride_kt
    grad_out += row * Dv
    if pairs is not None:
        pairs += (i_slot * H + i_h) * C * C

    b_r = tl.zeros((BC, BV), tl.float32)
    for i_t in range(i_r, NC):
        o_t = i_t * BC + tl.arange(0, BC)
        m_t = t0 + o_t < eos
        b_p = pair_products(k, stride_kt, o_s, m_s, q, stride_qt, o_t, m_t, BC, Dk, BK)  # [s, t]
        b_p *= pair_decay(decays, pairs, ROW, row, H, C, o_t[None, :], o_s[:, None], m_t[None, :], m_s[:, None])
        b_do = load_tile(grad_out, H * Dv, o_t, o_v, m_t, m_v)  # [BC, BV]
        b_r -= dot(rounded(b_p, DTYPE), b_do)
    store(from_out + row * Dv + o_s[:, None] * (H * Dv) + o_v[None, :], b_r, m_s[:, None] & m_v[None, :])


@triton.jit(do_not_specialize=LENGTHS)
def linear_seq(
    q, k, v, lr, decays, delta,
    errors, squares, from_out, grad_out, grad_final,
    grad_states, grad_v, grad_initial, grad_delta, grad_lr, rows_lr, rows_delta, rows_kept,
    cu_seqlens, first_slot,
    T, H, CHUNKS, ROW,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    TOKENS: tl.constexpr, C: tl.constexpr, Dk: tl.constexpr, Dv: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DTYPE: tl.constexpr,
    BIAS: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
    READS: tl.constexpr, COUPLED: tl.constexpr, DELTA: tl.constexpr, CHANNEL_LR: tl.constexpr,
):  # fmt: skip
    """One tile of J ``[BK, BV]`` from the last chunk of a sequence to its first."""
    NV: tl.constexpr = (Dv + BV - 1) // BV
    i_v = tl.program_id(0) % NV
    i_n = (tl.program_id(0) // NV).to(tl.int64)
    i_h = tl.program_id(1).to(tl.int64)
    i_b, bos, eos = sequence_of(i_n, cu_seqlens, T)
    chunks = ((eos - bos + TOKENS - 1) // TOKENS).to(tl.int32)
    slot = slot_of(i_n, first_slot, CHUNKS)

    o_c, o_k, o_v = tl.arange(0, C), tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    m_k, m_v = inside(o_k, Dk, BK), inside(o_v, Dv, BV)
    m_kv = m_k[:, None] & m_v[None, :]
    q += i_b * stride_qb + i_h * stride_qh
    k += i_b * stride_kb + i_h * stride_kh
    v += i_b * stride_vb + i_h * stride_vh
    o_g = o_c * H  # a chunk's gates
    o_kv, o_tv = o_k[:, None] * Dv + o_v[None, :], o_g[:, None] * Dv + o_v[None, :]
    o_vk = o_v[None, :] * Dk + o_k[:, None]  # in [N, H, Dv, Dk], once a sequence
    state = (i_n * H + i_h) * Dk * Dv
    tile_row = i_v.to(tl.int64) * ROW

    b_j = tl.zeros((BK, BV), tl.float32)
    if grad_final is not None:
        b_j += tl.load(grad_final + state + o_vk, mask=m_kv, other=0.0)
    for i in range(0, chunks):
        i_c = chunks - 1 - i
        t0 = bos + i_c * TOKENS
        end = end_of(t0, eos, C, TOKENS)
        m_t = t0 + o_c < end
        row = (i_b * T + t0) * H + i_h
        m_tv = m_t[:, None] & m_v[None, :]

        b_jr = rounded(b_j, DTYPE)
        store(grad_states + ((slot + i_c) * H + i_h) * Dk * Dv + o_kv, b_jr, m_kv)
        b_k = load_tile(k + t0 * stride_kt, stride_kt, o_c, o_k, m_t, m_k)  # [C, BK]
        b_q = load_tile(q + t0 * stride_qt, stride_qt, o_c, o_k, m_t, m_k)  # [C, BK]
        b_do = tl.load(grad_out + row * Dv + o_tv, mask=m_tv, other=0.0).to(tl.float32)  # [C, BV]
        b_kj = dot(b_k, b_jr) * load_to_end(decays, ROW, row, o_g, m_t, C)[:, None]  # [C, BV]
        b_du = tl.load(from_out + row * Dv + o_tv, mask=m_tv, other=0.0).to(tl.float32) - b_kj  # [C, BV]

        b_e = load_error(v + t0 * stride_vt, stride_vt, errors, row, o_c, o_v, o_tv, m_tv, Dv, READS)
        b_square = load_square(squares, row, o_g, m_t, COUPLED)
        b_delta = load_delta(delta, row, o_g, o_tv, m_t, m_tv, Dv, DELTA)
        b_psi = biases.value(b_e, b_square, b_delta, BIAS, P0, P1, P2)
        if CHANNEL_LR:
            b_lr = load_lr(lr, row, o_g, o_tv, m_t, m_tv, Dv, CHANNEL_LR)  # [C, BV]
            tl.store(grad_lr + row * Dv + o_tv, b_du * b_psi, mask=m_tv)
            if decays is not None:
                tl.store(rows_kept + tile_row + row + o_g, -tl.sum(b_kj * (b_psi * b_lr), 1), mask=m_t)
            b_y = b_du * b_lr
        else:
            b_lr = load_gate(lr, row, o_g, m_t)  # [C]
            tl.store(rows_lr + tile_row + row + o_g, tl.sum(b_du * b_psi, 1), mask=m_t)
            if decays is not None:
                tl.store(rows_kept + tile_row + row + o_g, -b_lr * tl.sum(b_kj * b_psi, 1), mask=m_t)
            b_y = b_du * b_lr[:, None]
        b_de = b_y * biases.slope(b_e, b_square, b_delta, BIAS, P0, P1, P2)
        if COUPLED:
            b_along = tl.sum(b_y * b_e, 1)[:, None]
            b_de += biases.pull(b_square, b_delta, BIAS, P0) * b_along * b_e
        store(grad_v + row * Dv + o_tv, -b_de, m_tv)
        if DELTA > 0:
            b_dd = b_y * biases.slope_delta(b_e, b_square, b_delta, BIAS, P0)
            if DELTA == 2:
                tl.store(grad_delta + row * Dv + o_tv, b_dd, mask=m_tv)
            else:
                tl.store(rows_delta + tile_row + row + o_g, tl.sum(b_dd, 1), mask=m_t)

        b_gamma = load_gamma(decays, row, o_g, m_t, C)
        gamma = load_total(decays, row, (tl.minimum(end - t0, C) - 1) * H)
        b_j = b_j * gamma + dot(tl.trans(b_q), rounded(b_do * b_gamma[:, None], DTYPE))
        if READS:
            b_j += dot(tl.trans(b_k), rounded(b_de, DTYPE))
    tl.store(grad_initial + state + o_vk, b_j, mask=m_kv)


@triton.jit(do_not_specialize=LENGTHS)
def linear_epi(
    q, k, v, lr, decays, moves, pairs, delta,
    states, errors, squares, duals, momenta, scales, grad_scores, grad_states, grad_momenta, grad_out, grad_v,
    grad_q, grad_k, rows_read, rows_pairs, rows_carry, inner,
    cu_seqlens, first_slot, slot_owner,
    T, H, CHUNKS, ROW, SLOTS,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    TOKENS: tl.constexpr, C: tl.constexpr, BC: tl.constexpr,
    Dk: tl.constexpr, Dv: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DTYPE: tl.constexpr,
    BIAS: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
    READS: tl.constexpr, COUPLED: tl.constexpr, DELTA: tl.constexpr, CHANNEL_LR: tl.constexpr,
):  # fmt: skip
    """A tile ``[BC, BK]`` of one chunk's dQ, then of its dK, each one large accumulator at a time (two with momentum).

    ``grad_scores [slots, H, C, C]``: dX where decays go by channel (linear_channel.py), and `decays` are rows of channels then.
    """
    NK: tl.constexpr = (Dk + BK - 1) // BK
    NV: tl.constexpr = (Dv + BV - 1) // BV
    NC: tl.constexpr = C // BC
    CHANNELS: tl.constexpr = grad_scores is not None
    PAIRS: tl.constexpr = rows_pairs is not None  # a log-decay without momentum: momentum_pairs sums them otherwise
    i_k, i_r = tl.program_id(0) % NK, tl.program_id(0) // NK % NC
    i_slot = (tl.program_id(0) // (NK * NC)).to(tl.int64)
    i_h = tl.program_id(1).to(tl.int64)
    i_b, t0, _, eos = chunk_of(i_slot, None, cu_seqlens, first_slot, slot_owner, T, CHUNKS, TOKENS, C)
    if first_slot is not None:
        if t0 >= eos:  # a spare slot
            return
    o_r, o_k = i_r * BC + tl.arange(0, BC), i_k * BK + tl.arange(0, BK)
    m_r, m_k = t0 + o_r < eos, inside(o_k, Dk, BK)
    m_rk = m_r[:, None] & m_k[None, :]
    row = (i_b * T + t0) * H + i_h
    q += i_b * stride_qb + i_h * stride_qh + t0 * stride_qt
    k += i_b * stride_kb + i_h * stride_kh + t0 * stride_kt
    v += i_b * stride_vb + i_h * stride_vh + t0 * stride_vt
    place = i_slot * H + i_h
    states += place * Dk * Dv
    grad_states += place * Dk * Dv
    rho = load_scale(scales, place)
    if pairs is not None:
        pairs += place * C * C
    if CHANNELS:
        grad_scores += place * C * C
    if momenta is not None:
        momenta += place * Dk * Dv
        grad_momenta += place * Dk * Dv
    grad_out += row * Dv
    grad_v += row * Dv

    # dQ = gamma (dO W') + rho b (dO S') + dP K
    b_dq = tl.zeros((BC, BK), tl.float32)
    for i_v in range(0, NV):
        o_v = i_v * BV + tl.arange(0, BV)
        m_v = inside(o_v, Dv, BV)
        b_do = load_tile(grad_out, H * Dv, o_r, o_v, m_r, m_v)  # [BC, BV]
        if CHANNELS:
            b_do = load_row_weights(decays, row, o_r * H, o_v, m_r, m_v, Dv) * b_do.to(tl.float32)
            b_do = rounded(b_do, DTYPE)
        b_w = tl.load(states + o_k[None, :] * Dv + o_v[:, None], mask=m_v[:, None] & m_k[None, :], other=0.0)  # [BV, BK]
        b_dq += dot(b_do, rounded(b_w, DTYPE))
    if not CHANNELS:
        b_dq *= load_gamma(decays, row, o_r * H, m_r, BC)[:, None]
    b_q = load_tile(q, stride_qt, o_r, o_k, m_r, m_k)  # [BC, BK]
    b_before = tl.zeros((BC,), tl.float32)  # (dS o Q K') of earlier blocks, summed along a row
    if rows_read is not None:
        tl.store(rows_read + i_k.to(tl.int64) * ROW + row + o_r * H, tl.sum(b_dq * b_q.to(tl.float32), 1), mask=m_r)
    if momenta is not None:
        b_carried = tl.zeros((BC, BK), tl.float32)
        for i_v in range(0, NV):
            o_v = i_v * BV + tl.arange(0, BV)
            m_v = inside(o_v, Dv, BV)
            b_do = load_tile(grad_out, H * Dv, o_r, o_v, m_r, m_v)  # [BC, BV]
            b_m = tl.load(momenta + o_k[None, :] * Dv + o_v[:, None], mask=m_v[:, None] & m_k[None, :], other=0.0)  # [BV, BK]
            if CHANNELS:
                b_do = load_row_weights(decays + CARRY * ROW * Dv, row, o_r * H, o_v, m_r, m_v, Dv) * b_do.to(tl.float32)
                b_do = rounded(b_do, DTYPE)
            b_carried += dot(b_do, rounded(b_m, DTYPE))
        b_carried *= rho
        if CHANNELS:
            b_dq += b_carried
        else:
            tl.store(rows_carry + i_k.to(tl.int64) * ROW + row + o_r * H, tl.sum(b_carried * b_q.to(tl.float32), 1), mask=m_r)
            b_dq += b_carried * load_gate(decays + CARRY * ROW, row, o_r * H, m_r)[:, None]
    for i_s in range(0, i_r + 1):
        o_s = i_s * BC + tl.arange(0, BC)
        m_s = t0 + o_s < eos
        if CHANNELS:
            b_ds = tl.load(grad_scores + o_r[:, None] * C + o_s[None, :])  # [t, s]
        else:
            b_dp = tl.zeros((BC, BC), tl.float32)  # [t, s]
            for i_v in range(0, NV):
                o_v = i_v * BV + tl.arange(0, BV)
                m_v = inside(o_v, Dv, BV)
                b_do = load_tile(grad_out, H * Dv, o_r, o_v, m_r, m_v)  # [BC, BV]
                b_u = load_update(
                    v, stride_vt, lr, delta, errors, squares, row, H, o_s, o_v, m_s, m_v,
                    Dv, BIAS, P0, P1, P2, READS, COUPLED, DELTA, CHANNEL_LR,
                )  # [BC, BV]  # fmt: skip
                b_dp += dot(b_do, tl.trans(rounded(b_u, DTYPE)))
            b_ds = -b_dp * pair_decay(decays, pairs, ROW, row, H, C, o_r[:, None], o_s[None, :], m_r[:, None], m_s[None, :])
        if scales is not None:
            b_ds *= rho
        b_k = load_tile(k, stride_kt, o_s, o_k, m_s, m_k)  # [BC, BK]
        if PAIRS:  # pairs of a read after token s and a write up to it
            b_pairs = b_ds * dot(b_q, tl.trans(b_k))
            b_crossing = tl.where(o_r[:, None] > o_s[None, :], tl.cumsum(b_pairs, 1) + b_before[:, None], 0.0)
            tile_row = (i_k * NC + i_r).to(tl.int64) * ROW
            tl.store(rows_pairs + tile_row + row + o_s * H, tl.sum(b_crossing, 0), mask=m_s)
            b_before += tl.sum(b_pairs, 1)
        b_dq += dot(rounded(b_ds, DTYPE), b_k)
    store(grad_q + row * Dk + o_r[:, None] * (H * Dk) + o_k[None, :], b_dq, m_rk)

    # dK = dE W' - (dec U) J' - (Theta_C U) JS' + dP' Q
    b_dk = tl.zeros((BC, BK), tl.float32)
    if not CHANNELS:
        b_to_end = load_to_end(decays, ROW, row, o_r * H, m_r, BC)
    if momenta is not None:
        b_step = load_gate(moves + ROW, row, o_r * H, m_r)
    product = 0.0  # <J, A>, and with momentum ...
    product_carry = 0.0  # <J, S>
    product_pi = 0.0  # <JS, S>
    for i_v in range(0, NV):
        o_v = i_v * BV + tl.arange(0, BV)
        m_v = inside(o_v, Dv, BV)
        m_vk = m_v[:, None] & m_k[None, :]
        b_u = load_update(
            v, stride_vt, lr, delta, errors, squares, row, H, o_r, o_v, m_r, m_v,
            Dv, BIAS, P0, P1, P2, READS, COUPLED, DELTA, CHANNEL_LR,
        )  # [BC, BV]  # fmt: skip
        b_j = tl.load(grad_states + o_k[None, :] * Dv + o_v[:, None], mask=m_vk, other=0.0)  # [BV, BK]
        if CHANNELS:
            b_to_end = load_row_weights(decays + ROW * Dv, row, o_r * H, o_v, m_r, m_v, Dv)
            b_dk -= dot(rounded(b_u * b_to_end, DTYPE), rounded(b_j, DTYPE))
        else:
            b_dk -= dot(rounded(b_u * b_to_end[:, None], DTYPE), rounded(b_j, DTYPE))
        if momenta is not None:
            p_m = o_k[None, :] * Dv + o_v[:, None]
            b_m, b_jm = tl.load(momenta + p_m, mask=m_vk, other=0.0), tl.load(grad_momenta + p_m, mask=m_vk, other=0.0)  # [BV, BK]
            b_dk -= dot(rounded(b_u * b_step[:, None], DTYPE), rounded(b_jm, DTYPE))
            product_carry += tl.sum(b_m * b_j)
            product_pi += tl.sum(b_m * b_jm)
        if READS or (inner is not None and duals is None):
            b_w = tl.load(states + o_k[None, :] * Dv + o_v[:, None], mask=m_vk, other=0.0)  # [BV, BK]
        if READS:
            b_dv = load_tile(grad_v, H * Dv, o_r, o_v, m_r, m_v)  # [BC, BV]
            b_dk -= dot(b_dv, rounded(b_w, DTYPE))  # dE = -dV
        if inner is not None:
            if duals is not None:
                b_w = tl.load(duals + place * Dk * Dv + o_k[None, :] * Dv + o_v[:, None], mask=m_vk, other=0.0)  # [BV, BK]
            product += tl.sum(b_w.to(tl.float32) * b_j.to(tl.float32))
    if inner is not None:
        p_inner = inner + (i_k * SLOTS + i_slot) * H + i_h
        tl.store(p_inner, product, mask=i_r == 0)
        if momenta is not None:
            tl.store(p_inner + NK * SLOTS * H, product_carry, mask=i_r == 0)
            tl.store(p_inner + 2 * NK * SLOTS * H, product_pi, mask=i_r == 0)
    for i_t in range(i_r, NC):
        o_t = i_t * BC + tl.arange(0, BC)
        m_t = t0 + o_t < eos
        if CHANNELS:
            b_ds = tl.load(grad_scores + o_t[None, :] * C + o_r[:, None])  # [s, t]
        else:
            b_dp = tl.zeros((BC, BC), tl.float32)  # [s, t]: computed anew, since transposing the other goes wrong in some compilers
            for i_v in range(0, NV):
                o_v = i_v * BV + tl.arange(0, BV)
                m_v = inside(o_v, Dv, BV)
                b_u = load_update(
                    v, stride_vt, lr, delta, errors, squares, row, H, o_r, o_v, m_r, m_v,
                    Dv, BIAS, P0, P1, P2, READS, COUPLED, DELTA, CHANNEL_LR,
                )  # [BC, BV]  # fmt: skip
                b_do = load_tile(grad_out, H * Dv, o_t, o_v, m_t, m_v)  # [BC, BV]
                b_dp += dot(rounded(b_u, DTYPE), tl.trans(b_do))
            b_ds = -b_dp * pair_decay(decays, pairs, ROW, row, H, C, o_t[None, :], o_r[:, None], m_t[None, :], m_r[:, None])
        if scales is not None:
            b_ds *= rho
        b_q = load_tile(q, stride_qt, o_t, o_k, m_t, m_k)  # [BC, BK]
        b_dk += dot(rounded(b_ds, DTYPE), b_q)
    store(grad_k + row * Dk + o_r[:, None] * (H * Dk) + o_k[None, :], b_dk, m_rk)


# --------------------------------------------------------------------------------------------------------------- launcher


def backward(p: Problem, checkpoints: Tensor, every: int, grad_out: Tensor, grad_state: list[Tensor]) -> dict:
    """Gradients by argument name, ``state`` for the initial matrices ``[N, H, Dv, Dk]``: the dual and, if there is one, the momentum."""
    weights = chunk_weights(p, backward=True)
    decays, moving, by_channel = weights.decays, p.momentum is not None, p.key.channels
    decaying = p.log_decay is not None and not by_channel
    chain = recompute(p, weights, checkpoints, every)
    grad_out = grad_out.contiguous()
    parallel = p.tables()
    sequential = {name: x for name, x in parallel.items() if name != "slot_owner"}

    from_out = p.per_token(p.value_dim)
    scores = grad_scores = None
    if by_channel:
        scores = linear_channel.chunk_scores(p)
        grad_scores = linear_channel.pre(p, weights, chain, scores, grad_out, from_out)
    else:
        _pre(p, weights, grad_out, from_out)

    streamed = p.key.streams("linear_seq")
    seq = linear_seq_streamed if streamed else linear_seq
    value_tiles, key_tiles = tiles(seq.__name__, p, "value"), tiles("linear_epi", p, "key")
    float32, per_token, per_row = torch.float32, p.bias["DELTA"] == 1, not p.bias["CHANNEL_LR"]

    def rows(count: int, wanted: bool = True) -> Tensor | None:
        return p.empty(count, p.batch, p.tokens, p.heads, dtype=float32) if wanted else None

    def channels(wanted: bool) -> Tensor | None:
        return p.per_token(p.value_dim, dtype=float32) if wanted else None

    sums = dict(
        rows_lr=rows(value_tiles, per_row),
        rows_delta=rows(value_tiles, per_token),
        rows_kept=rows(value_tiles, decaying or (moving and not by_channel)),
    )
    elementwise = dict(grad_lr=channels(not per_row), grad_delta=channels(p.bias["DELTA"] == 2))
    grad_states, grad_momenta = p.per_slot(p.slots, float32 if streamed else None), p.per_slot(p.slots, float32) if moving else None
    grad_v = p.per_token(p.value_dim)
    given = [x.contiguous() for x in grad_state]
    initial = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in p.call.state.matrices()]
    if streamed:
        sums |= dict(rows_step=rows(value_tiles, moving))
        more = dict(
            states=chain.states,
            **chain.only("duals", "momenta", "scales"),
            **p.retention,
            moves=weights.moves,
            CHANNELS=by_channel,
            grad_momenta=grad_momenta,
        )
        more |= dict(grad_final_momentum=given[1] if moving and given else None, grad_initial_momentum=initial[1] if moving else None)
        more |= dict(grad_primal=p.empty(p.sequences, p.heads, p.key_dim, p.value_dim, dtype=float32) if p.key.retention else None)
    launch(
        seq, p, p.sequences, "value",
        q=p.q, k=p.k, v=p.v, lr=p.lr, decays=decays, delta=p.delta, errors=chain.errors, squares=chain.squares,
        from_out=from_out, grad_out=grad_out, grad_final=given[0] if given else None,
        grad_states=grad_states, grad_v=grad_v, grad_initial=initial[0], **sums, **elementwise, **(more if streamed else {}),
        **sequential, ROW=p.row, **p.strides("q", "k", "v"), **p.sizes, **p.bias,
    )  # fmt: skip
    del from_out

    grad_q, grad_k = p.per_token(p.key_dim), p.per_token(p.key_dim)
    rows_read, rows_pairs = rows(key_tiles, decaying), rows(key_tiles * p.blocks, decaying and not moving)
    rows_carry, products = rows(key_tiles, moving and not by_channel), (3,) if moving else ()
    inner = p.empty(*products, key_tiles, p.slots.count, p.heads, dtype=float32) if decaying or moving else None
    launch(
        linear_epi, p, p.slots.count * p.blocks, "key",
        q=p.q, k=p.k, v=p.v, lr=p.lr, **weights.only("decays", "moves", "pairs"), delta=p.delta, **chain._asdict(),
        grad_scores=grad_scores, grad_states=grad_states, grad_momenta=grad_momenta, grad_out=grad_out, grad_v=grad_v,
        grad_q=grad_q, grad_k=grad_k, rows_read=rows_read, rows_pairs=rows_pairs, rows_carry=rows_carry, inner=inner,
        **parallel, ROW=p.row, SLOTS=p.slots.count, **p.strides("q", "k", "v"), **p.sizes, BC=p.block, **p.bias,
    )  # fmt: skip

    grads = {"q": grad_q, "k": grad_k, "v": grad_v, "lr": sums["rows_lr"].sum(0) if per_row else elementwise["grad_lr"], "state": initial}
    if moving and not by_channel:
        added = {name: None if x is None else x.sum(0) for name, x in (("rows_read", rows_read), ("rows_carry", rows_carry))}
        added |= {name: sums[name].sum(0) for name in ("rows_kept", "rows_step")}
        grads |= gate_gradients(p, weights, pair_gradient(p, chain, grad_out), inner=inner.sum(1), **added)
    elif decaying:
        grads["log_decay"] = decay_gradient(p, decays, rows_read, rows_pairs, sums["rows_kept"], inner, p.block)
    elif by_channel:
        grads["log_decay"], *of_steps = linear_channel.decay_gradient(p, weights, chain, scores, grad_states, grad_out)
        if moving:
            grad_steps, rows_carry = of_steps
            added = dict(rows_read=None, rows_kept=None, rows_step=sums["rows_step"].sum(0), rows_carry=rows_carry)
            grads |= gate_gradients(p, weights, grad_steps, inner=inner.sum(1), **added)
    if p.delta is not None:
        grads["delta"] = sums["rows_delta"].sum(0) if per_token else elementwise["grad_delta"]
    return grads


def _pre(p: Problem, weights: Weights, grad_out: Tensor, from_out: Tensor) -> None:
    """R to ``from_out [B, T, H, Dv]``, less rho."""
    launch(
        linear_pre, p, p.slots.count * p.blocks, "value",
        q=p.q, k=p.k, **weights.only("decays", "pairs"), grad_out=grad_out, from_out=from_out, **p.tables(), ROW=p.row,
        **p.strides("q", "k"), **p.sizes, BC=p.block,
    )  # fmt: skip
