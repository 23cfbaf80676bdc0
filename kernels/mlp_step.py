"""Decoding steps of the MLP memory: ``S1 = W1' [Hd, D]`` and ``W2 [Hd, D]`` in place, one program a head.

    z = W2 k;  a = gelu(z);  u = S1' a;  e = k + LN(u) - v;  g = psi(e)                       both matrices at the chunk's start
    gu = LN-vjp(w g);  gz = gelu'(z) o (S1 gu)                                                the inner gradients
    M1 <- theta M1 - a (eta gu)';  M2 <- theta M2 - (eta gz) k';  A1 <- alpha A1 + M1;  A2 <- alpha A2 + M2
    zq = R2 q;  aq = gelu(zq);  o = q + LN(R1' aq),   R = gamma W_0 + rho (A - gamma A_0)     without a gate: R = A

Two passes over the hidden units, ``BH`` at a time: predict, then write and read. A chunk's first token has a pass before them where
the gate couples rows of W1, which run through the hidden units, or a whole matrix.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import bias as biases
from . import retention as retentions
from .mlp_math import gelu, gelu_slope, layer_norm_vjp, normalised
from .steps import Step, begin, gate_of, moved, read_matrix, vector
from .tiles import inside, store


@triton.jit
def load_pair(matrices, o, m, SIZE: tl.constexpr):
    """A block of hidden units of the first matrix and of the second."""
    return tl.load(matrices + o, mask=m, other=0.0), tl.load(matrices + SIZE + o, mask=m, other=0.0)


@triton.jit(do_not_specialize=("T",))
def mlp_step(
    q, k, v, lr, log_decay, delta, momentum, ln_weight, ln_bias,
    dual, start, primal, rho, carried, sums, position, hidden, out,
    T, H,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh, stride_ob, stride_ot, stride_oh,
    D: tl.constexpr, Hd: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr, EPS: tl.constexpr,
    BIAS: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
    RETENTION: tl.constexpr, R0: tl.constexpr, R1: tl.constexpr,
    READS: tl.constexpr, COUPLED: tl.constexpr, DELTA: tl.constexpr,
):  # fmt: skip
    """T tokens of one head of one sequence. ``hidden [N, H, Hd]`` float32 is where z waits for the second pass."""
    NH: tl.constexpr = (Hd + BH - 1) // BH
    SIZE: tl.constexpr = Hd * D
    i_n = tl.program_id(0).to(tl.int64)
    i_h = tl.program_id(1).to(tl.int64)
    i_nh = i_n * H + i_h
    dual += i_nh * 2 * SIZE
    start_2, primal_2, carried_2 = start, primal, carried
    if start is not None:
        start += i_nh * 2 * SIZE
        start_2 = start + SIZE
    if primal is not None:
        primal += i_nh * 2 * SIZE
        primal_2 = primal + SIZE
    if carried is not None:
        carried += i_nh * 2 * SIZE
        carried_2 = carried + SIZE
    predicting = dual
    if primal is not None:
        predicting = primal
    elif start is not None:
        predicting = start
    hidden += i_nh * Hd
    q += i_n * stride_qb + i_h * stride_qh
    k += i_n * stride_kb + i_h * stride_kh
    v += i_n * stride_vb + i_h * stride_vh
    out += i_n * stride_ob + i_h * stride_oh

    o_d = tl.arange(0, BD)
    m_d = inside(o_d, D, BD)
    b_weight = tl.load(ln_weight + i_h * D + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]  # [1, BD]
    b_bias = tl.load(ln_bias + i_h * D + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]  # [1, BD]
    before = tl.load(position + i_n)
    b_sum = tl.load(sums + i_nh)
    for t in tl.range(0, T, disable_licm=True):
        fresh = (before + t) % C == 0
        row = (i_n * T + t) * H + i_h  # of the token in the contiguous [N, T, H] gates
        b_q = vector(q, t * stride_qt, o_d, m_d)[None, :]  # [1, BD]
        b_k = vector(k, t * stride_kt, o_d, m_d)[None, :]  # [1, BD]
        theta, decay = 0.0, 0.0
        if carried is not None:
            theta = tl.load(momentum + row).to(tl.float32)
        if log_decay is not None:
            decay = tl.load(log_decay + row).to(tl.float32)
        b_sum = tl.where(fresh, 0.0, b_sum) + decay

        # what the gate sums over several blocks: by columns of S1, or over each matrix
        shift_1, total_1, total_2 = 0.0, 0.0, 0.0
        rho_1, rho_2 = 1.0, 1.0
        if RETENTION == retentions.ROWS:
            shift_1 = tl.full((1, BD), retentions.BOTTOM, tl.float32)
            total_1 = tl.full((1, BD), 0.0, tl.float32)
            if fresh:
                for i in tl.range(0, NH, disable_licm=True):
                    o_h = i * BH + tl.arange(0, BH)
                    o, m = o_h[:, None] * D + o_d[None, :], inside(o_h, Hd, BH)[:, None] & m_d[None, :]
                    b_a = tl.load(dual + o, mask=m, other=0.0)
                    shift = tl.maximum(shift_1, tl.max(tl.where(m, b_a, retentions.BOTTOM), 0)[None, :])
                    b_e = tl.where(m, retentions.term(tl.where(m, b_a, shift), shift, RETENTION, R0, R1), 0.0)
                    total_1 = total_1 * tl.exp(shift_1 - shift) + tl.sum(b_e, 0)[None, :]
                    shift_1 = shift
        elif RETENTION == retentions.ENTIRE:
            if fresh:
                for i in tl.range(0, NH, disable_licm=True):
                    o_h = i * BH + tl.arange(0, BH)
                    o, m = o_h[:, None] * D + o_d[None, :], inside(o_h, Hd, BH)[:, None] & m_d[None, :]
                    b_a1, b_a2 = load_pair(dual, o, m, SIZE)
                    total_1 += tl.sum(tl.where(m, retentions.term(b_a1, 0.0, RETENTION, R0, R1), 0.0))
                    total_2 += tl.sum(tl.where(m, retentions.term(b_a2, 0.0, RETENTION, R0, R1), 0.0))
                total_1 += retentions.floor(RETENTION, R0, R1)
                total_2 += retentions.floor(RETENTION, R0, R1)
                rho_1 = retentions.scale(total_1, RETENTION, R0, R1)
                rho_2 = retentions.scale(total_2, RETENTION, R0, R1)
                tl.store(rho + i_nh * 2, rho_1)
                tl.store(rho + i_nh * 2 + 1, rho_2)
            else:
                rho_1, rho_2 = tl.load(rho + i_nh * 2), tl.load(rho + i_nh * 2 + 1)

        # predict
        b_u = tl.zeros((1, BD), tl.float32)
        for i in tl.range(0, NH, disable_licm=True):
            o_h = i * BH + tl.arange(0, BH)
            m_h = inside(o_h, Hd, BH)
            o, m = o_h[:, None] * D + o_d[None, :], m_h[:, None] & m_d[None, :]
            b_a1, b_a2 = load_pair(dual, o, m, SIZE)
            _, b_s1 = begin(b_a1, start, primal, o, m, fresh, shift_1, total_1, -1, RETENTION, R0, R1)  # [BH, BD]
            _, b_w2 = begin(b_a2, start_2, primal_2, o, m, fresh, 0.0, total_2, 1, RETENTION, R0, R1)  # [BH, BD]
            b_z = tl.sum(b_w2 * b_k, 1)  # [BH]
            tl.store(hidden + o_h, b_z, mask=m_h)
            b_u += tl.sum(gelu(b_z)[:, None] * b_s1, 0)[None, :]

        # the inner gradient
        b_x, b_inverse = normalised(b_u, m_d, D, EPS)
        b_e = -vector(v, t * stride_vt, o_d, m_d)[None, :]
        if READS:
            b_e = tl.where(m_d[None, :], b_e + b_k + b_x * b_weight + b_bias, 0.0)
        square, b_delta = 0.0, 0.0
        if COUPLED:
            square = tl.sum(b_e * b_e)
        if DELTA:
            b_delta = gate_of(delta, row, o_d, m_d, D, False)
        b_gu = layer_norm_vjp(b_x, b_inverse, biases.value(b_e, square, b_delta, BIAS, P0, P1, P2) * b_weight, m_d, D)
        tl.debug_barrier()

        # write and read
        rate, alpha, gamma = tl.load(lr + row).to(tl.float32), tl.exp(decay), tl.exp(b_sum)
        b_uq = tl.zeros((1, BD), tl.float32)
        for i in tl.range(0, NH, disable_licm=True):
            o_h = i * BH + tl.arange(0, BH)
            m_h = inside(o_h, Hd, BH)
            o, m = o_h[:, None] * D + o_d[None, :], m_h[:, None] & m_d[None, :]
            b_z = tl.load(hidden + o_h, mask=m_h, other=0.0)  # [BH]
            b_a1, b_a2 = load_pair(dual, o, m, SIZE)
            b_s1 = tl.load(predicting + o, mask=m, other=0.0)
            b_gz = tl.sum(b_s1 * b_gu, 1) * gelu_slope(b_z)  # [BH]
            b_a1 = moved(b_a1, -gelu(b_z)[:, None] * (rate * b_gu), carried, o, m, theta, alpha)
            b_a2 = moved(b_a2, -(rate * b_gz)[:, None] * b_k, carried_2, o, m, theta, alpha)
            tl.store(dual + o, b_a1, mask=m)
            tl.store(dual + SIZE + o, b_a2, mask=m)
            b_start1, b_start2, b_w2 = b_a1, b_a2, b_a2
            if RETENTION != retentions.L2:
                b_start1, b_start2 = load_pair(start, o, m, SIZE)
                b_w2 = tl.load(primal_2 + o, mask=m, other=0.0)
            b_aq = gelu(tl.sum(read_matrix(b_a2, b_start2, b_w2, gamma, rho_2, RETENTION) * b_q, 1))
            b_uq += tl.sum(b_aq[:, None] * read_matrix(b_a1, b_start1, b_s1, gamma, rho_1, RETENTION), 0)[None, :]
        b_xq, _ = normalised(b_uq, m_d, D, EPS)
        store(out + t * stride_ot + o_d[None, :], b_q + b_xq * b_weight + b_bias, m_d[None, :])
        tl.debug_barrier()


def stepper(call):
    """``run(buffers, q, k, v, lr, log_decay, delta, momentum, out)`` for calls like this one."""
    step = Step.of(call)
    hidden = torch.empty(*call.state.dual[0].shape[:2], step.key.hidden, dtype=torch.float32, device=call.q.device)
    norm = dict(ln_weight=call.ln_weight.contiguous(), ln_bias=call.ln_bias.contiguous())

    def run(buffers, q, k, v, lr, log_decay, delta, momentum, out) -> None:
        step.launch(mlp_step, 1, buffers, q, k, v, lr, log_decay, delta, momentum, out, hidden=hidden, **norm)

    return run
