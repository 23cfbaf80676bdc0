"""What long training of large models uses: mixed dtypes, loss scaling, accumulation, adapters, everything at once."""

from __future__ import annotations

import copy
import warnings

import peft
import pytest
import torch
from hf_tiny import assert_close, gradients, ids, model

from miras_kernels.hf import load
from quick import slow

GATES = ("gate_down", "gate_up", "gate_bias", "decay_rate")


def steps(net, count=6, lr=3e-3, scaler=None, **autocast):
    """Losses of a few steps on one batch."""
    optimizer, losses = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=lr), []
    for _ in range(count):
        with torch.autocast("cpu", enabled=bool(autocast), **autocast):
            loss = net(input_ids=ids(), labels=ids()).loss
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("preset", ["yaad_linear", "titans"])
def test_weights_in_bfloat16_and_gates_in_float32(preset, tmp_path):
    """Gates are computed in float32 anyway; their parameters may be too."""
    net = model(preset=preset, layers=[0, 2], dtype=torch.bfloat16)
    wide = [p for name, p in net.named_parameters() if name.split(".")[-1] in GATES]
    for p in wide:
        p.data = p.data.float()
    before = net(input_ids=ids()).logits
    other = model(preset=preset, layers=[0, 2], dtype=torch.bfloat16)
    assert len(wide) >= 6 and torch.equal(before, other(input_ids=ids()).logits)  # the same numbers
    losses = steps(net)
    assert losses[-1] < losses[0] and {p.dtype for p in wide} == {torch.float32}
    net.save_pretrained(tmp_path)
    again = load(tmp_path, dtype="auto")
    assert {p.dtype for p in again.parameters()} <= {torch.bfloat16, torch.float32}
    assert torch.isfinite(again(input_ids=ids()).logits).all()


@pytest.mark.parametrize("preset", ["yaad_linear", slow("yaad")])
def test_float16_and_a_gradient_scaler(preset):
    net = model(preset=preset)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30, growth_interval=3)
    before = copy.deepcopy(net.state_dict())
    steps(net, 1, scaler=scaler, dtype=torch.float16)  # too large a scale: gradients overflow, the step is left out
    assert scaler.get_scale() < 2.0**30 and all(torch.equal(x, before[n]) for n, x in net.state_dict().items())
    losses = steps(net, 30, scaler=scaler, dtype=torch.float16)
    assert losses[-1] < losses[0] - 1 and all(torch.isfinite(p).all() for p in net.parameters())


@pytest.mark.parametrize("preset", ["yaad_linear", "moneta"])
def test_gradient_accumulation(preset):
    """Two halves of a batch give the gradients of the whole."""
    net = model("Qwen2", [0, 2], preset=preset, dtype=torch.float64)
    whole = gradients(net, input_ids=ids(4), labels=ids(4))
    net.zero_grad()
    for half in ids(4).split(2):
        (net(input_ids=half, labels=half).loss / 2).backward()
    for n, p in net.named_parameters():
        assert_close(p.grad, whole[n])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("init", [slow("new"), slow("from_attention")])
def test_compiled_packed_and_checkpointed_at_once(init):
    net, text, offsets = model("Llama", [0], init=init, num_hidden_layers=2).train(), ids(1), torch.tensor([0, 5, 6, 13])
    plain = gradients(net, input_ids=text, labels=text, cu_seq_lens_q=offsets)
    net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="aot_eager")
    for n, grad in gradients(compiled, input_ids=text, labels=text, cu_seq_lens_q=offsets).items():
        assert_close(grad, plain[n.removeprefix("_orig_mod.")])


def test_adapters_beside_a_memory_of_a_frozen_model():
    """LoRA on the attention layers that stay and on the projections that a memory took over, whose own parameters are trained in full."""
    net = model("Qwen2", [0, 2], init="from_attention", dtype=torch.bfloat16)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["memory"])
    adapted = peft.get_peft_model(net, config)
    losses = steps(adapted, 8, lr=1e-2)
    assert losses[-1] < losses[0]
    trained = {n for n, p in adapted.named_parameters() if p.requires_grad}
    assert all("lora_" in n or "memory" in n for n in trained) and any("memory" in n for n in trained)
    adapted.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = adapted.merge_and_unload().eval()
    assert torch.isfinite(merged(input_ids=ids()).logits).all()
