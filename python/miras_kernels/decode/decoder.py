"""Decoding with a state that is written in place, as generation does.

:func:`~miras_kernels.linear_memory` and :func:`~miras_kernels.mlp_memory` take and return states as values. A :class:`Decoder` holds
one in buffers of fixed addresses instead: a step allocates nothing but its output (nor that, if it is given one), waits for no device, and
can be captured in a CUDA graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from ..call import Call
from ..state import MemoryState
from ..tables import memories
from ..tables.biases import L2, Bias
from ..tables.retention import L2Retention, Retention
from ..validation import make_call
from ..window import check_tokens
from .buffers import Buffers
from .past import Past

__all__ = ["Decoder", "read"]


def read(call: Call, backend: str) -> tuple[Tensor, list[Tensor]]:
    """A short call without gradients, decoded: its output and the tensors of its final state, in the order of ``MemoryState.tensors``."""
    run = dispatch.BACKENDS[backend].stepper(call)
    if hasattr(run, "on_value"):
        return run.on_value()
    channel_wise = call.log_decay is not None and call.log_decay.dim() == 4
    buffers, out = Buffers.empty(call.state, call.chunk_size, call.retention, channel_wise), torch.empty_like(call.v)
    with torch.no_grad():
        buffers.load(call.state, call.retention)
        run(buffers, call.q, call.k, call.v, call.lr, call.log_decay, call.delta, call.momentum, out)
        return out, buffers.state().tensors()


class Decoder:
    """Reads short runs of tokens into a state that it keeps.

    Computes what the public functions compute: feeding tokens one after the other gives the outputs of the whole sequence. No gradients.

    Args:
        state: the initial state, a :class:`MemoryState`, as ``linear_memory`` or ``mlp_memory`` return it after a prompt. It is copied. It
            has momentum if the steps have one.
        chunk_size, bias, retention: of the memory.
        ln_weight, ln_bias, ln_eps: of an MLP memory, ``[H, D]``.
        channel_wise_decay: whether ``log_decay`` will be ``[N, T, H, Dv]``.
        memory: "linear" or "mlp"; by default the one that takes the arguments given.
        backend: "auto", or the name of a backend that decodes.

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
        self.settings: dict[str, Any] = dict(chunk_size=chunk_size, bias=bias, retention=retention)
        self.memory = memories.find(memory, () if ln_weight is None else ("ln_weight",))
        self.norm: dict[str, Any] = {} if ln_weight is None else dict(ln_weight=ln_weight, ln_bias=ln_bias, ln_eps=ln_eps)
        self.backend = backend
        self.buffers = Buffers.empty(state, chunk_size, retention, channel_wise_decay)
        self._steps: dict[tuple, Callable] = {}
        self._latest: Callable = _never
        self._past: Past | None = None
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
        if self._past is not None:
            self._past.record(self.buffers.tensors(), self._read, (q, k, v, lr, log_decay, delta, momentum), q.shape[1])
        return self._read(q, k, v, lr, log_decay, delta, momentum, out)

    def _read(self, q, k, v, lr, log_decay=None, delta=None, momentum=None, out=None) -> Tensor:
        result = self._latest(q, k, v, lr, log_decay, delta, momentum, out)
        return result if result is not None else self._other_step(q, k, v, lr, log_decay, delta, momentum, out)

    @torch.no_grad()
    def _other_step(self, *tokens) -> Tensor:
        """A step whose arguments differ in shape, dtype or range from those of the step before it."""
        key = tuple((x.shape, x.dtype, x.device) if isinstance(x, Tensor) else type(x) for x in tokens)
        step, tokens = self._steps.get(key), self._widened(*tokens)
        result = None if step is None else step(*tokens)
        if step is None or result is None:  # new, or out of range
            step = self._steps[key] = self._prepare(*tokens)
            result = step(*tokens)
            if result is None:
                raise RuntimeError(f"a step refused the arguments that it was prepared for: {key}")
        self._latest = step
        return result

    def _widened(self, q, k, v, *gates_and_out) -> tuple:
        """The arguments, with gates in the dtype of the arithmetic."""
        *gates, out = gates_and_out
        dtype = self.buffers.start.dtype
        wide = lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else float(x) if type(x) is int else x
        return q, k, v, *map(wide, gates), out

    def _prepare(self, q, k, v, lr, log_decay, delta, momentum, out) -> Callable:
        """Check arguments of new shapes and choose the backend for them: ``step(q, k, v, lr, log_decay, delta, momentum, out)``, which
        returns the output, or does nothing and returns None if its arguments are not like these.
        """
        channels = self.buffers.open_log_decay.dim() == 3
        if channels if log_decay is None else isinstance(log_decay, Tensor) and log_decay.dim() == (3 if channels else 4):
            wanted = "[N, T, H, Dv] (channel_wise_decay=True)" if channels else "[N, T, H]"
            raise ValueError(f"log_decay: expected {wanted}, got {None if log_decay is None else f'shape {tuple(log_decay.shape)}'}")
        call = make_call(
            self.memory, q, k, v, lr, log_decay, delta=delta, momentum=momentum, initial_state=self.state(), output_final_state=True,
            **self.settings, **self.norm,
        )  # fmt: skip
        if call.state.momentum is not None and self.buffers.momenta is None:
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
        return self.buffers.state()

    @torch.no_grad()
    def load(self, state: MemoryState) -> None:
        """Continue from another state of the same sizes; the buffers stay where they are."""
        self.buffers.load(state, self.settings["retention"])
        if self._past is not None:
            self._past = Past(self._past.size)

    @property
    def keeps(self) -> bool:
        """Whether tokens can be taken back."""
        return self._past is not None

    @torch.no_grad()
    def keep(self, tokens: int) -> None:
        """Let :meth:`crop` take back up to ``tokens`` tokens that are read from now on.

        This keeps copies of the buffers, made once in ``tokens`` tokens, and of the arguments of the steps since: two to three times the
        memory. A step then allocates those.
        """
        if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
            raise ValueError(f"tokens: expected an integer >= 1, got {tokens!r}")
        self._past = Past(tokens)

    @torch.no_grad()
    def crop(self, tokens: int) -> None:
        """Take back the last ``tokens`` tokens of every sequence: the buffers get the bits that they would have without them.

        Raises:
            TypeError, ValueError: the tokens have not been kept, see :meth:`keep`.
        """
        if self._past is None:
            check_tokens("tokens", tokens, 0, None)
        else:
            self._past.crop(self.buffers.tensors(), tokens)

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
        if self._past is not None:
            self._past.record(self.buffers.tensors(), self._decay, (log_decay,), 0)
        self._decay(log_decay)

    def _decay(self, log_decay: Tensor) -> None:
        start = self.buffers.start
        start.mul_(log_decay.to(start.dtype).exp().reshape(*start.shape[:2], 1, -1, 1))

    @torch.no_grad()
    def reorder(self, index: Tensor) -> None:
        """Sequence ``n`` continues from the state of sequence ``index[n]``, as in beam search."""
        for x in self.buffers.tensors():
            x.copy_(x.index_select(0, index))
        if self._past is not None:
            self._past.reorder(index)


def _never(*tokens) -> None:
    """In place of the latest step before the first one."""


class _Checked:
    """Steps with arguments like some, by a backend's ``run`` that does not check its arguments."""

    def __init__(self, run: Callable, buffers: Buffers, tokens: tuple):
        self.run, self.buffers, self.wanted = run, buffers, self._signature(tokens)
        full = functools.partial(torch.full, tokens[0].shape[:3], dtype=buffers.start.dtype, device=tokens[0].device)
        self.threshold = functools.lru_cache(maxsize=4)(full)  # delta as [N, T, H] if it is a number, which is usually the same

    @torch.no_grad()
    def __call__(self, *tokens) -> Tensor | None:
        if self._signature(tokens) != self.wanted:
            return None
        q, k, v, lr, log_decay, delta, momentum, out = tokens
        delta = self.threshold(delta) if isinstance(delta, float) else delta
        out = torch.empty_like(v, memory_format=torch.contiguous_format) if out is None else out
        self.run(self.buffers, q, k, v, lr, log_decay, delta, momentum, out)
        return out

    @staticmethod
    def _signature(tokens: tuple) -> tuple:
        """Shapes, devices and dtypes; the dtypes of gates may differ, since they are widened."""
        return tuple((x.shape, x.device, x.dtype if i < 3 else None) if isinstance(x, Tensor) else type(x) for i, x in enumerate(tokens))
