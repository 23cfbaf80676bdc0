"""Launch configurations: frozen, and the only home of block sizes.

Nothing is tuned at run time. A kernel's configuration follows from the head dimensions, the chunk size, the width of the
operands and the bias' shape (never from the batch or the length), so a first call compiles one variant and a longer sequence none.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

__all__ = ["CHUNK_SIZES", "DENIED", "KERNELS", "MAX_HEAD", "MIN_HEAD", "Config", "Key", "choose", "eligible", "force"]

CHUNK_SIZES = (16, 32, 64, 128)
MIN_HEAD, MAX_HEAD = 16, 256


@dataclasses.dataclass(frozen=True)
class Config:
    """Tile sizes along values and keys (0: the whole head dimension), warps, pipeline stages."""

    block_v: int
    block_k: int
    warps: int
    stages: int

    def __str__(self) -> str:
        return f"v{self.block_v}-k{self.block_k}-w{self.warps}-s{self.stages}"


@dataclasses.dataclass(frozen=True)
class Key:
    """What a configuration is chosen by."""

    key_dim: int
    value_dim: int
    chunk_size: int
    itemsize: int
    coupled: bool

    @property
    def padded_k(self) -> int:
        return padded(self.key_dim)

    @property
    def padded_v(self) -> int:
        return padded(self.value_dim)


    def blocks(self, config: Config) -> tuple[int, int]:
        """Tile sizes along values and keys: never wider than the padded head dimension."""
        return min(config.block_v or self.padded_v, self.padded_v), min(config.block_k or self.padded_k, self.padded_k)

    def streams(self, chain: str) -> bool:
        """Whether the states stay in memory: linear_stream.py."""
        if _streaming is not None:
            return _streaming
        return self.itemsize == 4 or self.key_dim > 128 or (self.coupled and self.value_dim > 64)

    @property
    def block_c(self) -> int:
        """Tokens of a chunk that the parallel kernels take at once."""
        return min(self.chunk_size, 64 if self.itemsize == 2 else 32)

    def tiles(self, kernel: str, config: Config, along: str) -> int:
        if self.coupled and kernel.endswith("_streamed"):
            return 1
        block_v, block_k = self.blocks(config)
        return -(-self.value_dim // block_v) if along == "value" else -(-self.key_dim // block_k)


def padded(d: int) -> int:
    return max(MIN_HEAD, 1 << (d - 1).bit_length())


KERNELS: dict[str, tuple[Config, ...]] = {
    "linear_decay": (Config(16, 16, 4, 2),),
    "linear_state": (Config(32, 0, 4, 2), Config(64, 0, 4, 2)),
    "linear_output": (Config(64, 64, 4, 2),),
    "linear_pre": (Config(64, 64, 4, 2),),
    "linear_seq": (Config(32, 0, 4, 2), Config(64, 0, 4, 2)),
    "linear_state_streamed": (Config(32, 32, 8, 1),),
    "linear_seq_streamed": (Config(32, 32, 8, 1),),
    "linear_decay_grad": (Config(16, 16, 4, 2),),
    "linear_epi": (Config(32, 64, 4, 2),),
}

DENIED: tuple = ()
_forced: dict[str, Config] = {}
_streaming: bool | None = None


def choose(kernel: str, key: Key) -> Config:
    return _forced.get(kernel) or KERNELS[kernel][0]


@contextlib.contextmanager
def force(kernel: str, config: Config) -> Iterator[None]:
    before = _forced.get(kernel)
    _forced[kernel] = config
    try:
        yield
    finally:
        if before is None:
            del _forced[kernel]
        else:
            _forced[kernel] = before


def eligible(kernel, key):
    return KERNELS[kernel]
