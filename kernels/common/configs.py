"""Launch configurations. Block sizes, warps and pipeline stages are set here and nowhere else.

Nothing is tuned at run time. A configuration follows from the head dimensions, the chunk size, the operands' width and the kind of bias
and gate (:class:`Key`), never from batch or length, so a longer sequence compiles nothing new. `RULES` lists the configurations of each
kernel and the keys they serve; the first that serves the key and is not in `DENIED` is taken. Registers and spills of each configuration
on each chip are in offline/resources.json, which tests/triton/test_compile.py checks and offline/resources.py writes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

from ...backends import may_end_open
from ...backends.reference.blocks import block_tokens as exact_tokens

__all__ = [
    "CHUNK_SIZES", "DENIED", "KERNELS", "RULES", "STEPS", "STEP_ROWS",
    "Config", "Denial", "Key", "block_tokens", "choose", "eligible", "force", "forced", "fuse", "stream",
]  # fmt: skip

#: sizes that a chunk is padded to; a linear memory takes any chunk size up to the largest
CHUNK_SIZES = (16, 32, 64, 128)
#: tokens of a block with decays by key channel, whose pairs of tokens are taken token by token
KEYED_TOKENS = 16
#: narrower heads are padded to this; tables/memories.py has the limits of each memory
MIN_TILE = 16


class Config(NamedTuple):
    """Tile sizes along values and keys (0: all of them), warps, pipeline stages.

    ``registers`` bounds the registers of a thread; with 0 the compiler may spill some bytes to fit a second program on the same
    multiprocessor.
    """

    block_v: int
    block_k: int
    warps: int
    stages: int
    registers: int = 0

    def __str__(self) -> str:
        return f"v{self.block_v}-k{self.block_k}-w{self.warps}-s{self.stages}" + (f"-r{self.registers}" if self.registers else "")


@dataclasses.dataclass(frozen=True)
class Key:
    """What a configuration is chosen by."""

    key_dim: int
    value_dim: int
    chunk_size: int  # padded
    itemsize: int  # bytes of an operand
    coupled: bool  # the bias couples a row of the error
    hidden: int = 0  # units of an MLP memory
    gated: bool = False  # the retention gate has a primal of its own
    matrix_coupled: bool = False  # it couples the whole matrix
    momentum: bool = False
    channels: bool = False  # log-decays differ by value channel
    exact: bool = False  # exact steps: a block of tokens takes the place of a chunk
    keyed: bool = False  # log-decays differ by key channel

    @staticmethod
    def of(call) -> Key:
        bias, retention, block = call.bias, call.retention, block_tokens(call)
        return Key(
            call.q.shape[-1], call.v.shape[-1], padded(block or call.chunk_size), call.q.element_size(), bias.row_coupled,
            call.hidden, exact=block > 0, keyed=call.key_log_decay is not None,
            gated=not retention.is_identity, matrix_coupled=retention.matrix_coupled, momentum=call.momentum is not None,
            channels=call.log_decay is not None and call.log_decay.dim() == 4,
        )  # fmt: skip

    @property
    def padded_k(self) -> int:
        return padded(self.key_dim)

    @property
    def padded_v(self) -> int:
        return padded(self.value_dim)

    @property
    def entire(self) -> bool:
        """Whether one program must hold all values of a head: the bias couples a row of the error, or the gate the matrix."""
        return self.coupled or self.matrix_coupled

    @property
    def block_c(self) -> int:
        """Tokens of a chunk in one block of the parallel kernels."""
        return min(self.chunk_size, 64 if self.itemsize == 2 else 32)

    def streams(self, chain: str) -> bool:
        """Whether ``"linear_chain_fwd"`` or ``"linear_chain_bwd"`` keeps its states in memory (chain_streamed.py), not in registers."""
        if self.gated or self.momentum or self.channels:  # more than one matrix, or several passes over it
            return True
        if _streaming is not None:
            return _streaming
        widest = {"linear_chain_fwd": 64, "linear_chain_bwd": 32}[chain]  # values of a row that a coupling bias can hold
        tall = chain == "linear_chain_bwd" and self.chunk_size == 128 and self.key_dim > 64
        return self.itemsize == 4 or self.key_dim > 128 or tall or (self.coupled and self.value_dim > widest)

    @property
    def fusable(self) -> bool:
        """Whether the forward's chain can compute the output too (linear/fused.py): its program has registers for both."""
        if self.gated or self.momentum or self.channels or self.keyed or self.coupled or self.padded_k > (64 if self.exact else 128):
            return False
        return self.chunk_size in (16, 64) or (self.chunk_size == 32 and self.padded_k <= 64)

    def fuses(self, heads: int, multiprocessors: int, architecture: str) -> bool:
        """Whether it does, for ``heads`` sequences x heads on a chip of so many multiprocessors.

        That moves less than half as many bytes, but the output is no longer parallel over chunks. So the programs, of 32 values each,
        must occupy 7 of 8 multiprocessors. This was modelled for sm_90 (bench/gpu/counts.py), not measured; other chips have not been
        modelled. Masks of keys and values would take registers.
        """
        if _fusing is not None or not self.fusable:
            return bool(_fusing) and self.fusable
        padding = (self.key_dim, self.value_dim) != (self.padded_k, self.padded_v)
        programs = heads * -(-self.value_dim // 32)
        return architecture.startswith("sm_9") and self.itemsize == 2 and not padding and 7 * multiprocessors <= 8 * programs

    def blocks(self, config: Config) -> tuple[int, int]:
        """Tile sizes along values and keys, at most the padded head dimension."""
        return min(config.block_v or self.padded_v, self.padded_v), min(config.block_k or self.padded_k, self.padded_k)

    @property
    def part(self) -> int:
        """Hidden units of an MLP in one program of a decoding step: a tile of 4096 entries of each matrix."""
        return min(max(MIN_TILE, 4096 // self.padded_v), padded(self.hidden))

    def block_hidden(self, config: Config) -> int:
        """Hidden units of an MLP in one block."""
        return min(config.block_k, padded(self.hidden))

    def tiles(self, kernel: str, config: Config, along: str) -> int:
        """Number of programs among which the values or the keys of a head are divided."""
        if along in ("hidden", "head") or (self.entire and kernel.endswith("_streamed")):
            return 1
        block_v, block_k = self.blocks(config)
        return -(-self.value_dim // block_v) if along == "value" else -(-self.key_dim // block_k)


def block_tokens(call) -> int:
    """How many tokens are computed together in exact steps (docs/mathematics.md, section 13), or 0 where a call goes chunk by chunk.

    Chunks that a call begins or ends in the middle of stay chunks, unless they have one token.
    """
    if call.chunk_size > 1 and (may_end_open(call) or call.state.open_chunk is not None):
        return 0
    most = 64 if call.q.element_size() == 2 else 32
    return exact_tokens(call, most if call.key_log_decay is None else KEYED_TOKENS)


def padded(d: int) -> int:
    """The power of two that a head dimension or a chunk is padded to."""
    return max(MIN_TILE, 1 << (d - 1).bit_length())


def _always(key: Key) -> bool:
    return True


def _wide(key: Key) -> bool:
    return key.itemsize == 4


def _wide_pair(key: Key) -> bool:
    """A chain of two matrices, multiplied without tensor cores."""
    return key.itemsize == 4 and key.momentum


def _several(key: Key) -> bool:
    """Two matrices or weights per channel."""
    return key.momentum or key.channels


def _busy(key: Key) -> bool:
    """A chain of two matrices with weights per channel."""
    return key.itemsize == 2 and key.momentum and key.channels


def _tall(key: Key) -> bool:
    """Two matrices or weights per channel in long chunks, or both at once."""
    return _busy(key) or (key.itemsize == 2 and key.chunk_size == 128 and (key.momentum or key.channels))


#: (configuration, whether it serves a key), the preferred one first; at most 8 per kernel
RULES: dict[str, tuple[tuple[Config, Callable[[Key], bool]], ...]] = {
    "linear_decay": ((Config(16, 16, 4, 1), _always),),
    "block_solve": ((Config(64, 64, 4, 1, 128), _always),),
    "block_reads": ((Config(64, 64, 4, 1), lambda key: key.itemsize == 2), (Config(32, 32, 4, 1), _wide)),
    "block_errors_bwd": ((Config(32, 64, 4, 1, 168), lambda key: key.itemsize == 2), (Config(32, 32, 4, 1, 255), _wide)),
    "keyed_system": ((Config(64, 64, 4, 1, 128), _always),),
    "keyed_keys_bwd": ((Config(32, 32, 4, 1), _always),),
    "linear_chain_fwd": (
        (Config(32, 0, 4, 2, 255), lambda key: not key.coupled and key.chunk_size <= 64),
        (Config(32, 0, 8, 2, 255), lambda key: not key.coupled and key.chunk_size == 128),
        (Config(64, 0, 4, 2, 255), lambda key: not key.coupled and key.chunk_size == 64 and key.padded_k == 64),
        (Config(0, 0, 4, 2, 255), lambda key: key.coupled and key.chunk_size <= 32),
        (Config(0, 0, 8, 2, 255), lambda key: key.coupled and key.chunk_size >= 64),
    ),
    "linear_chain_fwd_fused": (
        (Config(32, 0, 4, 3, 255), lambda key: key.fusable and key.padded_k <= 64 and not key.exact),
        (Config(32, 0, 4, 2, 255), lambda key: key.fusable),
        (Config(16, 0, 4, 2, 255), lambda key: key.fusable),
    ),
    "linear_chain_fwd_streamed": (
        (Config(32, 64, 8, 1, 255), lambda key: not key.coupled and key.itemsize == 2 and not _busy(key)),
        (Config(32, 32, 8, 1, 255), lambda key: (key.coupled or key.itemsize == 4 or _busy(key)) and not _wide_pair(key)),
        (Config(16, 16, 8, 1, 255), _wide_pair),
    ),
    "linear_output": (
        (Config(64, 64, 4, 2), lambda key: key.itemsize == 2 and not key.coupled and key.chunk_size == 64),
        (Config(128, 64, 8, 2), lambda key: key.itemsize == 2 and not key.coupled and key.chunk_size == 64),
        (Config(32, 64, 4, 2, 255), lambda key: key.itemsize == 2 and (key.coupled or key.chunk_size == 128) and key.chunk_size >= 64),
        (Config(32, 64, 8, 2, 255), lambda key: key.itemsize == 2 and (key.coupled or key.chunk_size == 128) and key.chunk_size >= 64),
        (Config(64, 64, 4, 2, 128), lambda key: key.itemsize == 2 and key.chunk_size <= 32),
        (Config(32, 32, 4, 1, 255), _wide),
    ),
    "linear_du_bwd": (
        (Config(0, 0, 4, 1), lambda key: key.itemsize == 2 and key.chunk_size <= 64 and max(key.key_dim, key.value_dim) <= 128),
        (Config(32, 64, 4, 1, 255), lambda key: key.itemsize == 2 and key.chunk_size <= 64),
        (Config(32, 32, 8, 1, 255), lambda key: key.itemsize == 2),
        (Config(32, 32, 4, 1, 255), _wide),
    ),
    "linear_chain_bwd": (
        (Config(32, 0, 4, 2, 255), lambda key: not key.coupled and key.chunk_size <= 64 and key.padded_k <= 64),
        (Config(32, 0, 4, 2), lambda key: not key.coupled and key.chunk_size <= 64 and key.padded_k > 64),
        (Config(32, 0, 8, 2, 255), lambda key: not key.coupled and key.chunk_size <= 64 and not key.exact),
        (Config(16, 0, 8, 2, 255), lambda key: not key.coupled and (key.chunk_size == 128 or key.exact)),  # W too
        (Config(0, 0, 4, 2, 255), lambda key: key.coupled and key.chunk_size <= 32),
        (Config(0, 0, 8, 2, 255), lambda key: key.coupled and key.chunk_size >= 64),
    ),
    "linear_chain_bwd_streamed": (
        (Config(32, 64, 8, 1, 255), lambda key: not key.coupled and key.itemsize == 2 and key.chunk_size <= 64 and not _tall(key)),
        (
            Config(32, 32, 8, 1, 255),
            lambda key: (key.coupled or key.itemsize == 4 or key.chunk_size == 128) and not _tall(key) and not _wide_pair(key),
        ),
        (Config(16, 32, 8, 1, 255), _tall),
        (Config(16, 16, 8, 1, 255), _wide_pair),
    ),
    "linear_dqk_bwd": (
        (Config(32, 64, 4, 3), lambda key: key.itemsize == 2 and key.chunk_size <= 64 and not key.coupled and not _several(key)),
        (Config(32, 64, 4, 3, 255), lambda key: key.itemsize == 2 and not key.channels),
        (Config(32, 64, 8, 1, 255), lambda key: key.itemsize == 2),
        (Config(32, 32, 8, 1, 255), lambda key: key.itemsize == 4 and not key.momentum),
        (Config(16, 32, 8, 1, 255), _wide_pair),
    ),
    "linear_decay_bwd": ((Config(16, 16, 4, 1, 255), _always),),
    "momentum_weights": ((Config(16, 16, 4, 1), _always),),
    "momentum_weights_bwd": ((Config(16, 16, 4, 1), _always),),
    "channel_decay": ((Config(32, 32, 4, 1), _always),),
    "channel_momentum": ((Config(32, 32, 1, 1), _always),),
    "channel_scores": ((Config(64, 64, 4, 2), lambda key: key.itemsize == 2), (Config(32, 32, 4, 1, 255), _wide)),
    "channel_output": (
        (Config(32, 32, 4, 1, 255), lambda key: key.chunk_size <= 64),
        (Config(16, 16, 8, 1, 255), lambda key: key.chunk_size == 128),
    ),
    "channel_du_bwd": ((Config(32, 32, 4, 1, 255), _always),),
    "channel_decay_bwd": (
        (Config(32, 32, 4, 1, 255), lambda key: key.chunk_size <= 64 and not key.momentum),
        (Config(16, 16, 8, 1, 255), lambda key: key.chunk_size == 128 or key.momentum),
    ),
    "mlp_chain_fwd": (
        (Config(0, 16, 4, 1, 255), lambda key: key.chunk_size == 16),
        (Config(0, 16, 8, 1, 255), lambda key: key.chunk_size > 16),
    ),
    "mlp_read_bwd": ((Config(0, 32, 8, 1, 255), lambda key: key.itemsize == 2 and key.padded_v <= 64), (Config(0, 16, 8, 1, 255), _always)),
    "mlp_dq_bwd": ((Config(0, 32, 8, 1, 255), lambda key: key.itemsize == 2 and key.padded_v <= 64), (Config(0, 16, 8, 1, 255), _always)),
    "mlp_chain_bwd": ((Config(0, 16, 8, 1, 255), _always),),
    "linear_step_predict": ((Config(32, 0, 4, 1), lambda key: key.padded_k <= 128), (Config(32, 0, 8, 1), lambda key: key.padded_k > 128)),
    "linear_step_write": (
        (Config(32, 0, 8, 1, 255), lambda key: key.padded_k <= 128),
        (Config(16, 0, 8, 1, 255), lambda key: key.padded_k > 128),
    ),
    "mlp_step_predict": ((Config(0, 0, 8, 1), _always),),
    "mlp_step_write": ((Config(0, 0, 8, 1, 255), _always),),
    "mlp_step_finish": ((Config(0, 0, 8, 1, 255), _always),),
}
#: the kernels of decoding steps
STEPS = ("linear_step_predict", "linear_step_write", "mlp_step_predict", "mlp_step_write", "mlp_step_finish")
#: rows of a chunk's factors that they read at once
STEP_ROWS = 16

#: every configuration of every kernel
KERNELS: dict[str, tuple[Config, ...]] = {kernel: tuple(config for config, _ in rules) for kernel, rules in RULES.items()}


class Denial(NamedTuple):
    """A configuration that a toolchain miscompiles or a chip cannot hold. Architecture and versions match as prefixes; "" matches all."""

    architecture: str  # "sm_90", or "sm_8" for all of its kind
    triton: str
    ptxas: str
    kernel: str
    config: str  # as str(config) prints it
    reason: str


#: found by `python -m bench.gpu correctness` or by offline/resources.py
DENIED: tuple[Denial, ...] = (
    Denial("sm_8", "", "", "linear_output", "v32-k64-w4-s2-r255", "spills 8 bytes"),
    Denial("sm_8", "", "", "linear_du_bwd", "v0-k0-w4-s1", "spills up to 112 bytes"),
    Denial("sm_8", "", "", "linear_du_bwd", "v32-k64-w4-s1-r255", "spills 8 bytes"),
    Denial("sm_8", "", "", "linear_dqk_bwd", "v32-k64-w4-s3", "spills up to 24 bytes"),
    Denial("sm_8", "", "", "linear_dqk_bwd", "v32-k64-w4-s3-r255", "spills up to 80 bytes"),
    Denial("sm_8", "", "", "mlp_dq_bwd", "v0-k32-w8-s1-r255", "spills up to 1312 bytes, the narrower one almost none"),
    Denial("gfx942", "", "", "linear_chain_fwd_fused", "v32-k0-w4-s2-r255", "spills 92 registers with 128 keys"),
    Denial("sm_8", "", "", "linear_chain_fwd_fused", "v32-k0-w4-s2-r255", "spills 64 bytes with a final state"),
    Denial("sm_10", "", "", "linear_chain_fwd_fused", "v32-k0-w4-s2-r255", "spills 32 bytes with Lp"),
    Denial("sm_8", "", "", "linear_chain_bwd", "v32-k0-w4-s2", "spills 128 bytes"),
    Denial("sm_10", "", "", "linear_chain_bwd", "v32-k0-w4-s2", "spills up to 32 bytes"),
    Denial("sm_10", "", "", "linear_chain_bwd", "v32-k0-w4-s2-r255", "spills 72 bytes with a delta per channel"),
)

_forced: dict[str, Config] = {}
_streaming: bool | None = None
_fusing: bool | None = None


def eligible(kernel: str, key: Key) -> tuple[Config, ...]:
    """The configurations that serve a key, the preferred one first."""
    return tuple(config for config, serves in RULES[kernel] if serves(key))


def choose(kernel: str, key: Key, architecture: str = "") -> Config:
    """The configuration of a launch.

    Raises:
        ValueError: no configuration serves the key, or a forced one does not.
    """
    fitting = eligible(kernel, key)
    if kernel in _forced:
        if _forced[kernel] not in fitting:
            possible = ", ".join(map(str, fitting))
            raise ValueError(f"{kernel}: configuration {_forced[kernel]} does not serve {key}; those that do: {possible}")
        return _forced[kernel]
    allowed = [config for config in fitting if denial(architecture, kernel, config) is None]
    if not allowed:
        reasons = "; ".join(f"{config}: {denial(architecture, kernel, config).reason}" for config in fitting)
        raise ValueError(f"{kernel}: no configuration for {key} on {architecture}: {reasons or 'none serves it'}")
    return allowed[0]


def denial(architecture: str, kernel: str, config: Config) -> Denial | None:
    """The row of `DENIED` that forbids a configuration on this toolchain, or None."""
    for row in DENIED:
        if architecture.startswith(row.architecture) and (row.kernel, row.config) == (kernel, str(config)):
            triton_version, ptxas_version = toolchain(architecture)
            if triton_version.startswith(row.triton) and ptxas_version.startswith(row.ptxas):
                return row
    return None


@functools.cache
def toolchain(architecture: str) -> tuple[str, str]:
    """Versions of Triton and of its ptxas for an architecture."""
    import triton
    from triton.backends.nvidia.compiler import get_ptxas

    return triton.__version__, get_ptxas(int(architecture.removeprefix("sm_"))).version if architecture.startswith("sm_") else ""


def forced(kernel: str) -> Config | None:
    """The configuration that :func:`force` has set for a kernel."""
    return _forced.get(kernel)


@contextlib.contextmanager
def force(kernel: str, config: Config) -> Iterator[None]:
    """Within the context every launch of a kernel uses this configuration; a launch that it does not serve raises ValueError."""
    before = dict(_forced)
    _forced[kernel] = config
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


@contextlib.contextmanager
def stream(whether: bool) -> Iterator[None]:
    """Within the context the chains keep their states in memory, or in registers, whatever the sizes; for tests and benchmarks."""
    global _streaming
    before, _streaming = _streaming, whether
    try:
        yield
    finally:
        _streaming = before


@contextlib.contextmanager
def fuse(whether: bool) -> Iterator[None]:
    """Within the context the forward's chain computes the output too, or not, whatever the sizes; for tests and benchmarks."""
    global _fusing
    before, _fusing = _fusing, whether
    try:
        yield
    finally:
        _fusing = before
