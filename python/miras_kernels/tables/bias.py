"""What an attentional bias states: the base classes of tables/biases.py."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from torch import Tensor

from .row import Row

__all__ = ["Bias", "ErrorBias"]


@dataclasses.dataclass(frozen=True)
class Bias(Row):
    """Base of the table's rows."""

    #: P0, P1, P2 of kernels/common/bias.py, kBiasParams of csrc/params.h
    MAX_PARAMETERS: ClassVar[int] = 3
    needs_delta: ClassVar[bool] = False
    #: whether delta may be given per value channel, ``[B, T, H, Dv]``
    delta_per_channel: ClassVar[bool] = False
    #: whether psi of one value channel depends on the others, so that a kernel needs the whole row of the error
    row_coupled: ClassVar[bool] = False
    #: whether psi depends on the prediction (that of the dot product does not)
    reads_memory: ClassVar[bool] = True

    @property
    def parameters(self) -> tuple[float, ...]:
        return ()

    def loss(self, pred: Tensor, v: Tensor, delta: Tensor | None) -> Tensor | None:
        """The inner loss ``[...]``, or None without an elementary closed form: then psi defines the bias."""
        raise NotImplementedError

    def psi(self, pred: Tensor, v: Tensor, delta: Tensor | None) -> Tensor:
        """Gradient of the loss in the prediction, ``[..., Dv]``."""
        raise NotImplementedError

    def plot(self, delta: float = 1.0, limit: float = 3.0) -> Any:
        """A figure of psi and of its slope for errors up to ``limit``, each alone in its row; ``.savefig("psi.png")`` writes it.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from .plot import plot

        return plot(self, delta, limit)

    def psi_vjp(self, pred: Tensor, v: Tensor, delta: Tensor | None, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """``(d pred, d v, d delta)`` for the gradient ``grad`` of psi; ``d delta`` is not yet reduced to delta's shape."""
        raise NotImplementedError


class ErrorBias(Bias):
    """A bias of the error ``e = pred - v`` alone: rows state psi and its derivative in e."""

    def _value(self, e: Tensor, delta: Tensor | None) -> Tensor:
        raise NotImplementedError

    def _derivative(self, e: Tensor, delta: Tensor | None, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        raise NotImplementedError

    def psi(self, pred, v, delta):
        return self._value(pred - v, delta)

    def psi_vjp(self, pred, v, delta, grad):
        d_e, d_delta = self._derivative(pred - v, delta, grad)
        return d_e, -d_e, d_delta
