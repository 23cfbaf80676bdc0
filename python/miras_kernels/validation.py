"""All checks of the public functions' arguments. Errors name the argument, what was expected and what was given."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from .call import Call
from .options import options
from .state import MemoryState, OpenChunk
from .tables.biases import L2, Bias
from .tables.memories import NORM, Memory
from .tables.retention import L2Retention, Retention
from .tracing import is_plain_eager

__all__ = ["make_call"]

#: the arguments of every memory besides q, k, v, lr and log_decay, with their defaults
COMMON = dict(bias=L2(), retention=L2Retention(), delta=None, momentum=None, chunk_size=64, initial_state=None, output_final_state=False,
              inplace_state=False, cu_seqlens=None)  # fmt: skip
#: and of a memory that ends in a LayerNorm
NORM_DEFAULTS = dict(ln_weight=None, ln_bias=None, ln_eps=1e-6)
#: and of a memory that takes the variants of the delta rule
VARIANTS = dict(erase_k=None, key_log_decay=None, decay_first=False)


def make_call(memory: Memory, q: Tensor, k: Tensor, v: Tensor, lr: Tensor, log_decay: Tensor | None = None, **given: Any) -> Call:
    """Check the arguments of a memory's function, see :mod:`miras_kernels.memory`, and convert them to one form."""
    defaults = COMMON | (NORM_DEFAULTS if memory.needs_norm else {}) | (VARIANTS if memory.variants else {})
    if unexpected := [name for name in given if name not in defaults]:
        raise TypeError(f"{memory.title} takes no argument {', '.join(map(repr, unexpected))}")
    x = {**defaults, **given}
    b, t, h, dk = _tokens(q, k, v)
    dv = v.shape[-1]
    if memory.square and dv != dk:
        raise ValueError(f"v: {memory.title} needs Dv = Dk = {dk}, got shape {tuple(v.shape)}")
    _settings(x["bias"], x["retention"], x["chunk_size"], x["output_final_state"], x["inplace_state"])
    n = _sequences(x["cu_seqlens"], b, t, q)
    gates = _gates(memory, lr, log_decay, x["delta"], x["momentum"], x["bias"], q, (b, t, h), dv)
    shapes = [(n, h, *shape) for shape in _matrix_shapes(memory, x["initial_state"], dk, dv)]
    if x["inplace_state"]:
        _overwritable(x["initial_state"], q)
    state = _state(x["initial_state"], q, x["momentum"] is not None, x["chunk_size"], shapes, gates["log_decay"])
    variants = _variants(q, gates["log_decay"], x["chunk_size"], x["retention"], **{name: x[name] for name in VARIANTS if name in x})
    norm = {name: x.get(name) for name in NORM}
    norm = _norm(q, h, dv, **norm) if memory.needs_norm else norm | {"ln_eps": 0.0}
    return Call(
        memory=memory, q=q, k=k, v=v, **gates, **variants, **norm, state=state, cu_seqlens=x["cu_seqlens"],
        bias=x["bias"], retention=x["retention"], chunk_size=x["chunk_size"],
        output_final_state=x["output_final_state"] or x["inplace_state"], inplace_state=x["inplace_state"],
    )  # fmt: skip


def _describe(x: object) -> str:
    if isinstance(x, Tensor):
        return f"a tensor of shape {tuple(x.shape)}"
    if isinstance(x, (tuple, list)):
        return f"{type(x).__name__} of {len(x)}: " + ", ".join(_describe(y) for y in x)
    return type(x).__name__ if not isinstance(x, (int, float, str)) else repr(x)


def _arithmetic(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _check_values(x: Tensor) -> bool:
    """Whether to check the values of ``x``: by default on the CPU only, since elsewhere it would wait for the device."""
    if not is_plain_eager([x]):
        return False
    return x.device.type == "cpu" if options.check_values is None else options.check_values


def _is_tensor(name: str, x: object, q: Tensor | None = None) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {_describe(x)}")
    if x.layout != torch.strided:
        raise ValueError(f"{name}: expected a strided (dense) tensor, got layout {x.layout}")
    if not x.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got dtype {x.dtype}")
    if q is not None and x.device != q.device:
        raise ValueError(f"{name}: expected device {q.device} as q, got {x.device}")
    return x


def _tensor(name: str, x: object, q: Tensor, shapes: tuple[tuple[int, ...], ...], words: str) -> Tensor:
    """A floating-point tensor of one of ``shapes``, in the dtype of the arithmetic."""
    x = _is_tensor(name, x, q)
    if tuple(x.shape) not in shapes:
        allowed = " or ".join(str(s) for s in shapes)
        raise ValueError(f"{name}: expected shape {words} = {allowed}, got {tuple(x.shape)}")
    if x.dtype == torch.float64 and q.dtype != torch.float64:
        raise TypeError(f"{name}: float64 needs float64 q, k and v, got q of dtype {q.dtype}")
    dtype = _arithmetic(q)
    return x if x.dtype == dtype else x.to(dtype)


def _any_positive(x: Tensor) -> bool:
    """``(x > 0).any()``, in a fifth of the time."""
    largest = x.detach().max().item() if x.numel() else 0.0
    return largest > 0 or (largest != largest and bool((x > 0).any()))


def _tokens(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, int, int, int]:
    for name, x in (("q", q), ("k", k), ("v", v)):
        _is_tensor(name, x, None if name == "q" else q)
        if x.dim() != 4:
            raise ValueError(f"{name}: expected 4 dimensions [B, T, H, D], got shape {tuple(x.shape)}")
        if x.shape[-2] < 1 or x.shape[-1] < 1:
            raise ValueError(f"{name}: expected at least one head and one channel, got shape {tuple(x.shape)}")
        if x.dtype != q.dtype:
            raise TypeError(f"{name}: expected dtype {q.dtype} as q, got {x.dtype}")
    if k.shape != q.shape:
        raise ValueError(f"k: expected the shape of q, {tuple(q.shape)}, got {tuple(k.shape)}")
    if v.shape[:3] != q.shape[:3]:
        raise ValueError(f"v: expected shape [B, T, H, Dv] = {tuple(q.shape[:3])} + (Dv,), got {tuple(v.shape)}")
    b, t, h, d = q.shape
    return b, t, h, d


def _settings(bias: object, retention: object, chunk_size: object, output_final_state: object, inplace_state: object) -> None:
    if not isinstance(bias, Bias) or type(bias) is Bias:
        raise TypeError(f"bias: expected an attentional bias such as L2() or Huber('norm'), got {_describe(bias)}")
    if not isinstance(retention, Retention) or type(retention) is Retention:
        raise TypeError(f"retention: expected a retention gate such as L2Retention(), got {_describe(retention)}")
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int):
        raise TypeError(f"chunk_size: expected an integer >= 1, got {_describe(chunk_size)}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size: expected an integer >= 1, got {chunk_size}")
    if not isinstance(output_final_state, bool):
        raise TypeError(f"output_final_state: expected True or False, got {_describe(output_final_state)}")
    if not isinstance(inplace_state, bool):
        raise TypeError(f"inplace_state: expected True or False, got {_describe(inplace_state)}")


def _sequences(cu_seqlens: object, b: int, t: int, q: Tensor) -> int:
    """The number of sequences in the call."""
    if cu_seqlens is None:
        return b
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"cu_seqlens: expected an integer tensor [N + 1], got {_describe(cu_seqlens)}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens: expected dtype int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(f"cu_seqlens: expected shape [N + 1] with N >= 1, got {tuple(cu_seqlens.shape)}")
    if cu_seqlens.device != q.device:
        raise ValueError(f"cu_seqlens: expected device {q.device} as q, got {cu_seqlens.device}")
    if b != 1:
        raise ValueError(f"cu_seqlens: packed sequences need B = 1, got B = {b}")
    if _check_values(cu_seqlens):
        values = cu_seqlens.tolist()
        if values[0] != 0:
            raise ValueError(f"cu_seqlens: expected to start at 0, got {values[0]}")
        if any(y < x for x, y in itertools.pairwise(values)):
            raise ValueError(f"cu_seqlens: expected offsets that do not decrease, got {values}")
        if values[-1] != t:
            raise ValueError(f"cu_seqlens: expected to end at T = {t}, got {values[-1]}")
    return cu_seqlens.shape[0] - 1


def _gates(memory: Memory, lr, log_decay, delta, momentum, bias: Bias, q: Tensor, bth: tuple[int, int, int], dv: int) -> dict:
    def gate(name: str, x: object, per_channel: bool) -> Tensor:
        if not memory.channel_wise and isinstance(x, Tensor) and x.dim() == 4:
            raise ValueError(f"{name}: channel-wise gates [B, T, H, Dv] need a linear memory; {memory.title} takes [B, T, H] = {bth}, "
                             f"got {tuple(x.shape)}")  # fmt: skip
        if per_channel and memory.channel_wise:
            return _tensor(name, x, q, (bth, (*bth, dv)), "[B, T, H] or [B, T, H, Dv]")
        return _tensor(name, x, q, (bth,), "[B, T, H]")

    gates = {"lr": gate("lr", lr, True), "log_decay": None, "delta": None, "momentum": None}
    if log_decay is not None:
        gates["log_decay"] = gate("log_decay", log_decay, True)
        if _check_values(log_decay) and _any_positive(log_decay):
            raise ValueError(f"log_decay: expected values <= 0 (alpha = exp(log_decay) in (0, 1]), got a maximum of {log_decay.max():g}")
    if momentum is not None:
        gates["momentum"] = gate("momentum", momentum, False)
        if _check_values(momentum) and bool(((momentum < 0) | (momentum >= 1)).any()):
            raise ValueError(f"momentum: expected values in [0, 1), got [{momentum.min():g}, {momentum.max():g}]")
    if not bias.needs_delta:
        if delta is not None:
            raise ValueError(f"delta: the bias {bias} uses none, got {_describe(delta)}")
        return gates
    if delta is None:
        raise ValueError(f"delta: the bias {bias} needs one (a float or a tensor [B, T, H]), got None")
    if isinstance(delta, Tensor):
        gates["delta"] = gate("delta", delta, bias.delta_per_channel)
        if _check_values(delta) and bool((delta < 0).any()):
            raise ValueError(f"delta: expected values >= 0, got a minimum of {delta.min():g}")
    elif isinstance(delta, bool) or not isinstance(delta, (int, float)):
        raise TypeError(f"delta: expected a float or a tensor [B, T, H], got {_describe(delta)}")
    elif not 0 <= delta < math.inf:
        raise ValueError(f"delta: expected a finite value >= 0, got {delta}")
    else:
        gates["delta"] = torch.full((), float(delta), dtype=_arithmetic(q), device=q.device).expand(bth)
    return gates


def _variants(
    q: Tensor, log_decay: Tensor | None, chunk_size: int, retention: Retention, erase_k=None, key_log_decay=None, decay_first=False
) -> dict:
    """The options of the delta rule: they need single tokens and a dual that is its own primal."""
    if not isinstance(decay_first, bool):
        raise TypeError(f"decay_first: expected True or False, got {_describe(decay_first)}")
    if erase_k is not None:
        _is_tensor("erase_k", erase_k, q)
        if erase_k.shape != q.shape:
            raise ValueError(f"erase_k: expected the shape of k, {tuple(q.shape)}, got {tuple(erase_k.shape)}")
        if erase_k.dtype != q.dtype:
            raise TypeError(f"erase_k: expected dtype {q.dtype} as q, got {erase_k.dtype}")
    if key_log_decay is not None:
        if log_decay is not None:
            raise ValueError("key_log_decay: expected log_decay=None beside it (add a decay per token to every key channel), got both")
        key_log_decay = _tensor("key_log_decay", key_log_decay, q, (tuple(q.shape),), "[B, T, H, Dk]")
        if _check_values(key_log_decay) and _any_positive(key_log_decay):
            raise ValueError(f"key_log_decay: expected values <= 0, got a maximum of {key_log_decay.max():g}")
    given = {"erase_k": erase_k is not None, "key_log_decay": key_log_decay is not None, "decay_first": decay_first}
    for name in [name for name, used in given.items() if used]:
        if chunk_size != 1:
            raise ValueError(f"{name}: needs chunk_size=1 (gradients taken at every token), got chunk_size={chunk_size}")
        if not isinstance(retention, L2Retention):
            raise ValueError(f"{name}: needs retention=L2Retention(), got {retention}")
    return {"erase_k": erase_k, "key_log_decay": key_log_decay, "decay_first": decay_first}


def _matrix_shapes(memory: Memory, initial: Any, dk: int, dv: int) -> tuple[tuple[int, int], ...]:
    """The shapes of the memory's matrices; a hidden size is read from the initial ones."""
    if not memory.needs_initial_state:
        return memory.shapes(dk, dv, 0)
    wanted = f"{len(memory.matrices)} matrices ({memory.shape_words()})"
    if initial is None:
        raise ValueError(f"initial_state: {memory.title} needs its {wanted}, got None")
    duals = initial.dual if isinstance(initial, MemoryState) else initial
    several = isinstance(duals, (tuple, list)) and len(duals) == len(memory.matrices)
    if not several or not all(isinstance(x, Tensor) and x.dim() >= 2 for x in duals):
        raise ValueError(f"initial_state: expected {wanted}, got {_describe(duals)}")
    return memory.shapes(dk, dv, memory.hidden(tuple(duals)))


def _norm(q: Tensor, h: int, d: int, ln_weight, ln_bias, ln_eps) -> dict:
    """The parameters of a memory's LayerNorm."""
    if isinstance(ln_eps, bool) or not isinstance(ln_eps, (int, float)) or not ln_eps > 0:
        raise ValueError(f"ln_eps: expected a number > 0, got {ln_eps!r}")
    weights = {name: _tensor(name, x, q, ((h, d),), "[H, D]") for name, x in (("ln_weight", ln_weight), ("ln_bias", ln_bias))}
    return weights | dict(ln_eps=float(ln_eps))


def _overwritable(initial: Any, q: Tensor) -> None:
    """Whether a state can be written in place; its shapes are checked elsewhere."""
    if initial is None:
        raise ValueError("initial_state: inplace_state=True needs a state to write into, got None")
    parts = initial.tensors() if isinstance(initial, MemoryState) else initial if isinstance(initial, (tuple, list)) else (initial,)
    for x in parts:
        if not isinstance(x, Tensor):
            continue
        if x.dtype != _arithmetic(q):
            raise TypeError(f"initial_state: inplace_state=True needs dtype {_arithmetic(q)}, got {x.dtype}")
        if x.dim() == 3 and not isinstance(initial, MemoryState):
            raise ValueError(f"initial_state: inplace_state=True needs a state of every sequence, [N, H, ...], got shape {tuple(x.shape)}")
        if any(stride == 0 and size > 1 for size, stride in zip(x.shape, x.stride(), strict=True)):
            raise ValueError(f"initial_state: inplace_state=True needs memory of its own for every element, got strides {x.stride()}")


def _state(initial, q: Tensor, with_momentum: bool, chunk_size: int, shapes: list[tuple[int, int, int, int]], log_decay) -> MemoryState:
    """The initial state with every tensor ``[N, H, ...]`` in the dtype of the arithmetic; ``shapes`` are those of the matrices."""
    n, h = shapes[0][:2]
    if initial is None:
        dual = tuple(torch.zeros(s, dtype=_arithmetic(q), device=q.device) for s in shapes)
        return MemoryState(dual, tuple(map(torch.zeros_like, dual)) if with_momentum else None)
    if not isinstance(initial, MemoryState):
        parts = initial if isinstance(initial, (tuple, list)) else (initial,)
        if len(parts) != len(shapes):
            raise ValueError(f"initial_state: expected {len(shapes)} matrices, got {_describe(initial)}")
        words = "[N, H, ...] or [H, ...]"
        given = [_tensor("initial_state", x, q, (s, s[1:]), words) for x, s in zip(parts, shapes, strict=True)]
        dual = tuple(x if x.dim() == len(s) else x.expand(s) for x, s in zip(given, shapes, strict=True))
        return MemoryState(dual, tuple(map(torch.zeros_like, dual)) if with_momentum else None)

    def every(name: str, parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if not isinstance(parts, tuple) or len(parts) != len(shapes):
            raise ValueError(f"{name}: expected {len(shapes)} matrices, got {_describe(parts)}")
        return tuple(_tensor(name, x, q, (s,), "[N, H, ...]") for x, s in zip(parts, shapes, strict=True))

    dual = every("initial_state.dual", initial.dual)
    momentum = None
    if initial.momentum is not None:
        if not with_momentum:
            raise ValueError("initial_state.momentum: the state carries momentum, so the call needs momentum, got momentum=None")
        momentum = every("initial_state.momentum", initial.momentum)
    elif with_momentum:
        momentum = tuple(map(torch.zeros_like, dual))
    if initial.open_chunk is None:
        return MemoryState(dual, momentum)
    position = initial.open_chunk.position
    if not isinstance(position, Tensor) or position.dtype != torch.int64 or tuple(position.shape) != (n,):
        raise ValueError(f"initial_state.open_chunk.position: expected an int64 tensor of shape ({n},), got {_describe(position)}")
    if _check_values(position) and bool(((position < 0) | (position >= chunk_size)).any()):
        raise ValueError(f"initial_state.open_chunk.position: expected values in [0, chunk_size) = [0, {chunk_size}), got "
                         f"{position.tolist()} (was the state made with another chunk_size?)")  # fmt: skip
    start = every("initial_state.open_chunk.start", initial.open_chunk.start)
    gate_shape = (n, h) if log_decay is None else (n, *log_decay.shape[2:])
    total = _tensor("initial_state.open_chunk.log_decay", initial.open_chunk.log_decay, q, (gate_shape,), "as log_decay per sequence")
    if chunk_size == 1:  # of a decoder's state: a chunk without tokens
        return MemoryState(dual, momentum)
    return MemoryState(dual, momentum, OpenChunk(position, start, total))
