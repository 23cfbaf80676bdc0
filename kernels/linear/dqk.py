"""The gradients of queries and keys (docs/mathematics.md, sections 6 and 7), parallel over chunks, after the chain's backward.

    linear_dqk_bwd   dQ = gamma (dO W') + dS K;  dK = dE W' - (dec U) J' + dS' Q

In exact steps (block.py) ``dK = r (dE W') - (F + F') K - (dec U) J' + dS' Q``: an error reads the state decayed by r. With keys X for
erasing ``dX = r (dE W') - F K`` and ``dK = -F' X - (dec U) J' + dS' Q``.

dS is the gradient of the scores ``Q K'`` from `linear_du_bwd` or, where decays go by channel, `channel_du_bwd`. W is S, or its primal under
a retention gate, which also scales dS by rho; J is the gradient of the dual. With momentum dQ gains ``rho b (dO S')`` of the momentum
matrix S, and dK loses ``(Theta_C U) JS'``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.chunks import chunk_of, chunk_program, token_of
from ..common.gates import CARRY, load_before, load_gamma, load_gate, load_row_weights, load_scale, load_to_end, load_update
from ..common.launch import Problem, launch, tiles
from ..common.tiles import LENGTHS, dot, fitted, fitted_dot, inside, load_tile, rounded, store, trips, wide
from .block import ErrorGradients, erased_keys
from .chain import ChainGradients


@triton.jit
def queries_bwd(
    q, q_stride, k, k_stride, decays, states, momenta, scales, grad_scores, grad_out, grad_q, rows_read, rows_carry,
    rho, ROW, row, H, t0, eos, i_k, i_r,
    C: tl.constexpr, BC: tl.constexpr, Dk: tl.constexpr, Dv: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DTYPE: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """``dQ = gamma (dO W') + rho b (dO S') + dS K``, and its sums for the gates' gradients."""
    NV: tl.constexpr = (Dv + BV - 1) // BV
    o_r, o_k = i_r * BC + tl.arange(0, BC), i_k * BK + tl.arange(0, BK)
    m_r, m_k = t0 + o_r < eos, inside(o_k, Dk, BK)
    m_rk = m_r[:, None] & m_k[None, :]
    b_dq = tl.zeros((BC, BK), tl.float32)
    for i_v in range(0, trips(NV, H)):
        o_v = i_v * BV + tl.arange(0, BV)
        m_v = inside(o_v, Dv, BV)
        b_do = load_tile(grad_out, H * Dv, o_r, o_v, m_r, m_v)  # [BC, BV]
        if CHANNELS:
            b_do = load_row_weights(decays, row, o_r * H, o_v, m_r, m_v, Dv) * b_do.to(tl.float32)
            b_do = rounded(b_do, DTYPE)
        b_w = tl.load(states + o_k[None, :] * Dv + o_v[:, None], mask=m_v[:, None] & m_k[None, :], other=0.0)  # [BV, BK]
        b_dq += fitted_dot(b_do, b_w, DTYPE)
    if not CHANNELS:
        b_dq *= load_gamma(decays, row, o_r * H, m_r, BC)[:, None]
    b_q = load_tile(q, q_stride, o_r, o_k, m_r, m_k)  # [BC, BK]
    if rows_read is not None:
        tl.store(rows_read + i_k.to(tl.int64) * ROW + row + o_r * H, tl.sum(b_dq * b_q.to(tl.float32), 1), mask=m_r)
    if momenta is not None:
        b_carried = tl.zeros((BC, BK), tl.float32)
        for i_v in range(0, trips(NV, H)):
            o_v = i_v * BV + tl.arange(0, BV)
            m_v = inside(o_v, Dv, BV)
            b_do = load_tile(grad_out, H * Dv, o_r, o_v, m_r, m_v)  # [BC, BV]
            b_m = tl.load(momenta + o_k[None, :] * Dv + o_v[:, None], mask=m_v[:, None] & m_k[None, :], other=0.0)  # [BV, BK]
            if CHANNELS:
                b_do = load_row_weights(decays + CARRY * ROW * Dv, row, o_r * H, o_v, m_r, m_v, Dv) * b_do.to(tl.float32)
                b_do = rounded(b_do, DTYPE)
            b_carried += fitted_dot(b_do, b_m, DTYPE)
        b_carried *= rho
        if CHANNELS:
            b_dq += b_carried
        else:
            tl.store(rows_carry + i_k.to(tl.int64) * ROW + row + o_r * H, tl.sum(b_carried * b_q.to(tl.float32), 1), mask=m_r)
            b_dq += b_carried * load_gate(decays + CARRY * ROW, row, o_r * H, m_r)[:, None]
    for i_s in range(0, i_r + 1):
        o_s = i_s * BC + tl.arange(0, BC)
        m_s = t0 + o_s < eos
        b_ds = tl.load(grad_scores + o_r[:, None] * C + o_s[None, :]).to(tl.float32)  # [t, s]
        if scales is not None:
            b_ds *= rho
        b_k = load_tile(k, k_stride, o_s, o_k, m_s, m_k)  # [BC, BK]
        b_ds, scale = fitted(b_ds, DTYPE)
        b_dq += dot(b_ds, b_k) * scale
    store(grad_q + row * Dk + o_r[:, None] * (H * Dk) + o_k[None, :], b_dq, m_rk)


@triton.jit
def keys_bwd(
    q, q_stride, k, k_stride, erase_k, v, v_stride, lr, decays, moves, delta,
    states, errors, squares, duals, momenta, scales, grad_scores, grad_keys, grad_states, grad_momenta, grad_v, grad_k, grad_erase_k,
    rows_error, inner,
    rho, ROW, SLOTS, row, H, t0, eos, i_k, i_r, i_slot, i_h, place,
    C: tl.constexpr, BC: tl.constexpr, Dk: tl.constexpr, Dv: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DTYPE: tl.constexpr,
    BIAS: tl.constexpr, CHANNEL_LR: tl.constexpr, CHANNELS: tl.constexpr, CHUNK: tl.constexpr, DECAY_FIRST: tl.constexpr,
):  # fmt: skip
    """``dK = dE W' - (dec U) J' - (Theta_C U) JS' + dS' Q``, and ``<J, A>, <J, S>, <JS, S>``."""
    NK: tl.constexpr = (Dk + BK - 1) // BK
    NV: tl.constexpr = (Dv + BV - 1) // BV
    NC: tl.constexpr = C // BC
    o_r, o_k = i_r * BC + tl.arange(0, BC), i_k * BK + tl.arange(0, BK)
    m_r, m_k = t0 + o_r < eos, inside(o_k, Dk, BK)
    m_rk = m_r[:, None] & m_k[None, :]
    b_dk = tl.zeros((BC, BK), tl.float32)
    if grad_keys is not None:  # a block's tokens are one tile
        for i_v in range(0, trips(NV, H)):
            o_v = i_v * BV + tl.arange(0, BV)
            m_v = inside(o_v, Dv, BV)
            b_w = tl.load(states + o_k[None, :] * Dv + o_v[:, None], mask=m_v[:, None] & m_k[None, :], other=0.0)  # [BV, BK]
            b_dk -= fitted_dot(load_tile(grad_v, H * Dv, o_r, o_v, m_r, m_v), b_w, DTYPE)  # dE = -dV
        b_dk *= load_before(decays, row, H, o_r, m_r, CHUNK, DECAY_FIRST)[:, None]
        erased, erased_stride = erased_keys(k, k_stride, erase_k, row, H, Dk)
        b_erased = load_tile(erased, erased_stride, o_r, o_k, m_r, m_k)  # [BC, BK]
        if rows_error is not None:
            tl.store(rows_error + i_k.to(tl.int64) * ROW + row + o_r * H, tl.sum(b_dk * b_erased.to(tl.float32), 1), mask=m_r)
        if erase_k is not None:
            b_pairs, scale = fitted(tl.load(grad_keys + o_r[None, :] * C + o_r[:, None]).to(tl.float32), DTYPE)  # -F
            b_dk += dot(b_pairs, load_tile(k, k_stride, o_r, o_k, m_r, m_k)) * scale
            store(grad_erase_k + row * Dk + o_r[:, None] * (H * Dk) + o_k[None, :], b_dk, m_rk)
            b_dk = tl.zeros((BC, BK), tl.float32)
        b_pairs, scale = fitted(tl.load(grad_keys + o_r[:, None] * C + o_r[None, :]).to(tl.float32), DTYPE)
        b_dk += dot(b_pairs, b_erased) * scale
    if not CHANNELS:
        b_to_end = load_to_end(decays, ROW, row, o_r * H, m_r, BC)
    if momenta is not None:
        b_step = load_gate(moves + ROW, row, o_r * H, m_r)
    product = 0.0  # <J, A>, and with momentum ...
    product_carry = 0.0  # <J, S>
    product_pi = 0.0  # <JS, S>
    for i_v in range(0, trips(NV, H)):
        o_v = i_v * BV + tl.arange(0, BV)
        m_v = inside(o_v, Dv, BV)
        m_vk = m_v[:, None] & m_k[None, :]
        b_u = load_update(
            v, v_stride, lr, delta, errors, squares, row, H, o_r, o_v, m_r, m_v,
            Dv, BIAS, CHANNEL_LR,
        )  # [BC, BV]  # fmt: skip
        b_j = tl.load(grad_states + o_k[None, :] * Dv + o_v[:, None], mask=m_vk, other=0.0)  # [BV, BK]
        if CHANNELS:
            b_to_end = load_row_weights(decays + ROW * Dv, row, o_r * H, o_v, m_r, m_v, Dv)
            b_u_end, scale = fitted(b_u * b_to_end, DTYPE)
        else:
            b_u_end, scale = fitted(b_u * b_to_end[:, None], DTYPE)
        b_dk -= fitted_dot(b_u_end, b_j, DTYPE) * scale
        if momenta is not None:
            p_m = o_k[None, :] * Dv + o_v[:, None]
            b_m, b_jm = tl.load(momenta + p_m, mask=m_vk, other=0.0), tl.load(grad_momenta + p_m, mask=m_vk, other=0.0)  # [BV, BK]
            b_u_step, scale = fitted(b_u * b_step[:, None], DTYPE)
            b_dk -= fitted_dot(b_u_step, b_jm, DTYPE) * scale
            product_carry += tl.sum(b_m * b_j)
            product_pi += tl.sum(b_m * b_jm)
        if (BIAS.reads_memory and grad_keys is None) or (inner is not None and duals is None):
            b_w = tl.load(states + o_k[None, :] * Dv + o_v[:, None], mask=m_vk, other=0.0)  # [BV, BK]
        if BIAS.reads_memory and grad_keys is None:
            b_dv = load_tile(grad_v, H * Dv, o_r, o_v, m_r, m_v)  # [BC, BV]
            b_dk -= fitted_dot(b_dv, b_w, DTYPE)  # dE = -dV
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
        b_ds = tl.load(grad_scores + o_t[None, :] * C + o_r[:, None]).to(tl.float32)  # [s, t]
        if scales is not None:
            b_ds *= rho
        b_q = load_tile(q, q_stride, o_t, o_k, m_t, m_k)  # [BC, BK]
        b_ds, scale = fitted(b_ds, DTYPE)
        b_dk += dot(b_ds, b_q) * scale
    store(grad_k + row * Dk + o_r[:, None] * (H * Dk) + o_k[None, :], b_dk, m_rk)


@triton.jit(do_not_specialize=LENGTHS)
def linear_dqk_bwd(
    q, k, erase_k, v, lr, decays, moves, delta,
    states, errors, squares, duals, momenta, scales, grad_scores, grad_keys, grad_states, grad_momenta, grad_out, grad_v,
    grad_q, grad_k, grad_erase_k, rows_read, rows_error, rows_carry, inner,
    cu_seqlens, first_slot, slot_owner,
    T, H, CHUNKS, ROW, SLOTS,
    q_strides, k_strides, v_strides,
    TOKENS: tl.constexpr, C: tl.constexpr, BC: tl.constexpr,
    Dk: tl.constexpr, Dv: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DTYPE: tl.constexpr,
    BIAS: tl.constexpr, CHANNEL_LR: tl.constexpr, CHANNELS: tl.constexpr, CHUNK: tl.constexpr, DECAY_FIRST: tl.constexpr,
):  # fmt: skip
    """A tile ``[BC, BK]`` of one chunk's dQ, then of its dK, so that only one large accumulator lives at a time (two with momentum).

    ``grad_scores [slots, H, C, C]``: dS without rho, its blocks on and below the diagonal.
    """
    ROW, SLOTS = wide(ROW), wide(SLOTS)
    NK: tl.constexpr = (Dk + BK - 1) // BK
    NC: tl.constexpr = C // BC
    i_k, i_r, i_slot, i_h = chunk_program(NK, NC)
    i_b, t0, _, eos = chunk_of(i_slot, None, cu_seqlens, first_slot, slot_owner, T, CHUNKS, TOKENS, C)
    if first_slot is not None:
        if t0 >= eos:  # an unused slot
            return
    row = (i_b * T + t0) * H + i_h
    q = token_of(q, q_strides, i_b, t0, i_h)
    k = token_of(k, k_strides, i_b, t0, i_h)
    v = token_of(v, v_strides, i_b, t0, i_h)
    place = i_slot * H + i_h
    states += place * Dk * Dv
    grad_states += place * Dk * Dv
    rho = load_scale(scales, place)
    grad_scores += place * C * C
    if grad_keys is not None:
        grad_keys += place * C * C
    if momenta is not None:
        momenta += place * Dk * Dv
        grad_momenta += place * Dk * Dv
    grad_out += row * Dv
    grad_v += row * Dv

    queries_bwd(
        q, q_strides.t, k, k_strides.t, decays, states, momenta, scales, grad_scores, grad_out, grad_q, rows_read, rows_carry,
        rho, ROW, row, H, t0, eos, i_k, i_r, C, BC, Dk, Dv, BK, BV, DTYPE, CHANNELS,
    )  # fmt: skip
    keys_bwd(
        q, q_strides.t, k, k_strides.t, erase_k, v, v_strides.t, lr, decays, moves, delta, states, errors, squares, duals, momenta, scales,
        grad_scores, grad_keys, grad_states, grad_momenta, grad_v, grad_k, grad_erase_k, rows_error, inner,
        rho, ROW, SLOTS, row, H, t0, eos, i_k, i_r, i_slot, i_h, place, C, BC, Dk, Dv, BK, BV, DTYPE,
        BIAS, CHANNEL_LR, CHANNELS, CHUNK, DECAY_FIRST,
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- launchers


class ReadGradients(NamedTuple):
    """Outputs of :func:`linear_dqk_bwd`. But for gradients of queries and keys float32 sums for the gates, one row per tile of keys."""

    q: Tensor  # [B, T, H, Dk]
    k: Tensor  # [B, T, H, Dk]
    erase_k: Tensor | None  # [B, T, H, Dk]
    rows_read: Tensor | None  # [tiles, B, T, H]   with a decay, unless it goes by channel
    rows_error: Tensor | None  # [tiles, B, T, H]   with a decay in exact steps
    rows_carry: Tensor | None  # [tiles, B, T, H]   with momentum, unless decays go by channel
    inner: Tensor | None  # [tiles, slots, H]   <J, A>; with momentum [3, tiles, slots, H], also <J, S>, <JS, S>


def read_gradients(p: Problem, of_chain: ChainGradients, of_errors: ErrorGradients | None, grad_scores: Tensor) -> ReadGradients:
    """Run :func:`linear_dqk_bwd`; ``grad_scores``: dS; ``of_errors`` in exact steps. The problem shares what read.py says."""
    moving, by_channel = p.momentum is not None, p.key.channels
    decaying = p.log_decay is not None and not by_channel
    count, float32 = tiles("linear_dqk_bwd", p, "key"), torch.float32

    def rows(wanted: bool) -> Tensor | None:
        return p.empty(count, p.batch, p.tokens, p.heads, dtype=float32) if wanted else None

    products = (3,) if moving else ()
    grads = ReadGradients(
        p.result(p.key_dim), p.result(p.key_dim), None if p.erase_k is None else p.result(p.key_dim),
        rows(decaying), rows(decaying and p.key.exact), rows(moving and not by_channel),
        p.empty(*products, count, p.slots.count, p.heads, dtype=float32) if decaying or moving else None,
    )  # fmt: skip
    own = dict(
        grad_scores=grad_scores, grad_keys=None if of_errors is None else of_errors.keys, grad_states=of_chain.states,
        grad_momenta=of_chain.momenta, grad_v=of_chain.v if of_errors is None else of_errors.v,
        grad_q=grads.q, grad_k=grads.k, grad_erase_k=grads.erase_k,
        rows_read=grads.rows_read, rows_error=grads.rows_error, rows_carry=grads.rows_carry, inner=grads.inner,
    )  # fmt: skip
    launch(linear_dqk_bwd, p, p.slots.count * p.blocks, "key", own)
    return grads
