"""The state after the last token, of either memory."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .launch import Problem


class Final(NamedTuple):
    """The state after the last token, as MemoryState has it; ``start``, ``open_decay`` only where a sequence may end inside a chunk."""

    dual: tuple[Tensor, ...]  # the memory's matrices, float32: [N, H, Dv, Dk], or [N, H, D, Hd] and [N, H, Hd, D]
    start: tuple[Tensor, ...] = ()
    open_decay: Tensor | None = None  # [N, H] float32, or [N, H, Dv]
    momentum: tuple[Tensor, ...] = ()  # like dual

    def tensors(self) -> list[Tensor]:
        """All of them, contiguous, in one list."""
        return [x.contiguous() for x in (*self.dual, *self.momentum, *self.start, self.open_decay) if x is not None]


def open_chunk_end(p: Problem, start: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Tensor]:
    """Start and sum of log-decays ``[N, H]`` of the chunk that a sequence ends in; ``start``: the matrices after its whole ones."""
    size, device, opened = p.chunk_size, p.q.device, p.call.state.open_chunk
    before = torch.zeros(p.sequences, dtype=torch.int64, device=device) if p.position is None else p.position
    if p.cu_seqlens is None:
        begin, end = torch.zeros_like(before), torch.full_like(before, p.tokens)
        rows = torch.arange(p.sequences, device=device)
    else:
        begin, end = p.cu_seqlens[:-1], p.cu_seqlens[1:]
        rows = torch.zeros_like(begin)
    whole = (before + end - begin) // size
    decay = start[0].new_zeros(start[0].shape[: 3 if p.key.channels else 2])
    if p.log_decay is not None:
        tokens = (begin - before + whole * size)[:, None] + torch.arange(size, device=device)  # [N, C]
        belongs = (tokens >= begin[:, None]) & (tokens < end[:, None])
        taken = p.log_decay[rows[:, None], tokens.clamp(0, p.tokens - 1)]  # [N, C, H] or [N, C, H, Dv]
        decay = torch.where(belongs.reshape(*belongs.shape, *(1,) * (taken.dim() - 2)), taken, 0.0).sum(1)
    if opened is not None:
        same = (whole == 0) & (before > 0)
        start = tuple(torch.where(same[:, None, None, None], old, new) for old, new in zip(opened.start, start, strict=True))
        decay = decay + torch.where(same.reshape(-1, *(1,) * (decay.dim() - 1)), opened.log_decay, 0.0)
    return start, decay
