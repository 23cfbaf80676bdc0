"""The block around a memory, for use as a layer: projections, convolution, gates, read-out (SPEC section 8)."""

from .block import BlockState, MemoryBlock, Projected
from .presets import PRESETS, Preset

__all__ = ["PRESETS", "BlockState", "MemoryBlock", "Preset", "Projected"]
