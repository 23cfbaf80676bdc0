"""Splits a batch or packed (varlen) sequences into calls of one sequence, and joins their results."""

from __future__ import annotations

import dataclasses
from operator import itemgetter

import torch
from torch import Tensor
from torch.nn import functional as F

from ...call import Call
from ...state import MemoryState, OpenChunk


def sequences(call: Call) -> list[Call]:
    """The call as calls whose sequences all have one length and one position in the open chunk."""
    position = call.state.open_chunk.position if call.state.open_chunk is not None else None
    if call.cu_seqlens is None and (position is None or len(set(position.tolist())) <= 1):
        return [call]
    parts = []
    for n in range(call.state.dual[0].shape[0]):
        if call.cu_seqlens is None:
            row, time = slice(n, n + 1), slice(None)
        else:
            row, time = slice(None), slice(*call.cu_seqlens[n : n + 2].tolist())
        tokens = {name: getattr(call, name) for name in Call.PER_TOKEN}
        tokens = {name: None if x is None else x[row, time] for name, x in tokens.items()}
        parts.append(call.replace(**tokens, state=call.state.map(itemgetter(slice(n, n + 1))), cu_seqlens=None))
    return parts


def join(call: Call, results: list[tuple[Tensor, MemoryState]]) -> tuple[Tensor, MemoryState]:
    """The result of a call from those of its :func:`sequences`."""
    out = concatenate(call, [out for out, _ in results])
    if len(results) == 1:
        return out, results[0][1]
    states = [state for _, state in results]
    merged = states[0].replace_tensors([torch.cat(parts) for parts in zip(*(s.tensors() for s in states), strict=True)])
    assert merged.open_chunk is not None  # final_state makes one for each
    position = torch.cat([s.open_chunk.position for s in states if s.open_chunk is not None])
    return out, dataclasses.replace(merged, open_chunk=dataclasses.replace(merged.open_chunk, position=position))


def concatenate(call: Call, parts: list[Tensor]) -> Tensor:
    """``[B, T, H, ...]`` from the parts of the sequences; unchecked offsets may end before T, and tokens beyond them get 0."""
    x = parts[0] if len(parts) == 1 else torch.cat(parts, 0 if call.cu_seqlens is None else 1)
    missing = call.q.shape[1] - x.shape[1]
    return F.pad(x, [0, 0] * (x.dim() - 2) + [0, missing]) if missing else x


def open_chunk(call: Call) -> tuple[int, tuple[Tensor, ...], Tensor]:
    """Position, start and log-decay of the chunk in which a call of one position begins; a new chunk if none is open."""
    state = call.state
    if state.open_chunk is None:
        heads = state.dual[0].shape[:2] if call.log_decay is None else (state.dual[0].shape[0], *call.log_decay.shape[2:])
        return 0, state.dual, state.dual[0].new_zeros(heads)
    position = state.open_chunk.position
    return int(position[0]) if position.numel() else 0, state.open_chunk.start, state.open_chunk.log_decay


def final_state(dual, momenta, position: int, start, log_decay: Tensor) -> MemoryState:
    """The state of sequences that all stop ``position`` tokens into a chunk, the position kept as a tensor."""
    positions = torch.full((dual[0].shape[0],), position, dtype=torch.int64, device=dual[0].device)
    return MemoryState(tuple(dual), None if momenta is None else tuple(momenta), OpenChunk(positions, tuple(start), log_decay))
