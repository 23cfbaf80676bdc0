"""What every kernel does with tiles: where they lie, how they are multiplied, how they decay.

Only device functions; the legend of names and dimensions is in README.md beside this file.
"""

import triton
import triton.language as tl

#: the interpreter has no bfloat16 arithmetic: there a bfloat16 operand is a float32 tile that holds bfloat16 numbers
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

#: exp of anything below is 0 in float32
LOWEST = tl.constexpr(-110.0)
#: log-decays are summed in units of 2^-10 and a rest, see `decay_parts`
UNIT = tl.constexpr(1024.0)


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
def load_gate(gate, row, o_g, m_t):
    """A chunk's gate as float32; 0 beyond the sequence (no step, no decay)."""
    return tl.load(gate + row + o_g, mask=m_t, other=0.0).to(tl.float32)


@triton.jit
def decay_to_end(log_decay, row, o_c, m_t, m_next, H, C: tl.constexpr):
    """``(gamma_C / gamma_s [C], gamma_C)``. Summed from the end, so that nothing cancels."""
    if log_decay is None:
        return tl.full((C,), 1.0, tl.float32), 1.0
    else:
        b_next = load_gate(log_decay, row + H, o_c * H, m_next & (o_c < C - 1))
        total = tl.sum(load_gate(log_decay, row, o_c * H, m_t), 0)
        return tl.exp(tl.cumsum(b_next, 0, reverse=True)), tl.exp(total)


@triton.jit
def decay_from_start(log_decay, row, o_g, m_t, C: tl.constexpr):
    """``gamma_t [C]``."""
    if log_decay is None:
        return tl.full((C,), 1.0, tl.float32)
    else:
        return tl.exp(tl.cumsum(load_gate(log_decay, row, o_g, m_t), 0))


@triton.jit
def decay_parts(log_decay, row, o_g, m_t, C: tl.constexpr):
    """Cumulative log-decays in two parts whose differences keep their digits.

    A difference of two sums of -1e4 would leave nothing of a step of -0.01 between them. So every log-decay is cut into a
    multiple of 2^-10, whose sums are exact in float32 (128 * 110 * 1024 < 2^24), and a rest below 2^-11, whose sums are small.
    """
    if log_decay is None:
        return tl.zeros((C,), tl.float32), tl.zeros((C,), tl.float32)
    else:
        b_g = tl.maximum(load_gate(log_decay, row, o_g, m_t), LOWEST)
        b_units = tl.floor(b_g * UNIT + 0.5)
        return tl.cumsum(b_units, 0), tl.cumsum(b_g - b_units / UNIT, 0)


@triton.jit
def pair_decay(later_units, later_rest, earlier_units, earlier_rest, causal, DECAYS: tl.constexpr):
    """``L_ts = gamma_t / gamma_s`` where ``causal`` (s <= t), else 0; the arguments broadcast to the wanted orientation."""
    if DECAYS:
        b_g = (later_units - earlier_units) / UNIT + (later_rest - earlier_rest)
        return tl.where(causal, tl.exp(tl.minimum(b_g, 0.0)), 0.0)
    else:
        return tl.where(causal, 1.0, 0.0)
