"""Context parallelism: sequences that are longer than one device holds (docs/parallel.md).

Every rank of a process group holds a stretch of consecutive tokens. A memory's state is all that one stretch needs from those before it, so
it travels from rank to rank, and its gradient back. Heads are cut into parts so that ranks work at the same time: while rank 1 reads its
stretch with the first heads, rank 0 reads its own with the next ones. With P ranks and G parts of equal cost the ranks are busy
``G / (G + P - 1)`` of the time.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh

from .state import MemoryState

__all__ = ["ContextParallel", "parallelize"]


class ContextParallel:
    """How the sequences of a batch are divided among the ranks of a group: rank 0 has the first tokens.

    Args:
        group: a process group, a one-dimensional ``DeviceMesh``, or None for all processes.
        chunk_size: every stretch but the last one of a sequence ends at a multiple of it, counted from the sequence's start: a multiple of
            the chunk size of every memory, at least the width of their convolutions less one.
        parts: how many parts the heads are cut into, at most; more of them keep more ranks busy, but their calls are smaller.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """

    def __init__(self, group: Any = None, *, chunk_size: int = 64, parts: int = 8):
        if not distributed.is_available() or not distributed.is_initialized():
            raise ValueError("group: expected torch.distributed to be initialised")
        if isinstance(group, DeviceMesh):
            if group.ndim != 1:
                raise ValueError(f"group: expected a DeviceMesh of one dimension, got {group.ndim}")
            group = group.get_group()
        elif group is not None and not isinstance(group, distributed.ProcessGroup):
            raise TypeError(f"group: expected a ProcessGroup, a DeviceMesh or None, got {type(group).__name__}")
        for name, value in (("chunk_size", chunk_size), ("parts", parts)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected an integer >= 1, got {value!r}")
        self.group, self.chunk_size, self.parts = group, chunk_size, parts
        self.rank, self.size = distributed.get_rank(group), distributed.get_world_size(group)
        if self.rank < 0:
            raise ValueError("group: expected a group that this process belongs to")

    # ----------------------------------------------------------------------------------------------------------- stretches

    def bounds(self, tokens: int, cu_seqlens: Tensor | None = None) -> list[int]:
        """Where the stretches begin, and the end: ``size + 1`` numbers, each at the start of a chunk.

        Args:
            tokens: T, of the whole sequence.
            cu_seqlens: ``[N + 1]``, offsets of the sequences packed into it, all ranks together.

        Raises:
            ValueError: there are fewer chunks than ranks.
        """
        offsets = [0, tokens] if cu_seqlens is None else cu_seqlens.tolist()
        if offsets[-1] != tokens:
            raise ValueError(f"cu_seqlens: expected offsets from 0 to T = {tokens}, got {offsets[-1]} at the end")
        starts = sorted({at for a, b in itertools.pairwise(offsets) for at in range(a, b, self.chunk_size)})
        if len(starts) < self.size:
            raise ValueError(f"tokens: {self.size} ranks need as many chunks of {self.chunk_size} tokens at least, got {len(starts)}")
        bounds = [0]
        for rank in range(1, self.size):
            left = self.size - rank  # ranks that still need a start of their own
            i = starts.index(bounds[-1]) + 1
            bounds.append(min(starts[i : len(starts) - left + 1], key=lambda at: abs(at - rank * tokens / self.size)))
        return [*bounds, tokens]

    def shard(self, x: Tensor, dim: int = 1, cu_seqlens: Tensor | None = None) -> Tensor:
        """This rank's stretch of a tensor with all tokens along ``dim``."""
        bounds = self.bounds(x.shape[dim], cu_seqlens)
        return x.narrow(dim, bounds[self.rank], bounds[self.rank + 1] - bounds[self.rank])

    def local(self, tokens: int, cu_seqlens: Tensor | None) -> Stretch:
        """This rank's stretch of ``tokens`` tokens; ``cu_seqlens`` as in :meth:`bounds`."""
        last = self.rank == self.size - 1
        if cu_seqlens is None:
            if tokens == 0 or (not last and tokens % self.chunk_size):
                raise ValueError(f"T: expected a multiple of chunk_size = {self.chunk_size} on every rank but the last, got {tokens}")
            return Stretch(self, None, self.rank > 0, not last)
        bounds = self.bounds(int(cu_seqlens[-1]), cu_seqlens)
        begin, end = bounds[self.rank], bounds[self.rank + 1]
        if tokens != end - begin:
            raise ValueError(f"T: rank {self.rank} reads tokens {begin} to {end} of these sequences (ContextParallel.shard), got {tokens}")
        offsets = cu_seqlens.to(torch.int64)
        inside = offsets[(offsets > begin) & (offsets < end)].unique() - begin
        whole = set(cu_seqlens.tolist())
        return Stretch(self, [0, *inside.tolist(), tokens], begin not in whole, end not in whole)

    # ------------------------------------------------------------------------------------------------------------ messages

    def send(self, x: Tensor, rank: int) -> Any:
        """Without waiting; the tensor must stay as it is until the work is done."""
        return distributed.isend(x, group=self.group, group_dst=rank)

    def receive(self, x: Tensor, rank: int) -> Tensor:
        distributed.recv(x, group=self.group, group_src=rank)
        return x


class Stretch:
    """A rank's stretch of a batch: rows ``[B, T, ...]``, all of which go on, or packed sequences, of which the first and last may.

    Attributes:
        offsets: of the packed sequences' tokens on this rank, or None.
        continues: whether the stretch's first sequence (or every row) began on the rank before.
        goes_on: whether its last one goes on, on the next rank.
    """

    def __init__(self, context: ContextParallel, offsets: list[int] | None, continues: bool, goes_on: bool):
        self.context, self.offsets, self.continues, self.goes_on = context, offsets, continues, goes_on

    def cu_seqlens(self, device: torch.device) -> Tensor | None:
        """Offsets of the packed sequences in this rank's tokens."""
        return None if self.offsets is None else torch.tensor(self.offsets, device=device)

    @torch.compiler.disable(reason="ranks exchange messages")
    def tokens_before(self, x: Tensor, count: int) -> Tensor:
        """The ``count`` tokens before each sequence of ``x [B, T, channels]``, zeros before its first: what a convolution needs.

        Returns:
            ``[N, count, channels]``, differentiable.
        """
        if x.shape[1] < count and self.goes_on:
            raise ValueError(f"T: a convolution reads {count} tokens of the rank before, which has {x.shape[1]}")
        before = _TokensBefore.apply(self, count, x)
        if self.offsets is None:
            return before
        return torch.cat([before, before.new_zeros(len(self.offsets) - 2, *before.shape[1:])])

    @torch.compiler.disable(reason="ranks exchange messages")
    def read(self, memory: Callable[..., tuple[Tensor, MemoryState | None]], **arguments: Any) -> Tensor:
        """The output of a memory for this rank's tokens, differentiable.

        Args:
            memory: :func:`~miras_kernels.linear_memory` or :func:`~miras_kernels.mlp_memory`.
            arguments: its arguments, for this rank's tokens. ``initial_state`` holds the duals that sequences start from, None or as the
                function takes them; ``cu_seqlens`` and ``output_final_state`` are not among them.
        """
        tensors = {name: x for name, x in arguments.items() if isinstance(x, Tensor) and name != "initial_state"}
        options = {name: x for name, x in arguments.items() if name not in tensors and name != "initial_state"}
        start = arguments.get("initial_state")
        if isinstance(start, MemoryState):
            raise TypeError("initial_state: context parallelism starts sequences from duals; expected tensors or None, got a MemoryState")
        duals = () if start is None else (start,) if isinstance(start, Tensor) else tuple(start)
        if arguments["chunk_size"] > self.context.chunk_size or self.context.chunk_size % arguments["chunk_size"]:
            raise ValueError(
                f"chunk_size: expected a divisor of ContextParallel's, {self.context.chunk_size}, got {arguments['chunk_size']}"
            )
        return _Read.apply(_Plan(self, memory, tuple(tensors), len(duals), options), *tensors.values(), *duals)


class _Plan:
    """What :class:`_Read` does for each part of the heads."""

    def __init__(self, stretch: Stretch, memory: Callable, names: tuple[str, ...], duals: int, options: dict):
        self.stretch, self.memory, self.names, self.duals, self.options = stretch, memory, names, duals, options

    def parts(self, heads: int) -> list[slice]:
        count = min(self.stretch.context.parts, heads)
        edges = [heads * i // count for i in range(count + 1)]
        return [slice(a, b) for a, b in itertools.pairwise(edges)]

    def part(self, tensors: tuple[Tensor, ...], heads: slice) -> list[Tensor]:
        """The heads of the arguments: tokens [B, T, H, ...], LayerNorm's parameters [H, D], duals [..., H, R, K]."""
        found = []
        for i, x in enumerate(tensors):
            dim = x.dim() - 3 if i >= len(self.names) else 0 if self.names[i].startswith("ln_") else 2
            found.append(x[(slice(None),) * dim + (heads,)])
        return found

    def run(self, tensors: list[Tensor], passed: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """``(out, matrices)``; ``passed [n, size]``: the state of the sequences that continue, matrices that go on: theirs.

        Packed sequences are read apart from the last one, if that goes on: the kernels differentiate no state that lies inside a chunk.
        """
        tokens, duals = dict(zip(self.names, tensors, strict=False)), tuple(tensors[len(self.names) :])
        stretch, (batch, _, heads) = self.stretch, tokens["q"].shape[:3]
        if stretch.offsets is None:
            out, state = self.call(tokens, self.start(duals, passed, batch, heads, tokens), None, stretch.goes_on)
            return out, state.matrices() if state is not None else ()
        offsets = stretch.offsets
        sequences = len(offsets) - 1
        whole, outs = sequences - stretch.goes_on, []
        start = self.start(duals, passed, sequences, heads, tokens)
        cut = lambda a, b: {name: x if name.startswith("ln_") else x[:, a:b] for name, x in tokens.items()}
        rows = lambda a, b: None if start is None else start.map(lambda x: x[a:b])
        if whole:
            packed = torch.tensor(offsets[: whole + 1], device=tokens["q"].device)
            outs.append(self.call(cut(0, offsets[whole]), rows(0, whole), packed, False)[0])
        state = None
        if stretch.goes_on:
            out, state = self.call(cut(offsets[-2], offsets[-1]), rows(sequences - 1, sequences), None, True)
            outs.append(out)
        return torch.cat(outs, 1), state.matrices() if state is not None else ()

    def call(self, tokens: dict, start: MemoryState | None, cu_seqlens: Tensor | None, wants_state: bool):
        return self.memory(**tokens, **self.options, initial_state=start, cu_seqlens=cu_seqlens, output_final_state=wants_state)

    def start(self, duals: tuple[Tensor, ...], passed: Tensor | None, sequences: int, heads: int, tokens: dict) -> MemoryState | None:
        """The state of every sequence at its first token here."""
        if passed is None and not duals:
            return None
        shapes = self.shapes(duals, heads, tokens)
        wide = torch.float64 if tokens["q"].dtype == torch.float64 else torch.float32
        count = 0 if passed is None else len(passed)
        fresh = [x.to(wide).expand(sequences, *shape)[count:] for x, shape in zip(duals, shapes, strict=False)]
        if not fresh:
            fresh = [tokens["q"].new_zeros(sequences - count, *shape, dtype=wide) for shape in shapes]
        momentum = tuple(map(torch.zeros_like, fresh)) if "momentum" in tokens else ()
        matrices = [*fresh, *momentum]
        if passed is not None:
            sizes = [shape.numel() for shape in shapes] * (2 if momentum else 1)
            given = [x.unflatten(1, shape) for x, shape in zip(passed.split(sizes, 1), shapes * 2, strict=False)]
            matrices = [torch.cat([a, b]) for a, b in zip(given, matrices, strict=True)]
        return MemoryState(tuple(matrices[: len(shapes)]), tuple(matrices[len(shapes) :]) or None)

    def shapes(self, duals: tuple[Tensor, ...], heads: int, tokens: dict) -> list[torch.Size]:
        if duals:
            return [torch.Size((heads, *x.shape[-2:])) for x in duals]
        return [torch.Size((heads, tokens["v"].shape[-1], tokens["q"].shape[-1]))]

    def passing(self, tensors: list[Tensor]) -> Tensor:
        """An empty message for the state of the sequences that continue, ``[n, size]``."""
        tokens, duals = dict(zip(self.names, tensors, strict=False)), tuple(tensors[len(self.names) :])
        q = tokens["q"]
        size = sum(shape.numel() for shape in self.shapes(duals, q.shape[2], tokens)) * (1 + ("momentum" in tokens))
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        return q.new_empty(q.shape[0] if self.stretch.offsets is None else 1, size, dtype=wide)


def _message(matrices: tuple[Tensor, ...]) -> Tensor:
    """``[n, size]`` of matrices ``[n, H, R, K]``."""
    return torch.cat([x.flatten(1) for x in matrices], 1)


class _Read(torch.autograd.Function):
    """All parts of the heads, one after another; each has a graph of its own, so that its gradients can leave before the next one's."""

    @staticmethod
    def forward(ctx, plan: _Plan, *tensors: Tensor):
        stretch, context = plan.stretch, plan.stretch.context
        graph = any(ctx.needs_input_grad)
        ctx.plan, ctx.parts, outs, sent = plan, [], [], []
        for heads in plan.parts(tensors[0].shape[2]):
            leaves = [
                x.detach().requires_grad_(needs) for x, needs in zip(plan.part(tensors, heads), ctx.needs_input_grad[1:], strict=True)
            ]
            passed = None
            if stretch.continues:
                passed = context.receive(plan.passing(leaves), context.rank - 1).requires_grad_(graph)
            with torch.set_grad_enabled(graph):
                out, matrices = plan.run(leaves, passed)
                message = _message(matrices) if stretch.goes_on else None
            if message is not None:
                going = message.detach().contiguous()
                sent.append((context.send(going, context.rank + 1), going))
            outs.append(out.detach())
            if graph:
                ctx.parts.append((leaves, passed, out, message))
        for work, _ in sent:
            work.wait()
        return torch.cat(outs, 2)

    @staticmethod
    def backward(ctx, grad_out: Tensor):
        plan: _Plan = ctx.plan
        context = plan.stretch.context
        grads: list[list[Tensor | None]] = []
        sent, first = [], 0
        for leaves, passed, out, message in ctx.parts:
            outputs, given = [out], [grad_out[:, :, first : first + out.shape[2]]]
            first += out.shape[2]
            if message is not None:
                outputs.append(message)
                given.append(context.receive(torch.empty_like(message, memory_format=torch.contiguous_format), context.rank + 1))
            wanted = [x for x in (*leaves, passed) if x is not None and x.requires_grad]
            known = [i for i, x in enumerate(outputs) if x.requires_grad]
            found = iter(torch.autograd.grad([outputs[i] for i in known], wanted, [given[i] for i in known], allow_unused=True))
            grads.append([next(found) if x.requires_grad else None for x in leaves])
            if passed is not None:
                of_state = next(found)
                going = torch.zeros_like(passed) if of_state is None else of_state.contiguous()
                sent.append((context.send(going, context.rank - 1), going))
        for work, _ in sent:
            work.wait()
        ctx.parts = ()
        return None, *(_joined(plan, i, xs) for i, xs in enumerate(zip(*grads, strict=True)))


def _joined(plan: _Plan, i: int, grads: tuple[Tensor | None, ...]) -> Tensor | None:
    """The gradient of the i-th tensor from those of its parts."""
    if any(x is None for x in grads):
        return None
    dim = -3 if i >= len(plan.names) else 0 if plan.names[i].startswith("ln_") else 2
    return torch.cat(grads, dim)  # type: ignore[arg-type]


class _TokensBefore(torch.autograd.Function):
    """``(stretch, count, x [B, T, channels])`` to the last ``count`` tokens of the rank before, zeros if nothing continues."""

    @staticmethod
    def forward(ctx, stretch: Stretch, count: int, x: Tensor):
        context = stretch.context
        ctx.stretch, ctx.count, ctx.tokens = stretch, count, x.shape[1]
        going = x[:, x.shape[1] - count :].detach().contiguous() if stretch.goes_on else None
        work = context.send(going, context.rank + 1) if going is not None else None
        before = x.new_zeros(x.shape[0], count, x.shape[2])
        if stretch.continues:
            context.receive(before, context.rank - 1)
        if work is not None:
            work.wait()
        return before

    @staticmethod
    def backward(ctx, grad: Tensor):
        stretch, context, grad_x = ctx.stretch, ctx.stretch.context, None
        work = context.send(grad.contiguous(), context.rank - 1) if stretch.continues else None
        if stretch.goes_on:
            last = context.receive(torch.empty_like(grad, memory_format=torch.contiguous_format), context.rank + 1)
            grad_x = nn.functional.pad(last, (0, 0, ctx.tokens - ctx.count, 0))
        if work is not None:
            work.wait()
        return None, None, grad_x


def parallelize(model: nn.Module, context: ContextParallel | None) -> nn.Module:
    """Let every :class:`~miras_kernels.layers.MemoryBlock` of a model read this rank's stretch of the sequences; None undoes it.

    Nothing else is divided: parameters are whole on every rank, and their gradients must be added up over the group (FSDP2 and
    DistributedDataParallel divide the sum by the number of ranks). Layers that mix tokens in other ways do not see other ranks: models
    with attention layers are refused.

    Raises:
        ValueError: there is no memory, a chunk size does not fit, or there are attention layers too. Nothing has been changed then.
    """
    from .layers import MemoryBlock

    blocks = {name: module for name, module in model.named_modules() if isinstance(module, MemoryBlock)}
    if not blocks:
        raise ValueError(f"model: expected one with memories, got {type(model).__name__} without")
    if context is not None:
        for name, block in blocks.items():
            size, back = block.preset.chunk_size, block.conv_width - 1
            if context.chunk_size % size or context.chunk_size < back:
                raise ValueError(
                    f"context: {name or 'the block'} has chunks of {size} tokens and looks {back} tokens back; expected a chunk_size that "
                    f"is a multiple of the first and not below the second, got {context.chunk_size}"
                )
        for name, module in model.named_modules():
            beside = [x for x in module.children() if isinstance(x, MemoryBlock)]
            if "attention" in type(module).__name__.lower() and (not beside or beside[0].output_gate is not None):
                raise ValueError(f"model: {name} ({type(module).__name__}) would not see the tokens of other ranks; expected memories only")
    for block in blocks.values():
        block.context = context
    return model
