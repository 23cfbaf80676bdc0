"""A memory's place in the model's own cache object."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from ..layers import BlockState

__all__ = ["MemoryCacheLayer", "memory_layer"]


class MemoryCacheLayer(CacheLayerMixin):
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
        self.length = 0

    def advance(self, state: BlockState, tokens: int) -> None:
        """Take the state after ``tokens`` more tokens."""
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

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # as older versions call it

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


def memory_layer(cache: Cache, index: int) -> MemoryCacheLayer:
    """The memory's layer of a model's cache, put there if the cache is new.

    Raises:
        TypeError, ValueError: the cache has no room for a memory (static, quantized ...), or holds keys and values at this layer.
    """
    check_cache(cache)
    while len(cache.layers) <= index:
        cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[index]
    if isinstance(layer, MemoryCacheLayer):
        return layer
    if layer.get_seq_length():
        raise ValueError(
            f"past_key_values: layer {index} of the model is a memory; expected its state or an empty cache, got keys and values of "
            f"{layer.get_seq_length()} tokens (of another model, or of prefix tuning)"
        )
    cache.layers[index] = MemoryCacheLayer()
    return cache.layers[index]


def check_cache(cache: object) -> None:
    """Refuse what is no growing cache: the layers of a static one are laid out for attention."""
    if isinstance(cache, DynamicCache):
        return
    kind = "Cache" if isinstance(cache, Cache) else "object"
    raise TypeError(
        f"past_key_values: a model with memories needs a DynamicCache (no cache_implementation), got the {kind} {type(cache).__name__}"
    )
