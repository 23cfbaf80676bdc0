"""The two sequential stages of the linear memory for states that no program can hold in its registers.

`linear_state` and `linear_seq` (linear_fwd.py, linear_bwd.py) keep a tile of all keys on the chip. Where that does not fit, in float32,
beyond 128 keys, or for a bias that couples a wide row of E, these two compute the same from states that stay in memory (in practice in
the L2 cache): every chunk's state is read tile by tile from its slot and written to the next chunk's slot, so no address is ever written
twice. A bias that couples a row is served by one program for all values, in two passes: first all of E and its row norms, then the
update. `states` and `grad_states` are float32 here.

The barriers order a program's own writes before its reads; loads must not be moved across them, hence no software pipelining (stages = 1).
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import bias as biases
from .tiles import (
    HEAD,
    LENGTHS,
    SEGMENT,
    dot,
    inside,
    load_delta,
    load_error,
    load_gamma,
    load_gate,
    load_square,
    load_to_end,
    load_total,
    only_if,
    owner_of,
    part_of,
    rounded,
    sequence_of,
    slot_of,
    store,
)


@triton.jit(do_not_specialize=LENGTHS)
def linear_state_streamed(
    k, v, lr, decays, delta,
    initial, opened, position,
    states, errors, squares, checkpoints, final,
    cu_seqlens, first_slot, first_segment, segment_owner,
    T, H, CHUNKS, ROW, SEGMENTS, EVERY,
    stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    stride_in, stride_ih, stride_iv, stride_ik,
    Dk: tl.constexpr, Dv: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DTYPE: tl.constexpr,
    PART: tl.constexpr,
    BIAS: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
    READS: tl.constexpr, COUPLED: tl.constexpr, DELTA: tl.constexpr,
):  # fmt: skip
    """`linear_state` for one tile of values, or for all of them if the bias couples them."""
    NK: tl.constexpr = (Dk + BK - 1) // BK
    NV: tl.constexpr = (Dv + BV - 1) // BV
    PROGRAMS: tl.constexpr = 1 if COUPLED else NV  # for a sequence and head
    TILES: tl.constexpr = NV if COUPLED else 1  # for a program
    i_tile = (tl.program_id(0) % PROGRAMS) * TILES
    i_s = (tl.program_id(0) // PROGRAMS).to(tl.int64)
    i_h = tl.program_id(1).to(tl.int64)
    i_n, i_segment = i_s, i_s * 0
    if PART == SEGMENT:
        i_n, i_segment = owner_of(i_s, first_segment, segment_owner, SEGMENTS)
        if first_segment is not None:
            if i_n < 0:  # a spare slot
                return
    i_b, bos, eos = sequence_of(i_n, cu_seqlens, T)
    origin, first, last = part_of(i_n, i_segment, bos, eos, position, EVERY, C, PART)
    slot = slot_of(i_n, first_slot, CHUNKS)
    segment_slot = slot_of(i_n, first_segment, SEGMENTS)

    o_c = tl.arange(0, C)
    o_g = o_c * H
    k += i_b * stride_kb + i_h * stride_kh
    v += i_b * stride_vb + i_h * stride_vh
    state = (i_n * H + i_h) * Dk * Dv
    initial += i_s * stride_in + i_h * stride_ih

    for j in range(0, TILES * NK):
        o_k, o_v = (j % NK) * BK + tl.arange(0, BK), (i_tile + j // NK) * BV + tl.arange(0, BV)
        o_kv = o_k[:, None] * Dv + o_v[None, :]
        m_kv = inside(o_k, Dk, BK)[:, None] & inside(o_v, Dv, BV)[None, :]
        b_s = tl.load(initial + o_k[:, None] * stride_ik + o_v[None, :] * stride_iv, mask=m_kv, other=0.0)
        tl.store(states + ((slot + first) * H + i_h) * Dk * Dv + o_kv, b_s, mask=only_if(first < last, m_kv))
        if final is not None:
            tl.store(final + state + o_kv, b_s, mask=only_if(first >= last, m_kv))
    tl.debug_barrier()

    for i_c in range(first, last):
        t0 = origin + i_c * C
        m_t = t0 + o_c < eos
        if PART == HEAD:
            m_t = m_t & (t0 + o_c >= bos)
        row = (i_b * T + t0) * H + i_h
        here = states + ((slot + i_c) * H + i_h) * Dk * Dv
        there = here + H * Dk * Dv

        # E = K S - V
        if READS:
            b_square = tl.zeros((C,), tl.float32)
            for j in range(0, TILES):
                o_v = (i_tile + j) * BV + tl.arange(0, BV)
                m_v = inside(o_v, Dv, BV)
                m_tv = m_t[:, None] & m_v[None, :]
                b_e = -tl.load(v + t0 * stride_vt + o_c[:, None] * stride_vt + o_v[None, :], mask=m_tv, other=0.0).to(tl.float32)
                for i_k in range(0, NK):
                    o_k = i_k * BK + tl.arange(0, BK)
                    m_k = inside(o_k, Dk, BK)
                    m_kv = m_k[:, None] & m_v[None, :]
                    p_k = k + t0 * stride_kt + o_c[:, None] * stride_kt + o_k[None, :]
                    b_k = tl.load(p_k, mask=m_t[:, None] & m_k[None, :], other=0.0)  # [C, BK]
                    if PART == HEAD:  # the errors of a chunk that was open before are taken at its own start
                        b_w = tl.load(opened + state + o_v[None, :] * Dk + o_k[:, None], mask=m_kv, other=0.0)
                    else:
                        b_w = tl.load(here + o_k[:, None] * Dv + o_v[None, :], mask=m_kv, other=0.0)  # [BK, BV]
                    b_e += dot(b_k, rounded(b_w, DTYPE))
                store(errors + row * Dv + o_g[:, None] * Dv + o_v[None, :], b_e, m_tv)
                if COUPLED:
                    b_square += tl.sum(b_e * b_e, 1)
            if COUPLED:
                tl.store(squares + row + o_g, b_square, mask=m_t)
            tl.debug_barrier()

        # S <- gamma_C S - K' (dec eta psi(E))
        b_weight = load_gate(lr, row, o_g, m_t) * load_to_end(decays, ROW, row, o_g, m_t, C)  # [C]
        gamma = load_total(decays, row, (tl.minimum(eos - t0, C) - 1) * H)
        b_row = load_square(squares, row, o_g, m_t, COUPLED)
        for j in range(0, TILES):
            o_v = (i_tile + j) * BV + tl.arange(0, BV)
            m_v = inside(o_v, Dv, BV)
            o_tv, m_tv = o_g[:, None] * Dv + o_v[None, :], m_t[:, None] & m_v[None, :]
            b_e = load_error(v + t0 * stride_vt, stride_vt, errors, row, o_c, o_v, o_tv, m_tv, Dv, READS)
            b_delta = load_delta(delta, row, o_g, o_tv, m_t, m_tv, Dv, DELTA)
            b_u = rounded(biases.value(b_e, b_row, b_delta, BIAS, P0, P1, P2) * b_weight[:, None], DTYPE)  # [C, BV]
            for i_k in range(0, NK):
                o_k = i_k * BK + tl.arange(0, BK)
                m_k = inside(o_k, Dk, BK)
                o_kv, m_kv = o_k[:, None] * Dv + o_v[None, :], m_k[:, None] & m_v[None, :]
                p_k = k + t0 * stride_kt + o_c[:, None] * stride_kt + o_k[None, :]
                b_k = tl.load(p_k, mask=m_t[:, None] & m_k[None, :], other=0.0)  # [C, BK]
                b_s = tl.load(here + o_kv, mask=m_kv, other=0.0)  # [BK, BV]
                if checkpoints is not None:
                    kept = checkpoints + ((segment_slot + i_c // EVERY) * H + i_h) * Dk * Dv
                    tl.store(kept + o_kv, b_s, mask=only_if(i_c % EVERY == 0, m_kv))
                b_s = b_s * gamma - dot(tl.trans(b_k), b_u)
                tl.store(there + o_kv, b_s, mask=only_if(i_c + 1 < last, m_kv))
                if final is not None:
                    tl.store(final + state + o_kv, b_s, mask=only_if(i_c + 1 == last, m_kv))
        tl.debug_barrier()


@triton.jit(do_not_specialize=LENGTHS)
def linear_seq_streamed(
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
    """`linear_seq` for one tile of values, or for all of them if the bias couples them. `grad_v` holds dU between the passes."""
    NK: tl.constexpr = (Dk + BK - 1) // BK
    NV: tl.constexpr = (Dv + BV - 1) // BV
    PROGRAMS: tl.constexpr = 1 if COUPLED else NV  # for a sequence and head
    TILES: tl.constexpr = NV if COUPLED else 1  # for a program
    i_p = tl.program_id(0) % PROGRAMS
    i_tile = i_p * TILES
    i_n = (tl.program_id(0) // PROGRAMS).to(tl.int64)
    i_h = tl.program_id(1).to(tl.int64)
    i_b, bos, eos = sequence_of(i_n, cu_seqlens, T)
    chunks = ((eos - bos + C - 1) // C).to(tl.int32)
    slot = slot_of(i_n, first_slot, CHUNKS)

    o_c = tl.arange(0, C)
    o_g = o_c * H
    q += i_b * stride_qb + i_h * stride_qh
    k += i_b * stride_kb + i_h * stride_kh
    v += i_b * stride_vb + i_h * stride_vh
    state = (i_n * H + i_h) * Dk * Dv
    tile_row = i_p.to(tl.int64) * ROW

    for j in range(0, TILES * NK):
        o_k, o_v = (j % NK) * BK + tl.arange(0, BK), (i_tile + j // NK) * BV + tl.arange(0, BV)
        m_kv = inside(o_k, Dk, BK)[:, None] & inside(o_v, Dv, BV)[None, :]
        b_j = tl.zeros((BK, BV), tl.float32)
        if grad_final is not None:
            b_j += tl.load(grad_final + state + o_v[None, :] * Dk + o_k[:, None], mask=m_kv, other=0.0)
        p_j = grad_states + ((slot + chunks - 1) * H + i_h) * Dk * Dv + o_k[:, None] * Dv + o_v[None, :]
        tl.store(p_j, b_j, mask=only_if(chunks > 0, m_kv))
        tl.store(grad_initial + state + o_v[None, :] * Dk + o_k[:, None], b_j, mask=only_if(chunks == 0, m_kv))
    tl.debug_barrier()

    for i in range(0, chunks):
        i_c = chunks - 1 - i
        t0 = bos + i_c * C
        m_t = t0 + o_c < eos
        row = (i_b * T + t0) * H + i_h
        here = grad_states + ((slot + i_c) * H + i_h) * Dk * Dv
        there = here - H * Dk * Dv

        # dU = R - dec (K J), and what a row of it sums to
        b_to_end = load_to_end(decays, ROW, row, o_g, m_t, C)  # [C]
        b_lr = load_gate(lr, row, o_g, m_t)  # [C]
        b_square = load_square(squares, row, o_g, m_t, COUPLED)
        b_dlr = tl.zeros((C,), tl.float32)
        b_kept = tl.zeros((C,), tl.float32)
        b_dd_row = tl.zeros((C,), tl.float32)
        b_along = tl.zeros((C,), tl.float32)
        for j in range(0, TILES):
            o_v = (i_tile + j) * BV + tl.arange(0, BV)
            m_v = inside(o_v, Dv, BV)
            o_tv, m_tv = o_g[:, None] * Dv + o_v[None, :], m_t[:, None] & m_v[None, :]
            b_kj = tl.zeros((C, BV), tl.float32)
            for i_k in range(0, NK):
                o_k = i_k * BK + tl.arange(0, BK)
                m_k = inside(o_k, Dk, BK)
                p_k = k + t0 * stride_kt + o_c[:, None] * stride_kt + o_k[None, :]
                b_k = tl.load(p_k, mask=m_t[:, None] & m_k[None, :], other=0.0)  # [C, BK]
                b_j = tl.load(here + o_k[:, None] * Dv + o_v[None, :], mask=m_k[:, None] & m_v[None, :], other=0.0)  # [BK, BV]
                b_kj += dot(b_k, rounded(b_j, DTYPE))
            b_kj *= b_to_end[:, None]
            b_du = tl.load(from_out + row * Dv + o_tv, mask=m_tv, other=0.0).to(tl.float32) - b_kj  # [C, BV]
            store(grad_v + row * Dv + o_tv, b_du, m_tv)
            b_e = load_error(v + t0 * stride_vt, stride_vt, errors, row, o_c, o_v, o_tv, m_tv, Dv, READS)
            b_delta = load_delta(delta, row, o_g, o_tv, m_t, m_tv, Dv, DELTA)
            b_psi = biases.value(b_e, b_square, b_delta, BIAS, P0, P1, P2)
            b_dlr += tl.sum(b_du * b_psi, 1)
            b_kept -= tl.sum(b_kj * b_psi, 1)
            if DELTA > 0:
                b_dd = b_du * b_lr[:, None] * biases.slope_delta(b_e, b_square, b_delta, BIAS, P0)
                if DELTA == 2:
                    tl.store(grad_delta + row * Dv + o_tv, b_dd, mask=m_tv)
                else:
                    b_dd_row += tl.sum(b_dd, 1)
            if COUPLED:
                b_along += tl.sum(b_du * b_e, 1)
        tl.store(rows_lr + tile_row + row + o_g, b_dlr, mask=m_t)
        if decays is not None:
            tl.store(rows_kept + tile_row + row + o_g, b_lr * b_kept, mask=m_t)
        if DELTA == 1:
            tl.store(rows_delta + tile_row + row + o_g, b_dd_row, mask=m_t)
        tl.debug_barrier()

        # dE = psi'(E) (eta dU);  J <- gamma_C J + Q' (gamma dO) + K' dE
        b_gamma = load_gamma(decays, row, o_g, m_t, C)
        gamma = load_total(decays, row, (tl.minimum(eos - t0, C) - 1) * H)
        for j in range(0, TILES):
            o_v = (i_tile + j) * BV + tl.arange(0, BV)
            m_v = inside(o_v, Dv, BV)
            o_tv, m_tv = o_g[:, None] * Dv + o_v[None, :], m_t[:, None] & m_v[None, :]
            b_y = tl.load(grad_v + row * Dv + o_tv, mask=m_tv, other=0.0).to(tl.float32) * b_lr[:, None]
            b_e = load_error(v + t0 * stride_vt, stride_vt, errors, row, o_c, o_v, o_tv, m_tv, Dv, READS)
            b_delta = load_delta(delta, row, o_g, o_tv, m_t, m_tv, Dv, DELTA)
            b_de = b_y * biases.slope(b_e, b_square, b_delta, BIAS, P0, P1, P2)  # [C, BV]
            if COUPLED:
                b_de += biases.pull(b_square, b_delta, BIAS, P0) * (b_along * b_lr)[:, None] * b_e
            b_do = tl.load(grad_out + row * Dv + o_tv, mask=m_tv, other=0.0).to(tl.float32) * b_gamma[:, None]
            b_do = rounded(b_do, DTYPE)  # [C, BV]
            for i_k in range(0, NK):
                o_k = i_k * BK + tl.arange(0, BK)
                m_k = inside(o_k, Dk, BK)
                m_tk, m_kv = m_t[:, None] & m_k[None, :], m_k[:, None] & m_v[None, :]
                b_q = tl.load(q + t0 * stride_qt + o_c[:, None] * stride_qt + o_k[None, :], mask=m_tk, other=0.0)  # [C, BK]
                b_j = tl.load(here + o_k[:, None] * Dv + o_v[None, :], mask=m_kv, other=0.0) * gamma  # [BK, BV]
                b_j += dot(tl.trans(b_q), b_do)
                if READS:
                    b_k = tl.load(k + t0 * stride_kt + o_c[:, None] * stride_kt + o_k[None, :], mask=m_tk, other=0.0)  # [C, BK]
                    b_j += dot(tl.trans(b_k), rounded(b_de, DTYPE))
                tl.store(there + o_k[:, None] * Dv + o_v[None, :], b_j, mask=only_if(i_c > 0, m_kv))
                tl.store(grad_initial + state + o_v[None, :] * Dk + o_k[:, None], b_j, mask=only_if(i_c == 0, m_kv))
            store(grad_v + row * Dv + o_tv, -b_de, m_tv)
        tl.debug_barrier()
