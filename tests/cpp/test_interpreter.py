"""Custom biases and retention gates in the C++ kernels: the interpreter's operations, and its results against the built-in rows'."""

from __future__ import annotations

import math

import pytest
import torch

import expressions
import miras_kernels as mk
from miras_kernels import _C
from miras_kernels.expressions import OPERATIONS
from miras_kernels.testing import Case, check

LINEAR = expressions.pairs("linear", key_dim=19, value_dim=33, tokens=45, chunk_size=20)
CHANNELS = expressions.pairs("channels", decay="channel", lr="channel", delta="channel", momentum=True, lengths=(1, 16, 0, 30, 5))
MLP = expressions.pairs("mlp", memory="mlp", key_dim=19, value_dim=19, hidden=37, tokens=21, chunk_size=7, momentum=True)
NAMES = lambda pair: pair[0].name

LEVELS = pytest.mark.parametrize("level", _C.cpu_capabilities())


@pytest.mark.parametrize("pair", LINEAR + CHANNELS + MLP, ids=NAMES)
@LEVELS
def test_same_numbers_as_the_built_in_row(pair, level, poisoned, monkeypatch):
    monkeypatch.setenv("MIRAS_CPU_CAPABILITY", level)
    report = expressions.check_same(pair, "cpp")
    assert report.ok, report


@pytest.mark.parametrize("pair", LINEAR + MLP, ids=NAMES)
def test_same_steps_as_the_built_in_row(pair, poisoned):
    report = expressions.check_same_steps(pair, "cpp", (5, *range(6, 5 + pair[0].chunk_size, 3), pair[0].tokens))
    assert report.ok, report


def test_the_kernels_know_every_operation():
    assert dict(_C.operations()) == OPERATIONS


def applied(text: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A function of the entries of a vector, and its derivative: as a retention gate of a state that is read with q = 1 and not written."""
    dual = x.float()[None, None, :, None].requires_grad_()
    one, zero = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    out, _ = mk.linear_memory(
        one, zero, torch.zeros(1, 1, 1, len(x)), torch.zeros(1, 1, 1), retention=mk.CustomRetention(text), initial_state=dual,
        chunk_size=2, backend="cpp",
    )  # fmt: skip
    (slope,) = torch.autograd.grad(out.sum(), dual)
    return out.detach().flatten(), slope.flatten()


SMALL = 2.0 ** torch.arange(-60, 60, 0.37, dtype=torch.float64)[:256]
BOTH = torch.linspace(-87.0, 88.0, 255, dtype=torch.float64)
#: an expression, the arguments, and its error in units of 2^-24
FUNCTIONS = {
    "exp": ("exp(clip(A, -87, 88))", lambda x: x.exp(), BOTH, 4),
    "log": ("log(abs(A) + 1e-30)", lambda x: (x + 1e-30).log(), SMALL, 4),
    "log-near-1": ("log(abs(A) + 1e-30)", lambda x: (x + 1e-30).log(), torch.linspace(0.5, 2, 256, dtype=torch.float64), 4),
    "tanh": ("tanh(A / 16)", lambda x: (x / 16).tanh(), BOTH, 4),
    "sqrt": ("sqrt(abs(A))", lambda x: x.sqrt(), SMALL, 2),
    "power": ("abs(A) ** 1.375", lambda x: x**1.375, SMALL / 2**20, 4),
    "divide": ("A / (3 + abs(A))", lambda x: x / (3 + x.abs()), BOTH, 4),
    "choose": ("where(A < 1, min(A, -A), max(2 * A, 3))", lambda x: torch.where(x < 1, -x.abs(), (2 * x).clamp_min(3)), BOTH, 1),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@LEVELS
def test_functions_are_accurate(name, level, monkeypatch):
    monkeypatch.setenv("MIRAS_CPU_CAPABILITY", level)
    text, exact, x, ulps = FUNCTIONS[name]
    x = x.float().double().requires_grad_()
    wanted = exact(x)
    found, _ = applied(text, x.detach())
    assert ((found - wanted).abs() <= ulps * 2.0**-24 * wanted.abs()).all()


@LEVELS
def test_nan_stays(level, monkeypatch):
    monkeypatch.setenv("MIRAS_CPU_CAPABILITY", level)
    texts = ("-A", "abs(A)", "exp(min(A, 1))", "log(abs(A) + 1)", "tanh(A)", "sqrt(abs(A))", "abs(A)**1.3", "min(A, 1)", "min(1, A)",
             "max(1, A)", "max(A, 1)", "1 / (1 + A**2)", "where(A < 1, A, A)", "where(abs(A) >= 0, 2, A)")  # fmt: skip
    for text in texts:
        found, _ = applied(text, torch.tensor([math.nan, 1.0]))
        assert found.isnan().tolist() == [True, False], text


def test_many_values_at_once():
    """More vectors than fit the first-level cache: blocks become rows, and no value is lost."""
    terms = " + ".join(f"tanh({i + 1} * e) * exp(-e**2 / {i + 1})" for i in range(24))
    product = " * ".join(f"(1 + tanh(norm2 - {i}) / 8)" for i in range(24))
    for text in (f"({terms}) / 24", f"e * {product} / 4"):
        bias = mk.CustomBias(text)
        for settings in (dict(value_dim=250, chunk_size=16), dict(value_dim=8, chunk_size=37), dict(memory="mlp", value_dim=16)):
            report = check(Case("many", bias=bias, batch=1, heads=1, **settings), "cpp")
            assert report.ok, report


PSI = ([2.0], [("mul", [0, 3])], [4])
DERIVATIVES = ([2.0, 0.0], [], [3, 4, 4])


@pytest.mark.parametrize(
    "value, derivatives, problem",
    [
        (([2.0], [("mul", [0, 4])], [4]), DERIVATIVES, "refers to a value"),
        (([2.0], [("mul", [0, -1])], [4]), DERIVATIVES, "refers to a value"),
        (([2.0], [("mul", [0, 3])], [5]), DERIVATIVES, "refers to a value"),
        (([2.0], [("mul", [0])], [4]), DERIVATIVES, "number of operands"),
        (([2.0], [("system", [0, 3])], [4]), DERIVATIVES, "unknown operation"),
        (([2.0], [("copy", [0])], [4]), DERIVATIVES, "unknown operation"),
        (([2.0], [("power", [0, 1])], [4]), DERIVATIVES, "exponent"),
        (([-2.0], [("power", [0, 3])], [4]), DERIVATIVES, "exponent"),
        (([math.nan], [], [0]), DERIVATIVES, "not a number"),
        (PSI, ([2.0], [], [3]), "number of outputs"),
        (([1.0], [("neg", [0])] * 3000, [0]), DERIVATIVES, "too long"),
    ],
)
def test_what_is_no_program_is_refused(value, derivatives, problem):
    with pytest.raises(ValueError, match=problem):
        _C.Program(3, value, derivatives)


def test_programs_belong_to_their_rule():
    q = torch.randn(1, 3, 1, 4)
    tokens = (q, q, q, torch.ones(1, 3, 1), None, None, None)
    state = (torch.zeros(1, 1, 4, 4), None)
    bias = _C.Program(3, PSI, DERIVATIVES)
    gate = _C.Program(1, ([], [], [0]), ([1.0], [], [1]))
    with pytest.raises(ValueError, match="has 1 or 3 inputs"):
        _C.Program(2, PSI, DERIVATIVES)
    run = lambda bias, gate: _C.linear_forward(tokens, state, (None, None, None), None, (bias, gate, 2), 0, False, (0, False, None, None))
    run((9, [], bias), (5, [], gate))
    for given, problem in (
        (((9, [], None), (5, [], gate)), "needs a program"),
        (((1, [], bias), (5, [], gate)), "needs a program"),
        (((9, [], bias), (5, [], bias)), "inputs"),
        (((9, [], gate), (0, [], None)), "inputs"),
    ):
        with pytest.raises(ValueError, match=problem):
            run(*given)
