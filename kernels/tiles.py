"""What every kernel does with tiles: where they lie, how they are multiplied, how they decay.

Only device functions; the legend of names and dimensions is in README.md beside this file.
"""

import triton
import triton.language as tl

from . import bias as biases

#: arguments that change with the length of a sequence or the size of a batch: their values are compiled into no kernel
LENGTHS = ("T", "t", "CHUNKS", "SEGMENTS", "EVERY", "SLOTS", "READ_ROWS", "KEPT_ROWS", "FIRST", "GROUP")
#: the interpreter has no bfloat16 arithmetic: there a bfloat16 operand is a float32 tile that holds bfloat16 numbers
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

#: exp of anything below is 0 in float32
LOWEST = tl.constexpr(-110.0)
#: log-decays are summed in units of 2^-10 and a rest, see `decay_parts`
UNIT = tl.constexpr(1024.0)
#: the row of `decays` that has b_t, where there is momentum
CARRY = tl.constexpr(2)
#: what a launch of `linear_state` walks: all chunks; the chunk that was open before; the whole ones; the one left open; a segment
WHOLE, HEAD, BODY, TAIL, SEGMENT = (tl.constexpr(i) for i in range(5))


# ------------------------------------------------------------------------------------------------------ where tokens lie


@triton.jit
def sequence_of(i_n, cu_seqlens, T):
    """Batch row, first token and end of sequence ``i_n``: a row of the batch, or a stretch of the only row."""
    if cu_seqlens is None:
        return i_n, i_n * 0, i_n * 0 + T
    else:
        return i_n * 0, tl.load(cu_seqlens + i_n), tl.load(cu_seqlens + i_n + 1)


@triton.jit
def slot_of(i_n, first, per_sequence):
    """The first slot of a sequence's chunks (or segments) in a buffer that has one slot for each."""
    if first is None:
        return i_n * per_sequence
    else:
        return tl.load(first + i_n)


@triton.jit
def owner_of(i_s, first, owner, per_sequence):
    """``(sequence, index within it)`` of a slot; the sequence is N for a slot that nobody uses."""
    if first is None:
        return i_s // per_sequence, i_s % per_sequence
    else:
        i_n = tl.load(owner + i_s)
        return i_n, i_s - tl.load(first + i_n)


@triton.jit
def end_of(t0, eos, C: tl.constexpr, TOKENS: tl.constexpr):
    """Where the chunk that begins at ``t0`` ends, for kernels that take C rows at once: C where it has as many tokens, or fewer."""
    if TOKENS == C:
        return eos
    else:
        return tl.minimum(eos, t0 + TOKENS)


@triton.jit
def part_of(i_n, i_segment, bos, eos, position, EVERY, TOKENS: tl.constexpr, PART: tl.constexpr):
    """``(origin, first, last)``: token 0 of chunk 0 and the chunks to walk; a sequence that resumes inside a chunk begins after origin."""
    origin, resumes = bos, 0
    if position is not None:
        before = tl.load(position + i_n)
        origin, resumes = bos - before, (before > 0).to(tl.int32)
    first, last, whole = 0, ((eos - origin + TOKENS - 1) // TOKENS).to(tl.int32), ((eos - origin) // TOKENS).to(tl.int32)
    if PART == HEAD:
        last = tl.minimum(last, resumes)
    elif PART == BODY:
        first, last = resumes, whole
    elif PART == TAIL:
        first = tl.maximum(whole, resumes)
    elif PART == SEGMENT:
        first = (i_segment * EVERY).to(tl.int32)
        last = tl.minimum(last, first + EVERY)
    return origin, first, last


# ------------------------------------------------------------------------------------------------------------ dot policy


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """``x`` in the dtype of the operands, to nearest even."""
    if INTERPRETED and DTYPE == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        return bits.to(tl.float32, bitcast=True)
    else:
        return x.to(DTYPE)


@triton.jit
def dot(x, y):
    """``x @ y`` with float32 accumulation: tensor cores for 16-bit operands, plain float32 for float32 ones."""
    if INTERPRETED:
        return tl.dot(x.to(tl.float32), y.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(x, y, input_precision="ieee")


@triton.jit
def store(pointers, x, mask):
    """Store a float32 tile in the pointers' dtype, to nearest even."""
    tl.store(pointers, rounded(x, pointers.dtype.element_ty).to(pointers.dtype.element_ty), mask=mask)


# ---------------------------------------------------------------------------------------------------------------- decays


@triton.jit
def inside(o, D: tl.constexpr, BLOCK: tl.constexpr):
    """Which offsets lie in a head dimension: nothing to test where whole tiles cover it."""
    if D % BLOCK == 0:
        return tl.full((BLOCK,), True, tl.int1)
    else:
        return o < D


@triton.jit
def only_if(condition, mask):
    """``mask`` where a condition on scalars holds, else nothing. Not ``mask & condition``: Triton 3.9's interpreter then makes it int32."""
    return tl.where(condition, mask, False)


@triton.jit
def load_gate(gate, row, o_g, m_t):
    """A chunk's gate as float32; 0 beyond the sequence (no step)."""
    return tl.load(gate + row + o_g, mask=m_t, other=0.0).to(tl.float32)


@triton.jit
def load_gamma(decays, row, o_g, m_t, C: tl.constexpr):
    """``gamma_t [C]``: decay from the chunk's start to every token."""
    if decays is None:
        return tl.full((C,), 1.0, tl.float32)
    else:
        return load_gate(decays, row, o_g, m_t)


@triton.jit
def load_row_weights(decays, row, o_g, o_v, m_t, m_v, Dv: tl.constexpr):
    """Weights by channel ``[C, BV]`` of a chunk's tokens, from one of the rows ``[B, T, H, Dv]``."""
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
def load_to_end(decays, ROW, row, o_g, m_t, C: tl.constexpr):
    """``gamma_C / gamma_s [C]``."""
    if decays is None:
        return tl.full((C,), 1.0, tl.float32)
    else:
        return load_gate(decays + ROW, row, o_g, m_t)


@triton.jit
def load_scale(scales, place):
    """rho of a chunk and head."""
    if scales is None:
        return 1.0
    else:
        return tl.load(scales + place)


@triton.jit
def pair_decay(decays, pairs, ROW, row, H, C: tl.constexpr, o_later, o_earlier, m_later, m_earlier):
    """Weight of the write of s in the state of t, 0 for s > t: ``L_ts = gamma_t / gamma_s``, with momentum M_ts from the chunk's ``pairs``.

    Offsets of t (later), s (earlier): ``[BC, 1]`` and ``[1, BC]`` or vice versa.
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
        return tl.where(causal, tl.exp(tl.minimum(b_units / UNIT + b_rest, 0.0)), 0.0)


# ------------------------------------------------------------------------------------------------- what a bias is told of a chunk


@triton.jit
def load_delta(delta, row, o_g, o_tv, m_t, m_tv, Dv: tl.constexpr, DELTA: tl.constexpr):
    """delta as ``[C, 1]`` or ``[C, BV]``; 0 for a bias without one."""
    if DELTA == 2:
        return tl.load(delta + row * Dv + o_tv, mask=m_tv, other=0.0).to(tl.float32)
    elif DELTA == 1:
        return load_gate(delta, row, o_g, m_t)[:, None]
    else:
        return 0.0


@triton.jit
def load_error(v, stride_t, errors, row, o_c, o_v, o_tv, m_tv, Dv: tl.constexpr, READS: tl.constexpr):
    """A chunk's errors ``[C, BV]``: those the chain stored, or ``-v`` for a bias that reads no memory (v at its chunk's start)."""
    if READS:
        return tl.load(errors + row * Dv + o_tv, mask=m_tv, other=0.0).to(tl.float32)
    else:
        return -tl.load(v + o_c[:, None] * stride_t + o_v[None, :], mask=m_tv, other=0.0).to(tl.float32)


@triton.jit
def load_square(squares, row, o_g, m_t, COUPLED: tl.constexpr):
    """``||e||^2 [C, 1]`` of every row, which the chain stored for a bias that couples it."""
    if COUPLED:
        return load_gate(squares, row, o_g, m_t)[:, None]
    else:
        return 0.0


@triton.jit
def load_lr(lr, row, o_g, o_tv, m_t, m_tv, Dv: tl.constexpr, CHANNEL_LR: tl.constexpr):
    """eta as ``[C, 1]`` or ``[C, BV]``."""
    if CHANNEL_LR:
        return tl.load(lr + row * Dv + o_tv, mask=m_tv, other=0.0)
    else:
        return load_gate(lr, row, o_g, m_t)[:, None]


@triton.jit
def load_update(
    v, stride_t, lr, delta, errors, squares, row, H, o_s, o_v, m_s, m_v,
    Dv: tl.constexpr, BIAS: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
    READS: tl.constexpr, COUPLED: tl.constexpr, DELTA: tl.constexpr, CHANNEL_LR: tl.constexpr,
):  # fmt: skip
    """``U = eta psi(E) [BC, BV]`` of some tokens of a chunk, from what the chain stored."""
    o_g, m_sv = o_s * H, m_s[:, None] & m_v[None, :]
    o_sv = o_g[:, None] * Dv + o_v[None, :]
    b_e = load_error(v, stride_t, errors, row, o_s, o_v, o_sv, m_sv, Dv, READS)
    b_square = load_square(squares, row, o_g, m_s, COUPLED)
    b_delta = load_delta(delta, row, o_g, o_sv, m_s, m_sv, Dv, DELTA)
    return biases.value(b_e, b_square, b_delta, BIAS, P0, P1, P2) * load_lr(lr, row, o_g, o_sv, m_s, m_sv, Dv, CHANNEL_LR)
