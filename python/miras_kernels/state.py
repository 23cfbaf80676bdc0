"""The recurrent state of a memory (docs/mathematics.md, sections 1 and 11)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .window import Window, check_tokens

__all__ = ["MemoryState", "OpenChunk"]


@dataclasses.dataclass(frozen=True)
class OpenChunk:
    """The unfinished chunk that a sequence stopped in: its remaining tokens still take their gradients at the chunk's start.

    Attributes:
        position: int64 ``[N]``, tokens of the chunk that each sequence has read, ``0 <= position < chunk_size``.
        start: the duals at the chunk's start, shaped like ``MemoryState.dual``. Where ``position`` is 0 it is the dual itself.
        log_decay: ``[N, H]`` (or ``[N, H, Dv]`` for channel-wise decay), the sum of the chunk's log-decays so far.
    """

    position: Tensor
    start: tuple[Tensor, ...]
    log_decay: Tensor


@dataclasses.dataclass(frozen=True)
class MemoryState:
    """The recurrent state of ``N`` sequences (the batch, or the sequences packed by ``cu_seqlens``).

    A state is a value: no function writes into one, unless ``inplace_state=True`` asks for it. Its size does not depend on the number of
    tokens read.

    Attributes:
        dual: the matrices ``A`` after the last token: ``([N, H, Dv, Dk],)`` for a linear memory,
            ``([N, H, D, Hd], [N, H, Hd, D])`` for an MLP memory; float32, or float64 for float64 inputs.
        momentum: the momentum matrices ``S``, shaped like ``dual``, or None without momentum.
        open_chunk: None if every sequence ended at a chunk boundary.
        window: what it takes to take back tokens, see :meth:`keep`. Not part of :meth:`tensors`.
    """

    dual: tuple[Tensor, ...]
    momentum: tuple[Tensor, ...] | None = None
    open_chunk: OpenChunk | None = None
    window: Window | None = None

    def keep(self, tokens: int) -> MemoryState:
        """The same state, such that up to ``tokens`` tokens that are read from now on can be taken back from the states that follow.

        These hold one or two earlier states and the arguments of the calls since: two to three times a state's memory, and the inputs
        of less than ``4 * tokens`` tokens. A call of more than ``2 * tokens`` tokens is made in two parts.
        """
        if isinstance(tokens, bool) or not isinstance(tokens, int):
            raise TypeError(f"tokens: expected an integer >= 1, got {tokens!r}")
        if tokens < 1:
            raise ValueError(f"tokens: expected an integer >= 1, got {tokens}")
        return dataclasses.replace(self, window=Window(tokens))

    def crop(self, tokens: int) -> MemoryState:
        """The state before its last ``tokens`` tokens, of every sequence.

        The calls since an earlier state are made again without them: less than three times the tokens of :meth:`keep`. The result has the
        bits of a state that never read them, and can be cropped again, by what its window still holds.

        Raises:
            TypeError, ValueError: the tokens have not been kept, see :meth:`keep`.
        """
        if self.window is None:
            check_tokens("tokens", tokens, 0, None)
            return self
        return self.window.cropped(self, tokens)

    def matrices(self) -> tuple[Tensor, ...]:
        """Duals, then momentum matrices."""
        return (*self.dual, *(self.momentum or ()))

    def tensors(self) -> list[Tensor]:
        """All floating-point tensors in a fixed order: duals, momentum matrices, chunk starts, the open chunk's log-decay."""
        parts = list(self.matrices())
        if self.open_chunk is not None:
            parts += [*self.open_chunk.start, self.open_chunk.log_decay]
        return parts

    def replace_tensors(self, tensors: list[Tensor] | tuple[Tensor, ...]) -> MemoryState:
        """A state of the same structure with other ``tensors``, in the order of :meth:`tensors`."""
        m = len(self.dual)
        head, rest = tuple(tensors[:m]), list(tensors[m:])
        momentum = None
        if self.momentum is not None:
            momentum, rest = tuple(rest[:m]), rest[m:]
        open_chunk = None
        if self.open_chunk is not None:
            open_chunk = OpenChunk(self.open_chunk.position, tuple(rest[:m]), rest[m])
        return MemoryState(head, momentum, open_chunk)

    def overwritten(self, other: MemoryState) -> MemoryState:
        """This state after the values of ``other`` were written into its tensors; of an open chunk that it lacks, it has those of
        ``other``. Tensors that both share have been written already."""
        pairs = [*zip(self.matrices(), other.matrices(), strict=True)]
        open_chunk = other.open_chunk
        if self.open_chunk is not None and open_chunk is not None:
            mine = self.open_chunk
            pairs += [
                (mine.position, open_chunk.position),
                (mine.log_decay, open_chunk.log_decay),
                *zip(mine.start, open_chunk.start, strict=True),
            ]
            open_chunk = mine
        with torch.no_grad():
            for to, x in pairs:
                if to is not x:
                    to.copy_(x)
                elif not to.is_inference():
                    torch.autograd.graph.increment_version(to)
        return MemoryState(self.dual, self.momentum, open_chunk)

    def map(self, function: Callable[[Tensor], Tensor]) -> MemoryState:
        """Apply ``function`` to every tensor, integer positions included: to index the batch, move, detach ..."""
        return self._mapped(function, function)

    def detach(self) -> MemoryState:
        """The state without its gradient history, for truncated backpropagation through time."""
        return self.map(torch.Tensor.detach)

    def to(self, *args: Any, **kwargs: Any) -> MemoryState:
        """Move to a device, as :meth:`torch.Tensor.to` does; a dtype, if given, applies to the floating-point tensors only."""
        device = self.dual[0].to(*args, **kwargs).device
        how = {name: x for name, x in kwargs.items() if name in ("copy", "non_blocking")}
        return self._mapped(lambda t: t.to(*args, **kwargs), lambda position: position.to(device, **how))

    def _mapped(self, of_numbers: Callable[[Tensor], Tensor], of_positions: Callable[[Tensor], Tensor]) -> MemoryState:
        state = self.replace_tensors([of_numbers(t) for t in self.tensors()])
        if self.window is not None:
            window = self.window.map(lambda start: start._mapped(of_numbers, of_positions), of_numbers)
            state = dataclasses.replace(state, window=window)
        if state.open_chunk is None:
            return state
        position = of_positions(state.open_chunk.position)
        return dataclasses.replace(state, open_chunk=dataclasses.replace(state.open_chunk, position=position))
