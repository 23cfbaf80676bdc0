"""Decoding steps of the linear memory ``S = W' [Dk, Dv]``, one token at a time (docs/mathematics.md, section 11).

    e = S_0' k - v;  u = eta psi(e)                                              S_0 = phi(A_0) at the start of the chunk
    mu <- theta mu;  kappa <- alpha kappa + mu                                   weights of the chunk's writes; (k, -u) is added with 1
    o = gamma S_0' q + rho (kappa_0 D' q + kappa_1 M_0' q + sum_i (k_i . q) kappa_i o -u_i)

``linear_step_predict`` multiplies the matrices with k and q, one program per ``BV`` values. ``linear_step_write`` does the rest, one
program per head, and at the chunk's end stores ``A`` and ``M`` as the next chunk's start:

    A = gamma A_0 + kappa_0 D + kappa_1 M_0 - sum_i k_i (kappa_i o u_i)';  M = mu_1 M_0 - sum_i mu_i k_i u_i'
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..common import bias as biases
from ..common import retention as retentions
from ..common.tiles import LENGTHS, inside, store
from .steps import (
    Step,
    advance,
    begin_weights,
    channels_of,
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

#: rows of ``products``: S_0' k, S_0' q, D' q, M_0' q
PRODUCTS = tl.constexpr(4)


@triton.jit(do_not_specialize=LENGTHS)
def linear_step_predict(
    q, k, predicting, written, momenta, weights, position, products,
    t, H, q_strides, k_strides,
    Dk: tl.constexpr, Dv: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, CHANNEL_DECAY: tl.constexpr,
):  # fmt: skip
    """``products [N, H, PRODUCTS, Dv]`` of one tile of values; reads only the matrices in use."""
    NV: tl.constexpr = (Dv + BV - 1) // BV
    W: tl.constexpr = Dv if CHANNEL_DECAY else 1
    i_n, i_v = tl.program_id(0).to(tl.int64) // NV, tl.program_id(0) % NV
    i_h = tl.program_id(1).to(tl.int64)
    i_nh = i_n * H + i_h
    o_k, o_v = tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    m_k, m_v = inside(o_k, Dk, BK), inside(o_v, Dv, BV)
    o, m = i_nh * Dk * Dv + (o_k[:, None] * Dv + o_v[None, :]), m_k[:, None] & m_v[None, :]
    b_q = vector(q, offset_of(q_strides, i_n, t, i_h), o_k, m_k)[:, None]  # [BK, 1]
    b_k = vector(k, offset_of(k_strides, i_n, t, i_h), o_k, m_k)[:, None]  # [BK, 1]
    b_w = tl.load(predicting + o, mask=m, other=0.0)  # [BK, BV]
    p = products + i_nh * PRODUCTS * Dv + o_v
    tl.store(p, tl.sum(b_w * b_k, 0), mask=m_v)
    tl.store(p + Dv, tl.sum(b_w * b_q, 0), mask=m_v)
    if written is not None:
        o_w, m_w = channels_of(o_v, m_v, CHANNEL_DECAY)
        b_dq = tl.full((BV,), 0.0, tl.float32)
        if tl.max(tl.load(weights + i_nh * (2 + C) * W + o_w, mask=m_w, other=0.0), 0) > 0.0:
            b_dq = tl.sum(tl.load(written + o, mask=m, other=0.0) * b_q, 0)
        tl.store(p + 2 * Dv, b_dq, mask=m_v)
    if momenta is not None:
        tl.store(p + 3 * Dv, tl.sum(tl.load(momenta + o, mask=m, other=0.0) * b_q, 0), mask=m_v)
    if (i_h == 0) & (i_v == 0):
        advance(position + i_n, C)


@triton.jit(do_not_specialize=LENGTHS)
def linear_step_write(
    q, k, v, lr, log_decay, delta, momentum, start, primal, rho, written, momenta,
    left, right, weights, momentum_weights, open_log_decay, position, products, out,
    t, T, H,
    q_strides, k_strides, v_strides, out_strides,
    Dk: tl.constexpr, Dv: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BR: tl.constexpr,
    BIAS: tl.constexpr, RETENTION: tl.constexpr, CHANNEL_LR: tl.constexpr, CHANNEL_DECAY: tl.constexpr,
):  # fmt: skip
    """One head of one sequence: the token's write and output, and the chunk's end."""
    W: tl.constexpr = Dv if CHANNEL_DECAY else 1
    i_n = tl.program_id(0).to(tl.int64)
    i_h = tl.program_id(1).to(tl.int64)
    i_nh = i_n * H + i_h
    row = row_of(position + i_n, C)
    gate = (i_n * T + t) * H + i_h  # of the token in the contiguous [N, T, H, ...] gates
    start += i_nh * Dk * Dv
    left += i_nh * C * Dk
    right += i_nh * C * Dv
    weights += i_nh * (2 + C) * W
    open_log_decay += i_nh * W
    momentum_gate, scale = 0.0, 1.0
    if primal is not None:
        primal += i_nh * Dk * Dv
    if rho is not None:
        scale = tl.load(rho + i_nh)
    if written is not None:
        written += i_nh * Dk * Dv
    if momenta is not None:
        momenta += i_nh * Dk * Dv
        momentum_weights += i_nh * (2 + C)
        momentum_gate = tl.load(momentum + gate).to(tl.float32)
    o_k, o_v = tl.arange(0, BK), tl.arange(0, BD)
    m_k, m_v = inside(o_k, Dk, BK), inside(o_v, Dv, BD)
    b_q = vector(q, offset_of(q_strides, i_n, t, i_h), o_k, m_k)  # [BK]
    b_k = vector(k, offset_of(k_strides, i_n, t, i_h), o_k, m_k)  # [BK]
    p = products + i_nh * PRODUCTS * Dv + o_v

    # the token's write
    b_e = -vector(v, offset_of(v_strides, i_n, t, i_h), o_v, m_v)  # [BD]
    if BIAS.reads_memory:
        b_e += tl.load(p, mask=m_v, other=0.0)
    square, b_delta = 0.0, 0.0
    if BIAS.row_coupled:
        square = tl.sum(b_e * b_e)
    if BIAS.delta:
        b_delta = gate_of(delta, gate, o_v, m_v, Dv, BIAS.delta == 2)
    b_u = gate_of(lr, gate, o_v, m_v, Dv, CHANNEL_LR) * biases.value(b_e, square, b_delta, BIAS)  # [BD]

    # the weights after it, and its read of the chunk's own writes
    o_w, m_w = channels_of(o_v, m_v, CHANNEL_DECAY)
    alpha, b_open = decay_of(log_decay, open_log_decay, gate, o_w, m_w, W)  # [BW]
    b_read = -tl.sum(b_k * b_q) * b_u
    b_weights0, b_weights1, moves_1 = first_weights(weights, momentum_weights, o_w, m_w, alpha, momentum_gate, W)
    if written is not None:
        b_read += b_weights0 * tl.load(p + 2 * Dv, mask=m_v, other=0.0)
    if momenta is not None:
        b_read += b_weights1 * tl.load(p + 3 * Dv, mask=m_v, other=0.0)
    for r in tl.range(0, row, BR, disable_licm=True):
        o_r = r + tl.arange(0, BR)
        m_r = o_r < row
        b_weights, _ = row_weights(weights, momentum_weights, o_r, m_r, o_w, m_w, alpha, momentum_gate, W)  # [BR, BW]
        b_left = tl.load(left + o_r[:, None] * Dk + o_k[None, :], mask=m_r[:, None] & m_k[None, :], other=0.0)  # [BR, BK]
        b_right = tl.load(right + o_r[:, None] * Dv + o_v[None, :], mask=m_r[:, None] & m_v[None, :], other=0.0)  # [BR, BD]
        b_read += tl.sum(tl.sum(b_left * b_q[None, :], 1)[:, None] * b_weights * b_right, 0)
    b_out = tl.exp(b_open) * tl.load(p + Dv, mask=m_v, other=0.0) + scale * b_read
    store(out + i_n * out_strides.b + t * out_strides.t + i_h * out_strides.h + o_v, b_out, m_v)

    # store the weights and the token's factors
    tl.debug_barrier()
    store_first_weights(weights, momentum_weights, o_w, m_w, b_weights0, b_weights1, moves_1, W)
    for r in tl.range(0, row, BR, disable_licm=True):
        o_r = r + tl.arange(0, BR)
        m_r = o_r < row
        b_weights, b_moves = row_weights(weights, momentum_weights, o_r, m_r, o_w, m_w, alpha, momentum_gate, W)  # [BR, BW], [BR]
        tl.debug_barrier()
        store_row_weights(weights, momentum_weights, o_r, m_r, o_w, m_w, b_weights, b_moves, W)
    tl.store(left + row * Dk + o_k, b_k, mask=m_k)
    tl.store(right + row * Dv + o_v, -b_u, mask=m_v)
    tl.store(weights + (2 + row) * W + o_w, o_w * 0.0 + 1.0, mask=m_w)
    if momentum_weights is not None:
        tl.store(momentum_weights + 2 + row, 1.0)
    tl.store(open_log_decay + o_w, b_open, mask=m_w)

    if row + 1 == C:
        total = 0.0  # for a gate that couples the matrix
        tl.debug_barrier()
        for i in tl.range(0, (Dv + BV - 1) // BV, disable_licm=True):
            o_t = i * BV + tl.arange(0, BV)
            m_t = inside(o_t, Dv, BV)
            o_x, m_x = channels_of(o_t, m_t, CHANNEL_DECAY)
            b_a = end_tile(
                start,
                written,
                momenta,
                left,
                right,
                weights,
                momentum_weights,
                open_log_decay,
                row,
                o_k,
                m_k,
                o_t,
                m_t,
                o_x,
                m_x,
                Dk,
                Dv,
                W,
                BR,
            )  # [BK, BV]
            o, m = o_k[:, None] * Dv + o_t[None, :], m_k[:, None] & m_t[None, :]
            if RETENTION.matrix_coupled:
                total += tl.sum(tl.where(m, retentions.term(b_a, 0.0, RETENTION), 0.0))
            elif not RETENTION.is_identity:
                tl.store(primal + o, mapped(b_a, m, 0.0, 0.0, 0, RETENTION), mask=m)
        tl.debug_barrier()
        if RETENTION.matrix_coupled:
            total += retentions.floor(RETENTION)
            if RETENTION.has_rho:
                tl.store(rho + i_nh, retentions.scale(total, RETENTION))
            for i in tl.range(0, (Dv + BV - 1) // BV, disable_licm=True):
                o_t = i * BV + tl.arange(0, BV)
                o, m = o_k[:, None] * Dv + o_t[None, :], m_k[:, None] & inside(o_t, Dv, BV)[None, :]
                b_a = tl.load(start + o, mask=m, other=0.0)
                tl.store(primal + o, mapped(b_a, m, 0.0, total, 0, RETENTION), mask=m)
        begin_weights(weights, momentum_weights, open_log_decay, o_w, m_w, W)


def stepper(call):
    """``run(buffers, q, k, v, lr, log_decay, delta, momentum, out)`` for calls like this one."""
    step, (n, _, h, d) = Step.of(call, {linear_step_predict: "value", linear_step_write: "head"}), call.v.shape
    products = torch.empty(n, h, PRODUCTS.value, d, dtype=torch.float32, device=call.q.device)

    def run(buffers, q, k, v, lr, log_decay, delta, momentum, out) -> None:
        channel = dict(CHANNEL_LR=lr.dim() == 4, CHANNEL_DECAY=buffers.open_log_decay.dim() == 3)
        step.launch(buffers, q, k, v, lr, log_decay, delta, momentum, out, channel, products=products)

    return run
