"""Built-in biases and retention gates written as expressions: the same function, so the same numbers up to rounding on every backend."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence

import torch

import miras_kernels as mk
from miras_kernels.testing import Case, Inputs, check_steps, evaluate
from miras_kernels.testing.parity import Report, judge, operands
from miras_kernels.testing.steps import inputs_of, read


def unbounded(text: str, **parameters: float) -> mk.CustomBias:
    """A bias that is known to have an unbounded slope."""
    with warnings.catch_warnings(action="ignore"):
        return mk.CustomBias(text, **parameters)


#: the built-in row and its expression. The dot product is missing: its psi is no function of the error. So are the gates that couple.
BIASES: dict[str, tuple[mk.biases.Bias, mk.CustomBias]] = {
    "l2": (mk.L2(), mk.CustomBias("e")),
    "l1": (mk.L1(10.0), mk.CustomBias("tanh(s * e)", s=10.0)),
    "l1-loss": (mk.L1(4.0), mk.CustomBias(loss="log(cosh(s * e)) / s", s=4.0)),
    "lp": (mk.Lp(2.5), unbounded("p * sign(e) * abs(e) ** (p - 1)", p=2.5)),
    "lp_smooth": (
        mk.Lp(1.5, sharpness=10.0),
        mk.CustomBias("p * tanh(s * e) * (e**2 + eps) ** ((p - 1) / 2)", p=1.5, s=10.0, eps=1e-6),
    ),
    "huber_coordinate": (mk.Huber("coordinate"), mk.CustomBias("clip(e, -delta, delta)")),
    "huber_norm": (mk.Huber("norm"), mk.CustomBias("where(norm2 <= delta**2, e, delta * e / sqrt(norm2))")),
    "huber_switch": (mk.Huber("switch"), mk.CustomBias("where(norm2 <= delta**2, e, delta * tanh(s * e))", s=10.0)),
    "robust_l2": (mk.RobustL2(), mk.CustomBias("e * (1 + delta / sqrt(norm2 + eps))", eps=1e-6)),
}
GATES: dict[str, tuple[mk.retention.Retention, mk.CustomRetention]] = {
    "l2": (mk.L2Retention(), mk.CustomRetention("A")),
    "elastic": (mk.ElasticNetRetention(0.05), mk.CustomRetention("sign(A) * max(abs(A) - t, 0)", t=0.05)),
    "sigmoid": (mk.SigmoidRetention(), mk.CustomRetention("where(A < 0, exp(min(A, 0)), 1) / (1 + exp(-abs(A)))")),
}


def pairs(name: str, **settings) -> list[tuple[Case, Case]]:
    """A case for every row above, and the same case with the expression in the row's place."""
    found = []
    for argument, table in (("bias", BIASES), ("retention", GATES)):
        for i, (row, (built_in, custom)) in enumerate(table.items()):
            case = Case(f"{name}-{argument}-{row}", **{argument: built_in}, seed=i, **settings)
            found.append((case, dataclasses.replace(case, **{argument: custom})))
    return found


def check_same(pair: tuple[Case, Case], backend: str, dtype: torch.dtype = torch.float32) -> Report:
    """An expression's results against the float64 reference of the built-in row, on the same numbers."""
    built_in, custom = pair
    inputs = inputs_of(built_in, backend, dtype)
    return judge(inputs, evaluate(_with(inputs, custom), backend), operands(backend, dtype))


def check_same_steps(pair: tuple[Case, Case], backend: str, cuts: Sequence[int]) -> Report:
    """The same for decoding: see :func:`miras_kernels.testing.steps.read`."""
    built_in, custom = pair
    found = read(_with(inputs_of(built_in, backend, torch.float32), custom), backend, cuts)
    return check_steps(built_in, backend, cuts=cuts, found=found)


def _with(inputs: Inputs, case: Case) -> Inputs:
    return dataclasses.replace(inputs, case=case)
