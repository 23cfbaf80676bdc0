"""MirasForCausalLM: the paper's model for training from scratch."""

from __future__ import annotations

import pytest
import torch
from hf_tiny import LENGTH, ROWS, VOCAB, assert_close, gradients, ids
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModelForTokenClassification

from miras_kernels.hf import MemoryAttention, MirasConfig, MirasForCausalLM, MirasModel, load, replace_attention
from miras_kernels.layers import PRESETS


def config(**options) -> MirasConfig:
    sizes = dict(vocab_size=VOCAB, hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=3, chunk_size=4,
                 initializer_range=0.2, bos_token_id=None, eos_token_id=None, pad_token_id=0)  # fmt: skip
    return MirasConfig(**{**sizes, **options})


def model(**options) -> MirasForCausalLM:
    torch.manual_seed(0)
    return MirasForCausalLM(config(**options))


@pytest.mark.parametrize("preset", ["yaad", "moneta", "memora", "titans", "yaad_linear"])
@pytest.mark.parametrize("attention_layers", [[], [1]])
def test_it_trains(preset, attention_layers):
    net = model(preset=preset, attention_layers=attention_layers)
    kinds = [isinstance(layer.self_attn, MemoryAttention) for layer in net.model.layers]
    assert kinds == [i not in attention_layers for i in range(3)]
    for name, grad in gradients(net, input_ids=ids(), labels=ids()).items():
        assert torch.isfinite(grad).all() and grad.abs().max() > 0, name


@pytest.mark.parametrize("preset", ["yaad", "yaad_linear"])
def test_training_lowers_the_loss(preset):
    net = model(preset=preset, attention_layers=[1])
    optimizer, losses = torch.optim.AdamW(net.parameters(), lr=1e-2), []
    for _ in range(8):
        loss = net(input_ids=ids(), labels=ids()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1


@pytest.mark.parametrize("attention_layers", [[], [0, 2]])
def test_it_generates(attention_layers):
    net = model(attention_layers=attention_layers, sliding_window=4).eval()
    text = net.generate(ids(), max_new_tokens=8, do_sample=False)
    assert torch.equal(net(input_ids=text).logits.argmax(-1)[:, LENGTH - 1 : -1], text[:, LENGTH:])
    mask = torch.tensor(ROWS["left"])
    padded = net.generate(ids(), attention_mask=mask, max_new_tokens=8, num_beams=2, do_sample=False)
    for row in range(2):
        alone = net.generate(ids()[row : row + 1, mask[row] == 1], max_new_tokens=8, num_beams=2, do_sample=False)
        assert torch.equal(padded[row, LENGTH:], alone[0, -8:])


def test_attention_is_limited_to_the_window():
    text, other = ids(1), ids(1)
    other[0, 0] = other[0, 0] % (VOCAB - 1) + 1
    for window, seen in ((4, False), (64, True)):
        net = model(attention_layers=[0, 1], sliding_window=window).eval()
        x, y = (net.model(input_ids=t).last_hidden_state[:, -1] for t in (text, other))
        assert not torch.equal(x, y)  # through the memory, which is not limited to a window
        attention = net.model.layers[0]
        assert attention.self_attn.config.sliding_window == window
        hidden = [net.model(input_ids=t, output_hidden_states=True).hidden_states[1][:, -1] for t in (text, other)]
        assert torch.equal(*hidden) != seen


def test_it_saves_and_loads(tmp_path):
    net = model(attention_layers=[1], tie_word_embeddings=True).eval()
    net.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is MirasConfig and again.miras == net.config.miras and again.attention_layers == [1]
    for loaded in (load(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path), MirasForCausalLM.from_pretrained(tmp_path)):
        assert type(loaded) is MirasForCausalLM
        assert torch.equal(loaded(input_ids=ids()).logits, net(input_ids=ids()).logits)
    assert type(AutoModel.from_pretrained(tmp_path)) is type(net.model) is MirasModel
    for auto in (AutoModelForSequenceClassification, AutoModelForTokenClassification):
        assert torch.isfinite(auto.from_config(net.config)(input_ids=ids()).logits).all()


def test_defaults():
    assert MirasConfig().preset == "yaad" and MirasConfig().num_key_value_heads == 12
    [memories] = MirasConfig().miras["memories"]
    assert memories["layers"] == list(range(12)) and memories["head_dim"] == 64
    assert memories["preset"]["memory"] == PRESETS["yaad"].memory
    assert model().model.layers[0].self_attn.memory.preset.chunk_size == 4
    assert MirasConfig(num_attention_heads=6, num_key_value_heads=2, head_dim=32).num_key_value_heads == 2


def test_the_attention_layers_of_a_hybrid_can_be_replaced_later():
    net = replace_attention(model(attention_layers=[1]).eval(), "deltanet", [1], init="from_attention")
    assert type(net) is MirasForCausalLM and all(isinstance(layer.self_attn, MemoryAttention) for layer in net.model.layers)
    text = net.generate(ids(), max_new_tokens=4, do_sample=False)
    assert torch.equal(text, net.generate(ids(), max_new_tokens=4, do_sample=False, use_cache=False))
    assert_close(net(input_ids=ids()).logits, net(input_ids=ids(), attention_mask=torch.ones_like(ids())).logits)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"attention_layers": [3]}, "attention_layers: expected indices from 0 to 2, got 3"),
        ({"attention_layers": [0, 1, 2]}, "attention_layers: expected at least one layer to be a memory"),
        ({"preset": "mneta"}, "preset: expected one of .* got 'mneta'"),
        ({"chunk_size": 0}, "chunk_size: expected an integer >= 1, got 0"),
    ],
)
def test_errors(options, text):
    with pytest.raises(ValueError, match=text):
        config(**options)
