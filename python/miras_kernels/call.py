"""One validated call, as dispatch, autograd and the backends take it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .options import options
from .state import MemoryState
from .tables.biases import Bias
from .tables.memories import CHECKPOINT, Memory
from .tables.retention import Retention

__all__ = ["Call"]


@dataclasses.dataclass(frozen=True)
class Call:
    """One validated call of :func:`~miras_kernels.linear_memory` or :func:`~miras_kernels.mlp_memory`.

    Gates and states already have the dtype of the arithmetic; ``delta`` is ``[B, T, H]`` or ``[B, T, H, Dv]``; ``state`` holds ``N``
    sequences, ``N = B`` or the number of packed ones.
    """

    memory: Memory
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
    inplace_state: bool = False
    #: where the chunks and segments of packed sequences lie, by their tokens: kept by the forward of a backend for its backward
    slots: dict[int, Any] = dataclasses.field(default_factory=dict, init=False, compare=False, repr=False)

    #: the arguments of shape [B, T, H, ...]
    PER_TOKEN = ("q", "k", "v", "lr", "log_decay", "delta", "momentum", "erase_k", "key_log_decay")
    #: the options of the delta rule (docs/mathematics.md, section 14)
    VARIANTS = ("decay_first", "erase_k", "key_log_decay")
    #: the differentiable arguments but the initial state
    DIFFERENTIABLE = (*PER_TOKEN, "ln_weight", "ln_bias")

    @property
    def variants(self) -> tuple[str, ...]:
        """Names of the options of the delta rule that differ from the plain recurrence."""
        if not self.decay_first and self.erase_k is self.key_log_decay is None:
            return ()
        used = {"decay_first": self.decay_first, "erase_k": self.erase_k is not None, "key_log_decay": self.key_log_decay is not None}
        return tuple(name for name, use in used.items() if use)

    @property
    def lasting_variants(self) -> tuple[str, ...]:
        """Those of them that a backend must serve: all but the ones that :meth:`decayed` removes."""
        variants = self.variants
        return variants and tuple(name for name in variants if name == "erase_k" or not self.decays_before)

    @property
    def decays_before(self) -> bool:
        """Whether there is one token and its decay comes before everything else, so that it can be applied to the state."""
        first = self.decay_first or (self.key_log_decay is not None and not self.bias.reads_memory)
        return first and self.q.shape[1] == 1 and self.cu_seqlens is None

    def decayed(self) -> Call:
        """The call with its decay applied to the state, where :attr:`decays_before`: the rest is the plain rule."""
        dual, alpha = self.state.dual[0], None
        if self.key_log_decay is not None:
            alpha = self.key_log_decay[:, 0].exp().unsqueeze(-2)
        elif self.log_decay is not None:
            alpha = self.log_decay[:, 0].exp().reshape(*dual.shape[:2], -1, 1)
        state = self.state if alpha is None else MemoryState((alpha * dual,), self.state.momentum)
        return self.replace(state=state, log_decay=None, key_log_decay=None, decay_first=False)

    @property
    def hidden(self) -> int:
        """The memory's hidden size, 0 if it has none."""
        return self.memory.hidden(self.state.dual)

    def exceeds(self, backend: str, *, steps: bool = False) -> str | None:
        """Which size limit of a backend's kernels this call exceeds, or of those that decode it in ``steps``; or None."""
        kernels = self.memory.kernels[backend]
        limits = kernels.steps if steps else kernels.sequences
        return "it only decodes" if limits is None else limits.exceeded_by(self)

    def checkpoint_interval(self, backend: str) -> int:
        """Chunks per checkpoint with a backend."""
        kernels = self.memory.kernels.get(backend)
        return options.checkpoint_interval(self.chunk_size, kernels.checkpoint if kernels else CHECKPOINT)

    def replace(self, **changes: Any) -> Call:
        return dataclasses.replace(self, **changes)

    def present(self) -> list[str]:
        """The names of DIFFERENTIABLE that are not None."""
        return [name for name in self.DIFFERENTIABLE if getattr(self, name) is not None]

    def differentiable(self) -> list[Tensor]:
        """Those tensors, then the state's."""
        return [getattr(self, name) for name in self.present()] + self.state.tensors()

    def tensors(self) -> list[Tensor]:
        """All tensors in one fixed order: the differentiable ones, the state's position, ``cu_seqlens``."""
        opened = self.state.open_chunk
        return self.differentiable() + [x for x in (None if opened is None else opened.position, self.cu_seqlens) if x is not None]

    def replace_tensors(self, tensors: Sequence[Tensor]) -> Call:
        """A call of the same structure with other ``tensors``, in the order of :meth:`tensors`; sequences are packed in the same way."""
        names, count = self.present(), len(self.state.tensors())
        changes: dict[str, Any] = dict(zip(names, tensors, strict=False))
        rest = list(tensors[len(names) :])
        state = self.state.replace_tensors(rest[:count])
        if state.open_chunk is not None:
            state = dataclasses.replace(state, open_chunk=dataclasses.replace(state.open_chunk, position=rest[count]))
        if self.cu_seqlens is not None:
            changes["cu_seqlens"] = rest[-1]
        call = object.__new__(Call)  # not by replace(), which takes longer than a short call
        vars(call).update(vars(self), **changes, state=state, slots=dict(self.slots))
        return call
