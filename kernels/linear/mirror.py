"""The mirror map of the linear memory's retention gates (docs/mathematics.md, section 5): stages of the streamed chains.

    mirror      W = phi(A), and rho of a gate that has one                                      forward
    reopen      the same for a chunk that was open before, from what its tokens read instead    forward
    pull_back   J <- gamma_C J + phi'(A)' dW + d rho d rho / dA                                 backward

A program has ``TILES`` tiles of values, from ``i_tile`` on, and all ``NK`` tiles of keys of one chunk's state.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common import retention as retentions
from ..common.gates import load_total
from ..common.tiles import inside, only_if, store


@triton.jit
def tile_of(j, i_tile, Dk: tl.constexpr, Dv: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):
    """Keys, values and mask ``[BK, BV]`` of a program's ``j``-th tile."""
    NK: tl.constexpr = (Dk + BK - 1) // BK
    o_k, o_v = (j % NK) * BK + tl.arange(0, BK), (i_tile + j // NK) * BV + tl.arange(0, BV)
    return o_k, o_v, inside(o_k, Dk, BK)[:, None] & inside(o_v, Dv, BV)[None, :]


@triton.jit
def hand_on(slot, o_slot, end, state, o_end, more, b_x, m_kv):
    """Store a tile in the next chunk's slot or, after the last chunk (``more`` is 0), in ``end`` at ``state`` unless ``end`` is None."""
    tl.store(slot + o_slot, b_x, mask=only_if(more, m_kv))
    if end is not None:
        tl.store(end + state + o_end, b_x, mask=only_if(more == 0, m_kv))


@triton.jit
def mirror(
    duals, states, scales, place, i_tile,
    Dk: tl.constexpr, Dv: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, TILES: tl.constexpr,
    RETENTION: tl.constexpr,
):  # fmt: skip
    """``W = phi(A)`` of one chunk and head, rounded to the operands' dtype, and rho of a gate that has one."""
    NK: tl.constexpr = (Dk + BK - 1) // BK
    PAD: tl.constexpr = retentions.BOTTOM if RETENTION.row_coupled else 0.0
    here = place * Dk * Dv
    total = retentions.floor(RETENTION)
    if RETENTION.matrix_coupled:
        for j in range(0, TILES * NK):
            o_k, o_v, m_kv = tile_of(j, i_tile, Dk, Dv, BK, BV)
            b_a = tl.load(duals + here + o_k[:, None] * Dv + o_v[None, :], mask=m_kv, other=0.0)  # [BK, BV]
            total += tl.sum(retentions.term(b_a, 0.0, RETENTION))
        if RETENTION.has_rho:
            tl.store(scales + place, retentions.scale(total, RETENTION))
    for j in range(0, TILES):
        o_v = (i_tile + j) * BV + tl.arange(0, BV)
        m_v = inside(o_v, Dv, BV)
        b_shift, b_total = tl.full((BV,), retentions.BOTTOM, tl.float32), tl.zeros((BV,), tl.float32) + total
        if RETENTION.row_coupled:  # a row of A is a column here
            for i_k in range(0, NK):
                o_k = i_k * BK + tl.arange(0, BK)
                m_kv = inside(o_k, Dk, BK)[:, None] & m_v[None, :]
                b_a = tl.load(duals + here + o_k[:, None] * Dv + o_v[None, :], mask=m_kv, other=PAD)  # [BK, BV]
                b_max = tl.maximum(b_shift, tl.max(b_a, 0))
                b_total = b_total * tl.exp(b_shift - b_max) + tl.sum(retentions.term(b_a, b_max[None, :], RETENTION), 0)
                b_shift = b_max
        for i_k in range(0, NK):
            o_k = i_k * BK + tl.arange(0, BK)
            o_kv, m_kv = o_k[:, None] * Dv + o_v[None, :], inside(o_k, Dk, BK)[:, None] & m_v[None, :]
            b_a = tl.load(duals + here + o_kv, mask=m_kv, other=PAD)  # [BK, BV]
            store(states + here + o_kv, retentions.primal(b_a, b_shift[None, :], b_total[None, :], RETENTION), m_kv)


@triton.jit
def reopen(
    readouts, opened_scales, states, scales, place, opened, i_tile,
    Dk: tl.constexpr, Dv: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """As `mirror`, for a chunk that was open before: from ``readouts [N, H, Dv, Dk]`` and ``opened_scales [N, H]``."""
    NK: tl.constexpr = (Dk + BK - 1) // BK
    for j in range(0, TILES * NK):
        o_k, o_v, m_kv = tile_of(j, i_tile, Dk, Dv, BK, BV)
        b_w = tl.load(readouts + opened * Dk * Dv + o_v[None, :] * Dk + o_k[:, None], mask=m_kv, other=0.0)  # [BK, BV]
        store(states + place * Dk * Dv + o_k[:, None] * Dv + o_v[None, :], b_w, m_kv)
    if scales is not None:
        tl.store(scales + place, tl.load(opened_scales + opened))


@triton.jit
def pull_back(
    states, duals, grad_states, grad_primal, grad_initial, decays, end, place, state, i_c, i_tile, rho, drho, H,
    Dk: tl.constexpr, Dv: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, TILES: tl.constexpr,
    RETENTION: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """``J <- gamma_C J + phi' dW + drho d rho / dA`` for a gate that couples entries: the sums first, then J."""
    NK: tl.constexpr = (Dk + BK - 1) // BK
    here = place * Dk * Dv
    there = here - H * Dk * Dv
    along = drho
    if not CHANNELS:
        gamma = load_total(decays, end, 0)
    if RETENTION.matrix_coupled:
        for j in range(0, TILES * NK):
            o_k, o_v, m_kv = tile_of(j, i_tile, Dk, Dv, BK, BV)
            o_kv = o_k[:, None] * Dv + o_v[None, :]
            b_g = tl.load(grad_primal + state + o_kv, mask=m_kv, other=0.0)  # [BK, BV]
            b_a = tl.load(duals + here + o_kv, mask=m_kv, other=0.0)  # [BK, BV]
            along += tl.sum(retentions.along(b_g, b_a, b_a, RETENTION))
    for j in range(0, TILES):
        o_v = (i_tile + j) * BV + tl.arange(0, BV)
        m_v = inside(o_v, Dv, BV)
        b_along = tl.zeros((BV,), tl.float32) + along
        if CHANNELS:
            gamma = tl.load(decays + end * Dv + o_v, mask=m_v, other=0.0)[None, :]  # [1, BV]
        if RETENTION.row_coupled:  # a row of A is a column here
            for i_k in range(0, NK):
                o_k = i_k * BK + tl.arange(0, BK)
                o_kv, m_kv = o_k[:, None] * Dv + o_v[None, :], inside(o_k, Dk, BK)[:, None] & m_v[None, :]
                b_g = tl.load(grad_primal + state + o_kv, mask=m_kv, other=0.0)  # [BK, BV]
                b_w = tl.load(states + here + o_kv, mask=m_kv, other=0.0).to(tl.float32)  # [BK, BV]
                b_along += tl.sum(retentions.along(b_g, b_w, b_w, RETENTION), 0)
        for i_k in range(0, NK):
            o_k = i_k * BK + tl.arange(0, BK)
            o_kv, m_kv = o_k[:, None] * Dv + o_v[None, :], inside(o_k, Dk, BK)[:, None] & m_v[None, :]
            b_g = tl.load(grad_primal + state + o_kv, mask=m_kv, other=0.0)  # [BK, BV]
            b_a = tl.load(duals + here + o_kv, mask=m_kv, other=0.0)  # [BK, BV]
            b_w = tl.load(states + here + o_kv, mask=m_kv, other=0.0).to(tl.float32)  # [BK, BV]
            b_j = tl.load(grad_states + here + o_kv, mask=m_kv, other=0.0) * gamma
            b_j += retentions.pull(b_g, b_a, b_w, b_along[None, :], rho, RETENTION)
            hand_on(grad_states + there, o_kv, grad_initial, state, o_v[None, :] * Dk + o_k[:, None], i_c > 0, b_j, m_kv)
