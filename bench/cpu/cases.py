"""The CPU benchmark's shapes, the settings of a measuring process, and the parity gate before any time is taken."""

from __future__ import annotations

import dataclasses

import torch

from miras_kernels import Huber
from miras_kernels.testing import Case, Inputs, check, evaluate, operands, registry
from miras_kernels.testing.parity import judge

from ..common.implementations import BOTH, DIRECTIONS, FORWARD, flops


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of every measuring process."""

    backend: str = "cpp"
    seconds: float = 8.0  # per interleaved measurement
    min_rounds: int = 7  # however long they take
    compile_seconds: float = 300.0  # torch.compile is given up after this long per function; 0 leaves it out
    quick: bool = False  # fewer implementations and sizes
    toy: bool = False  # tiny shapes, to check this program itself
    cache_bytes: int = 0  # larger caches of attention are left out


SHAPES = {
    "D64 C64": dict(batch=2, tokens=1024, heads=4, key_dim=64, value_dim=64, chunk_size=64),
    "D64 C16": dict(batch=2, tokens=1024, heads=4, key_dim=64, value_dim=64, chunk_size=16),
    "D128 C64": dict(batch=1, tokens=4096, heads=8, key_dim=128, value_dim=128, chunk_size=64),
    "MLP D64 C64": dict(memory="mlp", batch=2, tokens=1024, heads=4, key_dim=64, value_dim=64, hidden=256, chunk_size=64),
    "MLP D64 C16": dict(memory="mlp", batch=2, tokens=1024, heads=4, key_dim=64, value_dim=64, hidden=256, chunk_size=16),
}
MLP_SHAPES = tuple(name for name, shape in SHAPES.items() if shape.get("memory") == "mlp")
LINEAR_SHAPES = tuple(name for name in SHAPES if name not in MLP_SHAPES)
#: of each memory one: for the studies of recurrences and of scaling
ONE_OF_EACH = ("D64 C64", "MLP D64 C64")
TOY = dict(batch=1, tokens=48, heads=2, key_dim=16, value_dim=12, chunk_size=16)
MLP_TOY = {**TOY, "memory": "mlp", "value_dim": 16, "hidden": 32}


def make_case(shape: str, settings: Settings, **changes) -> Case:
    """A test case in one of the benchmark's shapes, or the tests' case of that name. L2 for a linear memory, coordinate-wise Huber for an
    MLP. The MLP's decays are slight: LayerNorm amplifies the steps of a memory that shrinks, and after a thousand tokens float32 and
    float64 would share no digit."""
    if shape not in SHAPES:
        return dataclasses.replace(registered()[shape], **changes)
    mlp = shape in MLP_SHAPES
    size = (MLP_TOY if mlp else TOY) if settings.toy else SHAPES[shape]
    kind = {"bias": Huber("coordinate"), "decay": "slight"} if mlp else {"initial": "none"}
    return Case(f"bench {shape}", **(kind | size | changes))


def registered() -> dict[str, Case]:
    """The tests' own cases by name. They are short: good for a look, not for figures to report."""
    return {case.name: case for case in registry()}


def least_work(inputs) -> dict[str, dict[str, int]]:
    """For both directions what a call has to do at least: ``flops``, and ``bytes`` when inputs are read and results written once. The
    backward reads the inputs again: a model has thousands of other tensors in between."""
    case = inputs.case
    parts = [case] if case.lengths is None else [dataclasses.replace(case, batch=1, tokens=n, lengths=None) for n in case.lengths]
    size = lambda *tensors: sum(x.numel() * x.element_size() for x in tensors)
    read, out = size(*inputs.leaves().values()), size(inputs.grad_out)
    moved = {FORWARD: read + out, BOTH: 3 * read + 2 * out}
    return {d: {"flops": sum(flops(part)[d] for part in parts), "bytes": moved[d]} for d in DIRECTIONS}


def parity(case: Case, backend: str, dtype: torch.dtype = torch.float32, inputs: Inputs | None = None) -> dict:
    """The gate: outputs, final states and all gradients against float64, within the tests' own budgets. ``inputs``: float32 ones other than
    those that the case draws."""
    report = check(case, backend, dtype) if inputs is None else judge(inputs, evaluate(inputs, backend), operands(backend, dtype))
    errors, worst = {row.name: row.error for row in report.rows}, report.worst
    return {
        "ok": report.ok,
        "forward_error": max(e for name, e in errors.items() if not name.startswith("grad_")),
        "gradient_error": max(e for name, e in errors.items() if name.startswith("grad_")),
        "worst": {"tensor": worst.name, "error": worst.error, "budget": worst.budget},
    }
