"""Compare a backend with the float64 reference: outputs, states and every gradient.

The error budget of a tensor is derived, not tuned, from Monte Carlo arithmetic (Parker 1997). The reference is run :data:`DRAWS` times in
float64 with the result of every operation multiplied by ``1 + u xi``, where u is the unit roundoff of the arithmetic (2^-24: every
backend computes in float32 or better) and xi a random number with at least twice the variance of a rounding, so that a kernel may round
more often (:class:`~.rounding.Rounding` describes sums, functions and 16-bit products). The perturbations propagate as roundings do,
including conditioning and cancellation, but do not depend on the machine, the BLAS or the number of threads, and cannot vanish by
chance. With e_1 ... e_K the K perturbed errors of a tensor, a relative (Frobenius) error may be at most ::

    q sqrt(mean |e_k|^2)  +  ULPS u  +  r

where the second term allows for a few roundings that the reference does not have, and r is the unit roundoff of the tensor's dtype.

To first order an error is a Gaussian vector, and its square a sum of ``lambda_i chi^2_i``. The backend's error is one more sample of the
same kind; q bounds by how much it may exceed the mean of K samples: by little for a tensor with many independent errors, by much more for
a single number. A Chernoff bound over the backend's error and the K samples gives, for n equal lambdas, ::

    P(|e|^2 > q^2 mean |e_k|^2)  <=  exp(-n/2 ((K + 1) log((K + q^2) / (K + 1)) - log q^2))

The bound grows with the inequality of the lambdas (it is Schur-convex), so for any lambdas it holds with ``n = sqrt(nu)``,
``nu = (sum lambda)^2 / sum lambda^2``, since the largest is at most ``sum lambda / sqrt(nu)``. nu is estimated from the scalar products of
the sampled errors (exactly where it is 1). q is chosen such that the probability is :data:`FALSE_ALARM`, 1e-9: all tests together compare
fewer than 20,000 tensors, so that any of them fails by chance with a probability below 2e-5.

Where psi or its slope jumps, 16-bit products may be on the other side of the jump than float64, so the data keep a distance from it
(:data:`MARGIN`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from .. import dispatch
from ..backends.reference import chunkwise
from .cases import KINK_DISTANCE, Case, Inputs
from .rounding import ARITHMETIC, SMALLEST, ULPS, Rounding

__all__ = [
    "ARITHMETIC",
    "ULPS",
    "Expected",
    "Report",
    "Rounding",
    "Row",
    "check",
    "evaluate",
    "expect",
    "judge",
    "margin",
    "operands",
    "relative_error",
    "spread",
    "truth",
]

#: perturbed runs of the reference; half as many for a linear memory with more than MANY numbers in q, which has many independent errors
DRAWS, MANY = 16, 2**13
#: probability that rounding alone exceeds a tensor's budget
FALSE_ALARM = 1e-9
#: distance of errors from a kink of psi, in units of the operands' roundoff
MARGIN = 8.0
#: limit on the numbers of the largest tensor that are computed at once, over several perturbed runs
AT_ONCE = 2**20


def relative_error(x: Tensor, y: Tensor) -> float:
    """``||x - y|| / ||y||`` in float64, ``||x||`` where y is zero; infinite where x is not finite."""
    x, y = x.detach().double().cpu(), y.detach().double().cpu()
    if x.shape != y.shape:
        raise ValueError(f"shapes differ: {tuple(x.shape)} and {tuple(y.shape)}")
    if not torch.isfinite(x).all():
        return math.inf
    difference, norm = (x - y).norm().item(), y.norm().item()
    return difference / norm if norm > 0 else difference


def evaluate(inputs: Inputs, run: str | Callable = "auto") -> dict[str, Tensor]:
    """Outputs, final duals and momenta, and gradients, by name.

    Args:
        run: a backend's name, or a function ``Call -> (out, state)`` such as ``reference.definition.run``.
    """
    if callable(run):
        out, state = run(inputs.call())
    else:
        function = inputs.case.function
        out, state = function(**inputs.arguments(), backend=run)
    results = {"out": out} | {f"final_dual_{i}": x for i, x in enumerate(state.dual)}
    if state.momentum is not None:
        results |= {f"final_momentum_{i}": x for i, x in enumerate(state.momentum)}
    leaves = inputs.leaves()
    given = (inputs.grad_out.to(out.dtype), *inputs.grad_duals, *inputs.grad_momenta)
    grads = torch.autograd.grad((out, *state.matrices()), tuple(leaves.values()), given)
    return {name: x.detach() for name, x in results.items()} | {f"grad_{name}": g for name, g in zip(leaves, grads, strict=True)}


def operands(run: str | Callable, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a backend multiplies, for inputs of dtype ``dtype``."""
    return dispatch.BACKENDS[run].operands(dtype) if run in dispatch.BACKENDS else torch.float32


def truth(inputs: Inputs) -> dict[str, Tensor]:
    """The float64 reference on the same (rounded) numbers."""
    return evaluate(inputs.to(torch.float64), chunkwise.run)


# --------------------------------------------------------------------------------------------------------- perturbed runs


def _copies(inputs: Inputs, n: int) -> Inputs:
    """The inputs with ``n`` copies of every head."""
    many = lambda x, axis: x.detach().repeat_interleave(n, axis).requires_grad_(x.requires_grad)
    heads = lambda matrices: tuple(many(x, -3) for x in matrices)
    return Inputs(
        inputs.case,
        {name: many(x, 0 if name.startswith("ln_") else 2) for name, x in inputs.tensors.items()},
        heads(inputs.duals),
        many(inputs.grad_out, 2),
        heads(inputs.grad_duals),
        heads(inputs.momenta),
        heads(inputs.grad_momenta),
    )


def _split_copies(x: Tensor, exact: Tensor, n: int) -> Tensor:
    """Results of ``n`` copies of every head as ``[n, ...]``."""
    if n == 1:
        return x.unsqueeze(0)
    axis = next(i for i, (many, one) in enumerate(zip(x.shape, exact.shape, strict=True)) if many != one)
    return x.unflatten(axis, (-1, n)).movedim(axis + 1, 0)


# ----------------------------------------------------------------------------------------------------------------- budgets


@dataclasses.dataclass(frozen=True)
class Expected:
    """A tensor's exact value and error budget."""

    exact: Tensor
    usual: float  # root mean square of the relative errors of the perturbed runs
    budget: float  # without the rounding of the result itself


def excess(independent: float, draws: int) -> float:
    """q of the bound above, for a tensor with so many independent errors."""
    wanted = -2 * math.log(FALSE_ALARM) / math.sqrt(independent)
    low, high = 0.0, 100.0  # log q^2
    for _ in range(60):
        middle = (low + high) / 2
        reached = (draws + 1) * math.log((draws + math.exp(middle)) / (draws + 1)) - middle
        low, high = (middle, high) if reached < wanted else (low, middle)
    return math.exp(high / 2)


def expected(exact: Tensor, draws: Tensor) -> Expected:
    """From the results ``[K, ...]`` of perturbed runs."""
    errors = (draws - exact).flatten(1)
    products = errors @ errors.T / (exact.square().sum().item() or 1.0)
    sizes = products.diag()
    usual = sizes.mean().sqrt().item()
    if not math.isfinite(usual):
        return Expected(exact, math.inf, math.inf)
    both = sizes.sum().square() - sizes.square().sum()  # over pairs of draws
    along = products.square().sum() - sizes.square().sum()
    independent = max(1.0, (both / along).item()) if along > 0 else 1.0
    return Expected(exact, usual, excess(independent, len(draws)) * usual + ULPS * ARITHMETIC)


def expect(
    inputs: Inputs, multiplied: torch.dtype, run: Callable[[Inputs], dict[str, Tensor]] | None = None, runs: int | None = None
) -> dict[str, Expected]:
    """Exact results and budgets, by name.

    Args:
        multiplied: the dtype of the operands of matrix products.
        run: the reference, by default :func:`evaluate` with :func:`chunkwise.run`.
        runs: number of perturbed runs, by default that of :data:`DRAWS`.
    """
    run = run or functools.partial(evaluate, run=chunkwise.run)
    wide, case, q = inputs.to(torch.float64), inputs.case, inputs.tensors["q"]
    runs = runs or (DRAWS // 2 if case.memory == "linear" and q.numel() > MANY else DRAWS)
    channels = case.value_dim if case.decay.endswith("channel") else 16 * case.key_dim if case.decay.endswith("key") else 1
    of_a_token = max(case.key_dim, case.value_dim, case.chunk_size * channels)
    together = max(n for n in (1, 2, 4, 8, 16) if n <= max(1, min(runs, AT_ONCE // max(1, q.shape[:3].numel() * of_a_token))))
    many = _copies(wide, together)
    return spread(run(wide), lambda: run(many), multiplied, runs, together)


def spread(
    exact: dict[str, Tensor],
    compute: Callable[[], dict[str, Tensor]],
    multiplied: torch.dtype = torch.float32,
    runs: int = DRAWS,
    together=1,
) -> dict[str, Expected]:
    """The same for any float64 computation in PyTorch.

    Args:
        exact: its results.
        compute: the computation, called several times.
        together: number of copies of every head in one call.
    """
    draws: dict[str, list[Tensor]] = {name: [] for name in exact}
    for seed in range(runs // together):
        with Rounding(multiplied, seed):
            results = compute()
        for name, x in results.items():
            draws[name].append(hardshrink(_split_copies(x, exact[name], together), SMALLEST))
    return {name: expected(x, torch.cat(draws[name])) for name, x in exact.items()}


@dataclasses.dataclass(frozen=True)
class Row:
    """One tensor's relative error and budget."""

    name: str
    error: float
    budget: float
    usual: float  # see Expected

    @property
    def ok(self) -> bool:
        return self.error <= self.budget < math.inf  # a case with an infinite budget checks nothing


@dataclasses.dataclass(frozen=True)
class Report:
    """The results of one case."""

    case: Case
    dtype: torch.dtype
    rows: tuple[Row, ...]

    @property
    def ok(self) -> bool:
        return bool(self.rows) and all(row.ok for row in self.rows)

    @property
    def worst(self) -> Row:
        """The row closest to (or furthest beyond) its budget."""
        return max(self.rows, key=lambda row: row.error / row.budget)

    def __str__(self) -> str:
        lines = [f"{self.case.name} {self.dtype}: {'ok' if self.ok else 'WRONG'}"]
        lines += [f"  {r.name:20s} error {r.error:.2e}  budget {r.budget:.2e}{'' if r.ok else '  <--'}" for r in self.rows]
        return "\n".join(lines)


def margin(case: Case, operands: torch.dtype) -> float:
    """Distance of a case's errors from a kink of psi, for a backend that multiplies in dtype ``operands``: see :meth:`Case.draw`."""
    return max(MARGIN * torch.finfo(operands).eps / 2 * case.delta_scale, KINK_DISTANCE)


def check(case: Case, run: str | Callable = "auto", dtype: torch.dtype = torch.float32, device: str = "cpu") -> Report:
    """Compare a backend with float64 on one case: outputs, final states and every gradient."""
    multiplied = operands(run, dtype)
    reached = evaluate(case.draw(dtype, device, margin(case, multiplied)), run)
    return compare(case, dtype, reached, _expect_of(case, dtype, multiplied))


@functools.lru_cache(maxsize=512)
def _expect_of(case: Case, dtype: torch.dtype, multiplied: torch.dtype) -> dict[str, Expected]:
    return expect(case.draw(dtype, margin=margin(case, multiplied)), multiplied)


def judge(inputs: Inputs, reached: dict[str, Tensor], multiplied: torch.dtype) -> Report:
    """Compare results (all of a case's, or some of them) with float64.

    Args:
        multiplied: the dtype of the operands of matrix products.
    """
    return compare(inputs.case, inputs.tensors["q"].dtype, reached, expect(inputs, multiplied))


def compare(case: Case, dtype: torch.dtype, reached: dict[str, Tensor], wanted: dict[str, Expected]) -> Report:
    """Compare results with their budgets."""
    rows = []
    for name, x in reached.items():
        budget = wanted[name].budget + torch.finfo(x.dtype).eps / 2
        rows.append(Row(name, relative_error(x, wanted[name].exact), budget, wanted[name].usual))
    return Report(case, dtype, tuple(rows))
