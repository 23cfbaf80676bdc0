"""The backward chain of the linear memory for states in memory, in stages (docs/mathematics.md, sections 5 to 7).

    dU = rho R - M_C (K J) - Theta_C (K JS);  d rho = sum R o U                                      update_bwd
    dE = psi'(E) (eta dU);  dW = Q' (gamma dO) + K' dE;  d rho += <Q' (b dO), S>                     step_back
    J <- gamma_C J + phi'^T dW;  JS <- b_C J + pi_C JS + rho Q' (b dO)                               step_back
    J <- gamma_C J + phi'^T dW + d rho d rho / dA, for a gate that couples entries                   pull_back (mirror.py)

The forward is in chain_streamed.py. ``grad_v`` passes dU from the first stage to the second, which replaces it by dV.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common import bias as biases
from ..common import retention as retentions
from ..common.chunks import chain_program, end_of, head_of, sequence_of, slot_of
from ..common.gates import (
    CARRY,
    decayed,
    load_delta,
    load_error,
    load_gamma,
    load_gate,
    load_lr,
    load_row_weights,
    load_scale,
    load_square,
    load_to_end,
    load_total,
)
from ..common.tiles import LENGTHS, dot, fitted_dot, inside, load_tile, rounded, store, wide
from .mirror import hand_on, pull_back, tile_of


@triton.jit
def begin(
    grad_final, grad_final_momentum, momenta, grad_states, grad_momenta, grad_initial, grad_initial_momentum,
    at_last, state, i_tile, any_chunk,
    Dk: tl.constexpr, Dv: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """J and JS after the last chunk: the gradients of the final matrices, or 0."""
    NK: tl.constexpr = (Dk + BK - 1) // BK
    for j in range(0, TILES * NK):
        o_k, o_v, m_kv = tile_of(j, i_tile, Dk, Dv, BK, BV)
        o_kv, o_vk = o_k[:, None] * Dv + o_v[None, :], o_v[None, :] * Dk + o_k[:, None]
        b_j = tl.zeros((BK, BV), tl.float32)
        if grad_final is not None:
            b_j += tl.load(grad_final + state + o_vk, mask=m_kv, other=0.0)
        hand_on(grad_states + at_last, o_kv, grad_initial, state, o_vk, any_chunk, b_j, m_kv)
        if momenta is not None:
            b_m = tl.zeros((BK, BV), tl.float32)
            if grad_final is not None:
                b_m += tl.load(grad_final_momentum + state + o_vk, mask=m_kv, other=0.0)
            hand_on(grad_momenta + at_last, o_kv, grad_initial_momentum, state, o_vk, any_chunk, b_m, m_kv)


@triton.jit
def update_bwd(
    p_k, k_stride, p_v, v_stride, lr, decays, moves, delta, momenta, scales, errors, squares, from_out, grad_states, grad_momenta, grad_v,
    grad_delta, grad_lr, rows_lr, rows_delta, rows_to_end, rows_step,
    ROW, row, tile_row, here, rho, m_t, i_tile, H,
    C: tl.constexpr, Dk: tl.constexpr, Dv: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, TILES: tl.constexpr, DTYPE: tl.constexpr,
    BIAS: tl.constexpr, CHANNEL_LR: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """dU in ``grad_v``, the gradients of eta and delta, and the row sums for the other gates.

    Returns the first part of d rho and, for a bias that couples rows, ``||e||^2 [C, 1]`` and ``(eta dU) . pull [C]``.
    """
    NK: tl.constexpr = (Dk + BK - 1) // BK
    o_c = tl.arange(0, C)
    o_g = o_c * H
    drho = 0.0
    if not CHANNELS:
        b_to_end = load_to_end(decays, ROW, row, o_g, m_t, C)[:, None]  # [C, 1]
    if not CHANNEL_LR:
        b_lr = load_gate(lr, row, o_g, m_t)  # [C]
    if momenta is not None:
        b_step = load_gate(moves + ROW, row, o_g, m_t)  # [C]
        b_stepped = tl.zeros((C,), tl.float32)
    b_square = load_square(squares, row, o_g, m_t, BIAS)
    b_dlr = tl.zeros((C,), tl.float32)
    b_end_sum = tl.zeros((C,), tl.float32)
    b_dd_row = tl.zeros((C,), tl.float32)
    b_along = tl.zeros((C,), tl.float32)
    for j in range(0, TILES):
        o_v = (i_tile + j) * BV + tl.arange(0, BV)
        m_v = inside(o_v, Dv, BV)
        o_tv, m_tv = o_g[:, None] * Dv + o_v[None, :], m_t[:, None] & m_v[None, :]
        b_kj = tl.zeros((C, BV), tl.float32)
        b_km = tl.zeros((C, BV), tl.float32)
        for i_k in range(0, NK):
            o_k = i_k * BK + tl.arange(0, BK)
            m_k = inside(o_k, Dk, BK)
            b_k = load_tile(p_k, k_stride, o_c, o_k, m_t, m_k)  # [C, BK]
            o_kv, m_kv = o_k[:, None] * Dv + o_v[None, :], m_k[:, None] & m_v[None, :]
            b_j = tl.load(grad_states + here + o_kv, mask=m_kv, other=0.0)  # [BK, BV]
            b_kj += fitted_dot(b_k, b_j, DTYPE)
            if momenta is not None:
                b_km += fitted_dot(b_k, tl.load(grad_momenta + here + o_kv, mask=m_kv, other=0.0), DTYPE)
        if CHANNELS:
            b_to_end = load_row_weights(decays + ROW * Dv, row, o_g, o_v, m_t, m_v, Dv)  # [C, BV]
        b_r = tl.load(from_out + row * Dv + o_tv, mask=m_tv, other=0.0).to(tl.float32)  # [C, BV]
        if momenta is None:
            b_kj *= b_to_end
            b_du = b_r * rho - b_kj  # [C, BV]
        else:
            b_du = b_r * rho - b_kj * b_to_end - b_km * b_step[:, None]
        store(grad_v + row * Dv + o_tv, b_du, m_tv)
        b_e = load_error(p_v, v_stride, errors, row, o_c, o_v, o_tv, m_tv, Dv, BIAS)
        b_delta = load_delta(delta, row, o_g, o_tv, m_t, m_tv, Dv, BIAS)
        b_psi = biases.value(b_e, b_square, b_delta, BIAS)
        b_eta = load_lr(lr, row, o_g, o_tv, m_t, m_tv, Dv, CHANNEL_LR)  # [C, 1] or [C, BV]
        if CHANNEL_LR:
            tl.store(grad_lr + row * Dv + o_tv, b_du * b_psi, mask=m_tv)
            b_end_sum -= tl.sum(b_kj * (b_psi * b_eta), 1)
        else:
            b_dlr += tl.sum(b_du * b_psi, 1)
            b_end_sum -= tl.sum(b_kj * b_psi, 1)
        if momenta is not None:
            b_stepped -= tl.sum(b_km * (b_psi * b_eta), 1)
        if scales is not None:
            drho += tl.sum(b_r * (b_psi * b_eta))
        if BIAS.delta > 0:
            b_dd = b_du * b_eta * biases.slope_delta(b_e, b_square, b_delta, BIAS)
            if BIAS.delta == 2:
                tl.store(grad_delta + row * Dv + o_tv, b_dd, mask=m_tv)
            else:
                b_dd_row += tl.sum(b_dd, 1)
        if BIAS.row_coupled:
            b_along += tl.sum((b_du * b_eta if CHANNEL_LR else b_du) * biases.pull(b_e, b_square, b_delta, BIAS), 1)
    if not CHANNEL_LR:
        b_end_sum *= b_lr
        b_along *= b_lr
    if rows_lr is not None:
        tl.store(rows_lr + tile_row + row + o_g, b_dlr, mask=m_t)
    if rows_to_end is not None:
        tl.store(rows_to_end + tile_row + row + o_g, b_end_sum, mask=m_t)
    if momenta is not None:
        tl.store(rows_step + tile_row + row + o_g, b_stepped, mask=m_t)
    if BIAS.delta == 1:
        tl.store(rows_delta + tile_row + row + o_g, b_dd_row, mask=m_t)
    return drho, b_square, b_along


@triton.jit
def step_back(
    p_q, q_stride, p_k, k_stride, p_v, v_stride, lr, decays, moves, delta, reads, kept, duals, momenta, scales, errors, grad_out,
    grad_states, grad_momenta, grad_primal, grad_v, grad_initial, grad_initial_momentum,
    ROW, row, o_last, place, here, there, state, rho, drho, b_square, b_along, m_t, i_c, i_tile, H,
    C: tl.constexpr, Dk: tl.constexpr, Dv: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, TILES: tl.constexpr, DTYPE: tl.constexpr,
    BIAS: tl.constexpr, CHANNEL_LR: tl.constexpr, RETENTION: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """dV = -dE (in exact steps dU stays); J and JS of the chunk before, or dW in ``grad_primal`` instead of J if the gate couples entries.

    Returns d rho.
    """
    NK: tl.constexpr = (Dk + BK - 1) // BK
    o_c = tl.arange(0, C)
    o_g = o_c * H
    if not CHANNELS:
        b_gamma = load_gamma(decays, row, o_g, m_t, C)[:, None]  # [C, 1]
        gamma = load_total(decays, row, o_last)
    if momenta is not None:
        pi = tl.load(moves + row + o_last)
        if not CHANNELS:
            carry = tl.load(decays + CARRY * ROW + row + o_last)
            b_carry = load_gate(decays + CARRY * ROW, row, o_g, m_t)[:, None]  # [C, 1]
    for j in range(0, TILES):
        o_v = (i_tile + j) * BV + tl.arange(0, BV)
        m_v = inside(o_v, Dv, BV)
        o_tv, m_tv = o_g[:, None] * Dv + o_v[None, :], m_t[:, None] & m_v[None, :]
        b_eta = load_lr(lr, row, o_g, o_tv, m_t, m_tv, Dv, CHANNEL_LR)  # [C, 1] or [C, BV]
        b_y = tl.load(grad_v + row * Dv + o_tv, mask=m_tv, other=0.0).to(tl.float32) * b_eta
        b_e = load_error(p_v, v_stride, errors, row, o_c, o_v, o_tv, m_tv, Dv, BIAS)
        b_delta = load_delta(delta, row, o_g, o_tv, m_t, m_tv, Dv, BIAS)
        b_de = b_y * biases.slope(b_e, b_square, b_delta, BIAS)  # [C, BV]
        if BIAS.row_coupled:
            b_de += b_along[:, None] * b_e
        b_do = tl.load(grad_out + row * Dv + o_tv, mask=m_tv, other=0.0).to(tl.float32)
        if CHANNELS:
            b_gamma = load_row_weights(decays, row, o_g, o_v, m_t, m_v, Dv)  # [C, BV]
            gamma = tl.load(decays + (row + o_last) * Dv + o_v, mask=m_v, other=0.0)[None, :]  # [1, BV]
            if momenta is not None:
                b_carry = load_row_weights(decays + CARRY * ROW * Dv, row, o_g, o_v, m_t, m_v, Dv)  # [C, BV]
                carry = tl.load(decays + (CARRY * ROW + row + o_last) * Dv + o_v, mask=m_v, other=0.0)[None, :]  # [1, BV]
        if momenta is not None:
            b_dc = rounded(b_do * b_carry, DTYPE)  # [C, BV]
        b_do = rounded(b_do * b_gamma, DTYPE)  # [C, BV]
        for i_k in range(0, NK):
            o_k = i_k * BK + tl.arange(0, BK)
            m_k = inside(o_k, Dk, BK)
            m_kv = m_k[:, None] & m_v[None, :]
            b_q = load_tile(p_q, q_stride, o_c, o_k, m_t, m_k)  # [C, BK]
            o_kv, o_vk = o_k[:, None] * Dv + o_v[None, :], o_v[None, :] * Dk + o_k[:, None]
            b_j = tl.load(grad_states + here + o_kv, mask=m_kv, other=0.0)  # [BK, BV]
            if momenta is not None:
                b_read = dot(tl.trans(b_q), b_dc)  # [BK, BV]
                if scales is not None:
                    drho += tl.sum(b_read * tl.load(momenta + here + o_kv, mask=m_kv, other=0.0))
                b_m = b_j * carry + tl.load(grad_momenta + here + o_kv, mask=m_kv, other=0.0) * pi + b_read * rho
                hand_on(grad_momenta + there, o_kv, grad_initial_momentum, state, o_vk, i_c > 0, b_m, m_kv)
            b_j = decayed(b_j, gamma, kept, place, o_k, m_k, Dk)
            if RETENTION.is_identity:
                b_j += dot(tl.trans(b_q), b_do)
            else:
                b_g = dot(tl.trans(b_q), b_do)  # [BK, BV]
            if BIAS.reads_memory:
                if reads is None:
                    b_k = load_tile(p_k, k_stride, o_c, o_k, m_t, m_k)  # [C, BK]
                else:
                    b_k = load_tile(reads + row * Dk, H * Dk, o_c, o_k, m_t, m_k)
                if RETENTION.is_identity:
                    b_j += fitted_dot(tl.trans(b_k), b_de, DTYPE)
                else:
                    b_g += fitted_dot(tl.trans(b_k), b_de, DTYPE)
            if RETENTION.row_coupled or RETENTION.matrix_coupled:
                tl.store(grad_primal + state + o_kv, b_g, mask=m_kv)
            else:
                if not RETENTION.is_identity:
                    b_a = tl.load(duals + here + o_kv, mask=m_kv, other=0.0)  # [BK, BV]
                    b_j += retentions.pull(b_g, b_a, b_a, 0.0, rho, RETENTION)
                hand_on(grad_states + there, o_kv, grad_initial, state, o_vk, i_c > 0, b_j, m_kv)
        if reads is None:
            store(grad_v + row * Dv + o_tv, -b_de, m_tv)
    return drho


@triton.jit(do_not_specialize=LENGTHS)
def linear_chain_bwd_streamed(
    q, k, v, lr, decays, moves, delta, reads, kept,
    states, duals, momenta, scales, errors, squares, from_out, grad_out, grad_final, grad_final_momentum,
    grad_states, grad_momenta, grad_primal, grad_v, grad_initial, grad_initial_momentum, grad_delta, grad_lr,
    rows_lr, rows_delta, rows_to_end, rows_step,
    cu_seqlens, first_slot,
    T, H, CHUNKS, ROW,
    q_strides, k_strides, v_strides,
    TOKENS: tl.constexpr, C: tl.constexpr, Dk: tl.constexpr, Dv: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DTYPE: tl.constexpr,
    BIAS: tl.constexpr, CHANNEL_LR: tl.constexpr,
    RETENTION: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """`linear_chain_bwd` for one tile of values, or for all values if the bias or the retention gate couples them.

    Under a retention gate J is the gradient of the dual; ``grad_primal [N, H, Dk, Dv]`` holds that of the primal if the gate couples
    entries. ``grad_momenta`` holds JS, the gradient of the momentum matrix.
    """
    ROW = wide(ROW)
    NV: tl.constexpr = (Dv + BV - 1) // BV
    ENTIRE: tl.constexpr = BIAS.row_coupled or RETENTION.matrix_coupled
    COUPLING: tl.constexpr = RETENTION.row_coupled or RETENTION.matrix_coupled
    PROGRAMS: tl.constexpr = 1 if ENTIRE else NV  # per sequence and head
    TILES: tl.constexpr = NV if ENTIRE else 1  # per program
    i_p, i_n, i_h = chain_program(PROGRAMS)
    i_tile = i_p * TILES
    i_b, bos, eos = sequence_of(i_n, cu_seqlens, T)
    chunks = ((eos - bos + TOKENS - 1) // TOKENS).to(tl.int32)
    slot = slot_of(i_n, first_slot, CHUNKS)

    o_c = tl.arange(0, C)
    q = head_of(q, q_strides, i_b, i_h)
    k = head_of(k, k_strides, i_b, i_h)
    v = head_of(v, v_strides, i_b, i_h)
    state = (i_n * H + i_h) * Dk * Dv
    tile_row = i_p.to(tl.int64) * ROW

    begin(
        grad_final, grad_final_momentum, momenta, grad_states, grad_momenta, grad_initial, grad_initial_momentum,
        ((slot + chunks - 1) * H + i_h) * Dk * Dv, state, i_tile, chunks > 0, Dk, Dv, BK, BV, TILES,
    )  # fmt: skip
    tl.debug_barrier()

    for i in range(0, chunks):
        i_c = chunks - 1 - i
        t0 = bos + i_c * TOKENS
        end = end_of(t0, eos, C, TOKENS)
        m_t = t0 + o_c < end
        row = (i_b * T + t0) * H + i_h
        place = (slot + i_c) * H + i_h
        here = place * Dk * Dv
        there = here - H * Dk * Dv
        rho = load_scale(scales, place)
        o_last = (tl.minimum(end - t0, C) - 1) * H
        p_q, p_k, p_v = q + t0 * q_strides.t, k + t0 * k_strides.t, v + t0 * v_strides.t

        drho, b_square, b_along = update_bwd(
            p_k, k_strides.t, p_v, v_strides.t, lr, decays, moves, delta, momenta, scales, errors, squares, from_out,
            grad_states, grad_momenta, grad_v, grad_delta, grad_lr, rows_lr, rows_delta, rows_to_end, rows_step,
            ROW, row, tile_row, here, rho, m_t, i_tile, H, C, Dk, Dv, BK, BV, TILES, DTYPE, BIAS, CHANNEL_LR, CHANNELS,
        )  # fmt: skip
        tl.debug_barrier()
        drho = step_back(
            p_q, q_strides.t, p_k, k_strides.t, p_v, v_strides.t, lr, decays, moves, delta, reads, kept, duals, momenta, scales, errors,
            grad_out, grad_states, grad_momenta, grad_primal, grad_v, grad_initial, grad_initial_momentum,
            ROW, row, o_last, place, here, there, state, rho, drho, b_square, b_along, m_t, i_c, i_tile, H,
            C, Dk, Dv, BK, BV, TILES, DTYPE, BIAS, CHANNEL_LR, RETENTION, CHANNELS,
        )  # fmt: skip
        tl.debug_barrier()
        if COUPLING:
            pull_back(
                states, duals, grad_states, grad_primal, grad_initial, decays, row + o_last, place, state, i_c, i_tile, rho, drho, H,
                Dk, Dv, BK, BV, TILES, RETENTION, CHANNELS,
            )  # fmt: skip
            tl.debug_barrier()
