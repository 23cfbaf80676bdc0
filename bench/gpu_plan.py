"""What bench/gpu.py does: its parts and their shares of the time, the shapes, what is compared, and the floors.

Nothing here needs torch: the process that only starts others reads this file too.
"""

from __future__ import annotations

import dataclasses
import time

from contenders import BOTH, DIRECTIONS, FORWARD, MOMENTUM, PLAIN, RETENTIONS, flops, recurrences

PARTS = {
    "environment": "device, driver, torch, Triton, and which ptxas it uses (always done: the rest refers to it)",
    "tests": "pytest of tests/triton/test_triton.py on this device",
    "parity": "every configuration of every kernel against float64; wrong ones become rows for the deny-list",
    "sanitizer": "compute-sanitizer (memcheck, racecheck) on a small call",
    "ceilings": "what this device reaches: a large copy, a large bf16 matrix product",
    "bench": "the linear memory, forward and backward at every shape, against PyTorch and other libraries, in the same rounds",
    "mlp": "the same for the MLP memory",
    "recurrence": "retention gates, momentum and channel-wise gates against the plain recurrence, at one shape of each memory",
    "decode": "a token of a decoder, launched by Python and from a CUDA graph: Triton's and CUDA C++'s steps against PyTorch's",
    "memory": "peak memory of the same calls, beyond their inputs",
    "tuning": "every configuration of every kernel timed at every shape: is the chosen one the fastest?",
}

#: of the time that is left, how much a part may take compared with those that still follow
SHARES = {"environment": 3, "tests": 20, "parity": 28, "sanitizer": 9, "ceilings": 3, "bench": 30, "mlp": 20, "recurrence": 8,
          "decode": 6, "memory": 6, "tuning": 10}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Settings:
    """What every worker is told.

    Attributes:
        backend: whom to measure: "triton" but for tests of this program.
        device: "cuda", or "cpu" for a dry run.
        toy: tiny shapes, no statistics: checks this program itself.
        seconds: per interleaved measurement.
        min_rounds: however long they take.
        first_seconds: a contender whose first call (compilation, tuning) takes longer is left out.
        compile_seconds: the same for torch.compile; 0 leaves it out.
        eager_seconds: the same for what compiles nothing.
        call_seconds: who takes longer than this for a call, and is not ours, is timed alone and once, outside the rounds.
        plant: ``"wrong=KERNEL LABEL"`` or ``"crash=..."`` or ``"red=BIAS"``: a fault for the tests of this program.
    """

    backend: str = "triton"
    device: str = "cuda"
    toy: bool = False
    seconds: float = 4.0
    min_rounds: int = 7
    first_seconds: float = 75.0
    compile_seconds: float = 60.0
    eager_seconds: float = 25.0
    call_seconds: float = 2.0
    plant: str = ""

    def planted(self, fault: str, where: str) -> bool:
        return self.plant == f"{fault}={where}"


class Budget:
    """The wall clock of a whole run, cut into parts: what one part leaves over, the next ones have."""

    def __init__(self, minutes: float):
        self.began = time.time()
        self.end = self.began + 60 * minutes

    def left(self) -> float:
        return self.end - time.time()

    def part_end(self, part: str, following: list[str]) -> float:
        """When a part must end so that those that follow have their shares."""
        mine = SHARES[part]
        return time.time() + max(0.0, self.left()) * mine / (mine + sum(SHARES[p] for p in following))


# ------------------------------------------------------------------------------------------------------------ shapes


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sequences as the linear attention libraries time them; the attributes are those of a test case."""

    batch: int
    tokens: int
    heads: int
    key_dim: int
    chunk_size: int = 64
    hidden: int = 0

    @property
    def memory(self) -> str:
        return "mlp" if self.hidden else "linear"

    @property
    def value_dim(self) -> int:
        return self.key_dim

    @property
    def ours(self) -> tuple[str, ...]:
        """Our contenders, by the bias; ratios refer to the first."""
        return MLP_OURS if self.hidden else OURS

    @property
    def base(self) -> str:
        return self.ours[0]

    @property
    def matrices(self) -> tuple[tuple[int, int], ...]:
        """The shapes of a head's matrices."""
        dk, dv = self.key_dim, self.value_dim
        return ((dv, self.hidden), (self.hidden, dk)) if self.hidden else ((dv, dk),)

    def __str__(self) -> str:
        sizes = f"{self.batch}x{self.tokens}x{self.heads}x{self.key_dim}"
        return sizes + (f"-Hd{self.hidden}-C{self.chunk_size}" if self.hidden else "")


#: the rows that the targets are about: 65,536 tokens, 32 heads, and as many tokens, 16 heads of an MLP memory
TARGET, MLP_TARGET = "8x8192x32x128", "4x16384x16x64-Hd256-C64"
SHAPES = {
    str(shape): shape
    for shape in (
        Shape(8, 8192, 32, 128),
        Shape(4, 16384, 16, 64, 64, 256),
        Shape(1, 8192, 96, 128),
        Shape(2, 16384, 16, 128),
        Shape(4, 2048, 16, 128),
        Shape(4, 4096, 64, 128),
        Shape(8, 2048, 32, 256),
        Shape(8, 1024, 8, 64),
        Shape(8, 2048, 16, 64, 64, 256),
        Shape(4, 4096, 16, 64, 16, 256),
        Shape(32, 512, 8, 64, 64, 256),
    )
}
#: few chunks, which torch.compile unrolls
SMALLEST, MLP_SMALLEST = "8x1024x8x64", "32x512x8x64-Hd256-C64"
#: of which kernels are compiled by all processors before times are taken: target rows, and other chunks of an MLP memory
WARMED = (TARGET, MLP_TARGET, "4x4096x16x64-Hd256-C16")
#: where torch.compile is timed: that of an MLP memory takes minutes to compile for more chunks
COMPILED_AT = {"linear": (SMALLEST, TARGET), "mlp": (MLP_SMALLEST,)}
#: where retention gates, momentum and channel-wise gates are compared with the plain recurrence
RECURRENCE_SHAPES = (TARGET, MLP_SMALLEST)


#: memories that read a token: one sequence, and many
DECODING = {
    str(shape): shape
    for batch in (1, 64)
    for shape in (Shape(batch, 1, 16, 128), Shape(batch, 1, 16, 64, 64, 256))
}  # fmt: skip


def decoding(name: str, settings: Settings) -> Shape:
    """A shape of DECODING by its name, likewise."""
    return Shape(1, 1, 1, 16, 4, 32 if DECODING[name].hidden else 0) if settings.toy else DECODING[name]


def shape_of(name: str, settings: Settings) -> Shape:
    """A shape by its name; a dry run has the same names on a toy."""
    if not settings.toy:
        return SHAPES[name]
    heads = 2 if name == TARGET and settings.backend == "reference" else 1  # the interpreter takes seconds for each
    return Shape(1, 20, heads, 16, 16, 32 if SHAPES[name].hidden else 0)


def concerns(kernel: str | None, memory: str) -> bool:
    """Whether a memory's call may launch a kernel, by the kernel's name; what log-decays amount to is the same for every memory."""
    if kernel is None or kernel.startswith(("linear_decay", "reference")):
        return True
    return kernel.startswith("mlp_") == (memory == "mlp")


# -------------------------------------------------------------------------------------------------------- contenders

#: ours, by the bias; ratios refer to the first
BASE, MLP_BASE = "l2", "huber_coordinate"
OURS = (BASE, "huber_coordinate", "lp 3", "huber_switch", "dot")
MLP_OURS = (MLP_BASE, "l2", "huber_switch")
NEEDS_DELTA = ("huber_coordinate", "huber_switch")
#: PyTorch on the same mathematics
EAGER, COMPILED = "eager", "compile"


def contenders_at(name: str, peers: tuple[str, ...], few_peers: tuple[str, ...]) -> list[str]:
    """Whom to time at a shape: everyone at the target rows, fewer elsewhere."""
    return [*SHAPES[name].ours, EAGER, *peers] if name in (TARGET, MLP_TARGET) else few_at(name, few_peers)


def few_at(name: str, peers: tuple[str, ...]) -> list[str]:
    """Of ours two biases, or one for an MLP memory, whose other work is so much more."""
    return [*SHAPES[name].ours[: 1 if SHAPES[name].hidden else 2], EAGER, *peers]


def is_ours(name: str) -> bool:
    """Whether a contender is our kernel, with a bias or as a recurrence (:func:`contenders.recurrence`)."""
    return name in OURS or name in recurrences("linear")


# ------------------------------------------------------------------------------------------------------------ floors


def io_bytes(shape: Shape, direction: str, bias: str = BASE) -> int:
    """Inputs read once and outputs written once: 16-bit q, k, v and out, 32-bit gates, and an MLP's 32-bit initial matrices."""
    gates = 4 * (3 if bias in NEEDS_DELTA else 2)
    forward = 2 * (2 * shape.key_dim + 2 * shape.value_dim) + gates
    backward = 2 * (4 * shape.key_dim + 3 * shape.value_dim) + 2 * gates  # q, k, v, d out read; d q, d k, d v, d gates written
    both = direction == BOTH
    state = 4 * sum(rows * columns for rows, columns in shape.matrices) if shape.hidden else 0
    moves = 3 if both else 1  # read, and by the backward read again; their gradients written
    return _token_heads(shape) * (forward + (backward if both else 0)) + shape.batch * shape.heads * moves * state


def traffic_bytes(shape: Shape, direction: str) -> int:
    """What the kernels move by design.

    Linear memory: the forward's states and errors go through memory once, in 16 bits; the backward runs the chain of states
    again, and reads and writes about 21 vectors and 5 states per token or chunk.
    """
    if shape.hidden:
        return _token_heads(shape) * _mlp_traffic(shape, direction)
    dk, dv, state = shape.key_dim, shape.value_dim, 2 * shape.key_dim * shape.value_dim // shape.chunk_size
    forward = 2 * (3 * dk + 4 * dv) + 2 * state + 24
    backward = 21 * (dk + dv) + 5 * state + 40
    return _token_heads(shape) * (forward + (backward if direction == BOTH else 0))


def _mlp_traffic(shape: Shape, direction: str) -> int:
    """Bytes of a token and head. The forward keeps its matrices and what a chunk's passes share in the caches, and writes both
    matrices every 256 tokens if a backward will come; that reads them, writes every chunk's in 16 bits and reads those three times;
    beside them it moves 18 vectors of hidden units, 27 of values, and 6 rows of [C, C]."""
    d, hidden = shape.key_dim, shape.hidden
    kept, states = 2 * 4 * d * hidden // 256, 2 * 2 * d * hidden // shape.chunk_size
    forward = 2 * 4 * d + 24
    backward = 2 * kept + 4 * states + 2 * (18 * hidden + 27 * d + 6 * shape.chunk_size) + 40
    return forward + (backward if direction == BOTH else 0)


def _token_heads(shape: Shape) -> int:
    return shape.batch * shape.tokens * shape.heads


def floors_ms(shape: Shape, direction: str, bias: str, ceilings: dict) -> dict[str, float]:
    """Times that no kernel of this kind can undercut on a device with these ceilings, in milliseconds.

    ``memory`` and ``arithmetic`` bound any implementation, ``roofline`` is the larger one; ``traffic`` is the time that the
    bytes of our decomposition take.
    """
    memory = 1e3 * io_bytes(shape, direction, bias) / ceilings["copy_bytes_per_s"]
    arithmetic = 1e3 * flops(shape)[direction] / ceilings["matmul_flops_per_s"]
    traffic = 1e3 * traffic_bytes(shape, direction) / ceilings["copy_bytes_per_s"]
    return {"memory": memory, "arithmetic": arithmetic, "roofline": max(memory, arithmetic), "traffic": traffic}


__all__ = [
    "BASE", "BOTH", "COMPILED", "COMPILED_AT", "DECODING", "DIRECTIONS", "EAGER", "FORWARD", "MLP_BASE", "MLP_OURS", "MLP_SMALLEST",
    "MLP_TARGET", "MOMENTUM", "NEEDS_DELTA", "OURS", "PARTS", "PLAIN", "RECURRENCE_SHAPES", "RETENTIONS", "SHAPES", "SMALLEST", "TARGET",
    "WARMED", "Budget", "Settings", "Shape", "concerns", "contenders_at", "decoding", "few_at", "floors_ms", "io_bytes", "is_ours",
    "recurrences", "shape_of", "traffic_bytes",
]  # fmt: skip
