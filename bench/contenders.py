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
    "MLP D64 C64": dict(memory="mlp", batch=2, tokens=1024, heads=4, key_dim=64, value_dim=64, hidden=256, chunk_size=64),
    "MLP D64 C16": dict(memory="mlp", batch=2, tokens=1024, heads=4, key_dim=64, value_dim=64, hidden=256, chunk_size=16),
}
MLP_SHAPES = tuple(name for name, shape in SHAPES.items() if shape.get("memory") == "mlp")
LINEAR_SHAPES = tuple(name for name in SHAPES if name not in MLP_SHAPES)
TOY = dict(batch=1, tokens=48, heads=2, key_dim=16, value_dim=12, chunk_size=16)
RECURRENCE_SHAPES = ("D64 C64", "MLP D64 C64")
MLP_TOY = {**TOY, "memory": "mlp", "value_dim": 16, "hidden": 32}


def make_case(shape: str, settings: Settings, **changes):
    """The registry's kind of case in one of the benchmark's shapes, or the registry's case of that name.

    L2 for a linear memory, coordinate-wise Huber for an MLP: that one decays but slightly, since LayerNorm blows up the steps of a
    memory that shrinks, and after a thousand tokens float32 and float64 would share no digit.
    """
    from miras_kernels import Huber
    from miras_kernels.testing import Case

    if shape not in SHAPES:
        return dataclasses.replace(registered()[shape], **changes)
    mlp = shape in MLP_SHAPES
    size = (MLP_TOY if mlp else TOY) if settings.toy else SHAPES[shape]
    kind = {"bias": Huber("coordinate"), "decay": "slight"} if mlp else {"initial": "none"}
    return Case(f"bench {shape}", **(kind | size | changes))


def registered() -> dict:
    """The tests' own cases by name. They are short: for a look at one that is slow, not for figures to report."""
    from miras_kernels.testing import registry

    return {case.name: case for case in registry()}


#: what a recurrence may have: nothing (L2Retention, no momentum, scalar gates), a retention gate of the table, momentum, or a gate
#: per value channel
PLAIN = "plain"
RETENTIONS = ("lq", "kl", "elastic", "sigmoid")
MOMENTUM = "momentum"
CHANNEL_WISE = {"channel-wise lr": {"lr": "channel"}, "channel-wise log_decay": {"decay": "channel"}}


def recurrences(memory: str) -> tuple[str, ...]:
    """The names of what a memory's recurrence may have, the plain one first; channel-wise gates are the linear memory's alone."""
    return (PLAIN, *RETENTIONS, MOMENTUM, *(CHANNEL_WISE if memory == "linear" else ()))


def recurrence(name: str) -> dict:
    """What makes a plain case one with this, as changes of the case."""
    from miras_kernels.tables import retention

    if name in RETENTIONS:
        return {"retention": next(row for row in retention.TABLE.values() if row.name == name)}
    return {PLAIN: {}, MOMENTUM: {"momentum": True}, **CHANNEL_WISE}[name]


def flops(case) -> dict[str, int]:
    """Useful floating-point operations: triangles counted as triangles, recomputation not counted."""
    dk, dv, forward, backward = case.key_dim, case.value_dim, 0, 0
    for start in range(0, case.tokens, case.chunk_size):
        c = min(case.chunk_size, case.tokens - start)
        if case.memory == "mlp":  # forward 7 products of c D Hd and 4 triangles, backward twice that
            products, triangles = 14 * c * dk * case.hidden, 2 * c * (c + 1) * (dk + case.hidden)
            forward, backward = forward + products + triangles, backward + 2 * (products + triangles)
        else:
            forward += 6 * c * dk * dv + c * (c + 1) * (dk + dv)
            backward += 14 * c * dk * dv + c * (c + 1) * (2 * dk + 3 * dv)
    heads = case.batch * case.heads
    return {FORWARD: heads * forward, BOTH: heads * (forward + backward)}


def least_work(inputs) -> dict[str, dict[str, int]]:
    """For both directions what a call has to do at least: ``flops``, and ``bytes`` when inputs are read and results written once.

    The backward reads the inputs again: a model has thousands of other tensors in between.
    """
    case = inputs.case
    parts = [case] if case.lengths is None else [dataclasses.replace(case, batch=1, tokens=n, lengths=None) for n in case.lengths]
    size = lambda *tensors: sum(x.numel() * x.element_size() for x in tensors)
    read, out = size(*inputs.leaves().values()), size(inputs.grad_out)
    moved = {FORWARD: read + out, BOTH: 3 * read + 2 * out}
    return {d: {"flops": sum(flops(part)[d] for part in parts), "bytes": moved[d]} for d in DIRECTIONS}


# -------------------------------------------------------------------------------------------------------- contenders


def kernel(inputs, backend: str, direction: str, **options) -> Callable[[], tuple]:
    """The public function; ``options`` as in :func:`miras_kernels.override`."""
    import torch

    import miras_kernels

    arguments = {**inputs.arguments(), "output_final_state": False, "backend": backend}
    leaves = tuple(inputs.leaves().values())
    memory = miras_kernels.linear_memory if inputs.case.memory == "linear" else miras_kernels.mlp_memory

    def forward() -> tuple:
        with torch.no_grad():
            return (memory(**arguments)[0],)

    def both() -> tuple:
        with miras_kernels.override(**options):
            out, _ = memory(**arguments)
        return torch.autograd.grad(out, leaves, inputs.grad_out)

    return forward if direction == FORWARD else both


def eager(inputs, direction: str) -> Callable[[], tuple]:
    """The chunkwise matrix form in PyTorch; for the backward, autograd through it."""
    import torch

    from miras_kernels.backends.reference import chunkwise

    call, leaves = inputs.call(), tuple(inputs.leaves().values())

    def forward() -> tuple:
        with torch.no_grad():
            return (chunkwise.run(call)[0],)

    return forward if direction == FORWARD else lambda: torch.autograd.grad(chunkwise.run(call)[0], leaves, inputs.grad_out)


def compiled(inputs, direction: str) -> Callable[[], tuple]:
    """torch.compile of the whole of :func:`eager`."""
    import torch

    from miras_kernels.backends.reference import chunkwise

    call, names, leaves = inputs.call(), tuple(inputs.leaves()), tuple(inputs.leaves().values())

    def function(*tensors):
        return chunkwise.run(with_leaves(call, names, tensors))[0]

    run = torch.compile(function, dynamic=False, fullgraph=True)

    def forward() -> tuple:
        with torch.no_grad():
            return (run(*leaves),)

    return forward if direction == FORWARD else lambda: torch.autograd.grad(run(*leaves), leaves, inputs.grad_out)


def with_leaves(call, names: tuple[str, ...], tensors: tuple):
    """A call with other tensors in the places of its leaves, ``names`` as :meth:`Inputs.leaves` has them."""
    given = dict(zip(names, tensors, strict=True))
    duals = [given.pop(name) for name in names if name.startswith("initial_dual")]
    return call.replace(**given, state=call.state.replace_tensors(duals) if duals else call.state)


def derived(inputs, direction: str) -> Callable[[], tuple]:
    """The hand-derived backward in batched PyTorch, without autograd."""
    import torch

    from miras_kernels.backends.reference import derived as reference

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


def is_derived(inputs) -> bool:
    """Whether :func:`derived` covers a case; it gives no gradients of initial states."""
    from miras_kernels.backends.reference import derived as reference

    return reference.covers(inputs.call()) and not inputs.duals


def titans(inputs, direction: str) -> Callable[[], tuple]:
    """:func:`titans_layer` as a contender."""
    import torch

    run, leaves = titans_layer(inputs)

    def forward() -> tuple:
        with torch.no_grad():
            return (run(),)

    return forward if direction == FORWARD else lambda: torch.autograd.grad(run(), leaves, inputs.grad_out)


def titans_layer(inputs) -> tuple[Callable, tuple]:
    """The MLP memory of titans-pytorch in the same sizes, with gradients at each chunk's start; without projections and gates.

    Another recurrence, so that results cannot be compared: one decay per chunk, exact gelu, and queries read the state that
    their chunk began with. Not a dependency: ImportError where it is not installed.

    Returns:
        the function of its output ``[B, T, H, D]``, and what that can be differentiated by; both in the dtype and on the device of q.
    """
    import torch
    from titans_pytorch import NeuralMemory

    case, q = inputs.case, inputs.tensors["q"].detach().requires_grad_()
    memory = NeuralMemory(
        dim=case.heads * case.key_dim, heads=case.heads, dim_head=case.key_dim, chunk_size=case.chunk_size, batch_size=case.chunk_size,
        momentum=False, pre_rmsnorm=False, default_model_kwargs=dict(depth=2, expansion_factor=case.hidden / case.key_dim),
    )  # fmt: skip
    for name in ("to_queries", "to_keys", "to_values", "combine_heads"):
        setattr(memory, name, torch.nn.Identity())
    memory.retrieve_gate = None
    memory.memory_model.requires_grad_(False)  # a template: its weights are replaced
    memory.to(device=q.device, dtype=q.dtype)
    leaves = (q, *(x for x in memory.parameters() if x.requires_grad))
    return lambda: memory(q.flatten(2))[0].unflatten(-1, (case.heads, case.key_dim)), leaves


# ---------------------------------------------------------------------------------------------------------- parity


def parity(case, backend: str, dtype=None) -> dict:
    """The gate: outputs, final states and every gradient against float64, with the tests' own budgets."""
    import torch

    from miras_kernels.testing import check

    return gate(check(case, backend, dtype or torch.float32))


def parity_of(inputs, backend: str) -> dict:
    """The gate for float32 inputs that are not as the case draws them."""
    from miras_kernels.testing import evaluate, operands
    from miras_kernels.testing.parity import judge

    return gate(judge(inputs, evaluate(inputs, backend), operands(backend, inputs.grad_out.dtype)))


def gate(report) -> dict:
    """What the results have of a :class:`miras_kernels.testing.Report`."""
    errors = {row.name: row.error for row in report.rows}
    worst = report.worst
    return {
        "ok": report.ok,
        "forward_error": max(e for name, e in errors.items() if not name.startswith("grad_")),
        "gradient_error": max(e for name, e in errors.items() if name.startswith("grad_")),
        "worst": {"tensor": worst.name, "error": worst.error, "budget": worst.budget},
    }


def refusal(inputs, backend: str) -> str | None:
    """Why a backend cannot serve a call and its backward, or None."""
    from miras_kernels import dispatch

    return dispatch.explain(inputs.call(), differentiate=True)[backend]


def agreement(ours: tuple, theirs: tuple) -> float:
    """The largest relative difference between two contenders' results: do they compute the same thing?"""
    from miras_kernels.testing import relative_error

    return max(relative_error(x, y) for x, y in zip(ours, theirs, strict=True))
