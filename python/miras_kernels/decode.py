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

from . import dispatch
from .biases import L2, Bias
from .reference.inputs import Call
from .retention import L2Retention, LqRetention, Retention
from .state import MemoryState, OpenChunk
from .validation import linear_call, mlp_call

__all__ = ["Buffers", "Decoder", "buffers_for", "forward", "thresholds"]


@dataclasses.dataclass
class Buffers:
    """A state as steps keep it, for ``N`` sequences; every tensor contiguous, float32 (float64 for float64 inputs) but ``position``.

    ``m`` matrices: 1 of a linear memory, ``K x V = Dk x Dv``; 2 of an MLP, ``K x V = Hd x D``: W1 transposed and W2.

    Attributes:
        dual: ``[N, H, m, K, V]``, A after the last token.
        start: the same, at the start of the chunk that is open; None where every token is a chunk and phi the identity. Stale where
            ``position`` is 0.
        primal: the same, phi of ``start``; None for ``L2Retention``. Stale where ``position`` is 0.
        rho: ``[N, H, m]``, of ``start``; None but for gates that have one. Stale where ``position`` is 0.
        momentum: like ``dual``, S after the last token; None without momentum.
        log_decay: ``[N, H]``, or ``[N, H, Dv]`` for a channel-wise decay: the sum of the open chunk's, 0 where ``position`` is 0.
        position: ``[N]`` int64, tokens of the open chunk that each sequence has read.
    """

    dual: Tensor
    start: Tensor | None
    primal: Tensor | None
    rho: Tensor | None
    momentum: Tensor | None
    log_decay: Tensor
    position: Tensor

    def tensors(self) -> list[Tensor]:
        return [x for x in vars(self).values() if x is not None]


class Decoder:
    """Reads short runs of tokens into a state that it keeps.

    Computes what the public functions compute: feeding tokens one after the other gives the outputs of the whole sequence. No gradients.

    Args:
        state: where to begin: a :class:`MemoryState`, as ``linear_memory`` or ``mlp_memory`` return it after a prompt. It is copied. It
            carries momentum if the steps have one.
        chunk_size, bias, retention: of the memory.
        ln_weight, ln_bias, ln_eps: of an MLP memory, ``[H, D]``.
        channel_wise_decay: whether ``log_decay`` will be ``[N, T, H, Dv]``.
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
        backend: str = "auto",
    ):
        if not isinstance(state, MemoryState):
            raise TypeError(f"state: expected a MemoryState, got {type(state).__name__}")
        self.settings = dict(chunk_size=chunk_size, bias=bias, retention=retention)
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
        dtype = self.buffers.dual.dtype
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
        make = mlp_call if self.norm else linear_call
        call = make(
            q, k, v, lr, log_decay, delta=delta, momentum=momentum, initial_state=self.state(), output_final_state=True, cu_seqlens=None,
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

    def state(self) -> MemoryState:
        """The state as a value: a copy."""
        x = self.buffers
        at_boundary = (x.position == 0)[:, None, None, None]
        starts = x.dual if x.start is None else torch.where(at_boundary[..., None], x.dual, x.start)
        return MemoryState(
            _matrices(x.dual), None if x.momentum is None else _matrices(x.momentum),
            OpenChunk(x.position.clone(), _matrices(starts), x.log_decay.clone()),
        )  # fmt: skip

    @torch.no_grad()
    def load(self, state: MemoryState) -> None:
        """Go on from another state of the same sizes; the buffers stay where they are."""
        x, opened = self.buffers, state.open_chunk
        x.dual.copy_(_stacked(state.dual))
        if x.momentum is not None and state.momentum is not None:
            x.momentum.copy_(_stacked(state.momentum))
        elif x.momentum is not None:
            x.momentum.zero_()
        x.position.zero_() if opened is None else x.position.copy_(opened.position)
        x.log_decay.zero_() if opened is None else x.log_decay.copy_(opened.log_decay)
        if x.start is not None:
            x.start.copy_(_stacked(state.dual if opened is None else opened.start))
        if x.primal is None:
            return
        retention = self.settings["retention"]
        for i, start in enumerate(_matrices(x.start)):  # whose layout, and so whose order of summation, is always the same
            x.primal[:, :, i].copy_(_oriented(retention.phi(start), i, x.start.shape[2]))
            if x.rho is not None:
                x.rho[:, :, i].copy_(retention.rho(start)[..., 0, 0])

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
    """The inverse of :func:`_stacked`: views of a copy."""
    return tuple(_oriented(x, i, buffer.shape[2]) for i, x in enumerate(buffer.clone().unbind(2)))


def forward(call: Call, backend: str) -> tuple[Tensor, list[Tensor]]:
    """A short call by the steps of a backend, on buffers made for it: its output and its final state's tensors."""
    norm = {} if call.memory == "linear" else dict(ln_weight=call.ln_weight, ln_bias=call.ln_bias, ln_eps=call.ln_eps)
    channel_wise = call.log_decay is not None and call.log_decay.dim() == 4
    settings = dict(chunk_size=call.chunk_size, bias=call.bias, retention=call.retention, channel_wise_decay=channel_wise)
    reader, out = Decoder(call.state, **settings, **norm, backend=backend), torch.empty_like(call.v)
    run = dispatch.BACKENDS[backend].stepper(call)
    run(reader.buffers, call.q, call.k, call.v, call.lr, call.log_decay, call.delta, call.momentum, out)
    return out, reader.state().tensors()


def thresholds(call: Call) -> Callable[[float], Tensor]:
    """delta as a tensor ``[N, T, H]``, for calls like this one that give it as a number: usually always the same."""
    shape, device = call.q.shape[:3], call.q.device
    return functools.lru_cache(maxsize=4)(lambda value: torch.full(shape, value, dtype=torch.float32, device=device))


def buffers_for(state: MemoryState, chunk_size: int, retention: Retention, channel_wise_decay: bool) -> Buffers:
    """Room for a state of these sizes."""
    dual = torch.empty_like(_stacked(state.dual))
    like = lambda wanted: torch.empty_like(dual) if wanted else None
    mapped, (n, h, m) = not isinstance(retention, L2Retention), dual.shape[:3]
    return Buffers(
        dual, like(chunk_size > 1 or mapped), like(mapped),
        dual.new_empty(n, h, m) if isinstance(retention, LqRetention) else None, like(state.momentum is not None),
        dual.new_zeros(n, h, *([dual.shape[-1]] if channel_wise_decay else [])), torch.zeros(n, dtype=torch.int64, device=dual.device),
    )  # fmt: skip
