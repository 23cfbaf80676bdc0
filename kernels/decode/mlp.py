"""Decoding steps of the MLP memory ``S1 = W1' [Hd, D]``, ``W2 [Hd, D]``, one token at a time (docs/mathematics.md, section 11).

    z = W2 k;  a = gelu(z);  u = S1' a;  e = k + LN(u) - v;  g = psi(e)                       both matrices at the chunk's start
    gu = LN-vjp(w g);  gz = gelu'(z) o (S1 gu)                                                the inner gradients
    mu <- theta mu;  kappa <- alpha kappa + mu                                                weights of the chunk's writes
    zq = R2 q;  aq = gelu(zq);  o = q + LN(R1' aq)                                            (a, -eta gu), (-eta gz, k) are added with 1
    R x = gamma phi(A_0) x + rho (kappa_0 D x + kappa_1 M_0 x + sum_i left_i kappa_i (right_i . x))        left and right swapped for R1'

Every program has ``BH`` hidden units, a *part* of each matrix; what needs all units waits for the next launch:

    mlp_step_predict   z and W2 q of its units, and its part of u
    mlp_step_write     gz of its units; stores the factors; aq of its units, its part of R1' aq without the factors, and of a_i . aq
    mlp_step_finish    the output; at the chunk's end, its part of both matrices as the next chunk's start

Under a gate that couples a whole matrix, or rows of W1, which lie along the hidden units, the first part's program handles the end of a
chunk alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..common import bias as biases
from ..common import retention as retentions
from ..common.tiles import LENGTHS, inside, store
from ..mlp.math import gelu, gelu_slope, layer_norm_vjp, normalised
from .steps import (
    Step,
    advance,
    begin_weights,
    decay_of,
    end_tile,
    first_weights,
    gate_of,
    mapped,
    offset_of,
    row_of,
    row_weights,
    store_first_weights,
    store_row_weights,
    vector,
)


@triton.jit
def sum_of_parts(partial, o_d, m_d, PARTS: tl.constexpr, D: tl.constexpr, BP: tl.constexpr):
    """``[BD]``: the sum over the parts of ``[PARTS, D]``."""
    o_p = tl.arange(0, BP)
    return tl.sum(tl.load(partial + o_p[:, None] * D + o_d[None, :], mask=(o_p < PARTS)[:, None] & m_d[None, :], other=0.0), 0)


@triton.jit(do_not_specialize=LENGTHS)
def mlp_step_predict(
    q, k, predicting, position, hidden, partial,
    t, H, q_strides, k_strides,
    D: tl.constexpr, Hd: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """``hidden [N, H, 2, Hd]``: z and W2 q. ``partial [N, H, 2, parts, D]``: of u; its second half is written by ``mlp_step_write``."""
    PARTS: tl.constexpr = (Hd + BH - 1) // BH
    i_n, i_p = tl.program_id(0).to(tl.int64) // PARTS, tl.program_id(0) % PARTS
    i_h = tl.program_id(1).to(tl.int64)
    i_nh = i_n * H + i_h
    o_d, o_h = tl.arange(0, BD), i_p * BH + tl.arange(0, BH)
    m_d, m_h = inside(o_d, D, BD), inside(o_h, Hd, BH)
    o, m = i_nh * 2 * Hd * D + (o_h[:, None] * D + o_d[None, :]), m_h[:, None] & m_d[None, :]
    b_q = vector(q, offset_of(q_strides, i_n, t, i_h), o_d, m_d)[None, :]  # [1, BD]
    b_k = vector(k, offset_of(k_strides, i_n, t, i_h), o_d, m_d)[None, :]  # [1, BD]
    b_s1 = tl.load(predicting + o, mask=m, other=0.0)  # [BH, BD]
    b_w2 = tl.load(predicting + Hd * D + o, mask=m, other=0.0)  # [BH, BD]
    b_z = tl.sum(b_w2 * b_k, 1)  # [BH]
    hidden += i_nh * 2 * Hd
    tl.store(hidden + o_h, b_z, mask=m_h)
    tl.store(hidden + Hd + o_h, tl.sum(b_w2 * b_q, 1), mask=m_h)
    tl.store(partial + (i_nh * 2 * PARTS + i_p) * D + o_d, tl.sum(gelu(b_z)[:, None] * b_s1, 0), mask=m_d)
    if (i_h == 0) & (i_p == 0):
        advance(position + i_n, C)


@triton.jit(do_not_specialize=LENGTHS)
def mlp_step_write(
    q, k, v, lr, log_decay, delta, momentum, ln_weight, ln_bias,
    predicting, rho, written, momenta, left, right, weights, momentum_weights, open_log_decay, position, hidden, partial, scores, after,
    t, T, H, q_strides, k_strides, v_strides,
    D: tl.constexpr, Hd: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr, BP: tl.constexpr, BR: tl.constexpr,
    EPS: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """``scores [N, H, parts, C]``: parts of a_i . aq. ``after [N, H, 2 (2 + C) + 1]``: weights of A and S, log gamma after it."""
    PARTS: tl.constexpr = (Hd + BH - 1) // BH
    ROWS: tl.constexpr = 2 + C
    i_n, i_p = tl.program_id(0).to(tl.int64) // PARTS, tl.program_id(0) % PARTS
    i_h = tl.program_id(1).to(tl.int64)
    i_nh = i_n * H + i_h
    row = row_of(position + i_n, C)
    gate = (i_n * T + t) * H + i_h  # of the token in the contiguous [N, T, H] gates
    left += i_nh * 2 * C * Hd
    right += i_nh * 2 * C * D
    weights += i_nh * ROWS
    hidden += i_nh * 2 * Hd
    partial += i_nh * 2 * PARTS * D
    scores += (i_nh * PARTS + i_p) * C
    after += i_nh * (2 * ROWS + 1)
    moves_after = after + ROWS
    momentum_gate, rho_1, rho_2 = 0.0, 1.0, 1.0
    if rho is not None:
        rho_1, rho_2 = tl.load(rho + i_nh * 2), tl.load(rho + i_nh * 2 + 1)
    if momenta is not None:
        momentum_weights += i_nh * ROWS
        momentum_gate = tl.load(momentum + gate).to(tl.float32)
    o_d, o_h = tl.arange(0, BD), i_p * BH + tl.arange(0, BH)
    m_d, m_h = inside(o_d, D, BD), inside(o_h, Hd, BH)
    o, m = i_nh * 2 * Hd * D + (o_h[:, None] * D + o_d[None, :]), m_h[:, None] & m_d[None, :]
    b_q = vector(q, offset_of(q_strides, i_n, t, i_h), o_d, m_d)[None, :]  # [1, BD]
    b_k = vector(k, offset_of(k_strides, i_n, t, i_h), o_d, m_d)[None, :]  # [1, BD]

    # the inner gradient, the same in every part
    b_weight = tl.load(ln_weight + i_h * D + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]  # [1, BD]
    b_bias = tl.load(ln_bias + i_h * D + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]  # [1, BD]
    b_x, b_inverse = normalised(sum_of_parts(partial, o_d, m_d, PARTS, D, BP)[None, :], m_d, D, EPS)
    b_e = -vector(v, offset_of(v_strides, i_n, t, i_h), o_d, m_d)[None, :]
    if BIAS.reads_memory:
        b_e = tl.where(m_d[None, :], b_e + b_k + b_x * b_weight + b_bias, 0.0)
    square, b_delta = 0.0, 0.0
    if BIAS.row_coupled:
        square = tl.sum(b_e * b_e)
    if BIAS.delta:
        b_delta = gate_of(delta, gate, o_d, m_d, D, False)
    b_gu = layer_norm_vjp(b_x, b_inverse, biases.value(b_e, square, b_delta, BIAS) * b_weight, m_d, D)  # [1, BD]
    b_s1 = tl.load(predicting + o, mask=m, other=0.0)  # [BH, BD]
    b_z = tl.load(hidden + o_h, mask=m_h, other=0.0)  # [BH]
    rate = tl.load(lr + gate).to(tl.float32)
    b_u2 = -rate * tl.sum(b_s1 * b_gu, 1) * gelu_slope(b_z)  # [BH]

    # the weights after the token, and zq
    one = tl.arange(0, 1)
    alpha, b_open = decay_of(log_decay, open_log_decay + i_nh, gate, one, one == 0, 1)  # [1]
    gamma = tl.exp(tl.sum(b_open, 0))
    b_weights0, b_weights1, moves_1 = first_weights(weights, momentum_weights, one, one == 0, alpha, momentum_gate, 1)
    weights_0, weights_1 = tl.sum(b_weights0, 0), tl.sum(b_weights1, 0)
    if i_p == 0:
        store_first_weights(after, moves_after, one, one == 0, b_weights0, b_weights1, moves_1, 1)
        tl.store(after + 2 + row, 1.0)
        tl.store(moves_after + 2 + row, 1.0)
        tl.store(after + 2 * ROWS + one, b_open)
    b_zq = gamma * tl.load(hidden + Hd + o_h, mask=m_h, other=0.0)  # [BH]
    b_wq = b_u2 * tl.sum(b_k * b_q)  # the chunk's own writes applied to q
    b_r1 = gamma * b_s1  # [BH, BD]
    if written is not None:
        if weights_0 > 0.0:
            b_wq += weights_0 * tl.sum(tl.load(written + Hd * D + o, mask=m, other=0.0) * b_q, 1)
            b_r1 += (rho_1 * weights_0) * tl.load(written + o, mask=m, other=0.0)
    if momenta is not None:
        b_wq += weights_1 * tl.sum(tl.load(momenta + Hd * D + o, mask=m, other=0.0) * b_q, 1)
        b_r1 += (rho_1 * weights_1) * tl.load(momenta + o, mask=m, other=0.0)
    for r in tl.range(0, row, BR, disable_licm=True):
        o_r = r + tl.arange(0, BR)
        m_r = o_r < row
        b_weights, b_moves = row_weights(weights, momentum_weights, o_r, m_r, one, one == 0, alpha, momentum_gate, 1)  # [BR, 1], [BR]
        if i_p == 0:
            store_row_weights(after, moves_after, o_r, m_r, one, one == 0, b_weights, b_moves, 1)
        b_keys = tl.load(right + C * D + o_r[:, None] * D + o_d[None, :], mask=m_r[:, None] & m_d[None, :], other=0.0)  # [BR, BD]
        b_score = tl.sum(b_keys * b_q, 1)[:, None] * b_weights  # [BR, 1]
        b_left = tl.load(left + C * Hd + o_r[:, None] * Hd + o_h[None, :], mask=m_r[:, None] & m_h[None, :], other=0.0)  # [BR, BH]
        b_wq += tl.sum(b_score * b_left, 0)
    b_aq = gelu(b_zq + rho_2 * b_wq)  # [BH]

    # store the token's factors, and this part's sums for LayerNorm and R1'
    b_a = gelu(b_z)
    tl.store(left + row * Hd + o_h, b_a, mask=m_h)
    tl.store(left + (C + row) * Hd + o_h, b_u2, mask=m_h)
    if i_p == 0:
        tl.store(right + row * D + o_d[None, :], -rate * b_gu, mask=m_d[None, :])
        tl.store(right + (C + row) * D + o_d[None, :], b_k, mask=m_d[None, :])
    tl.store(partial + (PARTS + i_p) * D + o_d, tl.sum(b_aq[:, None] * b_r1, 0), mask=m_d)
    tl.store(scores + row, tl.sum(tl.where(m_h, b_a * b_aq, 0.0)))
    for r in tl.range(0, row, BR, disable_licm=True):
        o_r = r + tl.arange(0, BR)
        m_r = o_r < row
        b_left = tl.load(left + o_r[:, None] * Hd + o_h[None, :], mask=m_r[:, None] & m_h[None, :], other=0.0)  # [BR, BH]
        tl.store(scores + o_r, tl.sum(b_left * b_aq[None, :], 1), mask=m_r)


@triton.jit(do_not_specialize=LENGTHS)
def mlp_step_finish(
    q, ln_weight, ln_bias, start, primal, rho, written, momenta,
    left, right, weights, momentum_weights, open_log_decay, position, partial, scores, after, out,
    t, H, q_strides, out_strides,
    D: tl.constexpr, Hd: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr, BP: tl.constexpr, BR: tl.constexpr,
    EPS: tl.constexpr, RETENTION: tl.constexpr,
):  # fmt: skip
    """The first part's program computes the output and the weights; the other parts' programs have work only at the end of a chunk."""
    PARTS: tl.constexpr = (Hd + BH - 1) // BH
    ROWS: tl.constexpr = 2 + C
    SIZE: tl.constexpr = Hd * D
    COUPLES: tl.constexpr = RETENTION.row_coupled or RETENTION.matrix_coupled
    i_n, i_p = tl.program_id(0).to(tl.int64) // PARTS, tl.program_id(0) % PARTS
    i_h = tl.program_id(1).to(tl.int64)
    i_nh = i_n * H + i_h
    row = row_of(position + i_n, C)
    left += i_nh * 2 * C * Hd
    right += i_nh * 2 * C * D
    partial += i_nh * 2 * PARTS * D
    after += i_nh * (2 * ROWS + 1)
    moves_after, open_after = after + ROWS, after + 2 * ROWS
    start += i_nh * 2 * SIZE
    written_2, momenta_2, primal_2 = written, momenta, primal
    if primal is not None:
        primal += i_nh * 2 * SIZE
        primal_2 = primal + SIZE
    if written is not None:
        written += i_nh * 2 * SIZE
        written_2 = written + SIZE
    if momenta is not None:
        momenta += i_nh * 2 * SIZE
        momenta_2 = momenta + SIZE
        momentum_weights += i_nh * ROWS
    o_d = tl.arange(0, BD)
    m_d = inside(o_d, D, BD)

    if i_p == 0:
        rho_1 = 1.0
        if rho is not None:
            rho_1 = tl.load(rho + i_nh * 2)
        b_uq = sum_of_parts(partial + PARTS * D, o_d, m_d, PARTS, D, BP)  # [BD]
        for r in tl.range(0, row + 1, BR, disable_licm=True):
            o_r = r + tl.arange(0, BR)
            m_r = o_r <= row
            b_score = sum_of_parts(scores + i_nh * PARTS * C, o_r, m_r, PARTS, C, BP)  # [BR]
            b_weights = tl.load(after + 2 + o_r, mask=m_r, other=0.0)
            b_right = tl.load(right + o_r[:, None] * D + o_d[None, :], mask=m_r[:, None] & m_d[None, :], other=0.0)  # [BR, BD]
            b_uq += rho_1 * tl.sum((b_score * b_weights)[:, None] * b_right, 0)
        b_xq, _ = normalised(b_uq[None, :], m_d, D, EPS)
        b_q = vector(q, offset_of(q_strides, i_n, t, i_h), o_d, m_d)[None, :]  # [1, BD]
        b_weight = tl.load(ln_weight + i_h * D + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
        b_bias = tl.load(ln_bias + i_h * D + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
        p_out = out + i_n * out_strides.b + t * out_strides.t + i_h * out_strides.h + o_d
        store(p_out[None, :], b_q + b_xq * b_weight + b_bias, m_d[None, :])
        weights += i_nh * ROWS
        for r in tl.range(0, row + 3, BR, disable_licm=True):
            o_r = r + tl.arange(0, BR)
            m_r = o_r < row + 3
            tl.store(weights + o_r, tl.load(after + o_r, mask=m_r, other=0.0), mask=m_r)
            if momentum_weights is not None:
                tl.store(momentum_weights + o_r, tl.load(moves_after + o_r, mask=m_r, other=0.0), mask=m_r)
        tl.store(open_log_decay + i_nh, tl.load(open_after))
        if row + 1 == C:
            tl.debug_barrier()
            one = tl.arange(0, 1)
            begin_weights(weights, momentum_weights, open_log_decay + i_nh, one, one == 0, 1)

    if row + 1 == C:
        first, last = i_p, i_p + 1
        if COUPLES:
            first, last = 0, tl.where(i_p == 0, PARTS, 0)
        one = tl.arange(0, 1)
        shift_1 = tl.full((1, BD), retentions.BOTTOM, tl.float32)
        total_1 = tl.full((1, BD), 0.0, tl.float32)  # of each column of S1, or of all of S1 in each
        total_2 = 0.0
        for i in tl.range(first, last, disable_licm=True):
            o_h = i * BH + tl.arange(0, BH)
            m_h = inside(o_h, Hd, BH)
            o, m = o_h[:, None] * D + o_d[None, :], m_h[:, None] & m_d[None, :]
            b_a1 = end_tile(
                start, written, momenta, left, right, after, moves_after, open_after, row, o_h, m_h, o_d, m_d, one, one == 0, Hd, D, 1, BR
            )  # [BH, BD]
            if RETENTION.row_coupled:
                shift = tl.maximum(shift_1, tl.max(tl.where(m, b_a1, retentions.BOTTOM), 0)[None, :])
                b_term = tl.where(m, retentions.term(tl.where(m, b_a1, shift), shift, RETENTION), 0.0)
                total_1 = total_1 * tl.exp(shift_1 - shift) + tl.sum(b_term, 0)[None, :]
                shift_1 = shift
            elif RETENTION.matrix_coupled:
                total_1 += tl.sum(tl.where(m, retentions.term(b_a1, 0.0, RETENTION), 0.0))
            elif not RETENTION.is_identity:
                tl.store(primal + o, mapped(b_a1, m, 0.0, 0.0, 0, RETENTION), mask=m)
            b_a2 = end_tile(
                start + SIZE, written_2, momenta_2, left + C * Hd, right + C * D, after, moves_after, open_after,
                row, o_h, m_h, o_d, m_d, one, one == 0, Hd, D, 1, BR,
            )  # [BH, BD]  # fmt: skip
            if RETENTION.matrix_coupled:
                total_2 += tl.sum(tl.where(m, retentions.term(b_a2, 0.0, RETENTION), 0.0))
            elif not RETENTION.is_identity:
                tl.store(primal_2 + o, mapped(b_a2, m, 0.0, 0.0, 1, RETENTION), mask=m)
        if COUPLES:
            tl.debug_barrier()
            if RETENTION.matrix_coupled:
                total_1 += retentions.floor(RETENTION)
                total_2 += retentions.floor(RETENTION)
                if RETENTION.has_rho and i_p == 0:
                    tl.store(rho + i_nh * 2, tl.max(retentions.scale(total_1, RETENTION)))
                    tl.store(rho + i_nh * 2 + 1, retentions.scale(total_2, RETENTION))
            for i in tl.range(first, last, disable_licm=True):
                o_h = i * BH + tl.arange(0, BH)
                o, m = o_h[:, None] * D + o_d[None, :], inside(o_h, Hd, BH)[:, None] & m_d[None, :]
                b_a = tl.load(start + o, mask=m, other=0.0)
                tl.store(primal + o, mapped(b_a, m, shift_1, total_1, -1, RETENTION), mask=m)
                if RETENTION.matrix_coupled:
                    b_a = tl.load(start + SIZE + o, mask=m, other=0.0)
                    tl.store(primal_2 + o, mapped(b_a, m, 0.0, total_2, -1, RETENTION), mask=m)


def stepper(call):
    """``run(buffers, q, k, v, lr, log_decay, delta, momentum, out)`` for calls like this one."""
    step = Step.of(call, dict.fromkeys((mlp_step_predict, mlp_step_write, mlp_step_finish), "hidden"))
    (n, _, h, d), hidden = call.v.shape, step.key.hidden
    parts = -(-hidden // step.key.part)
    room = lambda *shape: torch.empty(n, h, *shape, dtype=torch.float32, device=call.q.device)
    between = dict(
        hidden=room(2, hidden), partial=room(2, parts, d), scores=room(parts, call.chunk_size), after=room(2 * (2 + call.chunk_size) + 1)
    )  # fmt: skip
    norm = dict(ln_weight=call.ln_weight.contiguous(), ln_bias=call.ln_bias.contiguous())
    constants = dict(BP=triton.next_power_of_2(parts))

    def run(buffers, q, k, v, lr, log_decay, delta, momentum, out) -> None:
        step.launch(buffers, q, k, v, lr, log_decay, delta, momentum, out, constants, **between, **norm)

    return run
