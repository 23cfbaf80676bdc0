"""Token by token: :class:`Decoder`, its buffers, and the operator that a compiled model calls."""

from .decoder import Decoder

__all__ = ["Decoder"]
