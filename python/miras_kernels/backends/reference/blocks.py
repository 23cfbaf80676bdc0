"""Exact steps of the L2 bias, a block of tokens at a time (docs/mathematics.md, section 13), with the backward derived by hand.

For the squared error the writes of a block solve a unit lower triangular system (the WY form of the delta rule), so that a short chunk
costs about what a long one does. A block holds whole chunks; how many is not part of the model.

Shapes: B batch, H heads, N blocks, C tokens of a block, D head dimensions. ``b(t)`` is the last token of the block before t's chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ...call import Call
from ...state import MemoryState
from ...tables.biases import L2
from ...tables.memories import LINEAR
from ...tables.retention import L2Retention
from .chunkwise import Layout, Tokens, decays, empty
from .sequences import final_state

__all__ = ["Blocks", "block_tokens"]

#: tokens of a block, rounded down to whole chunks, and the chunk size from which on chunks themselves are as fast
BLOCK, SHORT = 32, 16


def block_tokens(call: Call, most: int | None = None) -> int:
    """How many tokens a block of this call has, at most ``most``, or 0 where it is not computed in blocks."""
    if call.chunk_size >= SHORT:
        return 0
    most = most or BLOCK
    scalar = call.lr.dim() == 3 and (call.log_decay is None or call.log_decay.dim() == 3)
    exact = call.memory is LINEAR and isinstance(call.bias, L2) and isinstance(call.retention, L2Retention) and call.momentum is None
    return most // call.chunk_size * call.chunk_size if exact and scalar else 0


class Blocks:
    """One call of equally long sequences, its tensors laid out in blocks ``[B, H, N, C, ...]``."""

    def __init__(self, call: Call, size: int):
        self.call = call
        self.layout = Layout(0, call.q.shape[1], size)
        self.q, self.k, self.v, self.lr, _ = Tokens.of(call, self.layout)
        decay = decays(self.layout, call.log_decay, None, call.q)
        self.gamma, self.pair = decay.gamma, decay.pair.squeeze(-1)  # [B, H, N, C, 1], L [B, H, N, C, C]
        self.to_end = self.pair[..., -1, :].unsqueeze(-1)
        # with a row for the state before the block, so that row t // chunk_size * chunk_size is that of b(t)
        self.rows = F.pad(self.pair, [0, 0, 1, 0])
        self.before = torch.arange(size, device=call.q.device) // call.chunk_size * call.chunk_size
        if call.decay_first:  # b(t) = t
            self.before = self.before + 1
        self.error_pair = self.rows[..., self.before, :].tril(-1)  # L_b(t)s
        self.r = F.pad(self.gamma, [0, 0, 1, 0], value=1.0)[..., self.before, :]
        self.scores = self.error_pair * (self.k @ self.k.transpose(-1, -2))  # G
        self.chunks = self.q.shape[2]

    def forward(self) -> tuple[Tensor, MemoryState, list[Tensor]]:
        """``(out, final state, [the states before blocks, the errors])``."""
        state = self.call.state.dual[0]
        if self.chunks == 0:
            out, final = empty(self.call)
            b, h, dv, dk = state.shape
            return out, final, [state.new_empty(b, h, 0, dv, dk), state.new_empty(b, h, 0, self.layout.size, dv)]
        states, solved = [], []
        for n in range(self.chunks):
            states.append(state)
            given = self.r[:, :, n] * (self.k[:, :, n] @ state.transpose(-1, -2)) - self.v[:, :, n]
            system = self.scores[:, :, n] * self.lr[:, :, n].transpose(-1, -2)  # (I + G diag(lr)) E = given
            solved.append(torch.linalg.solve_triangular(system, given, upper=False, unitriangular=True))
            u_end = self.to_end[:, :, n] * self.lr[:, :, n] * solved[-1]
            state = self.gamma[:, :, n, -1:] * state - u_end.transpose(-1, -2) @ self.k[:, :, n]
        starts, errors = torch.stack(states, 2), torch.stack(solved, 2)
        u = self.lr * errors
        out = self.gamma * (self.q @ starts.transpose(-1, -2)) - (self.pair * (self.q @ self.k.transpose(-1, -2))) @ u
        return self.layout.merge(out), self._final(state, starts[:, :, -1], u[:, :, -1]), [starts, errors]

    def _final(self, dual: Tensor, start: Tensor, u: Tensor) -> MemoryState:
        """The state after the last token; where its chunk is open, also the state that the chunk began with."""
        tokens, size = self.layout.tokens, self.call.chunk_size
        end, log_decay = tokens % size, dual.new_zeros(dual.shape[:2])
        if not end:
            return final_state([dual], None, 0, [dual], log_decay)
        if self.call.log_decay is not None:
            log_decay = self.call.log_decay[:, -end:].sum(1)
        begin = tokens - end - (self.chunks - 1) * self.layout.size
        if begin:
            written = self.rows[:, :, -1, begin].unsqueeze(-1) * u
            start = self.gamma[:, :, -1, begin - 1 : begin] * start - written.transpose(-1, -2) @ self.k[:, :, -1]
        return final_state([dual], None, end, [start], log_decay)

    def backward(self, starts: Tensor, errors: Tensor, grad_out: Tensor, grad_dual: Tensor | None) -> dict[str, Tensor]:
        last = self.call.state.dual[0]
        j = torch.zeros_like(last) if grad_dual is None else grad_dual
        if self.chunks == 0:
            none = {name: torch.zeros_like(x) for name in Call.PER_TOKEN if (x := getattr(self.call, name)) is not None}
            return none | {"dual": j}
        q, k, lr, u = self.q, self.k, self.lr, self.lr * errors
        d_out = self.layout.split(grad_out)

        # before: gradients of the writes and of the state before them, through the output alone
        scores = self.pair * (q @ k.transpose(-1, -2))  # P
        from_out = -scores.transpose(-1, -2) @ d_out
        d_read = (self.gamma * d_out).transpose(-1, -2) @ q  # [B, H, N, Dv, Dk]

        # reverse
        js, ys = [], []
        for n in reversed(range(self.chunks)):
            js.append(j)
            d_u = from_out[:, :, n] - self.to_end[:, :, n] * (k[:, :, n] @ j.transpose(-1, -2))
            system = (lr[:, :, n] * self.scores[:, :, n]).transpose(-1, -2)  # (I + G' diag(lr)) Y = dU
            ys.append(torch.linalg.solve_triangular(system, d_u, upper=True, unitriangular=True))
            d_e = self.r[:, :, n] * lr[:, :, n] * ys[-1]
            j = self.gamma[:, :, n, -1:] * j + d_read[:, :, n] + d_e.transpose(-1, -2) @ k[:, :, n]
        j_end, y = torch.stack(js[::-1], 2), torch.stack(ys[::-1], 2)
        d_e = lr * y

        # after
        pairs = d_out @ u.transpose(-1, -2)
        error_pairs = d_e @ u.transpose(-1, -2)
        n_pairs, f_pairs = self.pair * pairs, self.error_pair * error_pairs  # N, F
        d_q = self.gamma * (d_out @ starts) - n_pairs @ k
        d_k_read = self.r * (d_e @ starts)
        writes = self.to_end * (u @ j_end)
        d_k = d_k_read - (f_pairs + f_pairs.transpose(-1, -2)) @ k - n_pairs.transpose(-1, -2) @ q - writes
        merge = self.layout.merge
        grads = {"q": merge(d_q), "k": merge(d_k), "v": merge(-d_e), "lr": merge((y * errors).sum(-1)), "dual": j}
        if self.call.log_decay is not None:
            crossed = -(scores * pairs)  # X, with the row of the state before the block in front
            crossed = F.pad(crossed, [0, 0, 1, 0]).index_add(-2, self.before, -(self.scores * error_pairs))[..., 1:, :]
            reads = (q * (self.gamma * (d_out @ starts))).sum(-1)
            reads = F.pad(reads, [1, 0]).index_add(-1, self.before, (k * d_k_read).sum(-1))[..., 1:]
            reads[..., -1] += self.gamma[..., -1, 0] * (j_end * starts).sum((-2, -1))
            later = lambda x, dim: x.flip(dim).cumsum(dim).flip(dim)
            between = later(crossed, -2).tril(-1).sum(-1)
            writes = F.pad((k * writes).sum(-1), [1, -1]).cumsum(-1)
            grads["log_decay"] = merge(between + later(reads, -1) - writes)
        return grads
