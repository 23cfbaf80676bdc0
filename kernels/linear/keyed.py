"""Exact steps with a decay per key channel (docs/mathematics.md, section 14), in blocks of 16 tokens: what block.py is for scalar decays.

    keyed_system     Q~ = exp(l) Q;  X~ = exp(rho) X;  K^ = exp(l_n - l) K;  exp(l_n);  the products of pairs, solved      before the chain
    keyed_keys_bwd   dQ, dK, dX and d log alpha                                                                          after its backward

l_t is the sum of log-decays from the block's start to token t, by channels; X are the keys that are erased, K unless the call has others.
With Q~, K^ and ``W = X~ - P (eta X~)`` (`block_reads`) in the place of queries, keys and reads the chain is that of chunks without decay,
whose state keeps ``exp(l_n)`` of each row (``kept``). The read-out's weights of pairs of tokens, ``scores``, come from memory.

``exp(l_t) q_t`` and ``exp(-l_s) k_s`` apart would overflow, so sums over channels are taken token by token: when token t reads the key of
token s it has become ``exp(l_t - l_s) k_s`` (`seen` below). Decays between two tokens are products or sums of those between them, never
differences or quotients: every factor is in [0, 1], so nothing overflows or cancels, however strong the decays.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.chunks import chunk_of, chunk_program, token_of
from ..common.gates import error_place, load_update
from ..common.launch import Problem, Strides, launch
from ..common.tiles import LENGTHS, fitted, fitted_dot, inside, load_tile, only_if, store, trips
from .block import ErrorGradients, Solved, erased_keys, read, solve_tiles
from .chain import ChainGradients


@triton.jit
def load_decays(log_decay, row, H, o_t, o_k, left, m_k, Dk: tl.constexpr):
    """The log-decays ``[C, BK]`` of tokens ``o_t``; 0 outside the block."""
    m_t = (o_t >= 0) & (o_t < left)
    return load_tile(log_decay + row * Dk, H * Dk, o_t, o_k, m_t, m_k)


@triton.jit(do_not_specialize=LENGTHS)
def keyed_system(
    q, k, erase_k, lr, key_log_decay,
    queries, erased, keys, kept, scores, solved,
    cu_seqlens, first_slot, slot_owner,
    T, H, CHUNKS,
    q_strides, k_strides,
    TOKENS: tl.constexpr, C: tl.constexpr, Dk: tl.constexpr, BK: tl.constexpr, DECAY_FIRST: tl.constexpr,
):  # fmt: skip
    """``queries, erased, keys [B, T, H, Dk]``: Q~, X~, K^; ``kept [slots, H, Dk]``; ``scores, solved [slots, H, C, C]``, by ``[t, s]``."""
    _, _, i_slot, i_h = chunk_program(1, 1)
    i_b, t0, _, eos = chunk_of(i_slot, None, cu_seqlens, first_slot, slot_owner, T, CHUNKS, TOKENS, C)
    if first_slot is not None:
        if t0 >= eos:  # an unused slot
            return
    left = tl.minimum(eos - t0, C).to(tl.int32)
    o_t = tl.arange(0, C)
    m_t, o_ts = o_t < left, o_t[:, None] * C + o_t[None, :]
    row = (i_b * T + t0) * H + i_h
    place = i_slot * H + i_h
    q = token_of(q, q_strides, i_b, t0, i_h)
    k = token_of(k, k_strides, i_b, t0, i_h)
    x, x_stride = erased_keys(k, k_strides.t, erase_k, row, H, Dk)
    LATER: tl.constexpr = 0 if DECAY_FIRST else 1  # the error that is taken after token t is that of token t + LATER

    b_p = tl.zeros((C, C), tl.float32)
    b_g = tl.zeros((C, C), tl.float32)
    for i_k in range(0, (Dk + BK - 1) // BK):
        o_k = i_k * BK + tl.arange(0, BK)
        m_k = inside(o_k, Dk, BK)
        m_tk, o_tk = m_t[:, None] & m_k[None, :], row * Dk + (o_t * (H * Dk))[:, None] + o_k[None, :]
        b_l = tl.cumsum(load_decays(key_log_decay, row, H, o_t, o_k, left, m_k, Dk), 0)  # [C, BK]
        b_rho = b_l if DECAY_FIRST else tl.cumsum(load_decays(key_log_decay, row, H, o_t - 1, o_k, left, m_k, Dk), 0)
        b_end = tl.cumsum(load_decays(key_log_decay, row, H, o_t + 1, o_k, left, m_k, Dk), 0, reverse=True)
        b_k = load_tile(k, k_strides.t, o_t, o_k, m_t, m_k).to(tl.float32)  # [C, BK]
        store(queries + o_tk, load_tile(q, q_strides.t, o_t, o_k, m_t, m_k).to(tl.float32) * tl.exp(b_l), m_tk)
        store(erased + o_tk, load_tile(x, x_stride, o_t, o_k, m_t, m_k).to(tl.float32) * tl.exp(b_rho), m_tk)
        store(keys + o_tk, b_k * tl.exp(b_end), m_tk)
        b_all = tl.sum(load_decays(key_log_decay, row, H, o_t, o_k, left, m_k, Dk), 0)
        tl.store(kept + place * Dk + o_k, tl.exp(b_all), mask=m_k)

        b_seen = tl.zeros((C, BK), tl.float32)  # by s
        for t in range(0, left):
            b_alpha = tl.exp(tl.load(key_log_decay + (row + t * H) * Dk + o_k, mask=m_k, other=0.0))  # [BK]
            b_seen = tl.where((o_t == t)[:, None], b_k, b_seen * b_alpha[None, :])
            b_q = tl.load(q + t * q_strides.t + o_k, mask=m_k, other=0.0).to(tl.float32)
            b_x = tl.load(x + (t + LATER) * x_stride + o_k, mask=only_if(t + LATER < left, m_k), other=0.0).to(tl.float32)
            b_p += tl.where((o_t == t)[:, None], tl.sum(b_seen * b_q[None, :], 1)[None, :], 0.0)
            b_g += tl.where((o_t == t + LATER)[:, None], tl.sum(b_seen * b_x[None, :], 1)[None, :], 0.0)
    tl.store(scores + place * C * C + o_ts, b_p)
    solved += place * C * C
    tl.store(solved + o_ts, tl.where(o_t[:, None] > o_t[None, :], b_g, 0.0))
    tl.debug_barrier()
    solve_tiles(solved, lr, row, left, H, C)


@triton.jit(do_not_specialize=LENGTHS)
def keyed_keys_bwd(
    q, k, erase_k, v, lr, delta, key_log_decay,
    states, errors, squares, grad_scores, grad_keys, grad_states, grad_out, grad_v,
    grad_q, grad_k, grad_erase_k, grad_key_log_decay,
    cu_seqlens, first_slot, slot_owner,
    T, H, CHUNKS,
    q_strides, k_strides, v_strides,
    TOKENS: tl.constexpr, C: tl.constexpr, Dk: tl.constexpr, Dv: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DTYPE: tl.constexpr,
    BIAS: tl.constexpr, CHANNEL_LR: tl.constexpr, DECAY_FIRST: tl.constexpr,
):  # fmt: skip
    """A tile ``[C, BK]`` of one block's gradients. With ``seen_t`` the keys as token t reads them, from the last token back:

        g_s <- alpha_(t+1) g_s + dP_ts q_t + dG_(x)s x_x,  x the token whose error is taken after token t
        dq_t = exp(l_t) dO_t W' + sum_s dP_ts seen_ts;  dx_x = exp(rho_x) dE_x W' + sum_s dG_xs seen_ts;  dk_s = g_s - exp(l_n - l_s) J u_s

    and d log alpha_t is the sum of ``g seen`` over the keys before t, of the reads of the state from t on, of the writes before t, and of
    ``exp(l_n) <J, W>``. ``grad_scores``: dP by ``[t, s]``; ``grad_keys``: dG by ``[s, t]``.
    """
    NK: tl.constexpr = (Dk + BK - 1) // BK
    NV: tl.constexpr = (Dv + BV - 1) // BV
    i_k, _, i_slot, i_h = chunk_program(NK, 1)
    i_b, t0, _, eos = chunk_of(i_slot, None, cu_seqlens, first_slot, slot_owner, T, CHUNKS, TOKENS, C)
    if first_slot is not None:
        if t0 >= eos:  # an unused slot
            return
    left = tl.minimum(eos - t0, C).to(tl.int32)
    o_t, o_k = tl.arange(0, C), i_k * BK + tl.arange(0, BK)
    m_t, m_k = o_t < left, inside(o_k, Dk, BK)
    row = (i_b * T + t0) * H + i_h
    place = i_slot * H + i_h
    q = token_of(q, q_strides, i_b, t0, i_h)
    k = token_of(k, k_strides, i_b, t0, i_h)
    v = token_of(v, v_strides, i_b, t0, i_h)
    x, x_stride = erased_keys(k, k_strides.t, erase_k, row, H, Dk)
    LATER: tl.constexpr = 0 if DECAY_FIRST else 1
    states += place * Dk * Dv
    grad_states += place * Dk * Dv
    grad_scores += place * C * C
    grad_keys += place * C * C

    b_dq = tl.zeros((C, BK), tl.float32)
    b_dx = tl.zeros((C, BK), tl.float32)
    b_dk = tl.zeros((C, BK), tl.float32)
    b_through = tl.zeros((BK,), tl.float32)  # <J, W> by channel
    for i_v in range(0, trips(NV, H)):
        o_v = i_v * BV + tl.arange(0, BV)
        m_v = inside(o_v, Dv, BV)
        m_vk, o_vk = m_v[:, None] & m_k[None, :], o_k[None, :] * Dv + o_v[:, None]
        b_w = tl.load(states + o_vk, mask=m_vk, other=0.0)  # [BV, BK]
        b_j = tl.load(grad_states + o_vk, mask=m_vk, other=0.0)  # [BV, BK]
        b_dq += fitted_dot(load_tile(grad_out + row * Dv, H * Dv, o_t, o_v, m_t, m_v), b_w, DTYPE)
        b_dx -= fitted_dot(load_tile(grad_v + row * Dv, H * Dv, o_t, o_v, m_t, m_v), b_w, DTYPE)  # dE = -dV
        b_u = load_update(
            v, v_strides.t, lr, delta, errors, squares, row, H, o_t, o_v, m_t, m_v,
            Dv, BIAS, CHANNEL_LR,
        )  # [C, BV]  # fmt: skip
        b_u, scale = fitted(b_u, DTYPE)
        b_dk -= fitted_dot(b_u, b_j, DTYPE) * scale
        b_through += tl.sum(b_w.to(tl.float32) * b_j.to(tl.float32), 0)

    b_l = tl.cumsum(load_decays(key_log_decay, row, H, o_t, o_k, left, m_k, Dk), 0)  # [C, BK]
    b_rho = b_l if DECAY_FIRST else tl.cumsum(load_decays(key_log_decay, row, H, o_t - 1, o_k, left, m_k, Dk), 0)
    b_next = load_decays(key_log_decay, row, H, o_t + 1, o_k, left, m_k, Dk)
    b_k = load_tile(k, k_strides.t, o_t, o_k, m_t, m_k).to(tl.float32)  # [C, BK]
    b_dq *= tl.exp(b_l)
    b_dx *= tl.exp(b_rho)
    b_dk *= tl.exp(tl.cumsum(b_next, 0, reverse=True))
    b_through *= tl.exp(tl.sum(load_decays(key_log_decay, row, H, o_t, o_k, left, m_k, Dk), 0))
    b_reads = b_dq * load_tile(q, q_strides.t, o_t, o_k, m_t, m_k).to(tl.float32)
    b_error_reads = b_dx * load_tile(x, x_stride, o_t, o_k, m_t, m_k).to(tl.float32)
    b_writes = b_dk * b_k
    o_b = error_place(o_t, 1, DECAY_FIRST)

    b_g = tl.zeros((C, BK), tl.float32)  # by s
    for i in range(0, left):
        t = left - 1 - i
        x_t = t + LATER
        m_x = x_t < left
        b_seen = b_k * tl.exp(tl.cumsum(tl.where((o_t < t)[:, None], b_next, 0.0), 0, reverse=True))
        b_dp = tl.load(grad_scores + t * C + o_t, mask=o_t <= t, other=0.0).to(tl.float32)  # [s]
        b_dg = tl.load(grad_keys + o_t * C + x_t, mask=only_if(m_x, o_t < x_t), other=0.0).to(tl.float32)  # [s]
        b_q = tl.load(q + t * q_strides.t + o_k, mask=m_k, other=0.0).to(tl.float32)  # [BK]
        b_x = tl.load(x + x_t * x_stride + o_k, mask=only_if(m_x, m_k), other=0.0).to(tl.float32)
        b_dq += tl.where((o_t == t)[:, None], tl.sum(b_seen * b_dp[:, None], 0)[None, :], 0.0)
        b_dx += tl.where((o_t == x_t)[:, None], tl.sum(b_seen * b_dg[:, None], 0)[None, :], 0.0)
        b_g += b_dp[:, None] * b_q[None, :] + b_dg[:, None] * b_x[None, :]
        b_crossing = tl.where((o_t < t)[:, None], b_g * b_seen + b_writes, 0.0)
        b_crossing += tl.where((o_t >= t)[:, None], b_reads, 0.0) + tl.where((o_b >= t)[:, None], b_error_reads, 0.0)
        p_t = (row + t * H) * Dk + o_k
        tl.store(grad_key_log_decay + p_t, tl.sum(b_crossing, 0) + b_through, mask=m_k)
        b_alpha = tl.exp(tl.load(key_log_decay + p_t, mask=m_k, other=0.0))
        b_g = tl.where((o_t < t)[:, None], b_g * b_alpha[None, :], b_g)
    b_dk += b_g
    if erase_k is None:
        b_dk += b_dx
    m_tk, o_tk = m_t[:, None] & m_k[None, :], row * Dk + (o_t * (H * Dk))[:, None] + o_k[None, :]
    store(grad_q + o_tk, b_dq, m_tk)
    store(grad_k + o_tk, b_dk, m_tk)
    if erase_k is not None:
        store(grad_erase_k + o_tk, b_dx, m_tk)


# -------------------------------------------------------------------------------------------------------------- launchers


def solve(p: Problem) -> tuple[Problem, Solved]:
    """Run :func:`keyed_system` and `block_reads`: the problem without decays that the chain solves, and its systems."""
    square, float32 = (p.slots.count, p.heads, p.rows, p.rows), torch.float32
    queries, erased, keys = (p.per_token(p.key_dim) for _ in range(3))
    kept = p.empty(p.slots.count, p.heads, p.key_dim, dtype=float32)
    scores, system = p.empty(*square, dtype=float32), p.empty(*square, dtype=float32)
    own = dict(queries=queries, erased=erased, keys=keys, kept=kept, scores=scores, solved=system)
    launch(keyed_system, p, p.slots.count, "head", own)
    changed = dict(q=queries, k=keys, q_strides=Strides.of(queries), k_strides=Strides.of(keys), kept=kept, scores=scores)
    return p.sharing(**changed), read(p, system, erased)


def gradients(p: Problem, of_chain: ChainGradients, of_errors: ErrorGradients, grad_scores: Tensor) -> dict[str, Tensor]:
    """Run :func:`keyed_keys_bwd`: gradients by argument name. ``p``: that of :func:`solve`, with the chain's outputs and ``grad_out``."""
    grads = {"q": p.result(p.key_dim), "k": p.result(p.key_dim), "key_log_decay": p.result(p.key_dim, dtype=torch.float32)}
    if p.erase_k is not None:
        grads["erase_k"] = p.result(p.key_dim)
    own = dict(
        q=p.q, k=p.k, q_strides=Strides.of(p.q), k_strides=Strides.of(p.k),
        grad_scores=grad_scores, grad_keys=of_errors.keys, grad_states=of_chain.states, grad_v=of_errors.v,
        grad_q=grads["q"], grad_k=grads["k"], grad_erase_k=grads.get("erase_k"), grad_key_log_decay=grads["key_log_decay"],
    )  # fmt: skip
    launch(keyed_keys_bwd, p, p.slots.count, "key", own)
    return grads
