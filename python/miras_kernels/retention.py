"""The retention gates under their public name: :mod:`miras_kernels.tables.retention`."""

from .tables.retention import *  # noqa: F403
from .tables.retention import __all__  # noqa: F401
