"""What is compared: the kernels, their baselines in PyTorch, and how many operations a call takes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import miras_kernels

FORWARD, BOTH = "forward", "forward+backward"
DIRECTIONS = (FORWARD, BOTH)
Run = Callable[[], tuple]

#: variants of the recurrence: plain (L2Retention, no momentum, scalar gates), momentum, or a gate per value channel; and by their
#: names the retention gates of the table
PLAIN, MOMENTUM = "plain", "momentum"
CHANNEL_WISE = {"channel-wise lr": {"lr": "channel"}, "channel-wise log_decay": {"decay": "channel"}}


def retentions() -> dict[str, object]:
    """The retention gates of the table by name, other than the plain one."""
    from miras_kernels.tables import retention

    return {row.name: row for row in retention.TABLE.values() if row.name != "l2"}


def recurrences(memory: str) -> tuple[str, ...]:
    """The variants of a memory's recurrence, the plain one first; only the linear memory has channel-wise gates."""
    return (PLAIN, *retentions(), MOMENTUM, *(CHANNEL_WISE if memory == "linear" else ()))


def recurrence(name: str) -> dict:
    """The fields of a ``Case`` that select a variant."""
    if name in retentions():
        return {"retention": retentions()[name]}
    return {PLAIN: {}, MOMENTUM: {"momentum": True}, **CHANNEL_WISE}[name]


def kernel(inputs, backend: str, direction: str, **options) -> Run:
    """The public function; ``options`` as in :func:`miras_kernels.override`."""
    arguments = {**inputs.arguments(), "output_final_state": False, "backend": backend}
    memory = miras_kernels.mlp_memory if inputs.case.memory == "mlp" else miras_kernels.linear_memory  # in older trees too, for --base

    def run() -> Tensor:
        with miras_kernels.override(**options):
            return memory(**arguments)[0]

    return differentiated(run, tuple(inputs.leaves().values()), inputs.grad_out, direction)


def differentiated(run: Callable[[], Tensor], leaves: tuple[Tensor, ...], grad_out: Tensor, direction: str) -> Run:
    """The output of a function, or the gradients of its leaves."""

    def forward() -> tuple:
        with torch.no_grad():
            return (run(),)

    def both() -> tuple:
        out = run()
        return torch.autograd.grad(out, leaves, grad_out.to(out.dtype))

    return forward if direction == FORWARD else both


def matrix_form(call):
    """The chunkwise matrix form in PyTorch; with 16-bit inputs its matrix products are 16-bit (autocast), the rest is float32."""
    from miras_kernels.backends.reference import chunkwise

    if call.q.dtype not in (torch.bfloat16, torch.float16):
        return chunkwise.run(call)
    wide = call.state.dual[0].dtype
    with torch.autocast(call.q.device.type, dtype=call.q.dtype):
        return chunkwise.run(call.replace(q=call.q.to(wide), k=call.k.to(wide), v=call.v.to(wide)))


def eager(inputs, direction: str) -> Run:
    """:func:`matrix_form`, with a backward by autograd."""
    call = inputs.call()
    return differentiated(lambda: matrix_form(call)[0], tuple(inputs.leaves().values()), inputs.grad_out, direction)


def compiled(inputs, direction: str) -> Run:
    """torch.compile of all of :func:`matrix_form`."""
    call, names, leaves = inputs.call(), tuple(inputs.leaves()), tuple(inputs.leaves().values())

    def function(*tensors: Tensor) -> Tensor:
        given = dict(zip(names, tensors, strict=True))
        duals = [given.pop(name) for name in names if name.startswith("initial_dual")]
        return matrix_form(call.replace(**given, state=call.state.replace_tensors(duals) if duals else call.state))[0]

    torch.compiler.reset()
    run = torch.compile(function, dynamic=False, fullgraph=True)
    return differentiated(lambda: run(*leaves), leaves, inputs.grad_out, direction)


def derived(inputs, direction: str) -> Run | None:
    """The hand-derived backward in batched PyTorch, without autograd; None where it does not cover the case."""
    from miras_kernels.backends.reference import derived as reference

    call, names = inputs.call(), tuple(inputs.leaves())
    if inputs.duals or not reference.covers(call):  # it gives no gradients of initial states
        return None

    @torch.no_grad()
    def forward() -> tuple:
        return (reference.forward(call)[0],)

    @torch.no_grad()
    def both() -> tuple:
        _, _, saved = reference.forward(call)
        grads = reference.backward(call, saved, inputs.grad_out, None)
        return tuple(grads[name] for name in names)

    return forward if direction == FORWARD else both


def titans(inputs, direction: str) -> Run:
    """The MLP memory of titans-pytorch in the same sizes, with gradients at each chunk's start; without projections and gates. It computes
    another recurrence, so its results cannot be compared: one decay per chunk, exact gelu, and queries read the state at their chunk's
    start. Not a dependency: ImportError where it is not installed."""
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
    run = lambda: memory(q.flatten(2))[0].unflatten(-1, (case.heads, case.key_dim))
    return differentiated(run, leaves, inputs.grad_out, direction)


def agreement(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> float:
    """The largest relative difference between two implementations' results: do they compute the same function?"""
    worst = 0.0
    for x, y in zip(ours, theirs, strict=True):
        x, y = x.detach().double(), y.detach().double()
        difference = ((x - y).norm() / y.norm().clamp_min(1e-30)).item()
        worst = max(worst, difference) if difference == difference else float("inf")
    return worst


def flops(case) -> dict[str, int]:
    """Useful floating-point operations: a triangle counts as a triangle, recomputation does not count. ``case`` is a test case or anything
    with its sizes."""
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
