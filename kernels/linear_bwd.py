"""The linear memory backward (SPEC section 2), in three stages; J is the gradient of the next chunk's state.

    linear_pre   R = -P' dO,  P = L o (Q K')                                                          parallel over chunks
    linear_seq   dU = R - dec (K J);  dE = psi'(E) (eta dU);  J <- gamma_C J + Q' (gamma dO) + K' dE  sequential, last chunk first
    linear_epi   dS = -L o (dO U');  dQ = gamma (dO S') + dS K;  dK = dE S' - (dec U) J' + dS' Q      parallel over chunks

Before them `linear_state` computes S and E again, between the states that the forward kept. ``dV = -dE`` leaves `linear_seq` as
a result and is read by `linear_epi` as dE.

A token's log-decay scales whatever the state at the chunk's start and earlier tokens left to later reads and to the next
chunk. Its gradient is summed over just these pairs, from the products themselves:

    d log alpha_t = sum_{r >= t} gamma_r q_r'S dO_r  +  sum_{r >= t > s} (dS o Q K')_rs  -  sum_{s < t} dec_s U_s'(J'k_s)  +  gamma_C <J, S>

The shorter forms in the literature, ``cumsum(q.dq - k.dk)``, subtract numbers of order 1 where the result may be any power smaller. The
kernels write partial sums, a row of ``rows [R, B, T, H]`` each, that the launcher adds up: no atomics, the same bits every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import bias as biases
from .launch import Problem, launch, tiles
from .linear_fwd import chunk_decays, recompute
from .linear_stream import linear_seq_streamed
from .tiles import (
    dot, inside, load_delta, load_error, load_gamma, load_gate, load_square, load_to_end, load_total, owner_of, pair_decay, rounded,
    sequence_of, slot_of, store,
)  # fmt: skip


@triton.jit
def store_after(row, x, t0, eos, o_c, H, C: tl.constexpr):
    """Store ``x [C]``, which belongs to the steps after its tokens: at ``s + 1``, and 0 at the chunk's first token."""
    turn = tl.where(o_c == C - 1, 1 - C, 1)
    tl.store(row + (o_c + turn) * H, tl.where(o_c == C - 1, 0.0, x), mask=t0 + o_c + turn < eos)


@triton.jit
def linear_pre(
    q, k, decays, grad_out, from_out,
    cu_seqlens, first_slot, slot_owner,
    T, H, CHUNKS, ROW,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh,
    Dk: tl.constexpr, Dv: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """A tile ``[C, BV]`` of R: what the output alone asks of one chunk's updates."""
    NV: tl.constexpr = (Dv + BV - 1) // BV
    i_v = tl.program_id(0) % NV
    i_slot = (tl.program_id(0) // NV).to(tl.int64)
    i_h = tl.program_id(1).to(tl.int64)
    i_n, i_c = owner_of(i_slot, first_slot, slot_owner, CHUNKS)
    if first_slot is not None:
        if i_n < 0:  # a spare slot
            return
    i_b, bos, eos = sequence_of(i_n, cu_seqlens, T)
    t0 = bos + i_c * C
    o_c, o_v = tl.arange(0, C), i_v * BV + tl.arange(0, BV)
    m_t, m_v = t0 + o_c < eos, inside(o_v, Dv, BV)
    row = (i_b * T + t0) * H + i_h
    o_g = o_c * H
    q += i_b * stride_qb + i_h * stride_qh + t0 * stride_qt
    k += i_b * stride_kb + i_h * stride_kh + t0 * stride_kt

    b_p = tl.zeros((C, C), tl.float32)  # [s, t]
    for i_k in range(0, (Dk + BK - 1) // BK):
        o_k = i_k * BK + tl.arange(0, BK)
        m_tk = m_t[:, None] & inside(o_k, Dk, BK)[None, :]
        b_q = tl.load(q + o_c[:, None] * stride_qt + o_k[None, :], mask=m_tk, other=0.0)  # [C, BK]
        b_k = tl.load(k + o_c[:, None] * stride_kt + o_k[None, :], mask=m_tk, other=0.0)  # [C, BK]
        b_p += dot(b_k, tl.trans(b_q))
    causal = o_c[:, None] <= o_c[None, :]
    b_p *= pair_decay(decays, ROW, row, o_g[None, :], o_g[:, None], m_t[None, :], m_t[:, None], causal)
    o_tv, m_tv = o_g[:, None] * Dv + o_v[None, :], m_t[:, None] & m_v[None, :]
    b_do = tl.load(grad_out + row * Dv + o_tv, mask=m_tv, other=0.0)  # [C, BV]
    store(from_out + row * Dv + o_tv, -dot(rounded(b_p, DTYPE), b_do), m_tv)


@triton.jit
def linear_seq(
    q, k, v, lr, decays, delta,
    errors, squares, from_out, grad_out, grad_final,
    grad_states, grad_v, grad_initial, grad_delta, rows_lr, rows_delta, rows_kept,
    cu_seqlens, first_slot,
    T, H, CHUNKS, ROW,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    Dk: tl.constexpr, Dv: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DTYPE: tl.constexpr,
    BIAS: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
    READS: tl.constexpr, COUPLED: tl.constexpr, DELTA: tl.constexpr,
):  # fmt: skip
    """One tile of J ``[BK, BV]`` from the last chunk of a sequence to its first."""
    NV: tl.constexpr = (Dv + BV - 1) // BV
    i_v = tl.program_id(0) % NV
    i_n = (tl.program_id(0) // NV).to(tl.int64)
    i_h = tl.program_id(1).to(tl.int64)
    i_b, bos, eos = sequence_of(i_n, cu_seqlens, T)
    chunks = ((eos - bos + C - 1) // C).to(tl.int32)
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
        t0 = bos + i_c * C
        m_t = t0 + o_c < eos
        row = (i_b * T + t0) * H + i_h
        m_tk, m_tv = m_t[:, None] & m_k[None, :], m_t[:, None] & m_v[None, :]

        b_jr = rounded(b_j, DTYPE)
        store(grad_states + ((slot + i_c) * H + i_h) * Dk * Dv + o_kv, b_jr, m_kv)
        b_k = tl.load(k + t0 * stride_kt + o_c[:, None] * stride_kt + o_k[None, :], mask=m_tk, other=0.0)  # [C, BK]
        b_q = tl.load(q + t0 * stride_qt + o_c[:, None] * stride_qt + o_k[None, :], mask=m_tk, other=0.0)  # [C, BK]
        b_do = tl.load(grad_out + row * Dv + o_tv, mask=m_tv, other=0.0).to(tl.float32)  # [C, BV]
        b_kj = dot(b_k, b_jr) * load_to_end(decays, ROW, row, o_g, m_t, C)[:, None]  # [C, BV]
        b_du = tl.load(from_out + row * Dv + o_tv, mask=m_tv, other=0.0).to(tl.float32) - b_kj  # [C, BV]

        b_e = load_error(v + t0 * stride_vt, stride_vt, errors, row, o_c, o_v, o_tv, m_tv, Dv, READS)
        b_square = load_square(squares, row, o_g, m_t, COUPLED)
        b_delta = load_delta(delta, row, o_g, o_tv, m_t, m_tv, Dv, DELTA)
        b_lr = load_gate(lr, row, o_g, m_t)  # [C]
        b_psi = biases.value(b_e, b_square, b_delta, BIAS, P0, P1, P2)
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
        gamma = load_total(decays, row, (tl.minimum(eos - t0, C) - 1) * H)
        b_j = b_j * gamma + dot(tl.trans(b_q), rounded(b_do * b_gamma[:, None], DTYPE))
        if READS:
            b_j += dot(tl.trans(b_k), rounded(b_de, DTYPE))
    tl.store(grad_initial + state + o_vk, b_j, mask=m_kv)


@triton.jit
def linear_epi(
    q, k, v, lr, decays, delta,
    states, errors, squares, grad_states, grad_out, grad_v,
    grad_q, grad_k, kept, rows_decay,
    cu_seqlens, first_slot, slot_owner,
    T, H, CHUNKS, ROW,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    Dk: tl.constexpr, Dv: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DTYPE: tl.constexpr,
    BIAS: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
    READS: tl.constexpr, COUPLED: tl.constexpr, DELTA: tl.constexpr,
):  # fmt: skip
    """A tile ``[C, BK]`` of one chunk's dQ, then of its dK, each a loop over the values: one large accumulator at a time."""
    NK: tl.constexpr = (Dk + BK - 1) // BK
    DECAYS: tl.constexpr = decays is not None
    i_k = tl.program_id(0) % NK
    i_slot = (tl.program_id(0) // NK).to(tl.int64)
    i_h = tl.program_id(1).to(tl.int64)
    i_n, i_c = owner_of(i_slot, first_slot, slot_owner, CHUNKS)
    if first_slot is not None:
        if i_n < 0:  # a spare slot
            return
    i_b, bos, eos = sequence_of(i_n, cu_seqlens, T)
    t0 = bos + i_c * C
    o_c, o_k = tl.arange(0, C), i_k * BK + tl.arange(0, BK)
    m_t, m_k = t0 + o_c < eos, inside(o_k, Dk, BK)
    m_tk = m_t[:, None] & m_k[None, :]
    row = (i_b * T + t0) * H + i_h
    tile_row = (2 * i_k).to(tl.int64) * ROW
    o_g = o_c * H
    o_tk = o_g[:, None] * Dk + o_k[None, :]
    q += i_b * stride_qb + i_h * stride_qh + t0 * stride_qt
    k += i_b * stride_kb + i_h * stride_kh + t0 * stride_kt
    v += i_b * stride_vb + i_h * stride_vh + t0 * stride_vt
    states += (i_slot * H + i_h) * Dk * Dv
    grad_states += (i_slot * H + i_h) * Dk * Dv
    b_lr = load_gate(lr, row, o_g, m_t)
    b_square = load_square(squares, row, o_g, m_t, COUPLED)

    # dQ = gamma (dO S') + dS K
    b_dp = tl.zeros((C, C), tl.float32)  # [t, s]
    b_dq = tl.zeros((C, BK), tl.float32)
    for i_v in range(0, (Dv + BV - 1) // BV):
        o_v = i_v * BV + tl.arange(0, BV)
        m_v = inside(o_v, Dv, BV)
        o_tv, m_tv = o_g[:, None] * Dv + o_v[None, :], m_t[:, None] & m_v[None, :]
        b_do = tl.load(grad_out + row * Dv + o_tv, mask=m_tv, other=0.0)  # [C, BV]
        b_e = load_error(v, stride_vt, errors, row, o_c, o_v, o_tv, m_tv, Dv, READS)
        b_delta = load_delta(delta, row, o_g, o_tv, m_t, m_tv, Dv, DELTA)
        b_u = biases.value(b_e, b_square, b_delta, BIAS, P0, P1, P2) * b_lr[:, None]  # [C, BV]
        b_w = tl.load(states + o_k[None, :] * Dv + o_v[:, None], mask=m_v[:, None] & m_k[None, :], other=0.0)  # [BV, BK]
        b_dp += dot(b_do, tl.trans(rounded(b_u, DTYPE)))
        b_dq += dot(b_do, rounded(b_w, DTYPE))
    b_q = tl.load(q + o_c[:, None] * stride_qt + o_k[None, :], mask=m_tk, other=0.0)  # [C, BK]
    b_k = tl.load(k + o_c[:, None] * stride_kt + o_k[None, :], mask=m_tk, other=0.0)  # [C, BK]
    causal = o_c[:, None] >= o_c[None, :]
    b_ds = -b_dp * pair_decay(decays, ROW, row, o_g[:, None], o_g[None, :], m_t[:, None], m_t[None, :], causal)
    b_dq *= load_gamma(decays, row, o_g, m_t, C)[:, None]
    if DECAYS:
        b_read = tl.cumsum(tl.sum(b_dq * b_q.to(tl.float32), 1), 0, reverse=True)  # over r >= t
        b_pairs = tl.cumsum(b_ds * dot(b_q, tl.trans(b_k)), 1)
        b_pairs = tl.sum(tl.where(o_c[:, None] > o_c[None, :], b_pairs, 0.0), 0)  # over r > s' >= s, for the step after s'
        b_pairs += tl.where(i_k == 0, tl.cumsum(load_gate(kept, row, o_g, m_t), 0), 0.0)
        store_after(rows_decay + tile_row + ROW + row, b_pairs, t0, eos, o_c, H, C)
    b_dq += dot(rounded(b_ds, DTYPE), b_k)
    store(grad_q + row * Dk + o_tk, b_dq, m_tk)

    # dK = dE S' - (dec U) J' + dS' Q
    b_dp = tl.zeros((C, C), tl.float32)  # [s, t]: computed anew, since transposing the other goes wrong in some compilers
    b_dk = tl.zeros((C, BK), tl.float32)
    inner = 0.0
    b_to_end = load_to_end(decays, ROW, row, o_g, m_t, C)
    for i_v in range(0, (Dv + BV - 1) // BV):
        o_v = i_v * BV + tl.arange(0, BV)
        m_v = inside(o_v, Dv, BV)
        o_tv, m_tv, m_vk = o_g[:, None] * Dv + o_v[None, :], m_t[:, None] & m_v[None, :], m_v[:, None] & m_k[None, :]
        b_do = tl.load(grad_out + row * Dv + o_tv, mask=m_tv, other=0.0)  # [C, BV]
        b_e = load_error(v, stride_vt, errors, row, o_c, o_v, o_tv, m_tv, Dv, READS)
        b_delta = load_delta(delta, row, o_g, o_tv, m_t, m_tv, Dv, DELTA)
        b_u = biases.value(b_e, b_square, b_delta, BIAS, P0, P1, P2) * b_lr[:, None]  # [C, BV]
        b_j = tl.load(grad_states + o_k[None, :] * Dv + o_v[:, None], mask=m_vk, other=0.0)  # [BV, BK]
        b_dp += dot(rounded(b_u, DTYPE), tl.trans(b_do))
        b_dk += dot(rounded(-b_u * b_to_end[:, None], DTYPE), rounded(b_j, DTYPE))
        if READS or DECAYS:
            b_w = tl.load(states + o_k[None, :] * Dv + o_v[:, None], mask=m_vk, other=0.0)  # [BV, BK]
        if READS:
            b_dk -= dot(tl.load(grad_v + row * Dv + o_tv, mask=m_tv, other=0.0), rounded(b_w, DTYPE))  # dE = -dV
        if DECAYS:
            inner += tl.sum(b_w.to(tl.float32) * b_j.to(tl.float32))
    causal = o_c[:, None] <= o_c[None, :]
    b_ds = -b_dp * pair_decay(decays, ROW, row, o_g[None, :], o_g[:, None], m_t[None, :], m_t[:, None], causal)
    b_dk += dot(rounded(b_ds, DTYPE), b_q)
    store(grad_k + row * Dk + o_tk, b_dk, m_tk)
    if DECAYS:
        gamma = load_total(decays, row, (tl.minimum(eos - t0, C) - 1) * H)
        tl.store(rows_decay + tile_row + row + o_g, b_read + gamma * inner, mask=m_t)


# --------------------------------------------------------------------------------------------------------------- launcher


def backward(p: Problem, checkpoints: Tensor, every: int, grad_out: Tensor, grad_dual: Tensor | None) -> dict[str, Tensor]:
    """Gradients by argument name, ``dual`` for the initial matrix ``[N, H, Dv, Dk]``."""
    decays = chunk_decays(p)
    chain = recompute(p, decays, checkpoints, every)
    grad_out = grad_out.contiguous()
    parallel = p.tables()
    sequential = {name: x for name, x in parallel.items() if name != "slot_owner"}
    gates = dict(lr=p.lr, decays=decays, delta=p.delta)

    from_out = p.per_token(p.value_dim)
    launch(
        linear_pre, p, p.slots.count, "value",
        q=p.q, k=p.k, decays=decays, grad_out=grad_out, from_out=from_out, **parallel, ROW=p.row, **p.strides("q", "k"),
    )  # fmt: skip

    seq = linear_seq_streamed if p.key.streams else linear_seq
    value_tiles, key_tiles = tiles(seq.__name__, p, "value"), tiles("linear_epi", p, "key")
    float32 = torch.float32

    def rows(count: int) -> Tensor:
        return p.empty(count, p.batch, p.tokens, p.heads, dtype=float32)

    per_token = p.bias["DELTA"] == 1
    rows_lr, rows_delta = rows(value_tiles), rows(value_tiles) if per_token else None
    rows_kept, rows_decay = (rows(value_tiles), rows(2 * key_tiles)) if decays is not None else (None, None)
    grad_delta = p.per_token(p.value_dim, dtype=float32) if p.bias["DELTA"] == 2 else None
    grad_states, grad_v = p.per_slot(p.slots, p.state_dtype), p.per_token(p.value_dim)
    grad_initial = torch.empty_like(p.dual, memory_format=torch.contiguous_format)
    launch(
        seq, p, p.sequences, "value",
        q=p.q, k=p.k, v=p.v, **gates, errors=chain.errors, squares=chain.squares, from_out=from_out, grad_out=grad_out,
        grad_final=None if grad_dual is None else grad_dual.contiguous(),
        grad_states=grad_states, grad_v=grad_v, grad_initial=grad_initial, grad_delta=grad_delta,
        rows_lr=rows_lr, rows_delta=rows_delta, rows_kept=rows_kept,
        **sequential, ROW=p.row, **p.strides("q", "k", "v"), **p.bias,
    )  # fmt: skip
    del from_out

    grad_q, grad_k = p.per_token(p.key_dim), p.per_token(p.key_dim)
    launch(
        linear_epi, p, p.slots.count, "key",
        q=p.q, k=p.k, v=p.v, **gates, **chain._asdict(), grad_states=grad_states, grad_out=grad_out, grad_v=grad_v,
        grad_q=grad_q, grad_k=grad_k, kept=None if rows_kept is None else rows_kept.sum(0), rows_decay=rows_decay, **parallel, ROW=p.row, **p.strides("q", "k", "v"), **p.bias,
    )  # fmt: skip

    grads = {"q": grad_q, "k": grad_k, "v": grad_v, "lr": rows_lr.sum(0), "dual": grad_initial}
    if decays is not None:
        grads["log_decay"] = rows_decay.sum(0)
    if p.delta is not None:
        grads["delta"] = rows_delta.sum(0) if per_token else grad_delta
    return grads
