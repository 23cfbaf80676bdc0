"""Tensor parallelism: each rank of a group has some of the heads of every :class:`~miras_kernels.layers.MemoryBlock` (docs/parallel.md)::

    from torch.distributed.tensor.parallel import parallelize_module

    parallelize_module(model, mesh["tensor"], {"layers.*.self_attn.memory": HeadParallel()})

Heads are independent of each other, so that a rank reads the whole sequence with its own heads; only the block's input and output are
common to all: the outputs are summed in the forward, the gradients of the inputs in the backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle

from .layers import MemoryBlock

__all__ = ["HeadParallel"]


class HeadParallel(ParallelStyle):
    """Cut a :class:`~miras_kernels.layers.MemoryBlock` to this rank's heads, in place; a plan for torch's ``parallelize_module``.

    Every rank must start from the same parameters. Its block then has ``num_heads / ranks`` heads, ordinary parameters, and states of its
    own heads; ``gate_down`` and ``norm_weight`` (and ``output_gate``) are whole on every rank, and have the same gradients there.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        _check(module, device_mesh)
        assert isinstance(module, MemoryBlock)
        group, rank, size = device_mesh.get_group(), device_mesh.get_local_rank(), device_mesh.size()
        heads = module.num_heads // size
        own = slice(rank * heads, (rank + 1) * heads)

        def cut(name: str, dim: int, parts: int = 1) -> None:
            """Keep the own heads in dimension ``dim``, which holds ``parts`` groups of all heads."""
            parent, _, last = name.rpartition(".")
            owner = module.get_submodule(parent)
            parameter = getattr(owner, last, None)
            if parameter is not None:
                kept = parameter.detach().unflatten(dim, (parts, module.num_heads, -1)).narrow(dim + 1, own.start, heads)
                setattr(owner, last, nn.Parameter(kept.flatten(dim, dim + 2).clone(), parameter.requires_grad))

        for projection in ("q_proj", "k_proj", "v_proj", "g_proj"):
            if getattr(module, projection) is not None:
                cut(f"{projection}.weight", 0)
        cut("conv_weight", 0, parts=3)
        if module.gate_up is not None:
            gates = module._gate_sizes()
            for name in ("gate_up", "gate_bias"):
                parameter = getattr(module, name)
                kept = [x.unflatten(0, (module.num_heads, -1))[own].flatten(0, 1) for x in parameter.detach().split(gates)]
                setattr(module, name, nn.Parameter(torch.cat(kept), parameter.requires_grad))
        for name in ("decay_rate", "w1", "w2", "ln_weight", "ln_bias"):
            cut(name, 0)
        if module.o_proj is not None:
            cut("o_proj.weight", 1)
            module.o_proj.register_forward_hook(lambda _module, _given, out: _Sum.apply(out, group))
        module.num_heads = heads
        for parameter in (module.gate_down, module.norm_weight):
            if parameter is not None:
                parameter.register_hook(lambda grad: _summed(grad, group))
        module.register_forward_pre_hook(lambda _module, given: (_Copy.apply(given[0], group), *given[1:]))
        return module


def _check(module: nn.Module, mesh: DeviceMesh) -> None:
    if not isinstance(module, MemoryBlock):
        raise TypeError(f"module: expected a MemoryBlock (...self_attn.memory in a model of transformers), got {type(module).__name__}")
    if mesh.ndim != 1:
        raise ValueError(f"device_mesh: expected one dimension, got {mesh.ndim}")
    if module.num_heads % mesh.size():
        raise ValueError(f"num_heads: expected a multiple of the number of ranks, {mesh.size()}, got {module.num_heads}")
    if module.preset.decay == "fixed":
        raise ValueError("preset: decays that depend on the head's index (decay='fixed', RetNet) cannot be cut; expected another decay")
    if module.context is not None:
        raise ValueError("context: expected a block without context parallelism, got one with it")
    for name, parameter in module.named_parameters():
        if type(parameter) is not nn.Parameter:
            raise ValueError(f"{name}: expected an ordinary parameter (tensor parallelism comes first), got {type(parameter).__name__}")


def _summed(x: Tensor, group: Any) -> Tensor:
    total = x.contiguous().clone()
    distributed.all_reduce(total, group=group)
    return total


class _Copy(torch.autograd.Function):
    """The same on every rank; gradients are summed."""

    @staticmethod
    def forward(ctx, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return _summed(grad, ctx.group), None


class _Sum(torch.autograd.Function):
    """The sum of what the ranks have; gradients are the same on every rank."""

    @staticmethod
    def forward(ctx, x: Tensor, group: Any) -> Tensor:
        return _summed(x, group)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
