"""Decoding steps of the linear memory: ``S = W' [Dk, Dv]`` in place.

    e = S_0' k - v;  u = eta psi(e)                          S_0 = phi(A_0) at the start of the chunk
    M <- theta M - k u';  A <- alpha A + M                   (without momentum: A <- alpha A - k u')
    o = (gamma S_0 + rho (A - gamma A_0))' q                 without a gate: o = A' q

A program takes all keys of ``BV`` values: what a token needs of one value channel is a column of each matrix, read once, kept in
registers and written once. A bias that couples a row of the error, or a gate that couples the matrix, leaves one program to a head,
which goes over its tiles once more beforehand: for ``|e|^2``, and at a chunk's start for the sum of the gate.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import bias as biases
from . import retention as retentions
from .steps import Step, begin, gate_of, moved, read_matrix, vector
from .tiles import inside, only_if, store


@triton.jit
def error(b_w, b_k, v, row, o_v, m_v, READS: tl.constexpr):
    """``e [BV]``, or ``-v`` for a bias that reads no memory."""
    b_e = -vector(v, row, o_v, m_v)
    if READS:
        b_e += tl.sum(b_w * b_k[:, None], 0)
    return b_e


@triton.jit(do_not_specialize=("T",))
def linear_step(
    q, k, v, lr, log_decay, delta, momentum,
    dual, start, primal, rho, carried, sums, position, out,
    T, H,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh, stride_ob, stride_ot, stride_oh,
    Dk: tl.constexpr, Dv: tl.constexpr, C: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr,
    BIAS: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
    RETENTION: tl.constexpr, R0: tl.constexpr, R1: tl.constexpr,
    READS: tl.constexpr, COUPLED: tl.constexpr, ENTIRE: tl.constexpr,
    DELTA: tl.constexpr, CHANNEL_LR: tl.constexpr, CHANNEL_DECAY: tl.constexpr,
):  # fmt: skip
    """T tokens of one head of one sequence, all of its values (``ENTIRE``) or one tile of them."""
    NV: tl.constexpr = (Dv + BV - 1) // BV
    i_n = tl.program_id(0).to(tl.int64)
    i_h = tl.program_id(1).to(tl.int64)
    first, last = 0, NV
    if not ENTIRE:
        first = (i_n % NV).to(tl.int32)
        last = first + 1
        i_n = i_n // NV
    i_nh = i_n * H + i_h
    dual += i_nh * Dk * Dv
    if start is not None:
        start += i_nh * Dk * Dv
    if primal is not None:
        primal += i_nh * Dk * Dv
    if carried is not None:
        carried += i_nh * Dk * Dv
    q += i_n * stride_qb + i_h * stride_qh
    k += i_n * stride_kb + i_h * stride_kh
    v += i_n * stride_vb + i_h * stride_vh
    out += i_n * stride_ob + i_h * stride_oh

    o_k = tl.arange(0, BK)
    m_k = inside(o_k, Dk, BK)
    before = tl.load(position + i_n)
    b_sum = 0.0  # of the open chunk's log-decays, where channels share it
    if not CHANNEL_DECAY:
        b_sum = tl.load(sums + i_nh)
    for t in tl.range(0, T, disable_licm=True):
        fresh, at_end = (before + t) % C == 0, (before + t + 1) % C == 0
        row = (i_n * T + t) * H + i_h  # of the token in the contiguous [N, T, H, ...] gates
        b_q = vector(q, t * stride_qt, o_k, m_k)  # [BK]
        b_k = vector(k, t * stride_kt, o_k, m_k)  # [BK]
        theta = 0.0
        if carried is not None:
            theta = tl.load(momentum + row).to(tl.float32)
        if not CHANNEL_DECAY:
            b_sum = tl.where(fresh, 0.0, b_sum)
            if log_decay is not None:
                b_sum += tl.load(log_decay + row).to(tl.float32)

        total = 0.0  # of the gate that couples the matrix
        scale = 1.0
        if RETENTION == retentions.ENTIRE:
            if fresh:
                for i in tl.range(0, NV, disable_licm=True):
                    o_v = i * BV + tl.arange(0, BV)
                    m = m_k[:, None] & inside(o_v, Dv, BV)[None, :]
                    b_a = tl.load(dual + o_k[:, None] * Dv + o_v[None, :], mask=m, other=0.0)
                    total += tl.sum(tl.where(m, retentions.term(b_a, 0.0, RETENTION, R0, R1), 0.0))
                total += retentions.floor(RETENTION, R0, R1)
                scale = retentions.scale(total, RETENTION, R0, R1)
                tl.store(rho + i_nh, scale)
            else:
                scale = tl.load(rho + i_nh)

        square = 0.0  # |e|^2
        if COUPLED and NV > 1:
            for i in tl.range(0, NV, disable_licm=True):
                o_v = i * BV + tl.arange(0, BV)
                m_v = inside(o_v, Dv, BV)
                o, m = o_k[:, None] * Dv + o_v[None, :], m_k[:, None] & m_v[None, :]
                b_a = tl.load(dual + o, mask=m, other=0.0)
                _, b_w = begin(b_a, start, primal, o, m, fresh, 0.0, total, 0, RETENTION, R0, R1)
                b_e = error(b_w, b_k, v, t * stride_vt, o_v, m_v, READS)
                square += tl.sum(b_e * b_e)
            tl.debug_barrier()

        for i in tl.range(first, last, disable_licm=True):
            o_v = i * BV + tl.arange(0, BV)
            m_v = inside(o_v, Dv, BV)
            o, m = o_k[:, None] * Dv + o_v[None, :], m_k[:, None] & m_v[None, :]
            b_a = tl.load(dual + o, mask=m, other=0.0)  # [BK, BV]
            b_start, b_w = begin(b_a, start, primal, o, m, fresh, 0.0, total, 0, RETENTION, R0, R1)
            b_e = error(b_w, b_k, v, t * stride_vt, o_v, m_v, READS)  # [BV]
            if COUPLED and NV == 1:
                square = tl.sum(b_e * b_e)
            b_delta = 0.0
            if DELTA:
                b_delta = gate_of(delta, row, o_v, m_v, Dv, DELTA == 2)
            b_u = gate_of(lr, row, o_v, m_v, Dv, CHANNEL_LR) * biases.value(b_e, square, b_delta, BIAS, P0, P1, P2)
            b_decay = b_e * 0.0  # of this token, and of the chunk so far
            b_open = b_decay + b_sum
            if log_decay is not None:
                b_decay += gate_of(log_decay, row, o_v, m_v, Dv, CHANNEL_DECAY)
            if CHANNEL_DECAY:
                p_sum = sums + i_nh * Dv + o_v
                b_open = b_decay + tl.load(p_sum, mask=only_if(fresh == 0, m_v), other=0.0)
                tl.store(p_sum, tl.where(at_end, 0.0, b_open), mask=m_v)
            b_a = moved(b_a, -b_k[:, None] * b_u[None, :], carried, o, m, theta, tl.exp(b_decay)[None, :])
            tl.store(dual + o, b_a, mask=m)
            b_read = read_matrix(b_a, b_start, b_w, tl.exp(b_open)[None, :], scale, RETENTION)
            store(out + t * stride_ot + o_v, tl.sum(b_read * b_q[:, None], 0), m_v)
        tl.debug_barrier()


def stepper(call):
    """``run(buffers, q, k, v, lr, log_decay, delta, momentum, out)`` for calls like this one."""
    step = Step.of(call)
    units = 1 if step.key.entire else -(-step.key.value_dim // step.sizes["BV"])

    def run(buffers, q, k, v, lr, log_decay, delta, momentum, out) -> None:
        channel = dict(CHANNEL_LR=lr.dim() == 4, CHANNEL_DECAY=buffers.log_decay.dim() == 3)
        step.launch(linear_step, units, buffers, q, k, v, lr, log_decay, delta, momentum, out, **channel)

    return run
