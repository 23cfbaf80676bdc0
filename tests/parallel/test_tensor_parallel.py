"""Tensor parallelism over heads: two processes with half of the heads each against one process."""

from __future__ import annotations

import os

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import LlamaConfig, LlamaForCausalLM

from miras_kernels.hf import replace_attention
from miras_kernels.layers import MemoryBlock
from miras_kernels.tensor_parallel import HeadParallel
from miras_kernels.testing.parity import relative_error

ROUNDING = 1e-12  # float64, sums in another order
PRESETS = ("yaad_linear", "yaad", "titans", "moneta", "gated_deltanet", "kda", "mamba2")


def trained(module, *inputs, rate=0.01):
    """Outputs, gradients of the inputs, and outputs after a step down the gradients of the parameters, which must therefore be right."""
    given = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
    out = module(*given)
    out = out[0] if isinstance(out, tuple) else out.logits
    out.square().mean().backward()
    with torch.no_grad():
        for p in module.parameters():
            if p.grad is not None:
                p -= rate * p.grad
        after = module(*inputs)
    return [out.detach(), *(x.grad for x in given if x.requires_grad), after[0] if isinstance(after, tuple) else after.logits]


def block(preset):
    torch.manual_seed(3)
    made = MemoryBlock(16, 4, 8, preset=preset, init_std=0.2, output_gate=True).double()
    nn.init.normal_(made.output_gate)
    return made


def llama():
    torch.manual_seed(4)
    config = LlamaConfig(vocab_size=17, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2)  # fmt: skip
    return replace_attention(LlamaForCausalLM(config).double(), "yaad", init="from_attention", chunk_size=4)


def run(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    x = torch.randn(2, 37, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    for preset in PRESETS:
        wanted, cut = trained(block(preset), x), parallelize_module(block(preset), mesh, HeadParallel())
        assert cut.num_heads == 2 and cut.conv_weight.shape[0] == 3 * 16
        for a, b in zip(trained(cut, x), wanted, strict=True):
            assert relative_error(a, b) <= ROUNDING, preset
    ids = torch.randint(17, (2, 13), generator=torch.Generator().manual_seed(6))
    wanted, cut = trained(llama(), ids), llama()
    plan = {f"{name}_proj": ColwiseParallel() for name in "qkv"} | {"o_proj": RowwiseParallel(), "memory": HeadParallel()}
    parallelize_module(cut.model, mesh, {f"layers.*.self_attn.{name}": style for name, style in plan.items()})
    for a, b in zip(trained(cut, ids), wanted, strict=True):
        assert relative_error(a, b) <= ROUNDING
    refused(mesh)
    open(os.path.join(folder, f"done{rank}"), "w").close()
    distributed.destroy_process_group()


def refused(mesh) -> None:
    for module, error, message in [
        (nn.Linear(2, 2), TypeError, "module: expected a MemoryBlock"),
        (MemoryBlock(12, 3), ValueError, "num_heads: expected a multiple of the number of ranks, 2, got 3"),
        (MemoryBlock(16, 2, preset="retnet"), ValueError, "preset: decays that depend on the head's index"),
    ]:
        with pytest.raises(error, match=message):
            HeadParallel()._apply(module, mesh)


@pytest.mark.slow
def test_two_ranks_with_half_of_the_heads(tmp_path):
    torch.multiprocessing.start_processes(run, args=(str(tmp_path),), nprocs=2, start_method="spawn")
    assert sorted(p.name for p in tmp_path.glob("done*")) == ["done0", "done1"]
