"""Loads of a chunk's token gates, decays (computed in decays.py), thresholds, errors and updates."""

import triton
import triton.language as tl

from . import bias as biases

#: exp of anything lower is 0 in float32
LOWEST = tl.constexpr(-110.0)
#: log-decays are summed as multiples of 2^-10 plus a remainder, see `linear_decay`
UNIT = tl.constexpr(1024.0)
#: with momentum, the row of `decays` that holds b_t
CARRY = tl.constexpr(2)


@triton.jit
def load_gate(gate, row, o_g, m_t):
    """A token gate of a chunk ``[C]`` as float32; 0 beyond the sequence."""
    return tl.load(gate + row + o_g, mask=m_t, other=0.0).to(tl.float32)


@triton.jit
def load_gamma(decays, row, o_g, m_t, C: tl.constexpr):
    """``gamma_t [C]``: the decay from the chunk's start to each token."""
    if decays is None:
        return tl.full((C,), 1.0, tl.float32)
    else:
        return load_gate(decays, row, o_g, m_t)


@triton.jit
def load_row_weights(decays, row, o_g, o_v, m_t, m_v, Dv: tl.constexpr):
    """Weights by channel ``[C, BV]`` of a chunk's tokens, from one row of ``decays [.., B, T, H, Dv]``."""
    o_tv = o_g[:, None] * Dv + o_v[None, :]
    return tl.load(decays + row * Dv + o_tv, mask=m_t[:, None] & m_v[None, :], other=0.0)


@triton.jit
def load_total(decays, row, last):
    """``gamma_C``; ``last`` is the offset of the chunk's last token."""
    if decays is None:
        return 1.0
    else:
        return tl.load(decays + row + last)


@triton.jit
def decayed(x, gamma, kept, place, o_k, m_k, Dk: tl.constexpr):
    """What a chunk leaves of a state ``[BK, BV]``: gamma_C times it, or ``kept [slots, H, Dk]`` where decays go by key channel."""
    if kept is None:
        return x * gamma
    else:
        return x * tl.load(kept + place * Dk + o_k, mask=m_k, other=0.0)[:, None]


@triton.jit
def load_to_end(decays, ROW, row, o_g, m_t, C: tl.constexpr):
    """``gamma_C / gamma_s [C]``."""
    if decays is None:
        return tl.full((C,), 1.0, tl.float32)
    else:
        return load_gate(decays + ROW, row, o_g, m_t)


@triton.jit
def error_place(o_t, CHUNK: tl.constexpr, DECAY_FIRST: tl.constexpr):
    """b(t), the token of a block after which the error of token t is taken: the last one before its chunk of CHUNK tokens, -1 in the first
    chunk; with decay first t itself."""
    if DECAY_FIRST:
        return o_t
    else:
        return o_t // CHUNK * CHUNK - 1


@triton.jit
def load_before(decays, row, H, o_t, m_t, CHUNK: tl.constexpr, DECAY_FIRST: tl.constexpr):
    """``r_t = gamma_b(t)``, 1 where b(t) lies before the block."""
    o_b = error_place(o_t, CHUNK, DECAY_FIRST)
    if decays is None:
        return tl.where(m_t, 1.0, 0.0)
    else:
        return tl.load(decays + row + o_b * H, mask=m_t & (o_b >= 0), other=1.0)


@triton.jit
def load_scale(scales, place):
    """rho of a chunk and head; 1 for a gate without."""
    if scales is None:
        return 1.0
    else:
        return tl.load(scales + place)


@triton.jit
def load_scales(scales, place):
    """rho of both matrices of an MLP."""
    return load_scale(scales, place * 2), load_scale(scales, place * 2 + 1)


@triton.jit
def pair_decay(decays, pairs, ROW, row, H, C: tl.constexpr, o_later, o_earlier, m_later, m_earlier):
    """Weight of the write of s in the state of t, 0 for s > t: ``L_ts = gamma_t / gamma_s``, with momentum M_ts from the chunk's ``pairs``.

    The offsets of t (later) and s (earlier) are ``[BC, 1]`` and ``[1, BC]``, or the other way round.
    """
    causal = o_later >= o_earlier
    if pairs is not None:
        return tl.load(pairs + o_later * C + o_earlier)
    elif decays is None:
        return tl.where(causal, 1.0, 0.0)
    else:
        units, rest = decays + 2 * ROW, decays + 3 * ROW
        b_units = load_gate(units, row, o_later * H, m_later) - load_gate(units, row, o_earlier * H, m_earlier)
        b_rest = load_gate(rest, row, o_later * H, m_later) - load_gate(rest, row, o_earlier * H, m_earlier)
        return tl.where(causal, tl.exp(tl.minimum(b_units / UNIT + b_rest, 0.0, propagate_nan=tl.PropagateNan.ALL)), 0.0)


@triton.jit
def load_delta(delta, row, o_g, o_tv, m_t, m_tv, Dv: tl.constexpr, BIAS: tl.constexpr):
    """The threshold delta as ``[C, 1]`` or ``[C, BV]``; 0 for a bias without one."""
    if BIAS.delta == 2:
        return tl.load(delta + row * Dv + o_tv, mask=m_tv, other=0.0).to(tl.float32)
    elif BIAS.delta == 1:
        return load_gate(delta, row, o_g, m_t)[:, None]
    else:
        return 0.0


@triton.jit
def load_error(v, stride_t, errors, row, o_c, o_v, o_tv, m_tv, Dv: tl.constexpr, BIAS: tl.constexpr):
    """A chunk's errors ``[C, BV]``: from the chain, or ``-v`` for a bias that reads no memory. ``v`` points to the chunk's start."""
    if BIAS.reads_memory:
        return tl.load(errors + row * Dv + o_tv, mask=m_tv, other=0.0).to(tl.float32)
    else:
        return -tl.load(v + o_c[:, None] * stride_t + o_v[None, :], mask=m_tv, other=0.0).to(tl.float32)


@triton.jit
def load_square(squares, row, o_g, m_t, BIAS: tl.constexpr):
    """``||e||^2 [C, 1]`` of each row, which the chain stored for a bias that couples rows."""
    if BIAS.row_coupled:
        return load_gate(squares, row, o_g, m_t)[:, None]
    else:
        return 0.0


@triton.jit
def load_lr(lr, row, o_g, o_tv, m_t, m_tv, Dv: tl.constexpr, CHANNEL_LR: tl.constexpr):
    """The step size eta as ``[C, 1]`` or ``[C, BV]``."""
    if CHANNEL_LR:
        return tl.load(lr + row * Dv + o_tv, mask=m_tv, other=0.0)
    else:
        return load_gate(lr, row, o_g, m_t)[:, None]


@triton.jit
def load_update(
    v, stride_t, lr, delta, errors, squares, row, H, o_s, o_v, m_s, m_v,
    Dv: tl.constexpr, BIAS: tl.constexpr, CHANNEL_LR: tl.constexpr,
):  # fmt: skip
    """``U = eta psi(E) [BC, BV]`` of some tokens of a chunk, from what the chain stored."""
    o_g, m_sv = o_s * H, m_s[:, None] & m_v[None, :]
    o_sv = o_g[:, None] * Dv + o_v[None, :]
    b_e = load_error(v, stride_t, errors, row, o_s, o_v, o_sv, m_sv, Dv, BIAS)
    b_square = load_square(squares, row, o_g, m_s, BIAS)
    b_delta = load_delta(delta, row, o_g, o_sv, m_s, m_sv, Dv, BIAS)
    return biases.value(b_e, b_square, b_delta, BIAS) * load_lr(lr, row, o_g, o_sv, m_s, m_sv, Dv, CHANNEL_LR)
