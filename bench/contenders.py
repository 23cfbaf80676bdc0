"""What is compared on the CPU: the shapes, the contenders, and the parity gate that each must pass before it is timed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

FORWARD, BOTH = "forward", "forward+backward"
DIRECTIONS = (FORWARD, BOTH)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What every measuring process is told.

    Attributes:
        backend: the contender that is measured, "cpp" but for tests of this program.
        seconds: per interleaved measurement.
        min_rounds: however long they take.
        compile_seconds: torch.compile is given up after this long per function; 0 leaves it out.
        quick: fewer contenders.
        toy: tiny shapes, to check this program itself.
    """

    backend: str = "cpp"
    seconds: float = 8.0
    min_rounds: int = 7
    compile_seconds: float = 300.0
    quick: bool = False
    toy: bool = False


SHAPES = {
    "D64 C64": dict(batch=2, tokens=1024, heads=4, key_dim=64, value_dim=64, chunk_size=64),
    "D64 C16": dict(batch=2, tokens=1024, heads=4, key_dim=64, value_dim=64, chunk_size=16),
    "D128 C64": dict(batch=1, tokens=4096, heads=8, key_dim=128, value_dim=128, chunk_size=64),
}
TOY = dict(batch=1, tokens=48, heads=2, key_dim=16, value_dim=12, chunk_size=16)


def make_case(shape: str, settings: Settings, **changes):
    """The registry's kind of case in one of the benchmark's shapes."""
    from miras_kernels.testing import Case

    return Case(f"bench {shape}", **({"initial": "none"} | (TOY if settings.toy else SHAPES[shape]) | changes))


def flops(case) -> dict[str, int]:
    """Useful floating-point operations: triangles counted as triangles, recomputation not counted."""
    dk, dv, forward, backward = case.key_dim, case.value_dim, 0, 0
    for start in range(0, case.tokens, case.chunk_size):
        c = min(case.chunk_size, case.tokens - start)
        forward += 6 * c * dk * dv + c * (c + 1) * (dk + dv)
        backward += 14 * c * dk * dv + c * (c + 1) * (2 * dk + 3 * dv)
    heads = case.batch * case.heads
    return {FORWARD: heads * forward, BOTH: heads * (forward + backward)}


# -------------------------------------------------------------------------------------------------------- contenders


def kernel(inputs, backend: str, direction: str, **options) -> Callable[[], tuple]:
    """The public function; ``options`` as in :func:`miras_kernels.override`."""
    import torch

    import miras_kernels

    arguments = {**inputs.arguments(), "output_final_state": False, "backend": backend}
    leaves = tuple(inputs.leaves().values())

    def forward() -> tuple:
        with torch.no_grad():
            return (miras_kernels.linear_memory(**arguments)[0],)

    def both() -> tuple:
        with miras_kernels.override(**options):
            out, _ = miras_kernels.linear_memory(**arguments)
        return torch.autograd.grad(out, leaves, inputs.grad_out)

    return forward if direction == FORWARD else both


def eager(inputs, direction: str) -> Callable[[], tuple]:
    """The chunkwise matrix form in PyTorch; for the backward, autograd through it."""
    import torch

    from miras_kernels.reference import chunkwise

    call, leaves = inputs.call(), tuple(inputs.leaves().values())

    def forward() -> tuple:
        with torch.no_grad():
            return (chunkwise.run(call)[0],)

    return forward if direction == FORWARD else lambda: torch.autograd.grad(chunkwise.run(call)[0], leaves, inputs.grad_out)


def compiled(inputs, direction: str) -> Callable[[], tuple]:
    """torch.compile of the whole of :func:`eager`."""
    import torch

    from miras_kernels.reference import chunkwise

    call, names, leaves = inputs.call(), tuple(inputs.leaves()), tuple(inputs.leaves().values())

    def function(*tensors):
        return chunkwise.run(call.replace(**dict(zip(names, tensors, strict=True))))[0]

    run = torch.compile(function, dynamic=False, fullgraph=True)

    def forward() -> tuple:
        with torch.no_grad():
            return (run(*leaves),)

    return forward if direction == FORWARD else lambda: torch.autograd.grad(run(*leaves), leaves, inputs.grad_out)


def derived(inputs, direction: str) -> Callable[[], tuple]:
    """The hand-derived backward in batched PyTorch, without autograd."""
    import torch

    from miras_kernels.reference import derived as reference

    call, names = inputs.call(), tuple(inputs.leaves())

    def forward() -> tuple:
        with torch.no_grad():
            return (reference.forward(call)[0],)

    def both() -> tuple:
        with torch.no_grad():
            _, _, saved = reference.forward(call)
            grads = reference.backward(call, saved, inputs.grad_out, None)
        return tuple(grads[name] for name in names)

    return forward if direction == FORWARD else both


# ---------------------------------------------------------------------------------------------------------- parity


def parity(case, backend: str, dtype=None) -> dict:
    """The gate: outputs, final states and every gradient against float64, with the tests' own budgets."""
    import torch

    from miras_kernels.testing import check

    report = check(case, backend, dtype or torch.float32)
    errors = {row.name: row.error for row in report.rows}
    worst = report.worst
    return {
        "ok": report.ok,
        "forward_error": max(e for name, e in errors.items() if not name.startswith("grad_")),
        "gradient_error": max(e for name, e in errors.items() if name.startswith("grad_")),
        "worst": {"tensor": worst.name, "error": worst.error, "budget": worst.budget},
    }


def agreement(ours: tuple, theirs: tuple) -> float:
    """The largest relative difference between two contenders' results: do they compute the same thing?"""
    from miras_kernels.testing import relative_error

    return max(relative_error(x, y) for x, y in zip(ours, theirs, strict=True))
