"""What a block carries from one token to the next: as a value, or in buffers that stay where they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..decode.decoder import Decoder
from ..decode.stepping import step
from ..state import MemoryState, OpenChunk

if TYPE_CHECKING:
    from .block import MemoryBlock

__all__ = ["BlockDecoder", "BlockState"]


@dataclasses.dataclass(frozen=True)
class BlockState:
    """What a :class:`MemoryBlock` carries from one token to the next, for N sequences. A value: never written into.

    Attributes:
        memory: the state of the memory.
        conv: ``[N, conv_width - 1, 3 * num_heads * head_dim]``, the last inputs of the convolution.
    """

    memory: MemoryState
    conv: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> BlockState:
        """Apply ``function`` to every tensor (index the batch, move, detach ...)."""
        return BlockState(self.memory.map(function), function(self.conv))

    def detach(self) -> BlockState:
        """The same numbers without a gradient history."""
        return self.map(torch.Tensor.detach)

    def overwritten(self, rows: Tensor, other: BlockState) -> BlockState:
        """The same with the sequences ``rows`` replaced by those of ``other``."""
        write = lambda old, new: old.index_copy(0, rows, new.to(old.dtype))
        olds, news = _opened(self.memory), _opened(other.memory)
        memory = olds.replace_tensors([write(*pair) for pair in zip(olds.tensors(), news.tensors(), strict=True)])
        assert memory.open_chunk is not None and news.open_chunk is not None
        position = write(memory.open_chunk.position, news.open_chunk.position)
        memory = dataclasses.replace(memory, open_chunk=dataclasses.replace(memory.open_chunk, position=position))
        return BlockState(memory, write(self.conv, other.conv))


def _opened(state: MemoryState) -> MemoryState:
    """The same state with an open chunk, which may have consumed no token yet."""
    if state.open_chunk is not None:
        return state
    first = state.dual[0]
    position = torch.zeros(first.shape[0], dtype=torch.int64, device=first.device)
    return dataclasses.replace(state, open_chunk=OpenChunk(position, state.dual, first.new_zeros(first.shape[:2])))


class BlockDecoder:
    """A :class:`BlockState` in buffers of fixed addresses, which a :class:`MemoryBlock` reads and writes in place: for generation.

    Given to a block as ``initial_state`` it is the final state too. No matrix is written until a chunk closes, and ``torch.compile``
    traces a step into one graph. It has no gradients, and its rows no padding.

    Args:
        block: whose state it is.
        state: where to begin; it is copied.
    """

    def __init__(self, block: MemoryBlock, state: BlockState):
        row = block.preset
        self.memory = Decoder(state.memory, chunk_size=row.chunk_size, bias=row.bias, retention=row.retention,
                              memory=row.memory, backend=block.backend)  # fmt: skip
        self.decay_first = row.decay_first
        self.conv = state.conv.detach().clone(memory_format=torch.contiguous_format)

    def read(self, tokens: dict[str, Any], conv: Tensor) -> Tensor:
        """What the memory answers to ``tokens``, the arguments of a step; ``conv`` is what the convolution keeps."""
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
        """Go on from another state of the same sizes."""
        self.memory.load(state.memory)
        self.conv.copy_(state.conv.detach())

    def state(self) -> BlockState:
        """The state as a value: a copy."""
        return BlockState(self.memory.state(), self.conv.clone())

    def reorder(self, index: Tensor) -> None:
        """Sequence ``n`` goes on from where sequence ``index[n]`` stood, as beam search asks for."""
        self.memory.reorder(index)
        self.conv.copy_(self.conv.index_select(0, index))

    def tensors(self) -> list[Tensor]:
        """The buffers."""
        return [*self.memory.buffers.tensors(), self.conv]
