"""The Triton kernels against the float64 reference: on a GPU if there is one, otherwise in Triton's interpreter."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import miras_kernels as mk
from miras_kernels import dispatch
from miras_kernels.tables.retention import TABLE as GATES
from miras_kernels.testing import Case, check, evaluate, registry, relative_error, truth
from miras_kernels.testing.case_list import BIASES
from miras_kernels.testing.parity import judge, margin
from quick import combinations, or_slow, sample, slow

triton_backend = dispatch.BACKENDS["triton"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


SERVED = [case for case in registry("linear") if case.chunk_size <= 128]
MLP = [case for case in registry("mlp") if case.chunk_size in (16, 32, 64)]


def smaller(case: Case) -> Case:
    """A case that the interpreter can run, which takes programs one after the other and about a millisecond for every operation.

    One head of one sequence, unless their positions matter; and at most three chunks and a part of one.
    """
    if DEVICE == "cuda":
        return case
    together = case.initial == "shared" or case.layout != "contiguous" or "many-heads" in case.name
    fewer = dict(batch=min(case.batch, 2 if together else 1), heads=min(case.heads, 2 if together or case.lengths else 1))
    return dataclasses.replace(case, tokens=min(case.tokens, 3 * case.chunk_size + 2), **fewer)


LINEAR_CASES, MLP_CASES = list(map(smaller, SERVED)), list(map(smaller, MLP))
#: those whose chains can hold their states in registers
PLAIN = [case for case in LINEAR_CASES if case.retention.is_identity and not case.momentum and not case.decay.endswith("channel")]


def test_what_is_served():
    """The kernels refuse all cases that are not tested below by name."""
    others = set(registry()) - set(SERVED) - set(MLP)
    assert others and all(triton_backend.refuses(case.draw(torch.float32).call(), True) for case in others)
    assert {case.bias.tag for case in SERVED} == {case.bias.tag for case in MLP} == set(BIASES)
    assert {case.retention.tag for case in SERVED} == {case.retention.tag for case in MLP} == set(GATES)


@pytest.mark.parametrize("case", or_slow(LINEAR_CASES, sample(LINEAR_CASES)))
def test_float32(case, poisoned):
    report = check(case, "triton", device=DEVICE)
    assert report.ok, report


@pytest.mark.parametrize("case", or_slow(MLP_CASES, sample(MLP_CASES)[1::2]))
def test_mlp_float32(case, poisoned):
    report = check(case, "triton", device=DEVICE)
    assert report.ok, report


@pytest.mark.parametrize(
    ("bias", "dtype"),
    combinations([mk.L2(), mk.Huber("switch"), mk.DotProduct()], [torch.bfloat16, torch.float16], quick=lambda i, j: i % 2 == j),
    ids=lambda x: getattr(x, "name", str(x)),
)
def test_mlp_sixteen_bits(bias, dtype, poisoned):
    """Two chunks: rounding errors of an inner MLP grow with the sequence, in the reference too."""
    case = Case("mlp16", memory="mlp", bias=bias, tokens=27, batch=1, key_dim=16, value_dim=16, hidden=40, decay="slight")
    report = check(case, "triton", dtype, DEVICE)
    assert report.ok, report


@pytest.mark.parametrize(
    ("gate", "momentum"),
    combinations([mk.LqRetention(), mk.KLRetention(), mk.SigmoidRetention()], [True, False], quick=lambda gate, plain: gate % 2 == plain),
    ids=lambda x: {True: "momentum", False: "plain"}.get(x) or x.name,
)
def test_mlp_gates_at_sixteen_bits(gate, momentum, poisoned):
    case = Case("mlp16", memory="mlp", tokens=23, batch=1, heads=1, key_dim=16, value_dim=16, hidden=40, decay="slight")
    # LayerNorm of an MLP of two softmaxes: bfloat16 would leave no digit to compare
    dtype = torch.float16 if gate.name == "kl" else torch.bfloat16
    report = check(dataclasses.replace(case, retention=gate, momentum=momentum), "triton", dtype, DEVICE)
    assert report.ok, report


def test_zero_hidden_units_change_nothing():
    """Units whose row of W2 and column of W1 are zero: gelu(0) = 0, and both have zero gradients."""
    case = Case("mlp-padding", memory="mlp", tokens=20, batch=1, key_dim=16, value_dim=16, hidden=24)
    inputs = case.draw(torch.float32, DEVICE)
    w1, w2 = inputs.duals
    wider = (torch.nn.functional.pad(w1, (0, 29)), torch.nn.functional.pad(w2, (0, 0, 0, 29)))
    out, state = mk.mlp_memory(**inputs.arguments(), backend="triton")
    padded, after = mk.mlp_memory(**{**inputs.arguments(), "initial_state": wider}, backend="triton")
    for result, end in ((out, state.dual), (padded, (after.dual[0][..., :24], after.dual[1][..., :24, :]))):
        report = judge(inputs, {"out": result, "final_dual_0": end[0], "final_dual_1": end[1]}, torch.float32)
        assert report.ok, report
    assert (after.dual[0][..., 24:] == 0).all() and (after.dual[1][..., 24:, :] == 0).all()


@pytest.mark.parametrize("case", or_slow(PLAIN[::2], PLAIN[::12]))
def test_states_in_registers(case, poisoned):
    """The chains of 16-bit inputs in float32 arithmetic, where rounding errors cannot hide an error of logic."""
    from miras_kernels.kernels.common import configs

    if case.bias.row_coupled and case.value_dim > 32:
        case = dataclasses.replace(case, value_dim=32)
    if case.key_dim > 128:
        case = dataclasses.replace(case, key_dim=128)
    with configs.stream(False):
        report = check(case, "triton", device=DEVICE)
    assert report.ok, report


#: a threshold given as a number cannot be moved away from the errors, so 16 bits may be on another side of a kink than 64
SETTLED = [case for case in LINEAR_CASES if not (case.bias.needs_delta and case.delta == "float")]
SIXTEEN_BITS = [(case, (torch.bfloat16, torch.float16)[i % 2]) for i, case in enumerate(SETTLED[::3])]


@pytest.mark.parametrize(("case", "dtype"), [x if i % 5 == 0 else slow(*x) for i, x in enumerate(SIXTEEN_BITS)], ids=str)
def test_sixteen_bits(case, dtype, poisoned):
    report = check(case, "triton", dtype, DEVICE)
    assert report.ok, report


SIZES = [  # key_dim, value_dim, chunk_size: several blocks of a chunk, several tiles, tiles that do not fill
    (16, 16, 128), (40, 72, 128), (72, 40, 32), (136, 24, 16), (24, 136, 64), (256, 48, 64),
]  # fmt: skip


@pytest.mark.parametrize(
    ("size", "bias", "dtype"),
    combinations(
        SIZES, [mk.Huber("coordinate"), mk.Huber("norm"), mk.DotProduct()], [torch.float32, torch.bfloat16],
        quick=lambda size, bias, dtype: size == 2 * bias + dtype,
    ),
    ids=lambda x: getattr(x, "name", str(x)),
)  # fmt: skip
def test_sizes(size, bias, dtype, poisoned):
    key_dim, value_dim, chunk_size = size
    case = Case("size", bias=bias, batch=1, heads=1, tokens=chunk_size + 19, key_dim=key_dim, value_dim=value_dim, chunk_size=chunk_size)
    report = check(case, "triton", dtype, DEVICE)
    assert report.ok, report


class SixteenBits(TorchDispatchMode):
    """Rounds the operands and results of matrix products to bfloat16, as PyTorch's autocast does."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func not in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
            return func(*args, **(kwargs or {}))
        return func(*(x.bfloat16().to(x.dtype) for x in args)).bfloat16().to(args[0].dtype)


def test_sixteen_bits_are_as_good_as_pytorch_at_sixteen_bits():
    """Root mean squares over common sizes: outputs within 0.005, gradients within 0.008, and 1.5 times PyTorch's own error."""
    for bias in (mk.L2(), mk.Huber("coordinate"), mk.Lp(3.0)):
        case = Case("common", bias=bias, batch=1, tokens=256, heads=2, key_dim=64, value_dim=64, chunk_size=64)
        inputs = case.draw(torch.bfloat16, DEVICE, margin(case, torch.bfloat16))
        exact, reached = truth(inputs), evaluate(inputs, "triton")
        with SixteenBits():
            usual = truth(inputs)
        for name, value in exact.items():
            error = relative_error(reached[name], value)
            assert error <= (0.008 if name.startswith("grad") else 0.005), (bias, name, error)
            assert error <= 1.5 * relative_error(usual[name], value) + 2.0**-9, (bias, name, error)


GATED = {  # sizes of several tiles and blocks, decays to 0
    "tall-lq-momentum": dict(retention=mk.LqRetention(3.0, floor=0.5), momentum=True, key_dim=24, value_dim=40, chunk_size=32, tokens=40),
    "wide-kl": dict(retention=mk.KLRetention(2.0), bias=mk.Huber("norm"), key_dim=72, value_dim=40, tokens=35, chunk_size=32),
    "lq-below-two": dict(retention=mk.LqRetention(1.5), tokens=20),
    "lq-of-two": dict(retention=mk.LqRetention(2.0), momentum=True, tokens=20, decay="none"),
    "extreme-momentum": dict(momentum=True, decay="extreme", tokens=40, chunk_size=32),
    "channels-packed-switch": dict(
        decay="channel", lr="channel", bias=mk.Huber("switch"), lengths=(7, 18), value_dim=40, retention=mk.LqRetention()
    ),
}


@pytest.mark.parametrize("name", GATED)
def test_gates(name, poisoned):
    """float32 against float64 where the registry has no case."""
    report = check(Case(name, batch=1, heads=1, **GATED[name]), "triton", device=DEVICE)
    assert report.ok, report


def test_decays_by_channel_to_zero(poisoned):
    """Log-decays of -1e4 and runs of -50, with momentum that is sometimes 0: finite and accurate."""
    case = Case("channels", batch=1, heads=1, tokens=40, chunk_size=32, decay="channel", momentum=True)
    inputs = case.draw(torch.float32, DEVICE)
    with torch.no_grad():
        inputs.tensors["log_decay"][:, 5] = -1e4
        inputs.tensors["log_decay"][:, 8:14, :, ::2] = -50.0
        inputs.tensors["momentum"][:, 9:12] = 0.0
    report = judge(inputs, evaluate(inputs, "triton"), torch.float32)
    assert report.ok, report


LARGE = [{}, {"bias": mk.DotProduct()}, {"momentum": True, "retention": mk.ElasticNetRetention(0.05)}, {"decay": "channel"}]


@pytest.mark.parametrize("kind", LARGE, ids=str)
def test_a_state_that_float16_cannot_hold(kind):
    """It decays from 65,536 to 1,200 before it is read: operands are scaled before they are rounded, without loss in the results."""
    case = Case("large", batch=1, heads=1, tokens=20, value_dim=16, **kind)
    inputs = case.draw(torch.float16, DEVICE)
    with torch.no_grad():
        inputs.duals[0].copy_(65536.0 * inputs.duals[0].sign())
        inputs.tensors["lr"] *= 0.1
        inputs.tensors["q"] *= 0.1
        inputs.tensors["log_decay"][:, 0] = -4.0
    exact, reached = truth(inputs), evaluate(inputs, "triton")
    assert exact["out"].abs().max() < 65504  # the results themselves fit in float16
    for name, value in exact.items():
        if reached[name].dtype == torch.float32 or value.abs().max() < 65504:
            assert relative_error(reached[name], value) < 0.01, name


@pytest.mark.parametrize("case", or_slow(LINEAR_CASES[::11], LINEAR_CASES[::55]))
def test_bitwise_repeatable(case):
    inputs = case.draw(torch.bfloat16, DEVICE)
    first = evaluate(inputs, "triton")
    for name, x in evaluate(inputs, "triton").items():
        assert torch.equal(x, first[name]), name


def test_compiles_and_traces():
    """torch.compile traces a call with this backend in one graph."""
    case = Case("compiled", tokens=20, batch=1, heads=1)
    inputs = case.draw(torch.float32, DEVICE)
    arguments = inputs.arguments()

    def step(q, k, v):
        out, _ = mk.linear_memory(**{**arguments, "q": q, "k": k, "v": v}, backend="triton")
        return out

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    q, k, v = (inputs.tensors[name] for name in "qkv")
    assert torch.equal(compiled(q, k, v), step(q, k, v))
    wanted = torch.autograd.grad(step(q, k, v).sum(), (q, k, v))
    found = torch.autograd.grad(compiled(q, k, v).sum(), (q, k, v))
    assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))


def test_names_and_tags_agree():
    """Tags and names in kernels/common/bias.py and retention.py are those of the tables (csrc is checked in tests/core)."""
    from miras_kernels.kernels.common import bias, retention

    for module, table in ((bias, BIASES), (retention, GATES)):
        assert {row.name: getattr(module, row.name.upper()).value for row in table.values()} == {
            row.name: tag for tag, row in table.items()
        }


# ----------------------------------------------------------------------------------------------------------- planted bugs


@pytest.mark.parametrize("name", [*map(slow, ("q", "k", "v", "lr", "momentum")), "log_decay", "state"])
def test_a_planted_bug_is_caught(name, monkeypatch):
    backward = triton_backend.backward

    def wrong(*args):
        grads = backward(*args)
        grads[name] = [x * 1.001 for x in grads[name]] if name == "state" else grads[name] * 1.001
        return grads

    monkeypatch.setattr(triton_backend, "backward", wrong)
    report = check(Case("planted", tokens=33, heads=1, momentum=name == "momentum"), "triton", device=DEVICE)
    assert {r.name for r in report.rows if not r.ok} == {"grad_initial_dual_0" if name == "state" else f"grad_{name}"}


@pytest.mark.parametrize("name", [slow("log_decay"), slow("momentum"), "state"])
def test_a_planted_bug_is_caught_in_the_mlp(name, monkeypatch):
    """The gradients that sum over both matrices, and that of the last initial matrix: the momentum matrix of W2."""
    backward = triton_backend.backward

    def wrong(*args):
        grads = backward(*args)
        grads[name] = [*grads[name][:-1], grads[name][-1] * 1.001] if name == "state" else grads[name] * 1.001
        return grads

    monkeypatch.setattr(triton_backend, "backward", wrong)
    case = Case("planted", memory="mlp", key_dim=16, value_dim=16, tokens=20, heads=1, batch=1, momentum=True, seed=3)
    report = check(case, "triton", device=DEVICE)
    assert {r.name for r in report.rows if not r.ok} == {"grad_initial_momentum_1" if name == "state" else f"grad_{name}"}


@pytest.mark.parametrize(("tag", "planted"), [slow(1, "rho * g"), (2, "w * g"), slow(3, "g"), slow(4, "g * sigmoid(a)")])
def test_a_gate_without_its_derivative_is_caught(tag, planted, monkeypatch):
    """A pull-back of phi that loses a factor or a term is caught in the gradient of the state."""
    if DEVICE == "cuda":
        pytest.skip("changes a kernel's source, which only the interpreter reads again")
    from miras_kernels.kernels.common import retention

    def wrong(g, a, w, along, rho, RETENTION):
        return eval(planted, {"g": g, "a": a, "w": w, "rho": rho, "sigmoid": retention.sigmoid})

    monkeypatch.setattr(retention, "pull", wrong)
    case = Case("planted", tokens=33, heads=1, batch=1, retention=GATES[tag])
    for planted_in in (case, dataclasses.replace(case, memory="mlp", tokens=17, value_dim=16)):
        report = check(planted_in, "triton", device=DEVICE)
        assert "grad_initial_dual_0" in {r.name for r in report.rows if not r.ok}, report


def test_a_planted_bug_is_caught_at_sixteen_bits(monkeypatch):
    """Log-decays that are 10 % too small stand out from the rounding of bfloat16."""
    forward = triton_backend.forward
    monkeypatch.setattr(triton_backend, "forward", lambda call, every: forward(call.replace(log_decay=call.log_decay * 0.9), every))
    report = check(Case("planted", tokens=48), "triton", torch.bfloat16, DEVICE)
    assert not {r.name: r for r in report.rows}["out"].ok
