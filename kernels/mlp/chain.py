"""The chains of the MLP memory (docs/mathematics.md, sections 9 and 10): one program per sequence and head, chunk by chunk, in stages.

    mlp_chain_fwd   mirror, weigh, predict, inner_gradient, read, put_out, write                             from the first chunk on
    mlp_chain_bwd   update_bwd, inner_gradient_bwd, hidden_bwd, first_matrix_bwd, second_matrix_bwd, pull_back    from the last chunk back

``S1 = W1' [Hd, D]`` and ``W2 [Hd, D]`` lie side by side in the program's own ``memory [.., 2, Hd, D]`` float32. It is read and written
in place, ``BH`` hidden units at a time, and does not grow with the sequence, so it stays in the chip's caches. A chunk takes three passes
over the hidden units: predict, read, write. The barriers between the stages order the threads' writes before each other's reads.

With a retention gate `memory` holds the duals; `mirror` puts their phi into ``states``, which all products but those of `write` read, and
rho scales a chunk's own writes. With momentum `memory [.., 4, Hd, D]` also holds the momentum matrices M1', M2, and M of decays.py
replaces L.

A tile that a matrix product left in registers is never transposed into another product: several Triton releases miscompile that. Where
needed, the transposed tile is computed (``Ga'``) or read back from memory (``Z'``, ``Gu'``).
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.chunks import HEAD, SEGMENT, head_of, part_of, sequence_of, slot_of
from ..common.gates import load_scales, load_total
from ..common.tiles import LENGTHS, wide
from .inner import hidden_bwd, inner_gradient, inner_gradient_bwd, predict, update_bwd
from .mirror import mirror, pull_back
from .read import put_out, read, weigh
from .write import first_matrix_bwd, inner_products, save, second_matrix_bwd, write


@triton.jit(do_not_specialize=LENGTHS)
def mlp_chain_fwd(
    q, k, v, lr, decays, moves, delta, ln_weight, ln_bias,
    memory, opened, readouts, opened_scales, position,
    hidden, updates, pairs, scores, checkpoints, states, duals, momenta, scales, sums, out,
    cu_seqlens, first_slot, first_segment, group_segments,
    T, H, CHUNKS, ROW, SEGMENTS, EVERY,
    q_strides, k_strides, v_strides,
    D: tl.constexpr, Hd: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr, DTYPE: tl.constexpr, EPS: tl.constexpr,
    PART: tl.constexpr,
    BIAS: tl.constexpr,
    RETENTION: tl.constexpr, MOMENTUM: tl.constexpr,
):  # fmt: skip
    """One memory through the chunks of one sequence, or of one of its segments.

    For a segment (``PART == SEGMENT``) every chunk has its own ``states`` before it (the primals), Z in ``hidden``, Gu in ``updates`` and U
    in ``sums`` for the backward; with a gate also ``duals``, and ``scales`` if it has rho; with momentum ``momenta``. Otherwise these hold
    one chunk at a time, and ``out`` is written.
    """
    ROW = wide(ROW)
    SIZE: tl.constexpr = Hd * D
    MATRICES: tl.constexpr = 4 if MOMENTUM else 2
    GATED: tl.constexpr = not RETENTION.is_identity
    i_s = tl.program_id(0).to(tl.int64)
    i_h = tl.program_id(1).to(tl.int64)
    i_n, i_segment = i_s, i_s * 0
    if PART == SEGMENT:
        i_n, i_segment = tl.load(group_segments + i_s * 2), tl.load(group_segments + i_s * 2 + 1)
    i_b, bos, eos = sequence_of(i_n, cu_seqlens, T)
    origin, first, last = part_of(i_n, i_segment, bos, eos, position, EVERY, C, PART)
    segment_slot = slot_of(i_n, first_segment, SEGMENTS)
    q = head_of(q, q_strides, i_b, i_h)
    k = head_of(k, k_strides, i_b, i_h)
    v = head_of(v, v_strides, i_b, i_h)
    ln_weight += i_h * D
    ln_bias += i_h * D
    memory += (i_s * H + i_h) * MATRICES * SIZE
    moving = None
    if MOMENTUM:
        moving = memory + 2 * SIZE

    for i_c in tl.range(first, last, disable_licm=True):
        t0 = origin + i_c * C
        row = (i_b * T + t0) * H + i_h  # of the chunk's first token in the contiguous [B, T, H, ...] tensors
        p_q, p_k, p_v = q + t0 * q_strides.t, k + t0 * k_strides.t, v + t0 * v_strides.t
        place = i_s
        if PART == SEGMENT:
            place = i_s * EVERY + i_c - first
        place = place * H + i_h
        p_z, p_gu, p_u = hidden + place * C * Hd, updates + place * C * D, sums + place * C * D
        p_copy, p_duals, p_momenta = None, None, None
        if PART == SEGMENT and not GATED:
            p_copy = states + place * 2 * SIZE
        if PART == SEGMENT and GATED:
            p_duals = duals + place * 2 * SIZE
        if PART == SEGMENT and MOMENTUM:
            p_momenta = momenta + place * 2 * SIZE
        if checkpoints is not None:
            if i_c % EVERY == 0:
                save(memory, checkpoints + ((segment_slot + i_c // EVERY) * H + i_h) * MATRICES * SIZE, i_c, MATRICES, D, Hd, BD, BH)

        predicting, reading = memory, memory
        rho1, rho2 = 1.0, 1.0
        if PART == HEAD:  # a chunk that was open before predicts with its own start
            predicting = opened + place * 2 * SIZE
            if GATED:
                reading = readouts + place * 2 * SIZE
            if RETENTION.has_rho:
                rho1, rho2 = load_scales(opened_scales, place)
        elif GATED:
            predicting = states + place * 2 * SIZE
            reading = predicting
            rho1, rho2 = mirror(memory, predicting, i_c, D, Hd, BD, BH, RETENTION)
            if scales is not None:
                tl.store(scales + place * 2, rho1)
                tl.store(scales + place * 2 + 1, rho2)
            tl.debug_barrier()

        if out is not None:
            p_pairs, p_scores = pairs + place * C * C, scores + place * C * C
            if MOMENTUM:
                p_pairs = pairs + ((slot_of(i_n, first_slot, CHUNKS) + i_c) * H + i_h) * C * C
            weigh(p_q, p_k, decays, p_pairs, p_scores, q_strides.t, k_strides.t, ROW, row, H, t0, bos, eos, i_c, D, C, BD, PART, MOMENTUM)
        predict(p_k, predicting, p_z, p_u, p_copy, k_strides.t, t0, bos, eos, i_c, D, Hd, C, BD, BH, DTYPE, PART)
        tl.debug_barrier()
        inner_gradient(
            p_k, p_v, delta, ln_weight, ln_bias, p_u, p_gu, k_strides.t, v_strides.t, row, H, t0, bos, eos, i_c,
            D, C, BD, EPS, PART, BIAS,
        )  # fmt: skip
        tl.debug_barrier()
        if out is not None:
            read(
                p_q, lr, decays, reading, predicting, moving, rho1, rho2,
                p_z, p_gu, p_pairs, p_scores, p_u, q_strides.t, ROW, row, H, t0, bos, eos, i_c,
                D, Hd, C, BD, BH, DTYPE, PART, RETENTION,
            )  # fmt: skip
            tl.debug_barrier()
            put_out(p_q, ln_weight, ln_bias, p_u, out + row * D, q_strides.t, H, t0, bos, eos, i_c, D, C, BD, EPS, PART)
            tl.debug_barrier()
        write(
            p_k, lr, decays, moves, memory, predicting, moving, p_z, p_gu, p_duals, p_momenta, k_strides.t, ROW, row, H, t0, bos, eos, i_c,
            D, Hd, C, BD, BH, DTYPE, PART, RETENTION,
        )  # fmt: skip
        tl.debug_barrier()


@triton.jit(do_not_specialize=LENGTHS)
def mlp_chain_bwd(
    q, k, v, lr, decays, moves, delta, ln_weight, ln_bias,
    states, duals, momenta, scales, hidden, updates, sums, inner_grad, hidden_q, grad_sums, grad_scores, grad_norm, grad_scales,
    grad_hidden_q, from_hidden, from_updates, from_inner, row_sums, grad_sum,
    grad_memory, grad_primal, grad_k, grad_v, grad_delta, grad_layer_norm, rows_lr, rows_delta, rows_to_end, rows_step, inner,
    cu_seqlens, first_slot, group_segments, group_places,
    T, H, CHUNKS, ROW, SLOTS, EVERY,
    q_strides, k_strides, v_strides,
    D: tl.constexpr, Hd: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr, DTYPE: tl.constexpr, EPS: tl.constexpr,
    BIAS: tl.constexpr,
    RETENTION: tl.constexpr, MOMENTUM: tl.constexpr,
):  # fmt: skip
    """J1, J2 (and JS1, JS2), in place in ``grad_memory``, from the last chunk of a group to its first.

    ``from_inner`` becomes dGz and ``from_hidden`` dZ. ``row_sums``, ``grad_sum`` and ``grad_primal`` hold one chunk at a time.
    """
    ROW, SLOTS = wide(ROW), wide(SLOTS)
    SIZE: tl.constexpr = Hd * D
    MATRICES: tl.constexpr = 4 if MOMENTUM else 2
    GATED: tl.constexpr = not RETENTION.is_identity
    i_n = tl.program_id(0).to(tl.int64)
    i_h = tl.program_id(1).to(tl.int64)
    i_b, bos, eos = sequence_of(i_n, cu_seqlens, T)
    begin, stop = tl.load(group_places + i_n * 2), tl.load(group_places + i_n * 2 + 1)
    i_segment = tl.load(group_segments + begin * 2 + 1, mask=begin < stop, other=0)
    first = (i_segment * EVERY).to(tl.int32)
    last = tl.minimum((eos - bos + C - 1) // C, (i_segment + stop - begin) * EVERY).to(tl.int32)
    slot = slot_of(i_n, first_slot, CHUNKS)
    own = i_n * H + i_h
    q = head_of(q, q_strides, i_b, i_h)
    k = head_of(k, k_strides, i_b, i_h)
    v = head_of(v, v_strides, i_b, i_h)
    ln_weight += i_h * D
    ln_bias += i_h * D
    grad_memory += own * MATRICES * SIZE
    row_sums += own * (3 if MOMENTUM else 2) * C * D
    grad_sum += own * C * D
    grad_layer_norm += own * 2 * D
    moving, moving2 = None, None
    if MOMENTUM:
        moving, moving2 = grad_memory + 2 * SIZE, grad_memory + 3 * SIZE
    primal, primal2 = None, None
    if GATED:
        primal, primal2 = grad_primal + own * 2 * SIZE, grad_primal + (own * 2 + 1) * SIZE

    for i_r in tl.range(0, last - first, disable_licm=True):
        i_c = last - 1 - i_r
        place = (begin * EVERY + i_c - first) * H + i_h
        t0 = bos + i_c * C
        row = (i_b * T + t0) * H + i_h
        p_q, p_k, p_v = q + t0 * q_strides.t, k + t0 * k_strides.t, v + t0 * v_strides.t
        at_hidden, at_tokens = place * C * Hd, place * C * D
        p_w, p_z, p_ga, p_inner, p_hidden = (
            states + place * 2 * SIZE, hidden + at_hidden, inner_grad + at_hidden, from_inner + at_hidden, from_hidden + at_hidden
        )  # fmt: skip
        p_gu = updates + at_tokens
        rho1, rho2 = load_scales(scales, place)

        if inner is not None and (GATED or MOMENTUM):
            p_duals, p_momenta = p_w, None
            if GATED:
                p_duals = duals + place * 2 * SIZE
            if MOMENTUM:
                p_momenta = momenta + place * 2 * SIZE
            product, product_carry, product_pi = inner_products(grad_memory, p_duals, moving, p_momenta, i_c, D, Hd, BD, BH)
            p_of_inner = inner + (slot + i_c) * H + i_h
            tl.store(p_of_inner, product)
            if MOMENTUM:
                tl.store(p_of_inner + SLOTS * H, product_carry)
                tl.store(p_of_inner + 2 * SLOTS * H, product_pi)
        update_bwd(
            p_k, lr, decays, moves, grad_memory, moving, p_w, p_z, p_ga, p_inner, row_sums, rows_lr, rows_to_end, rows_step,
            k_strides.t, ROW, row, H, t0, eos, i_c, D, Hd, C, BD, BH, DTYPE,
        )  # fmt: skip
        tl.debug_barrier()
        inner_gradient_bwd(
            p_k, p_v, lr, decays, moves, delta, ln_weight, ln_bias, sums + at_tokens, row_sums, from_updates + at_tokens,
            grad_norm + place * 2 * D, grad_sum, grad_v + row * D, grad_delta + row * D if BIAS.delta == 2 else None, grad_layer_norm,
            rows_lr, rows_delta, rows_to_end, rows_step, k_strides.t, v_strides.t, ROW, row, H, t0, eos, i_c,
            D, C, BD, EPS, BIAS,
        )  # fmt: skip
        tl.debug_barrier()
        product = hidden_bwd(
            lr, decays, moves, grad_memory, moving, p_w, p_z, p_ga, p_inner, p_hidden, p_gu, grad_sum, ROW, row, H, t0, eos, i_c,
            D, Hd, C, BD, BH, DTYPE,
        )  # fmt: skip
        tl.debug_barrier()
        first_matrix_bwd(
            decays, moves, grad_memory, moving, primal, p_z, hidden_q + at_hidden, p_inner, p_gu, grad_sum, grad_sums + at_tokens, rho1,
            ROW, row, H, t0, eos, i_c, D, Hd, C, BD, BH, DTYPE,
        )  # fmt: skip
        tl.debug_barrier()
        product += second_matrix_bwd(
            p_q, p_k, lr, decays, moves, grad_memory + SIZE, moving2, primal2, p_w + SIZE, p_z, p_ga, p_hidden, grad_hidden_q + at_hidden,
            grad_scores + place * C * C, grad_v + row * D, grad_k + row * D, rho2, q_strides.t, k_strides.t, ROW, row, H, t0, eos, i_c,
            D, Hd, C, BD, BH, DTYPE, BIAS,
        )  # fmt: skip
        if inner is not None and not (GATED or MOMENTUM):
            tl.store(inner + (slot + i_c) * H + i_h, product)
        tl.debug_barrier()
        if GATED:
            grad_rho1, grad_rho2 = 0.0, 0.0
            if scales is not None:
                grad_rho1, grad_rho2 = load_scales(grad_scales, place)
            gamma = load_total(decays, row, (tl.minimum(eos - t0, C) - 1) * H)
            p_duals = duals + place * 2 * SIZE
            pull_back(
                grad_memory, primal, p_duals, p_w, gamma, grad_rho1, grad_rho2, rho1, rho2, i_c, D, Hd, BD, BH, RETENTION
            )  # fmt: skip
            tl.debug_barrier()
