"""What a retention gate states: the base class of tables/retention.py."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import Tensor

from .row import Row

__all__ = ["Retention"]


@dataclasses.dataclass(frozen=True)
class Retention(Row):
    """Base of the table's rows."""

    #: R0, R1 of kernels/common/retention.py, kRetentionParams of csrc/params.h
    MAX_PARAMETERS: ClassVar[int] = 2
    #: whether ``phi(A) = A``
    is_identity: ClassVar[bool] = False
    #: whether an entry of the primal depends on its whole row of the dual, or on the whole matrix (csrc/retention.h: Coupling)
    row_coupled: ClassVar[bool] = False
    matrix_coupled: ClassVar[bool] = False
    #: whether ``rho`` is not 1
    has_rho: ClassVar[bool] = False
    #: whether phi(0) is not 0 although no entries are coupled
    is_offset: ClassVar[bool] = False

    def phi(self, dual: Tensor) -> Tensor:
        """The mirror map, ``[..., R, K]`` to the same shape."""
        raise NotImplementedError

    def rho(self, dual: Tensor) -> Tensor:
        """Scale of the chunk's writes in the read-out, ``[..., 1, 1]``, differentiable."""
        return dual.new_ones(()).expand(*dual.shape[:-2], 1, 1)
