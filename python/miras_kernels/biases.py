"""The attentional biases under their public name: :mod:`miras_kernels.tables.biases`."""

from .tables.biases import *  # noqa: F403
from .tables.biases import __all__  # noqa: F401
