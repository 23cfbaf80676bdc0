"""The linear memory forward (SPEC section 2): a chain over chunks for the states, then every chunk's output at once.

    linear_state    E = K S - V;  S <- gamma_C S - K' (dec eta psi(E))       sequential in chunks, one program a tile of S
    linear_output   O = gamma (Q S) - (L o Q K') (eta psi(E))                parallel over chunks

``S = W' [Dk, Dv]``. The chain holds its tile ``[BK, BV]`` of S in registers in float32, with BK covering Dk, and writes every
chunk's start and errors for the second kernel in the dtype of the operands. Values are independent of each other, so BV may be any
part of Dv; only a bias that couples a row of E needs BV to cover Dv. The dot product does not read the memory: there
``E`` is neither computed nor stored.

The same chain serves the backward, which runs it again between the states that the forward kept (`RECOMPUTES`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import bias as biases
from .launch import Problem, launch
from .tiles import (
    decay_from_start, decay_parts, decay_to_end, dot, load_gate, owner_of, pair_decay, rounded, sequence_of, slot_of, store,
)  # fmt: skip


@triton.jit
def load_delta(delta, row, o_g, o_tv, m_t, m_tv, Dv: tl.constexpr, DELTA: tl.constexpr):
    """delta as ``[C, 1]`` or ``[C, BV]``; 0 for a bias without one."""
    if DELTA == 2:
        return tl.load(delta + row * Dv + o_tv, mask=m_tv, other=0.0).to(tl.float32)
    elif DELTA == 1:
        return tl.load(delta + row + o_g, mask=m_t, other=0.0).to(tl.float32)[:, None]
    else:
        return 0.0


@triton.jit
def load_error(v, stride_t, errors, row, o_c, o_v, o_tv, m_tv, Dv: tl.constexpr, READS: tl.constexpr):
    """A chunk's errors ``[C, BV]``: those the chain stored, or ``-v`` for a bias that reads no memory (v at its chunk's start)."""
    if READS:
        return tl.load(errors + row * Dv + o_tv, mask=m_tv, other=0.0).to(tl.float32)
    else:
        return -tl.load(v + o_c[:, None] * stride_t + o_v[None, :], mask=m_tv, other=0.0).to(tl.float32)


@triton.jit
def load_square(squares, row, o_g, m_t, COUPLED: tl.constexpr):
    """``||e||^2 [C, 1]`` of every row, which the chain stored for a bias that couples it."""
    if COUPLED:
        return tl.load(squares + row + o_g, mask=m_t, other=0.0)[:, None]
    else:
        return 0.0


@triton.jit
def linear_state(
    k, v, lr, log_decay, delta,
    initial, opened, position, carried,
    states, errors, squares, checkpoints, final, start, open_decay,
    cu_seqlens, first_slot, first_segment, segment_owner,
    T, H, CHUNKS, SEGMENTS, EVERY,
    stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    stride_in, stride_ih, stride_iv, stride_ik,
    Dk: tl.constexpr, Dv: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DTYPE: tl.constexpr, RECOMPUTES: tl.constexpr,
    BIAS: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
    READS: tl.constexpr, COUPLED: tl.constexpr, DELTA: tl.constexpr,
):  # fmt: skip
    """One tile of S through the chunks of one sequence, or of one of its segments."""
    NV: tl.constexpr = (Dv + BV - 1) // BV
    i_v = tl.program_id(0) % NV
    i_s = (tl.program_id(0) // NV).to(tl.int64)
    i_h = tl.program_id(1).to(tl.int64)
    if RECOMPUTES:
        i_n, i_segment = owner_of(i_s, first_segment, segment_owner, SEGMENTS)
        if first_segment is not None:
            if i_n < 0:  # a spare slot
                return
    else:
        i_n, i_segment = i_s, i_s * 0
    i_b, bos, eos = sequence_of(i_n, cu_seqlens, T)
    origin = bos  # token 0 of chunk 0, before the sequence's first token if it resumes inside a chunk
    if position is not None:
        origin = bos - tl.load(position + i_n)
    chunks = ((eos - origin + C - 1) // C).to(tl.int32)
    i_first = (i_segment * EVERY).to(tl.int32)
    i_last = chunks
    if RECOMPUTES:
        i_last = tl.minimum(chunks, i_first + EVERY)
    slot = slot_of(i_n, first_slot, CHUNKS)
    segment_slot = slot_of(i_n, first_segment, SEGMENTS)

    o_c, o_k, o_v = tl.arange(0, C), tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    m_k, m_v = o_k < Dk, o_v < Dv
    m_kv = m_k[:, None] & m_v[None, :]
    o_g = o_c * H  # a chunk's gates
    o_kv, o_tv = o_k[:, None] * Dv + o_v[None, :], o_g[:, None] * Dv + o_v[None, :]
    o_vk = o_v[None, :] * Dk + o_k[:, None]  # in [N, H, Dv, Dk], once a sequence
    k += i_b * stride_kb + i_h * stride_kh
    v += i_b * stride_vb + i_h * stride_vh

    initial += i_s * stride_in + i_h * stride_ih
    b_s = tl.load(initial + o_k[:, None] * stride_ik + o_v[None, :] * stride_iv, mask=m_kv, other=0.0)  # [BK, BV]
    state = (i_n * H + i_h) * Dk * Dv
    if opened is not None:  # the chunk open at the call's start takes its gradients at its own start
        b_open = tl.load(opened + state + o_vk, mask=m_kv, other=0.0)

    for i_c in range(i_first, i_last):
        t0 = origin + i_c * C
        m_t = t0 + o_c < eos
        m_next = t0 + o_c + 1 < eos
        if position is not None:
            m_t = m_t & (t0 + o_c >= bos)
            m_next = m_next & (t0 + o_c + 1 >= bos)
        row = (i_b * T + t0) * H + i_h  # of the chunk's first token in the contiguous [B, T, H, ...] tensors
        m_tk, m_tv = m_t[:, None] & m_k[None, :], m_t[:, None] & m_v[None, :]

        b_w = rounded(b_s, DTYPE)
        store(states + ((slot + i_c) * H + i_h) * Dk * Dv + o_kv, b_w, m_kv)
        if checkpoints is not None:
            kept = checkpoints + ((segment_slot + i_c // EVERY) * H + i_h) * Dk * Dv + o_kv
            tl.store(kept, b_s, mask=m_kv & (i_c % EVERY == 0))

        b_k = tl.load(k + t0 * stride_kt + o_c[:, None] * stride_kt + o_k[None, :], mask=m_tk, other=0.0)  # [C, BK]
        b_v = tl.load(v + t0 * stride_vt + o_c[:, None] * stride_vt + o_v[None, :], mask=m_tv, other=0.0).to(tl.float32)  # [C, BV]
        if READS:
            if opened is not None:
                b_w = rounded(tl.where(i_c == 0, b_open, b_s), DTYPE)
            b_e = dot(b_k, b_w) - b_v  # [C, BV]
            store(errors + row * Dv + o_tv, b_e, m_tv)
        else:
            b_e = -b_v
        b_square = 0.0
        if COUPLED:
            b_square = tl.sum(b_e * b_e, 1)[:, None]  # [C, 1]
            tl.store(squares + row + o_g[:, None], b_square, mask=m_t[:, None])
        b_delta = load_delta(delta, row, o_g, o_tv, m_t, m_tv, Dv, DELTA)

        b_to_end, gamma = decay_to_end(log_decay, row, o_c, m_t, m_next, H, C)
        b_weight = b_to_end * load_gate(lr, row, o_g, m_t)  # [C]
        b_u = biases.value(b_e, b_square, b_delta, BIAS, P0, P1, P2) * b_weight[:, None]  # [C, BV]
        if start is not None:
            is_open = (i_c == chunks - 1) & (t0 + C > eos)
            b_start = b_s
            if opened is not None:
                b_start = tl.where(i_c == 0, b_open, b_s)
            tl.store(start + state + o_vk, b_start, mask=m_kv & is_open)
            if log_decay is not None:
                total = tl.sum(load_gate(log_decay, row, o_g, m_t), 0)
                if position is not None:
                    total += tl.where(i_c == 0, tl.load(carried + i_n * H + i_h), 0.0)
                tl.store(open_decay + i_n * H + i_h, total, mask=is_open & (i_v == 0))
        b_s = b_s * gamma - dot(tl.trans(b_k), rounded(b_u, DTYPE))

    if final is not None:
        tl.store(final + state + o_vk, b_s, mask=m_kv)
    if start is not None:
        tl.store(start + state + o_vk, b_s, mask=m_kv & (origin + chunks * C == eos))


@triton.jit
def linear_output(
    q, k, v, lr, log_decay, delta, position,
    states, errors, squares, out,
    cu_seqlens, first_slot, slot_owner,
    T, H, CHUNKS,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    Dk: tl.constexpr, Dv: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DTYPE: tl.constexpr,
    BIAS: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
    READS: tl.constexpr, COUPLED: tl.constexpr, DELTA: tl.constexpr,
):  # fmt: skip
    """A tile ``[C, BV]`` of one chunk's output."""
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
    if position is not None:
        t0 -= tl.load(position + i_n)

    o_c, o_v = tl.arange(0, C), i_v * BV + tl.arange(0, BV)
    m_t, m_v = t0 + o_c < eos, o_v < Dv
    if position is not None:
        m_t = m_t & (t0 + o_c >= bos)
    m_tv = m_t[:, None] & m_v[None, :]
    row = (i_b * T + t0) * H + i_h
    o_g = o_c * H
    o_tv = o_g[:, None] * Dv + o_v[None, :]
    q += i_b * stride_qb + i_h * stride_qh + t0 * stride_qt
    k += i_b * stride_kb + i_h * stride_kh + t0 * stride_kt
    v += i_b * stride_vb + i_h * stride_vh + t0 * stride_vt
    states += (i_slot * H + i_h) * Dk * Dv

    b_o = tl.zeros((C, BV), tl.float32)
    b_p = tl.zeros((C, C), tl.float32)  # [t, s]
    for i_k in range(0, (Dk + BK - 1) // BK):
        o_k = i_k * BK + tl.arange(0, BK)
        m_k = o_k < Dk
        m_tk = m_t[:, None] & m_k[None, :]
        b_q = tl.load(q + o_c[:, None] * stride_qt + o_k[None, :], mask=m_tk, other=0.0)  # [C, BK]
        b_k = tl.load(k + o_c[:, None] * stride_kt + o_k[None, :], mask=m_tk, other=0.0)  # [C, BK]
        b_w = tl.load(states + o_k[:, None] * Dv + o_v[None, :], mask=m_k[:, None] & m_v[None, :], other=0.0)  # [BK, BV]
        b_o += dot(b_q, b_w)
        b_p += dot(b_q, tl.trans(b_k))

    b_e = load_error(v, stride_vt, errors, row, o_c, o_v, o_tv, m_tv, Dv, READS)
    b_delta = load_delta(delta, row, o_g, o_tv, m_t, m_tv, Dv, DELTA)
    b_u = biases.value(b_e, load_square(squares, row, o_g, m_t, COUPLED), b_delta, BIAS, P0, P1, P2)
    b_u = b_u * load_gate(lr, row, o_g, m_t)[:, None]
    b_units, b_rest = decay_parts(log_decay, row, o_g, m_t, C)
    causal = o_c[:, None] >= o_c[None, :]
    b_p *= pair_decay(b_units[:, None], b_rest[:, None], b_units[None, :], b_rest[None, :], causal, log_decay is not None)
    b_o = b_o * decay_from_start(log_decay, row, o_g, m_t, C)[:, None] - dot(rounded(b_p, DTYPE), rounded(b_u, DTYPE))
    store(out + row * Dv + o_tv, b_o, m_tv)


# -------------------------------------------------------------------------------------------------------------- launchers


class Chain(NamedTuple):
    """What the chain leaves for the parallel kernels."""

    states: Tensor  # [slots, H, Dk, Dv], S at every chunk's start
    errors: Tensor | None  # [B, T, H, Dv]
    squares: Tensor | None  # [B, T, H] float32, ||e||^2 for a bias that couples a row


class Final(NamedTuple):
    """The state after the last token, as MemoryState has it; the last two only where a sequence may end inside a chunk."""

    dual: Tensor  # [N, H, Dv, Dk] float32
    start: Tensor | None
    open_decay: Tensor | None  # [N, H] float32


def _chain(p: Problem) -> Chain:
    errors = p.per_token(p.value_dim) if p.bias["READS"] else None
    return Chain(p.per_slot(p.slots), errors, p.per_token(dtype=torch.float32) if p.bias["COUPLED"] else None)


def _launch_state(p: Problem, chain: Chain, units: int, initial: Tensor, strides: tuple[int, ...], **arguments) -> None:
    launch(
        linear_state, p, units, "value",
        k=p.k, v=p.v, lr=p.lr, log_decay=p.log_decay, delta=p.delta, initial=initial,
        **dict(zip(("stride_in", "stride_ih", "stride_iv", "stride_ik"), strides, strict=True)),
        **chain._asdict(), cu_seqlens=p.cu_seqlens, first_slot=p.slots.first, CHUNKS=p.slots.per_sequence,
        **p.strides("k", "v"), **p.bias, **arguments,
    )  # fmt: skip


def forward(p: Problem, every: int, wants_final: bool, may_end_open: bool) -> tuple[Tensor, Final | None, Tensor | None]:
    """``(out, final state, checkpoints)``: the state of every ``every``-th chunk ``[slots, H, Dk, Dv]`` float32, if every > 0."""
    chain, dual, opened = _chain(p), p.call.state.dual[0], p.call.state.open_chunk
    segments = p.pieces(p.chunk_size * max(every, 1))
    checkpoints = p.per_slot(segments, torch.float32) if every else None
    final = None
    if wants_final:
        final = Final(
            torch.empty_like(dual, memory_format=torch.contiguous_format),
            torch.empty_like(dual, memory_format=torch.contiguous_format) if may_end_open else None,
            dual.new_zeros(dual.shape[:2]) if may_end_open else None,
        )
    _launch_state(
        p, chain, p.sequences, dual, dual.stride(),
        opened=None if opened is None else opened.start[0].contiguous(), position=p.position,
        carried=None if opened is None else opened.log_decay.contiguous(),
        checkpoints=checkpoints, EVERY=max(every, 1), SEGMENTS=segments.per_sequence, first_segment=segments.first,
        segment_owner=None, RECOMPUTES=False,
        **dict(zip(("final", "start", "open_decay"), final or (None, None, None), strict=True)),
    )  # fmt: skip
    out = p.per_token(p.value_dim)
    launch(
        linear_output, p, p.slots.count, "value",
        q=p.q, k=p.k, v=p.v, lr=p.lr, log_decay=p.log_decay, delta=p.delta, position=p.position, **chain._asdict(), out=out,
        cu_seqlens=p.cu_seqlens, first_slot=p.slots.first, slot_owner=p.slots.owner, CHUNKS=p.slots.per_sequence,
        **p.strides("q", "k", "v"), **p.bias,
    )  # fmt: skip
    return out, final, checkpoints


def recompute(p: Problem, checkpoints: Tensor, every: int) -> Chain:
    """The chain again from the kept states, all segments at once."""
    chain, segments = _chain(p), p.pieces(p.chunk_size * every)
    n, h, k, v = checkpoints.stride()
    _launch_state(
        p, chain, segments.count, checkpoints, (n, h, v, k),
        opened=None, position=None, carried=None, checkpoints=None, final=None, start=None, open_decay=None,
        EVERY=every, SEGMENTS=segments.per_sequence, first_segment=segments.first, segment_owner=segments.owner, RECOMPUTES=True,
    )  # fmt: skip
    return chain
