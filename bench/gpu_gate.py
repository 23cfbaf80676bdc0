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
#: a relative error that may be as large as this says little: bfloat16 shares no digit with float64 there
SAYS_LITTLE = 0.5
#: chunks that the full call's comparison looks at
CHUNKS = 4


def gate(inputs: Inputs, shape: Shape, settings: Settings, name: str) -> dict:
    """The verdict on our call with these inputs, with what was measured for it."""
    short = _short(few_chunks(shape, settings), name, settings)
    tokens = min(shape.tokens, CHUNKS * shape.chunk_size)
    looks_at = torch.zeros_like(inputs.grad_out)
    looks_at[_ends(shape.batch), :tokens] = inputs.grad_out[_ends(shape.batch), :tokens]
    (out,) = kernel(inputs, settings.backend, FORWARD)()
    grads = kernel(dataclasses.replace(inputs, grad_out=looks_at), settings.backend, BOTH)()
    finite = all_finite((out, *grads))
    if tokens < shape.tokens or shape.batch > 2:
        finite = finite and all_finite(kernel(inputs, settings.backend, BOTH)())
    reached = {"out": out} | {f"grad_{leaf}": x for leaf, x in zip(inputs.leaves(), grads, strict=True)}
    rows = _rows(inputs, tokens, reached, settings)
    ok = short["ok"] and finite and all(row["ok"] for row in rows) and not settings.planted("red", name)
    worst, loosest = max(rows, key=lambda row: row["error"] / row["budget"]), max(rows, key=lambda row: row["budget"])
    return {"ok": ok, "finite": finite, "short": short, "worst": worst, "loosest": loosest, **_errors(rows)}


def _errors(rows: list[dict]) -> dict[str, float]:
    """Relative root-mean-square errors, ours and PyTorch's, of the output and of the worst gradient."""
    grads = [row for row in rows if row["name"].startswith("grad_")]
    (out,) = (row for row in rows if row["name"] == "out")
    worst = max(grads, key=lambda row: row["error"])
    return {"output_error": out["error"], "output_error_eager": out["eager"], "gradient_error": worst["error"],
            "gradient_error_eager": worst["eager"], "gradient": worst["name"]}  # fmt: skip


@functools.lru_cache(maxsize=64)
def _short(few: Shape, name: str, settings: Settings) -> dict:
    """A short case with an odd tail, with the tests' budgets; it repeats from shape to shape."""
    case = short_case(few, name)
    report = check(case, settings.backend, DTYPE, settings.device)
    rows = [{"name": row.name, "error": row.error, "eager": row.usual} for row in report.rows]
    loosest = dataclasses.asdict(max(report.rows, key=lambda row: row.budget))
    return {"ok": report.ok, "worst": dataclasses.asdict(report.worst), "loosest": loosest, **_errors(rows)}


def few_chunks(shape: Shape, settings: Settings) -> Shape:
    """A few chunks of one head in a shape's sizes; of an MLP memory four, since in one head of it rounding errors go all together."""
    several = 2 if shape.hidden and not settings.toy else 1
    return dataclasses.replace(shape, batch=several, tokens=(1 if settings.toy else 2) * shape.chunk_size + 5, heads=several)


def short_case(few: Shape, name: str) -> Case:
    """A case of such a shape; where psi or its slope jumps, its draw keeps errors away from the jump."""
    return case_of(few, name, initial="dual")


def _rows(inputs: Inputs, tokens: int, reached: dict[str, Tensor], settings: Settings) -> list[dict]:
    """The full call's first chunks, every tensor with its error and budget."""
    part, kinks = _part(inputs, tokens), KINKS.get(inputs.case.bias.name, (0.0, 0.0))
    exact, low = truth(part), evaluate(part, eager_run)
    rows = []
    for name, value in reached.items():
        error, eager = relative_error(cut(name, value, tokens), exact[name]), relative_error(low[name], exact[name])
        kink = kinks[name.startswith("grad_")] * (TOY_KINK if settings.toy else 1.0)
        budget = FACTOR * eager + torch.finfo(DTYPE).eps / 2 + kink
        rows.append({"name": name, "error": error, "budget": budget, "eager": eager, "ok": error <= budget})
    return rows


def _ends(n: int) -> list[int]:
    return sorted({0, n - 1})


def cut(name: str, x: Tensor, tokens: int) -> Tensor:
    """What the first tokens of the first and last sequences' first and last heads have of a tensor, or of its gradient."""
    name = name.removeprefix("grad_")
    if name.startswith("ln_"):
        return x[_ends(x.shape[0])]
    if name.startswith("initial_"):
        return x[_ends(x.shape[0])][:, _ends(x.shape[1])]
    return x[_ends(x.shape[0])][:, :tokens][:, :, _ends(x.shape[2])]


def _part(inputs: Inputs, tokens: int) -> Inputs:
    """The problem that :func:`cut` leaves."""
    leaves = {name: cut(name, x.detach(), tokens).requires_grad_() for name, x in inputs.leaves().items()}
    tensors = {name: leaves[name] for name in inputs.tensors}
    b, t, h, _ = tensors["q"].shape
    case = dataclasses.replace(inputs.case, batch=b, tokens=t, heads=h)
    duals = tuple(x for name, x in leaves.items() if name not in tensors)
    matrices = [(case.value_dim, case.key_dim)] if case.memory == "linear" else [(case.value_dim, case.hidden), (case.hidden, case.key_dim)]
    no_grads = tuple(tensors["q"].new_zeros(b, h, *sizes, dtype=torch.float32) for sizes in matrices)
    return Inputs(case, tensors, duals, cut("out", inputs.grad_out, tokens), no_grads, (), no_grads if case.momentum else ())
