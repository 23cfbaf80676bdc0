"""Custom biases and retention gates in the Triton kernels: every operation, and results against the built-in rows'."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import triton
import triton.language as tl
from miras_kernels.kernels.common import programs

import expressions
import miras_kernels as mk
from miras_kernels.expressions import OPERATIONS, Program, evaluate
from miras_kernels.testing import Case, check
from quick import or_slow, slow

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ONE = dict(batch=1, heads=1, decay="slight")
LINEAR = expressions.pairs("linear", key_dim=19, value_dim=24, tokens=35, chunk_size=16, **ONE)
CHANNELS = expressions.pairs("channels", delta="channel", lr="channel", momentum=True, lengths=(1, 16, 0, 21), heads=1)
MLP = expressions.pairs("mlp", memory="mlp", key_dim=16, value_dim=16, hidden=21, tokens=21, chunk_size=16, momentum=True, **ONE)
NAMES = lambda pair: pair[0].name
CASES = {built_in.name: (built_in, custom) for built_in, custom in LINEAR + CHANNELS + MLP}
#: every row in one of them, and the rows that couple in both memories
QUICK = [built_in for i, (built_in, _) in enumerate(LINEAR) if i % 2] + [built_in for i, (built_in, _) in enumerate(MLP) if i % 2 == 0]


@pytest.mark.parametrize("case", or_slow([built_in for built_in, _ in CASES.values()], QUICK))
def test_same_numbers_as_the_built_in_row(case, poisoned):
    report = expressions.check_same(CASES[case.name], "triton")
    assert report.ok, report


@pytest.mark.parametrize("case", or_slow([built_in for built_in, _ in LINEAR + MLP], QUICK[::4]))
def test_same_steps_as_the_built_in_row(case, poisoned):
    report = expressions.check_same_steps(CASES[case.name], "triton", (5, *range(6, 21, 3), case.tokens))
    assert report.ok, report


@pytest.mark.parametrize("memory", ["linear", slow("mlp")])
def test_thresholds_by_channel_and_sixteen_bits(memory, poisoned):
    """A threshold that enters smoothly, so that 16 bits are on no other side of a kink."""
    bias = mk.CustomBias("delta * tanh(e / (delta + 1))")
    sizes = dict(memory=memory, key_dim=16, value_dim=16, hidden=24, tokens=23, lengths=None, **ONE)
    for dtype in (torch.float32, torch.bfloat16):
        report = check(Case("thresholds", bias=bias, delta="channel" if memory == "linear" else "token", **sizes), "triton", dtype, DEVICE)
        assert report.ok, report


# -------------------------------------------------------------------------------------------------------------- operations


@triton.jit
def apply(x, y, z, out, TEXT: tl.constexpr, N: tl.constexpr):
    o = tl.arange(0, N)
    tl.store(out + o, programs.run((tl.load(x + o), tl.load(y + o), tl.load(z + o)), TEXT, 0))


def applied(program: Program, *inputs: torch.Tensor) -> torch.Tensor:
    n = triton.next_power_of_2(len(inputs[0]))
    padded = [torch.nn.functional.pad(x, (0, n - len(x)), value=1.0).to(DEVICE) for x in inputs]
    out = torch.empty_like(padded[0])
    apply[(1,)](*padded, out, programs.text_of(program), n)
    return out[: len(inputs[0])].cpu()


X = [math.nan, -math.inf, math.inf, 0.0, -0.0, 1e-12, 0.1, -0.1, 0.25, 1.0, -1.0, 3.0, -40.0, 300.0]


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation(name):
    operands, constants = list(range(OPERATIONS[name])), ()
    x, y, z = torch.tensor(list(itertools.product(X, X, (2.0, math.nan)))).unbind(-1)
    if name == "power":
        x, operands, constants = x.abs(), [0, 3], (1.375,)
    elif name == "where":
        x = (x > 0).float()
    program = Program(("x", "y", "z"), constants, ((name, *operands),), (3 + len(constants),))
    wanted = evaluate(program, x.double(), y.double(), z.double())[0]
    if name not in ("le", "lt", "where"):
        wanted[torch.stack([x, y, z])[[i for i in operands if i < 3]].isnan().any(0)] = math.nan
    found = applied(program, x, y, z)
    within_range = wanted.isnan() | wanted.isinf() | (wanted.abs() < 3e38)
    assert torch.equal(found.isnan(), wanted.isnan())
    near = torch.isclose(found.double(), wanted, rtol=2**-20, atol=2**-22 if name == "log" else 1e-37, equal_nan=True)
    assert (near | ~within_range).all(), (x[~near], y[~near], found[~near], wanted[~near])
