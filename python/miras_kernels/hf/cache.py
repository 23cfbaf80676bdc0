"""A memory's place in the model's own cache object."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, StaticCache

from ..layers import BlockDecoder, BlockState, MemoryBlock
from . import compat
from .compat import CACHE

__all__ = ["MemoryCacheLayer", "ParallelCacheLayer", "StaticMemoryCacheLayer", "check_cache", "memory_layer", "refuse_state"]


class MemoryCacheLayer(compat.CacheLayerMethods, CacheLayerMixin):
    """What a memory carries from token to token, in the place of an attention layer's keys and values.

    Its size does not depend on how much has been read. It counts tokens as attention does (padding included), so that
    the layers around it, positions and masks see the length they expect. A state is a value: beams that share a past share it,
    and a kept :class:`~miras_kernels.layers.BlockState` never changes.

    Attributes:
        state: of B sequences, None before the first token. Its memory is in float32 (float64 in a float64 model).
        length: tokens read.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(self):
        super().__init__()
        self.state: BlockState | None = None
        self.length: Any = 0

    def before(self, tokens: int, padded: bool) -> BlockState | BlockDecoder | None:
        """What a block begins with that is to read ``tokens`` more."""
        return self.state

    def advance(self, block: MemoryBlock, state: BlockState, tokens: int) -> None:
        """Take the block's state after ``tokens`` more tokens."""
        self.state, self.length, self.is_initialized = state, self.length + tokens, True

    @property
    def nbytes(self) -> int:
        """Bytes of the state."""
        total = 0

        def count(x: Tensor) -> Tensor:
            nonlocal total
            total += x.nbytes
            return x

        self._map(count)
        return total

    @property
    def batch_size(self) -> int:
        """Sequences; there is no such attribute before the first token."""
        if self.state is None:
            raise AttributeError("batch_size: nothing has been read yet")
        return self.state.conv.shape[0]

    def get_seq_length(self) -> int | Tensor:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.state, self.length, self.is_initialized = None, 0, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda x: x[indices.to(x.device)])

    def offload(self) -> None:
        """A state stays where it is: it is small."""

    prefetch = offload

    def crop(self, *args, **kwargs) -> None:
        """Refused: what a memory has read it cannot forget."""
        raise NotImplementedError("crop: a memory cannot take tokens back (assisted generation needs that), got a cache with memories")

    def lazy_initialization(self, *args, **kwargs) -> None:
        raise NotImplementedError("a memory's cache layer holds no keys and values")

    update = lazy_initialization

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        if self.state is not None:
            self.state = self.state.map(function)


_ROOM = "a static cache has room for the sequences that it was begun with, no more and no fewer"


class StaticMemoryCacheLayer(MemoryCacheLayer):
    """The same in a static cache: single tokens are read in place, and what holds the state stays where it is.

    So a compiled step finds it at the same addresses, in every call of ``generate`` that uses the cache again. There are no gradients.

    Args:
        max_cache_len: tokens that the attention layers around it have room for; a memory has no bound.

    Attributes:
        decoder: the state of B sequences, None before the first token.
        length: tokens read, a tensor (so that nothing is compiled anew when it grows).
    """

    is_compileable = True

    def __init__(self, max_cache_len: int):
        super().__init__()
        self.max_cache_len = max_cache_len
        self.decoder: BlockDecoder | None = None

    def before(self, tokens: int, padded: bool) -> BlockState | BlockDecoder | None:
        if self.decoder is None or not self.is_initialized:
            return None
        return self.decoder if tokens == 1 and not padded else self.decoder.state()

    def advance(self, block: MemoryBlock, state: BlockState | BlockDecoder, tokens: int) -> None:
        if isinstance(state, BlockState) and self.decoder is not None:
            self.decoder.load(state)
        elif isinstance(state, BlockState):
            self.decoder, self.length = BlockDecoder(block, state), torch.zeros((), dtype=torch.int64, device=state.conv.device)
            if not torch.compiler.is_compiling():
                for x in (*self.decoder.tensors(), self.length):
                    torch._dynamo.mark_static_address(x)
        self.length.add_(tokens)
        self.is_initialized = True

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return 0 if self.decoder is None else sum(x.nbytes for x in self.decoder.tensors())

    @property
    def batch_size(self) -> int:
        """Sequences; there is no such attribute before the first token."""
        if self.decoder is None:
            raise AttributeError("batch_size: nothing has been read yet")
        return self.decoder.conv.shape[0]

    def get_seq_length(self) -> Tensor | int:
        return self.length if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.max_cache_len, 0

    def get_max_length(self) -> int:
        return self.max_cache_len

    def reset(self) -> None:
        """Nothing has been read; the buffers stay where they are."""
        self.is_initialized = False
        if self.decoder is not None:
            self.length.zero_()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.is_initialized and self.decoder is not None:
            self.decoder.reorder(beam_idx.to(self.decoder.conv.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        raise NotImplementedError(_ROOM)

    def batch_select_indices(self, indices: Tensor) -> None:
        raise NotImplementedError(_ROOM)


def _answered(name: str) -> Callable:
    """A method that the layer of attention answers."""
    return lambda self, *args, **kwargs: getattr(self.attention, name)(*args, **kwargs)


def _done(name: str) -> Callable:
    """A method that both layers follow."""

    def method(self, *args, **kwargs) -> None:
        getattr(self.memory, name)(*args, **kwargs)
        getattr(self.attention, name)(*args, **kwargs)

    return method


class ParallelCacheLayer(compat.CacheLayerMethods, CacheLayerMixin):
    """The keys and values of an attention layer, and the state of the memory beside it.

    What a cache asks of its layers the one of attention answers; what it does to them is done to both.
    """

    is_croppable = False
    is_sliding = property(lambda self: self.attention.is_sliding)
    is_compileable = property(lambda self: self.attention.is_compileable)

    def __init__(self, attention: CacheLayerMixin, memory: MemoryCacheLayer):
        self.attention, self.memory = attention, memory

    def __getattr__(self, name: str):
        if name == "attention":  # while it is copied
            raise AttributeError(name)
        return getattr(self.attention, name)

    update, lazy_initialization = _answered("update"), _answered("lazy_initialization")
    get_seq_length, get_mask_sizes = _answered("get_seq_length"), _answered("get_mask_sizes")
    get_max_length = _answered(compat.MAX_LENGTH)
    reset, reorder_cache, offload, prefetch = _done("reset"), _done("reorder_cache"), _done("offload"), _done("prefetch")
    batch_repeat_interleave, batch_select_indices = _done("batch_repeat_interleave"), _done("batch_select_indices")
    crop = MemoryCacheLayer.crop


def memory_layer(cache: Cache, index: int, beside_attention: bool = False) -> MemoryCacheLayer:
    """The memory's layer of a model's cache, put there if the cache is new, in the place of that of attention or beside it.

    Raises:
        TypeError, ValueError: the cache has no room for a memory (quantized ...), or holds keys and values at this layer.
    """
    check_cache(cache)
    while len(cache.layers) <= index:
        cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[index]
    if isinstance(layer, ParallelCacheLayer if beside_attention else MemoryCacheLayer):
        return layer.memory if beside_attention else layer
    if layer.get_seq_length():
        raise ValueError(
            f"{CACHE}: layer {index} of the model is a memory; expected its state or an empty cache, got keys and values of "
            f"{layer.get_seq_length()} tokens (of another model, or of prefix tuning)"
        )
    static = isinstance(cache, StaticCache)
    # What one layer has room for may be a window only.
    memory = StaticMemoryCacheLayer(max(x.max_cache_len for x in cache.layers)) if static else MemoryCacheLayer()
    cache.layers[index] = ParallelCacheLayer(layer, memory) if beside_attention else memory
    return memory


def check_cache(cache: object) -> None:
    """Refuse what holds anything but layers of its own for every decoder layer, quantized keys and values, say.

    A static cache carries no gradients: a step is read in place.
    """
    if isinstance(cache, StaticCache):
        if torch.is_grad_enabled():
            raise ValueError(
                f"{CACHE}: a StaticCache of a model with memories carries no gradients; expected torch.no_grad() or a DynamicCache"
            )
        return
    if isinstance(cache, DynamicCache):
        return
    raise TypeError(f"{CACHE}: a model with memories needs a DynamicCache or a StaticCache{_INSTEAD}{_kind(cache)}")


def refuse_state(kwargs: dict) -> None:
    """Refuse a state among keyword arguments that nobody reads: the text would go on without it."""
    for name, value in kwargs.items():
        if name != CACHE and value is not None and (name in compat.ALIASES or _holds_state(value)):
            raise TypeError(f"{name}: expected None, a model with memories reads the argument {CACHE}{_INSTEAD}{_kind(value)}")


_INSTEAD = ", and does no continuous batching; got the "


def _holds_state(value: object) -> bool:
    if isinstance(value, (dict, list, tuple)):
        return any(map(_holds_state, value.values() if isinstance(value, dict) else value))
    return isinstance(value, (BlockState, BlockDecoder)) or hasattr(type(value), "get_seq_length")  # a cache, or a layer of one


def _kind(cache: object) -> str:
    return f"{'Cache' if isinstance(cache, Cache) else 'object'} {type(cache).__name__}"
