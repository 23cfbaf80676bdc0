"""The definition of a memory, token by token: docs/mathematics.md, section 1. Slow by design.

It states the recurrence alone; the bias states the inner loss, the memory's row M(x), and the inner gradient comes from autograd
(with ``create_graph``, so the outer gradients are exact too). Everything else in the project is checked against this file.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...call import Call
from ...state import MemoryState
from .sequences import final_state, join, open_chunk, sequences

__all__ = ["run"]


def run(call: Call) -> tuple[Tensor, MemoryState]:
    """``(out [B, T, H, Dv], final state)``; differentiable in every tensor of the call, twice if need be."""
    return join(call, [_run_together(part) for part in sequences(call)])


def _inner_gradient(call: Call, primal: tuple[Tensor, ...], k: Tensor, v: Tensor, delta: Tensor | None) -> tuple[Tensor, ...]:
    """Gradient of the inner loss ``l(M(k), v)`` in each matrix, at ``primal``."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        primal = tuple(w if w.requires_grad else w.detach().requires_grad_() for w in primal)
        prediction = call.memory.recall(primal, k, call)
        loss = call.bias.loss(prediction, v, delta)
        if loss is None:  # no closed form, so psi defines it
            grad_outputs = call.bias.psi(prediction, v, delta)
            return torch.autograd.grad(prediction, primal, grad_outputs, create_graph=create_graph)
        return torch.autograd.grad(loss.sum(), primal, create_graph=create_graph)


def _run_together(call: Call) -> tuple[Tensor, MemoryState]:
    rows = lambda gate: gate.reshape(*gate.shape[:2], -1, 1)
    phi, rho = call.retention.phi, call.retention.rho
    position, start, log_decay = open_chunk(call)
    dual, momenta = call.state.dual, call.state.momentum
    outputs = []
    for t in range(call.q.shape[1]):
        q, k, v, lr = (x[:, t] for x in (call.q, call.k, call.v, call.lr))
        delta = None if call.delta is None else call.delta[:, t].reshape(*k.shape[:2], -1)
        if position == 0:
            start, log_decay = dual, torch.zeros_like(log_decay)
        primal = tuple(phi(a) for a in start)  # W_0
        gradient = _inner_gradient(call, primal, k, v, delta)  # g_t k_t' for the linear memory
        step = tuple(-rows(lr) * g for g in gradient)  # S_t
        if momenta is not None and call.momentum is not None:
            step = momenta = tuple(rows(call.momentum[:, t]) * s + x for s, x in zip(momenta, step, strict=True))
        if call.log_decay is not None:
            dual = tuple(rows(call.log_decay[:, t].exp()) * a for a in dual)
            log_decay = log_decay + call.log_decay[:, t]
        dual = tuple(a + s for a, s in zip(dual, step, strict=True))  # A_t
        gamma = rows(log_decay.exp())
        written = tuple(a - gamma * a0 for a, a0 in zip(dual, start, strict=True))  # D_t
        readout = tuple(gamma * w + rho(a0) * d for w, a0, d in zip(primal, start, written, strict=True))
        outputs.append(call.memory.recall(readout, q, call))
        position = (position + 1) % call.chunk_size
    if position == 0:
        start, log_decay = dual, torch.zeros_like(log_decay)
    out = torch.stack(outputs, 1) if outputs else torch.zeros_like(call.v)
    return out, final_state(dual, momenta, position, start, log_decay)
