"""Memories: one table, and the place to add another.

A memory is a function ``M(x)`` of a key whose matrices are trained while the sequence is read (docs/mathematics.md, sections 1 and 2).
A row states its matrices and their shapes, the arguments that it takes beyond the common ones, ``M`` in PyTorch, and the kernels that
compute it with their limits. The reference runs a memory from its row alone: it applies the recurrence to each matrix and takes the inner
gradient by autograd.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from ..call import Call

__all__ = ["LINEAR", "MLP", "NORM", "TABLE", "Kernels", "Limits", "Memory", "find"]

#: the arguments of a memory that ends in a LayerNorm
NORM = ("ln_weight", "ln_bias", "ln_eps")
#: tokens between two checkpoints
CHECKPOINT = 256


class Limits(NamedTuple):
    """The sizes that kernels take.

    Attributes:
        head: the largest Dk and Dv, or all that are served.
        hidden: the largest hidden size, or all that are served; None for no limit.
        chunk: likewise for ``chunk_size``.
        chunks: how many chunks a sequence has at most, all but one of them whole; None for no limit.
    """

    head: int | tuple[int, ...]
    hidden: int | tuple[int, ...] | None = None
    chunk: int | tuple[int, ...] | None = None
    chunks: int | None = None

    def exceeded_by(self, call: Call) -> str | None:
        """Which limit a call exceeds, or None."""
        sizes = (call.q.shape[-1], call.v.shape[-1])
        head = max(sizes)
        if isinstance(self.head, tuple):
            head = next((x for x in sizes if x not in self.head), head)
        given = (("head dimensions", "are", head, self.head), ("hidden sizes", "are", call.hidden, self.hidden),
                 ("chunk_size", "is", call.chunk_size, self.chunk))  # fmt: skip
        for name, verb, x, limit in given:
            if isinstance(limit, int) and x > limit:
                return f"{name} {verb} limited to {limit}, got {x}"
            if isinstance(limit, tuple) and x not in limit:
                return f"{name} must be {_one_of(limit)} for {call.memory.title}, got {x}"
        if self.chunks is not None and call.q.shape[1] >= self.chunks * call.chunk_size:
            return f"{call.memory.title} is limited to {self.chunks} chunks, got {call.q.shape[1]} tokens"
        return None


def _one_of(numbers: tuple[int, ...]) -> str:
    return f"one of {', '.join(map(str, numbers))}" if len(numbers) > 1 else str(numbers[0])


class Kernels(NamedTuple):
    """A backend's kernels for a memory.

    Attributes:
        sequences: limits of those that read whole chunks; None if there are none.
        steps: limits of those that decode, token by token.
        few: calls without gradients of at most so many tokens are decoded: products of whole chunks would mostly multiply padding.
        checkpoint: tokens between two checkpoints, unless ``options.checkpoint_every`` says otherwise.
    """

    sequences: Limits | None
    steps: Limits
    few: int
    checkpoint: int = CHECKPOINT


@dataclasses.dataclass(frozen=True)
class Memory:
    """Base of the table's rows. Instances are immutable.

    Kernels of a memory bear its name: ``kernels/mlp/``, ``mlp_forward`` of the C++ extension.
    """

    name: ClassVar[str] = ""
    #: as in the sentence "... needs Dv = Dk"
    title: ClassVar[str] = ""
    #: name and shape of each matrix, in the order of :attr:`MemoryState.dual`
    matrices: ClassVar[dict[str, str]] = {}
    #: whether ``M(x)`` has the channels of ``x``: Dk = Dv
    square: ClassVar[bool] = False
    #: whether it cannot start from zeros
    needs_initial_state: ClassVar[bool] = False
    #: whether it takes the arguments of NORM
    needs_norm: ClassVar[bool] = False
    #: whether lr, log_decay and delta may be ``[B, T, H, Dv]``
    channel_wise: ClassVar[bool] = False
    #: whether it takes erase_k, key_log_decay and decay_first
    variants: ClassVar[bool] = False
    #: by backend; the reference needs no entry
    kernels: ClassVar[dict[str, Kernels]] = {}

    def shapes(self, key_dim: int, value_dim: int, hidden: int) -> tuple[tuple[int, int], ...]:
        """The shape of each matrix of one head."""
        raise NotImplementedError

    def hidden(self, duals: tuple[Tensor, ...]) -> int:
        """The hidden size of these matrices; 0 for a memory without hidden units."""
        return 0

    def recall(self, matrices: tuple[Tensor, ...], x: Tensor, call: Call) -> Tensor:
        """``M(x) [B, H, Dv]`` for keys ``x [B, H, Dk]`` and matrices ``[B, H, ...]``, differentiable."""
        raise NotImplementedError

    def shape_words(self) -> str:
        return ", ".join(f"{name} {shape}" for name, shape in self.matrices.items())


class _Linear(Memory):
    """A matrix: ``M(x) = W x``."""

    name: ClassVar[str] = "linear"
    title: ClassVar[str] = "a linear memory"
    matrices: ClassVar[dict[str, str]] = {"W": "[..., Dv, Dk]"}
    channel_wise: ClassVar[bool] = True
    variants: ClassVar[bool] = True
    kernels: ClassVar[dict[str, Kernels]] = {
        "cpp": Kernels(Limits(head=256, chunk=256), Limits(head=256, chunk=256), few=8),
        "triton": Kernels(Limits(head=256, chunk=128), Limits(head=256), few=4),
        "cuda": Kernels(Limits(head=128, chunk=(16, 32, 64)), Limits(head=256), few=4),
    }

    def shapes(self, key_dim, value_dim, hidden):
        return ((value_dim, key_dim),)

    def recall(self, matrices, x, call):
        return (matrices[0] @ x.unsqueeze(-1)).squeeze(-1)


class _MLP(Memory):
    """Two layers and a residual: ``M(x) = x + LN(W1 gelu(W2 x))``, gelu in its tanh form, LN over D."""

    name: ClassVar[str] = "mlp"
    title: ClassVar[str] = "an MLP memory"
    matrices: ClassVar[dict[str, str]] = {"W1": "[..., D, Hd]", "W2": "[..., Hd, D]"}
    square: ClassVar[bool] = True
    needs_initial_state: ClassVar[bool] = True
    needs_norm: ClassVar[bool] = True
    kernels: ClassVar[dict[str, Kernels]] = {
        "cpp": Kernels(Limits(256, 1024, chunk=256), Limits(256, 1024, chunk=256), few=4, checkpoint=64),
        # its LayerNorm takes a row of values at once, and its kernels use a higher bit of a chunk's number (kernels/mlp/math.py, lanes)
        "triton": Kernels(Limits(128, 1024, chunk=(16, 32, 64), chunks=2**21), Limits(128), few=4),
        "cuda": Kernels(Limits((64,), (64, 128, 256), chunk=(16, 32, 64)), Limits(128, 1024), few=4),
    }

    def shapes(self, key_dim, value_dim, hidden):
        return ((value_dim, hidden), (hidden, key_dim))

    def hidden(self, duals):
        return int(duals[0].shape[-1])

    def recall(self, matrices, x, call):
        w1, w2 = matrices
        u = (w1 @ F.gelu(w2 @ x.unsqueeze(-1), approximate="tanh")).squeeze(-1)
        return x + F.layer_norm(u, u.shape[-1:], eps=call.ln_eps) * call.ln_weight + call.ln_bias


LINEAR, MLP = _Linear(), _MLP()

#: Every memory by name.
TABLE: dict[str, Memory] = {row.name: row for row in (LINEAR, MLP)}


def find(name: str | None, given: Iterable[str] = ()) -> Memory:
    """The memory of a name; without one, the first that takes those arguments of NORM that are ``given``.

    Raises:
        ValueError: an unknown name.
    """
    if name is None:
        with_norm = any(argument in NORM for argument in given)
        return next(row for row in TABLE.values() if row.needs_norm == with_norm)
    if name not in TABLE:
        raise ValueError(f"memory: expected one of {', '.join(map(repr, TABLE))}, got {name!r}")
    return TABLE[name]
