"""One validated call: what every backend, dispatch and autograd take."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from .state import MemoryState
from .tables.biases import Bias
from .tables.retention import Retention

__all__ = ["Call"]


@dataclasses.dataclass(frozen=True)
class Call:
    """One validated call of :func:`~miras_kernels.linear_memory` or :func:`~miras_kernels.mlp_memory`.

    Shapes as in SPEC section 1. Gates and states already have the dtype of the arithmetic; ``delta`` is ``[B, T, H]`` or
    ``[B, T, H, Dv]``; ``state`` holds ``N`` sequences, ``N = B`` or the number of packed ones.
    """

    memory: str  # "linear" or "mlp"
    q: Tensor
    k: Tensor
    v: Tensor
    lr: Tensor
    log_decay: Tensor | None
    delta: Tensor | None
    momentum: Tensor | None
    ln_weight: Tensor | None
    ln_bias: Tensor | None
    ln_eps: float
    state: MemoryState
    cu_seqlens: Tensor | None
    bias: Bias
    retention: Retention
    chunk_size: int
    output_final_state: bool
    erase_k: Tensor | None = None
    key_log_decay: Tensor | None = None
    decay_first: bool = False

    #: the arguments of shape [B, T, H, ...]
    PER_TOKEN = ("q", "k", "v", "lr", "log_decay", "delta", "momentum", "erase_k", "key_log_decay")

    @property
    def variants(self) -> tuple[str, ...]:
        """Names of the options of the delta rule that differ from the plain recurrence."""
        used = {"decay_first": self.decay_first, "erase_k": self.erase_k is not None, "key_log_decay": self.key_log_decay is not None}
        return tuple(name for name, use in used.items() if use)

    def replace(self, **changes) -> Call:
        return dataclasses.replace(self, **changes)
