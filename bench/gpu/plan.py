"""What bench.gpu does: its shapes, and its items in the order in which time may run out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

from ..common.implementations import BOTH, DIRECTIONS, PLAIN, flops, recurrences


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of every worker."""

    backend: str = "triton"
    device: str = "cuda"  # "cpu" for the smoke test
    smoke: bool = False  # tiny shapes and no statistics, to check this program itself
    seconds: float = 2.0  # per interleaved measurement
    min_rounds: int = 5  # however long they take
    first_seconds: float = 60.0  # an implementation whose first call takes longer (compilation, tuning) is left out
    call_seconds: float = 0.5  # a baseline whose call takes longer is timed once, outside the rounds


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
    def biases(self) -> tuple[str, ...]:
        """Biases to time; ratios refer to the first."""
        return ("huber_coordinate", "l2", "huber_switch") if self.hidden else ("l2", "huber_coordinate", "lp 3", "huber_switch", "dot")

    def __str__(self) -> str:
        sizes = f"{self.batch}x{self.tokens}x{self.heads}x{self.key_dim}"
        return sizes + (f"-Hd{self.hidden}-C{self.chunk_size}" if self.hidden else "")


#: the target rows: 65,536 tokens and 32 heads, or 16 heads of an MLP memory; and few chunks, which torch.compile unrolls
TARGET, MLP_TARGET = "8x8192x32x128", "4x16384x16x64-Hd256-C64"
SMALLEST, MLP_SMALLEST = "8x1024x8x64", "32x512x8x64-Hd256-C64"
_SHAPES = (Shape(8, 8192, 32, 128), Shape(4, 16384, 16, 64, 64, 256), Shape(8, 1024, 8, 64), Shape(32, 512, 8, 64, 64, 256))
SHAPES = {str(shape): shape for shape in _SHAPES}
#: where retention gates, momentum and channel-wise gates are compared with the plain recurrence
RECURRENCE_SHAPES = (TARGET, MLP_SMALLEST)
#: decoders of one sequence, and of many
DECODING = {str(shape): shape for batch in (1, 64) for shape in (Shape(batch, 1, 16, 128), Shape(batch, 1, 16, 64, 64, 256))}
#: baselines of other libraries
FLA, TITANS = ("fla delta rule", "fla gated delta rule"), "titans-pytorch"
LIBRARIES = {"linear": FLA, "mlp": (TITANS,)}
#: sequences x heads, each a program of the chains, are more than a GPU has multiprocessors
MANY = {"linear": Shape(8, 256, 32, 128), "mlp": Shape(8, 256, 32, 64, 64, 256)}


def shape_of(name: str, settings: Settings) -> Shape:
    """A shape by its name or memory; in the smoke test the names stand for tiny shapes."""
    shape = {**SHAPES, **DECODING, **MANY}[name]
    if not settings.smoke:
        return shape
    tiny = Shape(1, 20, 1, 16, 16, 32 if shape.hidden else 0)
    return dataclasses.replace(tiny, tokens=1, chunk_size=4) if name in DECODING else tiny


@dataclasses.dataclass(frozen=True)
class Item:
    """A request for a worker."""

    study: str  # the part of the plan
    case: str  # its name in results and notes
    task: str
    arguments: dict
    seconds: float  # it is given up after this long
    alone: bool = False  # it takes times, so it needs the device to itself
    tool: str = ""  # the check of compute-sanitizer to run it under


def correctness(kernels: dict[str, list[str]], cases: int, settings: Settings) -> Iterator[Item]:
    """``kernels``: every configuration by kernel; ``cases``: the number of parity cases."""
    for memory in MANY:
        for name in recurrences(memory) if not settings.smoke else (PLAIN,):
            yield Item("repeat", f"{memory}, {name}", "repeat", {"memory": memory, "name": name}, 90)
        yield Item("repeat", f"{memory}, decoding steps", "repeat_steps", {"memory": memory}, 90)
    for i in range(cases):
        yield Item("parity", f"configurations as chosen, case {i}", "parity", {"index": i}, 120)
    for memory in MANY:
        for tool in ("memcheck", "initcheck"):
            yield Item("sanitizer", f"{tool}, {memory}", "launch_all", {"memory": memory}, 150, tool=tool)
    most = max(map(len, kernels.values()), default=0)
    for kernel, label in [(kernel, labels[i]) for i in range(most) for kernel, labels in kernels.items() if i < len(labels)]:
        yield Item("parity", f"{kernel} {label}", "parity_of", {"kernel": kernel, "label": label}, 120)


def times(kernels: dict[str, list[str]], settings: Settings) -> Iterator[Item]:
    def timed(study: str, shape: str, direction: str, names: Iterable[str]) -> Item:
        return Item(study, shape, "times", {"shape": shape, "direction": direction, "names": list(names)}, 120, alone=True)

    def compiled(shape: str, name: str, **forced: str) -> Item:
        arguments = {"shape": shape, "name": name, **forced}
        return Item("compilation", ", ".join(arguments.values()), "launch", arguments, 90)

    rows, base = [], {name: shape.biases[0] for name, shape in SHAPES.items()}
    for shape in (TARGET, MLP_TARGET):
        names = (*SHAPES[shape].biases, "eager", *LIBRARIES[SHAPES[shape].memory])
        rows += [timed("times", shape, direction, names) for direction in reversed(DIRECTIONS)]
    for shape in (SMALLEST, MLP_SMALLEST):
        names = (base[shape], "eager", *([] if settings.smoke else ["compile"]), *LIBRARIES[SHAPES[shape].memory])
        rows.append(timed("times", shape, BOTH, names))
    rows += [timed("recurrence", shape, BOTH, recurrences(SHAPES[shape].memory)) for shape in RECURRENCE_SHAPES]
    other = ("step", "block_")  # decoding, exact steps: not what these shapes launch
    tuned = [(shape, kernel) for shape in (TARGET, MLP_TARGET) for kernel, labels in kernels.items()
             if len(labels) > 1 and not any(x in kernel for x in other) and concerns(kernel, SHAPES[shape].memory)]  # fmt: skip
    if not settings.smoke:  # compiled by all processors before times are taken
        ours = dict.fromkeys((row.case, name) for row in rows for name in row.arguments["names"] if is_ours(name))
        yield from (compiled(shape, name) for shape, name in ours)
    yield from rows
    yield from (Item("decoding", shape, "decode", {"shape": shape}, 60, alone=True) for shape in DECODING)
    for shape, kernel in tuned if not settings.smoke else ():
        yield from (compiled(shape, base[shape], kernel=kernel, label=label) for label in kernels[kernel])
    for shape, kernel in tuned[: 1 if settings.smoke else None]:
        yield Item("tuning", shape, "tuning", {"shape": shape, "kernel": kernel}, 60, alone=True)


def concerns(kernel: str, memory: str) -> bool:
    """Whether a memory's call may launch a kernel, by the kernel's name; both memories share the log-decays."""
    return kernel.startswith("linear_decay") or kernel.startswith("mlp_") == (memory == "mlp")


def is_ours(name: str) -> bool:
    """Whether an implementation is our kernel, with a bias or as a recurrence."""
    return name in SHAPES[TARGET].biases or name in recurrences("linear")


def least_work(shape: Shape, direction: str, bias: str) -> dict[str, float]:
    """Useful operations; inputs read once and outputs written once: 16-bit q, k, v and out, 32-bit gates and MLP initial matrices."""
    gates = 4 * (3 if bias.startswith("huber") else 2)
    forward = 2 * (2 * shape.key_dim + 2 * shape.value_dim) + gates
    backward = 2 * (4 * shape.key_dim + 3 * shape.value_dim) + 2 * gates  # q, k, v, d out read; d q, d k, d v, d gates written
    both = direction == BOTH
    state = 4 * 2 * shape.key_dim * shape.hidden
    moves = 3 if both else 1  # read, and by the backward read again; their gradients written
    heads = shape.batch * shape.heads
    return {"flops": flops(shape)[direction], "bytes": heads * (shape.tokens * (forward + (backward if both else 0)) + moves * state)}
