"""Decoding, token by token: :class:`Decoder`, its buffers, and the operator that a compiled model calls.

``read`` is for short calls of the public functions, ``step`` for a decoder under ``torch.compile``. Backends provide the steps
(:func:`miras_kernels.dispatch.stepper`). ``repeat`` makes calls of a public function like an earlier one at little cost.
"""

from .decoder import Decoder, read
from .earlier import remember, repeat
from .operator import step

__all__ = ["Decoder", "read", "remember", "repeat", "step"]
