"""Attentional biases: one table; docs/adding-a-bias.md says how to add one.

An attentional bias is the inner loss ``l(M(k), v)`` that a memory minimises while it reads (Miras, arXiv 2504.13173, section 5).
Each row of the table states

* ``loss(pred, v, delta)``: the inner loss, summed over the value axis. ``backends/reference/definition.py`` differentiates it.
* ``psi(pred, v, delta)``: its gradient in the prediction, the closed form every kernel computes.
* ``psi_vjp(pred, v, delta, grad)``: the vector-Jacobian product of psi, for the backward.
* ``name``, ``tag`` and ``parameters``: what C++ and Triton receive (``code`` has tag and parameters in one string). ``csrc/bias.h`` and
  ``kernels/common/bias.py`` use the same tags.

Tensors are ``[..., Dv]``; ``delta`` broadcasts against them (``[..., 1]``, or ``[..., Dv]`` where ``delta_per_channel``).
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch
from torch import Tensor

from .bias import Bias, ErrorBias
from .custom import CustomBias
from .row import decode, number

__all__ = ["L1", "L2", "TABLE", "Bias", "CustomBias", "DotProduct", "Huber", "Lp", "RobustL2", "from_code"]


def _squared_norm(e: Tensor) -> Tensor:
    return (e * e).sum(-1, keepdim=True)


def _logcosh(x: Tensor) -> Tensor:
    """``log(cosh(x))`` without overflow."""
    a = x.abs()
    return a + torch.nn.functional.softplus(-2 * a) - math.log(2)


@dataclasses.dataclass(frozen=True)
class DotProduct(Bias):
    """Hebbian memory: loss ``-<M(k), v>``, psi ``-v`` (linear attention, RetNet, Mamba-2, GLA)."""

    name: ClassVar[str] = "dot"
    tag: ClassVar[int] = 0
    reads_memory: ClassVar[bool] = False

    def loss(self, pred, v, delta):
        return -(pred * v).sum(-1)

    def psi(self, pred, v, delta):
        return -v

    def psi_vjp(self, pred, v, delta, grad):
        return torch.zeros_like(grad), -grad, None


@dataclasses.dataclass(frozen=True)
class L2(ErrorBias):
    """Squared error: loss ``||e||^2 / 2``, psi ``e`` (delta rule, TTT, Titans)."""

    name: ClassVar[str] = "l2"
    tag: ClassVar[int] = 1

    def loss(self, pred, v, delta):
        return 0.5 * ((pred - v) ** 2).sum(-1)

    def _value(self, e, delta):
        return e

    def _derivative(self, e, delta, grad):
        return grad, None


@dataclasses.dataclass(frozen=True)
class L1(ErrorBias):
    """Smoothed absolute error, psi ``tanh(sharpness e)``: the paper's value-less memory.

    Args:
        sharpness: > 0; ``sharpness -> inf`` is the sign of the error.
    """

    sharpness: float = 10.0
    name: ClassVar[str] = "l1"
    tag: ClassVar[int] = 2

    def _check(self):
        object.__setattr__(self, "sharpness", number(self, "sharpness", self.sharpness, 0.0))

    @property
    def parameters(self):
        return (self.sharpness,)

    def loss(self, pred, v, delta):
        return _logcosh(self.sharpness * (pred - v)).sum(-1) / self.sharpness

    def _value(self, e, delta):
        return torch.tanh(self.sharpness * e)

    def _derivative(self, e, delta, grad):
        t = torch.tanh(self.sharpness * e)
        return grad * self.sharpness * (1 - t * t), None


@dataclasses.dataclass(frozen=True)
class Lp(ErrorBias):
    """p-norm error: psi ``p sign(e) |e|^(p-1)``, or with a sharpness ``p tanh(sharpness e) (e^2 + eps)^((p-1)/2)``.

    The smooth form is the paper's (Miras, section 5.1). For p > 2 the loss has unbounded curvature: without a bounding
    retention gate (:class:`~miras_kernels.LqRetention`) the inner loop diverges once ``lr * |e|^(p-2)`` is of order 1.

    Args:
        p: >= 1; below 2 a sharpness is required, since the derivative of the plain form is unbounded at e = 0.
        sharpness: None for the plain form, or > 0 for the smooth one.
        eps: > 0, only used by the smooth form.
    """

    p: float
    sharpness: float | None = None
    eps: float = 1e-6

    def _check(self):
        object.__setattr__(self, "p", number(self, "p", self.p, 1.0, open_=False))
        object.__setattr__(self, "eps", number(self, "eps", self.eps, 0.0))
        if self.sharpness is not None:
            object.__setattr__(self, "sharpness", number(self, "sharpness", self.sharpness, 0.0))
        elif self.p < 2:
            raise ValueError(f"Lp: p < 2 needs a sharpness (psi' is unbounded at e = 0), got p={self.p:g}, sharpness=None")

    @property
    def name(self):  # type: ignore[override]
        return "lp" if self.sharpness is None else "lp_smooth"

    @property
    def tag(self):  # type: ignore[override]
        return 3 if self.sharpness is None else 4

    @property
    def parameters(self):
        return (self.p,) if self.sharpness is None else (self.p, self.sharpness, self.eps)

    def loss(self, pred, v, delta):
        return None if self.sharpness is not None else ((pred - v).abs() ** self.p).sum(-1)

    def _value(self, e, delta):
        if self.sharpness is None:
            return self.p * e.sign() * e.abs() ** (self.p - 1)
        return self.p * torch.tanh(self.sharpness * e) * (e * e + self.eps) ** ((self.p - 1) / 2)

    def _derivative(self, e, delta, grad):
        p, a = self.p, self.sharpness
        if a is None:
            return grad * (p * (p - 1)) * e.abs() ** (p - 2), None
        t, r = torch.tanh(a * e), e * e + self.eps
        return grad * p * r ** ((p - 3) / 2) * (a * (1 - t * t) * r + (p - 1) * t * e), None


@dataclasses.dataclass(frozen=True)
class Huber(ErrorBias):
    """Robust error: quadratic up to ``delta``, linear beyond it. Needs ``delta``.

    Args:
        kind: ``"coordinate"``: psi ``clip(e, -delta, delta)`` (delta may be per channel);
            ``"norm"``: psi ``e min(1, delta / ||e||)``;
            ``"switch"``: the paper's Yaad, ``e`` where ``||e|| <= delta``, else ``delta tanh(sharpness e)``. The switch
            itself has no gradient.
        sharpness: > 0, only used by ``"switch"``.
    """

    kind: str = "coordinate"
    sharpness: float = 10.0
    needs_delta: ClassVar[bool] = True
    KINDS: ClassVar[tuple[str, ...]] = ("coordinate", "norm", "switch")

    def _check(self):
        if self.kind not in self.KINDS:
            raise ValueError(f"Huber: kind must be one of {', '.join(map(repr, self.KINDS))}, got {self.kind!r}")
        object.__setattr__(self, "sharpness", number(self, "sharpness", self.sharpness, 0.0))

    @property
    def name(self):  # type: ignore[override]
        return f"huber_{self.kind}"

    @property
    def tag(self):  # type: ignore[override]
        return 5 + self.KINDS.index(self.kind)

    @property
    def parameters(self):
        return (self.sharpness,) if self.kind == "switch" else ()

    @property
    def row_coupled(self):  # type: ignore[override]
        return self.kind != "coordinate"

    @property
    def delta_per_channel(self):  # type: ignore[override]
        return self.kind == "coordinate"

    def loss(self, pred, v, delta):
        e = pred - v
        if self.kind == "coordinate":
            a = e.abs()
            return torch.where(a <= delta, 0.5 * a * a, delta * (a - 0.5 * delta)).sum(-1)
        delta = delta.squeeze(-1)
        square = (e * e).sum(-1)
        inside = square <= delta * delta
        if self.kind == "norm":
            norm = torch.where(inside, 1.0, square).sqrt()
            return torch.where(inside, 0.5 * square, delta * (norm - 0.5 * delta))
        return torch.where(inside, 0.5 * square, delta * _logcosh(self.sharpness * e).sum(-1) / self.sharpness)

    def _inside(self, e, delta):
        return _squared_norm(e) <= delta * delta

    def _value(self, e, delta):
        if self.kind == "coordinate":
            return torch.maximum(torch.minimum(e, delta), -delta)
        inside = self._inside(e, delta)
        if self.kind == "norm":
            return e * torch.where(inside, 1.0, delta * torch.where(inside, 1.0, _squared_norm(e)).rsqrt())
        return torch.where(inside, e, delta * torch.tanh(self.sharpness * e))

    def _derivative(self, e, delta, grad):
        if self.kind == "coordinate":
            inside = e.abs() <= delta
            return torch.where(inside, grad, 0.0), torch.where(inside, 0.0, grad * e.sign())
        inside = self._inside(e, delta)
        if self.kind == "norm":
            unit = e * torch.where(inside, 1.0, _squared_norm(e)).rsqrt()
            along = (grad * unit).sum(-1, keepdim=True)
            outside = delta * torch.where(inside, 1.0, _squared_norm(e)).rsqrt() * (grad - along * unit)
            return torch.where(inside, grad, outside), torch.where(inside, 0.0, grad * unit)
        t = torch.tanh(self.sharpness * e)
        return (torch.where(inside, grad, grad * delta * self.sharpness * (1 - t * t)), torch.where(inside, 0.0, grad * t))


@dataclasses.dataclass(frozen=True)
class RobustL2(ErrorBias):
    """Worst case over value shifts of radius delta: psi ``e (1 + delta / sqrt(||e||^2 + eps))``. Needs ``delta``.

    Args:
        eps: > 0, keeps psi smooth at e = 0.
    """

    eps: float = 1e-6
    name: ClassVar[str] = "robust_l2"
    tag: ClassVar[int] = 8
    needs_delta: ClassVar[bool] = True
    row_coupled: ClassVar[bool] = True

    def _check(self):
        object.__setattr__(self, "eps", number(self, "eps", self.eps, 0.0))

    @property
    def parameters(self):
        return (self.eps,)

    def loss(self, pred, v, delta):
        square = ((pred - v) ** 2).sum(-1)
        return 0.5 * square + delta.squeeze(-1) * (square + self.eps).sqrt()

    def _value(self, e, delta):
        return e * (1 + delta * (_squared_norm(e) + self.eps).rsqrt())

    def _derivative(self, e, delta, grad):
        r = (_squared_norm(e) + self.eps).rsqrt()
        along = (grad * e).sum(-1, keepdim=True)
        return grad * (1 + delta * r) - e * (delta * r**3 * along), grad * e * r


#: Every bias by tag, with default parameters where it has them. Tests, fuzzing, benchmarks and docs iterate over it.
TABLE: dict[int, Bias] = {
    row.tag: row
    for row in (
        DotProduct(),
        L2(),
        L1(),
        Lp(3.0),
        Lp(1.5, sharpness=10.0),
        Huber("coordinate"),
        Huber("norm"),
        Huber("switch"),
        RobustL2(),
        CustomBias("e / sqrt(1 + norm2 / delta**2)"),
    )
}


def from_code(code: str) -> Bias:
    """The inverse of ``code``."""
    if code.startswith(f"{CustomBias.tag} "):
        return CustomBias.from_code(code)
    tag, parameters = decode(code)
    row = TABLE[tag]
    if isinstance(row, Huber):
        return Huber(row.kind, *parameters)
    return type(row)(*parameters)
