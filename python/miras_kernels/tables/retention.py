"""Retention gates: one table; docs/adding-a-gate.md says how to add one.

Every gate decays the dual by ``alpha_t = exp(log_decay_t)``. They differ in the mirror map from the dual ``A`` to the primal
``W = phi(A)``, which applies at chunk boundaries, and in the scale ``rho`` of the chunk's writes in the read-out
(Miras, arXiv 2504.13173, section 5.2; docs/mathematics.md, section 5). A row states ``phi``, ``rho``, a name, a tag and its parameters;
``kernels/common/retention.py`` and ``csrc/retention.h`` use the same tags.

``A`` is ``[..., R, K]``: one matrix of one head. :class:`LqRetention` sums over all of it, :class:`KLRetention` normalises rows.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from .custom import CustomRetention
from .gate import Retention
from .row import decode, number

__all__ = [
    "TABLE",
    "CustomRetention",
    "ElasticNetRetention",
    "KLRetention",
    "L2Retention",
    "LqRetention",
    "Retention",
    "SigmoidRetention",
    "from_code",
]


@dataclasses.dataclass(frozen=True)
class L2Retention(Retention):
    """Plain decay: ``phi(A) = A``."""

    name: ClassVar[str] = "l2"
    tag: ClassVar[int] = 0
    is_identity: ClassVar[bool] = True

    def phi(self, dual):
        return dual


@dataclasses.dataclass(frozen=True)
class LqRetention(Retention):
    """q-norm gate (Moneta): ``phi(A) = s A`` and ``rho = s = (sum |A|^q + floor^q)^(-(q-2)/q)`` over the head's whole matrix.

    ``floor`` makes the paper's ``A / ||A||_q^(q-2)`` finite at A = 0; ``floor -> 0`` is the paper's formula.

    Args:
        q: > 1.
        floor: > 0.
    """

    q: float = 4.0
    floor: float = 1.0
    name: ClassVar[str] = "lq"
    tag: ClassVar[int] = 1
    matrix_coupled: ClassVar[bool] = True
    has_rho: ClassVar[bool] = True

    def _check(self):
        object.__setattr__(self, "q", number(self, "q", self.q, 1.0))
        object.__setattr__(self, "floor", number(self, "floor", self.floor, 0.0))

    def rho(self, dual):
        total = (dual.abs() ** self.q).sum((-2, -1), keepdim=True) + self.floor**self.q
        return total ** (-(self.q - 2) / self.q)

    def phi(self, dual):
        return self.rho(dual) * dual


@dataclasses.dataclass(frozen=True)
class KLRetention(Retention):
    """Entropy gate (Memora): ``phi(A) = mass * softmax(A)`` over the last axis.

    Args:
        mass: > 0, the sum of each row of the primal.
    """

    mass: float = 1.0
    name: ClassVar[str] = "kl"
    tag: ClassVar[int] = 2
    row_coupled: ClassVar[bool] = True

    def _check(self):
        object.__setattr__(self, "mass", number(self, "mass", self.mass, 0.0))

    def phi(self, dual):
        return self.mass * torch.softmax(dual, -1)


@dataclasses.dataclass(frozen=True)
class ElasticNetRetention(Retention):
    """Soft threshold: ``phi(A) = sign(A) max(|A| - threshold, 0)``.

    Args:
        threshold: >= 0.
    """

    threshold: float
    name: ClassVar[str] = "elastic"
    tag: ClassVar[int] = 3

    def _check(self):
        object.__setattr__(self, "threshold", number(self, "threshold", self.threshold, 0.0, open_=False))

    def phi(self, dual):
        return torch.nn.functional.softshrink(dual, self.threshold)


@dataclasses.dataclass(frozen=True)
class SigmoidRetention(Retention):
    """Bounded coordinates: ``phi(A) = 1 / (1 + exp(-A))``."""

    name: ClassVar[str] = "sigmoid"
    tag: ClassVar[int] = 4
    is_offset: ClassVar[bool] = True

    def phi(self, dual):
        return torch.sigmoid(dual)


#: Every gate by tag, with default parameters where it has them.
TABLE: dict[int, Retention] = {
    row.tag: row
    for row in (
        L2Retention(),
        LqRetention(),
        KLRetention(),
        ElasticNetRetention(0.05),
        SigmoidRetention(),
        CustomRetention("A / (1 + abs(A) / bound)", bound=2.0),
    )
}


def from_code(code: str) -> Retention:
    """The inverse of ``code``."""
    if code.startswith(f"{CustomRetention.tag} "):
        return CustomRetention.from_code(code)
    tag, parameters = decode(code)
    return type(TABLE[tag])(*parameters)
