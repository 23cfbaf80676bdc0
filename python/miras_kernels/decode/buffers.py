"""The buffers of decoding steps: the one list of their names and shapes, and how a state is loaded into them and read from them.

The C++ and CUDA kernels have the same list in csrc/params.h (``MIRAS_STEP_BUFFERS``), in the same order. CudaBackend compares the two when
it loads its library, a test those of CppBackend; the Triton kernels take the buffers by name.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..state import MemoryState, OpenChunk
from ..tables.retention import L2Retention, Retention

__all__ = ["NAMES", "Buffers", "packed", "unpacked"]


@dataclasses.dataclass
class Buffers:
    """The state of ``N`` sequences as decoding steps keep it. All tensors are contiguous; all but ``position`` are float32 (float64 for
    float64 inputs).

    A step rarely writes a matrix, other than when a chunk closes: what the open chunk's tokens wrote is kept as factors of rank one,

        ``A = gamma A_0 + kappa_0 D + kappa_1 S_0 + sum_i left_i (kappa_(2+i) o right_i)'``
        ``S = mu_1 S_0 + sum_i mu_(2+i) left_i right_i'``

    with weights ``kappa`` and ``mu``. There are ``m`` matrices: one of a linear memory, ``K x V = Dk x Dv``; two of an MLP, W1 transposed
    and W2, ``K x V = Hd x D``. ``C`` is the chunk size; ``W`` is 1, or ``Dv`` for a channel-wise decay. Token ``i`` of the open chunk
    has row ``i`` of the factors and row ``2 + i`` of their weights. Rows from ``position`` (``2 + position``) on have no meaning, but are
    finite.

    Attributes:
        start: ``[N, H, m, K, V]``, A_0, the dual at the start of the open chunk; A itself where ``position`` is 0.
        primal: like ``start``, phi of ``start``; None for ``L2Retention``.
        rho: ``[N, H, m]``, rho of ``start``; None for retentions without one.
        written: like ``start``, D: what the open chunk had written when the state was loaded, and the writes that a step has added to it
            instead of keeping their factors, whose weights are then 0. None if every token is a chunk.
        momenta: like ``start``, S_0: the momentum matrices when the state was loaded, or at the start of the chunk; None without momentum.
        left: ``[N, H, m, C, K]``, one factor of each token's write: for a linear memory k, for an MLP memory gelu(z) for W1, and for W2
            minus the step size times the gradient in z.
        right: ``[N, H, m, C, V]``, the other factor: for a linear memory minus the step size times psi(e), for an MLP memory minus the
            step size times the gradient in u for W1, and k for W2.
        weights: ``[N, H, 2 + C, W]``, kappa: row 0 of ``written``, row 1 of ``momenta``, the others of the tokens' writes. Rows 0 and 1
            are 0 where ``position`` is 0.
        momentum_weights: ``[N, H, 2 + C]``, mu, likewise: row 0 is always 0, row 1 is 1 where ``position`` is 0; None without momentum.
        open_log_decay: log gamma, the sum over the open chunk: ``[N, H]``, or ``[N, H, Dv]`` for a channel-wise decay; 0 where
            ``position`` is 0.
        position: ``[N]`` int64, the number of tokens of the open chunk that each sequence has read, less than C.
    """

    start: Tensor
    primal: Tensor | None
    rho: Tensor | None
    written: Tensor | None
    momenta: Tensor | None
    left: Tensor
    right: Tensor
    weights: Tensor
    momentum_weights: Tensor | None
    open_log_decay: Tensor
    position: Tensor

    @staticmethod
    def empty(state: MemoryState, chunk_size: int, retention: Retention, channel_wise_decay: bool) -> Buffers:
        """Buffers for states of these sizes; :meth:`load` fills them."""
        start = torch.empty_like(packed(state.dual))
        n, h, m, rows, columns = start.shape
        like = lambda wanted: torch.zeros_like(start) if wanted else None
        room = lambda *shape: start.new_zeros(n, h, *shape)
        moves, width = state.momentum is not None, [columns] if channel_wise_decay else []
        return Buffers(
            start, primal=like(not isinstance(retention, L2Retention)), rho=room(m) if retention.has_rho else None,
            written=like(chunk_size > 1), momenta=like(moves), left=room(m, chunk_size, rows), right=room(m, chunk_size, columns),
            weights=room(2 + chunk_size, *(width or [1])), momentum_weights=room(2 + chunk_size) if moves else None,
            open_log_decay=room(*width), position=torch.zeros(n, dtype=torch.int64, device=start.device),
        )  # fmt: skip

    def all(self) -> tuple[Tensor | None, ...]:
        """All buffers in the order of :data:`NAMES`."""
        return tuple(vars(self).values())

    def tensors(self) -> list[Tensor]:
        """All buffers but None."""
        return [x for x in vars(self).values() if x is not None]

    def load(self, state: MemoryState, retention: Retention) -> None:
        """Fill the buffers with a state, where they are."""
        opened, dual = state.open_chunk, packed(state.dual)
        for tensor in (self.left, self.right, self.weights, self.open_log_decay, self.position):
            tensor.zero_()
        if self.momenta is not None and self.momentum_weights is not None:
            self.momenta.zero_() if state.momentum is None else self.momenta.copy_(packed(state.momentum))
            self.momentum_weights.zero_()[:, :, 1] = 1.0
        self.start.copy_(dual)
        if opened is not None and self.written is not None:
            self.position.copy_(opened.position)
            self.open_log_decay.copy_(opened.log_decay)
            inside = (self.position > 0)[:, None, None]
            self.start.copy_(torch.where(inside[..., None, None], packed(opened.start), dual))
            self.written.copy_(torch.where(inside[..., None, None], dual - self.gamma() * self.start, 0.0))
            self.weights[:, :, 0] = inside.to(self.weights.dtype)
        self.map_start(retention)

    def state(self) -> MemoryState:
        """The state as a value: a copy."""
        dual, momenta = self.matrices()
        return MemoryState(
            unpacked(dual), None if momenta is None else unpacked(momenta),
            OpenChunk(self.position.clone(), unpacked(self.start.clone()), self.open_log_decay.clone()),
        )  # fmt: skip

    def gamma(self) -> Tensor:
        """The open chunk's decay, shaped to multiply matrices: ``[N, H, 1, 1, W]``."""
        return self.open_log_decay.exp().reshape(*self.open_log_decay.shape[:2], 1, 1, -1)

    def matrices(self) -> tuple[Tensor, Tensor | None]:
        """``(A, S)`` after the last token, like ``start``: new tensors."""
        read = torch.arange(self.weights.shape[2], device=self.position.device) < 2 + self.position[:, None]  # [N, 2 + C]
        weights = torch.where(read[:, None, :, None], self.weights, 0.0)
        dual = self.gamma() * self.start + self.left.mT @ (weights[:, :, None, 2:] * self.right)
        if self.written is not None:
            dual += weights[:, :, 0, None, None] * self.written
        if self.momenta is None or self.momentum_weights is None:
            return dual, None
        dual += weights[:, :, 1, None, None] * self.momenta
        moves = torch.where(read[:, None], self.momentum_weights, 0.0)[..., None]
        return dual, moves[:, :, 1, None, None] * self.momenta + self.left.mT @ (moves[:, :, None, 2:] * self.right)

    def map_start(self, retention: Retention) -> None:
        """Compute ``primal`` and ``rho`` from ``start``."""
        if self.primal is None:
            return
        for i, start in enumerate(unpacked(self.start.clone())):  # a clone: its layout, and so its order of summation, is always the same
            self.primal[:, :, i].copy_(_oriented(retention.phi(start), i, self.start.shape[2]))
            if self.rho is not None:
                self.rho[:, :, i].copy_(retention.rho(start)[..., 0, 0])


#: the names of the buffers, in their order
NAMES = tuple(field.name for field in dataclasses.fields(Buffers))


def _oriented(matrix: Tensor, i: int, count: int) -> Tensor:
    """Matrix ``i`` of a memory's ``count`` as the buffers have it, and back: all are transposed but an MLP memory's W2."""
    return matrix if (i, count) == (1, 2) else matrix.transpose(-1, -2)


def packed(matrices: tuple[Tensor, ...]) -> Tensor:
    """A memory's matrices, as :class:`~miras_kernels.MemoryState` has them, as one tensor ``[N, H, m, K, V]``: a copy."""
    return torch.stack([_oriented(x, i, len(matrices)) for i, x in enumerate(matrices)], 2)


def unpacked(buffer: Tensor) -> tuple[Tensor, ...]:
    """The inverse of :func:`packed`: views."""
    return tuple(_oriented(x, i, buffer.shape[2]) for i, x in enumerate(buffer.unbind(2)))
