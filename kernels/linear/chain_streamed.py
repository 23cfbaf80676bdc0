"""The forward chain of the linear memory, for states in memory (docs/mathematics.md, sections 2, 3 and 5).

    W = phi(A);  E = K W - V;  A <- gamma_C A + b_C S - K' (M_C U);  S <- pi_C S - K' (Theta_C U)

`linear_chain_fwd` holds a tile of all keys in registers. Where that does not fit (float32, more than 128 keys, a bias that couples a wide
row of E), this chain computes the same from states in memory, in practice in the L2 cache: it reads a chunk's state tile by tile from its
slot and writes the next chunk's slot, so no address is written twice. If the bias couples a row, one program takes all values in two
passes: first all of E and its row norms, then the update. `states` and `grad_states` are float32.

It also serves calls with more than one matrix: under a retention gate (phi, rho) the chain updates the dual A and predicts with W = phi(A);
with momentum it updates the momentum matrix S too. W is stored in the operands' dtype in `states`, A and S in float32 in `duals` and
`momenta`. The backward is in chain_streamed_bwd.py.

The barriers order a program's own writes before its reads. Loads must not move across them, hence no software pipelining (stages = 1).
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common import bias as biases
from ..common.chunks import HEAD, SEGMENT, chain_program, end_of, head_of, of_chunk, segment_of, slot_of
from ..common.gates import (
    CARRY,
    decayed,
    load_delta,
    load_error,
    load_gate,
    load_lr,
    load_row_weights,
    load_square,
    load_to_end,
    load_total,
)
from ..common.tiles import LENGTHS, dot, fitted, fitted_dot, inside, load_tile, only_if, store, wide
from .mirror import hand_on, mirror, reopen, tile_of


@triton.jit(do_not_specialize=LENGTHS)
def linear_chain_fwd_streamed(
    k, v, lr, decays, moves, delta, reads, kept,
    initial, initial_momentum, opened, readouts, opened_scales, position,
    states, duals, momenta, scales, errors, squares, checkpoints, final, final_momentum,
    cu_seqlens, first_slot, first_segment, segment_owner,
    T, H, CHUNKS, ROW, SEGMENTS, EVERY,
    k_strides, v_strides,
    initial_strides,
    TOKENS: tl.constexpr, C: tl.constexpr, Dk: tl.constexpr, Dv: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DTYPE: tl.constexpr,
    PART: tl.constexpr,
    BIAS: tl.constexpr, CHANNEL_LR: tl.constexpr,
    RETENTION: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """`linear_chain_fwd` for one tile of values, or for all values if the bias or the retention gate couples them.

    Under a retention gate ``duals`` holds A and ``states`` its primal; with momentum ``momenta`` holds S. ``CHANNELS``: decays by channel
    (channel.py).
    """
    ROW = wide(ROW)
    NK: tl.constexpr = (Dk + BK - 1) // BK
    NV: tl.constexpr = (Dv + BV - 1) // BV
    ENTIRE: tl.constexpr = BIAS.row_coupled or RETENTION.matrix_coupled
    PROGRAMS: tl.constexpr = 1 if ENTIRE else NV  # per sequence and head
    TILES: tl.constexpr = NV if ENTIRE else 1  # per program
    MATRICES: tl.constexpr = 1 if momenta is None else 2  # per checkpoint
    i_p, i_s, i_h = chain_program(PROGRAMS)
    i_tile = i_p * TILES
    i_n, i_b, bos, eos, origin, first, last = segment_of(
        i_s, position, cu_seqlens, first_segment, segment_owner, T, SEGMENTS, EVERY, TOKENS, PART
    )
    slot = slot_of(i_n, first_slot, CHUNKS)
    segment_slot = slot_of(i_n, first_segment, SEGMENTS)

    o_c = tl.arange(0, C)
    o_g = o_c * H
    k = head_of(k, k_strides, i_b, i_h)
    v = head_of(v, v_strides, i_b, i_h)
    state = (i_n * H + i_h) * Dk * Dv
    initial += i_s * initial_strides.n + i_h * initial_strides.h
    if momenta is not None:
        initial_momentum += i_s * initial_strides.n + i_h * initial_strides.h
    if duals is None:
        duals = states

    at_first = ((slot + first) * H + i_h) * Dk * Dv
    for j in range(0, TILES * NK):
        o_k, o_v, m_kv = tile_of(j, i_tile, Dk, Dv, BK, BV)
        o_kv, o_initial = o_k[:, None] * Dv + o_v[None, :], o_k[:, None] * initial_strides.k + o_v[None, :] * initial_strides.v
        m_initial = m_kv if PART != SEGMENT else only_if(first < last, m_kv)  # an unused segment has no checkpoint
        b_s = tl.load(initial + o_initial, mask=m_initial, other=0.0)  # [BK, BV]
        hand_on(duals + at_first, o_kv, final, state, o_kv, first < last, b_s, m_kv)
        if momenta is not None:
            b_m = tl.load(initial_momentum + o_initial, mask=m_initial, other=0.0)  # [BK, BV]
            hand_on(momenta + at_first, o_kv, final_momentum, state, o_kv, first < last, b_m, m_kv)
    tl.debug_barrier()

    for i_c in range(first, last):
        t0 = origin + i_c * TOKENS
        end = end_of(t0, eos, C, TOKENS)
        m_t = of_chunk(t0 + o_c, bos, end, PART)
        row = (i_b * T + t0) * H + i_h
        place = (slot + i_c) * H + i_h
        here = place * Dk * Dv
        there = here + H * Dk * Dv

        # W = phi(A)
        if not RETENTION.is_identity:
            if PART == HEAD:
                reopen(readouts, opened_scales, states, scales, place, i_n * H + i_h, i_tile, Dk, Dv, BK, BV, TILES)
            else:
                mirror(duals, states, scales, place, i_tile, Dk, Dv, BK, BV, TILES, RETENTION)
            tl.debug_barrier()

        # E = K W - V
        if BIAS.reads_memory:
            b_square = tl.zeros((C,), tl.float32)
            for j in range(0, TILES):
                o_v = (i_tile + j) * BV + tl.arange(0, BV)
                m_v = inside(o_v, Dv, BV)
                m_tv = m_t[:, None] & m_v[None, :]
                b_e = -load_tile(v + t0 * v_strides.t, v_strides.t, o_c, o_v, m_t, m_v).to(tl.float32)
                for i_k in range(0, NK):
                    o_k = i_k * BK + tl.arange(0, BK)
                    m_k = inside(o_k, Dk, BK)
                    m_kv = m_k[:, None] & m_v[None, :]
                    if reads is None:
                        b_k = load_tile(k + t0 * k_strides.t, k_strides.t, o_c, o_k, m_t, m_k)  # [C, BK]
                    else:
                        b_k = load_tile(reads + row * Dk, H * Dk, o_c, o_k, m_t, m_k)
                    if PART == HEAD:  # a chunk that was open before predicts with its own start
                        b_w = tl.load(opened + state + o_v[None, :] * Dk + o_k[:, None], mask=m_kv, other=0.0)
                    else:
                        b_w = tl.load(states + here + o_k[:, None] * Dv + o_v[None, :], mask=m_kv, other=0.0)  # [BK, BV]
                    b_e += fitted_dot(b_k, b_w, DTYPE)
                store(errors + row * Dv + o_g[:, None] * Dv + o_v[None, :], b_e, m_tv)
                if BIAS.row_coupled:
                    b_square += tl.sum(b_e * b_e, 1)
            if BIAS.row_coupled:
                tl.store(squares + row + o_g, b_square, mask=m_t)
            tl.debug_barrier()

        # A <- gamma_C A + b_C S - K' (dec U);  S <- pi_C S - K' (Theta_C U)
        o_last = (tl.minimum(end - t0, C) - 1) * H
        if not CHANNELS:
            b_to_end = load_to_end(decays, ROW, row, o_g, m_t, C)[:, None]  # [C, 1]
            gamma = load_total(decays, row, o_last)
        if momenta is not None:
            pi, b_step = tl.load(moves + row + o_last), load_gate(moves + ROW, row, o_g, m_t)  # [C]
            if not CHANNELS:
                carry = tl.load(decays + CARRY * ROW + row + o_last)
        b_row = load_square(squares, row, o_g, m_t, BIAS)
        for j in range(0, TILES):
            o_v = (i_tile + j) * BV + tl.arange(0, BV)
            m_v = inside(o_v, Dv, BV)
            o_tv, m_tv = o_g[:, None] * Dv + o_v[None, :], m_t[:, None] & m_v[None, :]
            b_e = load_error(v + t0 * v_strides.t, v_strides.t, errors, row, o_c, o_v, o_tv, m_tv, Dv, BIAS)
            b_delta = load_delta(delta, row, o_g, o_tv, m_t, m_tv, Dv, BIAS)
            b_psi = biases.value(b_e, b_row, b_delta, BIAS)
            b_lr = load_lr(lr, row, o_g, o_tv, m_t, m_tv, Dv, CHANNEL_LR)  # [C, 1] or [C, BV]
            if CHANNELS:
                b_to_end = load_row_weights(decays + ROW * Dv, row, o_g, o_v, m_t, m_v, Dv)  # [C, BV]
                gamma = tl.load(decays + (row + o_last) * Dv + o_v, mask=m_v, other=0.0)[None, :]  # [1, BV]
                if momenta is not None:
                    carry = tl.load(decays + (CARRY * ROW + row + o_last) * Dv + o_v, mask=m_v, other=0.0)[None, :]  # [1, BV]
            b_u, scale = fitted(b_psi * (b_lr * b_to_end), DTYPE)  # [C, BV]
            if momenta is not None:
                b_us, scale_step = fitted(b_psi * (b_lr * b_step[:, None]), DTYPE)  # [C, BV]
            for i_k in range(0, NK):
                o_k = i_k * BK + tl.arange(0, BK)
                m_k = inside(o_k, Dk, BK)
                o_kv, m_kv = o_k[:, None] * Dv + o_v[None, :], m_k[:, None] & m_v[None, :]
                b_k = load_tile(k + t0 * k_strides.t, k_strides.t, o_c, o_k, m_t, m_k)  # [C, BK]
                b_s = tl.load(duals + here + o_kv, mask=m_kv, other=0.0)  # [BK, BV]
                if checkpoints is not None:
                    checkpoint = checkpoints + ((segment_slot + i_c // EVERY) * H + i_h) * (MATRICES * Dk * Dv)
                    tl.store(checkpoint + o_kv, b_s, mask=only_if(i_c % EVERY == 0, m_kv))
                if momenta is None:
                    b_s = decayed(b_s, gamma, kept, place, o_k, m_k, Dk) - dot(tl.trans(b_k), b_u) * scale
                else:
                    b_m = tl.load(momenta + here + o_kv, mask=m_kv, other=0.0)  # [BK, BV]
                    if checkpoints is not None:
                        tl.store(checkpoint + Dk * Dv + o_kv, b_m, mask=only_if(i_c % EVERY == 0, m_kv))
                    b_s = b_s * gamma + b_m * carry - dot(tl.trans(b_k), b_u) * scale
                    b_m = b_m * pi - dot(tl.trans(b_k), b_us) * scale_step
                    hand_on(momenta + there, o_kv, final_momentum, state, o_kv, i_c + 1 < last, b_m, m_kv)
                hand_on(duals + there, o_kv, final, state, o_kv, i_c + 1 < last, b_s, m_kv)
        tl.debug_barrier()
