"""The mirror map of the MLP memory's retention gates (docs/mathematics.md, section 5), for both matrices at a chunk's start.

    mirror      W = phi(A), rho                                    forward
    pull_back   J <- gamma_C J + phi'(A)' dW + d rho d rho / dA    backward

A row of W1 is a column of S1; a row of W2 is a row of its tiles.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common import retention as retentions
from ..common.tiles import inside, store
from .math import lanes


@triton.jit
def mirror(
    memory, p_w, i_c,
    D: tl.constexpr, Hd: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr, RETENTION: tl.constexpr,
):  # fmt: skip
    """``phi`` of both duals in ``p_w``; returns their rho.

    S1 is only read through a LayerNorm, which removes the mean of its rows. If all of W1 lies near one value (``is_offset``) the mean is
    subtracted here: rounding it would cost as much precision as the remainder has.
    """
    SIZE: tl.constexpr = Hd * D
    PADDING: tl.constexpr = retentions.BOTTOM if RETENTION.row_coupled else 0.0
    o_d = lanes(BD, i_c, 8)
    m_d = inside(o_d, D, BD)
    b_shift1 = tl.full((BD,), retentions.BOTTOM, tl.float32)
    b_total1, b_total2 = tl.zeros((BD,), tl.float32), tl.zeros((BD,), tl.float32)
    if RETENTION.row_coupled or RETENTION.matrix_coupled:
        for i in tl.range(0, (Hd + BH - 1) // BH, disable_licm=True):
            o_h = i * BH + lanes(BH, i_c, 8)
            o_hd, m_hd = o_h[:, None] * D + o_d[None, :], inside(o_h, Hd, BH)[:, None] & m_d[None, :]
            b_a1 = tl.load(memory + o_hd, mask=m_hd, other=PADDING)  # [BH, BD]
            if RETENTION.row_coupled:
                b_larger = tl.maximum(b_shift1, tl.max(b_a1, 0))
                b_total1 = b_total1 * tl.exp(b_shift1 - b_larger)
                b_shift1 = b_larger
            b_total1 += tl.sum(retentions.term(b_a1, b_shift1[None, :], RETENTION), 0)
            if RETENTION.matrix_coupled:
                b_a2 = tl.load(memory + SIZE + o_hd, mask=m_hd, other=PADDING)  # [BH, BD]
                b_total2 += tl.sum(retentions.term(b_a2, 0.0, RETENTION), 0)
    rho1, rho2 = 1.0, 1.0
    total1, total2 = b_total1[None, :], b_total2[None, :]
    if RETENTION.matrix_coupled:
        total1 = tl.sum(b_total1, 0) + retentions.floor(RETENTION)
        total2 = tl.sum(b_total2, 0) + retentions.floor(RETENTION)
        if RETENTION.has_rho:
            rho1, rho2 = retentions.scale(total1, RETENTION), retentions.scale(total2, RETENTION)
    for i in tl.range(0, (Hd + BH - 1) // BH, disable_licm=True):
        o_h = i * BH + lanes(BH, i_c, 9)
        o_hd, m_hd = o_h[:, None] * D + o_d[None, :], inside(o_h, Hd, BH)[:, None] & m_d[None, :]
        b_a1 = tl.load(memory + o_hd, mask=m_hd, other=PADDING)  # [BH, BD]
        b_w1 = retentions.primal(b_a1, b_shift1[None, :], total1, RETENTION)
        if RETENTION.is_offset:
            b_w1 = tl.where(m_hd, b_w1 - (tl.sum(tl.where(m_hd, b_w1, 0.0), 1) / D)[:, None], 0.0)
        store(p_w + o_hd, b_w1, m_hd)
        b_a2 = tl.load(memory + SIZE + o_hd, mask=m_hd, other=PADDING)  # [BH, BD]
        b_shift2 = tl.max(b_a2, 1)[:, None]
        b_total = total2
        if RETENTION.row_coupled:
            b_total = tl.sum(retentions.term(b_a2, b_shift2, RETENTION), 1)[:, None]  # [BH, 1]
        store(p_w + SIZE + o_hd, retentions.primal(b_a2, b_shift2, b_total, RETENTION), m_hd)
    return rho1, rho2


@triton.jit
def pull_back(
    p_memory, p_primal, p_duals, p_w, gamma, grad_rho1, grad_rho2, rho1, rho2, i_c,
    D: tl.constexpr, Hd: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr, RETENTION: tl.constexpr,
):  # fmt: skip
    """``J <- gamma_C J + phi'(A)' dW + d rho d rho / dA`` of both matrices, in place."""
    SIZE: tl.constexpr = Hd * D
    o_d = lanes(BD, i_c, 6)
    m_d = inside(o_d, D, BD)
    b_along1, b_along2 = tl.zeros((BD,), tl.float32), tl.zeros((BD,), tl.float32)
    if RETENTION.row_coupled or RETENTION.matrix_coupled:
        for i in tl.range(0, (Hd + BH - 1) // BH, disable_licm=True):
            o_h = i * BH + lanes(BH, i_c, 6)
            o_hd, m_hd = o_h[:, None] * D + o_d[None, :], inside(o_h, Hd, BH)[:, None] & m_d[None, :]
            b_g1, b_a1 = tl.load(p_primal + o_hd, mask=m_hd, other=0.0), tl.load(p_duals + o_hd, mask=m_hd, other=0.0)  # [BH, BD]
            b_w1 = tl.load(p_w + o_hd, mask=m_hd, other=0.0).to(tl.float32)  # [BH, BD]
            b_along1 += tl.sum(retentions.along(b_g1, b_a1, b_w1, RETENTION), 0)
            if RETENTION.matrix_coupled:
                b_g2, b_a2 = tl.load(p_primal + SIZE + o_hd, mask=m_hd, other=0.0), tl.load(p_duals + SIZE + o_hd, mask=m_hd, other=0.0)
                b_along2 += tl.sum(retentions.along(b_g2, b_a2, b_a2, RETENTION), 0)
    along1, along2 = b_along1[None, :], b_along2[None, :]
    if RETENTION.matrix_coupled:
        along1, along2 = tl.sum(b_along1, 0) + grad_rho1, tl.sum(b_along2, 0) + grad_rho2
    for i in tl.range(0, (Hd + BH - 1) // BH, disable_licm=True):
        o_h = i * BH + lanes(BH, i_c, 7)
        o_hd, m_hd = o_h[:, None] * D + o_d[None, :], inside(o_h, Hd, BH)[:, None] & m_d[None, :]
        b_g1, b_a1 = tl.load(p_primal + o_hd, mask=m_hd, other=0.0), tl.load(p_duals + o_hd, mask=m_hd, other=0.0)  # [BH, BD]
        b_w1 = tl.load(p_w + o_hd, mask=m_hd, other=0.0).to(tl.float32)  # [BH, BD]
        b_j1 = tl.load(p_memory + o_hd, mask=m_hd, other=0.0) * gamma
        tl.store(p_memory + o_hd, b_j1 + retentions.pull(b_g1, b_a1, b_w1, along1, rho1, RETENTION), mask=m_hd)
        b_g2, b_a2 = tl.load(p_primal + SIZE + o_hd, mask=m_hd, other=0.0), tl.load(p_duals + SIZE + o_hd, mask=m_hd, other=0.0)
        b_w2 = tl.load(p_w + SIZE + o_hd, mask=m_hd, other=0.0).to(tl.float32)  # [BH, BD]
        b_along = along2
        if RETENTION.row_coupled:
            b_along = tl.sum(retentions.along(b_g2, b_a2, b_w2, RETENTION), 1)[:, None]  # [BH, 1]
        b_j2 = tl.load(p_memory + SIZE + o_hd, mask=m_hd, other=0.0) * gamma
        tl.store(p_memory + SIZE + o_hd, b_j2 + retentions.pull(b_g2, b_a2, b_w2, b_along, rho2, RETENTION), mask=m_hd)
