"""Memories inside Hugging Face transformers. The only part of the library that imports transformers."""

from .replace import MemoryAttention, replace_attention

__all__ = ["MemoryAttention", "replace_attention"]
