"""From a validated call to kernel arguments: geometry, constants, and the one function that launches."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from . import configs

__all__ = ["Problem", "Slots", "launch", "start", "tiles"]

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Slots(NamedTuple):
    """Where the chunks of every sequence lie in a buffer with a slot for each; computed without waiting for the device."""

    count: int
    per_sequence: int  # unless packed
    first: Tensor | None  # [N] int64, the first slot of every packed sequence
    owner: Tensor | None  # [count] int64, the packed sequence of every slot; -1 for a spare one

    @staticmethod
    def of(cu_seqlens: Tensor | None, sequences: int, tokens: int, size: int, position: Tensor | None = None) -> Slots:
        """Slots for pieces of ``size`` tokens; sequence n begins ``position[n]`` tokens inside its first piece."""
        before = 0 if position is None else size - 1  # at most
        if cu_seqlens is None:
            each = -(-(tokens + before) // size)
            return Slots(sequences * each, each, None, None)
        count = (tokens + sequences * before) // size + sequences
        lengths = cu_seqlens.diff() if position is None else cu_seqlens.diff() + position
        last = ((lengths + size - 1) // size).cumsum(0)
        owner = torch.searchsorted(last, torch.arange(count, device=last.device), right=True)
        return Slots(count, 0, last - (lengths + size - 1) // size, torch.where(owner < sequences, owner, -1))


class Problem:
    """A call's tensors as the kernels take them, its sizes and its compile-time constants."""

    def __init__(self, call):
        self.call = call
        self.q, self.k, self.v = (_unit_stride(x) for x in (call.q, call.k, call.v))
        gates = (call.lr, call.log_decay, call.delta, call.momentum)
        self.lr, self.log_decay, self.delta, self.momentum = (None if x is None else x.contiguous() for x in gates)
        self.cu_seqlens = None if call.cu_seqlens is None else call.cu_seqlens.to(torch.int64)
        self.dual = call.state.dual[0]
        self.hidden = call.hidden
        self.batch, self.tokens, self.heads, self.key_dim = call.q.shape
        self.value_dim = call.v.shape[-1]
        self.sequences = self.dual.shape[0]
        self.chunk_size = call.chunk_size
        self.position = None if call.state.open_chunk is None else call.state.open_chunk.position
        self.rows = configs.padded(call.chunk_size)
        self.slots = self.pieces(call.chunk_size)
        self.row = self.batch * self.tokens * self.heads
        bias, gate = call.bias, call.retention
        delta = 0 if not bias.needs_delta else call.delta.dim() - 2
        self.key = configs.Key(
            self.key_dim, self.value_dim, self.rows, call.q.element_size(), bias.row_coupled, self.hidden,
            gate.tag, call.momentum is not None, call.log_decay is not None and call.log_decay.dim() == 4,
        )  # fmt: skip
        self.architecture = architecture_of(call.q.device)
        self.block = self.key.block_c
        self.blocks = self.rows // self.block
        self.sizes = dict(C=self.rows, DTYPE=DTYPES[call.q.dtype])
        if call.memory.name == "mlp":
            self.sizes |= dict(D=self.key_dim, Hd=self.hidden, EPS=call.ln_eps)
            self.layer_norm = dict(ln_weight=call.ln_weight.contiguous(), ln_bias=call.ln_bias.contiguous())
        else:
            self.sizes |= dict(Dk=self.key_dim, Dv=self.value_dim, TOKENS=call.chunk_size)
        rules = rules_of(bias, gate)
        self.retention = {name: rules.pop(name) for name in ("RETENTION", "R0", "R1")}
        self.bias = rules | dict(READS=bias.reads_memory, COUPLED=bias.row_coupled, DELTA=delta)
        if call.memory.name == "linear":
            self.bias |= dict(CHANNEL_LR=call.lr.dim() == 4)

    def config(self, kernel: str) -> configs.Config:
        return configs.choose(kernel, self.key, self.architecture)

    def pieces(self, size: int) -> Slots:
        return Slots.of(self.cu_seqlens, self.sequences, self.tokens, size, self.position)

    def tables(self) -> dict:
        """Where the chunks are, for kernels that are parallel over them."""
        slots = self.slots
        return dict(cu_seqlens=self.cu_seqlens, first_slot=slots.first, slot_owner=slots.owner, CHUNKS=slots.per_sequence)

    def strides(self, *names: str) -> dict[str, int]:
        """Strides of batch, token and head of q, k or v."""
        return {f"stride_{n}{axis}": getattr(self, n).stride(i) for n in names for i, axis in enumerate("bth")}

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.q.dtype, device=self.q.device)

    def per_token(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """``[B, T, H, *shape]``."""
        return self.empty(self.batch, self.tokens, self.heads, *shape, dtype=dtype)

    def result(self, *shape: int, dtype: torch.dtype | None = None, tiles: int | None = None) -> Tensor:
        """What a call returns, or sums up over ``tiles`` to return it, ``[tiles, B, T, H, *shape]``.

        0 where no sequence writes: nobody looks whether ``cu_seqlens`` on a device ends before T.
        """
        x = self.empty(*(() if tiles is None else (tiles,)), self.batch, self.tokens, self.heads, *shape, dtype=dtype)
        return x if self.cu_seqlens is None else x.zero_()

    def per_slot(self, slots: Slots, dtype: torch.dtype | None = None) -> Tensor:
        """``[slots, H, Dk, Dv]``."""
        return self.empty(slots.count, self.heads, self.key_dim, self.value_dim, dtype=dtype)


def rules_of(bias, gate) -> dict:
    """Tags and parameters of a bias and a retention gate, as the kernels take them."""
    names = ("BIAS", "P0", "P1", "P2", "RETENTION", "R0", "R1")
    return dict(zip(names, (bias.tag, *bias.padded, gate.tag, *gate.padded), strict=True))


def _unit_stride(x: Tensor) -> Tensor:
    """q, k or v with a contiguous last axis, and a chunk that offsets of 31 bits can span."""
    return x if x.stride(-1) == 1 and x.stride(1) < 2**23 else x.contiguous()


def tiles(kernel: str, problem: Problem, along: str) -> int:
    """Tiles that a kernel cuts its ``"value"`` or ``"key"`` axis into."""
    return problem.key.tiles(kernel, problem.config(kernel), along)


def options(config: configs.Config, architecture: str) -> dict:
    """A configuration as the compiler's options."""
    bound = {"maxnreg": config.registers} if config.registers and architecture.startswith("sm_") else {}
    return dict(num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True, **bound)


@functools.cache
def architecture(device: torch.device) -> str:
    """``"sm_90"``, ``"gfx942"``, or "" where nothing is compiled."""
    if device.type != "cuda":
        return ""
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def architecture_of(device: torch.device) -> str:
    """The architecture that launches are meant for: the device's, or that of a recording."""
    return _recorder[1] if _recorder else architecture(device)


#: set by `recording`: what receives launches instead of the device, and the architecture they are meant for
_recorder: tuple[Callable, str] | None = None


@contextlib.contextmanager
def recording(receive: Callable, architecture: str = "") -> Iterator[None]:
    """Within it nothing is launched: ``receive(kernel, arguments, config)`` gets every launch. Meta tensors will do."""
    global _recorder
    before, _recorder = _recorder, (receive, architecture)
    try:
        yield
    finally:
        _recorder = before


def launch(kernel, problem: Problem, units: int, along: str | None, **arguments) -> None:
    """Run a kernel for ``units`` sequences, segments or chunks, x the tiles along an axis x heads if there is one.

    ``along="hidden"``: an MLP's hidden units, all of whose tiles one program takes; ``"head"``: it takes all keys and values.
    """
    config = problem.config(kernel.__name__)
    arguments |= dict(T=problem.tokens, H=problem.heads)
    if along == "hidden":
        arguments["BD"], arguments["BH"] = problem.key.padded_v, problem.key.block_hidden(config)
    elif along:
        arguments["BV"], arguments["BK"] = problem.key.blocks(config)
    grid = (units * problem.key.tiles(kernel.__name__, config, along), problem.heads) if along else (units,)
    start(kernel, grid, config, problem.q.device, arguments)


def start(kernel, grid: tuple[int, ...], config: configs.Config, device: torch.device, arguments: dict) -> None:
    """What every launch comes to."""
    if _recorder is not None:
        _recorder[0](kernel, arguments, config)
        return
    if 0 in grid:
        return
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](**arguments, **options(config, architecture(device)))
