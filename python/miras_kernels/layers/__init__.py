"""Memories as layers: :class:`MemoryBlock` adds projections, a short convolution, token gates and an output norm."""

from .block import MemoryBlock, Projected
from .presets import PRESETS, Preset
from .state import BlockDecoder, BlockState

__all__ = ["PRESETS", "BlockDecoder", "BlockState", "MemoryBlock", "Preset", "Projected"]
