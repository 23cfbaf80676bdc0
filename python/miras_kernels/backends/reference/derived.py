"""The linear memory's matrix form with its backward derived by hand (docs/mathematics.md, sections 6 and 7), in batched PyTorch.

Covers ``L2Retention`` with a scalar decay or none, without momentum. It computes what the fused kernels compute, stage by stage, so it is
their baseline in benchmarks, and it runs on devices without kernels. Backward, with ``J`` the gradient of the next chunk's state::

    before   R = -P' dO,  P = L o (Q K')                    all chunks at once
    reverse  dU = R - dec * (K J');  dE = psi'(E) eta dU;  J <- gamma_C J + (gamma dO)' Q + dE' K      chunk after chunk
    after    dQ, dK, d eta, d log alpha                     all chunks at once
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...call import Call
from ...state import MemoryState
from ...tables.memories import LINEAR
from ...tables.retention import L2Retention
from .chunkwise import Layout, Tokens, decays, empty
from .sequences import concatenate, final_state, join, sequences

__all__ = ["backward", "covers", "forward"]


def covers(call: Call) -> bool:
    """Whether the hand-derived form computes this call and every gradient that it needs."""
    return (
        call.memory.name == LINEAR.name
        and isinstance(call.retention, L2Retention)
        and call.momentum is None
        and call.state.open_chunk is None
        and call.lr.dim() == 3
        and (call.log_decay is None or call.log_decay.dim() == 3)
    )


def saved_chunks(call: Call) -> int:
    """How many chunks the saved tensors have room for: a bound from shapes alone."""
    tokens = call.q.shape[1]
    if call.cu_seqlens is None:
        return -(-tokens // call.chunk_size)
    return tokens // call.chunk_size + call.cu_seqlens.shape[0] - 1


def forward(call: Call) -> tuple[Tensor, MemoryState, list[Tensor]]:
    """``(out, final state, saved)``; saved are the states at chunk starts and the predictions, ``[B, H, saved_chunks, ...]``."""
    results, saved = [], []
    for part in sequences(call):
        out, state, tensors = _Chunks(part).forward()
        results.append((out, state))
        saved.append(tensors)
    out, state = join(call, results)
    spare = saved_chunks(call) - sum(s[0].shape[2] for s in saved)
    if spare or len(saved) > 1:
        saved.append([x.new_zeros(*x.shape[:2], spare, *x.shape[3:]) for x in saved[0]])
        saved = [[torch.cat(parts, 2) for parts in zip(*saved, strict=True)]]
    return out, state, saved[0]


def backward(call: Call, saved: list[Tensor], grad_out: Tensor, grad_dual: Tensor | None) -> dict[str, Tensor]:
    """Gradients by argument name: those of ``Call.PER_TOKEN`` that are present, and ``dual``."""
    grads, token, chunk = [], 0, 0
    parts = sequences(call)
    for n, part in enumerate(parts):
        chunks = _Chunks(part)
        end, last = token + part.q.shape[1], chunk + chunks.chunks
        d_dual = grad_dual if grad_dual is None or len(parts) == 1 else grad_dual[n : n + 1]
        starts, predictions = (x[:, :, chunk:last] for x in saved)
        grads.append(chunks.backward(starts, predictions, grad_out[:, token:end], d_dual))
        token, chunk = end, last
    both = {name: [g[name] for g in grads] for name in grads[0]}
    return {name: torch.cat(x) if name == "dual" else concatenate(call, x) for name, x in both.items()}


class _Chunks:
    """One call of equally long sequences, its tensors laid out in chunks ``[B, H, N, C, ...]``."""

    def __init__(self, call: Call):
        self.call = call
        self.layout = Layout(0, call.q.shape[1], call.chunk_size)
        self.tokens = Tokens.of(call, self.layout)
        self.q, self.k, self.v, self.lr, self.delta = self.tokens
        decay = decays(self.layout, call.log_decay, None, call.q)
        self.gamma = decay.gamma  # [B, H, N, C, 1]
        self.pair = decay.pair.squeeze(-1)  # L [B, H, N, C, C]
        self.to_end = self.pair[..., -1, :].unsqueeze(-1)  # dec = gamma_C / gamma_s
        self.chunks = self.q.shape[2]

    def forward(self) -> tuple[Tensor, MemoryState, list[Tensor]]:
        if self.chunks == 0:
            out, final = empty(self.call)
            b, _, h, dv = out.shape
            saved = [(dv, self.q.shape[-1]), (self.layout.size, dv)]
            return out, final, [out.new_empty(b, h, 0, *shape) for shape in saved]
        psi, reads = self.call.bias.psi, self.call.bias.reads_memory
        state = self.call.state.dual[0]
        weighted = self.to_end * self.lr
        states, predictions, gradients = [], [], []
        for n in range(self.chunks):
            states.append(state)
            prediction = self.k[:, :, n] @ state.transpose(-1, -2) if reads else self.v[:, :, n]
            g = psi(prediction, self.v[:, :, n], self.tokens.delta_of(n))
            state = self.gamma[:, :, n, -1:] * state - (weighted[:, :, n] * g).transpose(-1, -2) @ self.k[:, :, n]
            predictions.append(prediction)
            gradients.append(g)
        starts = torch.stack(states, 2)  # [B, H, N, Dv, Dk]
        u = self.lr * torch.stack(gradients, 2)
        scores = self.pair * (self.q @ self.k.transpose(-1, -2))
        out = self.gamma * (self.q @ starts.transpose(-1, -2)) - scores @ u
        return self.layout.merge(out), self._final(state, states[-1]), [starts, torch.stack(predictions, 2)]

    def _final(self, dual: Tensor, start: Tensor) -> MemoryState:
        end, log_decay = self.layout.end, self.call.log_decay
        total = dual.new_zeros(dual.shape[:2])
        if log_decay is not None and end:
            total = log_decay[:, -end:].sum(1)
        return final_state([dual], None, end, [start if end else dual], total)

    def backward(self, starts: Tensor, predictions: Tensor, grad_out: Tensor, grad_dual: Tensor | None) -> dict[str, Tensor]:
        if self.chunks == 0:
            none = {name: torch.zeros_like(x) for name in Call.PER_TOKEN if (x := getattr(self.call, name)) is not None}
            return none | {"dual": torch.zeros_like(self.call.state.dual[0]) if grad_dual is None else grad_dual}
        bias, reads = self.call.bias, self.call.bias.reads_memory
        q, k, v, lr = self.q, self.k, self.v, self.lr
        d_out = self.layout.split(grad_out)
        g = bias.psi(predictions, v, self.delta)
        u = lr * g

        # before: gradients of the updates and of the state before them, through the output alone
        scores = self.pair * (q @ k.transpose(-1, -2))  # P
        from_out = -scores.transpose(-1, -2) @ d_out
        d_read = (self.gamma * d_out).transpose(-1, -2) @ q  # [B, H, N, Dv, Dk]

        # reverse
        last = self.call.state.dual[0]
        j = torch.zeros_like(last) if grad_dual is None else grad_dual
        js, d_us, d_predictions, d_vs, d_deltas = [], [], [], [], []
        for n in reversed(range(self.chunks)):
            js.append(j)
            kn = k[:, :, n]
            d_us.append(from_out[:, :, n] - self.to_end[:, :, n] * (kn @ j.transpose(-1, -2)))
            d_e, d_v, d_delta = bias.psi_vjp(predictions[:, :, n], v[:, :, n], self.tokens.delta_of(n), lr[:, :, n] * d_us[-1])
            j = self.gamma[:, :, n, -1:] * j + d_read[:, :, n]
            if reads:
                j = j + d_e.transpose(-1, -2) @ kn
            d_predictions.append(d_e)
            d_vs.append(d_v)
            d_deltas.append(d_delta)
        stack = lambda parts: torch.stack(parts[::-1], 2)
        j_end, d_u, d_e = stack(js), stack(d_us), stack(d_predictions)

        # after
        d_scores = self.pair * (-d_out @ u.transpose(-1, -2))
        d_q = self.gamma * (d_out @ starts) + d_scores @ k
        d_k = d_scores.transpose(-1, -2) @ q - self.to_end * (u @ j_end)
        if reads:
            d_k = d_k + d_e @ starts
        d_lr = (d_u * g).sum(-1)
        merge = self.layout.merge
        grads = {"q": merge(d_q), "k": merge(d_k), "v": merge(stack(d_vs)), "lr": merge(d_lr), "dual": j}
        if self.call.log_decay is not None:
            # A token's decay scales what earlier tokens and the state contribute to later reads and to the next chunk. The column
            # terms of L collapse to -u.du = -eta d eta, so no further product is needed.
            share = (q * d_q).sum(-1) - lr.squeeze(-1) * d_lr
            share[..., -1] += (j_end * self._ends(starts, u)).sum((-2, -1))
            grads["log_decay"] = merge(share.flip(-1).cumsum(-1).flip(-1))
        if self.call.delta is not None:
            d_delta = stack(d_deltas)
            grads["delta"] = merge(d_delta if self.call.delta.dim() == 4 else d_delta.sum(-1))
        return grads

    def _ends(self, starts: Tensor, u: Tensor) -> Tensor:
        """The state after each chunk, ``[B, H, N, Dv, Dk]``."""
        written = (self.to_end[:, :, -1] * u[:, :, -1]).transpose(-1, -2) @ self.k[:, :, -1]
        end = self.gamma[:, :, -1, -1:] * starts[:, :, -1] - written
        return torch.cat([starts[:, :, 1:], end.unsqueeze(2)], 2)
