"""Process-wide options that change time or memory use, never results."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

__all__ = ["Options", "options", "override"]


@dataclasses.dataclass
class Options:
    """
    Attributes:
        checkpoint_every: the forward keeps a checkpoint, the state at a chunk's start, every so many chunks; the backward recomputes
            the chunks between two of them. 1: least arithmetic, most memory. None: about one checkpoint per 256 tokens, in the
            C++ kernels of an MLP memory per 64.
        check_values: whether values are checked as well as shapes (``log_decay <= 0``, ``delta >= 0``, ``cu_seqlens``).
            None: for CPU tensors outside torch.compile, since elsewhere a check would wait for the device.
    """

    checkpoint_every: int | None = None
    check_values: bool | None = None

    def __setattr__(self, name: str, value: object) -> None:
        if name == "checkpoint_every" and value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"checkpoint_every must be None or an integer >= 1, got {value!r}")
        if name == "check_values" and value not in (None, True, False):
            raise ValueError(f"check_values must be None, True or False, got {value!r}")
        super().__setattr__(name, value)

    def checkpoint_interval(self, chunk_size: int, tokens: int) -> int:
        """Chunks per checkpoint for this chunk size, where by default there is one per so many ``tokens``."""
        return self.checkpoint_every or max(1, tokens // chunk_size)


#: the options in force
options = Options()


@contextlib.contextmanager
def override(**changes) -> Iterator[Options]:
    """Change options within a ``with`` block: ``with miras_kernels.override(checkpoint_every=1): ...``"""
    before = {name: getattr(options, name) for name in changes}
    try:
        for name, value in changes.items():
            setattr(options, name, value)
        yield options
    finally:
        for name, value in before.items():
            setattr(options, name, value)
