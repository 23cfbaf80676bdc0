"""The matrix form: a chunk's tokens at once (docs/mathematics.md, sections 2, 3, 8 and 9), in PyTorch that autograd differentiates.

Serves every call of a linear or an MLP memory. A sequence is padded to whole chunks with tokens that do nothing (zero step size, no
decay), in front too where it resumes inside an open chunk. Only the prediction error and the state are computed chunk after chunk; the
read-out is batched over chunks.

Shapes: B batch, H heads, N chunks, C chunk_size, D head dimensions, R rows of a gate: 1, or Dv for a channel-wise one.
Decay matrices are ``L [B, H, N, C, C, R]``, ``L_ts = gamma_t / gamma_s`` for ``s <= t``, else 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ...call import Call
from ...state import MemoryState
from ...tables.memories import LINEAR, MLP
from . import definition
from .sequences import final_state, join, open_chunk, sequences

__all__ = ["Decay", "Layout", "Tokens", "decays", "empty", "gelu_derivative", "layer_norm_vjp", "run"]


def run(call: Call) -> tuple[Tensor, MemoryState]:
    """``(out [B, T, H, Dv], final state)``; differentiable in every tensor of the call."""
    run_together = MATRIX_FORMS.get(call.memory.name)
    if run_together is None:
        return definition.run(call)
    return join(call, [run_together(part) for part in sequences(call)])


# ---------------------------------------------------------------------------------------------------------- chunks


class Layout(NamedTuple):
    """Where the tokens of a call lie in its chunks."""

    front: int  # tokens the first chunk had already consumed
    tokens: int
    size: int

    @property
    def back(self) -> int:
        return -(self.front + self.tokens) % self.size

    @property
    def end(self) -> int:
        """Position in the chunk that is open after the last token; 0 at a boundary."""
        return (self.front + self.tokens) % self.size

    def split(self, x: Tensor) -> Tensor:
        """``[B, T, H, ...] -> [B, H, N, C, ...]``, padded with zeros."""
        pad = [0, 0] * (x.dim() - 2) + [self.front, self.back]
        x = F.pad(x, pad) if self.front or self.back else x
        return x.unflatten(1, (x.shape[1] // self.size, self.size)).movedim(3, 1)

    def merge(self, x: Tensor) -> Tensor:
        """``[B, H, N, C, ...] -> [B, T, H, ...]``, the padding dropped."""
        return x.movedim(1, 3).flatten(1, 2)[:, self.front : self.front + self.tokens]


def _rows(gate: Tensor) -> Tensor:
    """``[B, H, N, C]`` or ``[B, H, N, C, Dv]`` -> ``[B, H, N, C, R]``."""
    return gate if gate.dim() == 5 else gate.unsqueeze(-1)


class Decay(NamedTuple):
    """Weights that follow from a chunk's log-decays and momentum, computed without dividing products that may underflow."""

    gamma: Tensor  # [B, H, N, C, R]     gamma_t, decay from the chunk's start to t
    pair: Tensor  # [B, H, N, C, C, R]   weight of the write of token s in the state of token t
    carry: Tensor | None  # [B, H, N, C, R]   b_t, weight of the initial momentum matrix S_0 in the state of token t
    step: Tensor | None  # [B, H, N, C, 1]    weight of the write of token s in the chunk's last momentum
    step_carry: Tensor | None  # [B, H, N, 1]  weight of S_0 in it

    def last(self) -> tuple[Tensor, Tensor]:
        """``(gamma_C [B, H, N, R], weights [B, H, N, C, R] of the writes in the chunk's last state)``."""
        return self.gamma[..., -1, :], self.pair[..., -1, :, :]


def _segment_sums(x: Tensor) -> Tensor:
    """``[..., C, R] -> [..., C, C, R]``: sum of ``x_r`` over ``s < r <= t``, -inf above the diagonal; without cancellation."""
    c = x.shape[-2]
    lower = torch.ones(c, c, dtype=torch.bool, device=x.device).tril(-1).unsqueeze(-1)
    sums = x.unsqueeze(-2).expand(*x.shape[:-2], c, c, x.shape[-1]).masked_fill(~lower, 0).cumsum(-3)
    return sums.masked_fill(lower.transpose(0, 1), -torch.inf)


def decays(layout: Layout, log_decay: Tensor | None, momentum: Tensor | None, like: Tensor) -> Decay:
    b, _, h = like.shape[:3]
    if log_decay is None:
        log_decay = like.new_zeros(b, layout.tokens, h)
    log_decay = _rows(layout.split(log_decay))
    gamma, pair = log_decay.cumsum(-2).exp(), _segment_sums(log_decay).exp()
    if momentum is None:
        return Decay(gamma, pair, None, None, None)
    real = layout.split(torch.ones_like(momentum)).unsqueeze(-1)
    theta = layout.split(momentum).unsqueeze(-1) + (1 - real)  # padding leaves the momentum matrix as it is ...
    c = theta.shape[-2]
    lower = torch.ones(c, c, dtype=torch.bool, device=theta.device).tril(-1).unsqueeze(-1)
    products = theta.unsqueeze(-2).expand(*theta.shape[:-2], c, c, 1).masked_fill(~lower, 1).cumprod(-3)
    steps = products.masked_fill(lower.transpose(0, 1), 0)  # theta_{s+1} ... theta_t, exact for theta = 0
    from_start = theta.cumprod(-2)
    weigh = pair * real.unsqueeze(-3)  # [.., t, r, R]: ... and does not add it to the state
    carry = torch.einsum("...trd,...rx->...td", weigh, from_start)
    pair = torch.einsum("...trd,...rsx->...tsd", weigh, steps)
    return Decay(gamma, pair, carry, steps[..., -1, :, :], from_start[..., -1, :])


def _write(decay: Decay, n: int, left: Tensor, right: Tensor, dual: Tensor, momenta: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The dual and the momentum matrix after chunk n, whose tokens write ``-left_s right_s'`` (left ``[B, H, C, R]``)."""
    gamma, weights = (x[:, :, n] for x in decay.last())
    new = gamma.unsqueeze(-1) * dual - (weights * left).transpose(-1, -2) @ right
    if momenta is None or decay.carry is None or decay.step is None or decay.step_carry is None:
        return new, None
    new = new + decay.carry[:, :, n, -1].unsqueeze(-1) * momenta
    momenta = decay.step_carry[:, :, n].unsqueeze(-1) * momenta - (decay.step[:, :, n] * left).transpose(-1, -2) @ right
    return new, momenta


def _read(decay: Decay, x: Tensor, readout: Tensor, rho: Tensor, left: Tensor, right: Tensor, momenta: Tensor | None) -> Tensor:
    """Every token's read-out ``(gamma_t W_0 + rho D_t) x_t``, batched over chunks: ``[B, H, N, C, rows]``.

    Args:
        readout: ``[B, H, N, rows, K]``, the matrix that a chunk's tokens read before its own writes.
        left, right: the writes ``-left_s right_s'``.
        momenta: ``[B, H, N, rows, K]``, the momentum matrix at each chunk's start.
    """
    scores = x @ right.transpose(-1, -2)  # [B, H, N, C, C]
    if decay.pair.shape[-1] == 1:
        written = -(decay.pair.squeeze(-1) * scores) @ left
    else:
        written = -torch.einsum("...tsd,...ts,...sd->...td", decay.pair, scores, left)
    if momenta is not None and decay.carry is not None:
        written = written + decay.carry * (x @ momenta.transpose(-1, -2))
    return decay.gamma * (x @ readout.transpose(-1, -2)) + rho * written


class _Chain:
    """One matrix through the chunks: the primal for predictions, what the read-out needs of each chunk, and the final state."""

    def __init__(self, call: Call, dual: Tensor, start: Tensor, gamma: Tensor, momenta: Tensor | None):
        self.phi, self.rho_of = call.retention.phi, call.retention.rho
        self.dual, self.start, self.momenta = dual, start, momenta
        self.gamma = gamma.reshape(*gamma.shape[:2], -1, 1)  # of an open chunk, at the call's first token
        self.readouts: list[Tensor] = []
        self.rhos: list[Tensor] = []
        self.initial_momenta: list[Tensor | None] = []

    def open(self) -> Tensor:
        """Begin a chunk; returns its primal ``W_0``."""
        primal, rho = self.phi(self.start), self.rho_of(self.start)
        resumed = self.start is not self.dual
        self.readouts.append(self.gamma * primal + rho * (self.dual - self.gamma * self.start) if resumed else primal)
        self.rhos.append(rho)
        self.initial_momenta.append(self.momenta)
        return primal

    def close(self, decay: Decay, n: int, left: Tensor, right: Tensor) -> None:
        """Write a chunk."""
        self.opened = self.start
        self.dual, self.momenta = _write(decay, n, left, right, self.dual, self.momenta)
        self.start = self.dual

    def read(self, decay: Decay, x: Tensor, left: Tensor, right: Tensor) -> Tensor:
        momenta = None if self.momenta is None else torch.stack(self.initial_momenta, 2)  # type: ignore[arg-type]
        return _read(decay, x, torch.stack(self.readouts, 2), torch.stack(self.rhos, 2), left, right, momenta)


def _chains(call: Call) -> tuple[Layout, list[_Chain], Tensor]:
    position, start, log_decay = open_chunk(call)
    momenta = call.state.momentum or (None,) * len(start)
    duals = call.state.dual
    chains = [_Chain(call, d, d if position == 0 else a, log_decay.exp(), s) for d, a, s in zip(duals, start, momenta, strict=True)]
    return Layout(position, call.q.shape[1], call.chunk_size), chains, log_decay


def _finish(call: Call, layout: Layout, chains: list[_Chain], log_decay: Tensor) -> MemoryState:
    """The state after the last token."""
    if layout.front + layout.tokens >= layout.size:  # the chunk open at the end began in this call
        log_decay = torch.zeros_like(log_decay)
    if call.log_decay is not None:
        log_decay = log_decay + call.log_decay[:, max(layout.tokens - layout.end, 0) :].sum(1)
    start = [c.start if layout.end == 0 else c.opened for c in chains]
    momenta = None if call.momentum is None else [c.momenta for c in chains]
    return final_state([c.dual for c in chains], momenta, layout.end, start, log_decay)


class Tokens(NamedTuple):
    """A call's tensors laid out in chunks, ``[B, H, N, C, ...]``."""

    q: Tensor
    k: Tensor
    v: Tensor
    lr: Tensor  # [B, H, N, C, R]
    delta: Tensor | None  # [B, H, N, C, R]

    @staticmethod
    def of(call: Call, layout: Layout) -> Tokens:
        q, k, v, lr = map(layout.split, (call.q, call.k, call.v, call.lr))
        return Tokens(q, k, v, _rows(lr), None if call.delta is None else _rows(layout.split(call.delta)))

    def delta_of(self, n: int) -> Tensor | None:
        return None if self.delta is None else self.delta[:, :, n]


# ---------------------------------------------------------------------------------------------------------- linear


def _run_linear(call: Call) -> tuple[Tensor, MemoryState]:
    if call.q.shape[1] == 0:
        return empty(call)
    layout, (chain,), log_decay = _chains(call)
    tokens = Tokens.of(call, layout)
    q, k, v, lr, _ = tokens
    decay = decays(layout, call.log_decay, call.momentum, call.q)
    updates = []
    for n in range(k.shape[2]):
        prediction = k[:, :, n] @ chain.open().transpose(-1, -2)
        g = call.bias.psi(prediction, v[:, :, n], tokens.delta_of(n))
        updates.append(lr[:, :, n] * g)  # U
        chain.close(decay, n, updates[-1], k[:, :, n])
    out = chain.read(decay, q, torch.stack(updates, 2), k)
    return layout.merge(out), _finish(call, layout, [chain], log_decay)


# ------------------------------------------------------------------------------------------------------------- MLP


def gelu_derivative(x: Tensor) -> Tensor:
    """Derivative of the tanh form of gelu."""
    a, c = 0.7978845608028654, 0.044715  # sqrt(2 / pi)
    t = torch.tanh(a * (x + c * x**3))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * a * (1 + 3 * c * x * x)


def layer_norm_vjp(u: Tensor, grad: Tensor, eps: float) -> Tensor:
    """Gradient in ``u`` of LayerNorm without its affine part, for the gradient ``grad`` of its output."""
    centred = u - u.mean(-1, keepdim=True)
    r = torch.rsqrt((centred * centred).mean(-1, keepdim=True) + eps)
    x = centred * r
    return r * (grad - grad.mean(-1, keepdim=True) - x * (grad * x).mean(-1, keepdim=True))


def _run_mlp(call: Call) -> tuple[Tensor, MemoryState]:
    if call.q.shape[1] == 0:
        return empty(call)
    assert call.ln_weight is not None and call.ln_bias is not None
    layout, (chain1, chain2), log_decay = _chains(call)
    tokens = Tokens.of(call, layout)
    q, k, v, lr, _ = tokens
    decay = decays(layout, call.log_decay, call.momentum, call.q)
    weight, bias = (x[None, :, None] for x in (call.ln_weight, call.ln_bias))  # [1, H, 1, D]

    def normalise(u: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(u, u.shape[-1:], eps=call.ln_eps) * weight + bias

    hidden, updates1, updates2 = [], [], []
    for n in range(k.shape[2]):
        kn, w1, w2 = k[:, :, n], chain1.open(), chain2.open()
        z = kn @ w2.transpose(-1, -2)  # [B, H, C, Hd]
        a = F.gelu(z, approximate="tanh")
        u = a @ w1.transpose(-1, -2)  # [B, H, C, D]
        g = call.bias.psi(kn + normalise(u, weight, bias), v[:, :, n], tokens.delta_of(n))
        g_u = layer_norm_vjp(u, g * weight, call.ln_eps)
        g_z = (g_u @ w1) * gelu_derivative(z)
        hidden.append(a)
        updates1.append(lr[:, :, n] * g_u)
        updates2.append(lr[:, :, n] * g_z)
        chain1.close(decay, n, updates1[-1], a)
        chain2.close(decay, n, updates2[-1], kn)
    a_q = F.gelu(chain2.read(decay, q, torch.stack(updates2, 2), k), approximate="tanh")
    u_q = chain1.read(decay, a_q, torch.stack(updates1, 2), torch.stack(hidden, 2))
    out = q + normalise(u_q, weight.unsqueeze(2), bias.unsqueeze(2))
    return layout.merge(out), _finish(call, layout, [chain1, chain2], log_decay)


def empty(call: Call) -> tuple[Tensor, MemoryState]:
    """The result of a call without tokens: an empty output and the state as it was."""
    position, start, log_decay = open_chunk(call)
    return torch.zeros_like(call.v), final_state(call.state.dual, call.state.momentum, position, start, log_decay)


#: by memory; one without an entry is run token by token
MATRIX_FORMS: dict[str, Callable[[Call], tuple[Tensor, MemoryState]]] = {LINEAR.name: _run_linear, MLP.name: _run_mlp}
