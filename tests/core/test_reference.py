"""The reference, checked against independent numbers, against its other forms, and by finite differences."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

import vectors
from miras_kernels.backends.reference import chunkwise, definition, derived
from miras_kernels.memory import run
from miras_kernels.tables import memories
from miras_kernels.testing import Case, evaluate, registry, relative_error
from miras_kernels.testing.case_list import BIASES, GATES
from miras_kernels.validation import make_call
from quick import or_slow, sample

# Two float64 computations of one function: 2^-53 times condition and reduction lengths is far below this.
EXACT = 1e-9


def assert_same(found: dict, wanted: dict, bound: float = EXACT) -> None:
    assert found.keys() == wanted.keys()
    errors = {name: relative_error(found[name], wanted[name]) for name in wanted}
    assert max(errors.values()) <= bound, {name: e for name, e in errors.items() if e > bound}


@pytest.mark.parametrize("path", vectors.FILES, ids=lambda p: p.stem)
@pytest.mark.parametrize("form", ["definition", "chunkwise", "public"])
def test_vectors(path, form):
    config, tensors = vectors.load(path)
    keywords, leaves = vectors.arguments(config, tensors)
    memory = memories.TABLE[config["memory"]]
    if form == "public":
        out, state = run(memory, **keywords, backend="reference")
    else:
        call = make_call(memory, **keywords)
        out, state = {"definition": definition.run, "chunkwise": chunkwise.run}[form](call)
    assert_same(vectors.results(out, state, tensors, leaves), vectors.expected(tensors, leaves))


def test_every_pair_of_properties_has_a_case():
    for memory in ("linear", "mlp"):
        cases = [c for c in registry(memory) if "-pairs-" in c.name]
        options = [("bias", BIASES.values()), ("retention", GATES.values()), ("momentum", (False, True)), ("decay", ("scalar", "none"))]
        if memory == "linear":
            options[-1] = ("decay", ("scalar", "none", "channel", "strong"))
            options += [("lr", ("scalar", "channel")), ("delta", ("token", "channel"))]
        options.append(("initial", ("dual", "shared") if memory == "mlp" else ("dual", "shared", "none")))
        for (one, values), (other, others) in itertools.combinations(options, 2):
            found = {(getattr(c, one), getattr(c, other)) for c in cases}
            assert found == set(itertools.product(values, others)), (memory, one, other)
        assert len(cases) <= len(BIASES) * len(GATES) + 5  # every pair of the two largest factors needs a case


def test_all_vectors_exist():
    assert len(vectors.FILES) == 17


SMALL_ENOUGH = [c for c in registry() if c.tokens * c.key_dim <= 4096]


@pytest.mark.parametrize("case", or_slow(SMALL_ENOUGH, sample(SMALL_ENOUGH)))
def test_matrix_form_equals_the_definition(case):
    inputs = case.draw(torch.float64)
    assert_same(evaluate(inputs, chunkwise.run), evaluate(inputs, definition.run))


@pytest.mark.parametrize("case", registry("linear"), ids=str)
def test_hand_derived_form(case):
    inputs = case.draw(torch.float64)
    call = inputs.call()
    if not derived.covers(call):
        assert case.momentum or case.lr == "channel" or case.decay.endswith("channel") or case.retention.tag != 0
        return
    with torch.no_grad():
        out, state, saved = derived.forward(call)
        grads = derived.backward(call, saved, inputs.grad_out, inputs.grad_duals[0])
    wanted = evaluate(inputs, chunkwise.run)
    if inputs.duals:
        dual = grads.pop("dual")
        wanted_dual = wanted.pop("grad_initial_dual_0")
        assert relative_error(dual.sum(0) if case.initial == "shared" else dual, wanted_dual) <= EXACT
    else:
        grads.pop("dual")
    if case.delta == "float":
        grads.pop("delta", None)
    found = {"out": out, "final_dual_0": state.dual[0]} | {f"grad_{name}": g for name, g in grads.items()}
    assert_same(found, wanted)


@pytest.mark.parametrize("bias", BIASES.values(), ids=lambda b: b.name)
def test_psi_is_the_gradient_of_the_loss_and_psi_vjp_its_derivative(bias):
    torch.manual_seed(1)
    pred, v = (torch.randn(200, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    delta = (0.5 + torch.rand(200, 1, dtype=torch.float64)).requires_grad_() if bias.needs_delta else None
    psi = bias.psi(pred, v, delta)
    loss = bias.loss(pred, v, delta)
    if loss is None:
        assert bias.name in ("lp_smooth", "custom")
    else:
        (gradient,) = torch.autograd.grad(loss.sum(), pred, retain_graph=True)
        torch.testing.assert_close(psi, gradient, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(pred)
    leaves = [pred, v] + ([delta] if bias.needs_delta else [])
    wanted = torch.autograd.grad(psi, leaves, grad, allow_unused=True)
    with torch.no_grad():
        d_pred, d_v, d_delta = bias.psi_vjp(pred, v, delta, grad)
    torch.testing.assert_close(d_pred, torch.zeros_like(pred) if wanted[0] is None else wanted[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(d_v, wanted[1], rtol=1e-10, atol=1e-10)
    assert bias.reads_memory == (wanted[0] is not None)
    if bias.needs_delta:
        torch.testing.assert_close(d_delta.sum(-1, keepdim=True), wanted[2], rtol=1e-10, atol=1e-10)


SMALL = dict(batch=1, tokens=5, heads=1, key_dim=3, value_dim=3, chunk_size=2)


@pytest.mark.parametrize(
    "case",
    [Case(f"{b.name}", bias=b, momentum=i % 2 == 1, seed=i, **SMALL) for i, b in enumerate(BIASES.values())]
    + [Case(f"gate-{g.name}", retention=g, seed=i, **SMALL) for i, g in enumerate(GATES.values())]
    + [Case("channel", decay="channel", lr="channel", seed=3, **SMALL)]
    + [Case(f"mlp-{g.name}", memory="mlp", hidden=4, retention=g, seed=i, **SMALL) for i, g in enumerate(GATES.values())],
    ids=str,
)
def test_gradcheck(case):
    inputs = case.draw(torch.float64)
    names = list(inputs.leaves())

    def function(*leaves):
        given = dict(zip(names, leaves, strict=True))
        duals, momenta = (tuple(given.pop(n) for n in names if n.startswith(f"initial_{kind}")) for kind in ("dual", "momentum"))
        moved = dataclasses.replace(inputs, tensors=given, duals=duals, momenta=momenta)
        memory = case.function
        out, state = memory(**moved.arguments(), backend="reference")
        return out, *state.matrices()

    assert torch.autograd.gradcheck(function, tuple(inputs.leaves().values()), fast_mode=case.memory == "mlp")


@pytest.mark.parametrize("form", [definition.run, chunkwise.run], ids=["definition", "chunkwise"])
@pytest.mark.parametrize(
    "case",
    [c for c in registry() if c.lengths is None and 30 <= c.tokens <= 40 and c.chunk_size == 16 and c.seed % 3 == 0],
    ids=str,
)
def test_gradients_flow_through_a_cut_anywhere(case, form):
    inputs = case.draw(torch.float64)
    whole = evaluate(inputs, form)

    def pieces(call):
        state, outs = call.state, []
        for a, b in ((0, 5), (5, 21), (21, 22), (22, 32), (32, call.q.shape[1])):
            tokens = {name: getattr(call, name) for name in call.PER_TOKEN}
            tokens = {name: None if x is None else x[:, a:b] for name, x in tokens.items()}
            out, state = form(call.replace(**tokens, state=state))
            outs.append(out)
        return torch.cat(outs, 1), state

    assert_same(evaluate(inputs, pieces), whole)
