"""Decoding steps in eager PyTorch, in place on a decoder's buffers: what the kernels of steps compute.

Matrices ``[N, H, m, K, V]`` are laid out as in :class:`~miras_kernels.decode.buffers.Buffers`: ``W' [Dk, Dv]`` of a linear memory,
``W1' [Hd, D]`` and ``W2 [Hd, D]`` of an MLP. A token's writes are factors: row ``position`` of ``left`` and ``right``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ...call import Call
from .chunkwise import gelu_derivative, layer_norm_vjp

__all__ = ["stepper"]


def stepper(call: Call) -> Callable:
    """``run(buffers, q, k, v, lr, log_decay, delta, momentum, out)`` for calls like this one."""

    def run(buffers, q, k, v, lr, log_decay, delta, momentum, out) -> None:
        dtype = buffers.start.dtype
        for t in range(q.shape[1]):
            token: list = [None if x is None else x[:, t].to(dtype) for x in (q, k, v, lr, log_decay, delta, momentum)]
            out[:, t] = _token(call, buffers, *token)

    return run


def _token(call: Call, x, q: Tensor, k: Tensor, v: Tensor, lr: Tensor, log_decay, delta, momentum) -> Tensor:
    """``o [N, H, Dv]`` of one token of every sequence (docs/mathematics.md, section 11: Cuts and decoding)."""
    per_row: Callable = lambda gate: None if gate is None else gate.reshape(*gate.shape[:2], -1)  # [N, H, 1 or Dv]
    predicting = x.start if x.primal is None else x.primal
    factors = (_linear_write if call.memory.name == "linear" else _mlp_write)(call, predicting, k, v, per_row(lr), per_row(delta))
    _append(x, *factors, per_row(log_decay), momentum)
    out = _read(x, 0, q) if call.memory.name == "linear" else q + _normalised(call, _read(x, 0, _gelu(_read(x, 1, q))))
    x.position.add_(1)
    _close_chunks(call, x)
    return out


def _append(x, left: Tensor, right: Tensor, log_decay: Tensor | None, momentum: Tensor | None) -> None:
    """``S <- theta S + left right'``, ``A <- alpha A + S``: the new weights of the terms of A and S, and the token's factors."""
    row = torch.arange(x.weights.shape[2], device=x.position.device) - x.position[:, None, None]  # 2: this token; less: earlier terms
    before, new = row < 2, (row == 2).to(x.weights.dtype)
    if momentum is not None:
        x.momentum_weights.copy_(torch.where(before, momentum.unsqueeze(-1) * x.momentum_weights, new))
    if log_decay is not None:
        x.weights.mul_(log_decay.exp().unsqueeze(2))
        x.open_log_decay.add_(log_decay.view_as(x.open_log_decay))
    if momentum is not None:
        x.weights.add_(x.momentum_weights.unsqueeze(-1))
    x.weights.copy_(torch.where(before.unsqueeze(-1), x.weights, new.unsqueeze(-1)))
    for rows, one in ((x.left, left.unsqueeze(3)), (x.right, right.unsqueeze(3))):
        rows.scatter_(3, x.position.view(-1, 1, 1, 1, 1).expand_as(one), one)


def _read(x, i: int, vector: Tensor) -> Tensor:
    """The product of matrix ``i``, as it is after the token, with a vector: ``[N, H, V]`` of W' (i = 0), ``[N, H, K]`` of W2."""
    times = (lambda m: _linear(m[:, :, i], vector)) if i == 0 else (lambda m: (m[:, :, i] @ vector.unsqueeze(-1)).squeeze(-1))
    weights, left, right = x.weights, x.left[:, :, i], x.right[:, :, i]  # rows without meaning have weight 0
    if i == 0:
        changed = ((left @ vector.unsqueeze(-1)) * weights[:, :, 2:] * right).sum(2)
    else:
        changed = _linear(left, (right @ vector.unsqueeze(-1) * weights[:, :, 2:]).squeeze(-1))
    if x.written is not None:
        changed = changed + weights[:, :, 0] * times(x.written)
    if x.momenta is not None:
        changed = changed + weights[:, :, 1] * times(x.momenta)
    if x.rho is not None:
        changed = x.rho[:, :, i, None] * changed
    return x.gamma()[:, :, 0, 0] * times(x.start if x.primal is None else x.primal) + changed


def _close_chunks(call: Call, x) -> None:
    """Where a sequence has read the last token of its chunk, the next chunk starts from the dual."""
    closes = x.position == call.chunk_size
    if closes.device.type == "cpu" and not closes.any():  # on other devices this check would wait for the device
        return
    at = lambda tensor: closes.view(-1, *[1] * (tensor.dim() - 1))
    dual, momenta = x.matrices()
    x.start.copy_(torch.where(at(dual), dual, x.start))
    if momenta is not None:
        x.momenta.copy_(torch.where(at(momenta), momenta, x.momenta))
        x.momentum_weights[:, :, 1].masked_fill_(closes[:, None], 1.0)
    for tensor in (x.weights, x.open_log_decay, x.position):
        tensor.masked_fill_(at(tensor), 0)
    x.map_start(call.retention)


def _linear(w: Tensor, x: Tensor) -> Tensor:
    """``W x`` for ``W' [N, H, K, V]``."""
    return (x.unsqueeze(-2) @ w).squeeze(-2)


def _linear_write(call: Call, w: Tensor, k: Tensor, v: Tensor, lr: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
    g = call.bias.psi(_linear(w[:, :, 0], k), v, delta)
    return k.unsqueeze(2), -(lr * g).unsqueeze(2)


def _hidden(w: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``z``, ``a = gelu(z) [N, H, Hd]`` and ``u = W1 a [N, H, D]``."""
    z = (w[:, :, 1] @ x.unsqueeze(-1)).squeeze(-1)
    a = _gelu(z)
    return z, a, (a.unsqueeze(-2) @ w[:, :, 0]).squeeze(-2)


def _gelu(z: Tensor) -> Tensor:
    return F.gelu(z, approximate="tanh")


def _normalised(call: Call, u: Tensor) -> Tensor:
    assert call.ln_weight is not None and call.ln_bias is not None
    return F.layer_norm(u, u.shape[-1:], eps=call.ln_eps) * call.ln_weight + call.ln_bias


def _mlp_write(call: Call, w: Tensor, k: Tensor, v: Tensor, lr: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
    z, a, u = _hidden(w, k)
    g = call.bias.psi(k + _normalised(call, u), v, delta)
    assert call.ln_weight is not None
    g_u = layer_norm_vjp(u, g * call.ln_weight, call.ln_eps)
    g_z = (w[:, :, 0] @ g_u.unsqueeze(-1)).squeeze(-1) * gelu_derivative(z)
    return torch.stack([a, -lr * g_z], 2), torch.stack([-lr * g_u, k], 2)
