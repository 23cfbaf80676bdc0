"""What :func:`miras_kernels.hf.linearize` is given: stages with their settings, and rows of token ids."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

__all__ = ["STAGES", "Finetune", "Rank", "Rows", "Stage", "Transfer"]

LOSSES = ("kl", "lm")


class Stage:
    """What the stages have in common: their arguments are checked when they are made."""

    name: ClassVar[str]

    def __post_init__(self) -> None:
        for field, value in vars(self).items():
            if field == "loss":
                if value not in LOSSES:
                    raise ValueError(f"{self.name}: loss: expected one of {', '.join(map(repr, LOSSES))}, got {value!r}")
            elif field == "lr":
                if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                    raise ValueError(f"{self.name}: lr: expected a number > 0, got {value!r}")
            elif not (field == "rank" and value is None) and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{self.name}: {field}: expected an integer >= 1{' or None' * (field == 'rank')}, got {value!r}")


@dataclasses.dataclass(frozen=True)
class Transfer(Stage):
    """Attention transfer: each memory learns the outputs of the attention layer that it replaces, for the teacher's hidden states.

    The loss of a layer is ``|memory(x) - attention(x)|^2 / |attention(x)|^2`` over the batch: the mean squared error of LoLCATs
    (arXiv 2410.10254, section 3.1) and RADLADS (arXiv 2505.03005), relative to the size of the outputs, so that layers compare. All layers
    learn in one forward of the teacher; the backward of a layer runs at once, so that one layer's activations exist at a time. All
    parameters of the replaced layers are trained: memories, and projections taken from attention.

    Args:
        steps: of AdamW.
        lr: the largest learning rate; it rises for 5 % of the steps and falls as a cosine to a tenth.
        batch_size: rows of the data per step.
    """

    name: ClassVar[str] = "transfer"
    steps: int = 1000
    lr: float = 1e-3
    batch_size: int = 8


@dataclasses.dataclass(frozen=True)
class Rank(Stage):
    """Keep attention in the layers that lose most: for each layer, the loss on the held-out rows with this memory alone, attention
    in all other layers, minus the loss with attention in all of them. The ``keep`` worst get the teacher's attention back.

    Args:
        keep: how many layers, fewer than there are memories.
        batch_size: rows per forward.
    """

    name: ClassVar[str] = "rank"
    keep: int = 1
    batch_size: int = 8


@dataclasses.dataclass(frozen=True)
class Finetune(Stage):
    """Train the whole: replaced layers in full, and a low-rank change of every other matrix of the decoder layers (LoRA, arXiv 2106.09685,
    with a factor of 1), which is added to the matrix at the end. Experts that are stored as one tensor, embeddings and norms do not change.

    Args:
        steps, lr, batch_size: see :class:`Transfer`.
        loss: ``"kl"``: the divergence of the model's next-token distribution from the teacher's; ``"lm"``: the cross entropy of the text.
        rank: of the changes; None trains every parameter of the model in full instead.
    """

    name: ClassVar[str] = "finetune"
    steps: int = 1000
    lr: float = 2e-4
    batch_size: int = 8
    loss: str = "kl"
    rank: int | None = 16


#: name -> class
STAGES: dict[str, type] = {stage.name: stage for stage in (Transfer, Rank, Finetune)}


class Rows:
    """Texts of one length: ``[N, T]`` integers, or a sequence of N rows of T integers, or of dictionaries with such ``input_ids``.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came. A sequence's rows are checked as they are read.
    """

    def __init__(self, name: str, data: Any, vocabulary: int):
        self.name, self.data, self.vocabulary = name, data, vocabulary
        self.orders: dict[int, Tensor] = {}  # of the rows, by seed: those of the last batch
        if not isinstance(data, Tensor) and not (hasattr(data, "__len__") and hasattr(data, "__getitem__") and not isinstance(data, str)):
            raise TypeError(f"{name}: expected token ids [N, T] or a sequence of rows of token ids, got {type(data).__name__}")
        if isinstance(data, Tensor) and data.dim() != 2:
            raise ValueError(f"{name}: expected token ids [N, T], got shape {tuple(data.shape)}")
        if len(data) == 0:
            raise ValueError(f"{name}: expected rows of token ids, got none")
        self.length = self._row(0).numel()
        if self.length < 2:
            raise ValueError(f"{name}: expected rows of at least 2 tokens, got {self.length}")
        if isinstance(data, Tensor):
            self._check(data)

    def __len__(self) -> int:
        return len(self.data)

    def _row(self, i: int) -> Tensor:
        row = self.data[i]
        try:
            row = torch.as_tensor(row if isinstance(row, Tensor | list) else row["input_ids"])
        except (KeyError, IndexError, TypeError, ValueError):
            raise TypeError(f"{self.name}: expected rows of token ids or with 'input_ids', got {type(row).__name__} in row {i}") from None
        if row.dim() != 1 or row.is_floating_point() or row.is_complex() or row.dtype == torch.bool:
            raise TypeError(f"{self.name}: expected rows of integers [T], got {row.dtype} {tuple(row.shape)} in row {i}")
        return row

    def _check(self, ids: Tensor) -> Tensor:
        low, high = (int(x) for x in torch.aminmax(ids))
        if low < 0 or high >= self.vocabulary:
            raise ValueError(f"{self.name}: expected token ids from 0 to {self.vocabulary - 1}, got {low if low < 0 else high}")
        return ids.long()

    def batch(self, indices: Sequence[int]) -> Tensor:
        """``[B, T]`` int64."""
        rows = [self._row(i) for i in indices]
        for i, row in zip(indices, rows, strict=True):
            if row.numel() != self.length:
                raise ValueError(f"{self.name}: expected {self.length} tokens in every row (as in row 0), got {row.numel()} in row {i}")
        return self._check(torch.stack(rows))

    def draw(self, size: int, step: int, seed: int) -> Tensor:
        """The batch of a step: the rows in a random order, again and again, so that a step's batch depends on its number alone."""
        at = [divmod(i, len(self)) for i in range(step * size, (step + 1) * size)]
        drawn = lambda x: torch.randperm(len(self), generator=torch.Generator().manual_seed(x))
        self.orders = {x: self.orders[x] if x in self.orders else drawn(x) for x in {seed + epoch for epoch, _ in at}}
        return self.batch([int(self.orders[seed + epoch][i]) for epoch, i in at])
