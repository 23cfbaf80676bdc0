"""Where the tokens and chunks of a sequence lie."""

import triton.language as tl

import triton

#: what a launch of a chain walks: all chunks; the chunk that was open before; the whole ones; the one left open; a segment
WHOLE, HEAD, BODY, TAIL, SEGMENT = (tl.constexpr(i) for i in range(5))


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
    """``(sequence, index within it)`` of a slot; the sequence is -1 for a spare slot, which nobody uses."""
    if first is None:
        return i_s // per_sequence, i_s % per_sequence
    else:
        i_n = tl.load(owner + i_s)
        return i_n, i_s - tl.load(first + tl.maximum(i_n, 0))


@triton.jit
def chunk_of(i_slot, position, cu_seqlens, first_slot, slot_owner, T, CHUNKS, TOKENS: tl.constexpr, C: tl.constexpr):
    """``(batch row, first token of a slot's chunk, first one of its sequence, end of the chunk)``; an empty chunk for a spare slot."""
    i_n, i_c = owner_of(i_slot, first_slot, slot_owner, CHUNKS)
    if first_slot is not None:
        spare = i_n < 0
        i_n = tl.maximum(i_n, 0)
    i_b, bos, eos = sequence_of(i_n, cu_seqlens, T)
    t0 = bos + i_c * TOKENS
    if position is not None:
        t0 -= tl.load(position + i_n)
    if first_slot is not None:
        t0 = tl.where(spare, eos, t0)
    return i_b, t0, bos, end_of(t0, eos, C, TOKENS)


@triton.jit
def of_group(place, cu_seqlens, T, FIRST, GROUP, C: tl.constexpr):
    """``(sequence, chunk, batch row, first token of the chunk, end of the sequence)`` of a place in a group of chunks (mlp.py)."""
    i_n, i_c = place // GROUP, (FIRST + place % GROUP).to(tl.int32)
    i_b, bos, eos = sequence_of(i_n, cu_seqlens, T)
    return i_n, i_c, i_b, bos + i_c * C, eos


@triton.jit
def end_of(t0, eos, C: tl.constexpr, TOKENS: tl.constexpr):
    """Where the chunk that begins at ``t0`` ends, for kernels that take C rows at once: C where it has as many tokens, or fewer."""
    if TOKENS == C:
        return eos
    else:
        return tl.minimum(eos, t0 + TOKENS)


@triton.jit
def of_chunk(o_t, bos, eos, PART: tl.constexpr):
    """Which tokens belong to the sequence; a chunk that was open before has some that do not."""
    if PART == HEAD:
        return (o_t < eos) & (o_t >= bos)
    else:
        return o_t < eos


@triton.jit
def stretch_of(i_s, position, cu_seqlens, first_segment, segment_owner, T, SEGMENTS, EVERY, TOKENS: tl.constexpr, PART: tl.constexpr):
    """What the ``i_s``-th program of a chain walks: ``(sequence, batch row, first token, end)`` and the triple of :func:`part_of`.

    A sequence, or one of its segments: no chunks in a spare one.
    """
    i_n, i_segment = i_s, i_s * 0
    if PART == SEGMENT:
        i_n, i_segment = owner_of(i_s, first_segment, segment_owner, SEGMENTS)
        if first_segment is not None:
            spare = i_n < 0
            i_n = tl.maximum(i_n, 0)
    i_b, bos, eos = sequence_of(i_n, cu_seqlens, T)
    origin, first, last = part_of(i_n, i_segment, bos, eos, position, EVERY, TOKENS, PART)
    if PART == SEGMENT:
        if first_segment is not None:
            last = tl.where(spare, first, last)
    return i_n, i_b, bos, eos, origin, first, last


@triton.jit
def part_of(i_n, i_segment, bos, eos, position, EVERY, TOKENS: tl.constexpr, PART: tl.constexpr):
    """``(origin, first, last)``: token 0 of chunk 0 and the chunks to walk; a sequence that resumes inside a chunk begins after origin."""
    origin, resumes = bos, 0
    if position is not None:
        before = tl.where(eos > bos, tl.load(position + i_n), 0)  # no tokens: the chunk that is open stays as it is
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
