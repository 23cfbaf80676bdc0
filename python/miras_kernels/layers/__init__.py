"""The block around a memory, for use as a layer: projections, convolution, gates, read-out (SPEC section 8)."""

from .block import MemoryBlock, Projected
from .presets import PRESETS, Preset
from .state import BlockDecoder, BlockState

__all__ = ["PRESETS", "BlockDecoder", "BlockState", "MemoryBlock", "Preset", "Projected"]
