"""Is a backend right? Outputs, states and every gradient against the float64 reference.

The budget of a tensor is derived, not tuned: Monte Carlo arithmetic (Parker 1997) says what rounding does to it. The reference is run
:data:`DRAWS` times in float64 with the result of every operation multiplied by ``1 + u xi``, where u is the unit roundoff of the
arithmetic (2^-24: every backend computes in float32 or better) and xi a random number of variance 1, twice or more what a rounding has:
room for a kernel that rounds more often (:class:`Rounding` has what sums, functions and 16-bit products do). The perturbations pass
through the case as roundings do, its conditioning and cancellation included, but they neither depend on a machine, a BLAS or a number
of threads nor can they be lucky. With e_1 ... e_K the K perturbed errors of a tensor, a relative (Frobenius) error may be at most ::

    q sqrt(mean |e_k|^2)  +  ULPS u  +  r

the second term being a few roundings where the reference has none, and r the unit roundoff of the tensor's own dtype.

To first order an error is a Gaussian vector, its square a sum of ``lambda_i chi^2_i``. By how much may a backend's, one more draw from
the like of it, exceed the mean of K? Of a tensor with many independent errors by little, of a single number, where luck is unbounded,
by far more. A Chernoff bound over the backend's error and the K draws gives, for n equal lambdas, ::

    P(|e|^2 > q^2 mean |e_k|^2)  <=  exp(-n/2 ((K + 1) log((K + q^2) / (K + 1)) - log q^2))

and, as the bound grows the more unequal they are (it is Schur-convex), with ``n = sqrt(nu)`` for any lambdas that have
``nu = (sum lambda)^2 / sum lambda^2``: the largest is at most ``sum lambda / sqrt(nu)``. The scalar products of the draws' errors tell
nu, exactly where it is 1. q is such that this is :data:`FALSE_ALARM`, 1e-9: fewer than 20,000 tensors are compared by all tests
together, so that one of them is red for no reason with a probability below 2e-5.

Where psi or its slope jumps, 16-bit products may take another side than float64, so the data keep their distance from the jump
(`MARGIN`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import hardshrink
from torch.utils._python_dispatch import TorchDispatchMode

from .. import dispatch
from ..backends.reference import chunkwise
from ..memory import linear_memory, mlp_memory
from .cases import KINK_DISTANCE, Case, Inputs

__all__ = [
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

ARITHMETIC = 2.0**-24
#: the roundings of an elementary function, or of what a kernel does and the reference does not
ULPS = 4.0
#: runs of the perturbed reference: half of them for a linear memory of many numbers, whose errors are many. LayerNorm unites them
DRAWS, MANY = 16, 2**13
#: the probability that rounding alone exceeds a tensor's budget
FALSE_ALARM = 1e-9
#: how far errors stay from a kink of psi, in units of the operands' roundoff
MARGIN = 8.0
#: so many numbers of the largest tensor, over all draws, are computed at once
AT_ONCE = 2**20
SMALLEST = torch.finfo(torch.float32).tiny

aten = torch.ops.aten


@functools.cache
def _noise() -> Tensor:
    return torch.rand(2**20 + 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1


@functools.cache
def _factors(most: float) -> Tensor:
    return 1 + most * _noise()


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
        function = linear_memory if inputs.case.memory == "linear" else mlp_memory
        out, state = function(**inputs.arguments(), backend=run)
    results = {"out": out} | {f"final_dual_{i}": x for i, x in enumerate(state.dual)}
    if state.momentum is not None:
        results |= {f"final_momentum_{i}": x for i, x in enumerate(state.momentum)}
    leaves = inputs.leaves()
    given = (inputs.grad_out.to(out.dtype), *inputs.grad_duals, *inputs.grad_momenta)
    grads = torch.autograd.grad((out, *state.matrices()), tuple(leaves.values()), given)
    return {name: x.detach() for name, x in results.items()} | {f"grad_{name}": g for name, g in zip(leaves, grads, strict=True)}


def operands(run: str | Callable, dtype: torch.dtype) -> torch.dtype:
    """The dtype of the numbers that a backend multiplies, for inputs of a dtype."""
    return dispatch.BACKENDS[run].operands(dtype) if run in dispatch.BACKENDS else torch.float32


def truth(inputs: Inputs) -> dict[str, Tensor]:
    """The float64 reference on the same (already rounded) numbers."""
    return evaluate(inputs.to(torch.float64), chunkwise.run)


# --------------------------------------------------------------------------------------------------------- perturbed runs


def _layer_norm(x, shape, weight, bias, eps):
    if weight is not None or bias is not None or len(shape) != 1:
        raise NotImplementedError("Rounding: expected a layer_norm over one axis without an affine part")
    centred = x - x.mean(-1, keepdim=True)
    r = ((centred * centred).mean(-1, keepdim=True) + eps).rsqrt()
    return centred * r, x.mean(-1, keepdim=True), r


def _layer_norm_backward(grad, x, shape, mean, r, weight, bias, mask):
    y = (x - mean) * r
    return r * (grad - grad.mean(-1, keepdim=True) - y * (grad * y).mean(-1, keepdim=True)), None, None


EXACT = {
    aten._to_copy, aten._unsafe_view, aten.abs, aten.alias, aten.cat, aten.clone, aten.constant_pad_nd, aten.copy_, aten.detach,
    aten.empty_like, aten.expand, aten.fill, aten.fill_, aten.flip, aten.full, aten.full_like, aten.gather, aten.index,
    aten.index_put, aten.index_select, aten.lift_fresh, aten.masked_fill, aten.masked_fill_, aten.max, aten.maximum, aten.minimum,
    aten.neg, aten.new_empty, aten.new_full, aten.new_ones, aten.new_zeros, aten.ones, aten.ones_like, aten.permute, aten.relu_,
    aten.roll, aten.scalar_tensor, aten.scatter_, aten.select, aten.select_backward, aten.sgn, aten.sign, aten.slice,
    aten.slice_backward, aten.softshrink_backward, aten.split, aten.split_with_sizes, aten.squeeze, aten.stack, aten.t,
    aten.transpose, aten.tril, aten.unbind, aten.unsqueeze, aten.view, aten.where, aten.zero_, aten.zeros, aten.zeros_like,
}  # fmt: skip
ROUNDED = {aten.add, aten.div, aten.mul, aten.reciprocal, aten.rsub, aten.softshrink, aten.sqrt, aten.sub}
PRODUCTS = {aten.bmm, aten.mm}
SUMS = {aten.cumsum, aten.mean, aten.sum}
#: functions of whole rows that cancel inside, step by step
STEPS: dict[Any, Callable] = {
    aten.native_layer_norm: _layer_norm,
    aten.native_layer_norm_backward: _layer_norm_backward,
    aten._softmax_backward_data: lambda grad, y, dim, dtype: y * (grad - (grad * y).sum(dim, keepdim=True)),
}


class Rounding(TorchDispatchMode):
    """Within it float64 rounds at random as float32 does at worst, and matrix products take and give a dtype, as under autocast.

    * What moves, selects or negates numbers is exact.
    * A sum of n terms, a matrix product's as well, gets the roundings of all partial sums, added up one after the other in a random
      order: of variance ``u^2 (Q (n + 1) / 6 - Q / n + S^2 (n + 1) / 3)``, with S the sum and Q that of squares, and ``u^2 Q`` for
      the products.
    * An elementary function, or whatever else is not in a table here, gets its arguments rounded and ULPS roundings of its result.
    * A function or a result below the smallest normal number is 0.
    * Products of 16-bit operands: all that the dtype does not hold is moved by up to a unit roundoff, and then rounded to it.
    """

    def __init__(self, operands: torch.dtype, seed: int):
        super().__init__()
        self.operands, self.random = operands, random.Random(seed)

    def stretch(self, numbers: Tensor, like: Tensor) -> Tensor:
        """As many of the numbers as a tensor has, from anywhere among them."""
        n = like.numel()
        if n > len(numbers):
            numbers = numbers.repeat(1 + n // len(numbers))
        first = self.random.randrange(len(numbers) - n + 1)
        return numbers[first : first + n].view(like.shape)

    def factors(self, roundings: float, like: Tensor) -> Tensor:
        return self.stretch(_factors(roundings * ARITHMETIC), like)

    def narrowed(self, x: Tensor) -> Tensor:
        if self.operands == torch.float32:
            return x
        return (x * self.stretch(_factors(torch.finfo(self.operands).eps / 2), x)).to(self.operands).to(x.dtype)

    def summed(self, total: Tensor, squares: Tensor, n: int, products: bool) -> Tensor:
        """A sum of n terms, from what it is and the sum of its terms' squares; both are overwritten."""
        if n == 1 and not products:
            return total
        variance = squares.mul_((n + 1) / 6 - 1 / n + products).addcmul_(total, total, value=(n + 1) / 3)
        return total.addcmul_(variance.sqrt_(), self.stretch(_noise(), total), value=ARITHMETIC)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, packet = kwargs or {}, func.overloadpacket
        if packet in STEPS:
            with self:
                return STEPS[packet](*args, **kwargs)
        if packet in PRODUCTS:
            a, b = map(self.narrowed, args)
            return self.narrowed(self.summed(func(a, b), func(a * a, b * b), a.shape[-1], True))
        if packet not in EXACT and func._schema.is_mutable and args[0].is_floating_point():
            raise NotImplementedError(f"Rounding: {func} changes its arguments")
        result = func(*args, **kwargs)
        if packet in EXACT:
            return result
        if not isinstance(result, Tensor) or packet not in ROUNDED | SUMS | {aten.cumprod}:
            result = func(*(self.nudged(x, 1.0) for x in args), **kwargs)
            return tuple(self.nudged(x, ULPS) for x in result) if isinstance(result, tuple) else self.nudged(result, ULPS)
        if result.dtype != torch.float64:
            return result
        if packet in SUMS:
            n = args[0].shape[args[1]] if packet is aten.cumsum else max(1, args[0].numel() // max(1, result.numel()))
            squares = func(args[0] * args[0], *args[1:], **kwargs) / (n if packet is aten.mean else 1)
            return self.summed(result, squares, n, False)
        return result.mul_(self.factors(math.sqrt(result.shape[args[1]]) if packet is aten.cumprod else 1.0, result))

    def nudged(self, x, roundings: float):
        """What a function takes or gives, where it is a float64 tensor."""
        if not isinstance(x, Tensor) or x.dtype != torch.float64:
            return x
        return hardshrink(x * self.factors(roundings, x), SMALLEST)


def _copies(inputs: Inputs, n: int) -> Inputs:
    """So many copies of every head."""
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


def _apart(x: Tensor, exact: Tensor, n: int) -> Tensor:
    """Results of so many copies of every head, ``[n, ...]``."""
    if n == 1:
        return x.unsqueeze(0)
    axis = next(i for i, (many, one) in enumerate(zip(x.shape, exact.shape, strict=True)) if many != one)
    return x.unflatten(axis, (-1, n)).movedim(axis + 1, 0)


# ----------------------------------------------------------------------------------------------------------------- budgets


@dataclasses.dataclass(frozen=True)
class Expected:
    """One tensor's exact value, and what rounding does to it."""

    exact: Tensor
    usual: float  # the root of the mean square of the relative errors that roundings cause
    budget: float  # less the rounding of the result itself


def excess(independent: float, draws: int) -> float:
    """q, from the bound above, for so many independent errors of a tensor."""
    wanted = -2 * math.log(FALSE_ALARM) / math.sqrt(independent)
    low, high = 0.0, 100.0  # log q^2
    for _ in range(60):
        middle = (low + high) / 2
        reached = (draws + 1) * math.log((draws + math.exp(middle)) / (draws + 1)) - middle
        low, high = (middle, high) if reached < wanted else (low, middle)
    return math.exp(high / 2)


def expected(exact: Tensor, draws: Tensor) -> Expected:
    """From perturbed values ``[K, ...]``."""
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
    """What a run must give, by name.

    Args:
        multiplied: the dtype of the numbers that are multiplied.
        run: the reference, by default :func:`evaluate` with :func:`chunkwise.run`.
        runs: how many perturbed runs, by default as many as :data:`DRAWS` says.
    """
    run = run or functools.partial(evaluate, run=chunkwise.run)
    wide, case, q = inputs.to(torch.float64), inputs.case, inputs.tensors["q"]
    runs = runs or (DRAWS // 2 if case.memory == "linear" and q.numel() > MANY else DRAWS)
    of_a_token = max(case.key_dim, case.value_dim, case.chunk_size * (case.value_dim if case.decay.endswith("channel") else 1))
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
    """The same of any float64 computation in PyTorch, that it may call so often.

    Args:
        exact: its results.
        together: how many copies of every head one call computes.
    """
    draws: dict[str, list[Tensor]] = {name: [] for name in exact}
    for seed in range(runs // together):
        with Rounding(multiplied, seed):
            results = compute()
        for name, x in results.items():
            draws[name].append(hardshrink(_apart(x, exact[name], together), SMALLEST))
    return {name: expected(x, torch.cat(draws[name])) for name, x in exact.items()}


@dataclasses.dataclass(frozen=True)
class Row:
    """One tensor's relative error and what it may be."""

    name: str
    error: float
    budget: float
    usual: float  # what rounding does to it: see Expected

    @property
    def ok(self) -> bool:
        return self.error <= self.budget < math.inf  # a budget without end is that of a case that proves nothing


@dataclasses.dataclass(frozen=True)
class Report:
    """All tensors of a case."""

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
    """How far a case's errors stay from a kink of psi, for a backend that multiplies ``operands``: see :meth:`Case.draw`."""
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
    """Compare results, all of a case's or some, with float64.

    Args:
        multiplied: the dtype of the numbers that were multiplied.
    """
    return compare(inputs.case, inputs.tensors["q"].dtype, reached, expect(inputs, multiplied))


def compare(case: Case, dtype: torch.dtype, reached: dict[str, Tensor], wanted: dict[str, Expected]) -> Report:
    """Hold every result to its budget."""
    rows = []
    for name, x in reached.items():
        budget = wanted[name].budget + torch.finfo(x.dtype).eps / 2
        rows.append(Row(name, relative_error(x, wanted[name].exact), budget, wanted[name].usual))
    return Report(case, dtype, tuple(rows))
