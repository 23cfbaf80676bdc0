"""The linear memory forward (SPEC section 2): a chain over chunks for the states, then every chunk's output at once.

    linear_state    E = K S - V;  S <- gamma_C S - K' (dec eta psi(E))       sequential in chunks, one program a tile of S
    linear_output   O = gamma (Q S) - (L o Q K') (eta psi(E))                parallel over chunks

``S = W' [Dk, Dv]``; decays.py has what the gates of a chunk amount to. The chain holds its tile ``[BK, BV]`` of S in registers in float32,
with BK covering Dk, and writes every chunk's start and errors for the others in the dtype of the operands. Values are independent of each
other, so BV may be any part of Dv; only a bias that couples a row of E needs BV to cover Dv. The dot product does not read the memory:
there E is neither computed nor stored.

Under a retention gate the chain carries the dual A, and ``W = phi(A)`` takes the place of S wherever it is multiplied; the output scales a
chunk's own writes by rho. With momentum there is a second matrix S_0 and ``O = gamma (Q W) + rho (b (Q S_0) - (M o Q K') (eta psi(E)))``.
Both are linear_stream.py's; linear_channel.py takes the place of `linear_output` where log-decays go by channel.

A sequence that resumes inside a chunk, or whose state is wanted inside one, is walked in three parts; the same chain serves the
backward, which runs it again from the states that the forward kept.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import bias as biases
from . import linear_channel
from . import retention as retentions
from .chunks import BODY, HEAD, SEGMENT, TAIL, WHOLE, chunk_of, end_of, of_chunk, slot_of, stretch_of
from .decays import Weights, chunk_weights
from .gates import CARRY, load_delta, load_gamma, load_gate, load_lr, load_scale, load_to_end, load_total, load_update, pair_decay
from .launch import Problem, launch
from .linear_stream import linear_state_streamed
from .tiles import LENGTHS, dot, inside, load_tile, only_if, pair_products, rounded, store


@triton.jit(do_not_specialize=LENGTHS)
def linear_state(
    k, v, lr, decays, delta,
    initial, opened, position,
    states, errors, squares, checkpoints, final,
    cu_seqlens, first_slot, first_segment, segment_owner,
    T, H, CHUNKS, ROW, SEGMENTS, EVERY,
    stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    stride_in, stride_ih, stride_iv, stride_ik,
    TOKENS: tl.constexpr, C: tl.constexpr, Dk: tl.constexpr, Dv: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DTYPE: tl.constexpr,
    PART: tl.constexpr,
    BIAS: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
    READS: tl.constexpr, COUPLED: tl.constexpr, DELTA: tl.constexpr, CHANNEL_LR: tl.constexpr,
):  # fmt: skip
    """One tile of S through the chunks of one sequence, or of one of its segments."""
    NV: tl.constexpr = (Dv + BV - 1) // BV
    i_v = tl.program_id(0) % NV
    i_s = (tl.program_id(0) // NV).to(tl.int64)
    i_h = tl.program_id(1).to(tl.int64)
    i_n, i_b, bos, eos, origin, first, last = stretch_of(
        i_s, position, cu_seqlens, first_segment, segment_owner, T, SEGMENTS, EVERY, TOKENS, PART
    )
    slot = slot_of(i_n, first_slot, CHUNKS)
    segment_slot = slot_of(i_n, first_segment, SEGMENTS)

    o_c, o_k, o_v = tl.arange(0, C), tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    m_k, m_v = inside(o_k, Dk, BK), inside(o_v, Dv, BV)
    m_kv = m_k[:, None] & m_v[None, :]
    o_g = o_c * H  # a chunk's gates
    o_kv, o_tv = o_k[:, None] * Dv + o_v[None, :], o_g[:, None] * Dv + o_v[None, :]
    k += i_b * stride_kb + i_h * stride_kh
    v += i_b * stride_vb + i_h * stride_vh
    state = (i_n * H + i_h) * Dk * Dv
    initial += i_s * stride_in + i_h * stride_ih
    b_s = tl.load(initial + o_k[:, None] * stride_ik + o_v[None, :] * stride_iv, mask=m_kv, other=0.0)  # [BK, BV]

    for i_c in range(first, last):
        t0 = origin + i_c * TOKENS
        end = end_of(t0, eos, C, TOKENS)
        m_t = of_chunk(t0 + o_c, bos, end, PART)
        row = (i_b * T + t0) * H + i_h  # of the chunk's first token in the contiguous [B, T, H, ...] tensors
        m_tv = m_t[:, None] & m_v[None, :]

        b_w = rounded(b_s, DTYPE)
        store(states + ((slot + i_c) * H + i_h) * Dk * Dv + o_kv, b_w, m_kv)
        if checkpoints is not None:
            kept = checkpoints + ((segment_slot + i_c // EVERY) * H + i_h) * Dk * Dv
            tl.store(kept + o_kv, b_s, mask=only_if(i_c % EVERY == 0, m_kv))

        b_k = load_tile(k + t0 * stride_kt, stride_kt, o_c, o_k, m_t, m_k)  # [C, BK]
        b_v = load_tile(v + t0 * stride_vt, stride_vt, o_c, o_v, m_t, m_v)  # [C, BV]
        if READS:
            if PART == HEAD:  # the errors of a chunk that was open before are taken at its own start
                b_w = rounded(tl.load(opened + state + o_v[None, :] * Dk + o_k[:, None], mask=m_kv, other=0.0), DTYPE)
            b_e = dot(b_k, b_w) - b_v.to(tl.float32)  # [C, BV]
            store(errors + row * Dv + o_tv, b_e, m_tv)
        else:
            b_e = -b_v.to(tl.float32)
        b_square = 0.0
        if COUPLED:
            b_square = tl.sum(b_e * b_e, 1)[:, None]  # [C, 1]
            tl.store(squares + row + o_g[:, None], b_square, mask=m_t[:, None])
        b_delta = load_delta(delta, row, o_g, o_tv, m_t, m_tv, Dv, DELTA)
        b_u = biases.value(b_e, b_square, b_delta, BIAS, P0, P1, P2)
        if CHANNEL_LR:
            b_u *= load_lr(lr, row, o_g, o_tv, m_t, m_tv, Dv, CHANNEL_LR) * load_to_end(decays, ROW, row, o_g, m_t, C)[:, None]
        else:
            b_u *= (load_gate(lr, row, o_g, m_t) * load_to_end(decays, ROW, row, o_g, m_t, C))[:, None]  # [C, BV]
        gamma = load_total(decays, row, (tl.minimum(end - t0, C) - 1) * H)
        b_s = b_s * gamma - dot(tl.trans(b_k), rounded(b_u, DTYPE))

    if final is not None:
        tl.store(final + state + o_kv, b_s, mask=m_kv)


@triton.jit(do_not_specialize=LENGTHS)
def linear_output(
    q, k, v, lr, decays, pairs, delta, position,
    states, errors, squares, momenta, scales, out,
    cu_seqlens, first_slot, slot_owner,
    T, H, CHUNKS, ROW,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    TOKENS: tl.constexpr, C: tl.constexpr, BC: tl.constexpr,
    Dk: tl.constexpr, Dv: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DTYPE: tl.constexpr,
    BIAS: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
    READS: tl.constexpr, COUPLED: tl.constexpr, DELTA: tl.constexpr, CHANNEL_LR: tl.constexpr,
):  # fmt: skip
    """A tile ``[BC, BV]`` of one chunk's output: the state it started from, then the writes of its own tokens, block by block."""
    NV: tl.constexpr = (Dv + BV - 1) // BV
    NC: tl.constexpr = C // BC
    i_v, i_r = tl.program_id(0) % NV, tl.program_id(0) // NV % NC
    i_slot = (tl.program_id(0) // (NV * NC)).to(tl.int64)
    i_h = tl.program_id(1).to(tl.int64)
    i_b, t0, bos, eos = chunk_of(i_slot, position, cu_seqlens, first_slot, slot_owner, T, CHUNKS, TOKENS, C)
    if first_slot is not None:
        if t0 >= eos:  # a spare slot
            return

    o_t, o_v = i_r * BC + tl.arange(0, BC), i_v * BV + tl.arange(0, BV)
    m_t, m_v = (t0 + o_t < eos) & (t0 + o_t >= bos), inside(o_v, Dv, BV)
    row = (i_b * T + t0) * H + i_h
    q += i_b * stride_qb + i_h * stride_qh + t0 * stride_qt
    k += i_b * stride_kb + i_h * stride_kh + t0 * stride_kt
    v += i_b * stride_vb + i_h * stride_vh + t0 * stride_vt
    place = i_slot * H + i_h
    states += place * Dk * Dv
    rho = load_scale(scales, place)
    if pairs is not None:
        pairs += place * C * C

    b_o = tl.zeros((BC, BV), tl.float32)
    for i_k in range(0, (Dk + BK - 1) // BK):
        o_k = i_k * BK + tl.arange(0, BK)
        m_k = inside(o_k, Dk, BK)
        b_q = load_tile(q, stride_qt, o_t, o_k, m_t, m_k)  # [BC, BK]
        b_w = load_tile(states, Dv, o_k, o_v, m_k, m_v)  # [BK, BV]
        b_o += dot(b_q, rounded(b_w, DTYPE))
    b_o *= load_gamma(decays, row, o_t * H, m_t, BC)[:, None]
    if momenta is not None:
        b_carried = tl.zeros((BC, BV), tl.float32)
        for i_k in range(0, (Dk + BK - 1) // BK):
            o_k = i_k * BK + tl.arange(0, BK)
            m_k = inside(o_k, Dk, BK)
            b_q = load_tile(q, stride_qt, o_t, o_k, m_t, m_k)  # [BC, BK]
            p_s = momenta + place * Dk * Dv + o_k[:, None] * Dv + o_v[None, :]
            b_carried += dot(b_q, rounded(tl.load(p_s, mask=m_k[:, None] & m_v[None, :], other=0.0), DTYPE))
        b_o += b_carried * (load_gate(decays + CARRY * ROW, row, o_t * H, m_t) * rho)[:, None]
    for i_s in range(0, i_r + 1):
        o_s = i_s * BC + tl.arange(0, BC)
        m_s = (t0 + o_s < eos) & (t0 + o_s >= bos)
        b_p = pair_products(q, stride_qt, o_t, m_t, k, stride_kt, o_s, m_s, BC, Dk, BK)  # [t, s]
        b_p *= pair_decay(decays, pairs, ROW, row, H, C, o_t[:, None], o_s[None, :], m_t[:, None], m_s[None, :])
        if scales is not None:
            b_p *= rho
        b_u = load_update(
            v, stride_vt, lr, delta, errors, squares, row, H, o_s, o_v, m_s, m_v,
            Dv, BIAS, P0, P1, P2, READS, COUPLED, DELTA, CHANNEL_LR,
        )  # [BC, BV]  # fmt: skip
        b_o -= dot(rounded(b_p, DTYPE), rounded(b_u, DTYPE))
    store(out + row * Dv + o_t[:, None] * (H * Dv) + o_v[None, :], b_o, m_t[:, None] & m_v[None, :])


# -------------------------------------------------------------------------------------------------------------- launchers


class Chain(NamedTuple):
    """What the chain leaves for the parallel kernels."""

    states: Tensor  # [slots, H, Dk, Dv], S at every chunk's start, float32 if they are streamed; its primal under a retention gate
    errors: Tensor | None  # [B, T, H, Dv]
    squares: Tensor | None  # [B, T, H] float32, ||e||^2 for a bias that couples a row
    duals: Tensor | None = None  # [slots, H, Dk, Dv] float32, under a retention gate
    momenta: Tensor | None = None  # [slots, H, Dk, Dv] float32
    scales: Tensor | None = None  # [slots, H] float32, rho of a gate that has one

    def only(self, *names: str) -> dict[str, Tensor | None]:
        return {name: getattr(self, name) for name in names}


class Final(NamedTuple):
    """The state after the last token, as MemoryState has it; ``start``, ``open_decay`` only where a sequence may end inside a chunk."""

    dual: tuple[Tensor, ...]  # the memory's matrices, float32: [N, H, Dv, Dk], or [N, H, D, Hd] and [N, H, Hd, D]
    start: tuple[Tensor, ...] = ()
    open_decay: Tensor | None = None  # [N, H] float32, or [N, H, Dv]
    momentum: tuple[Tensor, ...] = ()  # like dual

    def tensors(self) -> list[Tensor]:
        """All of them, contiguous, in one list."""
        return [x.contiguous() for x in (*self.dual, *self.momentum, *self.start, self.open_decay) if x is not None]


def forward(p: Problem, every: int, wants_final: bool, may_end_open: bool) -> tuple[Tensor, Final | None, Tensor | None]:
    """``(out, final state, checkpoints)``: the matrices of every ``every``-th chunk (dispatch.kept_states_like) float32, if every > 0."""
    chain, weights = _empty_chain(p), chunk_weights(p)
    matrices = p.call.state.matrices()
    segments = p.pieces(p.chunk_size * max(every, 1))
    several = () if len(matrices) == 1 else (len(matrices),)
    checkpoints = p.empty(segments.count, p.heads, *several, p.key_dim, p.value_dim, dtype=torch.float32) if every else None

    def walk(part: int, initial: tuple[Tensor, ...], wanted: bool = True) -> tuple[Tensor, ...]:
        final = p.empty(len(initial), p.sequences, p.heads, p.key_dim, p.value_dim, dtype=torch.float32) if wanted else None
        if len(initial) > 1:  # with the same strides
            initial = torch.stack(initial).unbind(0)
        _launch_state(
            p, chain, weights, p.sequences, initial, part, final=final,
            checkpoints=checkpoints, EVERY=max(every, 1), SEGMENTS=segments.per_sequence, first_segment=segments.first, segment_owner=None,
        )  # fmt: skip
        return () if final is None else final.transpose(-1, -2).unbind(0)

    final = None
    if p.position is None and not may_end_open:
        after = walk(WHOLE.value, matrices, wants_final)
        final = Final(after[:1], momentum=after[1:]) if wants_final else None
    else:
        before = matrices if p.position is None else walk(HEAD.value, matrices)
        start = walk(BODY.value, before)
        after = walk(TAIL.value, start)
        final = Final(after[:1], *open_chunk_end(p, start[:1]), after[1:])
    out = p.per_token(p.value_dim)
    if p.key.channels:
        linear_channel.output(p, weights, chain, out)
    else:
        _output(p, weights, chain, out)
    return out, final, checkpoints


def _output(p: Problem, weights: Weights, chain: Chain, out: Tensor) -> None:
    launch(
        linear_output, p, p.slots.count * p.blocks, "value",
        q=p.q, k=p.k, v=p.v, lr=p.lr, **weights.only("decays", "pairs"), delta=p.delta, position=p.position,
        **chain.only("states", "errors", "squares", "momenta", "scales"), out=out,
        **p.tables(), ROW=p.row, **p.strides("q", "k", "v"), **p.sizes, BC=p.block, **p.bias,
    )  # fmt: skip


def recompute(p: Problem, weights: Weights, checkpoints: Tensor, every: int) -> Chain:
    """The chain again from the kept states, all segments at once."""
    chain, segments = _empty_chain(p), p.pieces(p.chunk_size * every)
    kept = (checkpoints,) if p.momentum is None else checkpoints.unbind(2)
    _launch_state(
        p, chain, weights, segments.count, tuple(x.transpose(-1, -2) for x in kept), SEGMENT.value, final=None, checkpoints=None,
        EVERY=every, SEGMENTS=segments.per_sequence, first_segment=segments.first, segment_owner=segments.owner,
    )  # fmt: skip
    return chain


def _empty_chain(p: Problem) -> Chain:
    gated, float32 = p.retention["RETENTION"] != retentions.L2.value, torch.float32
    states = p.per_slot(p.slots, float32 if p.key.streams("linear_state") and not gated else None)
    errors = p.per_token(p.value_dim) if p.bias["READS"] else None
    squares = p.per_token(dtype=float32) if p.bias["COUPLED"] else None
    duals = p.per_slot(p.slots, float32) if gated else None
    momenta = None if p.momentum is None else p.per_slot(p.slots, float32)
    scales = p.empty(p.slots.count, p.heads, dtype=float32) if p.retention["RETENTION"] == retentions.LQ.value else None
    return Chain(states, errors, squares, duals, momenta, scales)


def _launch_state(
    p: Problem, chain: Chain, weights: Weights, units: int, initial: tuple[Tensor, ...], part: int, final: Tensor | None, **arguments
):
    """``initial``: the matrices ``[units, H, Dv, Dk]`` to start from, all with the same strides; ``final [matrices, N, H, Dk, Dv]``."""
    tables = p.tables()
    del tables["slot_owner"]
    arguments |= dict(k=p.k, v=p.v, lr=p.lr, decays=weights.decays, delta=p.delta, position=p.position, initial=initial[0])
    arguments |= dict(zip(("stride_in", "stride_ih", "stride_iv", "stride_ik"), initial[0].stride(), strict=True))
    arguments |= dict(final=None if final is None else final[0])
    opened, readouts, scales = _opened(p) if part == HEAD.value else (None, None, None)
    streamed = p.key.streams("linear_state")
    if streamed:
        more = dict(enumerate(initial)).get(1), None if final is None or len(final) == 1 else final[1]
        arguments |= dict(zip(("initial_momentum", "final_momentum"), more, strict=True))
        arguments |= dict(
            readouts=readouts,
            opened_scales=scales,
            **chain.only("duals", "momenta", "scales"),
            **p.retention,
            moves=weights.moves,
            CHANNELS=p.key.channels,
        )
    launch(
        linear_state_streamed if streamed else linear_state, p, units, "value",
        opened=opened, **chain.only("states", "errors", "squares"),
        **tables, ROW=p.row, **p.strides("k", "v"), PART=part, **p.sizes, **p.bias, **arguments,
    )  # fmt: skip


def _opened(p: Problem) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Of the chunk that a call resumes in: its primal, what its tokens read before writes of their own, and its rho.

    The read-out of token t is ``gamma_t (gamma W_0 + rho (A - gamma A_0))`` with A_0 the dual at the chunk's start, A as it stands, and
    gamma the decay between them.
    """
    opened, gate, dual = p.call.state.open_chunk, p.call.retention, p.dual
    start = opened.start[0]
    if p.retention["RETENTION"] == retentions.L2.value:
        return start.contiguous(), None, None
    primal, rho = gate.phi(start), gate.rho(start)
    gamma = opened.log_decay.exp().reshape(*start.shape[:2], -1, 1)
    return primal.contiguous(), (gamma * primal + rho * (dual - gamma * start)).contiguous(), rho.reshape(*start.shape[:2]).contiguous()


def open_chunk_end(p: Problem, start: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Tensor]:
    """Start and sum of log-decays ``[N, H]`` of the chunk that a sequence ends in; ``start``: the matrices after its whole ones."""
    size, device, opened = p.chunk_size, p.q.device, p.call.state.open_chunk
    before = torch.zeros(p.sequences, dtype=torch.int64, device=device) if p.position is None else p.position
    if p.cu_seqlens is None:
        begin, end = torch.zeros_like(before), torch.full_like(before, p.tokens)
        rows = torch.arange(p.sequences, device=device)
    else:
        begin, end = p.cu_seqlens[:-1], p.cu_seqlens[1:]
        rows = torch.zeros_like(begin)
    whole = (before + end - begin) // size
    decay = start[0].new_zeros(start[0].shape[: 3 if p.key.channels else 2])
    if p.log_decay is not None:
        tokens = (begin - before + whole * size)[:, None] + torch.arange(size, device=device)  # [N, C]
        belongs = (tokens >= begin[:, None]) & (tokens < end[:, None])
        taken = p.log_decay[rows[:, None], tokens.clamp(0, p.tokens - 1)]  # [N, C, H] or [N, C, H, Dv]
        decay = torch.where(belongs.reshape(*belongs.shape, *(1,) * (taken.dim() - 2)), taken, 0.0).sum(1)
    if opened is not None:
        same = (whole == 0) & (before > 0)
        start = tuple(torch.where(same[:, None, None, None], old, new) for old, new in zip(opened.start, start, strict=True))
        decay = decay + torch.where(same.reshape(-1, *(1,) * (decay.dim() - 1)), opened.log_decay, 0.0)
    return start, decay
