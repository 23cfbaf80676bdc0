"""Is a call right at a benchmark's shape? Asked before its time is taken.

Twice: a short case of the same sizes against float64, with the tests' own budgets; and the full call itself, of which the
first chunks of the first and last heads are compared with float64 (that part of the output, and the gradients of a loss that
looks at it alone, do not depend on what comes later). And every number that the full call gives must be finite.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor

from contenders import BOTH, kernel
from gpu_plan import FORWARD, Settings, Shape
from gpu_tensors import DTYPE, all_finite, case_of, eager_run
from miras_kernels.testing import Case, check, evaluate, relative_error, truth
from miras_kernels.testing.cases import Inputs

#: of the error that PyTorch makes on the same numbers with bfloat16 matrix products
FACTOR = 3.0
#: more for biases with a kink or a step, output and gradients: an error so close to it that rounding decides the side gets another
#: slope, or another value; a toy has so few numbers that one such error is much of it
KINKS = {"huber_coordinate": (0.0, 0.1), "huber_switch": (0.1, 0.1)}
TOY_KINK = 10.0
#: chunks that the full call's comparison looks at
CHUNKS = 4


def gate(inputs: Inputs, settings: Settings, bias: str) -> dict:
    """The verdict on our call with these inputs, with what was measured for it."""
    short = _short(inputs.case.key_dim, inputs.case.chunk_size, bias, settings)
    tokens = min(inputs.case.tokens, CHUNKS * inputs.case.chunk_size)
    looks_at = torch.zeros_like(inputs.grad_out)
    looks_at[:, :tokens] = inputs.grad_out[:, :tokens]
    (out,) = kernel(inputs, settings.backend, FORWARD)()
    grads = kernel(dataclasses.replace(inputs, grad_out=looks_at), settings.backend, BOTH)()
    finite = all_finite((out, *grads))
    if tokens < inputs.case.tokens:
        finite = finite and all_finite(kernel(inputs, settings.backend, BOTH)())
    reached = {"out": out} | {f"grad_{name}": x for name, x in zip(inputs.leaves(), grads, strict=True)}
    rows = _rows(inputs, tokens, reached, settings, bias)
    ok = short["ok"] and finite and all(row["ok"] for row in rows) and not settings.planted("red", bias)
    return {"ok": ok, "finite": finite, "short": short, "worst": max(rows, key=lambda row: row["error"] / row["budget"]), **_errors(rows)}


def _errors(rows: list[dict]) -> dict[str, float]:
    """Relative root-mean-square errors, ours and PyTorch's, of the output and of the worst gradient."""
    grads = [row for row in rows if row["name"].startswith("grad_")]
    (out,) = (row for row in rows if row["name"] == "out")
    worst = max(grads, key=lambda row: row["error"])
    return {"output_error": out["error"], "output_error_eager": out["eager"], "gradient_error": worst["error"],
            "gradient_error_eager": worst["eager"], "gradient": worst["name"]}  # fmt: skip


@functools.lru_cache(maxsize=64)
def _short(dim: int, chunk_size: int, bias: str, settings: Settings) -> dict:
    """A short case with an odd tail, with the tests' budgets; it repeats from shape to shape."""
    case = short_case(dim, chunk_size, bias, settings)
    report = check(case, settings.backend, DTYPE, settings.device)
    rows = [{"name": row.name, "error": row.error, "eager": row.usual} for row in report.rows]
    return {"ok": report.ok, "worst": dataclasses.asdict(report.worst), **_errors(rows)}


def short_case(dim: int, chunk_size: int, bias: str, settings: Settings) -> Case:
    """A few chunks of one head; where psi or its slope jumps, its draw keeps errors away from the jump."""
    return case_of(Shape(1, (1 if settings.toy else 2) * chunk_size + 5, 1, dim, chunk_size), bias, initial="dual")


def _rows(inputs: Inputs, tokens: int, reached: dict[str, Tensor], settings: Settings, bias: str) -> list[dict]:
    """The full call's first chunks, every tensor with its error and budget."""
    part, kinks = _part(inputs, tokens), KINKS.get(bias, (0.0, 0.0))
    exact, low = truth(part), evaluate(part, eager_run)
    rows = []
    for name, value in reached.items():
        error, eager = relative_error(cut(value, tokens), exact[name]), relative_error(low[name], exact[name])
        kink = kinks[name.startswith("grad_")] * (TOY_KINK if settings.toy else 1.0)
        budget = FACTOR * eager + torch.finfo(DTYPE).eps / 2 + kink
        rows.append({"name": name, "error": error, "budget": budget, "eager": eager, "ok": error <= budget})
    return rows


def cut(x: Tensor, tokens: int) -> Tensor:
    """The first tokens of the first and last sequences' first and last heads."""
    ends = lambda n: sorted({0, n - 1})
    return x[ends(x.shape[0])][:, :tokens][:, :, ends(x.shape[2])]


def _part(inputs: Inputs, tokens: int) -> Inputs:
    """The problem that :func:`cut` leaves."""
    tensors = {name: cut(x.detach(), tokens).requires_grad_() for name, x in inputs.tensors.items()}
    b, t, h, dk = tensors["q"].shape
    case = dataclasses.replace(inputs.case, batch=b, tokens=t, heads=h)
    no_grads = tensors["q"].new_zeros(b, h, case.value_dim, dk, dtype=torch.float32)
    return Inputs(case, tensors, (), cut(inputs.grad_out, tokens), (no_grads,))
