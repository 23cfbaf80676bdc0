"""The chain of the linear memory (docs/mathematics.md, sections 2 and 6): sequential; one program per tile of S or of its gradient J.

    linear_chain_fwd   E = K S - V;  S <- gamma_C S - K' (dec eta psi(E))                                       from the first chunk on
    linear_chain_bwd   dU = R - dec (K J);  dE = psi'(E) (eta dU);  J <- gamma_C J + Q' (gamma dO) + K' dE      from the last chunk back

In exact steps (block.py) a block of tokens takes the place of a chunk: ``E = W S - Z`` and ``J <- ... + W' (eta dU)``, with W in ``reads``
and Z in the place of V. ``grad_v`` is then dU, from which block.py computes dV and d eta.

``S = W' [Dk, Dv]``; ``gamma`` and ``dec = gamma_C / gamma_s`` are those of decays.py. A program holds its tile ``[BK, BV]`` in float32
registers, BK covering Dk, and stores every chunk's initial state, errors and dV in the operands' dtype for the parallel kernels. Values
are independent, so BV may be any part of Dv; only a bias that couples a row of E needs BV to cover Dv. The dot product does not read the
memory: its E is neither computed nor stored. ``dV = -dE`` is a result, and `linear_dqk_bwd` reads it as dE.

chain_streamed.py and chain_streamed_bwd.py do the same for states that do not fit in registers, for retention gates and for momentum; the
launchers here choose. A sequence that resumes or may end inside a chunk is walked in three launches (chunks.py). The backward recomputes
the states with `linear_chain_fwd` from the checkpoints.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import bias as biases
from ..common.chunks import HEAD, SEGMENT, chain_program, end_of, head_of, of_chunk, segment_of, sequence_of, slot_of
from ..common.final_state import opened_chunk
from ..common.gates import decayed, load_delta, load_error, load_gamma, load_gate, load_lr, load_square, load_to_end, load_total
from ..common.launch import MatrixStrides, Problem, launch, tiles
from ..common.tiles import LENGTHS, dot, fitted_dot, inside, load_tile, only_if, rounded, store, wide
from .block import Solved
from .chain_streamed import linear_chain_fwd_streamed
from .chain_streamed_bwd import linear_chain_bwd_streamed


@triton.jit(do_not_specialize=LENGTHS)
def linear_chain_fwd(
    k, v, lr, decays, delta, reads, kept,
    initial, opened, position,
    states, errors, squares, checkpoints, final,
    cu_seqlens, first_slot, first_segment, segment_owner,
    T, H, CHUNKS, ROW, SEGMENTS, EVERY,
    k_strides, v_strides,
    initial_strides,
    TOKENS: tl.constexpr, C: tl.constexpr, Dk: tl.constexpr, Dv: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DTYPE: tl.constexpr,
    PART: tl.constexpr,
    BIAS: tl.constexpr, CHANNEL_LR: tl.constexpr,
):  # fmt: skip
    """One tile of S through the chunks of one sequence, or of one of its segments."""
    ROW = wide(ROW)
    NV: tl.constexpr = (Dv + BV - 1) // BV
    i_v, i_s, i_h = chain_program(NV)
    i_n, i_b, bos, eos, origin, first, last = segment_of(
        i_s, position, cu_seqlens, first_segment, segment_owner, T, SEGMENTS, EVERY, TOKENS, PART
    )
    slot = slot_of(i_n, first_slot, CHUNKS)
    segment_slot = slot_of(i_n, first_segment, SEGMENTS)

    o_c, o_k, o_v = tl.arange(0, C), tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    m_k, m_v = inside(o_k, Dk, BK), inside(o_v, Dv, BV)
    m_kv = m_k[:, None] & m_v[None, :]
    o_g = o_c * H  # of a chunk's token gates
    o_kv, o_tv = o_k[:, None] * Dv + o_v[None, :], o_g[:, None] * Dv + o_v[None, :]
    k = head_of(k, k_strides, i_b, i_h)
    v = head_of(v, v_strides, i_b, i_h)
    state = (i_n * H + i_h) * Dk * Dv
    initial += i_s * initial_strides.n + i_h * initial_strides.h
    m_initial = m_kv if PART != SEGMENT else only_if(first < last, m_kv)  # an unused segment has no checkpoint
    b_s = tl.load(initial + o_k[:, None] * initial_strides.k + o_v[None, :] * initial_strides.v, mask=m_initial, other=0.0)  # [BK, BV]

    for i_c in range(first, last):
        t0 = origin + i_c * TOKENS
        end = end_of(t0, eos, C, TOKENS)
        m_t = of_chunk(t0 + o_c, bos, end, PART)
        row = (i_b * T + t0) * H + i_h  # of the chunk's first token in the contiguous [B, T, H, ...] tensors
        m_tv = m_t[:, None] & m_v[None, :]

        store(states + ((slot + i_c) * H + i_h) * Dk * Dv + o_kv, b_s, m_kv)
        if checkpoints is not None:
            if i_c % EVERY == 0:
                tl.store(checkpoints + ((segment_slot + i_c // EVERY) * H + i_h) * Dk * Dv + o_kv, b_s, mask=m_kv)

        gamma = load_total(decays, row, (tl.minimum(end - t0, C) - 1) * H)
        b_k = load_tile(k + t0 * k_strides.t, k_strides.t, o_c, o_k, m_t, m_k)  # [C, BK]
        b_v = load_tile(v + t0 * v_strides.t, v_strides.t, o_c, o_v, m_t, m_v)  # [C, BV]
        if BIAS.reads_memory:
            b_w = b_s
            if PART == HEAD:  # a chunk that was open before predicts with its own start
                b_w = tl.load(opened + state + o_v[None, :] * Dk + o_k[:, None], mask=m_kv, other=0.0)
            b_r = b_k if reads is None else load_tile(reads + row * Dk, H * Dk, o_c, o_k, m_t, m_k)  # [C, BK]
            b_e = fitted_dot(b_r, b_w, DTYPE) - b_v.to(tl.float32)  # [C, BV]
            store(errors + row * Dv + o_tv, b_e, m_tv)
        else:
            b_e = -b_v.to(tl.float32)
        b_square = 0.0
        if BIAS.row_coupled:
            b_square = tl.sum(b_e * b_e, 1)[:, None]  # [C, 1]
            tl.store(squares + row + o_g[:, None], b_square, mask=m_t[:, None])
        b_delta = load_delta(delta, row, o_g, o_tv, m_t, m_tv, Dv, BIAS)
        b_u = biases.value(b_e, b_square, b_delta, BIAS)
        if CHANNEL_LR:
            b_u *= load_lr(lr, row, o_g, o_tv, m_t, m_tv, Dv, CHANNEL_LR) * load_to_end(decays, ROW, row, o_g, m_t, C)[:, None]
        else:
            b_u *= (load_gate(lr, row, o_g, m_t) * load_to_end(decays, ROW, row, o_g, m_t, C))[:, None]  # [C, BV]
        b_s = decayed(b_s, gamma, kept, (slot + i_c) * H + i_h, o_k, m_k, Dk) - fitted_dot(tl.trans(b_k), b_u, DTYPE)

    if final is not None:
        tl.store(final + state + o_kv, b_s, mask=m_kv)


@triton.jit(do_not_specialize=LENGTHS)
def linear_chain_bwd(
    q, k, v, lr, decays, delta, reads, kept,
    errors, squares, from_out, grad_out, grad_final,
    grad_states, grad_v, grad_initial, grad_delta, grad_lr, rows_lr, rows_delta, rows_to_end,
    cu_seqlens, first_slot,
    T, H, CHUNKS, ROW,
    q_strides, k_strides, v_strides,
    TOKENS: tl.constexpr, C: tl.constexpr, Dk: tl.constexpr, Dv: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DTYPE: tl.constexpr,
    BIAS: tl.constexpr, CHANNEL_LR: tl.constexpr,
):  # fmt: skip
    """One tile of J ``[BK, BV]``, from the last chunk of a sequence to its first."""
    ROW = wide(ROW)
    NV: tl.constexpr = (Dv + BV - 1) // BV
    i_v, i_n, i_h = chain_program(NV)
    i_b, bos, eos = sequence_of(i_n, cu_seqlens, T)
    chunks = ((eos - bos + TOKENS - 1) // TOKENS).to(tl.int32)
    slot = slot_of(i_n, first_slot, CHUNKS)

    o_c, o_k, o_v = tl.arange(0, C), tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    m_k, m_v = inside(o_k, Dk, BK), inside(o_v, Dv, BV)
    m_kv = m_k[:, None] & m_v[None, :]
    q = head_of(q, q_strides, i_b, i_h)
    k = head_of(k, k_strides, i_b, i_h)
    v = head_of(v, v_strides, i_b, i_h)
    o_g = o_c * H  # of a chunk's token gates
    o_kv, o_tv = o_k[:, None] * Dv + o_v[None, :], o_g[:, None] * Dv + o_v[None, :]
    o_vk = o_v[None, :] * Dk + o_k[:, None]  # in [N, H, Dv, Dk], once per sequence
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

        store(grad_states + ((slot + i_c) * H + i_h) * Dk * Dv + o_kv, b_j, m_kv)
        gamma = load_total(decays, row, (tl.minimum(end - t0, C) - 1) * H)
        b_k = load_tile(k + t0 * k_strides.t, k_strides.t, o_c, o_k, m_t, m_k)  # [C, BK]
        b_q = load_tile(q + t0 * q_strides.t, q_strides.t, o_c, o_k, m_t, m_k)  # [C, BK]
        b_do = tl.load(grad_out + row * Dv + o_tv, mask=m_tv, other=0.0).to(tl.float32)  # [C, BV]
        b_kj = fitted_dot(b_k, b_j, DTYPE) * load_to_end(decays, ROW, row, o_g, m_t, C)[:, None]  # [C, BV]
        b_du = tl.load(from_out + row * Dv + o_tv, mask=m_tv, other=0.0).to(tl.float32) - b_kj  # [C, BV]
        b_gamma = load_gamma(decays, row, o_g, m_t, C)
        b_j = decayed(b_j, gamma, kept, (slot + i_c) * H + i_h, o_k, m_k, Dk)
        b_j += dot(tl.trans(b_q), rounded(b_do * b_gamma[:, None], DTYPE))

        b_e = load_error(v + t0 * v_strides.t, v_strides.t, errors, row, o_c, o_v, o_tv, m_tv, Dv, BIAS)
        b_square = load_square(squares, row, o_g, m_t, BIAS)
        b_delta = load_delta(delta, row, o_g, o_tv, m_t, m_tv, Dv, BIAS)
        b_psi = biases.value(b_e, b_square, b_delta, BIAS)
        if CHANNEL_LR:
            b_lr = load_lr(lr, row, o_g, o_tv, m_t, m_tv, Dv, CHANNEL_LR)  # [C, BV]
            tl.store(grad_lr + row * Dv + o_tv, b_du * b_psi, mask=m_tv)
            if decays is not None:
                tl.store(rows_to_end + tile_row + row + o_g, -tl.sum(b_kj * (b_psi * b_lr), 1), mask=m_t)
            b_y = b_du * b_lr
        else:
            b_lr = load_gate(lr, row, o_g, m_t)  # [C]
            if reads is None:
                tl.store(rows_lr + tile_row + row + o_g, tl.sum(b_du * b_psi, 1), mask=m_t)
            if decays is not None:
                tl.store(rows_to_end + tile_row + row + o_g, -b_lr * tl.sum(b_kj * b_psi, 1), mask=m_t)
            b_y = b_du * b_lr[:, None]
        b_de = b_y * biases.slope(b_e, b_square, b_delta, BIAS)
        if BIAS.row_coupled:
            b_de += tl.sum(b_y * biases.pull(b_e, b_square, b_delta, BIAS), 1)[:, None] * b_e
        store(grad_v + row * Dv + o_tv, -b_de if reads is None else b_du, m_tv)
        if BIAS.delta > 0:
            b_dd = b_y * biases.slope_delta(b_e, b_square, b_delta, BIAS)
            if BIAS.delta == 2:
                tl.store(grad_delta + row * Dv + o_tv, b_dd, mask=m_tv)
            else:
                tl.store(rows_delta + tile_row + row + o_g, tl.sum(b_dd, 1), mask=m_t)
        if BIAS.reads_memory:
            b_r = b_k if reads is None else load_tile(reads + row * Dk, H * Dk, o_c, o_k, m_t, m_k)  # [C, BK]
            b_j += fitted_dot(tl.trans(b_r), b_de, DTYPE)
    tl.store(grad_initial + state + o_vk, b_j, mask=m_kv)


# -------------------------------------------------------------------------------------------------------------- launchers


class Chain(NamedTuple):
    """The chain's outputs for the parallel kernels."""

    states: Tensor  # [slots, H, Dk, Dv]   S at every chunk's start, or its primal; float32 if streamed, and for float16
    errors: Tensor | None  # [B, T, H, Dv]
    squares: Tensor | None  # [B, T, H] float32   ||e||^2, for a bias that couples a row
    duals: Tensor | None = None  # [slots, H, Dk, Dv] float32   A, under a retention gate
    momenta: Tensor | None = None  # [slots, H, Dk, Dv] float32   S
    scales: Tensor | None = None  # [slots, H] float32   rho of a gate that has one


def empty_chain(p: Problem) -> Chain:
    gated, float32 = p.key.gated, torch.float32
    wide = float32 if p.q.dtype == torch.float16 else None  # float16 overflows on states that decay before they are read
    states = p.per_slot(p.slots, float32 if p.key.streams("linear_chain_fwd") and not gated else wide)
    errors = p.per_token(p.value_dim, dtype=wide) if p.bias.reads_memory else None
    squares = p.per_token(dtype=float32) if p.bias.row_coupled else None
    duals = p.per_slot(p.slots, float32) if gated else None
    momenta = None if p.momentum is None else p.per_slot(p.slots, float32)
    scales = p.empty(p.slots.count, p.heads, dtype=float32) if p.retention.has_rho else None
    return Chain(states, errors, squares, duals, momenta, scales)


def walk(p: Problem, solved: Solved, units: int, initial: tuple[Tensor, ...], part: int, final: Tensor | None, checkpoints: dict) -> None:
    """Run :func:`linear_chain_fwd`, or its streamed form. The problem shares the weights of the call and the tensors to write.

    ``initial``: the matrices ``[units, H, Dv, Dk]`` to start from, all with the same strides; ``final [matrices, N, H, Dk, Dv]``.
    """
    opened = opened_chunk(p) if part == HEAD.value else None
    final, final_momentum = (None, None) if final is None else (*final, None)[:2]
    own = solved.of_chain() | checkpoints | dict(
        reads=solved.reads, PART=part, final=final,
        initial=initial[0], initial_strides=MatrixStrides(*initial[0].stride()), opened=None if opened is None else opened.primals[0],
    )  # fmt: skip
    if not p.key.streams("linear_chain_fwd"):
        launch(linear_chain_fwd, p, units, "value", own)
        return
    own |= dict(
        initial_momentum=initial[1] if len(initial) > 1 else None, final_momentum=final_momentum,
        readouts=opened.readouts[0] if opened and opened.readouts else None,
        opened_scales=opened.scales[0] if opened and opened.scales else None,
    )  # fmt: skip
    launch(linear_chain_fwd_streamed, p, units, "value", own)


def recompute(p: Problem, solved: Solved, checkpoints: Tensor, every: int) -> None:
    """Recompute the chain from the checkpoints, all segments at once. The problem shares what :func:`walk` says."""
    segments, initial = p.segments(p.chunk_size * every), (checkpoints,) if p.momentum is None else checkpoints.unbind(2)
    segmented = dict(
        checkpoints=None, EVERY=every, SEGMENTS=segments.per_sequence, first_segment=segments.first, segment_owner=segments.owner
    )
    walk(p, solved, segments.count, tuple(x.transpose(-1, -2) for x in initial), SEGMENT.value, None, segmented)


class ChainGradients(NamedTuple):
    """Outputs of the chain's backward. ``rows_*`` ``[tiles, B, T, H]`` float32 are sums for the gates' gradients (decays_bwd.py)."""

    states: Tensor  # [slots, H, Dk, Dv]   J; float32 if streamed, and for float16
    momenta: Tensor | None  # [slots, H, Dk, Dv] float32   JS
    v: Tensor  # [B, T, H, Dv]   dV; in exact steps dU, float32 for float16
    initial: list[Tensor]  # [N, H, Dv, Dk]   for the initial dual and, with momentum, the momentum matrix
    lr: Tensor | None  # [B, T, H] or [B, T, H, Dv]; not in exact steps
    delta: Tensor | None  # [B, T, H] or [B, T, H, Dv]
    rows_to_end: Tensor | None  # with decay or momentum, unless decays go by channel
    rows_step: Tensor | None  # with momentum


def chain_gradients(p: Problem, solved: Solved, from_out: Tensor, grad_state: list[Tensor]) -> ChainGradients:
    """Run :func:`linear_chain_bwd`, or its streamed form, from R and the gradients of the final matrices (an empty list: zeros).

    The problem shares the weights of the call, the chain's outputs and ``grad_out``.
    """
    streamed, moving, by_channel = p.key.streams("linear_chain_bwd"), p.momentum is not None, p.key.channels
    kernel, float32 = linear_chain_bwd_streamed if streamed else linear_chain_bwd, torch.float32
    count = tiles(kernel.__name__, p, "value")

    def rows(wanted: bool) -> Tensor | None:
        return p.empty(count, p.batch, p.tokens, p.heads, dtype=float32) if wanted else None

    def channels(wanted: bool) -> Tensor | None:
        return p.result(p.value_dim, dtype=float32) if wanted else None

    channel_lr, delta = p.lr.dim() == 4, p.bias.delta
    rows_lr = None if channel_lr or p.key.exact else p.result(dtype=float32, tiles=count)
    rows_delta = p.result(dtype=float32, tiles=count) if delta == 1 else None
    grad_lr, grad_delta = channels(channel_lr), channels(delta == 2)
    rows_to_end, rows_step = rows(not by_channel and (moving or p.log_decay is not None)), rows(moving)
    wide = float32 if streamed or p.q.dtype == torch.float16 else None
    grad_states, grad_momenta = p.per_slot(p.slots, wide), p.per_slot(p.slots, float32) if moving else None
    grad_v = p.result(p.value_dim, dtype=float32 if p.key.exact and p.q.dtype == torch.float16 else None)
    given = [x.contiguous() for x in grad_state]
    initial = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in p.call.state.matrices()]
    own = dict(
        reads=solved.reads, from_out=from_out,
        grad_final=given[0] if given else None, grad_states=grad_states, grad_v=grad_v, grad_initial=initial[0],
        grad_delta=grad_delta, grad_lr=grad_lr, rows_lr=rows_lr, rows_delta=rows_delta, rows_to_end=rows_to_end,
    )  # fmt: skip
    if streamed:
        own |= dict(
            grad_momenta=grad_momenta, rows_step=rows_step,
            grad_primal=p.empty(p.sequences, p.heads, p.key_dim, p.value_dim, dtype=float32) if p.key.gated else None,
            grad_final_momentum=given[1] if moving and given else None, grad_initial_momentum=initial[1] if moving else None,
        )  # fmt: skip
    launch(kernel, p, p.sequences, "value", own)
    of_lr = grad_lr if rows_lr is None else rows_lr.sum(0)
    of_delta = rows_delta.sum(0) if delta == 1 else grad_delta
    return ChainGradients(grad_states, grad_momenta, grad_v, initial, of_lr, of_delta, rows_to_end, rows_step)
