"""Exact steps of the L2 bias, a block of tokens at a time (docs/mathematics.md, section 13): the system of a block, parallel over blocks.

    block_solve        P = (I + G diag(eta))^-1 G                                                       before the chain
    block_reads        W = r K - P (eta r K);  Z = V - P (eta V)                                        before the chain, after that
    block_errors_bwd   Y = dU - P' (eta dU);  dE = eta Y;  d eta = Y . E;  dV = -dE;  F + F'            after its backward

G and so P depend on keys and gates alone. With ``(I + G diag(eta))^-1 = I - P diag(eta)`` the errors of a block are ``E = W A_0' - Z``, so
the chain of chunks serves blocks too, reading W where it predicts and Z in the place of V, and its backward adds ``W' (eta dU)`` to J.
A row of W is a key times ``I - eta_s k_s k_s'`` for the tokens before it: no longer than the key wherever the inner loop is stable, so
its rounding costs what that of a key would.

P is strictly lower triangular and float32: forward substitution, which is stable for every system, in tiles of 16 tokens, then
``P_21 = (I - P_22 eta) G_21 (I - eta P_11)`` for pairs of tiles. Its products with 16-bit tensors are taken in two parts (`split_dot`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.chunks import chunk_of, chunk_program, token_of
from ..common.gates import error_place, load_before, load_gate, pair_decay
from ..common.launch import Problem, Strides, launch
from ..common.tiles import LENGTHS, dot, fitted, inside, load_tile, pair_products, split_dot, store, wide

#: tokens of a tile that forward substitution solves
TILE = tl.constexpr(16)


@triton.jit
def error_decay(decays, ROW, row, o_s, o_t, left, H, C: tl.constexpr, CHUNK: tl.constexpr, DECAY_FIRST: tl.constexpr):
    """``L_b(t)s [s, t]``, 0 where the error of t does not see the write of s; ``left`` tokens are in the block."""
    o_b = error_place(o_t, CHUNK, DECAY_FIRST)
    m_b, m_s = (o_t < left) & (o_b >= 0), o_s < left
    b_l = pair_decay(decays, None, ROW, row, H, C, o_b[None, :], o_s[:, None], m_b[None, :], m_s[:, None])
    return tl.where(o_t[None, :] > o_s[:, None], b_l, 0.0)


@triton.jit
def erased_keys(k, k_stride, erase_k, row, H, Dk: tl.constexpr):
    """``(the keys that are erased of a block's tokens, stride of a token)``: those that are written unless the call has others."""
    if erase_k is None:
        return k, k_stride
    else:
        return erase_k + row * Dk, H * Dk


@triton.jit
def solve_tiles(solved, lr, row, left, H, C: tl.constexpr):
    """The tiles on the diagonal, G on entry and P on return, all of them side by side and row by row."""
    NT: tl.constexpr = C // TILE
    o_n, o_i = tl.arange(0, NT), tl.arange(0, TILE)
    o_s, p_tile = o_n[:, None] * TILE + o_i[None, :], solved + o_n * (TILE * (C + 1))
    b_lr = load_gate(lr, row, o_s * H, o_s < left)  # [n, s]
    p = p_tile[:, None, None] + (o_i * C)[None, :, None] + o_i[None, None, :]
    p_row = p_tile[:, None] + o_i[None, :]
    b_p, b_next = tl.load(p), tl.load(p_row + C)  # [n, t, s], [n, s]
    for i in range(1, TILE):
        b_g = b_next * b_lr  # row i
        b_next = tl.load(p_row + tl.minimum(i + 1, TILE - 1) * C)  # before it is needed
        b_seen = tl.sum(b_g[:, :, None] * b_p, 1)
        b_p = tl.where((o_i == i)[None, :, None], b_p - b_seen[:, None, :], b_p)
    tl.debug_barrier()
    tl.store(p, b_p)
    tl.debug_barrier()


@triton.jit
def join_tiles(solved, lr, row, left, H, C: tl.constexpr, SIZE: tl.constexpr):
    """Pairs of solved tiles of SIZE tokens become tiles of twice as many."""
    o = tl.arange(0, SIZE)
    o_ts = o[:, None] * C + o[None, :]
    for first in range(0, C, 2 * SIZE):
        p = solved + first * (C + 1) + o_ts
        o_s = first + o
        b_lr = load_gate(lr, row, o_s * H, o_s < left)
        b_next_lr = load_gate(lr, row, (o_s + SIZE) * H, o_s + SIZE < left)
        b_g, b_p, b_next_p = tl.load(p + SIZE * C), tl.load(p), tl.load(p + SIZE * (C + 1))
        b_g -= dot(b_next_p * b_next_lr[None, :], b_g)
        b_g -= dot(b_g * b_lr[None, :], b_p)
        tl.debug_barrier()
        tl.store(p + SIZE * C, b_g)
    tl.debug_barrier()


@triton.jit(do_not_specialize=LENGTHS)
def block_solve(
    k, erase_k, lr, decays, solved,
    cu_seqlens, first_slot, slot_owner,
    T, H, CHUNKS, ROW,
    k_strides,
    TOKENS: tl.constexpr, C: tl.constexpr, Dk: tl.constexpr, BK: tl.constexpr,
    CHUNK: tl.constexpr, DECAY_FIRST: tl.constexpr,
):  # fmt: skip
    """P of one block and head, ``solved [slots, H, C, C]``.

    It waits more than it computes. Apart from the products of `block_reads` it needs few registers, which leaves room for more programs.
    """
    ROW = wide(ROW)
    _, _, i_slot, i_h = chunk_program(1, 1)
    i_b, t0, _, eos = chunk_of(i_slot, None, cu_seqlens, first_slot, slot_owner, T, CHUNKS, TOKENS, C)
    if first_slot is not None:
        if t0 >= eos:  # an unused slot
            return
    left = tl.minimum(eos - t0, C).to(tl.int32)
    o_s = tl.arange(0, C)
    row = (i_b * T + t0) * H + i_h
    k = token_of(k, k_strides, i_b, t0, i_h)
    erased, erased_stride = erased_keys(k, k_strides.t, erase_k, row, H, Dk)
    solved += (i_slot * H + i_h) * C * C

    for i_t in range(0, C // TILE):  # rows of G
        o_t = i_t * TILE + tl.arange(0, TILE)
        b_g = tl.zeros((C, TILE), tl.float32)
        for i_k in range(0, (Dk + BK - 1) // BK):
            o_k = i_k * BK + tl.arange(0, BK)
            m_k = inside(o_k, Dk, BK)
            b_erased = load_tile(erased, erased_stride, o_t, o_k, o_t < left, m_k)  # [TILE, BK]
            b_g += dot(load_tile(k, k_strides.t, o_s, o_k, o_s < left, m_k), tl.trans(b_erased))  # [s, t]
        b_g *= error_decay(decays, ROW, row, o_s, o_t, left, H, C, CHUNK, DECAY_FIRST)
        tl.store(solved + o_t[None, :] * C + o_s[:, None], b_g)
    tl.debug_barrier()
    solve_tiles(solved, lr, row, left, H, C)
    if C >= 32:
        join_tiles(solved, lr, row, left, H, C, 16)
    if C >= 64:
        join_tiles(solved, lr, row, left, H, C, 32)


@triton.jit(do_not_specialize=LENGTHS)
def block_reads(
    k, v, lr, decays, solved, reads, targets,
    cu_seqlens, first_slot, slot_owner,
    T, H, CHUNKS, ROW,
    k_strides, v_strides,
    TOKENS: tl.constexpr, C: tl.constexpr, Dk: tl.constexpr, Dv: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DTYPE: tl.constexpr,
    CHUNK: tl.constexpr, DECAY_FIRST: tl.constexpr,
):  # fmt: skip
    """W and Z of one block and head: ``reads [B, T, H, Dk]``, ``targets [B, T, H, Dv]``."""
    _, _, i_slot, i_h = chunk_program(1, 1)
    i_b, t0, _, eos = chunk_of(i_slot, None, cu_seqlens, first_slot, slot_owner, T, CHUNKS, TOKENS, C)
    if first_slot is not None:
        if t0 >= eos:  # an unused slot
            return
    o_t = tl.arange(0, C)
    m_t, o_ts = o_t < tl.minimum(eos - t0, C).to(tl.int32), o_t[:, None] * C + o_t[None, :]
    row = (i_b * T + t0) * H + i_h
    k = token_of(k, k_strides, i_b, t0, i_h)
    v = token_of(v, v_strides, i_b, t0, i_h)
    solved += (i_slot * H + i_h) * C * C

    b_p = tl.load(solved + o_ts) * load_gate(lr, row, o_t * H, m_t)[None, :]
    for i_v in range(0, (Dv + BV - 1) // BV):
        o_v = i_v * BV + tl.arange(0, BV)
        m_v = inside(o_v, Dv, BV)
        b_v = load_tile(v, v_strides.t, o_t, o_v, m_t, m_v)  # [C, BV]
        b_z = b_v.to(tl.float32) - split_dot(b_p, b_v, DTYPE)
        store(targets + row * Dv + (o_t * (H * Dv))[:, None] + o_v[None, :], b_z, m_t[:, None] & m_v[None, :])
    b_r = load_before(decays, row, H, o_t, m_t, CHUNK, DECAY_FIRST)
    b_p *= b_r[None, :]
    for i_k in range(0, (Dk + BK - 1) // BK):
        o_k = i_k * BK + tl.arange(0, BK)
        m_k = inside(o_k, Dk, BK)
        b_k = load_tile(k, k_strides.t, o_t, o_k, m_t, m_k)  # [C, BK]
        b_w = b_k.to(tl.float32) * b_r[:, None] - split_dot(b_p, b_k, DTYPE)
        store(reads + row * Dk + (o_t * (H * Dk))[:, None] + o_k[None, :], b_w, m_t[:, None] & m_k[None, :])


@triton.jit(do_not_specialize=LENGTHS)
def block_errors_bwd(
    k, erase_k, lr, decays,
    solved, errors, grad_updates,
    grad_v, grad_lr, grad_keys, rows_crossed,
    cu_seqlens, first_slot, slot_owner,
    T, H, CHUNKS, ROW,
    k_strides,
    TOKENS: tl.constexpr, C: tl.constexpr, Dk: tl.constexpr, Dv: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DTYPE: tl.constexpr,
    CHUNK: tl.constexpr, DECAY_FIRST: tl.constexpr, SYMMETRIC: tl.constexpr,
):  # fmt: skip
    """dV and d eta of one block and head, and ``grad_keys [slots, H, C, C]``: -(F + F'), or -F' where they are read one by one.

    ``rows_crossed [B, T, H]``, with a decay: at token r the sum of ``-G o (dE U')`` over errors that see its decay and writes before it.
    """
    ROW = wide(ROW)
    _, _, i_slot, i_h = chunk_program(1, 1)
    i_b, t0, _, eos = chunk_of(i_slot, None, cu_seqlens, first_slot, slot_owner, T, CHUNKS, TOKENS, C)
    if first_slot is not None:
        if t0 >= eos:  # an unused slot
            return
    left = tl.minimum(eos - t0, C).to(tl.int32)
    o_t = tl.arange(0, C)
    m_t, o_g = o_t < left, o_t * H
    row = (i_b * T + t0) * H + i_h
    place = (i_slot * H + i_h) * C * C
    b_lr = load_gate(lr, row, o_g, m_t)

    b_p = tl.load(solved + place + o_t[None, :] * C + o_t[:, None]) * b_lr[None, :]  # [s, t]
    b_pairs = tl.zeros((C, C), tl.float32)  # U dE' [s, t]
    b_dlr = tl.zeros((C,), tl.float32)
    for i_v in range(0, (Dv + BV - 1) // BV):
        o_v = i_v * BV + tl.arange(0, BV)
        m_tv = m_t[:, None] & inside(o_v, Dv, BV)[None, :]
        o_tv = row * Dv + o_g[:, None] * Dv + o_v[None, :]
        b_du = tl.load(grad_updates + o_tv, mask=m_tv, other=0.0)  # [C, BV]
        b_e = tl.load(errors + o_tv, mask=m_tv, other=0.0).to(tl.float32)  # [C, BV]
        b_small, scale = fitted(b_du.to(tl.float32), DTYPE)
        b_y = b_du.to(tl.float32) - split_dot(b_p, b_small, DTYPE) * scale
        b_dlr += tl.sum(b_y * b_e, 1)
        b_y *= b_lr[:, None]
        store(grad_v + o_tv, -b_y, m_tv)
        b_u, scale = fitted(b_e * b_lr[:, None], DTYPE)
        b_de, scale_de = fitted(b_y, DTYPE)
        b_pairs += dot(b_u, tl.trans(b_de)) * (scale * scale_de)
    tl.store(grad_lr + row + o_g, b_dlr, mask=m_t)
    b_pairs *= error_decay(decays, ROW, row, o_t, o_t, left, H, C, CHUNK, DECAY_FIRST)  # F'
    if SYMMETRIC:
        store(grad_keys + place + o_t[:, None] * C + o_t[None, :], -(b_pairs + tl.trans(b_pairs)), True)
    else:
        store(grad_keys + place + o_t[:, None] * C + o_t[None, :], -b_pairs, True)
    if rows_crossed is not None:
        k = token_of(k, k_strides, i_b, t0, i_h)
        erased, erased_stride = erased_keys(k, k_strides.t, erase_k, row, H, Dk)
        b_pairs *= pair_products(k, k_strides.t, o_t, m_t, erased, erased_stride, o_t, m_t, C, Dk, BK)
        sees = error_place(o_t, CHUNK, DECAY_FIRST)[:, None] >= o_t[None, :]  # [t, r]
        b_x = split_dot(b_pairs, tl.where(sees, 1.0, 0.0).to(DTYPE), DTYPE)  # [s, r]
        b_crossed = -tl.sum(tl.where(o_t[None, :] > o_t[:, None], b_x, 0.0), 0)
        tl.store(rows_crossed + row + o_g, b_crossed, mask=m_t)


# -------------------------------------------------------------------------------------------------------------- launchers


class Solved(NamedTuple):
    """Outputs of :func:`block_solve` and :func:`block_reads`; all None where chunks are taken as they are."""

    system: Tensor | None = None  # [slots, H, C, C] float32   P
    reads: Tensor | None = None  # [B, T, H, Dk]   W
    targets: Tensor | None = None  # [B, T, H, Dv]   Z; float32 for float16

    def of_chain(self) -> dict:
        """What the chain reads in the place of keys and values."""
        return {} if self.targets is None else dict(v=self.targets, v_strides=Strides.of(self.targets))


def solve(p: Problem) -> Solved:
    """Run :func:`block_solve` and :func:`block_reads`, if the call is computed in blocks; the problem shares the decays."""
    if not p.key.exact:
        return Solved()
    system = p.empty(p.slots.count, p.heads, p.rows, p.rows, dtype=torch.float32)
    launch(block_solve, p, p.slots.count, "head", dict(solved=system))
    return read(p, system, p.erase_k)


def read(p: Problem, system: Tensor, erased: Tensor | None) -> Solved:
    """Run :func:`block_reads` on a solved system; ``erased``: the keys that are erased, the call's keys if None."""
    wide_type = torch.float32 if p.q.dtype == torch.float16 else None
    solved = Solved(system, p.per_token(p.key_dim), p.per_token(p.value_dim, dtype=wide_type))
    own = dict(solved=system, reads=solved.reads, targets=solved.targets)
    if erased is not None:
        own |= dict(k=erased, k_strides=Strides.of(erased))
    launch(block_reads, p, p.slots.count, "head", own)
    return solved


class ErrorGradients(NamedTuple):
    """Outputs of :func:`block_errors_bwd`."""

    v: Tensor  # [B, T, H, Dv]
    lr: Tensor  # [B, T, H] float32
    keys: Tensor  # [slots, H, C, C]   -(F + F'), or -F'; float32 for float16 and where decays go by key channel
    rows_crossed: Tensor | None  # [B, T, H] float32   with a decay


def error_gradients(p: Problem, solved: Solved, grad_updates: Tensor) -> ErrorGradients:
    """Run :func:`block_errors_bwd`; ``grad_updates``: dU from the chain's backward. The problem shares decays and errors."""
    square, float32 = (p.slots.count, p.heads, p.rows, p.rows), torch.float32
    grads = ErrorGradients(
        p.result(p.value_dim), p.result(dtype=float32),
        p.empty(*square, dtype=float32 if p.q.dtype == torch.float16 or p.key.keyed else None),
        p.result(dtype=float32) if p.log_decay is not None else None,
    )  # fmt: skip
    own = dict(
        solved=solved.system, grad_updates=grad_updates, SYMMETRIC=p.erase_k is None and not p.key.keyed,
        grad_v=grads.v, grad_lr=grads.lr, grad_keys=grads.keys, rows_crossed=grads.rows_crossed,
    )  # fmt: skip
    launch(block_errors_bwd, p, p.slots.count, "head", own)
    return grads
