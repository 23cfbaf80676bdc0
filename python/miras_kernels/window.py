"""Taking back the last tokens of a state (docs/mathematics.md, section 11).

A state with a window remembers an earlier state and the arguments of the calls that were read since. To take back tokens, these calls are
made again without them, by the same kernels: the result has the bits of a state that never read them.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .state import MemoryState

__all__ = ["Piece", "Window", "check_tokens", "takes_back"]

#: arguments with one entry per token, ``[N, T, ...]``
TOKENS = ("q", "k", "v", "lr", "log_decay", "delta", "momentum", "erase_k", "key_log_decay")


@dataclasses.dataclass(frozen=True)
class Piece:
    """Calls that followed each other.

    Attributes:
        start: the state before them, without a window.
        calls: the public function and its arguments, of each.
        autocast: dtype of autocast at the time, or None.
    """

    start: MemoryState
    calls: tuple[tuple[Callable, dict[str, Any]], ...] = ()
    autocast: torch.dtype | None = None

    @property
    def count(self) -> int:
        """Number of tokens of a sequence."""
        return sum(_length(arguments) for _, arguments in self.calls)

    def map(self, start: Callable[[MemoryState], MemoryState], tokens: Callable[[Tensor], Tensor]) -> Piece:
        """Apply functions to the state and to the tensors of tokens."""
        calls = tuple((run, _each(arguments, tokens)) for run, arguments in self.calls)
        return dataclasses.replace(self, start=start(self.start), calls=calls)

    def shortened(self, tokens: int) -> Piece:
        """The first ``tokens`` tokens."""
        kept: list[tuple[Callable, dict[str, Any]]] = []
        for run, arguments in self.calls:
            if tokens > 0:
                kept.append((run, _each(arguments, functools.partial(_first, tokens))))
            tokens -= _length(arguments)
        return dataclasses.replace(self, calls=tuple(kept))

    def end(self) -> MemoryState:
        """The state after the calls, by making them again."""
        state = self.start
        with torch.autocast(state.dual[0].device.type, dtype=self.autocast, enabled=self.autocast is not None):
            for run, arguments in self.calls:
                _, state = run(**arguments, initial_state=state, output_final_state=True)
        return state


@dataclasses.dataclass(frozen=True)
class Window:
    """The last tokens of a state, as one or two pieces: at least ``size`` tokens, once so many have been read, and less than 4 * size.

    Attributes:
        size: the number of tokens that can be taken back.
        pieces: in the order of reading; the earlier one is dropped when the later one has ``size`` tokens.
    """

    size: int
    pieces: tuple[Piece, ...] = ()

    @property
    def count(self) -> int:
        """How many tokens can be taken back now."""
        return sum(piece.count for piece in self.pieces)

    def map(self, start: Callable[[MemoryState], MemoryState], tokens: Callable[[Tensor], Tensor]) -> Window:
        """Apply functions to the states and to the tensors of tokens."""
        return dataclasses.replace(self, pieces=tuple(piece.map(start, tokens) for piece in self.pieces))

    def extended(self, start: MemoryState, run: Callable, arguments: dict[str, Any]) -> Window:
        """The window after one more call from the state ``start``."""
        device = start.dual[0].device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        *earlier, last = self.pieces or (Piece(start, autocast=autocast),)
        if last.count >= self.size or last.autocast != autocast:
            earlier, last = [last], Piece(start, autocast=autocast)
        last = dataclasses.replace(last, calls=(*last.calls, (run, arguments)))
        return Window(self.size, (last,) if last.count >= self.size else (*earlier[-1:], last))

    def cropped(self, state: MemoryState, tokens: int) -> MemoryState:
        """``state``, which this window belongs to, before its last ``tokens`` tokens."""
        check_tokens("tokens", tokens, self.count, self.size)
        pieces = list(self.pieces)
        while tokens:
            last = pieces.pop()
            kept = last.shortened(max(last.count - tokens, 0))
            tokens -= last.count - kept.count
            if kept.calls:
                state = kept.end()
                pieces.append(kept)
            else:
                state = last.start
        return dataclasses.replace(state, window=Window(self.size, tuple(pieces)))


def check_tokens(name: str, tokens: object, most: int, size: int | None) -> None:
    """Whether so many tokens can be taken back from a window of ``size`` tokens (None: there is none) that holds ``most``.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    if isinstance(tokens, bool) or not isinstance(tokens, int):
        raise TypeError(f"{name}: expected a number of tokens, got {tokens!r}")
    if size is None and tokens:
        raise ValueError(f"{name}: this state cannot take back tokens; expected one with a window, made by keep(n) before they are read")
    if not 0 <= tokens <= most:
        kept = f"the window holds {most} tokens (of keep({size}))"
        raise ValueError(f"{name}: expected 0 to {most}, since {kept}, got {tokens}; keep more before they are read")


def takes_back(function: Callable) -> Callable:
    """A public function that extends the window of a state, if the initial state has one."""
    names = tuple(inspect.signature(function).parameters)

    @functools.wraps(function)
    def call(*args, **arguments):
        state = arguments.get("initial_state")
        if getattr(state, "window", None) is None:
            return function(*args, **arguments)
        return _read(call, {**dict(zip(names, args, strict=False)), **arguments})

    return call


def _read(function: Callable, arguments: dict[str, Any]) -> tuple[Tensor, MemoryState | None]:
    """A call whose initial state has a window. A long one is cut, so that the window holds its last tokens only."""
    state = arguments.pop("initial_state")
    window, start = state.window, dataclasses.replace(state, window=None)
    if arguments.get("inplace_state"):
        raise ValueError("inplace_state: a state with a window keeps earlier states; expected False, got True")
    if not arguments.pop("output_final_state", False):
        return function(**arguments, initial_state=start)
    outputs, length = [], _length(arguments)
    packed = arguments.get("cu_seqlens") is not None
    if length > 2 * window.size and not packed:
        first = _each(arguments, lambda x: x[:, : length - window.size])
        out, start = function(**first, initial_state=start, output_final_state=True)
        outputs, window = [out], Window(window.size)
        arguments = _each(arguments, lambda x: x[:, length - window.size :])
    out, final = function(**arguments, initial_state=start, output_final_state=True)
    # Packed sequences have ends of their own: none of their tokens can be taken back.
    window = Window(window.size) if packed else window.extended(start, function, arguments) if _length(arguments) else window
    return torch.cat([*outputs, out], 1) if outputs else out, dataclasses.replace(final, window=window)


def _first(tokens: int, x: Tensor) -> Tensor:
    return x[:, :tokens]


def _length(arguments: dict[str, Any]) -> int:
    return arguments["q"].shape[1]


def _each(arguments: dict[str, Any], function: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """The arguments, with ``function`` applied to those of tokens."""
    return {name: function(x) if name in TOKENS and isinstance(x, Tensor) else x for name, x in arguments.items()}
