"""Context parallelism on 2 and 4 processes against one process."""

from __future__ import annotations

import os

import pytest
import torch
from torch import distributed

import miras_kernels as mk
from miras_kernels.layers import MemoryBlock
from miras_kernels.parallel import ContextParallel, parallelize
from miras_kernels.testing.parity import relative_error

#: float64 on every rank; the sums over heads and tokens have another order only in the gradients of parameters
ROUNDING = 1e-12
PRESETS = ("yaad_linear", "yaad", "titans", "moneta", "gated_deltanet", "kda", "linear_attention")
CHUNK, HEADS, SIZE = 4, 3, 12


def blocks():
    for seed, preset in enumerate(PRESETS):
        torch.manual_seed(seed)
        yield preset, MemoryBlock(SIZE, HEADS, preset=preset, chunk_size=1 if preset in ("gated_deltanet", "kda") else CHUNK).double()


def batch(cu_seqlens):
    rows = 2 if cu_seqlens is None else 1
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, rows, 37, SIZE, generator=generator, dtype=torch.float64).unbind(0)


#: one sequence per row; packed ones that begin and end inside stretches, at their bounds, and span several
OFFSETS = (None, (0, 37), (0, 3, 4, 26, 37), (0, 8, 16, 24, 37), (0, 5, 5, 37))


def gradients(block, x, grad, cu_seqlens):
    x = x.clone().requires_grad_()
    out, _ = block(x, cu_seqlens=cu_seqlens)
    out.backward(grad)
    return out.detach(), x.grad, {name: p.grad for name, p in block.named_parameters()}


def run(rank: int, size: int, folder: str) -> None:
    """One process of the group."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    context = ContextParallel(chunk_size=CHUNK, parts=2)
    for preset, block in blocks():
        for offsets in OFFSETS:
            cu_seqlens = None if offsets is None else torch.tensor(offsets)
            x, grad = batch(cu_seqlens)
            wanted = gradients(block, x, grad, cu_seqlens)
            block.zero_grad()
            parallelize(block, context)
            bounds = context.bounds(x.shape[1], cu_seqlens)
            mine = slice(bounds[rank], bounds[rank + 1])
            assert torch.equal(context.shard(x, 1, cu_seqlens), x[:, mine])
            out, grad_x, of_parameters = gradients(block, x[:, mine], grad[:, mine], cu_seqlens)
            where = f"{preset}, {offsets}, rank {rank} of {size}"
            assert relative_error(out, wanted[0][:, mine]) <= ROUNDING, where
            assert relative_error(grad_x, wanted[1][:, mine]) <= ROUNDING, where
            for name, g in of_parameters.items():
                distributed.all_reduce(g)
                assert relative_error(g, wanted[2][name]) <= ROUNDING, f"{where}: {name}"
            block.zero_grad()
            with torch.no_grad():
                assert torch.equal(block(x[:, mine], cu_seqlens=cu_seqlens)[0], out)
            parallelize(block, None)
    open(os.path.join(folder, f"done{rank}"), "w").close()
    distributed.destroy_process_group()


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_compute_what_one_process_does(tmp_path, size):
    torch.multiprocessing.spawn(run, (size, str(tmp_path)), nprocs=size)
    assert all((tmp_path / f"done{rank}").exists() for rank in range(size))
