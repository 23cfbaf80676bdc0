"""The chunk that a call resumes in, and the state after the last token, of either memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:  # the CUDA C++ backend imports this module without Triton
    from miras_kernels.call import Call

    from .launch import Problem


class Opened(NamedTuple):
    """Of the chunk that a call resumes in, for each of the memory's matrices, float32 and contiguous."""

    primals: tuple[Tensor, ...]  # phi of the chunk's start: what its tokens predict with
    readouts: tuple[Tensor, ...] = ()  # under a retention gate, what its tokens read before their own writes
    scales: tuple[Tensor, ...] = ()  # [N, H], rho


def opened_chunk(p: Problem) -> Opened:
    """The read-out of token t is ``gamma_t (gamma W_0 + rho (A - gamma A_0))``.

    A_0 is the dual at the chunk's start, ``W_0 = phi(A_0)``, A the dual that the call starts from, and gamma the decay between them.
    """
    opened, retention = p.call.state.open_chunk, p.call.retention
    if not p.key.gated:
        return Opened(tuple(x.contiguous() for x in opened.start))
    gamma = opened.log_decay.exp().reshape(*opened.log_decay.shape[:2], -1, 1)  # [N, H, 1 or Dv, 1]
    primals, readouts, scales = [], [], []
    for start, dual in zip(opened.start, p.call.state.dual, strict=True):
        primal, rho = retention.phi(start), retention.rho(start)
        primals.append(primal.contiguous())
        readouts.append((gamma * primal + rho * (dual - gamma * start)).contiguous())
        scales.append(rho[..., 0, 0].contiguous())
    return Opened(tuple(primals), tuple(readouts), tuple(scales))


class Final(NamedTuple):
    """The state after the last token, as in MemoryState; ``start`` and ``open_decay`` only where a sequence may end inside a chunk."""

    dual: tuple[Tensor, ...]  # the memory's matrices, float32: [N, H, Dv, Dk], or [N, H, D, Hd] and [N, H, Hd, D]
    start: tuple[Tensor, ...] = ()
    open_decay: Tensor | None = None  # [N, H] float32, or [N, H, Dv]
    momentum: tuple[Tensor, ...] = ()  # like dual

    def tensors(self) -> list[Tensor]:
        """All tensors in one list, contiguous."""
        return [x.contiguous() for x in (*self.dual, *self.momentum, *self.start, self.open_decay) if x is not None]


def open_chunk_end(call: Call, start: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Tensor]:
    """Start, and sum of log-decays ``[N, H]``, of the chunk that a sequence ends in; ``start``: the matrices after its last whole chunk."""
    size, device, opened, all_tokens = call.chunk_size, call.q.device, call.state.open_chunk, call.q.shape[1]
    sequences, channels = call.state.dual[0].shape[0], call.log_decay is not None and call.log_decay.dim() == 4
    before = torch.zeros(sequences, dtype=torch.int64, device=device) if opened is None else opened.position
    if call.cu_seqlens is None:
        begin, end = torch.zeros_like(before), torch.full_like(before, all_tokens)
        rows = torch.arange(sequences, device=device)
    else:
        begin, end = call.cu_seqlens[:-1].to(torch.int64), call.cu_seqlens[1:].to(torch.int64)
        rows = torch.zeros_like(begin)
    whole = (before + end - begin) // size
    decay = start[0].new_zeros(start[0].shape[: 3 if channels else 2])
    if call.log_decay is not None:
        tokens = (begin - before + whole * size)[:, None] + torch.arange(size, device=device)  # [N, C]
        belongs = (tokens >= begin[:, None]) & (tokens < end[:, None])
        taken = call.log_decay[rows[:, None], tokens.clamp(0, all_tokens - 1)]  # [N, C, H] or [N, C, H, Dv]
        decay = torch.where(belongs.reshape(*belongs.shape, *(1,) * (taken.dim() - 2)), taken, 0.0).sum(1)
    if opened is not None:
        same = (whole == 0) & (before > 0)
        start = tuple(torch.where(same[:, None, None, None], old, new) for old, new in zip(opened.start, start, strict=True))
        decay = decay + torch.where(same.reshape(-1, *(1,) * (decay.dim() - 1)), opened.log_decay, 0.0)
    return start, decay
