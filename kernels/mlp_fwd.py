"""The MLP memory forward (SPEC section 5): one program a sequence and head, walking its chunks.

    Z = K W2';  A = gelu(Z);  U = A S1;  E = K + LN(U) - V;  g = psi(E)                       predict
    Gu = LN-vjp(w g);  Ga = Gu S1';  Gz = Ga o gelu'(Z)                                       the inner gradients
    Zq = gamma (Q W2') - (L o Q K') (eta Gz);  Aq = gelu(Zq)
    O = Q + LN(gamma (Aq S1) - (L o Aq A') (eta Gu))                                          read
    S1 <- gamma_C S1 - A' (dec eta Gu);   W2 <- gamma_C W2 - (dec eta Gz)' K                  write

``S1 = W1' [Hd, D]`` and ``W2 [Hd, D]`` lie side by side in ``memory [.., 2, Hd, D]`` float32, which belongs to the program: it is
read and written in place, ``BH`` hidden units at a time, and never grows, so that it stays in the caches of the chip. Three passes over
the hidden units make a chunk: predict, read, write. The barriers between them order what threads wrote for each other.

No tile that a matrix product left in registers is transposed into another product: the compilers of several Triton releases get
that wrong. Where a product needs it, the transposed tile is computed (``Ga'``) or read back from memory (``Z'``, ``Gu'``).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import bias as biases
from .decays import chunk_decays
from .launch import Problem, launch
from .linear_fwd import Final, open_chunk_end
from .mlp_math import decayed_scores, gelu, gelu_slope, layer_norm_vjp, normalised
from .tiles import (
    BODY,
    HEAD,
    LENGTHS,
    SEGMENT,
    TAIL,
    WHOLE,
    dot,
    inside,
    load_delta,
    load_gamma,
    load_gate,
    load_to_end,
    load_total,
    only_if,
    pair_decay,
    part_of,
    rounded,
    sequence_of,
    slot_of,
    store,
)


@triton.jit(do_not_specialize=LENGTHS)
def mlp_chain(
    q, k, v, lr, decays, delta, ln_weight, ln_bias,
    memory, opened, position,
    hidden, updates, scores, checkpoints, states, sums, out,
    cu_seqlens, first_segment,
    T, H, ROW, SEGMENTS, EVERY, FIRST, GROUP,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    D: tl.constexpr, Hd: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr, DTYPE: tl.constexpr, EPS: tl.constexpr,
    PART: tl.constexpr,
    BIAS: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
    READS: tl.constexpr, COUPLED: tl.constexpr, DELTA: tl.constexpr,
):  # fmt: skip
    """One memory through the chunks of one sequence, or of one of its segments.

    A segment (``PART == SEGMENT``) keeps of every chunk what the backward reads: ``states`` before it, Z in ``hidden``, Gu in
    ``updates``, U in ``sums``. Otherwise ``hidden`` and ``updates`` hold one chunk, and ``out`` is written.
    """
    NH: tl.constexpr = (Hd + BH - 1) // BH
    SIZE: tl.constexpr = Hd * D
    i_s = tl.program_id(0).to(tl.int64)
    i_h = tl.program_id(1).to(tl.int64)
    i_n, i_segment = i_s, i_s * 0
    if PART == SEGMENT:
        i_n, i_segment = i_s // GROUP, FIRST + i_s % GROUP
    i_b, bos, eos = sequence_of(i_n, cu_seqlens, T)
    origin, first, last = part_of(i_n, i_segment, bos, eos, position, EVERY, C, PART)
    segment_slot = slot_of(i_n, first_segment, SEGMENTS)

    o_c, o_d = tl.arange(0, C), tl.arange(0, BD)
    m_d = inside(o_d, D, BD)
    o_g, o_cd, o_cc = o_c * H, o_c[:, None] * D + o_d[None, :], o_c[:, None] * C + o_c[None, :]
    o_td = o_g[:, None] * D + o_d[None, :]
    q += i_b * stride_qb + i_h * stride_qh
    k += i_b * stride_kb + i_h * stride_kh
    v += i_b * stride_vb + i_h * stride_vh
    memory += (i_s * H + i_h) * 2 * SIZE
    predicting = memory
    if PART == HEAD:  # a chunk that was open before takes its gradients at its own start
        predicting = opened + (i_s * H + i_h) * 2 * SIZE

    for i_c in tl.range(first, last, disable_licm=True):
        t0 = origin + i_c * C
        m_t = t0 + o_c < eos
        if PART == HEAD:
            m_t = m_t & (t0 + o_c >= bos)
        row = (i_b * T + t0) * H + i_h  # of the chunk's first token in the contiguous [B, T, H, ...] tensors
        m_td = m_t[:, None] & m_d[None, :]
        place = i_s
        if PART == SEGMENT:
            place = i_s * EVERY + i_c - first
        place = place * H + i_h
        p_z, p_gu = hidden + place * C * Hd, updates + place * C * D
        b_k = tl.load(k + t0 * stride_kt + o_c[:, None] * stride_kt + o_d[None, :], mask=m_td, other=0.0)  # [C, BD]

        if out is not None:
            b_q = tl.load(q + t0 * stride_qt + o_c[:, None] * stride_qt + o_d[None, :], mask=m_td, other=0.0)  # [C, BD]
            store(scores + place * C * C + o_cc, decayed_scores(b_q, b_k, decays, None, ROW, row, H, C, o_c, m_t), None)  # [t, s]

        # predict
        b_u = tl.zeros((C, BD), tl.float32)
        for i in tl.range(0, NH, disable_licm=True):
            o_h = i * BH + tl.arange(0, BH)
            m_h = inside(o_h, Hd, BH)
            o_hd, m_hd = o_h[:, None] * D + o_d[None, :], m_h[:, None] & m_d[None, :]
            b_s1 = tl.load(predicting + o_hd, mask=m_hd, other=0.0)  # [BH, BD]
            b_w2 = tl.load(predicting + SIZE + o_hd, mask=m_hd, other=0.0)  # [BH, BD]
            b_z = dot(b_k, tl.trans(rounded(b_w2, DTYPE)))  # [C, BH]
            store(p_z + o_c[:, None] * Hd + o_h[None, :], b_z, m_h[None, :])
            b_u += dot(rounded(gelu(b_z), DTYPE), rounded(b_s1, DTYPE))
            if checkpoints is not None:
                kept = checkpoints + ((segment_slot + i_c // EVERY) * H + i_h) * 2 * SIZE
                tl.store(kept + o_hd, b_s1, mask=only_if(i_c % EVERY == 0, m_hd))
                tl.store(kept + SIZE + o_hd, b_w2, mask=only_if(i_c % EVERY == 0, m_hd))
            if PART == SEGMENT:
                store(states + place * 2 * SIZE + o_hd, b_s1, m_hd)
                store(states + place * 2 * SIZE + SIZE + o_hd, b_w2, m_hd)

        # the inner gradient
        b_weight = tl.load(ln_weight + i_h * D + o_d, mask=m_d, other=0.0)[None, :]  # [1, BD]
        b_bias = tl.load(ln_bias + i_h * D + o_d, mask=m_d, other=0.0)[None, :]  # [1, BD]
        b_x, b_inverse = normalised(b_u, m_d, D, EPS)
        b_e = -tl.load(v + t0 * stride_vt + o_c[:, None] * stride_vt + o_d[None, :], mask=m_td, other=0.0).to(tl.float32)
        if READS:
            b_e = tl.where(m_td, b_e + b_k.to(tl.float32) + b_x * b_weight + b_bias, 0.0)  # [C, BD]
        b_square = 0.0
        if COUPLED:
            b_square = tl.sum(b_e * b_e, 1)[:, None]  # [C, 1]
        b_delta = load_delta(delta, row, o_g, o_td, m_t, m_td, D, DELTA)
        b_psi = biases.value(b_e, b_square, b_delta, BIAS, P0, P1, P2)
        store(p_gu + o_cd, layer_norm_vjp(b_x, b_inverse, b_psi * b_weight, m_d, D), m_d[None, :])
        if PART == SEGMENT:
            tl.store(sums + place * C * D + o_cd, b_u, mask=m_d[None, :])
        tl.debug_barrier()

        # read
        if out is not None:
            b_gu = tl.load(p_gu + o_cd, mask=m_d[None, :], other=0.0)  # [C, BD]
            b_lr = load_gate(lr, row, o_g, m_t)  # [C]
            b_gamma = load_gamma(decays, row, o_g, m_t, C)  # [C]
            b_q = tl.load(q + t0 * stride_qt + o_c[:, None] * stride_qt + o_d[None, :], mask=m_td, other=0.0)  # [C, BD]
            b_p = tl.load(scores + place * C * C + o_cc)  # [t, s]
            b_uq = tl.zeros((C, BD), tl.float32)
            b_scores = tl.zeros((C, C), tl.float32)  # Aq A'
            for i in tl.range(0, NH, disable_licm=True):
                o_h = i * BH + tl.arange(0, BH)
                m_h = inside(o_h, Hd, BH)
                o_hd, m_hd = o_h[:, None] * D + o_d[None, :], m_h[:, None] & m_d[None, :]
                b_z = tl.load(p_z + o_c[:, None] * Hd + o_h[None, :], mask=m_h[None, :], other=0.0).to(tl.float32)  # [C, BH]
                b_back = rounded(tl.load(predicting + o_hd, mask=m_hd, other=0.0), DTYPE)  # [BH, BD]
                b_gz = rounded(dot(b_gu, tl.trans(b_back)) * gelu_slope(b_z) * b_lr[:, None], DTYPE)  # [C, BH]
                b_w2 = rounded(tl.load(memory + SIZE + o_hd, mask=m_hd, other=0.0), DTYPE)  # [BH, BD]
                b_zq = dot(b_q, tl.trans(b_w2)) * b_gamma[:, None] - dot(b_p, b_gz)
                b_aq = rounded(gelu(b_zq), DTYPE)
                if PART == HEAD:
                    b_back = rounded(tl.load(memory + o_hd, mask=m_hd, other=0.0), DTYPE)
                b_uq += dot(b_aq, b_back)
                b_scores += dot(b_aq, tl.trans(rounded(gelu(b_z), DTYPE)))
            tl.debug_barrier()
            b_scores *= pair_decay(decays, None, ROW, row, H, C, o_c[:, None], o_c[None, :], m_t[:, None], m_t[None, :])
            b_gu = tl.load(p_gu + o_cd, mask=m_d[None, :], other=0.0)  # [C, BD]
            b_uq = b_uq * b_gamma[:, None] - dot(rounded(b_scores, DTYPE), rounded(b_gu.to(tl.float32) * b_lr[:, None], DTYPE))
            b_weight = tl.load(ln_weight + i_h * D + o_d, mask=m_d, other=0.0)[None, :]  # [1, BD]
            b_bias = tl.load(ln_bias + i_h * D + o_d, mask=m_d, other=0.0)[None, :]  # [1, BD]
            b_xq, _ = normalised(b_uq, m_d, D, EPS)
            b_q = tl.load(q + t0 * stride_qt + o_c[:, None] * stride_qt + o_d[None, :], mask=m_td, other=0.0)  # [C, BD]
            store(out + row * D + o_td, b_q.to(tl.float32) + b_xq * b_weight + b_bias, m_td)
            tl.debug_barrier()

        # write
        b_gu = tl.load(p_gu + o_cd, mask=m_d[None, :], other=0.0)  # [C, BD]
        b_k = tl.load(k + t0 * stride_kt + o_c[:, None] * stride_kt + o_d[None, :], mask=m_td, other=0.0)  # [C, BD]
        b_end = load_gate(lr, row, o_g, m_t) * load_to_end(decays, ROW, row, o_g, m_t, C)  # [C]
        gamma = load_total(decays, row, (tl.minimum(eos - t0, C) - 1) * H)
        b_u_end = rounded(b_gu.to(tl.float32) * b_end[:, None], DTYPE)
        for i in tl.range(0, NH, disable_licm=True):
            o_h = i * BH + tl.arange(0, BH)
            m_h = inside(o_h, Hd, BH)
            o_hd, m_hd = o_h[:, None] * D + o_d[None, :], m_h[:, None] & m_d[None, :]
            b_z = tl.load(p_z + o_c[None, :] * Hd + o_h[:, None], mask=m_h[:, None], other=0.0).to(tl.float32)  # [BH, C]
            b_s1 = tl.load(memory + o_hd, mask=m_hd, other=0.0)  # [BH, BD]
            b_w2 = tl.load(memory + SIZE + o_hd, mask=m_hd, other=0.0)  # [BH, BD]
            b_back = b_s1
            if PART == HEAD:
                b_back = tl.load(predicting + o_hd, mask=m_hd, other=0.0)
            b_gz = dot(rounded(b_back, DTYPE), tl.trans(b_gu)) * gelu_slope(b_z) * b_end[None, :]  # [BH, C]
            tl.store(memory + o_hd, b_s1 * gamma - dot(rounded(gelu(b_z), DTYPE), b_u_end), mask=m_hd)
            tl.store(memory + SIZE + o_hd, b_w2 * gamma - dot(rounded(b_gz, DTYPE), b_k), mask=m_hd)
        tl.debug_barrier()


# --------------------------------------------------------------------------------------------------------------- launcher


class Group(NamedTuple):
    """What a group of segments leaves for the backward: for every chunk of ``[N, segments, every]`` and head ..."""

    states: Tensor  # [chunks, H, 2, Hd, D]   S1 and W2 before the chunk
    hidden: Tensor  # [chunks, H, C, Hd]   Z
    updates: Tensor  # [chunks, H, C, D]   Gu
    sums: Tensor  # [chunks, H, C, D] float32   U


def forward(p: Problem, every: int, wants_final: bool, may_end_open: bool) -> tuple[Tensor, Final | None, Tensor | None]:
    """``(out, final state, checkpoints)``: both matrices of every ``every``-th chunk ``[slots, H, 2, Hd, D]`` float32, if every > 0."""
    decays, out, memory = chunk_decays(p), p.per_token(p.value_dim), together(p.call.state.dual)
    segments = p.pieces(p.chunk_size * max(every, 1))
    checkpoints = p.empty(segments.count, *memory.shape[1:], dtype=torch.float32) if every else None

    def walk(part: int) -> None:
        opened = together(p.call.state.open_chunk.start) if part == HEAD.value else None
        hidden, updates, scores = (p.empty(p.sequences, p.heads, p.chunk_size, d) for d in (p.hidden, p.value_dim, p.chunk_size))
        _launch_chain(
            p, p.sequences, part, decays=decays, memory=memory, opened=opened, hidden=hidden, updates=updates, scores=scores,
            checkpoints=checkpoints, states=None, sums=None, out=out,
            first_segment=segments.first, SEGMENTS=segments.per_sequence, EVERY=max(every, 1), FIRST=0, GROUP=1,
        )  # fmt: skip

    if p.position is None and not may_end_open:
        walk(WHOLE.value)
        return out, Final(apart(memory)) if wants_final else None, checkpoints
    if p.position is not None:
        walk(HEAD.value)
    walk(BODY.value)
    start = apart(memory.clone())
    walk(TAIL.value)
    return out, Final(apart(memory), *open_chunk_end(p, start)), checkpoints


def recompute(p: Problem, decays: Tensor | None, checkpoints: Tensor, every: int, first: int, count: int) -> Group:
    """Segments ``first ... first + count`` of every sequence again, all at once."""
    segments = p.pieces(p.chunk_size * every)
    of_group = torch.arange(first, first + count, device=checkpoints.device)
    starts = segments.first if segments.first is not None else torch.arange(p.sequences, device=checkpoints.device) * segments.per_sequence
    memory = checkpoints[(starts[:, None] + of_group).flatten().clamp_max(segments.count - 1)]
    chunks, c = p.sequences * count * every, p.chunk_size
    group = Group(
        p.empty(chunks, *memory.shape[1:]), p.empty(chunks, p.heads, c, p.hidden), p.empty(chunks, p.heads, c, p.value_dim),
        p.empty(chunks, p.heads, c, p.value_dim, dtype=torch.float32),
    )  # fmt: skip
    _launch_chain(
        p, p.sequences * count, SEGMENT.value, decays=decays, memory=memory, opened=None, **group._asdict(), scores=None, checkpoints=None,
        out=None,        first_segment=segments.first, SEGMENTS=segments.per_sequence, EVERY=every, FIRST=first, GROUP=count,
    )  # fmt: skip
    return group


def together(matrices: tuple[Tensor, ...]) -> Tensor:
    """``W1 [N, H, D, Hd], W2 [N, H, Hd, D] -> [N, H, 2, Hd, D]``, W1 transposed; a copy."""
    return torch.stack([matrices[0].transpose(-1, -2), matrices[1]], 2)


def apart(memory: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`together`; views."""
    return memory[:, :, 0].transpose(-1, -2), memory[:, :, 1]


def _launch_chain(p: Problem, units: int, part: int, **arguments) -> None:
    launch(
        mlp_chain, p, units, "hidden",
        q=p.q, k=p.k, v=p.v, lr=p.lr, delta=p.delta, **p.layer_norm, position=p.position, cu_seqlens=p.cu_seqlens, ROW=p.row,
        **p.strides("q", "k", "v"), PART=part, **p.sizes, **p.bias, **arguments,
    )  # fmt: skip
