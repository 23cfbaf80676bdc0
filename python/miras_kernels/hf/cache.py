"""The layers of a transformers cache that hold the state of memories."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, StaticCache

from ..layers import BlockDecoder, BlockState, MemoryBlock
from . import compat
from .compat import CACHE

__all__ = ["MemoryCacheLayer", "ParallelCacheLayer", "StaticMemoryCacheLayer", "check_cache", "fetch_next", "memory_layer", "refuse_state"]


class MemoryCacheLayer(compat.CacheLayerMethods, CacheLayerMixin):
    """The state of a memory, in place of an attention layer's keys and values.

    Its size does not depend on the number of tokens. It counts tokens as attention does (padding included), so that the other layers,
    positions and masks see the length they expect. The state is never written in place, so beams may share it.

    Attributes:
        state: of B sequences, None before the first token. In float32 (float64 in a float64 model).
        length: number of tokens read.
        window: how many tokens that are read from now on can be taken back; None for none.
    """

    is_sliding = False
    is_compileable = False
    supports_early_init = False
    window: int | None = None  # of layers that an earlier version has pickled

    def __init__(self):
        super().__init__()
        self.state: BlockState | None = None
        self.length: Any = 0

    @property
    def is_croppable(self) -> bool:
        return self.window is not None

    def keep(self, tokens: int) -> None:
        """Let :meth:`crop` take back up to ``tokens`` tokens that are read from now on."""
        self.window = tokens
        if self.state is not None:
            self.state = self.state.keep(tokens)

    def before(self, block: MemoryBlock, rows: int, tokens: int, padded: bool) -> BlockState | BlockDecoder | None:
        """The initial state of a block that is about to read ``tokens`` more tokens of ``rows`` sequences."""
        if self.state is None and self.window is not None:
            return block.start(rows).keep(self.window)
        return self.state

    def advance(self, block: MemoryBlock, state: BlockState, tokens: int) -> None:
        """Store the block's state after ``tokens`` more tokens."""
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
        """Number of sequences.

        Raises:
            AttributeError: before the first token, as ``hasattr`` needs it.
        """
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
        """Does nothing: a state is small."""

    prefetch = offload

    def crop(self, tokens: int) -> None:
        """Take back the last ``-tokens`` tokens, of those read since :meth:`keep` or the crop before (an argument as in transformers).

        Raises:
            ValueError: they have not been kept.
        """
        count = compat.tokens_to_remove(int(tokens), int(self.get_seq_length()))
        if self.window is None:
            if count:
                raise ValueError(
                    f"crop: a memory takes back tokens only if it has kept them; expected keep(n) of this cache layer to be called before "
                    f"they are read (generate does so where it needs to), got {tokens}"
                )
            return
        if self.state is not None:
            self.state = self.state.crop(count).keep(self.window)
            self.length = self.length - count

    def lazy_initialization(self, *args, **kwargs) -> None:
        raise NotImplementedError("a memory's cache layer has no keys and values")

    update = lazy_initialization

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        if self.state is not None:
            self.state = self.state.map(function)


_ROOM = "a static cache has buffers for a fixed number of sequences, which cannot change"


class StaticMemoryCacheLayer(MemoryCacheLayer):
    """The same for a static cache: decoding steps update the state in place, in buffers whose addresses do not change.

    So a compiled step can be used again in every call of ``generate`` with this cache. There are no gradients.

    Args:
        max_cache_len: capacity of the attention layers of the same model; a memory has no limit.

    Attributes:
        decoder: the state of B sequences, None before the first token.
        length: number of tokens read, a tensor (so that nothing is recompiled when it grows).
    """

    is_compileable = True  # but not with a window, whose states are values

    def __init__(self, max_cache_len: int):
        super().__init__()
        self.max_cache_len = max_cache_len
        self.decoder: BlockDecoder | None = None

    def keep(self, tokens: int) -> None:
        if self.is_initialized and self.decoder is not None:
            self.state = self.decoder.state()
        super().keep(tokens)

    def crop(self, tokens: int) -> None:
        length = self.length
        super().crop(tokens)
        if self.window is not None and self.state is not None and self.decoder is not None:
            self.decoder.load(self.state)
            self.length = length.copy_(self.length)

    def before(self, block: MemoryBlock, rows: int, tokens: int, padded: bool) -> BlockState | BlockDecoder | None:
        if self.window is not None:
            return super().before(block, rows, tokens, padded)
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
        self.state = state if self.window is not None and isinstance(state, BlockState) else None

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return 0 if self.decoder is None else sum(x.nbytes for x in self.decoder.tensors())

    @property
    def batch_size(self) -> int:
        """Number of sequences.

        Raises:
            AttributeError: before the first token, as ``hasattr`` needs it.
        """
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
        """Start again with no token read; the buffers keep their addresses."""
        self.is_initialized, self.state = False, None
        if self.decoder is not None:
            self.length.zero_()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.is_initialized and self.decoder is not None:
            self.decoder.reorder(beam_idx.to(self.decoder.conv.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        raise NotImplementedError(_ROOM)

    def batch_select_indices(self, indices: Tensor) -> None:
        raise NotImplementedError(_ROOM)


def _from_attention(name: str) -> Callable:
    """A method that calls the attention layer's."""
    return lambda self, *args, **kwargs: getattr(self.attention, name)(*args, **kwargs)


def _both(name: str) -> Callable:
    """A method that calls those of both layers."""

    def method(self, *args, **kwargs) -> None:
        getattr(self.memory, name)(*args, **kwargs)
        getattr(self.attention, name)(*args, **kwargs)

    return method


class ParallelCacheLayer(compat.CacheLayerMethods, CacheLayerMixin):
    """The keys and values of an attention layer, and the state of the memory beside it.

    Queries are answered by the attention layer's part; operations apply to both.
    """

    is_sliding = property(lambda self: self.attention.is_sliding)
    is_compileable = property(lambda self: self.attention.is_compileable)
    is_croppable = property(lambda self: self.attention.is_croppable and self.memory.is_croppable)

    def __init__(self, attention: CacheLayerMixin, memory: MemoryCacheLayer):
        self.attention, self.memory = attention, memory

    def __getattr__(self, name: str):
        if name == "attention":  # not set yet, while this object is being copied
            raise AttributeError(name)
        return getattr(self.attention, name)

    update, lazy_initialization = _from_attention("update"), _from_attention("lazy_initialization")
    get_seq_length, get_mask_sizes = _from_attention("get_seq_length"), _from_attention("get_mask_sizes")
    get_max_length = _from_attention(compat.MAX_LENGTH)
    reset, reorder_cache, offload, prefetch = _both("reset"), _both("reorder_cache"), _both("offload"), _both("prefetch")
    batch_repeat_interleave, batch_select_indices = _both("batch_repeat_interleave"), _both("batch_select_indices")
    crop = _both("crop")


def memory_layer(cache: Cache, index: int, beside_attention: bool = False) -> MemoryCacheLayer:
    """The memory's layer of a model's cache; created in a new cache, in place of the attention layer's or beside it.

    Raises:
        TypeError, ValueError: the cache cannot hold memories (quantized ...), or has keys and values at this layer.
    """
    check_cache(cache)
    while len(cache.layers) <= index:
        cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[index]
    if isinstance(layer, ParallelCacheLayer if beside_attention else MemoryCacheLayer):
        return layer.memory if beside_attention else layer
    if layer.get_seq_length():
        raise ValueError(
            f"{CACHE}: layer {index} of the model is a memory; expected its state or an empty cache, got keys and values for "
            f"{layer.get_seq_length()} tokens (of another model, or of prefix tuning)"
        )
    static = isinstance(cache, StaticCache)
    # The capacity of a single layer may be that of a sliding window.
    memory = StaticMemoryCacheLayer(max(x.max_cache_len for x in cache.layers)) if static else MemoryCacheLayer()
    cache.layers[index] = ParallelCacheLayer(layer, memory) if beside_attention else memory
    return memory


def fetch_next(cache: Cache, index: int) -> None:
    """In a cache that keeps keys and values on the CPU, bring the next attention layer's back, as attention layers do themselves."""
    if getattr(cache, "offloading", False) and cache.prefetch_stream.device.type == "cuda":
        stream = cache.prefetch_stream
        stream.wait_stream(torch.cuda.default_stream(stream.device))
        cache.prefetch(index + 1, cache.only_non_sliding)


def check_cache(cache: object) -> None:
    """Refuse caches that cannot hold memories (quantized ones, for example), and a static cache with gradients enabled.

    A static cache has no gradients, since decoding steps write in place.
    """
    if isinstance(cache, StaticCache):
        if torch.is_grad_enabled():
            raise ValueError(
                f"{CACHE}: a StaticCache of a model with memories has no gradients; expected torch.no_grad() or a DynamicCache"
            )
        return
    if isinstance(cache, DynamicCache):
        return
    raise TypeError(f"{CACHE}: a model with memories needs a DynamicCache or a StaticCache{_INSTEAD}{_kind(cache)}")


def refuse_state(kwargs: dict) -> None:
    """Refuse a state in a keyword argument that is not read: generation would silently continue without it."""
    for name, value in kwargs.items():
        if name != CACHE and value is not None and (name in compat.ALIASES or _holds_state(value)):
            raise TypeError(f"{name}: expected None, a model with memories reads the argument {CACHE}{_INSTEAD}{_kind(value)}")


_INSTEAD = ", and has no continuous batching; got the "


def _holds_state(value: object) -> bool:
    if isinstance(value, (dict, list, tuple)):
        return any(map(_holds_state, value.values() if isinstance(value, dict) else value))
    return isinstance(value, (BlockState, BlockDecoder)) or hasattr(type(value), "get_seq_length")  # a cache, or a layer of one


def _kind(cache: object) -> str:
    return f"{'Cache' if isinstance(cache, Cache) else 'object'} {type(cache).__name__}"
