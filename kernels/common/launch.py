"""From a validated call to kernel arguments, and the function that all launches go through."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...backends import multiprocessors
from . import bound, configs
from .bias import Bias
from .bound import Shared, by_name
from .retention import Retention

__all__ = ["MatrixStrides", "Problem", "Slots", "Strides", "launch", "start", "tiles"]

OLD = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Slots:
    """Where the chunks (or segments) of every sequence lie in a buffer with one slot for each; computed without device synchronisation."""

    def __init__(self, cu_seqlens: Tensor | None, sequences: int, tokens: int, size: int, position: Tensor | None = None):
        """Slots of ``size`` tokens each; sequence n begins ``position[n]`` tokens inside its first slot."""
        before = 0 if position is None else size - 1  # at most
        self.per_sequence = 0  # unless not packed
        self.first = self._last = None
        if cu_seqlens is None:
            self.per_sequence = -(-(tokens + before) // size)
            self.count = sequences * self.per_sequence
            return
        self.count = (tokens + sequences * before) // size + sequences
        lengths = cu_seqlens.diff() if position is None else cu_seqlens.diff() + position
        each = (lengths + (size - 1)) // size
        self._last = each.cumsum(0)
        self.first = self._last - each  # [N] int64, the first slot of every packed sequence

    @functools.cached_property
    def owner(self) -> Tensor | None:
        """``[count]`` int64, the packed sequence of every slot; -1 for an unused one."""
        if self._last is None:
            return None
        owner = torch.searchsorted(self._last, torch.arange(self.count, device=self._last.device), right=True)
        return torch.where(owner < len(self._last), owner, -1)


class Strides(NamedTuple):
    """Of batch, token and head of q, k or v."""

    b: int
    t: int
    h: int

    @staticmethod
    def of(x: Tensor) -> Strides:
        return Strides(*x.stride()[:3])


class MatrixStrides(NamedTuple):
    """Of sequence, head, value and key of a matrix ``[N, H, Dv, Dk]``."""

    n: int
    h: int
    v: int
    k: int


class Problem:
    """A call's tensors as the kernels take them, its sizes and its compile-time constants."""

    def __init__(self, call):
        self.call = call
        self.q, self.k, self.v = (_unit_stride(x) for x in (call.q, call.k, call.v))
        gates = (call.lr, call.log_decay, call.delta, call.momentum)
        self.lr, self.log_decay, self.delta, self.momentum = (None if x is None else x.contiguous() for x in gates)
        self.erase_k, self.key_log_decay = (None if x is None else x.contiguous() for x in (call.erase_k, call.key_log_decay))
        self.cu_seqlens = None if call.cu_seqlens is None else call.cu_seqlens.to(torch.int64)
        self.key = configs.Key.of(call)
        self.hidden, self.rows, self.block = self.key.hidden, self.key.chunk_size, self.key.block_c
        self.blocks = self.rows // self.block
        self.batch, self.tokens, self.heads, self.key_dim = call.q.shape
        self.value_dim = call.v.shape[-1]
        self.sequences = call.state.dual[0].shape[0]
        self.chunk_size = configs.block_tokens(call) or call.chunk_size
        self.position = None if call.state.open_chunk is None or self.key.exact else call.state.open_chunk.position
        self.slots = self.segments(self.chunk_size)
        self.device = call.q.device
        self.architecture = architecture_of(self.device)
        self._plans = _plans(self.key, self.architecture)
        self.bias = Bias.of(call.bias, 0 if not call.bias.needs_delta else call.delta.dim() - 2)
        self.retention = Retention.of(call.retention)
        self.shared = self._shared()

    def _shared(self) -> Shared:
        """What kernels take of the call itself, by the names that all of them use."""
        call, slots = self.call, self.slots
        tensors = dict(
            q=self.q, k=self.k, v=self.v, lr=self.lr, log_decay=self.log_decay, delta=self.delta, momentum=self.momentum,
            erase_k=self.erase_k, key_log_decay=self.key_log_decay, scores=None, kept=None,
            position=self.position, cu_seqlens=self.cu_seqlens, first_slot=slots.first, slot_owner=slots.owner,
        )  # fmt: skip
        if call.memory.name == "mlp":
            tensors |= dict(ln_weight=call.ln_weight.contiguous(), ln_bias=call.ln_bias.contiguous())
        numbers = self.tokens, self.heads, slots.per_sequence, slots.count, self.batch * self.tokens * self.heads
        strides = Strides.of(self.q), Strides.of(self.k), Strides.of(self.v)
        settings = self.chunk_size, call.chunk_size, call.decay_first, call.lr.dim() == 4, call.ln_eps
        return Shared(tensors, before=_settled(self.key, call.q.dtype, self.bias, self.retention, numbers, strides, settings))

    def sharing(self, **arguments) -> Problem:
        """The same problem, with arguments that its launches share from here on: each is read once, not once a launch."""
        other = object.__new__(Problem)
        other.__dict__ |= self.__dict__ | {"shared": Shared(arguments, before=self.shared)}
        return other

    def plan(self, kernel: str, along: str | None) -> Plan:
        """How a kernel is launched; ``along`` as in :func:`launch`."""
        which = kernel, along, configs.forced(kernel)
        return self._plans.get(which) or self._plans.setdefault(which, Plan.of(kernel, along, self.key, self.architecture))

    def fuses(self) -> bool:
        """Whether a linear memory's forward computes the output in its chain: `configs` decides; gates by channel need registers too."""
        plain = self.lr.dim() == 3 and self.bias.delta < 2
        return plain and self.key.fuses(self.sequences * self.heads, multiprocessors(self.device), self.architecture)

    def segments(self, size: int) -> Slots:
        """Computed once for the forward and the backward of a call."""
        slots = self.call.slots
        return slots.get(size) or slots.setdefault(size, Slots(self.cu_seqlens, self.sequences, self.tokens, size, self.position))

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.q.dtype, device=self.device)

    def per_token(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """``[B, T, H, *shape]``."""
        return self.empty(self.batch, self.tokens, self.heads, *shape, dtype=dtype)

    def result(self, *shape: int, dtype: torch.dtype | None = None, tiles: int | None = None) -> Tensor:
        """A result of the call, or its partial sums ``[tiles, B, T, H, *shape]``.

        Zero-filled for packed sequences, since ``cu_seqlens`` on the device may end before T.
        """
        x = self.empty(*(() if tiles is None else (tiles,)), self.batch, self.tokens, self.heads, *shape, dtype=dtype)
        return x if self.cu_seqlens is None else x.zero_()

    def per_slot(self, slots: Slots, dtype: torch.dtype | None = None) -> Tensor:
        """``[slots, H, Dk, Dv]``."""
        return self.empty(slots.count, self.heads, self.key_dim, self.value_dim, dtype=dtype)


def _unit_stride(x: Tensor) -> Tensor:
    """q, k or v with a contiguous last axis, and token strides small enough for 31-bit offsets within a chunk."""
    return x if x.stride(-1) == 1 and x.stride(1) < 2**23 else x.contiguous()


class Plan(NamedTuple):
    """What is the same in all launches of a kernel under one key."""

    config: configs.Config
    blocks: dict  # tile sizes, by the kernels' names
    tiles: int  # programs among which the axis is divided

    @staticmethod
    def of(kernel: str, along: str | None, key: configs.Key, architecture: str) -> Plan:
        config, blocks = configs.choose(kernel, key, architecture), {}
        if along == "hidden":
            blocks = dict(BD=key.padded_v, BH=key.block_hidden(config))
        elif along:
            blocks = dict(zip(("BV", "BK"), key.blocks(config), strict=True))
        return Plan(config, blocks, key.tiles(kernel, config, along) if along else 1)


@functools.lru_cache(1024)
def _settled(
    key: configs.Key, dtype: torch.dtype, bias: Bias, retention: Retention, numbers: tuple, strides: tuple, settings: tuple
) -> Shared:
    """Those arguments of all launches that are no tensors. Calls of the same sizes share them."""
    tokens, chunk, decay_first, channel_lr, eps = settings
    values = dict(zip(("T", "H", "CHUNKS", "SLOTS", "ROW", "q_strides", "k_strides", "v_strides"), (*numbers, *strides), strict=True))
    constants = dict(
        TOKENS=tokens, C=key.chunk_size, BC=key.block_c, DTYPE=DTYPES[dtype], BIAS=bias, RETENTION=retention,
        CHANNEL_LR=channel_lr, CHANNELS=key.channels, MOMENTUM=key.momentum, CHUNK=chunk, DECAY_FIRST=decay_first,
    )  # fmt: skip
    sizes = dict(D=key.key_dim, Hd=key.hidden, EPS=eps) if key.hidden else dict(Dk=key.key_dim, Dv=key.value_dim)
    return Shared(values, constants | sizes)


@functools.lru_cache(1024)
def _plans(key: configs.Key, architecture: str) -> dict[tuple, Plan]:
    """Those made so far, by kernel, axis and forced configuration."""
    return {}


def tiles(kernel: str, problem: Problem, along: str) -> int:
    """Number of tiles along a kernel's ``"value"`` or ``"key"`` axis."""
    return problem.plan(kernel, along).tiles


def options(config: configs.Config, architecture: str) -> dict:
    """A configuration as the compiler's options.

    Products and sums are not fused: a fused sum over lanes rounds differently in each of them, and several lanes store such a sum to one
    address, so that the last bit would vary from run to run. Matrix products without tensor cores are fused in any case.
    Triton before 3.7 pipelines loops for sm_90 wrongly: without the fence between an asynchronous copy and a product that reads its data,
    and with a product's operand in registers overwritten while the product runs (tests/ptx reports both).
    """
    bound = {"maxnreg": config.registers} if config.registers and architecture.startswith("sm_") else {}
    stages = 1 if OLD and architecture.startswith("sm_9") else config.stages
    return dict(num_warps=config.warps, num_stages=stages, enable_fp_fusion=False, **bound)


@functools.cache
def architecture(device: torch.device) -> str:
    """``"sm_90"``, ``"gfx942"``, or "" on a CPU, where Triton interprets."""
    if device.type != "cuda":
        return ""
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def architecture_of(device: torch.device) -> str:
    """The architecture that launches are for: the device's, or that of a recording."""
    return _recorder[1] if _recorder else architecture(device)


#: set by `recording`: the receiver of launches, and the architecture they are for
_recorder: tuple[Callable, str] | None = None


@contextlib.contextmanager
def recording(receive: Callable, architecture: str = "") -> Iterator[None]:
    """Within the context nothing is launched: ``receive(kernel, arguments, config)`` is called instead. Tensors may be meta tensors."""
    global _recorder
    before, _recorder = _recorder, (receive, architecture)
    try:
        yield
    finally:
        _recorder = before


def launch(kernel, problem: Problem, units: int, along: str | None, own: dict) -> None:
    """Run a kernel for ``units`` sequences, segments or chunks, times the tiles along an axis times heads if there is an axis.

    ``along``: ``"value"``, ``"key"``, ``"hidden"`` (units of an MLP, all of them in one program) or ``"head"`` (all keys and values in
    one program). ``own``: the arguments that the problem does not have, or has otherwise.
    """
    plan = problem.plan(kernel.__name__, along)
    grid = (units * plan.tiles, problem.heads) if along else (units,)
    start(kernel, grid, plan.config, problem.device, problem.shared, own | plan.blocks)


def start(kernel, grid: tuple[int, ...], config: configs.Config, device: torch.device, shared: Shared, own: dict) -> None:
    """All launches go through this function. ``own``: the arguments that ``shared`` does not have, or has otherwise."""
    if _recorder is not None:
        _recorder[0](kernel, by_name(kernel, shared, own), config)
        return
    if 0 in grid:
        return
    if device.index is None or device.index == torch.cuda.current_device():  # the CPU has no index
        bound.run(kernel, grid, config, device, _options, shared, own)
        return
    with torch.cuda.device(device):
        bound.run(kernel, grid, config, device, _options, shared, own)


def _options(config: configs.Config, device: torch.device) -> dict:
    return options(config, architecture(device))
