"""The definition of what every kernel computes, in PyTorch alone.

``definition``: token by token, the inner gradient taken by autograd from the written loss: the truth.
``chunkwise``: the matrix form, fast enough to train with, differentiable everywhere; ``derived``: its hand-derived backward.
"""

from . import chunkwise, definition, derived

__all__ = ["chunkwise", "definition", "derived"]
