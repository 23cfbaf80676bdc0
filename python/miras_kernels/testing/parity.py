"""Is a backend right? Outputs, states and every gradient against the float64 reference.

The budget of a tensor is derived, not tuned. With ``u`` the unit roundoff of the arithmetic (2^-24: every backend computes in
float32 or better) and ``r`` that of the tensor's own dtype, a relative (Frobenius) error may be at most ::

    FACTOR * error of the same computation by the float32 reference  +  u (sqrt(n) + ULPS)  +  r

The first term carries the conditioning of the case, the second the order of summation (n: the longest reduction, rounding errors
adding up like a random walk) and elementary functions that are right to a few units in the last place, the third the rounding of the
result itself.

A backend that multiplies 16-bit numbers (tensor cores) is held to the same reference whose matrix products, forward and backward,
take and give that dtype, as PyTorch's do under autocast. Where psi or its slope jumps, such arithmetic may take another side than
float64, so the data keep their distance from the jump (`MARGIN`).

One run of the reference may be lucky: in an MLP memory, which amplifies roundings, and in 16 bits, where the gradient of one token's
step size is one number with one error. There the first term is the most of some runs with other roundings (:func:`sensitivity`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .. import dispatch
from ..memory import linear_memory, mlp_memory
from ..reference import chunkwise
from .cases import KINK_DISTANCE, Case, Inputs

__all__ = [
    "Report", "RoundedProducts", "Row", "baseline", "check", "evaluate", "judge", "margin", "operands", "relative_error", "sensitivity",
    "truth",
]  # fmt: skip

FACTOR = 3.0
ARITHMETIC = 2.0**-24
ULPS = 4.0
#: how far errors stay from a kink of psi, in units of the operands' roundoff
MARGIN = 8.0


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


class RoundedProducts(TorchDispatchMode):
    """Within it matrix products take and give a dtype, as they do under autocast; they multiply and add as they did.

    Args:
        dither: where given, numbers that the dtype does not hold are rounded up or down at random: moved by less than half a unit in the
            last place first, which leaves those that it holds.
    """

    PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.bmm.default)

    def __init__(self, dtype: torch.dtype, dither: torch.Generator | None = None):
        super().__init__()
        self.dtype, self.dither = dtype, dither

    def round(self, x: Tensor) -> Tensor:
        if self.dither is not None:
            noise = torch.rand(x.shape, generator=self.dither, dtype=x.dtype).to(x.device)
            x = x * (1 + torch.finfo(self.dtype).eps / 2 * (2 * noise - 1))
        return x.to(self.dtype).to(x.dtype)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in self.PRODUCTS:
            return self.round(func(*map(self.round, args)))
        return func(*args, **(kwargs or {}))


def baseline(inputs: Inputs, operands: torch.dtype, dither: torch.Generator | None = None) -> dict[str, Tensor]:
    """The reference in float32 on the same numbers, matrix products taking ``operands``."""
    wide = inputs.to(torch.float64).to(torch.float32)
    if operands == torch.float32:
        return evaluate(wide, chunkwise.run)
    with RoundedProducts(operands, dither):
        return evaluate(wide, chunkwise.run)


def operands(run: str | Callable, dtype: torch.dtype) -> torch.dtype:
    """The dtype of the numbers that a backend multiplies, for inputs of a dtype."""
    return dispatch.BACKENDS[run].operands(dtype) if run in dispatch.BACKENDS else torch.float32


def truth(inputs: Inputs) -> dict[str, Tensor]:
    """The float64 reference on the same (already rounded) numbers."""
    return evaluate(inputs.to(torch.float64), chunkwise.run)


def sensitivity(inputs: Inputs, exact: dict[str, Tensor], operands: torch.dtype = torch.float32, draws: int = 3) -> dict[str, float]:
    """How far results are from the exact ones when roundings fall otherwise, the most of some draws.

    In float32 every input moves by about a rounding; counted are how far the exact results move and how far the reference is then from
    them: where a problem amplifies roundings (LayerNorm of a memory that decayed to nothing), its error varies tenfold from draw to
    draw. In 16 bits the matrix products round at random.
    """
    generator, wide = torch.Generator().manual_seed(0), inputs.to(torch.float64)

    def moved(x: Tensor) -> Tensor:
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
        return (x.detach() * (1 + ARITHMETIC * noise)).float().double().requires_grad_()

    most = dict.fromkeys(exact, 0.0)
    for _ in range(draws):
        if operands == torch.float32:
            tensors = {name: moved(x) for name, x in wide.tensors.items()}
            near = dataclasses.replace(wide, tensors=tensors, duals=tuple(map(moved, wide.duals)), momenta=tuple(map(moved, wide.momenta)))
            there, reached = truth(near), baseline(near, operands)
        else:
            there, reached = exact, baseline(inputs, operands, generator)
        for name, worst in most.items():
            most[name] = max(worst, relative_error(there[name], exact[name]), relative_error(reached[name], there[name]))
    return most


@dataclasses.dataclass(frozen=True)
class Row:
    """One tensor's relative error and what it may be."""

    name: str
    error: float
    budget: float
    usual: float  # what rounding alone does: to the reference in the backend's arithmetic, and to its inputs

    @property
    def ok(self) -> bool:
        return self.error <= self.budget


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
    inputs = case.draw(dtype, device, margin(case, multiplied))
    return judge(inputs, evaluate(inputs, run), multiplied, draws=0 if multiplied == torch.float32 and case.memory == "linear" else 3)


def judge(inputs: Inputs, reached: dict[str, Tensor], multiplied: torch.dtype, draws: int) -> Report:
    """Compare results, all of a case's or some, with float64.

    Args:
        multiplied: the dtype of the numbers that were multiplied.
        draws: of :func:`sensitivity`, beside the plain run.
    """
    case, exact = inputs.case, {name: x for name, x in truth(inputs).items() if name in reached}
    usual = baseline(inputs, multiplied)
    moves = sensitivity(inputs, exact, multiplied, draws)
    longest = max(case.tokens, case.chunk_size, case.key_dim, case.value_dim, case.hidden if case.memory == "mlp" else 0)
    rows = []
    for name, value in exact.items():
        rounding = torch.finfo(reached[name].dtype).eps / 2
        expected = max(relative_error(usual[name], value), moves[name])
        budget = FACTOR * expected + ARITHMETIC * (math.sqrt(longest) + ULPS) + rounding
        rows.append(Row(name, relative_error(reached[name], value), budget, expected))
    return Report(case, inputs.tensors["q"].dtype, tuple(rows))
