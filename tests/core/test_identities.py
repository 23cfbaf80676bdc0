"""Identities of the recurrence and independence of results, on every backend."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

import miras_kernels as mk
from miras_kernels import Huber
from miras_kernels.backends.reference import chunkwise
from miras_kernels.testing import Case, evaluate, registry, relative_error
from miras_kernels.testing.case_list import BIASES
from miras_kernels.testing.parity import ARITHMETIC, compare, expect
from miras_kernels.testing.steps import results

TOKENS = ("q", "k", "v", "lr", "log_decay", "delta", "momentum")
# Two float32 orders of the same sums over a few dozen terms: a random walk of roundings, with a margin for the conditioning.
# LayerNorm divides by the spread of its input and so enlarges them, as does psi's slope.
CLOSE = 64 * ARITHMETIC
MLP_CLOSE = 16 * CLOSE
SHAPES = {"linear": {}, "mlp": dict(memory="mlp", key_dim=16, value_dim=16, hidden=24)}


@pytest.fixture(params=SHAPES)
def shape(request) -> dict:
    """A memory, as arguments of a case."""
    return SHAPES[request.param]


def memory(arguments: dict, backend: str):
    """The memory that takes the arguments."""
    return (mk.mlp_memory if "ln_weight" in arguments else mk.linear_memory)(**arguments, backend=backend)


def run(inputs, backend, **changes):
    return memory({**inputs.arguments(), **changes}, backend)


def close(a: torch.Tensor, b: torch.Tensor, shape: dict) -> bool:
    return relative_error(a, b) < (MLP_CLOSE if shape else CLOSE)


def same(backend: str, a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bitwise for the kernels; PyTorch's batched products may depend on the batch size."""
    return torch.equal(a, b) if backend == "cpp" else relative_error(a, b) < CLOSE


def cut(arguments: dict, a: int, b: int) -> dict:
    return {name: x[:, a:b] if isinstance(x, torch.Tensor) and name in TOKENS else x for name, x in arguments.items()}


def in_pieces(inputs, bounds, backends):
    """Outputs and final state of the sequence read in pieces, by alternating backends."""
    arguments, outs = inputs.arguments(), []
    state = arguments.pop("initial_state")
    for i, (a, b) in enumerate(itertools.pairwise(bounds)):
        out, state = memory({**cut(arguments, a, b), "initial_state": state}, backends[i % len(backends)])
        outs.append(out)
    return torch.cat(outs, 1), state


CUTS = [[0, 37], [0, 5, 37], [0, 16, 32, 37], [0, 1, 2, 15, 16, 17, 36, 37], list(range(38))]


@pytest.mark.parametrize("backends", [("reference",), ("cpp",), ("cpp", "reference")], ids="+".join)
@pytest.mark.parametrize("bounds", CUTS, ids=lambda b: f"{len(b) - 1}-pieces")
@pytest.mark.parametrize("bias", BIASES.values(), ids=lambda b: b.name)
def test_pieces_equal_the_whole(bias, bounds, backends, shape):
    inputs = Case("pieces", bias=bias, tokens=37, **shape).draw(torch.float32)
    with torch.no_grad():
        wanted, end = run(inputs, backends[0])
        found, state = in_pieces(inputs, bounds, backends)
    assert close(found, wanted, shape)
    assert torch.equal(state.open_chunk.position, end.open_chunk.position)
    for a, b in zip(state.tensors(), end.tensors(), strict=True):
        assert close(a, b, shape)


WHOLE = [c for c in registry() if c.lengths is None and c.tokens == 37 and c.chunk_size == 16]


@pytest.mark.parametrize("case", WHOLE, ids=str)
def test_pieces_equal_the_whole_on_the_reference(case):
    inputs = case.draw(torch.float64)
    with torch.no_grad():
        wanted, end = run(inputs, "reference")
        found, state = in_pieces(inputs, [0, 5, 6, 32, 37], ["reference"])
    assert relative_error(found, wanted) < 1e-9
    for a, b in zip(state.tensors(), end.tensors(), strict=True):
        assert relative_error(a, b) < 1e-9


@pytest.mark.parametrize("backends", [("cpp",), ("cpp", "reference")], ids="+".join)
@pytest.mark.parametrize("case", [c for c in WHOLE if c.retention.tag or c.momentum or "channel" in (c.lr, c.decay)], ids=str)
def test_pieces_equal_the_whole_with_every_gate(case, backends):
    inputs = case.draw(torch.float32)
    with torch.no_grad():
        wanted = expect(inputs, torch.float32, lambda x: results(*chunkwise.run(x.call())))
        for bounds in ([0, 5, 6, 32, 37], list(range(38))):
            out, state = in_pieces(inputs, bounds, backends)
            assert state.open_chunk.position.tolist() == [37 % 16] * case.batch
            report = compare(case, torch.float32, results(out, state), wanted)
            assert report.ok, report


@pytest.mark.parametrize("bias", [mk.L2(), Huber("coordinate"), Huber("switch")], ids=lambda b: b.name)
def test_gradients_through_a_cut_at_a_chunk_boundary(bias, backend, shape):
    inputs = Case("cut", bias=bias, tokens=48, **shape).draw(torch.float32)
    wanted = evaluate(inputs, backend)
    out, state = in_pieces(inputs, [0, 16, 48], [backend])
    leaves = inputs.leaves()
    grads = torch.autograd.grad((out, *state.dual), tuple(leaves.values()), (inputs.grad_out, *inputs.grad_duals))
    for name, grad in zip(leaves, grads, strict=True):
        assert close(grad, wanted[f"grad_{name}"], shape), name


def test_gradients_through_a_cut_inside_a_chunk_are_refused_by_the_kernels(shape):
    inputs = Case("cut", tokens=21, **shape).draw(torch.float32)
    _, state = run(inputs, "cpp")
    with pytest.raises(
        ValueError, match="'cpp' cannot serve this call: it does not differentiate from a state that was cut inside a chunk"
    ):
        run(inputs, "cpp", initial_state=state)
    _, again = run(inputs, "auto", initial_state=state)  # "auto" takes the reference, whose gradient reaches the kernel's state
    with pytest.raises(RuntimeError, match="'cpp' backend does not differentiate through a state that was cut inside a chunk"):
        again.dual[0].sum().backward()
    run(inputs, "cpp", initial_state=state.detach(), **{n: t.detach() for n, t in inputs.tensors.items()})
    _, state = run(inputs, "reference")
    _, state = run(inputs, "reference", initial_state=state)
    state.dual[0].sum().backward()


@pytest.mark.parametrize("bias", [*BIASES.values()], ids=lambda b: b.name)
def test_packed_equals_each_alone(bias, backend, shape):
    case = Case("packed", bias=bias, lengths=(1, 16, 30, 5, 33), **shape)
    inputs = case.draw(torch.float32)
    packed = evaluate(inputs, backend)
    start, outs = 0, []
    for n, length in enumerate(case.lengths):
        arguments = cut(inputs.arguments(), start, start + length)
        duals = tuple(x[n : n + 1] for x in inputs.duals)
        arguments |= {"cu_seqlens": None, "initial_state": duals if shape else duals[0]}
        out, state = memory(arguments, backend)
        for i, dual in enumerate(state.dual):
            assert same(backend, dual, packed[f"final_dual_{i}"][n : n + 1])
        outs.append(out)
        start += length
    assert same(backend, torch.cat(outs, 1), packed["out"])


def test_packed_states_continue_as_a_batch(backend, shape):
    """Sequences of different lengths end at different positions in their chunks, and continue from there."""
    case = Case("packed", lengths=(3, 21, 16), initial="shared", **shape)
    inputs = case.draw(torch.float32)
    more = Case("more", batch=3, tokens=20, seed=5, **shape).draw(torch.float32)
    norm = {name: inputs.tensors[name] for name in ("ln_weight", "ln_bias") if shape}
    with torch.no_grad():
        _, state = run(inputs, backend)
        out, _ = run(more, backend, initial_state=state, **norm)
        start = 0
        for n, length in enumerate(case.lengths):
            first = cut(inputs.arguments(), start, start + length)
            second = {name: x[n : n + 1] if isinstance(x, torch.Tensor) else x for name, x in more.arguments().items()}
            both = {name: torch.cat([first[name], second[name]], 1) for name in ("q", "k", "v", "lr", "log_decay")}
            both |= {"initial_state": inputs.duals if shape else inputs.duals[0], "chunk_size": 16, **norm}
            wanted, _ = memory(both, backend)
            assert close(out[n : n + 1], wanted[:, length:], shape)
            start += length


def test_chunk_one_without_decay_is_the_delta_rule(backend):
    inputs = Case("delta-rule", chunk_size=1, decay="none", tokens=30, initial="none").draw(torch.float32)
    q, k, v, lr = (inputs.tensors[n].detach().double() for n in ("q", "k", "v", "lr"))
    w, wanted = torch.zeros(2, 2, 12, 16, dtype=torch.float64), []
    for t in range(30):
        error = torch.einsum("bhvk,bhk->bhv", w, k[:, t]) - v[:, t]
        w = w - lr[:, t, :, None, None] * error.unsqueeze(-1) * k[:, t].unsqueeze(-2)
        wanted.append(torch.einsum("bhvk,bhk->bhv", w, q[:, t]))
    assert relative_error(run(inputs, backend)[0], torch.stack(wanted, 1)) < CLOSE


def test_the_dot_product_is_linear_attention(backend):
    inputs = Case("linear-attention", bias=mk.DotProduct(), decay="none", initial="none").draw(torch.float32)
    q, k, v, lr = (inputs.tensors[n].detach().double() for n in ("q", "k", "v", "lr"))
    scores = torch.einsum("bthk,bshk->bhts", q, k).tril()
    wanted = torch.einsum("bhts,bsh,bshv->bthv", scores, lr, v)
    assert relative_error(run(inputs, backend)[0], wanted) < CLOSE


def test_p_two_is_twice_l2(backend):
    inputs = Case("p2", bias=mk.Lp(2.0)).draw(torch.float32)
    found, wanted = evaluate(inputs, backend), run(inputs, backend, bias=mk.L2(), lr=2 * inputs.tensors["lr"])
    assert relative_error(found["out"], wanted[0]) < CLOSE


@pytest.mark.parametrize(
    "bias, delta", [(Huber("coordinate"), 1e6), (Huber("norm"), 1e6), (Huber("switch"), 1e6), (mk.RobustL2(), 0.0)], ids=str
)
def test_a_wide_threshold_is_l2(bias, delta, backend):
    inputs = Case("wide", bias=mk.L2()).draw(torch.float32)
    wanted = evaluate(inputs, backend)
    found = evaluate(dataclasses.replace(inputs, case=_with(inputs.case, bias, delta)), backend)
    for name, x in wanted.items():
        assert relative_error(found[name], x) < CLOSE, name


def _with(case: Case, bias, delta: float) -> Case:
    class Fixed(Case):
        delta_scale = delta

    return Fixed(**{**vars(case), "bias": bias, "delta": "float"})


@pytest.mark.parametrize("bias", BIASES.values(), ids=lambda b: b.name)
def test_batch_and_head_invariance(bias, backend, shape):
    """A sequence gives the same bits alone, in a batch, and as another head. (The heads of one sample fill two threads.)"""
    inputs = Case("batch", bias=bias, batch=3, heads=2, **shape).draw(torch.float32)
    arguments = inputs.arguments()
    out, state = run(inputs, backend)
    alone, alone_state = memory(arguments | _tokens(arguments, lambda x: x[1:2]) | _duals(arguments, lambda x: x[1:2]), backend)
    assert same(backend, alone, out[1:2])
    assert all(same(backend, a, x[1:2]) for a, x in zip(alone_state.dual, state.dual, strict=True))
    swapped = arguments | _tokens(arguments, lambda x: x.flip(2)) | _duals(arguments, lambda x: x.flip(1))
    swapped |= {n: arguments[n].flip(0) for n in ("ln_weight", "ln_bias") if shape}
    assert same(backend, memory(swapped, backend)[0], out.flip(2))


def _tokens(arguments: dict, f) -> dict:
    return {n: f(arguments[n]) for n in TOKENS if isinstance(arguments[n], torch.Tensor)}


def _duals(arguments: dict, f) -> dict:
    x = arguments["initial_state"]
    return {"initial_state": f(x) if isinstance(x, torch.Tensor) else tuple(map(f, x))}


@pytest.mark.parametrize("bias", BIASES.values(), ids=lambda b: b.name)
@pytest.mark.parametrize("t", [0, 7, 16, 31, 36])
def test_no_output_depends_on_a_later_token(bias, t, backend, shape):
    inputs = Case("causal", bias=bias, **shape).draw(torch.float32)
    arguments = inputs.arguments()
    changed = arguments | _tokens(arguments, lambda x: _disturbed(x, t))
    before, after = run(inputs, backend)[0], memory(changed, backend)[0]
    assert torch.equal(before[:, :t], after[:, :t])
    assert not torch.equal(before[:, t:], after[:, t:])


def _disturbed(x, t):
    x = x.detach().clone()
    x[:, t:] *= 0.5
    return x


@pytest.mark.parametrize("bias", BIASES.values(), ids=lambda b: b.name)
def test_no_sample_depends_on_another(bias, backend, shape):
    inputs = Case("samples", bias=bias, **shape).draw(torch.float32)
    arguments = inputs.arguments()
    changed = arguments | _tokens(arguments, lambda x: _disturbed(x.transpose(0, 1), 1).transpose(0, 1))
    before, after = run(inputs, backend)[0], memory(changed, backend)[0]
    assert torch.equal(before[0], after[0])
    assert not torch.equal(before[1], after[1])


@pytest.mark.parametrize("bias", [b for b in BIASES.values() if b.reads_memory], ids=lambda b: b.name)
def test_storing_a_chunk_twice_lowers_the_inner_loss(bias, backend):
    case = Case("twice", bias=bias, tokens=16, decay="none", initial="none")
    inputs = case.draw(torch.float32)
    _, once = run(inputs, backend)
    _, twice = run(inputs, backend, initial_state=once)
    k, v, delta = inputs.tensors["k"].double(), inputs.tensors["v"].double(), inputs.tensors.get("delta")

    def loss(dual):
        pred = torch.einsum("bhvk,bthk->bthv", dual.double(), k)
        shift = None if delta is None else delta.double().unsqueeze(-1)
        value = bias.loss(pred, v, shift)
        return (pred - v).square().sum().item() if value is None else value.sum().item()

    empty, first, second = loss(torch.zeros_like(once.dual[0])), loss(once.dual[0]), loss(twice.dual[0])
    assert second < first < empty


def test_the_retention_strength_changes_the_result(backend, shape):
    inputs = Case("retention", **shape).draw(torch.float32)
    weak = run(inputs, backend)
    strong = run(inputs, backend, log_decay=5 * inputs.tensors["log_decay"])
    none = run(inputs, backend, log_decay=None)
    for a, b in ((weak, strong), (weak, none)):
        assert relative_error(a[0], b[0]) > 0.01
        assert all(relative_error(x, y) > 0.01 for x, y in zip(a[1].dual, b[1].dual, strict=True))
    zero = run(inputs, backend, log_decay=torch.zeros_like(inputs.tensors["log_decay"]))
    assert close(zero[0], none[0], shape)


@pytest.mark.parametrize("bias", BIASES.values(), ids=lambda b: b.name)
def test_zeros_stay_finite(bias, backend):
    inputs = Case("zeros", bias=bias, initial="none").draw(torch.float32)
    with torch.no_grad():
        for name in ("q", "k", "v"):
            inputs.tensors[name].zero_()
    results = evaluate(inputs, backend)
    assert all(x.isfinite().all() for x in results.values())
    assert not results["out"].any()


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("name", ["auto", "reference", "cpp"])
def test_calls_without_tokens_or_sequences(shape, name):
    b, t = shape
    q, v, lr = torch.zeros(b, t, 2, 8), torch.zeros(b, t, 2, 6), torch.zeros(b, t, 2)
    dual = torch.randn(b, 2, 6, 8)
    out, state = mk.linear_memory(q, q, v, lr, initial_state=dual, output_final_state=True, backend=name)
    assert out.shape == (b, t, 2, 6) and torch.equal(state.dual[0], dual)
    _, again = mk.linear_memory(q, q, v, lr, initial_state=state, output_final_state=True, backend=name)
    for before, after in ((dual, state.dual[0]), (state.dual[0], again.dual[0])):  # writing into one does not change the other
        assert before.numel() == 0 or before.data_ptr() != after.data_ptr()
    w1, w2 = torch.randn(b, 2, 8, 12), torch.randn(b, 2, 12, 8)
    norm = dict(ln_weight=torch.ones(2, 8), ln_bias=torch.zeros(2, 8))
    out, state = mk.mlp_memory(q, q, q, lr, initial_state=(w1, w2), **norm, output_final_state=True, backend=name)
    assert out.shape == q.shape and torch.equal(state.dual[0], w1) and torch.equal(state.dual[1], w2)
