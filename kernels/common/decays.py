"""Weights of a chunk's writes and states from its token gates: small kernels, parallel over chunks (docs/mathematics.md, section 3).

    linear_decay       gamma_t, gamma_C / gamma_s, and log-decays whose differences give L_ts = gamma_t / gamma_s
    momentum_weights   with momentum: gamma, M_C, b as rows of `decays`; pi, Theta_C as rows of `moves`; M as `pairs`, Theta as `steps`
    channel_decay      decays by channel: gamma_tv, gamma_Cv / gamma_sv
    channel_momentum   ... with momentum: gamma_tv, M_Cs,v, b_tv

    Theta_t = theta_t Theta_{t-1}, Theta_tt = 1      M_t = alpha_t M_{t-1} + Theta_t        (rows of Theta and M)
    pi_t = theta_t pi_{t-1},       pi_0 = 1          b_t = alpha_t b_{t-1} + pi_t,      b_0 = 0

Without momentum the write of token s has weight L_ts in the state of token t, with momentum ``M_ts``, where ``M = L Theta`` and
``Theta_ts = theta_{s+1} ... theta_t``. The momentum matrix S_0 at the chunk's start enters the state with weight b_t and the next momentum
matrix with weight pi_t. Only numbers in [0, 1] are multiplied and nothing is divided, so gates may be 0. M is float32 although the
products of the forward round it: the gates' gradients read the same buffer and need its digits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chunks import HEADS, chunk_of, chunk_program, head_programs, heads_program
from .gates import CARRY, LOWEST, UNIT
from .launch import Problem, launch
from .tiles import LENGTHS, inside, only_if, wide


@triton.jit(do_not_specialize=LENGTHS)
def linear_decay(
    log_decay, position, decays,
    cu_seqlens, first_slot, slot_owner,
    T, H, CHUNKS, ROW,
    TOKENS: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """``decays [4, B, T, H]``: gamma_t, gamma_C / gamma_s, and the cumulative log-decays in two parts whose differences keep their digits.

    The difference of two sums near -1e4 would lose a step of -0.01 between them. So every log-decay is split into a multiple of 2^-10,
    whose sums are exact in float32 (128 * 110 * 1024 < 2^24), and a remainder below 2^-11, whose sums are small. gamma_t and
    gamma_C / gamma_s are each summed from their own end, so nothing cancels.
    """
    ROW = wide(ROW)
    i_slot, i_h = heads_program(H)
    i_b, t0, bos, eos = chunk_of(i_slot, position, cu_seqlens, first_slot, slot_owner, T, CHUNKS, TOKENS, C)
    if first_slot is not None:
        if t0 >= eos:  # an unused slot
            return
    o_c, o_h = tl.arange(0, C), tl.arange(0, HEADS)
    m_t = (t0 + o_c < eos) & (t0 + o_c >= bos)
    m_next = (t0 + o_c + 1 < eos) & (t0 + o_c + 1 >= bos) & (o_c < C - 1)
    row = (i_b * T + t0) * H
    o_g = o_c[:, None] * H + i_h + o_h[None, :]
    m_h = (i_h + o_h < H)[None, :]
    m_g = m_t[:, None] & m_h
    b_g = tl.load(log_decay + row + o_g, mask=m_g, other=0.0)  # [C, HEADS]
    b_next = tl.load(log_decay + row + H + o_g, mask=m_next[:, None] & m_h, other=0.0)
    tl.store(decays + row + o_g, tl.exp(tl.cumsum(b_g, 0)), mask=m_g)
    tl.store(decays + ROW + row + o_g, tl.exp(tl.cumsum(b_next, 0, reverse=True)), mask=m_g)
    b_g = tl.maximum(b_g, LOWEST, propagate_nan=tl.PropagateNan.ALL)
    b_units = tl.floor(b_g * UNIT + 0.5)
    tl.store(decays + 2 * ROW + row + o_g, tl.cumsum(b_units, 0), mask=m_g)
    tl.store(decays + 3 * ROW + row + o_g, tl.cumsum(b_g - b_units / UNIT, 0), mask=m_g)


@triton.jit(do_not_specialize=LENGTHS)
def momentum_weights(
    log_decay, momentum, position, decays, moves, pairs, steps,
    cu_seqlens, first_slot, slot_owner,
    T, H, CHUNKS, ROW,
    TOKENS: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """``decays [3, B, T, H]``: gamma_t, M_Cs, b_t; ``moves [2, B, T, H]``: pi_t, Theta_Cs; ``pairs, steps [slots, H, C, C]``: M, Theta.

    Token C is the last of the chunk. With decays by channel `log_decay`, `decays` and `pairs` are None (see `channel_momentum`).
    """
    ROW = wide(ROW)
    i_slot, i_h = heads_program(H)
    i_b, t0, bos, eos = chunk_of(i_slot, position, cu_seqlens, first_slot, slot_owner, T, CHUNKS, TOKENS, C)
    if first_slot is not None:
        if t0 >= eos:  # an unused slot
            return
    o_c, o_h = tl.arange(0, C), tl.arange(0, HEADS)
    m_c = (t0 + o_c < eos) & (t0 + o_c >= bos)
    row = (i_b * T + t0) * H
    m_h = i_h + o_h < H
    o_hs = ((i_slot * H + i_h + o_h) * C * C)[:, None] + o_c[None, :]  # of row 0
    b_gamma, b_pi = tl.full((HEADS,), 1.0, tl.float32), tl.full((HEADS,), 1.0, tl.float32)
    b_carry = tl.zeros((HEADS,), tl.float32)
    b_step = tl.zeros((HEADS, C), tl.float32)  # Theta_t
    b_pair = tl.zeros((HEADS, C), tl.float32)  # M_t
    for i_t in range(0, C):
        here = (t0 + i_t < eos) & (t0 + i_t >= bos)
        m_g = only_if(here, m_h)
        p_g = row + i_t * H + i_h + o_h
        b_theta = tl.load(momentum + p_g, mask=m_g, other=1.0)
        b_step = tl.where(only_if(here, o_c == i_t)[None, :], 1.0, b_step * b_theta[:, None])
        b_pi *= b_theta
        if log_decay is not None:
            b_alpha = tl.exp(tl.load(log_decay + p_g, mask=m_g, other=0.0))
            b_gamma *= b_alpha
            b_pair *= b_alpha[:, None]
            b_carry *= b_alpha
        b_pair = tl.where(here, b_pair + b_step, b_pair)
        b_carry = tl.where(here, b_carry + b_pi, b_carry)
        tl.store(moves + p_g, b_pi, mask=m_g)
        if decays is not None:
            tl.store(decays + p_g, b_gamma, mask=m_g)
            tl.store(decays + CARRY * ROW + p_g, b_carry, mask=m_g)
            tl.store(pairs + i_t * C + o_hs, b_pair, mask=m_h[:, None])
        if steps is not None:
            tl.store(steps + i_t * C + o_hs, b_step, mask=m_h[:, None])
    p_end = row + o_c[None, :] * H + i_h + o_h[:, None]
    m_end = m_c[None, :] & m_h[:, None]
    if decays is not None:
        tl.store(decays + ROW + p_end, b_pair, mask=m_end)
    tl.store(moves + ROW + p_end, b_step, mask=m_end)


@triton.jit(do_not_specialize=LENGTHS)
def channel_decay(
    log_decay, position, decays,
    cu_seqlens, first_slot, slot_owner,
    T, H, CHUNKS, ROW,
    TOKENS: tl.constexpr, C: tl.constexpr, Dv: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """``decays [2, B, T, H, Dv]``: gamma_tv and gamma_Cv / gamma_sv, each summed from its own end."""
    ROW = wide(ROW)
    NV: tl.constexpr = (Dv + BV - 1) // BV
    i_v, _, i_slot, i_h = chunk_program(NV, 1)
    i_b, t0, bos, eos = chunk_of(i_slot, position, cu_seqlens, first_slot, slot_owner, T, CHUNKS, TOKENS, C)
    o_t, o_v = tl.arange(0, C), i_v * BV + tl.arange(0, BV)
    m_v = inside(o_v, Dv, BV)[None, :]
    m_t = ((t0 + o_t < eos) & (t0 + o_t >= bos))[:, None] & m_v
    m_next = ((t0 + o_t + 1 < eos) & (t0 + o_t + 1 >= bos) & (o_t < C - 1))[:, None] & m_v
    o_tv = ((i_b * T + t0) * H + i_h) * Dv + (o_t * (H * Dv))[:, None] + o_v[None, :]
    b_g = tl.load(log_decay + o_tv, mask=m_t, other=0.0)  # [C, BV]
    b_next = tl.load(log_decay + H * Dv + o_tv, mask=m_next, other=0.0)
    tl.store(decays + o_tv, tl.exp(tl.cumsum(b_g, 0)), mask=m_t)
    tl.store(decays + ROW * Dv + o_tv, tl.exp(tl.cumsum(b_next, 0, reverse=True)), mask=m_t)


@triton.jit(do_not_specialize=LENGTHS)
def channel_momentum(
    log_decay, momentum, moves, position, decays,
    cu_seqlens, first_slot, slot_owner,
    T, H, CHUNKS, ROW,
    TOKENS: tl.constexpr, C: tl.constexpr, Dv: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """``decays [3, B, T, H, Dv]``: gamma_tv, M_Cs,v, b_tv; ``M_Cs = L_Cs + theta_{s+1} M_Cs+1`` from the end."""
    ROW = wide(ROW)
    NV: tl.constexpr = (Dv + BV - 1) // BV
    i_v, _, i_slot, i_h = chunk_program(NV, 1)
    i_b, t0, bos, eos = chunk_of(i_slot, position, cu_seqlens, first_slot, slot_owner, T, CHUNKS, TOKENS, C)
    o_v = i_v * BV + tl.arange(0, BV)
    m_v = inside(o_v, Dv, BV)
    row = (i_b * T + t0) * H + i_h
    b_gamma, b_carry = tl.full((BV,), 1.0, tl.float32), tl.zeros((BV,), tl.float32)
    for i_t in range(0, C):
        here = (t0 + i_t < eos) & (t0 + i_t >= bos)
        m_tv, o_tv = only_if(here, m_v), (row + i_t * H) * Dv + o_v
        b_alpha = tl.exp(tl.load(log_decay + o_tv, mask=m_tv, other=0.0))  # [BV]
        b_gamma *= b_alpha
        b_carry = b_carry * b_alpha + tl.load(moves + row + i_t * H, mask=here, other=0.0)
        tl.store(decays + o_tv, b_gamma, mask=m_tv)
        tl.store(decays + 2 * ROW * Dv + o_tv, b_carry, mask=m_tv)
    b_l, b_m = tl.full((BV,), 1.0, tl.float32), tl.zeros((BV,), tl.float32)  # L_Cs, theta_{s+1} M_Cs+1
    for i in range(0, C):
        i_s = C - 1 - i
        here = (t0 + i_s < eos) & (t0 + i_s >= bos)
        m_sv, o_sv = only_if(here, m_v), (row + i_s * H) * Dv + o_v
        b_m = tl.where(here, b_m + b_l, b_m)
        tl.store(decays + ROW * Dv + o_sv, b_m, mask=m_sv)
        b_l *= tl.exp(tl.load(log_decay + o_sv, mask=m_sv, other=0.0))
        b_m *= tl.load(momentum + row + i_s * H, mask=here, other=1.0)


# -------------------------------------------------------------------------------------------------------------- launchers


def chunk_decays(p: Problem) -> Tensor | None:
    """The decays ``[4, B, T, H]`` of `linear_decay`; None without log-decays."""
    if p.log_decay is None:
        return None
    decays = p.empty(4, p.batch, p.tokens, p.heads, dtype=torch.float32)
    launch(linear_decay, p, head_programs(p), None, dict(decays=decays))
    return decays


def decays_by_channel(p: Problem, moves: Tensor | None = None) -> Tensor:
    """gamma_tv and M_Cs,v; with momentum, whose pi is in ``moves``, b_tv: ``[2 or 3, B, T, H, Dv]`` float32."""
    decays = p.empty(2 if moves is None else 3, p.batch, p.tokens, p.heads, p.value_dim, dtype=torch.float32)
    if moves is None:
        launch(channel_decay, p, p.slots.count, "value", dict(decays=decays))
    else:
        launch(channel_momentum, p, p.slots.count, "value", dict(moves=moves, decays=decays))
    return decays


class Weights(NamedTuple):
    """The weights that the gates of every chunk give; None where they are not needed."""

    decays: Tensor | None  # [4, B, T, H] from linear_decay, [3, B, T, H] from momentum_weights, [2 or 3, B, T, H, Dv] by channel
    moves: Tensor | None = None  # [2, B, T, H]   pi, Theta_C
    pairs: Tensor | None = None  # [slots, H, C, C] float32   M, unless decays go by channel
    steps: Tensor | None = None  # [slots, H, C, C] float32   Theta, for a backward, and where decays go by channel

    def only(self, *names: str) -> dict[str, Tensor | None]:
        return {name: getattr(self, name) for name in names}


def chunk_weights(p: Problem, backward: bool = False) -> Weights:
    """The weights of a call; ``backward`` adds those that only the gates' gradients read."""
    if p.momentum is None:
        return Weights(decays_by_channel(p) if p.key.channels else chunk_decays(p))
    square, by_channel = (p.slots.count, p.heads, p.rows, p.rows), p.key.channels

    def empty(wanted: bool, *shape: int) -> Tensor | None:
        return p.empty(*shape, dtype=torch.float32) if wanted else None

    tokens = (p.batch, p.tokens, p.heads)
    weights = Weights(
        empty(not by_channel, 3, *tokens), empty(True, 2, *tokens), empty(not by_channel, *square), empty(backward or by_channel, *square)
    )
    own = weights._asdict() | dict(log_decay=None if by_channel else p.log_decay)
    launch(momentum_weights, p, head_programs(p), None, own)
    return weights._replace(decays=decays_by_channel(p, weights.moves)) if by_channel else weights
