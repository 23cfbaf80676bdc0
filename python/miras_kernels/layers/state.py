"""The state of a block between tokens: as a value, or in buffers of fixed addresses for decoding."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from ..decode import Decoder, step
from ..state import MemoryState, OpenChunk
from .presets import Preset

__all__ = ["BlockDecoder", "BlockState"]


@dataclasses.dataclass(frozen=True)
class BlockState:
    """The state of a :class:`MemoryBlock` between tokens, for N sequences. It is never written in place.

    Attributes:
        memory: the state of the memory.
        conv: ``[N, conv_width - 1, 3 * num_heads * head_dim]``, the last inputs of the convolution.
        inputs: those and as many before them as there are tokens in the memory's window, or None.
    """

    memory: MemoryState
    conv: Tensor
    inputs: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> BlockState:
        """Apply ``function`` to every tensor (to index the batch, move, detach ...)."""
        return BlockState(self.memory.map(function), function(self.conv), None if self.inputs is None else function(self.inputs))

    def keep(self, tokens: int) -> BlockState:
        """The same state, such that up to ``tokens`` tokens can be taken back, see :meth:`MemoryState.keep`."""
        return BlockState(self.memory.keep(tokens), self.conv)

    def crop(self, tokens: int) -> BlockState:
        """The state before its last ``tokens`` tokens, see :meth:`MemoryState.crop`."""
        memory = self.memory.crop(tokens)
        if tokens == 0 or self.inputs is None:
            return BlockState(memory, self.conv, self.inputs)
        inputs = self.inputs[:, : self.inputs.shape[1] - tokens]
        return BlockState(memory, inputs[:, inputs.shape[1] - self.conv.shape[1] :], inputs)

    @staticmethod
    def after(before: BlockState | None, memory: MemoryState, conv: Tensor, inputs: Tensor) -> BlockState:
        """The state after tokens that follow the state ``before``, ``inputs [N, T, channels]`` of the convolution."""
        if before is None or memory.window is None or memory.window.count == 0:
            return BlockState(memory, conv)
        earlier = before.conv if before.inputs is None else before.inputs
        seen = torch.cat([earlier.to(conv.dtype), inputs], 1)
        return BlockState(memory, conv, seen[:, seen.shape[1] - memory.window.count - conv.shape[1] :])

    def detach(self) -> BlockState:
        """The same state without gradient history."""
        return self.map(torch.Tensor.detach)

    def overwritten(self, rows: Tensor, other: BlockState) -> BlockState:
        """The same state with the sequences ``rows`` replaced by those of ``other``."""
        write = lambda old, new: old.index_copy(0, rows, new.to(old.dtype))
        olds, news = _opened(self.memory), _opened(other.memory)
        memory = olds.replace_tensors([write(*pair) for pair in zip(olds.tensors(), news.tensors(), strict=True)])
        assert memory.open_chunk is not None and news.open_chunk is not None
        position = write(memory.open_chunk.position, news.open_chunk.position)
        memory = dataclasses.replace(memory, open_chunk=dataclasses.replace(memory.open_chunk, position=position))
        return BlockState(memory, write(self.conv, other.conv))


def _opened(state: MemoryState) -> MemoryState:
    """The same state with an open chunk, which may be empty."""
    if state.open_chunk is not None:
        return state
    first = state.dual[0]
    position = torch.zeros(first.shape[0], dtype=torch.int64, device=first.device)
    return dataclasses.replace(state, open_chunk=OpenChunk(position, state.dual, first.new_zeros(first.shape[:2])))


class _Block(Protocol):
    """The attributes of a :class:`MemoryBlock` that its decoder needs."""

    preset: Preset
    backend: str


class BlockDecoder:
    """A :class:`BlockState` in buffers of fixed addresses, which a :class:`MemoryBlock` updates in place: for generation.

    Pass it to a block as ``initial_state``; it then is the final state too. Matrices are written only when a chunk ends, and
    ``torch.compile`` traces a decoding step into one graph. No gradients, no padding.

    Args:
        block: the :class:`MemoryBlock` whose state this is.
        state: the initial state; it is copied.
    """

    def __init__(self, block: _Block, state: BlockState):
        row = block.preset
        self.memory = Decoder(state.memory, chunk_size=row.chunk_size, bias=row.bias, retention=row.retention,
                              memory=row.memory, backend=block.backend)  # fmt: skip
        self.decay_first = row.decay_first
        self.conv = state.conv.detach().clone(memory_format=torch.contiguous_format)

    def read(self, tokens: dict[str, Any], conv: Tensor) -> Tensor:
        """The memory's outputs for ``tokens``, the arguments of a decoding step; ``conv`` is the convolution's new state."""
        self.conv.copy_(conv.detach())
        if not self.decay_first:
            return step(self.memory, **tokens)
        outputs = []
        for t in range(tokens["q"].shape[1]):
            token = {name: x[:, t : t + 1] for name, x in tokens.items()}
            decay = [token.pop(name) for name in ("log_decay", "key_log_decay") if name in token]
            for log_decay in decay:
                self.memory.decay(log_decay[:, 0])
            outputs.append(step(self.memory, **token))
        return torch.cat(outputs, 1)

    def load(self, state: BlockState) -> None:
        """Continue from another state of the same shape."""
        self.memory.load(state.memory)
        self.conv.copy_(state.conv.detach())

    def state(self) -> BlockState:
        """A copy of the state."""
        return BlockState(self.memory.state(), self.conv.clone())

    def reorder(self, index: Tensor) -> None:
        """Give sequence ``n`` the state of sequence ``index[n]``, for beam search."""
        self.memory.reorder(index)
        self.conv.copy_(self.conv.index_select(0, index))

    def tensors(self) -> list[Tensor]:
        """The buffers."""
        return [*self.memory.buffers.tensors(), self.conv]
