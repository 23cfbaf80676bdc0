"""What bench/gpu.py does: its parts and their shares of the time, the shapes, what is compared, and the floors.

Nothing here needs torch: the process that only starts others reads this file too.
"""

from __future__ import annotations

import dataclasses
import time

from contenders import BOTH, DIRECTIONS, FORWARD, flops

PARTS = {
    "environment": "device, driver, torch, Triton, and which ptxas it uses (always done: the rest refers to it)",
    "tests": "pytest of tests/test_triton.py on this device",
    "parity": "every configuration of every kernel against float64; wrong ones become rows for the deny-list",
    "sanitizer": "compute-sanitizer (memcheck, racecheck) on a small call",
    "ceilings": "what this device reaches: a large copy, a large bf16 matrix product",
    "bench": "forward and backward at every shape, against PyTorch and other libraries, in the same rounds",
    "memory": "peak memory of the same calls, beyond their inputs",
    "tuning": "every configuration of every kernel timed at every shape: is the chosen one the fastest?",
}

#: of the time that is left, how much a part may take compared with those that still follow
SHARES = {"environment": 3, "tests": 20, "parity": 28, "sanitizer": 9, "ceilings": 3, "bench": 30, "memory": 5, "tuning": 10}


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
        plant: ``"wrong=KERNEL LABEL"`` or ``"crash=..."`` or ``"red=BIAS"``: a fault for the tests of this program.
    """

    backend: str = "triton"
    device: str = "cuda"
    toy: bool = False
    seconds: float = 4.0
    min_rounds: int = 7
    first_seconds: float = 75.0
    compile_seconds: float = 60.0
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

    memory = "linear"

    @property
    def value_dim(self) -> int:
        return self.key_dim

    def __str__(self) -> str:
        return f"{self.batch}x{self.tokens}x{self.heads}x{self.key_dim}"


#: the row that the targets are about: 65,536 tokens, 32 heads
TARGET = "8x8192x32x128"
SHAPES = {
    str(shape): shape
    for shape in (
        Shape(8, 8192, 32, 128),
        Shape(1, 8192, 96, 128),
        Shape(2, 16384, 16, 128),
        Shape(4, 2048, 16, 128),
        Shape(4, 4096, 64, 128),
        Shape(8, 2048, 32, 256),
        Shape(8, 1024, 8, 64),
    )
}
SMALLEST = "8x1024x8x64"


def shape_of(name: str, settings: Settings) -> Shape:
    """A shape by its name; a dry run has the same names on a toy."""
    heads = 2 if name == TARGET and settings.backend == "reference" else 1  # the interpreter takes seconds for each
    return Shape(1, 20, heads, 16, 16) if settings.toy else SHAPES[name]


# -------------------------------------------------------------------------------------------------------- contenders

#: ours, by the bias; ratios refer to the first
BASE = "l2"
OURS = (BASE, "huber_coordinate", "lp 3", "huber_switch", "dot")
NEEDS_DELTA = ("huber_coordinate", "huber_switch")
#: PyTorch on the same mathematics
EAGER, COMPILED = "eager", "compile"


def contenders_at(name: str, peers: tuple[str, ...], few_peers: tuple[str, ...]) -> list[str]:
    """Whom to time at a shape: everyone at the target row, fewer elsewhere."""
    if name == TARGET:
        return [*OURS, EAGER, *peers]
    return [*OURS[:2], EAGER, *few_peers]


# ------------------------------------------------------------------------------------------------------------ floors


def io_bytes(shape: Shape, direction: str, bias: str = BASE) -> int:
    """Inputs read once and outputs written once: 16-bit q, k, v and out, 32-bit gates."""
    gates = 4 * (3 if bias in NEEDS_DELTA else 2)
    forward = 2 * (2 * shape.key_dim + 2 * shape.value_dim) + gates
    backward = 2 * (4 * shape.key_dim + 3 * shape.value_dim) + 2 * gates  # q, k, v, d out read; d q, d k, d v, d gates written
    return _token_heads(shape) * (forward + (backward if direction == BOTH else 0))


def traffic_bytes(shape: Shape, direction: str) -> int:
    """What the kernels move by design: the forward's states and errors go through memory once, in 16 bits; the backward runs
    the chain of states again, and reads and writes about 21 vectors and 5 states per token or chunk."""
    dk, dv, state = shape.key_dim, shape.value_dim, 2 * shape.key_dim * shape.value_dim // shape.chunk_size
    forward = 2 * (3 * dk + 4 * dv) + 2 * state + 24
    backward = 21 * (dk + dv) + 5 * state + 40
    return _token_heads(shape) * (forward + (backward if direction == BOTH else 0))


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


__all__ = ["BASE", "BOTH", "COMPILED", "DIRECTIONS", "EAGER", "FORWARD", "NEEDS_DELTA", "OURS", "PARTS", "SHAPES", "SMALLEST", "TARGET",
           "Budget", "Settings", "Shape", "contenders_at", "floors_ms", "io_bytes", "shape_of", "traffic_bytes"]  # fmt: skip
