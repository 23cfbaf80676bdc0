"""The variants of the delta rule: decay before the error, keys for erasing, decay per key channel (docs/mathematics.md, section 14).

All of them take gradients at every token. The squared error and the dot product without momentum are linear in the state, so a block of
tokens is at most one triangular system (the WY form: DeltaNet, arXiv 2406.06484; Gated DeltaNet, arXiv 2412.06464; Kimi Linear,
arXiv 2510.26692). Everything else goes token by token. Both are PyTorch that autograd differentiates.

Shapes: B batch, H heads, N blocks, C tokens of a block, R channels of the decay: 1, or Dk for one per key channel.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ...call import Call
from ...state import MemoryState
from ...tables.biases import L2, DotProduct
from .definition import decay_at, rows
from .sequences import final_state

__all__ = ["run"]

#: tokens of a block: not part of the model. A decay per key channel needs C x C x Dk numbers per block.
_BLOCK, _BLOCK_BY_CHANNEL = 32, 16


def run(call: Call) -> tuple[Tensor, MemoryState]:
    """``(out [B, T, H, Dv], final state)`` of equally long sequences of at least one token."""
    by_value = call.log_decay is not None and call.log_decay.dim() == 4
    in_blocks = isinstance(call.bias, L2 | DotProduct) and call.momentum is None and call.lr.dim() == 3 and not by_value
    out, dual, momenta = (_run_blocks if in_blocks else _run_tokens)(call)
    return out, final_state([dual], None if momenta is None else [momenta], 0, [dual], dual.new_zeros(dual.shape[: 3 if by_value else 2]))


def _run_blocks(call: Call) -> tuple[Tensor, Tensor, None]:
    size = _BLOCK if call.key_log_decay is None else _BLOCK_BY_CHANNEL
    tokens = call.q.shape[1]

    def split(x: Tensor) -> Tensor:
        """``[B, T, H, ...] -> [B, H, N, C, ...]``, padded with zeros: tokens that do nothing."""
        x = F.pad(x, [0, 0] * (x.dim() - 2) + [0, -tokens % size])
        return x.unflatten(1, (x.shape[1] // size, size)).movedim(3, 1)

    q, k, v, lr = map(split, (call.q, call.k, call.v, call.lr.unsqueeze(-1)))
    erase = k if call.erase_k is None else split(call.erase_k)
    upto, before, pair = _decays(call, split, k)
    of_state, of_values = None, lr * v
    if call.bias.reads_memory:  # U = lr (E' A_0 - V - M U): the error of a token sees the writes of those before it in its block
        seen = _scores(erase, k, pair if call.decay_first else F.pad(pair[..., :-1, :, :], (0, 0, 0, 0, 1, 0)), -1)
        system = torch.eye(size, dtype=k.dtype, device=k.device) + lr * seen
        solve = lambda right: torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
        of_state, of_values = solve(lr * (upto if call.decay_first else before) * erase), solve(of_values)
    reads, scores = upto * q, _scores(q, k, pair, 0)
    kept = upto[..., -1:, :]
    writes = pair[..., -1, :, :] * k
    dual, out = call.state.dual[0], []
    for n in range(k.shape[2]):
        u = -of_values[:, :, n] if of_state is None else of_state[:, :, n] @ dual.transpose(-1, -2) - of_values[:, :, n]
        out.append(reads[:, :, n] @ dual.transpose(-1, -2) - scores[:, :, n] @ u)
        dual = kept[:, :, n] * dual - u.transpose(-1, -2) @ writes[:, :, n]
    return torch.cat(out, 2)[:, :, :tokens].transpose(1, 2), dual, None


def _decays(call: Call, split, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Decay from the block's start to each token and to the token before it, ``[B, H, N, C, R]``, and from token s to token t,
    ``[B, H, N, C, C, R]`` (0 for ``s > t``): sums of logarithms of single decays, so nothing cancels."""
    log = call.key_log_decay if call.log_decay is None else call.log_decay.unsqueeze(-1)
    log = torch.zeros_like(k[..., :1]) if log is None else split(log)
    upto = log.cumsum(-2)
    c = log.shape[-2]
    later = torch.ones(c, c, dtype=torch.bool, device=k.device).tril(-1).unsqueeze(-1)  # s < r
    pair = log.unsqueeze(-2).expand(*log.shape[:-1], c, log.shape[-1]).masked_fill(~later, 0).cumsum(-3)
    pair = pair.masked_fill(later.transpose(0, 1), -torch.inf)
    return upto.exp(), F.pad(upto[..., :-1, :], (0, 0, 1, 0)).exp(), pair.exp()


def _scores(left: Tensor, right: Tensor, pair: Tensor, diagonal: int) -> Tensor:
    """``sum_d left_td right_sd pair_tsd`` for ``s <= t + diagonal``, ``[B, H, N, C, C]``."""
    if pair.shape[-1] == 1:
        return (pair.squeeze(-1) * (left @ right.transpose(-1, -2))).tril(diagonal)
    return torch.einsum("...td,...tsd,...sd->...ts", left, pair, right).tril(diagonal)


def _run_tokens(call: Call) -> tuple[Tensor, Tensor, Tensor | None]:
    dual, momenta = call.state.dual[0], None if call.state.momentum is None else call.state.momentum[0]
    erase, out = call.k if call.erase_k is None else call.erase_k, []
    for t in range(call.q.shape[1]):
        q, k, v = (x[:, t].unsqueeze(-1) for x in (call.q, call.k, call.v))
        decay = decay_at(call, t)
        decayed = dual if decay is None else decay * dual
        prediction = (decayed if call.decay_first else dual) @ erase[:, t].unsqueeze(-1)
        delta = None if call.delta is None else rows(call.delta[:, t]).squeeze(-1)
        psi = call.bias.psi(prediction.squeeze(-1), v.squeeze(-1), delta).unsqueeze(-1)
        step = -rows(call.lr[:, t]) * psi * k.mT
        if momenta is not None and call.momentum is not None:
            step = momenta = rows(call.momentum[:, t]) * momenta + step
        dual = decayed + step
        out.append((dual @ q).squeeze(-1))
    return torch.stack(out, 1), dual, momenta
