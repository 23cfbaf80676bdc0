"""What a decoder keeps to take back tokens: copies of earlier buffers and of the tokens since."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..window import check_tokens

__all__ = ["Past"]


class Past:
    """The last tokens of a decoder, as one or two pieces: at least ``size`` tokens, once so many have been read.

    Args:
        size: the number of tokens that can be taken back.
    """

    def __init__(self, size: int):
        self.size = size
        self.pieces: list[_Piece] = []

    def record(self, buffers: list[Tensor], call: Callable, tensors: tuple[Any, ...], tokens: int) -> None:
        """Remember a call, before it is made, that will read ``tokens`` tokens into ``buffers``."""
        if not self.pieces or self.pieces[-1].count >= self.size:
            self.pieces = [*self.pieces[-1:], _Piece([x.clone() for x in buffers])]
        copies = tuple(x.detach().clone() if isinstance(x, Tensor) else x for x in tensors)
        self.pieces[-1].calls.append((call, copies, tokens))
        if self.pieces[-1].count >= self.size:
            del self.pieces[:-1]

    def crop(self, buffers: list[Tensor], tokens: int) -> None:
        """Set ``buffers`` to what they were before the last ``tokens`` tokens."""
        check_tokens("tokens", tokens, sum(piece.count for piece in self.pieces), self.size)
        while tokens:
            piece = self.pieces[-1]
            kept = max(piece.count - tokens, 0)
            tokens -= piece.count - kept
            calls, piece.calls = piece.calls, []
            for x, before in zip(buffers, piece.buffers, strict=True):
                x.copy_(before)
            for call, tensors, count in calls:
                if kept == 0:
                    break
                if count > kept:
                    tensors = tuple(x[:, :kept] if isinstance(x, Tensor) else x for x in tensors)
                    count = kept
                call(*tensors)
                piece.calls.append((call, tensors, count))
                kept -= count
            if not piece.calls:
                self.pieces.pop()

    def reorder(self, index: Tensor) -> None:
        """Sequence ``n`` continues from what sequence ``index[n]`` has read."""
        select = lambda x: x.index_select(0, index) if isinstance(x, Tensor) else x
        for piece in self.pieces:
            piece.buffers = [select(x) for x in piece.buffers]
            piece.calls = [(call, tuple(map(select, tensors)), count) for call, tensors, count in piece.calls]


class _Piece:
    """Calls that followed each other, and the buffers before them."""

    def __init__(self, buffers: list[torch.Tensor]):
        self.buffers = buffers
        self.calls: list[tuple[Callable, tuple[Any, ...], int]] = []

    @property
    def count(self) -> int:
        """Number of tokens."""
        return sum(count for _, _, count in self.calls)
