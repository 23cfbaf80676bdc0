"""The chain of the linear memory with the output in it (docs/mathematics.md, section 2), for calls whose sequences and heads fill a chip.

    linear_chain_fwd_fused   E = K S - V;  U = eta psi(E);  O = gamma (Q S) - (L o Q K') U;  S <- gamma_C S - K' (dec U)

The same function as `linear_chain_fwd` and `linear_output` together. S and U of a chunk are read where they are, in registers, so no
states and no errors go through memory: a forward reads q, k and v and writes the output and the checkpoints. One program per tile of
values walks the chunks of a sequence in order, so that the output, parallel over chunks in read.py, is not: `configs.Key.fuses` decides.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..common import bias as biases
from ..common.chunks import HEAD, chain_program, end_of, head_of, of_chunk, segment_of, slot_of
from ..common.final_state import opened_chunk
from ..common.gates import load_delta, load_gamma, load_gate, load_to_end, load_total, pair_decay
from ..common.launch import MatrixStrides, Problem, launch
from ..common.tiles import LENGTHS, dot, fitted, fitted_dot, inside, load_tile, rounded, store, wide
from .block import Solved


@triton.jit(do_not_specialize=LENGTHS)
def linear_chain_fwd_fused(
    q, k, v, lr, decays, delta, reads,
    initial, opened, position,
    out, checkpoints, final,
    cu_seqlens, first_segment,
    T, H, ROW, SEGMENTS, EVERY,
    q_strides, k_strides, v_strides,
    initial_strides,
    TOKENS: tl.constexpr, C: tl.constexpr, Dk: tl.constexpr, Dv: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DTYPE: tl.constexpr,
    PART: tl.constexpr,
    BIAS: tl.constexpr,
):  # fmt: skip
    """One tile of S, and the same values of the output, through the chunks of one sequence."""
    ROW = wide(ROW)
    NV: tl.constexpr = (Dv + BV - 1) // BV
    i_v, i_n, i_h = chain_program(NV)
    _, i_b, bos, eos, origin, first, last = segment_of(i_n, position, cu_seqlens, None, None, T, SEGMENTS, EVERY, TOKENS, PART)
    segment_slot = slot_of(i_n, first_segment, SEGMENTS)

    o_c, o_k, o_v = tl.arange(0, C), tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    m_k, m_v = inside(o_k, Dk, BK), inside(o_v, Dv, BV)
    m_kv = m_k[:, None] & m_v[None, :]
    o_kv = o_k[:, None] * Dv + o_v[None, :]
    q = head_of(q, q_strides, i_b, i_h)
    k = head_of(k, k_strides, i_b, i_h)
    v = head_of(v, v_strides, i_b, i_h)
    initial += i_n * initial_strides.n + i_h * initial_strides.h
    b_s = tl.load(initial + o_k[:, None] * initial_strides.k + o_v[None, :] * initial_strides.v, mask=m_kv, other=0.0)  # [BK, BV]

    if checkpoints is not None:
        if (first < last) & (first % EVERY == 0):
            tl.store(checkpoints + ((segment_slot + first // EVERY) * H + i_h) * Dk * Dv + o_kv, b_s, mask=m_kv)
    for i_c in range(first, last):
        t0 = origin + i_c * TOKENS
        end = end_of(t0, eos, C, TOKENS)
        o_t = o_c + (i_c >> 30) * 1024  # o_c, but computed in every chunk: kept, its addresses would take the registers of S
        o_g = o_t * H  # of a chunk's token gates
        o_tv = o_g[:, None] * Dv + o_v[None, :]
        left = tl.minimum(end - t0, C).to(tl.int32)
        m_t = of_chunk(o_t, (bos - t0).to(tl.int32), left, PART)
        row = (i_b * T + t0) * H + i_h  # of the chunk's first token in the contiguous [B, T, H, ...] tensors
        m_tv = m_t[:, None] & m_v[None, :]

        b_k = load_tile(k + t0 * k_strides.t, k_strides.t, o_t, o_k, m_t, m_k)  # [C, BK]
        b_v = load_tile(v + t0 * v_strides.t, v_strides.t, o_t, o_v, m_t, m_v)  # [C, BV]
        b_q = load_tile(q + t0 * q_strides.t, q_strides.t, o_t, o_k, m_t, m_k)  # [C, BK]
        b_gamma, gamma = load_gamma(decays, row, o_g, m_t, C), load_total(decays, row, (left - 1) * H)  # early: they are not prefetched
        b_p = dot(b_q, tl.trans(b_k))  # [t, s]
        b_p *= pair_decay(decays, None, ROW, row, H, C, o_t[:, None], o_c[None, :], m_t[:, None], m_t[None, :])
        b_p = rounded(b_p, DTYPE)

        b_w, scale = fitted(b_s, DTYPE)
        if PART == HEAD and BIAS.reads_memory:  # a chunk that was open before predicts with its own start
            b_opened = tl.load(opened + (i_n * H + i_h) * Dk * Dv + o_v[None, :] * Dk + o_k[:, None], mask=m_kv, other=0.0)
            b_e = fitted_dot(b_k, b_opened, DTYPE) - b_v.to(tl.float32)  # [C, BV]
        elif BIAS.reads_memory:
            b_r = b_k if reads is None else load_tile(reads + row * Dk, H * Dk, o_t, o_k, m_t, m_k)  # [C, BK]
            b_e = dot(b_r, b_w) * scale - b_v.to(tl.float32)  # [C, BV]
        else:
            b_e = -b_v.to(tl.float32)
        b_psi = biases.value(b_e, 0.0, load_delta(delta, row, o_g, o_tv, m_t, m_tv, Dv, BIAS), BIAS)  # [C, BV]
        b_lr = load_gate(lr, row, o_g, m_t)  # [C]

        b_o = dot(b_q, b_w) * (b_gamma * scale)[:, None]  # [C, BV]
        b_o -= fitted_dot(b_p, b_psi * b_lr[:, None], DTYPE)
        store(out + row * Dv + o_tv, b_o, m_tv)

        b_u = b_psi * (b_lr * load_to_end(decays, ROW, row, o_g, m_t, C))[:, None]  # [C, BV], rounded as in `linear_chain_fwd`
        b_s = b_s * gamma - fitted_dot(tl.trans(b_k), b_u, DTYPE)
        if checkpoints is not None:  # of the next chunk; here the compiler needs no copy of an older S
            i_next = i_c + 1
            if (i_next < last) & (i_next % EVERY == 0):
                tl.store(checkpoints + ((segment_slot + i_next // EVERY) * H + i_h) * Dk * Dv + o_kv, b_s, mask=m_kv)

    if final is not None:
        tl.store(final + (i_n * H + i_h) * Dk * Dv + o_kv, b_s, mask=m_kv)


# -------------------------------------------------------------------------------------------------------------- launcher


def walk_fused(p: Problem, solved: Solved, initial: Tensor, part: int, out: Tensor, final: Tensor | None, checkpoints: dict) -> None:
    """Run :func:`linear_chain_fwd_fused` from ``initial [N, H, Dv, Dk]``; writes the part's tokens of ``out``, ``final [N, H, Dk, Dv]``."""
    own = solved.of_chain() | checkpoints | dict(
        reads=solved.reads, initial=initial, initial_strides=MatrixStrides(*initial.stride()),
        opened=opened_chunk(p).primals[0] if part == HEAD.value else None, out=out, final=final, PART=part,
    )  # fmt: skip
    launch(linear_chain_fwd_fused, p, p.sequences, "value", own)
