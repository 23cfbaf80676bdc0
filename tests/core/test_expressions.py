"""The language of CustomBias and CustomRetention: values, derivatives, programs, and everything that it refuses."""

from __future__ import annotations

import functools
import math
import os
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import miras_kernels as mk
from miras_kernels.expressions import FUNCTIONS, OPERATIONS, Graph, evaluate, parse
from miras_kernels.tables import biases, retention
from miras_kernels.tables.custom import CustomBias, CustomRetention
from miras_kernels.testing import expressions

INPUTS = ("e", "norm2", "delta")
#: roundings of a float64 expression of some ten operations whose intermediate values are of order 1
EXACT = 1e-12


def graph() -> Graph:
    return Graph(INPUTS, nonnegative=("norm2", "delta"))


def program(text: str, **parameters: float):
    """Of the value and its three derivatives."""
    g = graph()
    node = parse(text, g, parameters)
    return g.program(node, *(g.derivative(node, name) for name in INPUTS))


def tensor(x) -> Tensor:
    return torch.as_tensor(x, dtype=torch.float64)


#: the functions in PyTorch, whose autograd is independent of the rules of graph.py
MEANING = {
    "abs": torch.abs,
    "sign": torch.sign,
    "sqrt": torch.sqrt,
    "exp": torch.exp,
    "log": torch.log,
    "tanh": torch.tanh,
    "cosh": torch.cosh,
    "min": lambda *x: functools.reduce(torch.minimum, map(tensor, x)),
    "max": lambda *x: functools.reduce(torch.maximum, map(tensor, x)),
    "where": lambda c, a, b: torch.where(c, tensor(a), tensor(b)),
    "clip": lambda x, low, high: torch.maximum(torch.minimum(x, tensor(high)), tensor(low)),
}


def points(n: int = 400) -> list[Tensor]:
    """Random errors, squared norms that are at least theirs, and thresholds: all leaves."""
    g = torch.Generator().manual_seed(0)
    e, other, delta = (torch.randn(n, generator=g, dtype=torch.float64) for _ in range(3))
    return [x.requires_grad_() for x in (e, e * e + other * other, 0.2 + delta.abs())]


def by_autograd(text: str, inputs: list[Tensor], **parameters: float) -> list[Tensor]:
    """The value and its derivatives of an expression of this file, which Python may execute."""
    value = tensor(eval(text, {"__builtins__": {}}, {**MEANING, **parameters, **dict(zip(INPUTS, inputs, strict=True))}))
    value = value.expand_as(inputs[0])
    if not value.requires_grad:
        return [value, *map(torch.zeros_like, inputs)]
    grads = torch.autograd.grad(value.sum(), inputs, allow_unused=True)
    return [value, *(torch.zeros_like(x) if g is None else g for x, g in zip(inputs, grads, strict=True))]


EXPRESSIONS = [
    "e + delta", "e - norm2", "e * delta", "e / delta", "-e", "+e", "abs(e)", "sign(e)", "sqrt(norm2)", "exp(e)", "log(s + delta)",
    "tanh(s*e)", "cosh(s*e)", "log(cosh(s*e))", "min(e, delta)", "max(e, -delta)", "min(e, delta, norm2)", "max(e, delta, 2*e)",
    "clip(e, -delta, delta)", "where(e <= delta, e, delta**2)", "where(e < delta, e*e, e)", "where(e >= delta, e, 3*e)",
    "where(norm2 > delta, e, s)", "e**0", "e**1", "e**2", "e**3", "e**5", "e**7", "e**8", "delta**9", "delta**-1", "delta**-2.5",
    "norm2**0.5", "norm2**1.5", "norm2**3.5", "abs(e)**2", "abs(e)**1.3", "abs(e)**s", "(1 + e*e)**-s", "(e*e)**0.5", "log(exp(e))",
    "sqrt(e*e)", "e*e/e", "e*delta/delta", "e - -delta", "(e*e*delta)/(e*delta)", "exp(-e*e/2)", "e*exp(-norm2/delta**2)",
    "e/sqrt(1 + (e/s)**2)", "s*sign(e)*abs(e)**(s-0.5)", "-e/-delta", "e*(1 + delta/sqrt(norm2 + 1e-6))",
    "where(sqrt(norm2) <= delta, e, delta*e/sqrt(norm2))", "2*(3*e)", "-(e - delta)", "e*-delta", "e*-2", "tanh(e*tanh(delta))",
    "log(1 + exp(-abs(e)))", "cosh(-e)", "(e + delta)*(e + delta)", "1/(1 + exp(-e))", "abs(-e)", "sign(exp(e))*e",
]  # fmt: skip


@pytest.mark.parametrize("text", EXPRESSIONS)
def test_values_and_derivatives_are_those_of_autograd(text):
    parameters = {"s": 1.7} if "s" in text.replace("sqrt", "").replace("abs", "").replace("cosh", "").replace("sign", "") else {}
    inputs = points()
    wanted = by_autograd(text, inputs, **parameters)
    with torch.no_grad():
        found = evaluate(program(text, **parameters), *inputs)
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x.expand_as(y), y, rtol=EXACT, atol=EXACT)


def test_the_expressions_use_every_function_and_operation():
    assert all(any(f"{name}(" in text for text in EXPRESSIONS) for name in FUNCTIONS)
    used = {name for text in EXPRESSIONS for name, *_ in program(text, s=1.7).instructions}
    assert used == OPERATIONS.keys()


QUICK = settings(max_examples=100, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))


@QUICK
@given(expressions.biases())
def test_random_expressions_have_the_derivatives_of_autograd(bias):
    inputs = points(100)
    text, values = bias.text, dict(bias.values)
    if bias.is_loss:
        assert bias.programs.loss is not None
        value, slope, pull, _ = by_autograd(text, inputs, **values)
        psi = evaluate(bias.programs.psi, *inputs)[0]
        wanted = slope + 2 * pull * inputs[0]  # one of them is 0
        torch.testing.assert_close(evaluate(bias.programs.loss, *inputs)[0], value, rtol=EXACT, atol=EXACT)
        torch.testing.assert_close(psi.expand_as(wanted), wanted, rtol=1e-9, atol=1e-9)
        return
    value, *wanted = by_autograd(text, inputs, **values)
    wanted[1] = 2 * wanted[1]
    torch.testing.assert_close(evaluate(bias.programs.psi, *inputs)[0].expand_as(value), value, rtol=EXACT, atol=EXACT)
    for x, y in zip(evaluate(bias.programs.derivatives, *inputs), wanted, strict=True):
        usual = y.isfinite()  # where min, max and where do not choose an argument, autograd multiplies its infinity by 0
        assert usual.sum() > 90
        torch.testing.assert_close(x.expand_as(y)[usual], y[usual], rtol=1e-9, atol=1e-9)


@QUICK
@given(expressions.gates())
def test_random_mirror_maps_have_the_derivatives_of_autograd(gate):
    a = points(200)[0]
    value = eval(gate.text, {"__builtins__": {}}, {**MEANING, **dict(gate.values), "A": a})
    (wanted,) = torch.autograd.grad(value.sum(), a)
    found = gate.phi(a)
    (slope,) = torch.autograd.grad(found.sum(), a)
    torch.testing.assert_close(found, value, rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(slope, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "text, e, slope",
    [
        ("abs(e)", 0, 0), ("sign(e)", 0, 0), ("sqrt(abs(e))", 0, 0), ("sqrt(e*e)", 0, 0), ("abs(e)**1.3", 0, 0), ("abs(e)**0.3", 0, 0),
        ("min(e, 2*e)", 0, 1), ("min(2*e, e)", 0, 2), ("max(e, 2*e)", 0, 1), ("max(2*e, e)", 0, 2), ("max(e, 2*e, 3*e)", 0, 1),
        ("clip(e, -delta, delta)", 1, 1), ("clip(e, -delta, delta)", -1, 1), ("clip(e, -delta, delta)", 1.01, 0),
        ("where(e <= delta, e, 3*e)", 1, 1), ("where(e < delta, e, 3*e)", 1, 3), ("where(e >= delta, e, 3*e)", 1, 1),
        ("where(e > delta, e, 3*e)", 1, 3), ("where(e > delta, log(1 + abs(e)) / e, 0)", 0, 0), ("max(abs(e), 1) * e", 1, 2),
    ],
)  # fmt: skip
def test_slopes_at_ties_and_kinks(text, e, slope):
    values = evaluate(program(text), tensor([e]), tensor([1.0]), tensor([1.0]))
    assert values[1].expand(1).item() == slope


@pytest.mark.parametrize("bias", [
    CustomBias(loss="log(cosh(s * e)) / s", s=4.0), CustomBias("where(sqrt(norm2) <= delta, e, delta * e / sqrt(norm2))"),
    CustomBias("sign(e) * sqrt(abs(e) + 1) - sign(e)"), CustomBias("e * exp(-norm2 / delta**2)"), CustomBias(loss="sqrt(norm2 + 1)"),
], ids=repr)  # fmt: skip
def test_finite_where_autograd_is_not(bias):
    e = torch.tensor([[0.0, 0.0], [1e-30, 0.0], [3e5, -4e5]], requires_grad=True)
    delta = torch.zeros(3, 1, requires_grad=True) if bias.needs_delta else None
    psi = bias.psi(e, torch.zeros_like(e), delta)
    grads = torch.autograd.grad(psi.sum(), [e] if delta is None else [e, delta])
    loss = bias.loss(e, torch.zeros_like(e), delta)
    assert all(x.isfinite().all() for x in (psi, *grads, *([] if loss is None else [loss])))
    assert (psi[0] == 0).all()


def test_the_logarithm_of_cosh_does_not_overflow():
    bias, pred = CustomBias(loss="log(cosh(s * e)) / s", s=4.0), torch.tensor([[0.0], [0.3], [-2e3]])
    zero = torch.zeros_like(pred)
    torch.testing.assert_close(bias.psi(pred, zero, None), torch.tanh(4 * pred))
    wanted = torch.tensor([0.0, math.log(math.cosh(1.2)) / 4, 2e3 - math.log(2) / 4])
    torch.testing.assert_close(bias.loss(pred, zero, None), wanted)


def test_equal_parts_are_computed_once_and_constants_beforehand():
    count = lambda p, name: sum(operation == name for operation, *_ in p.instructions)
    assert count(program("exp(-e*e) / (1 + exp(-e*e))"), "exp") == 1
    g = graph()
    psi = parse("e / sqrt(1 + (e / s)**2)", g, {"s": 0.5})
    both = g.program(psi, g.derivative(psi, "e"))
    assert count(both, "sqrt") == 1 and count(both, "mul") <= 6 and count(both, "div") <= 3
    assert not g.program(parse("e * (2*3 - 5) + log(1)", g, {})).instructions
    assert g.program(parse("sqrt(4) * (e * s) * 0.5", g, {"s": 3.0})).instructions == (("mul", 0, 3),)
    assert g.program(parse("e - e + delta", g, {})).outputs == (2,)


def test_a_program_knows_what_varies_along_a_row():
    g = graph()
    p = g.program(parse("e * exp(-norm2 / delta**2)", g, {}))
    by_name = {operation: varies for (operation, *_), varies in zip(p.instructions, p.varies()[-len(p.instructions) :], strict=True)}
    assert by_name == {"mul": True, "neg": False, "div": False, "exp": False}


# ------------------------------------------------------------------------------------------------------------- refusals

DEEP = 1000
REFUSED = [
    # the text, what its error says, and the column that it names (None: that of no character)
    ("__import__('os').system('touch pwned')", "\"'\" is not part", 12),
    ("__import__(e)", "unknown function", 1),
    ("e.__class__", "expected numbers", 1),
    ("abs.__self__", "expected numbers", 1),
    ("(abs)(e, e)", "abs takes 1 argument, got 2", 1),
    ("(" * DEEP + "e" + ")" * DEEP, "at most 1000 characters", None),
    ("(" * 400 + "e" + ")" * 400, "more than 50 parentheses", 51),
    ("-" * 500 + "e", "more than 100 operations", 101),
    ("e" + "+e" * 400, "more than 100 operations", 1),
    ("tanh(" * 90 + "e" + ")" * 90, "more than 50 parentheses", 255),
    ("log(" + "(" * 45 + "1+e*e" + ")**7" * 45 + ")*e", "too long", None),
    ("(" * 45 + "e" + ")**7" * 45 + "/(1+norm2)", "too long", None),
    ("9**9**9", "is not a finite number", 1),
    ("e*9**9**9**9", "is not a finite number", 6),
    ("1e999*e", "out of float32's range", 1),
    ("9" * 900 + "*e", "a number is out of range", 1),
    ("1e-60*e", "out of float32's range", 1),
    ("1/0*e", "div(1, 0) is not a finite number", 1),
    ("e + e/0", "division by 0", 5),
    ("e + exp(1000)", "is not a finite number", 5),
    ("e*(-8)**0.5", "is not a finite number", 3),
    ("e**e", "the exponent of ** must be a number", 1),
    ("e**0.5", "the base of a power with this exponent may be negative", 1),
    ("e*sqrt(e)", "the argument of sqrt may be negative", 3),
    ("e*log(norm2)", "the argument of log may be 0 or negative", 3),
    ("e + foo", "unknown name 'foo' (known: e, norm2, delta; functions: abs,", 5),
    ("e + abs", "abs is a function and needs arguments", 5),
    ("where(e, 1, 2)", "the first argument of where must be one comparison", 7),
    ("where(0 < e < 1, 1, 2)", "the first argument of where must be one comparison", 7),
    ("where(e == 0, 1, 2)", "the first argument of where must be one comparison", 7),
    ("where(e < 0, 1)", "where takes 3 arguments, got 2", 1),
    ("e < 1", "a comparison can only be", 1),
    ("max(e)", "max takes two or more arguments, got 1", 1),
    ("abs(x=e)", "abs takes positional arguments only", 1),
    ("abs(*e)", "abs takes positional arguments only", 1),
    ("e if e else 1", "expected numbers", 1),
    ("(e for e in e)", "expected numbers", 1),
    ("1if e else 2", "", 1),
    ("e,", "expected numbers", 1),
    ("()", "expected numbers", 1),
    ("not e", "expected numbers", 1),
    ("e and e", "expected numbers", 1),
    ("e//2", "expected numbers", 1),
    ("True*e", "expected a number, got True", 1),
    ("e*None", "expected a number, got None", 3),
    ("1j*e", "expected a number, got 1j", 1),
    ("...", "expected a number, got Ellipsis", 1),
    ("[e for e in e]", "'[' is not part", 1),
    ("{e}", "'{' is not part", 1),
    ("e[0]", "'[' is not part", 2),
    ("lambda: e", "':' is not part", 7),
    ("(x := e)", "':' is not part", 4),
    ("f'{e}'", "\"'\" is not part", 2),
    ("e; e", "';' is not part", 2),
    ("e % 2", "'%' is not part", 3),
    ("e @ e", "'@' is not part", 3),
    ("~e", "'~' is not part", 1),
    ("e # all", "'#' is not part", 3),
    ("e \\\n + 1", "'\\\\' is not part", 3),
    ("e\x00", "'\\x00' is not part", 2),
    ("2*é", "'é' is not part", 3),
    ("ｅ*2", "'ｅ' is not part", 1),
    ("\ud800", "is not part", 1),
    ("e\u200b", "is not part", 2),
    ("", "not an expression", 1),
    ("  ", "not an expression", None),
    ("e +", "not an expression", None),
    ("  e + + q", "unknown name 'q'", 9),
    ("(e\n\t+ q)", "unknown name 'q'", 7),
    ("e e", "not an expression", None),
    ("import os", "not an expression", None),
    ("e = 1", "not an expression", None),
    ("yield", "", 1),
    ("await e", "", 1),
]  # fmt: skip


@pytest.mark.parametrize("text, problem, column", REFUSED, ids=[ascii(text)[1:25] for text, *_ in REFUSED])
def test_what_is_not_an_expression(text, problem, column, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for make in (CustomBias, lambda loss: CustomBias(loss=loss), lambda phi: CustomRetention(phi.replace("e", "A"))):
        if make not in (CustomBias,) and problem == "too long":
            continue  # of another length
        with pytest.raises(ValueError) as caught:
            make(text)
        if make is CustomBias:
            assert str(caught.value).startswith("CustomBias: ") and problem in str(caught.value)
            assert column is None or f", at column {column} of " in str(caught.value)
    assert not os.listdir(tmp_path)


ALPHABET = st.sampled_from([
    "e", "norm2", "delta", "A", "a", "0", "1", "2.5", "1e9", "-", "+", "*", "/", "**", "(", ")", ",", "<", "<=", " ", "\n", ".", "_",
    "x=", "abs(", "sign(", "sqrt(", "exp(", "log(", "tanh(", "cosh(", "min(", "max(", "where(", "clip(", "import ", "lambda ", "if ",
    "else ", "for ",
])  # fmt: skip


@settings(max_examples=500, deadline=None, database=None, derandomize=True)
@given(st.one_of(st.text(max_size=40), st.lists(ALPHABET, max_size=30).map("".join)), st.floats() | st.integers() | st.text(max_size=3))
def test_any_text_is_an_expression_or_refused(text, value):
    for make in (CustomBias, lambda loss, **values: CustomBias(loss=loss, **values), CustomRetention):
        for values in ({}, {"a": value}):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                try:
                    row = make(text, **values)
                except (ValueError, TypeError) as error:
                    assert str(error).startswith("Custom")
                else:
                    table = biases if isinstance(row, CustomBias) else retention
                    assert table.from_code(row.code) == row


BAD = (
    (lambda: CustomBias(), ValueError, "expected either psi or loss=, got neither"),
    (lambda: CustomBias("e", loss="e"), ValueError, "expected either psi or loss=, got both"),
    (lambda: CustomBias(3), TypeError, "an expression must be a string, got int"),
    (lambda: CustomBias(b"e"), TypeError, "an expression must be a string, got bytes"),
    (lambda: CustomBias(["e"]), TypeError, "an expression must be a string, got list"),
    (lambda: CustomBias("e*s", s="1"), TypeError, "s must be a number, got str"),
    (lambda: CustomBias("e*s", s=True), TypeError, "s must be a number, got bool"),
    (lambda: CustomBias("e*s", s=math.nan), ValueError, "s must be a finite number > -inf, got nan"),
    (lambda: CustomBias("e*s", s=math.inf), ValueError, "s must be a finite number > -inf, got inf"),
    (lambda: CustomBias("e*s", s=10**400), ValueError, "s must be a finite number > -inf, got inf"),
    (lambda: CustomBias("e*s", s=1e300), ValueError, "a number is out of float32's range: 1e+300, at column 3 of 'e*s'"),
    (lambda: CustomBias("e", e=1.0), ValueError, "'e' cannot name a parameter: it has a meaning in expressions"),
    (lambda: CustomBias("e*exp", exp=1.0), ValueError, "'exp' cannot name a parameter: it has a meaning in expressions"),
    (lambda: CustomBias("e", **{"lambda": 1.0}), ValueError, "'lambda' cannot name a parameter: expected a name in ASCII"),
    (lambda: CustomBias("e", **{"a b": 1.0}), ValueError, "'a b' cannot name a parameter: expected a name in ASCII"),
    (lambda: CustomBias("e", **{"é": 1.0}), ValueError, "'é' cannot name a parameter: expected a name in ASCII"),
    (lambda: CustomBias("e", s=1.0), ValueError, "the parameter s is not in the expression 'e'"),
    (lambda: CustomBias("e + 1"), ValueError, "psi must be 0 where the error is 0, got 1"),
    (lambda: CustomBias("e + tanh(norm2)"), ValueError, "psi must be 0 where the error is 0, got"),
    (lambda: CustomBias("delta"), ValueError, "psi does not depend on the error: 'delta'"),
    (lambda: CustomBias("exp(e) - 1"), ValueError, "psi must be finite for |e| up to 1e6, got inf at e = 100"),
    (lambda: CustomBias("e/norm2"), ValueError, "psi must be finite for |e| up to 1e6, got nan at e = 0, norm2 = 0"),
    (lambda: CustomBias(loss="abs(e) + norm2"), ValueError, "a loss is one of e or one of norm2, got one of both"),
    (lambda: CustomBias(loss="norm2 + delta"), ValueError, "the gradient of the loss does not depend on delta"),
    (lambda: CustomRetention("A*norm2"), ValueError, "unknown name 'norm2' (known: A;"),
    (lambda: CustomRetention("A*delta"), ValueError, "unknown name 'delta' (known: A;"),
    (lambda: CustomRetention("e"), ValueError, "unknown name 'e' (known: A;"),
    (lambda: CustomRetention("A", A=1.0), ValueError, "'A' cannot name a parameter: it has a meaning in expressions"),
    (lambda: CustomRetention("1"), ValueError, "phi does not depend on A"),
    (lambda: CustomRetention("exp(A)"), ValueError, "phi must be finite for |A| up to 1e6, got inf at A = 100"),
    (lambda: CustomRetention("1/(1+exp(-A))"), ValueError, "its derivative must be finite for |A| up to 1e6, got nan at A = -100"),
    (lambda: biases.from_code("9 {"), ValueError, "CustomBias: expected the code of an expression, got '9 {'"),
    (lambda: biases.from_code("9 " + "[" * 100_000), ValueError, "CustomBias: expected the code of an expression"),
    (lambda: biases.from_code("9 []"), ValueError, "CustomBias: expected the fields is_loss, text, values, got []"),
    (lambda: biases.from_code('9 {"text": "e", "values": []}'), ValueError, "CustomBias: expected the fields is_loss, text, values"),
    (lambda: biases.from_code('9 {"text": "e", "is_loss": 0, "values": []}'), TypeError, "is_loss must be a bool, got int"),
    (lambda: biases.from_code('9 {"text": "e*s", "is_loss": false, "values": [["s", NaN]]}'), ValueError, "s must be a finite number"),
    (lambda: biases.from_code('9 {"text": "e*s", "is_loss": false, "values": [["s"]]}'), TypeError, "expected values as pairs"),
    (lambda: biases.from_code('9 {"text": "e*s", "is_loss": false, "values": [["s", 1], ["s", 2]]}'), ValueError, "s has two values"),
    (lambda: biases.from_code('9 {"text": "e", "is_loss": false, "values": [[3, 1]]}'), ValueError, "'3' cannot name a parameter"),
    (lambda: retention.from_code('5 {"text": "__import__", "values": []}'), ValueError, "unknown name '__import__'"),
    (lambda: retention.from_code('5 {"text": {"A": 1}, "values": []}'), TypeError, "an expression must be a string, got dict"),
)  # fmt: skip


@pytest.mark.parametrize("make, error, problem", BAD, ids=range(len(BAD)))
def test_what_is_no_bias_and_no_gate(make, error, problem):
    with pytest.raises(error) as caught:
        make()
    assert problem in str(caught.value)


def test_an_unbounded_slope_is_told():
    with pytest.warns(UserWarning, match=r"the slope of psi is unbounded .* stable while lr \|k\|\^2 slope < 2"):
        CustomBias("e*abs(e)")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CustomBias("e / sqrt(1 + e**2)")
        mk.biases.from_code(mk.CustomBias("e*(1+delta)").code)


@QUICK
@given(expressions.biases().filter(lambda bias: bias.is_loss))
def test_psi_is_the_gradient_of_a_row_s_loss(bias):
    pred, v = (x.detach()[:48].reshape(16, 3) for x in points(48)[:2])
    pred = pred.requires_grad_()
    delta = 0.5 + points(16)[2].detach()[:, None] if bias.needs_delta else None
    loss = bias.loss(pred, v, delta)
    assert loss.shape == (16,)
    (wanted,) = torch.autograd.grad(loss.sum(), pred)
    torch.testing.assert_close(bias.psi(pred, v, delta), wanted, rtol=1e-9, atol=1e-9)
