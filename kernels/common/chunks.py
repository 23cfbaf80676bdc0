"""Which part of the work a program does, and where the tokens and chunks of its sequence lie; the legend is in kernels/README.md."""

import triton
import triton.language as tl

#: the chunks that a launch of a chain walks: all; the one that was open before; the whole ones; the one left open; a segment
WHOLE, HEAD, BODY, TAIL, SEGMENT = (tl.constexpr(i) for i in range(5))

#: heads of one chunk in a program of the kernels for token gates, whose numbers lie side by side
HEADS = tl.constexpr(16)


@triton.jit
def heads_program(H):
    """``(slot, first head)`` of a program that takes HEADS heads of one chunk."""
    i, parts = tl.program_id(0), (H + HEADS - 1) // HEADS
    return (i // parts).to(tl.int64), i % parts * HEADS


def head_programs(p) -> int:
    """How many of them a call has."""
    return p.slots.count * -(-p.heads // HEADS.value)


@triton.jit
def chunk_program(TILES: tl.constexpr, BLOCKS: tl.constexpr):
    """``(tile, block of a chunk, slot, head)`` of a program that takes a part of one chunk."""
    i = tl.program_id(0)
    return i % TILES, i // TILES % BLOCKS, (i // (TILES * BLOCKS)).to(tl.int64), tl.program_id(1).to(tl.int64)


@triton.jit
def chain_program(TILES: tl.constexpr):
    """``(tile, sequence or segment, head)`` of a program that walks chunks."""
    i = tl.program_id(0)
    return i % TILES, (i // TILES).to(tl.int64), tl.program_id(1).to(tl.int64)


@triton.jit
def head_of(x, strides, i_b, i_h):
    """Where a batch row and head of q, k or v begin."""
    return x + (i_b * strides.b + i_h * strides.h)


@triton.jit
def token_of(x, strides, i_b, t, i_h):
    """Where a token begins."""
    return x + (i_b * strides.b + i_h * strides.h + t * strides.t)


@triton.jit
def sequence_of(i_n, cu_seqlens, T):
    """``(batch row, first token, end)`` of sequence ``i_n``: a row of the batch or, if packed, a range of the only row."""
    if cu_seqlens is None:
        return i_n, i_n * 0, i_n * 0 + T
    else:
        return i_n * 0, tl.load(cu_seqlens + i_n), tl.load(cu_seqlens + i_n + 1)


@triton.jit
def slot_of(i_n, first, per_sequence):
    """The first slot of a sequence in a buffer with one slot per chunk (or segment)."""
    if first is None:
        return i_n * per_sequence
    else:
        return tl.load(first + i_n)


@triton.jit
def owner_of(i_s, first, owner, per_sequence):
    """``(sequence, index within it)`` of a slot; the sequence of an unused slot is -1."""
    if first is None:
        return i_s // per_sequence, i_s % per_sequence
    else:
        i_n = tl.load(owner + i_s)
        return i_n, i_s - tl.load(first + tl.maximum(i_n, 0))


@triton.jit
def chunk_of(i_slot, position, cu_seqlens, first_slot, slot_owner, T, CHUNKS, TOKENS: tl.constexpr, C: tl.constexpr):
    """``(batch row, first token of a slot's chunk, first one of its sequence, end of the chunk)``; an unused slot gets an empty chunk."""
    i_n, i_c = owner_of(i_slot, first_slot, slot_owner, CHUNKS)
    if first_slot is not None:
        unused = i_n < 0
        i_n = tl.maximum(i_n, 0)
    i_b, bos, eos = sequence_of(i_n, cu_seqlens, T)
    t0 = bos + i_c * TOKENS
    if position is not None:
        t0 -= tl.load(position + i_n)
    if first_slot is not None:
        t0 = tl.where(unused, eos, t0)
    return i_b, t0, bos, end_of(t0, eos, C, TOKENS)


@triton.jit
def group_program(group_segments, cu_seqlens, T, EVERY, C: tl.constexpr):
    """``(sequence, batch row, head, chunk, first token, end of the sequence, place in the group)`` of a program for a group of chunks.

    ``group_segments [segments, 2]``: sequence and number of each segment of the group; one without tokens for a place that is not used.
    """
    i_g, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    i_n, i_segment = tl.load(group_segments + i_g // EVERY * 2), tl.load(group_segments + i_g // EVERY * 2 + 1)
    i_c = (i_segment * EVERY + i_g % EVERY).to(tl.int32)
    i_b, bos, eos = sequence_of(i_n, cu_seqlens, T)
    return i_n, i_b, i_h, i_c, bos + i_segment * EVERY * C + i_g % EVERY * C, eos, i_g


@triton.jit
def end_of(t0, eos, C: tl.constexpr, TOKENS: tl.constexpr):
    """End of the chunk that begins at ``t0``, of TOKENS tokens in C rows; the sequence's end is enough where ``TOKENS == C``."""
    if TOKENS == C:
        return eos
    else:
        return tl.minimum(eos, t0 + TOKENS)


@triton.jit
def of_chunk(o_t, bos, eos, PART: tl.constexpr):
    """Mask of the tokens that belong to the sequence; a chunk that was open before begins with tokens of an earlier call."""
    if PART == HEAD:
        return (o_t < eos) & (o_t >= bos)
    else:
        return o_t < eos


@triton.jit
def segment_of(i_s, position, cu_seqlens, first_segment, segment_owner, T, SEGMENTS, EVERY, TOKENS: tl.constexpr, PART: tl.constexpr):
    """Sequence or segment ``i_s`` of a chain: ``(sequence, batch row, first token, end)`` and the triple of :func:`part_of`.

    An unused segment has no chunks.
    """
    i_n, i_segment = i_s, i_s * 0
    if PART == SEGMENT:
        i_n, i_segment = owner_of(i_s, first_segment, segment_owner, SEGMENTS)
        if first_segment is not None:
            unused = i_n < 0
            i_n = tl.maximum(i_n, 0)
    i_b, bos, eos = sequence_of(i_n, cu_seqlens, T)
    origin, first, last = part_of(i_n, i_segment, bos, eos, position, EVERY, TOKENS, PART)
    if PART == SEGMENT:
        if first_segment is not None:
            last = tl.where(unused, first, last)
    return i_n, i_b, bos, eos, origin, first, last


@triton.jit
def part_of(i_n, i_segment, bos, eos, position, EVERY, TOKENS: tl.constexpr, PART: tl.constexpr):
    """``(origin, first, last)``: the first token of chunk 0 and the chunks to walk.

    The origin of a sequence that resumes inside a chunk lies before its first token.
    """
    origin, resumes = bos, 0
    if position is not None:
        before = tl.where(eos > bos, tl.load(position + i_n), 0)  # without tokens the open chunk stays as it is
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
