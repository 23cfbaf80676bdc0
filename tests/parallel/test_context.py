"""Context parallelism on 2 and 4 processes against one process."""

from __future__ import annotations

import itertools
import os

import pytest
import torch
import transformers
from torch import distributed

from miras_kernels.hf import replace_attention
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
    language_model(context)
    open(os.path.join(folder, f"done{rank}"), "w").close()
    distributed.destroy_process_group()


def language_model(context: ContextParallel) -> None:
    """A Llama whose memories use its attention layers' projections and rotary position embedding; packed documents too."""
    config = transformers.LlamaConfig(vocab_size=17, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    torch.manual_seed(5)
    model = replace_attention(transformers.LlamaForCausalLM(config).double(), "yaad_linear", chunk_size=CHUNK, init="from_attention")
    ids = torch.randint(0, 17, (1, 37), generator=torch.Generator().manual_seed(6))
    for offsets in OFFSETS[::2]:
        lengths = [37] if offsets is None else torch.tensor(offsets).diff().tolist()
        inputs = {"input_ids": ids, "position_ids": torch.cat([torch.arange(n) for n in lengths])[None]}
        packed = {} if offsets is None else {"cu_seq_lens_q": torch.tensor(offsets)}
        labels = ids.roll(-1, 1)
        wanted = losses(model, inputs, packed, labels)
        model.zero_grad()
        parallelize(model, context)
        mine = {name: context.shard(x, 1, packed.get("cu_seq_lens_q")) for name, x in inputs.items()}
        loss, grads = losses(model, mine, packed, context.shard(labels, 1, packed.get("cu_seq_lens_q")))
        distributed.all_reduce(loss)
        assert relative_error(loss, wanted[0]) <= ROUNDING
        for name, grad in grads.items():
            distributed.all_reduce(grad)
            assert relative_error(grad, wanted[1][name]) <= ROUNDING, name
        with pytest.raises(ValueError, match="position_ids: with context parallelism expected"):
            model(mine["input_ids"])
        model.zero_grad()
        parallelize(model, None)


def losses(model, inputs, packed, labels):
    logits = model(**inputs, **packed).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_compute_what_one_process_does(tmp_path, size):
    torch.multiprocessing.spawn(run, (size, str(tmp_path)), nprocs=size)
    assert all((tmp_path / f"done{rank}").exists() for rank in range(size))


@pytest.fixture
def alone(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield ContextParallel(chunk_size=CHUNK)
    distributed.destroy_process_group()


def test_bounds(alone):
    alone.size = 3
    assert alone.bounds(37) == [0, 12, 24, 37]
    for offsets in ((0, 3, 4, 26, 37), (0, 1, 2, 3, 37), (0, 34, 36, 37)):
        bounds = alone.bounds(37, torch.tensor(offsets))
        starts = {at for a, b in itertools.pairwise(offsets) for at in range(a, b, CHUNK)}
        assert len(set(bounds)) == 4 and set(bounds[:3]) <= starts and bounds[0] == 0 and bounds[3] == 37
    assert alone.bounds(9) == [0, 4, 8, 9]


def test_bad_input(alone):
    with pytest.raises(ValueError, match="tokens: 1 ranks need as many chunks of 4 tokens at least, got 0"):
        alone.bounds(0)
    with pytest.raises(ValueError, match="cu_seqlens: expected offsets from 0 to T = 9, got 8 at the end"):
        alone.bounds(9, torch.tensor([0, 8]))
    with pytest.raises(TypeError, match="group: expected a ProcessGroup, a DeviceMesh or None, got str"):
        ContextParallel("gloo")
    with pytest.raises(ValueError, match="parts: expected an integer >= 1, got 0"):
        ContextParallel(parts=0)
    with pytest.raises(ValueError, match="model: expected one with memories, got Linear without"):
        parallelize(torch.nn.Linear(2, 2), alone)
    block = MemoryBlock(SIZE, HEADS, chunk_size=3)
    with pytest.raises(ValueError, match="context: the block has chunks of 3 tokens and looks 3 tokens back; .* got 4"):
        parallelize(block, alone)
    assert block.context is None
    config = transformers.LlamaConfig(vocab_size=17, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    for mode, layers in (("replace", [1]), ("parallel", None)):
        model = replace_attention(transformers.LlamaForCausalLM(config), "yaad_linear", layers, mode=mode, chunk_size=CHUNK)
        with pytest.raises(ValueError, match=r"model: model.layers.0.self_attn \(.*\) would not see the tokens of other ranks"):
            parallelize(model, alone)
    block = parallelize(MemoryBlock(SIZE, HEADS, chunk_size=CHUNK), alone)
    with pytest.raises(ValueError, match="context parallelism trains on whole sequences: expected no attention_mask"):
        block(torch.zeros(1, 8, SIZE), torch.ones(1, 8))
    alone.size = 2
    with pytest.raises(ValueError, match="T: expected a multiple of chunk_size = 4 on every rank but the last, got 7"):
        block(torch.zeros(1, 7, SIZE))
    with pytest.raises(ValueError, match=r"T: rank 0 reads tokens 0 to 8 of these sequences \(ContextParallel.shard\), got 7"):
        block(torch.zeros(1, 7, SIZE), cu_seqlens=torch.tensor([0, 4, 16]))
