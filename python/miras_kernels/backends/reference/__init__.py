"""What every kernel computes, in PyTorch alone.

``definition``: token by token, with the inner gradient taken by autograd from the loss. ``chunkwise``: the matrix form, fast enough to
train with, differentiated by autograd. ``derived``: a matrix form with its backward derived by hand. ``step``: decoding.
"""

from . import chunkwise, definition, derived

__all__ = ["chunkwise", "definition", "derived"]
