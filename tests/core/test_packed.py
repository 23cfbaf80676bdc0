"""Packed sequences, some of them empty, and offsets that end before the tokens."""

from __future__ import annotations

import pytest
import torch

import miras_kernels as mk
from miras_kernels.testing import Case, check, evaluate

MLP = dict(memory="mlp", value_dim=16, hidden=8, decay="slight")
GATES = dict(retention=mk.LqRetention(), momentum=True)
#: each takes another path: kernels in registers or streamed, operators or autograd through the reference
KINDS = {"plain": {}, "gates": GATES, "channel": dict(decay="channel"), "mlp": MLP, "mlp-gates": {**MLP, **GATES}}
LENGTHS = [(0, 5, 0, 19), (0, 0, 7), (7, 0, 0), (0, 0), (7,), (16,)]
BACKENDS = ["reference", "cpp", "triton"]


def run(inputs, backend, **changes):
    memory = inputs.case.function
    return memory(**{**inputs.arguments(), **changes}, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_empty_sequences(kind, backend, poisoned):
    """Results and gradients are correct; an empty sequence's state and gradient pass through unchanged."""
    if backend == "triton" and kind in ("channel", "mlp-gates"):
        pytest.skip("slow in the interpreter, and where chunks lie is the same for all of its kernels")
    for lengths in LENGTHS[: 1 if backend == "triton" else None]:
        case = Case("empty", lengths=lengths, heads=1, key_dim=16, **{"value_dim": 8, **KINDS[kind]})
        inputs = case.draw(torch.float32) if any(lengths) else _drawn_empty(case)
        if any(lengths):
            report = check(case, backend)
            assert report.ok, (lengths, report)
        found, empty = evaluate(inputs, backend), [i for i, length in enumerate(lengths) if length == 0]
        for name, given, grad in (("dual", inputs.duals, inputs.grad_duals), ("momentum", inputs.momenta, inputs.grad_momenta)):
            for i, (x, g) in enumerate(zip(given, grad, strict=True)):
                assert torch.equal(found[f"final_{name}_{i}"][empty], x[empty]), (lengths, name)
                assert torch.equal(found[f"grad_initial_{name}_{i}"][empty], g[empty]), (lengths, name)


def _drawn_empty(case):
    """Inputs without tokens, cut from a case that has some."""
    inputs = Case("full", lengths=(1,) * len(case.lengths), **{n: getattr(case, n) for n in KEPT}).draw(torch.float32)
    tensors = {n: x if n.startswith("ln_") else x.detach()[:, :0].requires_grad_() for n, x in inputs.tensors.items()}
    return type(inputs)(case, tensors, inputs.duals, inputs.grad_out[:, :0], inputs.grad_duals, inputs.momenta, inputs.grad_momenta)


KEPT = ("memory", "heads", "key_dim", "value_dim", "hidden", "decay", "retention", "momentum")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["plain", "mlp-gates"])
def test_an_open_chunk_stays_open(kind, backend, poisoned):
    """A sequence inside a chunk that gets no tokens keeps its position; its neighbour continues."""
    case = Case("open", lengths=(3, 5, 4), heads=1, key_dim=16, **{"value_dim": 8, **KINDS[kind]})
    inputs = case.draw(torch.float32)
    more = Case("more", lengths=(0, 13, 0), seed=1, heads=1, key_dim=16, **{"value_dim": 8, **KINDS[kind]}).draw(torch.float32)
    with torch.no_grad():
        _, before = run(inputs, backend)
        out, after = run(more, backend, initial_state=before)
        wanted, _ = run(more, "reference", initial_state=before)
    assert torch.allclose(out, wanted, atol=1e-4)
    for x, y in zip(before.map(lambda x: x[::2]).tensors(), after.map(lambda x: x[::2]).tensors(), strict=True):
        assert torch.equal(x, y)
    assert after.open_chunk.position.tolist() == [3, 2, 4]


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled(backend):
    """The operators' fakes give the shapes of saved tensors for any offsets."""
    for lengths in ((0, 5, 19), (32,), (0, 16, 0, 16)):
        inputs = Case("compiled", lengths=lengths, heads=1).draw(torch.float32)
        with mk.override(checkpoint_every=1):
            torch.library.opcheck(torch.ops.miras_kernels.memory, _operator(inputs, backend), test_utils="test_faketensor")


def _operator(inputs, backend) -> tuple:
    from miras_kernels.autograd import _flatten

    return (*_flatten(inputs.call()), backend, 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_tokens_after_the_last_offset(kind, backend, poisoned):
    """Offsets are not checked on a device: tokens beyond them have outputs and gradients of 0."""
    inputs = Case("short", lengths=(5, 14), heads=1, key_dim=16, **{"value_dim": 8, **KINDS[kind]}).draw(torch.float32)
    whole = evaluate(inputs, "reference")
    longer = {n: x if n.startswith("ln_") else x.detach().repeat_interleave(2, 1) for n, x in inputs.tensors.items()}
    for n, x in longer.items():
        if not n.startswith("ln_"):
            x[:, :19] = inputs.tensors[n].detach()
        longer[n] = x.detach().requires_grad_()
    padded = type(inputs)(
        inputs.case, longer, inputs.duals, torch.cat([inputs.grad_out, torch.ones_like(inputs.grad_out)], 1), inputs.grad_duals,
        inputs.momenta, inputs.grad_momenta,
    )  # fmt: skip
    with mk.override(check_values=False):
        found = evaluate(padded, backend)
    for name, x in found.items():
        if x.shape[1:2] == (38,):
            assert torch.equal(x[:, 19:], torch.zeros_like(x[:, 19:])), name
            x = x[:, :19]
        assert torch.allclose(x, whole[name], atol=2e-4, rtol=1e-3), name
