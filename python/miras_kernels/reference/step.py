"""One token after the other on a decoder's buffers, in place, in eager PyTorch: what the step kernels compute.

Matrices ``[N, H, m, K, V]`` as :class:`~miras_kernels.decode.Buffers` has them: of a linear memory ``W' [Dk, Dv]``, of an MLP
``W1' [Hd, D]`` and ``W2 [Hd, D]``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from .chunkwise import gelu_derivative, layer_norm_vjp
from .inputs import Call

__all__ = ["stepper"]


def stepper(call: Call) -> Callable:
    """``run(buffers, q, k, v, lr, log_decay, delta, momentum, out)`` for calls like this one."""

    def run(buffers, q, k, v, lr, log_decay, delta, momentum, out) -> None:
        dtype = buffers.dual.dtype
        if call.delta is not None and not isinstance(delta, Tensor):
            delta = torch.full(lr.shape[:3], float(delta), dtype=dtype, device=lr.device)
        for t in range(q.shape[1]):
            at = lambda x, t=t: None if x is None else x[:, t].to(dtype)
            out[:, t] = _token(call, buffers, *map(at, (q, k, v, lr, log_decay, delta, momentum)))

    return run


def _token(call: Call, x, q: Tensor, k: Tensor, v: Tensor, lr: Tensor, log_decay, delta, momentum) -> Tensor:
    """``o [N, H, Dv]`` of one token of every sequence (SPEC sections 2 and 5, one step)."""
    _begin_chunks(call, x)
    per_row = lambda gate: None if gate is None else gate.reshape(*gate.shape[:2], -1)  # [N, H, 1 or Dv]
    everywhere = lambda gate: gate.reshape(*gate.shape[:2], 1, 1, -1)  # against [N, H, m, K, V]
    predicting = next(w for w in (x.primal, x.start, x.dual) if w is not None)
    write = (_linear_write if call.memory == "linear" else _mlp_write)(call, predicting, k, v, per_row(lr), per_row(delta))
    if momentum is not None:
        write = x.momentum.mul_(everywhere(momentum)).add_(write)
    if log_decay is not None:
        x.dual.mul_(everywhere(log_decay.exp()))
        x.log_decay.add_(log_decay)
    x.dual.add_(write)

    readout = x.dual
    if x.primal is not None:  # gamma W_0 + rho D
        gamma = everywhere(x.log_decay.exp())
        written = x.dual - gamma * x.start
        readout = gamma * x.primal + (written if x.rho is None else x.rho[..., None, None] * written)
    x.position.add_(1).remainder_(call.chunk_size)
    x.log_decay.mul_((x.position > 0).view(-1, *[1] * (x.log_decay.dim() - 1)))
    return _linear(readout, q) if call.memory == "linear" else q + _normalised(call, _hidden(readout, q)[2])


def _begin_chunks(call: Call, x) -> None:
    """Where a sequence stands at a boundary, its next chunk starts from the dual."""
    if x.start is None:
        return
    fresh = (x.position == 0).view(-1, 1, 1, 1, 1)
    x.start.copy_(torch.where(fresh, x.dual, x.start))
    if x.primal is None:
        return
    transposed = [w.transpose(-1, -2) if i == 0 else w for i, w in enumerate(x.start.unbind(2))]
    for i, w in enumerate(transposed):
        primal = call.retention.phi(w)
        x.primal[:, :, i] = primal.transpose(-1, -2) if i == 0 else primal
        if x.rho is not None:
            x.rho[:, :, i] = call.retention.rho(w)[..., 0, 0]


def _linear(w: Tensor, x: Tensor) -> Tensor:
    """``W x`` for the one matrix of ``w [N, H, 1, Dk, Dv]``."""
    return (x.unsqueeze(-2) @ w[:, :, 0]).squeeze(-2)


def _linear_write(call: Call, w: Tensor, k: Tensor, v: Tensor, lr: Tensor, delta: Tensor | None) -> Tensor:
    g = call.bias.psi(_linear(w, k), v, delta)
    return -(k.unsqueeze(-1) * (lr * g).unsqueeze(-2)).unsqueeze(2)


def _hidden(w: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``z``, ``a = gelu(z) [N, H, Hd]`` and ``u = W1 a [N, H, D]``."""
    z = (w[:, :, 1] @ x.unsqueeze(-1)).squeeze(-1)
    a = F.gelu(z, approximate="tanh")
    return z, a, (a.unsqueeze(-2) @ w[:, :, 0]).squeeze(-2)


def _normalised(call: Call, u: Tensor) -> Tensor:
    return F.layer_norm(u, u.shape[-1:], eps=call.ln_eps) * call.ln_weight + call.ln_bias


def _mlp_write(call: Call, w: Tensor, k: Tensor, v: Tensor, lr: Tensor, delta: Tensor | None) -> Tensor:
    z, a, u = _hidden(w, k)
    g = call.bias.psi(k + _normalised(call, u), v, delta)
    g_u = layer_norm_vjp(u, g * call.ln_weight, call.ln_eps)
    g_z = (w[:, :, 0] @ g_u.unsqueeze(-1)).squeeze(-1) * gelu_derivative(z)
    return -torch.stack([a.unsqueeze(-1) * (lr * g_u).unsqueeze(-2), (lr * g_z).unsqueeze(-1) * k.unsqueeze(-2)], 2)
