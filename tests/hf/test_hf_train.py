"""Training models with memories with the usual tools."""

from __future__ import annotations

import os

import peft
import pytest
import torch
import transformers
from hf_tiny import CACHE, ROWS, assert_close, cache_of, gradients, ids, model
from torch import distributed, nn

from miras_kernels.hf import MemoryAttention, report
from quick import slow

# ------------------------------------------------------------------------------------------------------------ training


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("preset", ["yaad", "yaad_linear"])
def test_gradient_checkpointing_changes_nothing(preset, reentrant):
    net, mask = model("Qwen3", [0, 2], preset=preset).train(), torch.tensor(ROWS["mixed"])
    plain = gradients(net, input_ids=ids(), attention_mask=mask, labels=ids())
    net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        net.enable_input_require_grads()
    for n, grad in gradients(net, input_ids=ids(), attention_mask=mask, labels=ids()).items():
        assert torch.equal(grad, plain[n]), n


@pytest.mark.parametrize(("preset", "padded"), [("yaad_linear", True), slow("yaad", False)])
def test_torch_compile_of_a_training_step(preset, padded):
    net = model("Llama", [0, 2], preset=preset)
    inputs = {"input_ids": ids(), "labels": ids()} | ({"attention_mask": torch.tensor(ROWS["left"])} if padded else {})
    plain = gradients(net, **inputs)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    net.zero_grad()
    compiled(**inputs).loss.backward()
    for n, p in net.named_parameters():
        assert_close(p.grad, plain[n])


def test_torch_compile_of_packed_documents():
    """One graph with ``cu_seq_lens_q``; reading the bounds from ``position_ids`` breaks the graph, which ``fullgraph`` refuses."""
    net, text = model("Llama", [0], init="from_attention", num_hidden_layers=2), ids(1)
    positions = torch.cat([torch.arange(n) for n in (5, 1, 7)])[None]
    plain = gradients(net, input_ids=text, labels=text, position_ids=positions)
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    offsets = torch.tensor([0, 5, 6, 13])
    for n, grad in gradients(compiled, input_ids=text, labels=text, cu_seq_lens_q=offsets).items():
        assert_close(grad, plain[n.removeprefix("_orig_mod.")])
    other = torch.tensor([0, 2, 9, 13])  # the values are not constants of the graph
    told = {"input_ids": text, "labels": text, "cu_seq_lens_q": other}
    assert_close(compiled(**told).logits, net(**told).logits)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="position_ids: .* with fullgraph=True expected cu_seq_lens_q"):
        compiled(input_ids=text, position_ids=positions)
    broken = torch.compile(net.model, backend="eager")
    assert_close(broken(input_ids=text, position_ids=positions)[0], net.model(input_ids=text, position_ids=positions)[0])


@pytest.mark.parametrize("preset", ["yaad", "yaad_linear"])
def test_bfloat16_and_autocast(preset):
    half = model(dtype=torch.bfloat16, preset=preset)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    full = model(preset=preset)
    assert all(torch.equal(p, q.to(torch.bfloat16)) for p, q in zip(half.parameters(), full.parameters(), strict=True))
    assert half(input_ids=ids()).logits.dtype == torch.bfloat16
    for n, grad in gradients(half, input_ids=ids(), labels=ids()).items():
        assert torch.isfinite(grad).all() and grad.abs().max() > 0, n
    exact = full(input_ids=ids()).logits
    budget = 3 * (half(input_ids=ids()).logits - exact).norm()  # the error with everything in bfloat16, weights too
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = full(input_ids=ids()).logits.float()
        for n, grad in gradients(full, input_ids=ids(), labels=ids()).items():
            assert grad.dtype == torch.float32 and torch.isfinite(grad).all(), n
    assert 0 < (cast - exact).norm() <= budget < exact.norm()


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`")
@pytest.mark.parametrize("reentrant", [False, True])
def test_two_forwards_before_one_backward(reentrant):
    """Recomputed layers get the batch of their own forward: nothing about a batch is stored on the model."""
    net, losses = model("Llama", [0, 2]).train(), []
    batches = [{"attention_mask": torch.tensor(ROWS[rows]), "input_ids": ids(seed=i), "labels": ids(seed=i)} for i, rows in enumerate(ROWS)]
    sum(net(**batch).loss for batch in batches).backward()
    expected = {n: p.grad.clone() for n, p in net.named_parameters()}
    net.zero_grad()
    net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        net.enable_input_require_grads()
    for batch in batches:
        losses.append(net(**batch).loss)
    sum(losses).backward()
    for n, p in net.named_parameters():
        assert_close(p.grad, expected[n])


def test_training_through_a_cached_state():
    """Backpropagation through time over two pieces equals that over the whole."""
    net = model(layers=[0, 1]).train()
    weight = torch.randn(2, 13, 50, generator=torch.Generator().manual_seed(3))
    (net(input_ids=ids()).logits * weight).sum().backward()
    expected = {n: p.grad.clone() for n, p in net.named_parameters()}
    net.zero_grad()
    first = net(input_ids=ids()[:, :8], use_cache=True)
    second = net(input_ids=ids()[:, 8:], **{CACHE: cache_of(first)})
    (torch.cat([first.logits, second.logits], 1) * weight).sum().backward()
    for n, p in net.named_parameters():
        assert_close(p.grad, expected[n])


def test_linearising_a_pretrained_model():
    """The new parameters can be trained alone first; those of attention are the same modules under the same names."""
    net = model("Qwen3", [0, 2], init="from_attention")
    parts = report(net)
    assert {name.split("self_attn.")[1] for name in parts.copied} == {
        *(f"{p}_proj.weight" for p in "qkvo"), "q_norm.weight", "k_norm.weight"
    }  # fmt: skip
    assert (
        all(".self_attn.memory." in name for name in parts.new) and "copied: 12 tensors" in str(parts) and "new: 12 tensors" in str(parts)
    )
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name in parts.new)
    before = {n: p.clone() for n, p in net.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    net(input_ids=ids(), labels=ids()).loss.backward()
    optimizer.step()
    assert {n for n, p in net.named_parameters() if not torch.equal(p, before[n])} == set(parts.new)


# ---------------------------------------------------------------------------------------------------------- the Trainer


class Texts(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, i):
        mask = torch.ones(13, dtype=torch.int64)
        mask[: i % 4] = 0
        text = ids(1, seed=i)[0]
        return {"input_ids": text, "attention_mask": mask, "labels": text.masked_fill(mask == 0, -100)}


def trainer(net, folder, **options):
    arguments = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=4, learning_rate=1e-2, save_strategy="steps", save_steps=2, logging_steps=1, report_to=[],
        use_cpu=True, disable_tqdm=True, seed=1, **options,
    )  # fmt: skip
    return transformers.Trainer(net, arguments, train_dataset=Texts(), eval_dataset=Texts())


@pytest.mark.filterwarnings("ignore")
def test_trainer_trains_evaluates_saves_and_resumes(tmp_path):
    make = lambda: model("Qwen2", [0, 2], init="from_attention")
    whole = trainer(make(), tmp_path / "whole", max_steps=4)
    before = whole.evaluate()["eval_loss"]
    whole.train()
    assert whole.evaluate()["eval_loss"] < before
    assert whole.predict(Texts()).predictions.shape == (16, 13, 50)
    again = trainer(make(), tmp_path / "whole", max_steps=4)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for (n, p), q in zip(again.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(p, q), n
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "checkpoint-4")
    assert all(torch.equal(p, q) for p, q in zip(saved.parameters(), whole.model.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore")
def test_trainer_with_gradient_checkpointing_and_bfloat16(tmp_path):
    run = trainer(model(), tmp_path, max_steps=2, gradient_checkpointing=True, bf16=True)
    assert run.train().training_loss > 0


# ---------------------------------------------------------------------------------------------------------- adapters


@pytest.mark.parametrize("init", ["new", "from_attention"])
def test_adapters_on_the_projections(init, tmp_path):
    base = model("Qwen2", [0, 2], init=init).eval()
    expected = base(input_ids=ids()).logits
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False,
                             modules_to_save=["memory"] if init == "from_attention" else None)  # fmt: skip
    adapted = peft.get_peft_model(base, config)
    trained = {n for n, p in adapted.named_parameters() if p.requires_grad}
    assert sum("lora_A" in n for n in trained) == 6
    if init == "from_attention":
        assert any(n.endswith("self_attn.memory.modules_to_save.default.conv_weight") for n in trained)
    adapted.train()(input_ids=ids(), labels=ids()).loss.backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.abs().max() > 0 for p in adapted.parameters() if p.requires_grad)
    logits = adapted.eval()(input_ids=ids()).logits
    assert (logits - expected).norm() > 1e-3 * expected.norm()
    text = adapted.generate(input_ids=ids(), max_new_tokens=5, do_sample=False)
    assert torch.equal(text, adapted.generate(input_ids=ids(), max_new_tokens=5, do_sample=False, use_cache=False))
    with adapted.disable_adapter():
        assert_close(adapted(input_ids=ids()).logits, expected)
    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(model("Qwen2", [0, 2], init=init).eval(), tmp_path)
    assert_close(again(input_ids=ids()).logits, logits)
    assert_close(adapted.merge_and_unload()(input_ids=ids()).logits, logits)


def test_prefix_tuning_is_refused():
    adapted = peft.get_peft_model(
        model(), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, num_layers=3, num_attention_heads=2, token_dim=16)
    )
    with pytest.raises((ValueError, TypeError), match=f"{CACHE}: .*(prefix tuning|DynamicCache)"):
        adapted(input_ids=ids())


# ------------------------------------------------------------------------------------------------------- two processes


def distributed_steps(rank: int, folder: str) -> None:
    """One of two processes: a step on its half of the batch; the gradients must be those of the whole batch in one process."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    make = lambda init: model("Llama", [0, 2], init=init).train()
    batch = {"input_ids": ids(4), "labels": ids(4), "attention_mask": torch.tensor(ROWS["left"] + ROWS["holes"])}
    weight = torch.randn(4, 13, 50, generator=torch.Generator().manual_seed(3))
    half = {name: x[2 * rank : 2 * rank + 2] for name, x in batch.items()}
    del batch["labels"], half["labels"]
    for init in ("new", "from_attention"):
        single = make(init)
        (single(**batch).logits * weight).mean().backward()
        expected = {n: p.grad for n, p in single.named_parameters()}
        for options in ({}, {"find_unused_parameters": True}, {"static_graph": True}):
            ddp = nn.parallel.DistributedDataParallel(make(init), **options)
            (ddp(**half).logits * weight[2 * rank : 2 * rank + 2]).mean().backward()
            for n, p in ddp.module.named_parameters():
                assert_close(p.grad, expected[n])
        mesh = init_device_mesh("cpu", (2,))
        for checkpointed in (False, True):
            sharded = make(init)
            if checkpointed:
                sharded.gradient_checkpointing_enable()
            for layer in sharded.model.layers:
                if isinstance(layer.self_attn, MemoryAttention) and not checkpointed:
                    fully_shard(layer.self_attn.memory, mesh=mesh)
                fully_shard(layer, mesh=mesh)
            fully_shard(sharded, mesh=mesh)
            (sharded(**half).logits * weight[2 * rank : 2 * rank + 2]).mean().backward()
            for n, p in sharded.named_parameters():
                assert_close(p.grad.full_tensor(), expected[n])
        text = sharded.eval().generate(ids(), max_new_tokens=4, do_sample=False, synced_gpus=False)
        assert torch.equal(text, single.eval().generate(ids(), max_new_tokens=4, do_sample=False))
        whole = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True))
        if rank == 0:
            assert all(torch.equal(x, whole[n]) for n, x in single.state_dict().items())
    half_precision = model(dtype=torch.bfloat16).train()
    for layer in half_precision.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(half_precision, mesh=mesh)
    half_precision(input_ids=ids(), labels=ids()).loss.backward()
    open(os.path.join(folder, f"done{rank}"), "w").close()
    distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_two_processes(tmp_path):
    torch.multiprocessing.spawn(distributed_steps, (str(tmp_path),), nprocs=2)
    assert (tmp_path / "done0").exists() and (tmp_path / "done1").exists()
