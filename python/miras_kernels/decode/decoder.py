"""Token by token on a state that is written in place: what generation calls.

:func:`~miras_kernels.linear_memory` and :func:`~miras_kernels.mlp_memory` take and return states as values. A :class:`Decoder` holds
one in buffers of fixed addresses instead: a step allocates nothing but its output (nor that, if it is given one), waits for no device, and
can be captured in a CUDA graph.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from .. import dispatch
from ..call import Call
from ..state import MemoryState, OpenChunk
from ..tables import memories
from ..tables.biases import L2, Bias
from ..tables.retention import L2Retention, LqRetention, Retention
from ..validation import make_call

__all__ = ["Buffers", "Decoder", "buffers_for", "forward", "thresholds"]


@dataclasses.dataclass
class Buffers:
    """A state as steps keep it, for ``N`` sequences; every tensor contiguous, float32 (float64 for float64 inputs) but ``position``.

    A step writes matrices when a chunk closes, and seldom else: what the open chunk's tokens wrote is kept as factors of rank one,

        ``A = gamma A_0 + kept_0 D + kept_1 S_0 + sum_i left_i (kept_(2+i) o right_i)'``
        ``S = moved_1 S_0 + sum_i moved_(2+i) left_i right_i'``

    ``m`` matrices: 1 of a linear memory, ``K x V = Dk x Dv``; 2 of an MLP, ``K x V = Hd x D``: W1 transposed and W2. ``C`` is the chunk
    size, ``w`` 1, or ``Dv`` for a channel-wise decay. Token ``i`` of the open chunk has row ``i`` of the factors and row ``2 + i`` of their
    weights; rows from ``position`` (``2 + position``) on mean nothing, but are finite.

    Attributes:
        start: ``[N, H, m, K, V]``, A_0, the dual at the start of the open chunk; where ``position`` is 0 A itself.
        primal: the same, phi of ``start``; None for ``L2Retention``.
        rho: ``[N, H, m]``, of ``start``; None but for gates that have one.
        carried: like ``start``, D: what had been written to the open chunk when the state was loaded, or of it what a step no longer keeps
            as factors, whose weights are 0 then. None where every token is a chunk.
        momentum: like ``start``, S_0: S at that time, or at the chunk's start; None without momentum.
        left: ``[N, H, m, C, K]``, a factor of each token's write: of a linear memory k, of an MLP gelu(z) for W1 and for W2 minus the
            step size times the gradient in z.
        right: ``[N, H, m, C, V]``, the other: of a linear memory minus the step size times psi(e), of an MLP minus the step size times the
            gradient in u for W1, and k for W2.
        kept: ``[N, H, 2 + C, w]``, weights in A: row 0 of ``carried``, row 1 of ``momentum``, the rest of the tokens' writes.
            Rows 0 and 1 are 0 where ``position`` is 0.
        moved: ``[N, H, 2 + C]``, weights in S of the same, row 0 always 0, row 1 1 where ``position`` is 0; None without momentum.
        log_decay: log gamma, ``[N, H]``, or ``[N, H, Dv]`` for a channel-wise decay: the open chunk's sum, 0 where ``position`` is 0.
        position: ``[N]`` int64, tokens of the open chunk that each sequence has read, less than C.
    """

    start: Tensor
    primal: Tensor | None
    rho: Tensor | None
    carried: Tensor | None
    momentum: Tensor | None
    left: Tensor
    right: Tensor
    kept: Tensor
    moved: Tensor | None
    log_decay: Tensor
    position: Tensor

    def tensors(self) -> list[Tensor]:
        return [x for x in vars(self).values() if x is not None]

    def gamma(self) -> Tensor:
        """Against matrices: ``[N, H, 1, 1, w]``."""
        return self.log_decay.exp().reshape(*self.log_decay.shape[:2], 1, 1, -1)

    def matrices(self) -> tuple[Tensor, Tensor | None]:
        """``(A, S)`` after the last token, like ``start``: new tensors."""
        written = torch.arange(self.kept.shape[2], device=self.position.device) < 2 + self.position[:, None]  # [N, 2 + C]
        kept = torch.where(written[:, None, :, None], self.kept, 0.0)
        dual = self.gamma() * self.start + self.left.mT @ (kept[:, :, None, 2:] * self.right)
        if self.carried is not None:
            dual += kept[:, :, 0, None, None] * self.carried
        if self.momentum is None:
            return dual, None
        dual += kept[:, :, 1, None, None] * self.momentum
        moved = torch.where(written[:, None], self.moved, 0.0)[..., None]
        return dual, moved[:, :, 1, None, None] * self.momentum + self.left.mT @ (moved[:, :, None, 2:] * self.right)

    def map(self, retention: Retention) -> None:
        """Primal and rho of the start."""
        if self.primal is None:
            return
        for i, start in enumerate(_matrices(self.start.clone())):  # whose layout, and so whose order of summation, is always the same
            self.primal[:, :, i].copy_(_oriented(retention.phi(start), i, self.start.shape[2]))
            if self.rho is not None:
                self.rho[:, :, i].copy_(retention.rho(start)[..., 0, 0])


class Decoder:
    """Reads short runs of tokens into a state that it keeps.

    Computes what the public functions compute: feeding tokens one after the other gives the outputs of the whole sequence. No gradients.

    Args:
        state: where to begin: a :class:`MemoryState`, as ``linear_memory`` or ``mlp_memory`` return it after a prompt. It is copied. It
            carries momentum if the steps have one.
        chunk_size, bias, retention: of the memory.
        ln_weight, ln_bias, ln_eps: of an MLP memory, ``[H, D]``.
        channel_wise_decay: whether ``log_decay`` will be ``[N, T, H, Dv]``.
        memory: "linear" or "mlp"; by default the one that takes the arguments given.
        backend: "auto", or the name of one that has steps.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came; by the first step with new shapes or dtypes.
    """

    def __init__(
        self,
        state: MemoryState,
        *,
        chunk_size: int,
        bias: Bias = L2(),  # noqa: B008  immutable
        retention: Retention = L2Retention(),  # noqa: B008  immutable
        ln_weight: Tensor | None = None,
        ln_bias: Tensor | None = None,
        ln_eps: float = 1e-6,
        channel_wise_decay: bool = False,
        memory: str | None = None,
        backend: str = "auto",
    ):
        if not isinstance(state, MemoryState):
            raise TypeError(f"state: expected a MemoryState, got {type(state).__name__}")
        self.settings = dict(chunk_size=chunk_size, bias=bias, retention=retention)
        self.memory = memories.find(memory, () if ln_weight is None else ("ln_weight",))
        self.norm = {} if ln_weight is None else dict(ln_weight=ln_weight, ln_bias=ln_bias, ln_eps=ln_eps)
        self.backend = backend
        self.buffers = buffers_for(state, chunk_size, retention, channel_wise_decay)
        self._steps: dict[tuple, Callable] = {}
        self._latest: Callable = _never
        self.load(state)

    def step(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lr: Tensor,
        log_decay: Tensor | None = None,
        *,
        delta: float | Tensor | None = None,
        momentum: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Read ``T`` tokens of every sequence: arguments and result as in :func:`~miras_kernels.linear_memory`, ``[N, T, H, ...]``.

        Args:
            out: where to put the result, ``[N, T, H, Dv]`` in the dtype of ``v``.
        """
        result = self._latest(q, k, v, lr, log_decay, delta, momentum, out)
        return result if result is not None else self._other_step(q, k, v, lr, log_decay, delta, momentum, out)

    @torch.no_grad()
    def _other_step(self, *tokens) -> Tensor:
        """A step unlike the one before it."""
        key = tuple((x.shape, x.dtype, x.device) if isinstance(x, Tensor) else type(x) for x in tokens)
        step, tokens = self._steps.get(key), self._widened(*tokens)
        result = None if step is None else step(*tokens)
        if result is None:  # new, or out of range
            step = self._steps[key] = self._prepare(*tokens)
            result = step(*tokens)
            if result is None:
                raise RuntimeError(f"a step refused what it was made for: {key}")
        self._latest = step
        return result

    def _widened(self, q, k, v, *gates_and_out) -> tuple:
        """The arguments with gates in the dtype of the arithmetic."""
        *gates, out = gates_and_out
        dtype = self.buffers.start.dtype
        wide = lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else float(x) if type(x) is int else x
        return q, k, v, *map(wide, gates), out

    def _prepare(self, q, k, v, lr, log_decay, delta, momentum, out) -> Callable:
        """Check arguments of new shapes, and choose who will take them: ``step(q, k, v, lr, log_decay, delta, momentum, out)``, which
        returns the output, or None, having done nothing, where arguments are not like these.
        """
        channels = self.buffers.log_decay.dim() == 3
        if channels if log_decay is None else isinstance(log_decay, Tensor) and log_decay.dim() == (3 if channels else 4):
            wanted = "[N, T, H, Dv] (channel_wise_decay=True)" if channels else "[N, T, H]"
            raise ValueError(f"log_decay: expected {wanted}, got {None if log_decay is None else f'shape {tuple(log_decay.shape)}'}")
        call = make_call(
            self.memory, q, k, v, lr, log_decay, delta=delta, momentum=momentum, initial_state=self.state(), output_final_state=True,
            **self.settings, **self.norm,
        )  # fmt: skip
        if call.state.momentum is not None and self.buffers.momentum is None:
            raise ValueError("momentum: the decoder's state carries none, so expected None, got a tensor")
        if out is not None and not isinstance(out, Tensor):
            raise TypeError(f"out: expected a tensor or None, got {type(out).__name__}")
        if out is not None and (out.shape != v.shape or out.dtype != v.dtype or out.device != v.device):
            raise ValueError(
                f"out: expected shape {tuple(v.shape)}, {v.dtype} on {v.device}, got {tuple(out.shape)}, {out.dtype} on {out.device}"
            )
        run = dispatch.stepper(self.backend, call)
        if hasattr(run, "bind"):
            return run.bind(self.buffers)
        return _Checked(run, self.buffers, (q, k, v, lr, log_decay, delta, momentum, out))

    @torch.no_grad()
    def state(self) -> MemoryState:
        """The state as a value: a copy."""
        x = self.buffers
        dual, momentum = x.matrices()
        return MemoryState(
            _matrices(dual), None if momentum is None else _matrices(momentum),
            OpenChunk(x.position.clone(), _matrices(x.start.clone()), x.log_decay.clone()),
        )  # fmt: skip

    @torch.no_grad()
    def load(self, state: MemoryState) -> None:
        """Go on from another state of the same sizes; the buffers stay where they are."""
        x, opened, dual = self.buffers, state.open_chunk, _stacked(state.dual)
        for tensor in (x.left, x.right, x.kept, x.log_decay, x.position):
            tensor.zero_()
        if x.momentum is not None:
            x.momentum.zero_() if state.momentum is None else x.momentum.copy_(_stacked(state.momentum))
            x.moved.zero_()[:, :, 1] = 1.0
        x.start.copy_(dual)
        if opened is not None and x.carried is not None:
            x.position.copy_(opened.position)
            x.log_decay.copy_(opened.log_decay)
            inside = (x.position > 0)[:, None, None]
            x.start.copy_(torch.where(inside[..., None, None], _stacked(opened.start), dual))
            x.carried.copy_(torch.where(inside[..., None, None], dual - x.gamma() * x.start, 0.0))
            x.kept[:, :, 0] = inside.to(x.kept.dtype)
        x.map(self.settings["retention"])

    @torch.no_grad()
    def decay(self, log_decay: Tensor) -> None:
        """Multiply the dual by ``exp(log_decay)``, ``[N, H]`` or per key channel ``[N, H, Dk]``.

        A step without decay after it is one with ``decay_first``; for linear memories with ``chunk_size=1`` and ``L2Retention()``.
        """
        start = self.buffers.start
        if not self.memory.variants or self.settings["chunk_size"] != 1 or self.buffers.primal is not None:
            raise ValueError(
                f"decay: needs a linear memory, chunk_size=1 and retention=L2Retention(), got {self.memory.title}, {self.settings}"
            )
        shapes = (start.shape[:2], (*start.shape[:2], start.shape[3]))
        if not isinstance(log_decay, Tensor) or tuple(log_decay.shape) not in map(tuple, shapes):
            got = f"shape {tuple(log_decay.shape)}" if isinstance(log_decay, Tensor) else type(log_decay).__name__
            raise ValueError(f"log_decay: expected shape [N, H] or [N, H, Dk] = {' or '.join(str(tuple(x)) for x in shapes)}, got {got}")
        start.mul_(log_decay.to(start.dtype).exp().reshape(*start.shape[:2], 1, -1, 1))

    @torch.no_grad()
    def reorder(self, index: Tensor) -> None:
        """Sequence ``n`` goes on from where sequence ``index[n]`` stood, as beam search asks for."""
        for x in self.buffers.tensors():
            x.copy_(x.index_select(0, index))


def _never(*tokens) -> None:
    """The step before the first one."""


class _Checked:
    """A step for arguments like some, by a stepper that does not look at them."""

    def __init__(self, run: Callable, buffers: Buffers, tokens: tuple):
        self.run, self.buffers, self.wanted = run, buffers, self._signature(tokens)

    @torch.no_grad()
    def __call__(self, *tokens) -> Tensor | None:
        if self._signature(tokens) != self.wanted:
            return None
        *tokens, out = tokens
        if out is None:
            out = torch.empty_like(tokens[2], memory_format=torch.contiguous_format)
        self.run(self.buffers, *tokens, out)
        return out

    @staticmethod
    def _signature(tokens: tuple) -> tuple:
        """Shapes, devices and dtypes; those of gates may differ, they are widened."""
        return tuple((x.shape, x.device, x.dtype if i < 3 else None) if isinstance(x, Tensor) else type(x) for i, x in enumerate(tokens))


def _oriented(matrix: Tensor, i: int, count: int) -> Tensor:
    """Matrix ``i`` of a memory's as its buffer has it: all but an MLP's W2 are transposed."""
    return matrix if (i, count) == (1, 2) else matrix.transpose(-1, -2)


def _stacked(matrices: tuple[Tensor, ...]) -> Tensor:
    return torch.stack([_oriented(x, i, len(matrices)) for i, x in enumerate(matrices)], 2)


def _matrices(buffer: Tensor) -> tuple[Tensor, ...]:
    """The inverse of :func:`_stacked`: views."""
    return tuple(_oriented(x, i, buffer.shape[2]) for i, x in enumerate(buffer.unbind(2)))


def forward(call: Call, backend: str) -> tuple[Tensor, list[Tensor]]:
    """A short call by the steps of a backend, on buffers made for it: its output and its final state's tensors."""
    norm = {name: getattr(call, name) for name in memories.NORM} if call.memory.needs_norm else {}
    channel_wise = call.log_decay is not None and call.log_decay.dim() == 4
    settings = dict(chunk_size=call.chunk_size, bias=call.bias, retention=call.retention, channel_wise_decay=channel_wise)
    reader, out = Decoder(call.state, **settings, **norm, memory=call.memory.name, backend=backend), torch.empty_like(call.v)
    run = dispatch.BACKENDS[backend].stepper(call)
    run(reader.buffers, call.q, call.k, call.v, call.lr, call.log_decay, call.delta, call.momentum, out)
    return out, reader.state().tensors()


def thresholds(call: Call) -> Callable[[float], Tensor]:
    """delta as a tensor ``[N, T, H]``, for calls like this one that give it as a number: usually always the same."""
    shape, device = call.q.shape[:3], call.q.device
    return functools.lru_cache(maxsize=4)(lambda value: torch.full(shape, value, dtype=torch.float32, device=device))


def buffers_for(state: MemoryState, chunk_size: int, retention: Retention, channel_wise_decay: bool) -> Buffers:
    """Room for a state of these sizes."""
    start = torch.empty_like(_stacked(state.dual))
    n, h, m, rows, columns = start.shape
    like = lambda wanted: torch.zeros_like(start) if wanted else None
    room = lambda *shape: start.new_zeros(n, h, *shape)
    moves, width = state.momentum is not None, [columns] if channel_wise_decay else []
    return Buffers(
        start, primal=like(not isinstance(retention, L2Retention)), rho=room(m) if isinstance(retention, LqRetention) else None,
        carried=like(chunk_size > 1), momentum=like(moves), left=room(m, chunk_size, rows), right=room(m, chunk_size, columns),
        kept=room(2 + chunk_size, *(width or [1])), moved=room(2 + chunk_size) if moves else None,
        log_decay=room(*width), position=torch.zeros(n, dtype=torch.int64, device=start.device),
    )  # fmt: skip
