"""Memories inside Hugging Face transformers. The only part of the library that imports transformers."""

from . import classes
from .attention import MemoryAttention
from .cache import MemoryCacheLayer
from .replace import Report, load, memory_config, replace_attention, report

globals().update({name: getattr(classes, name) for name in classes.NAMES})

__all__ = ["MemoryAttention", "MemoryCacheLayer", "Report", "load", "memory_config", "replace_attention", "report", *classes.NAMES]
