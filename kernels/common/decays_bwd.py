"""Gradients of log-decay and momentum from sums of the other backward kernels, parallel over chunks (docs/mathematics.md, section 7).

linear_decay_bwd       d log alpha without momentum: four sums over pairs of a read and a write (equation in linear/sequence.py)
momentum_weights_bwd   d log alpha and d theta with momentum, by the recursion of decays.py backwards
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chunks import HEADS, chunk_of, head_programs, heads_program
from .gates import CARRY, error_place
from .launch import Problem, launch
from .tiles import LENGTHS, only_if, wide


@triton.jit(do_not_specialize=LENGTHS)
def linear_decay_bwd(
    decays, rows_read, rows_pairs, rows_to_end, rows_error, rows_crossed, inner, grad_log_decay,
    cu_seqlens, first_slot, slot_owner,
    T, H, CHUNKS, ROW, SLOTS, READ_ROWS, END_ROWS,
    TOKENS: tl.constexpr, C: tl.constexpr, BC: tl.constexpr, CHUNK: tl.constexpr, DECAY_FIRST: tl.constexpr,
):  # fmt: skip
    """d log alpha of one chunk and some heads, from its four sums.

    In exact steps (linear/block.py) also from what errors read: of the state ``rows_error [tiles, B, T, H]``, at the error's token, and of
    the block's writes ``rows_crossed [B, T, H]``, already summed.
    """
    ROW, SLOTS = wide(ROW), wide(SLOTS)
    NC: tl.constexpr = C // BC
    i_slot, i_h = heads_program(H)
    i_b, t0, _, eos = chunk_of(i_slot, None, cu_seqlens, first_slot, slot_owner, T, CHUNKS, TOKENS, C)
    if first_slot is not None:
        if t0 >= eos:  # an unused slot
            return
    o_c, o_h = tl.arange(0, C), tl.arange(0, HEADS)
    row = (i_b * T + t0) * H
    m_h = i_h + o_h < H
    m_g = (t0 + o_c < eos)[:, None] & m_h[None, :]
    m_before = m_g & (o_c >= 1)[:, None]
    p_g = row + o_c[:, None] * H + i_h + o_h[None, :]
    b_read = tl.zeros((C, HEADS), tl.float32)
    b_pairs = tl.zeros((C, HEADS), tl.float32)
    b_end_sum = tl.zeros((C, HEADS), tl.float32)
    b_inner = tl.zeros((HEADS,), tl.float32)
    for i in range(0, READ_ROWS):
        base = i * ROW
        b_read += tl.load(rows_read + base + p_g, mask=m_g, other=0.0)
        b_inner += tl.load(inner + (i * SLOTS + i_slot) * H + i_h + o_h, mask=m_h, other=0.0)
    for i_r in range(0, NC):  # a block of writes pairs with the reads from it on
        m_r = m_before & (o_c // BC >= i_r)[:, None]
        b_pairs += tl.load(rows_pairs + i_r * ROW + p_g - H, mask=m_r, other=0.0)
    for i in range(0, END_ROWS):
        b_end_sum += tl.load(rows_to_end + i * ROW + p_g - H, mask=m_before, other=0.0)
    last = (tl.minimum(eos - t0, C) - 1) * H
    b_inner *= tl.load(decays + row + last + i_h + o_h, mask=m_h, other=0.0)  # gamma_C
    if rows_error is not None:
        b_pairs += tl.load(rows_crossed + p_g, mask=m_g, other=0.0)
        for i in range(0, READ_ROWS * CHUNK):  # the errors that are taken after token c: its own, or those of the next chunk's tokens
            o_e = o_c if DECAY_FIRST else o_c + 1 + i % CHUNK
            m_e = (t0 + o_e < eos) & (o_e < TOKENS) & (error_place(o_e, CHUNK, DECAY_FIRST) == o_c)
            p_e = rows_error + i // CHUNK * ROW + row + o_e[:, None] * H + i_h + o_h[None, :]
            b_read += tl.load(p_e, mask=m_e[:, None] & m_h[None, :], other=0.0)
    b_g = tl.cumsum(b_read, 0, reverse=True) + b_pairs + tl.cumsum(b_end_sum, 0) + b_inner[None, :]
    tl.store(grad_log_decay + p_g, b_g, mask=m_g)


@triton.jit(do_not_specialize=LENGTHS)
def momentum_weights_bwd(
    log_decay, momentum, decays, moves, pairs, steps,
    grad_pairs, rows_read, rows_to_end, rows_step, rows_carry, inner,
    grad_log_decay, grad_momentum,
    cu_seqlens, first_slot, slot_owner,
    T, H, CHUNKS, ROW, SLOTS,
    TOKENS: tl.constexpr, C: tl.constexpr, SUMMED: tl.constexpr,
):  # fmt: skip
    """``d log alpha, d theta [B, T, H]`` of one chunk and some heads. With g for a gradient, from the chunk's last token C backwards:

        d log alpha_t = alpha_t (gM_t . M_{t-1} + gb_t b_{t-1}) + sum_{r >= t} gamma_r ggamma_r      gTheta_t += gM_t,  gpi_t += gb_t
        d theta_t = gTheta_t . Theta_{t-1} + gpi_t pi_{t-1}
        gM_{t-1} += alpha_t gM_t;  gb_{t-1} += alpha_t gb_t;  gTheta_{t-1} += theta_t gTheta_t;  gpi_{t-1} += theta_t gpi_t

    starting from ``grad_pairs [slots, H, C, C]`` (read on and below the diagonal) for gM, plus ``rows_to_end`` for its row C;
    ``rows_step`` for gTheta_C; ``rows_carry`` for gb; ``rows_read`` for gamma_t ggamma_t ``[B, T, H]``; and from the next chunk
    ``inner [3, slots, H]``: <J, A_0> for gamma_C, <J, S_0> for b_C, <JS, S_0> for pi_C. ``SUMMED``: decays go by channel and
    channel_decay_bwd has summed over them: gTheta is ``grad_pairs + rows_step``, gpi is ``rows_carry + <JS, S_0>``, and alpha counts as 0.
    """
    ROW, SLOTS = wide(ROW), wide(SLOTS)
    i_slot, i_h = heads_program(H)
    i_b, t0, _, eos = chunk_of(i_slot, None, cu_seqlens, first_slot, slot_owner, T, CHUNKS, TOKENS, C)
    if first_slot is not None:
        if t0 >= eos:  # an unused slot
            return
    count = tl.minimum(eos - t0, C).to(tl.int32)
    o_c, o_h = tl.arange(0, C), tl.arange(0, HEADS)
    row = (i_b * T + t0) * H
    m_h = i_h + o_h < H
    o_hs = ((i_slot * H + i_h + o_h) * C * C)[:, None] + o_c[None, :]  # of row 0
    p_last, p_inner = row + (count - 1) * H + i_h + o_h, inner + i_slot * H + i_h + o_h
    p_end = row + o_c[None, :] * H + i_h + o_h[:, None]
    m_end, m_last = (o_c < count)[None, :] & m_h[:, None], only_if(count > 0, m_h)
    b_pair = tl.zeros((HEADS, C), tl.float32)  # gM_t
    b_read = tl.zeros((HEADS,), tl.float32)
    b_carry = tl.zeros((HEADS,), tl.float32)  # gb_t
    if not SUMMED:
        b_pair += tl.load(rows_to_end + p_end, mask=m_end, other=0.0)
        b_read += tl.load(decays + p_last, mask=m_last, other=0.0) * tl.load(p_inner, mask=m_h, other=0.0)
        b_carry += tl.load(p_inner + SLOTS * H, mask=m_h, other=0.0)
    b_step = tl.load(rows_step + p_end, mask=m_end, other=0.0)  # gTheta_t [HEADS, C]
    b_pi = tl.load(p_inner + 2 * SLOTS * H, mask=m_h, other=0.0)  # gpi_t
    for i in range(0, count):
        i_t = count - 1 - i
        p_g = row + i_t * H + i_h + o_h
        m_before, m_past = only_if(i_t > 0, m_h), (o_c < i_t)[None, :] & m_h[:, None]
        b_pair += tl.load(grad_pairs + i_t * C + o_hs, mask=(o_c <= i_t)[None, :] & m_h[:, None], other=0.0)
        b_carry += tl.load(rows_carry + p_g, mask=m_h, other=0.0)
        b_step += b_pair
        b_pi += b_carry
        b_theta = tl.load(momentum + p_g, mask=m_h, other=0.0)
        b_dtheta = tl.sum(b_step * tl.load(steps + (i_t - 1) * C + o_hs, mask=m_past, other=0.0), 1)
        b_dtheta += b_pi * tl.load(moves + p_g - H, mask=m_before, other=1.0)
        tl.store(grad_momentum + p_g, b_dtheta, mask=m_h)
        b_step = tl.where(m_past, b_step * b_theta[:, None], 0.0)
        b_pi *= b_theta
        if log_decay is not None:
            b_read += tl.load(rows_read + p_g, mask=m_h, other=0.0)
            b_alpha = tl.exp(tl.load(log_decay + p_g, mask=m_h, other=0.0))
            b_dalpha = tl.sum(b_pair * tl.load(pairs + (i_t - 1) * C + o_hs, mask=m_past, other=0.0), 1)
            b_dalpha += b_carry * tl.load(decays + CARRY * ROW + p_g - H, mask=m_before, other=0.0)
            tl.store(grad_log_decay + p_g, b_alpha * b_dalpha + b_read, mask=m_h)
            b_pair *= b_alpha[:, None]
            b_carry *= b_alpha
        if SUMMED:
            b_pair = tl.zeros((HEADS, C), tl.float32)
            b_carry = tl.zeros((HEADS,), tl.float32)
        else:
            b_pair = tl.where(m_past, b_pair, 0.0)


# -------------------------------------------------------------------------------------------------------------- launchers


def decay_gradient(
    p: Problem, rows_read: Tensor, rows_pairs: Tensor, rows_to_end: Tensor, inner: Tensor, block: int,
    rows_error: Tensor | None = None, rows_crossed: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """d log alpha ``[B, T, H]`` from its sums ``[tiles, B, T, H]`` (pairs by blocks of a chunk) and ``inner [tiles, slots, H]``.

    The problem shares the weights of the call, here and below.
    """
    grad = p.result(dtype=torch.float32)
    own = dict(
        rows_read=rows_read, rows_pairs=rows_pairs, rows_to_end=rows_to_end, inner=inner, grad_log_decay=grad,
        rows_error=rows_error, rows_crossed=rows_crossed, READ_ROWS=len(rows_read), END_ROWS=len(rows_to_end), BC=block,
    )  # fmt: skip
    launch(linear_decay_bwd, p, head_programs(p), None, own)
    return grad


def gate_gradients(
    p: Problem,
    grad_pairs: Tensor,
    rows_read: Tensor,
    rows_to_end: Tensor,
    rows_step: Tensor,
    rows_carry: Tensor,
    inner: Tensor,
) -> dict[str, Tensor]:
    """d log alpha (if there is a decay) and d theta ``[B, T, H]``, by argument name. Arguments as in :func:`momentum_weights_bwd`."""
    by_channel = p.key.channels
    log_decay = None if by_channel else p.log_decay
    grads = {name: p.result(dtype=torch.float32) for name, x in (("log_decay", log_decay), ("momentum", p.momentum)) if x is not None}
    own = dict(
        log_decay=log_decay, grad_pairs=grad_pairs,
        rows_read=rows_read, rows_to_end=rows_to_end, rows_step=rows_step, rows_carry=rows_carry, inner=inner,
        grad_log_decay=grads.get("log_decay"), grad_momentum=grads["momentum"], SUMMED=by_channel,
    )  # fmt: skip
    launch(momentum_weights_bwd, p, head_programs(p), None, own)
    return grads
