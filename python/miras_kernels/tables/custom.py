"""Attentional biases and retention gates that users write as expressions; docs/your-own-bias.md is the guide."""

from __future__ import annotations

import dataclasses
import functools
import json
import keyword
import math
import re
import warnings
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from ..expressions import FUNCTIONS, Graph, Program, evaluate, parse
from .bias import ErrorBias
from .gate import Retention
from .row import Row, number

__all__ = ["CustomBias", "CustomRetention"]

INPUTS = ("e", "norm2", "delta")
#: What an expression that is not finite at delta = 0 reads instead of a smaller delta.
SMALLEST_DELTA = 1e-6

Self = TypeVar("Self", bound="_Written")


class _Written(Row):
    """A row that a user wrote: the text of its expression and the values of named numbers, sorted by name, are fields."""

    text: str
    values: tuple[tuple[str, float], ...]
    #: names that a parameter cannot have
    INPUTS: ClassVar[tuple[str, ...]]
    #: what backends run. Not a field: it follows from the fields
    programs: ClassVar[Any]

    def __repr__(self) -> str:
        numbers = "".join(f", {name}={value!r}" for name, value in self.values)
        return f"{type(self).__name__}({'loss=' if getattr(self, 'is_loss', False) else ''}{self.text!r}{numbers})"

    def argument(self) -> str:
        """As the command line takes it, without spaces: ``custom:e/s,s=0.5``."""
        text = "".join(self.text.split())
        return ",".join([f"custom:{'loss=' * getattr(self, 'is_loss', False)}{text}", *(f"{name}={x!r}" for name, x in self.values)])

    @classmethod
    @functools.lru_cache(maxsize=256)
    def from_code(cls: type[Self], code: str) -> Self:
        """The inverse of ``code``."""
        try:
            fields = json.loads(code.partition(" ")[2])
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{cls.__name__}: expected the code of an expression, got {code[:80]!r} ({error})") from None
        return cls.from_fields(fields)

    @classmethod
    def from_fields(cls: type[Self], fields: dict[str, Any]) -> Self:
        """They are checked as in the constructor."""
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(fields, dict) or fields.keys() != names:
            raise ValueError(f"{cls.__name__}: expected the fields {', '.join(sorted(names))}, got {str(fields)[:80]}")
        values = fields["values"]
        if not isinstance(values, (list, tuple)) or any(not isinstance(x, (list, tuple)) or len(x) != 2 for x in values):
            raise TypeError(f"{cls.__name__}: expected values as pairs of a name and a number, got {str(values)[:80]}")
        row = object.__new__(cls)
        row.__setstate__({**fields, "values": tuple((name, value) for name, value in values)})
        return row

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "code", f"{self.tag} {json.dumps(self.__getstate__())}")

    @property
    def parameters(self) -> tuple[float, ...]:
        """None: the numbers are constants of the programs."""
        return ()

    def _check(self) -> None:
        owner = type(self).__name__
        if not isinstance(self.text, str):
            raise TypeError(f"{owner}: an expression must be a string, got {type(self.text).__name__}")
        values = {}
        for name, value in self.values:
            if not isinstance(name, str) or not (name.isidentifier() and name.isascii()) or keyword.iskeyword(name):
                raise ValueError(f"{owner}: {str(name)[:50]!r} cannot name a parameter: expected a name in ASCII")
            if name in self.INPUTS or name in FUNCTIONS:
                raise ValueError(f"{owner}: {name!r} cannot name a parameter: it has a meaning in expressions")
            if not re.search(rf"\b{name}\b", self.text):
                raise ValueError(f"{owner}: the parameter {name} is not in the expression {self.text[:100]!r}")
            if name in values:
                raise ValueError(f"{owner}: the parameter {name} has two values")
            values[name] = number(self, name, value, -math.inf)
        object.__setattr__(self, "values", tuple(sorted(values.items())))
        try:
            object.__setattr__(self, "programs", self._compile())
        except (TypeError, ValueError) as error:
            raise type(error)(f"{owner}: {error}") from None

    def _compile(self) -> Any:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, init=False, repr=False)
class CustomBias(_Written, ErrorBias):
    """An attentional bias written as an expression of the error ``e = pred - v``; its derivatives follow from it.

    The expression is psi, the gradient of the inner loss in the prediction, or with ``loss=`` the loss itself. It may use ``e``, one value
    of the error; ``norm2``, the squared norm of the error's whole row; ``delta``, the threshold that a call then needs; the named numbers;
    ``+ - * / **``; ``abs sign sqrt exp log tanh cosh``; ``min`` and ``max`` (two arguments or more); ``clip(x, low, high)``; and
    ``where(a <= b, x, y)`` with one comparison. An exponent is a number. A loss is either one of ``e``, summed over the row, or one of
    ``norm2``, counted once.

    An expression is never executed as Python: it becomes a short program of arithmetic that every backend runs. Derivatives hold almost
    everywhere; ``min``, ``max``, ``where`` and ``clip`` have that of the argument they choose, ``abs``, ``sign``, ``sqrt`` and fractional
    powers the derivative 0 at 0. If the expression is not finite at ``delta = 0``, smaller deltas count as 1e-6.

    Args:
        psi: the expression of psi, at most 1000 characters.
        loss: the expression of the loss, instead of psi.
        parameters: named numbers; finite.

    Raises:
        TypeError: an expression that is not a string, a parameter that is not a number.
        ValueError: what is not such an expression, with the column; psi that is not 0 where the error is 0; psi or a derivative that is
            not finite for ``|e|`` up to 1e6.

    Warns:
        UserWarning: the slope of psi is unbounded, so that no step size is stable for all errors.

    Example::

        CustomBias("e / sqrt(1 + (e / s)**2)", s=0.5)  # pseudo-Huber
        CustomBias(loss="log(cosh(s * e)) / s", s=4.0)  # L1(4.0)
    """

    text: str
    is_loss: bool
    values: tuple[tuple[str, float], ...]
    name: ClassVar[str] = "custom"
    tag: ClassVar[int] = 9
    INPUTS: ClassVar[tuple[str, ...]] = INPUTS
    programs: ClassVar[Programs]

    def __init__(self, psi: str | None = None, /, *, loss: str | None = None, **parameters: float) -> None:
        if (psi is None) == (loss is None):
            raise ValueError(f"CustomBias: expected either psi or loss=, got {'neither' if psi is None else 'both'}")
        object.__setattr__(self, "text", loss if psi is None else psi)
        object.__setattr__(self, "is_loss", psi is None)
        object.__setattr__(self, "values", tuple(parameters.items()))
        self.__post_init__()
        self._warn_if_unbounded()

    def _compile(self):
        if not isinstance(self.is_loss, bool):
            raise TypeError(f"is_loss must be a bool, got {type(self.is_loss).__name__}")
        return _programs(self.text, self.is_loss, self.values)

    def _warn_if_unbounded(self) -> None:
        e = torch.tensor([1e-6, 1e-3, 1.0, 10.0, 1e3, 1e6], dtype=torch.float64)
        slope = evaluate(self.programs.derivatives, e, e * e, torch.ones_like(e))[0].abs().expand_as(e)
        if max(slope[0], slope[-1]) > 30 * slope[1:5].max():
            warnings.warn(
                f"{self!r}: the slope of psi is unbounded (at |e| = 1e-06, 1, 10, 1e+06 and delta = 1 it is "
                f"{', '.join(f'{slope[i]:.3g}' for i in (0, 2, 3, 5))}); a step on a key k is stable while lr |k|^2 slope < 2",
                stacklevel=3,
            )

    @property
    def needs_delta(self):  # type: ignore[override]
        return self.programs.uses_delta

    @property
    def row_coupled(self):  # type: ignore[override]
        return self.programs.uses_norm

    @property
    def delta_per_channel(self):  # type: ignore[override]
        return self.needs_delta and not self.row_coupled

    def loss(self, pred, v, delta):
        program = self.programs.loss
        if program is None:
            return None
        e = pred - v
        loss = evaluate(program, e, (e * e).sum(-1, keepdim=True), delta)[0]
        return loss.expand_as(e).sum(-1) if program.varies()[program.outputs[0]] else loss.squeeze(-1)

    def _value(self, e, delta):
        return _Psi.apply(self, e, delta)

    def _derivative(self, e, delta, grad):
        norm2 = (e * e).sum(-1, keepdim=True) if self.row_coupled else None
        slope, pull, slope_delta = evaluate(self.programs.derivatives, e, norm2, delta)
        d_e = slope * grad
        if self.row_coupled:
            d_e = d_e + e * (pull * grad).sum(-1, keepdim=True)
        return d_e, slope_delta * grad if self.needs_delta else None


class _Psi(torch.autograd.Function):
    """psi with the derivatives of its expression: autograd's of sqrt and of fractional powers are NaN where the error is 0."""

    @staticmethod
    def forward(ctx, bias, e, delta):
        ctx.bias = bias
        ctx.save_for_backward(e, delta)
        norm2 = (e * e).sum(-1, keepdim=True) if bias.row_coupled else None
        return evaluate(bias.programs.psi, e, norm2, delta)[0].expand_as(e).clone()

    @staticmethod
    def backward(ctx, grad):
        e, delta = ctx.saved_tensors
        d_e, d_delta = ctx.bias._derivative(e, delta, grad)
        return None, d_e, d_delta if d_delta is None else d_delta.sum_to_size(delta.shape)


@dataclasses.dataclass(frozen=True, init=False, repr=False)
class CustomRetention(_Written, Retention):
    """A retention gate whose mirror map is an expression of the dual's entry ``A``; its derivative follows from it, and ``rho = 1``.

    The expression is as that of a :class:`CustomBias`, with the variable ``A``. A mirror map is one if it nowhere decreases, which is not
    checked.

    Args:
        phi: the expression, at most 1000 characters.
        parameters: named numbers; finite.

    Raises:
        TypeError: an expression that is not a string, a parameter that is not a number.
        ValueError: what is not such an expression, with the column; phi or its derivative that is not finite for ``|A|`` up to 1e6.

    Example::

        CustomRetention("A / (1 + abs(A) / bound)", bound=2.0)
    """

    text: str
    values: tuple[tuple[str, float], ...]
    name: ClassVar[str] = "custom"
    tag: ClassVar[int] = 5
    INPUTS: ClassVar[tuple[str, ...]] = ("A",)
    programs: ClassVar[GatePrograms]

    def __init__(self, phi: str, /, **parameters: float) -> None:
        object.__setattr__(self, "text", phi)
        object.__setattr__(self, "values", tuple(parameters.items()))
        self.__post_init__()

    def _compile(self):
        return _gate_programs(self.text, self.values)

    @property
    def is_offset(self):  # type: ignore[override]
        return bool(evaluate(self.programs.primal, torch.zeros(1))[0] != 0)

    def phi(self, dual):
        return _Phi.apply(self, dual)


class _Phi(torch.autograd.Function):
    """phi with the derivative of its expression."""

    @staticmethod
    def forward(ctx, gate, dual):
        ctx.gate = gate
        ctx.save_for_backward(dual)
        return evaluate(gate.programs.primal, dual)[0].clone()

    @staticmethod
    def backward(ctx, grad):
        return None, evaluate(ctx.gate.programs.slope, ctx.saved_tensors[0])[0] * grad


@dataclasses.dataclass(frozen=True)
class GatePrograms:
    """What backends run for a :class:`CustomRetention`: phi and its derivative, of the input ``A``."""

    primal: Program
    slope: Program


@functools.lru_cache(maxsize=256)
def _gate_programs(text: str, values: tuple[tuple[str, float], ...]) -> GatePrograms:
    graph = Graph(CustomRetention.INPUTS)
    phi = parse(text, graph, dict(values))
    if not graph.depends(phi, "A"):
        raise ValueError(f"phi does not depend on A: {text!r}")
    found = GatePrograms(graph.program(phi), graph.program(graph.derivative(phi, "A")))
    a = _entries()
    for name, program in (("phi", found.primal), ("its derivative", found.slope)):
        x = evaluate(program, a)[0].expand_as(a)
        i = _first(~x.isfinite())
        if i is not None:
            raise ValueError(f"{name} must be finite for |A| up to 1e6, got {x[i]:g} at A = {a[i]:g} (in float32)")
    return found


@dataclasses.dataclass(frozen=True)
class Programs:
    """What backends run for a :class:`CustomBias`. Inputs are ``e, norm2, delta``.

    ``psi``: its value. ``derivatives``: the slope d psi / d e, pull 2 d psi / d norm2, d psi / d delta, so that for an incoming y
    ``dE = slope y + e sum(pull y)`` and ``d delta = sum(slope_delta y)``. ``loss``: for biases given by their loss.
    """

    psi: Program
    derivatives: Program
    loss: Program | None
    uses_norm: bool
    uses_delta: bool


@functools.lru_cache(maxsize=256)
def _programs(text: str, is_loss: bool, values: tuple[tuple[str, float], ...]) -> Programs:
    found = _build(text, is_loss, dict(values), 0.0)
    if found.uses_delta and not _finite(found, torch.zeros(1)):
        found = _build(text, is_loss, dict(values), SMALLEST_DELTA)
    _refuse_bad_values(found)
    return found


def _build(text: str, is_loss: bool, values: dict[str, float], smallest_delta: float) -> Programs:
    graph = Graph(INPUTS, nonnegative=("norm2", "delta"))
    psi = node = parse(text, graph, values)
    if smallest_delta:
        delta = graph.input("delta")
        psi = node = graph.substitute(node, delta, graph.apply("max", delta, graph.number(smallest_delta)))
    if is_loss:
        if graph.depends(node, "e") and graph.depends(node, "norm2"):
            raise ValueError(f"a loss is one of e or one of norm2, got one of both: {text!r}")
        psi = graph.derivative(node, "e")
        if graph.depends(node, "norm2"):
            twice = graph.apply("mul", graph.number(2), graph.derivative(node, "norm2"))
            psi = graph.apply("mul", twice, graph.input("e"))
    if graph.depends(node, "delta") and not graph.depends(psi, "delta"):
        raise ValueError(f"the gradient of the loss does not depend on delta: {text!r}")
    if not (graph.depends(psi, "e") or graph.depends(psi, "norm2")):
        raise ValueError(f"psi does not depend on the error: {text!r}")
    pull = graph.apply("mul", graph.number(2), graph.derivative(psi, "norm2"))
    return Programs(
        psi=graph.program(psi),
        derivatives=graph.program(graph.derivative(psi, "e"), pull, graph.derivative(psi, "delta")),
        loss=graph.program(node) if is_loss else None,
        uses_norm=graph.depends(psi, "norm2"),
        uses_delta=graph.depends(psi, "delta"),
    )


def _entries() -> Tensor:
    """Errors, or entries of a dual, up to 1e6."""
    x = torch.tensor([0.0, 1e-12, 1e-6, 1e-3, 0.1, 0.5, 1.0, 2.0, 10.0, 1e2, 1e4, 1e6])
    return torch.cat([x, -x])


def _grid(deltas: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Errors alone in their row and beside others, with every delta."""
    e, others, delta = torch.cartesian_prod(_entries(), torch.tensor([0.0, 1e-3, 1.0, 1e6]), deltas).unbind(-1)
    return e, e * e + others * others, delta


def _evaluate(found: Programs, e: Tensor, norm2: Tensor, delta: Tensor) -> dict[str, Tensor]:
    values = evaluate(found.psi, e, norm2, delta) + evaluate(found.derivatives, e, norm2, delta)
    names = ("psi", "its derivative in e", "its derivative in norm2", "its derivative in delta")
    return {name: x.expand_as(e) for name, x in zip(names, values, strict=True)}


def _finite(found: Programs, deltas: Tensor) -> bool:
    return all(bool(x.isfinite().all()) for x in _evaluate(found, *_grid(deltas)).values())


def _refuse_bad_values(found: Programs) -> None:
    e, norm2, delta = _grid(torch.tensor([0.0, 1e-3, 0.1, 1.0, 1e3]))
    for name, x in _evaluate(found, e, norm2, delta).items():
        i = _first(~x.isfinite())
        if i is not None:
            where = f"e = {e[i]:g}, norm2 = {norm2[i]:g}, delta = {delta[i]:g}"
            raise ValueError(f"{name} must be finite for |e| up to 1e6, got {x[i]:g} at {where} (in float32)")
        i = _first((e == 0) & (x != 0)) if name == "psi" else None  # kernels pad rows with errors that are 0
        if i is not None:
            raise ValueError(f"psi must be 0 where the error is 0, got {x[i]:g} (delta = {delta[i]:g})")


def _first(wrong: Tensor) -> int | None:
    """The place of the first true entry."""
    found = wrong.nonzero().flatten()
    return int(found[0]) if len(found) else None
