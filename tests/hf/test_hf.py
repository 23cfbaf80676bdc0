"""Memories in transformers models: replacing attention, masks, packed documents, errors."""

from __future__ import annotations

import copy
import inspect
import math

import pytest
import torch
import transformers
from hf_tiny import ARCHITECTURES, LENGTH, MLP, ROWS, VOCAB, assert_close, cache_of, gradients, ids, model, plain

import miras_kernels.hf as hf
from miras_kernels.hf import MemoryAttention, memory_config, replace_attention, report
from miras_kernels.layers import PRESETS, MemoryBlock, Preset
from miras_kernels.tables.biases import Bias

# ------------------------------------------------------------------------------------------------------- replacing


@pytest.mark.parametrize(
    ("architecture", "layers"), [*((name, [0, 2]) for name in ARCHITECTURES), ("Llama", None), ("Llama", "all"), ("Llama", range(1, 2))]
)
def test_the_chosen_layers_are_replaced_and_train(architecture, layers):
    before, net = plain(architecture), model(architecture, layers)
    assert type(net).__name__ == f"Miras{type(before).__name__}" and isinstance(net, type(before))
    chosen = set(range(3)) if layers in (None, "all") else set(layers)
    for i, layer in enumerate(net.model.layers):
        assert isinstance(layer.self_attn, MemoryAttention) == (i in chosen)
        if i in chosen:
            assert (layer.self_attn.memory.num_heads, layer.self_attn.memory.head_dim) == (4, 8)
    before, after = dict(before.named_parameters()), dict(net.named_parameters())
    new = [n for n in after if n not in before]
    assert new and all(".self_attn.memory." in n for n in new)
    assert all(torch.equal(after[n], before[n]) for n in after if n in before)
    for n, grad in gradients(net, input_ids=ids(), labels=ids()).items():
        assert torch.isfinite(grad).all() and grad.abs().max() > 0, n


@pytest.mark.parametrize(
    ("architecture", "preset"), [*((name, "yaad_linear") for name in ARCHITECTURES), ("Llama", "yaad"), ("Llama", "titans")]
)
def test_training_lowers_the_loss(architecture, preset):
    net = model(architecture, preset=preset).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = net(input_ids=ids(), labels=ids()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1


@pytest.mark.parametrize("name", MLP)
def test_mlp_memories_train_every_parameter(name):
    net = model("Qwen3", [0, 2], preset=name)
    memory = net.model.layers[0].self_attn.memory
    assert (memory.w1.shape, memory.w2.shape, memory.ln_weight.shape) == ((4, 8, 32), (4, 32, 8), (4, 8))
    for n, grad in gradients(net, input_ids=ids(), labels=ids()).items():
        assert torch.isfinite(grad).all() and grad.abs().max() > 0, n


def test_memory_block_and_replace_attention_have_the_same_defaults():
    defaults = {inspect.signature(f).parameters["preset"].default for f in (replace_attention, MemoryBlock)}
    assert defaults == {"yaad_linear"}
    assert PRESETS["yaad_linear"].memory == "linear"


@pytest.mark.parametrize("kind", ["Model", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"])
def test_all_task_heads(kind):
    net = model("Qwen2", kind=kind)
    out = net(input_ids=ids(), attention_mask=torch.ones_like(ids()))
    assert torch.isfinite(out[0]).all()
    assert sum(isinstance(m, MemoryAttention) for m in net.modules()) == 3


def test_two_calls_replace_different_layers():
    torch.manual_seed(0)
    net = replace_attention(model(layers=[0]), "deltanet", [2])
    assert [isinstance(layer.self_attn, MemoryAttention) for layer in net.model.layers] == [True, False, True]
    presets = [group.preset for group in hf.plan.read(net.config)]
    assert [(preset.chunk_size, preset.decay) for preset in presets] == [(4, "token"), (1, None)]
    assert net.model.config is net.config and isinstance(net, hf.MirasLlamaForCausalLM)
    assert torch.equal(net.eval().generate(ids(), max_new_tokens=4), net.generate(ids(), max_new_tokens=4, use_cache=False))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_init_from_attention(architecture):
    """The projections are the attention layer's own modules; keys and values are repeated for all heads; rotary positions apply."""
    net = plain(architecture)
    attention, names = net.model.layers[1].self_attn, dict(net.named_parameters()).keys()
    old = dict(attention.named_children())
    replace_attention(net, "l2", [1], init="from_attention", chunk_size=4)
    layer = net.model.layers[1].self_attn
    assert old and all(getattr(layer, n) is m for n, m in old.items())
    assert names < dict(net.named_parameters()).keys() and layer.memory.q_proj is None
    assert {n for n in dict(net.named_parameters()) if n not in names} == set(report(net).new)
    x, angles = torch.randn(2, 5, 24), torch.randn(1, 5, 4).repeat(1, 1, 2)
    projected = layer._project(x, (angles.cos(), angles.sin()))
    q, k, v = projected.qkv.unflatten(-1, (3, 4, 8)).unbind(2)
    norm = lambda name, t: getattr(layer, name)(t) if hasattr(layer, name) else t
    assert_close(q, norm("q_norm", layer.q_proj(x).view(2, 5, 4, 8)))
    for head in range(4):
        assert_close(k[:, :, head], norm("k_norm", layer.k_proj(x).view(2, 5, 2, 8))[:, :, head // 2])
        assert_close(v[:, :, head], layer.v_proj(x).view(2, 5, 2, 8)[:, :, head // 2])
    modeling = __import__(type(attention).__module__, fromlist=["apply_rotary_pos_emb"])
    turned = modeling.apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), angles.cos(), angles.sin())
    from miras_kernels.layers.functional import rotated

    for ours, theirs in zip((q, k), turned, strict=True):
        assert_close(rotated(ours, projected.cos, projected.sin), theirs.transpose(1, 2))
    for n, grad in gradients(net, input_ids=ids(), labels=ids()).items():
        assert torch.isfinite(grad).all() and grad.abs().max() > 0, n


def test_initialisation_depends_on_the_seed_and_the_model():
    a, b = model(), model()
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    weight = a.model.layers[0].self_attn.memory.q_proj.weight
    assert abs(weight.std().item() / 0.2 - 1) < 5 / math.sqrt(2 * weight.numel())


def test_options_reach_the_block():
    memory = model(layers=[1], preset="l2", num_heads=3, conv_width=2, gate_rank=5, backend="reference").model.layers[1].self_attn.memory
    assert isinstance(memory, MemoryBlock)
    assert (memory.num_heads, memory.head_dim, memory.conv_width, memory.backend) == (3, 8, 2, "reference")
    assert memory.gate_down.shape == (5, 24)
    assert memory.preset.chunk_size == 4


def test_other_models_of_the_class_are_unchanged():
    plain = model(layers=())
    before = plain(input_ids=ids()).logits
    twin = transformers.LlamaForCausalLM(plain.config)
    replace_attention(twin)
    assert torch.equal(plain(input_ids=ids()).logits, before)
    assert cache_of(plain(input_ids=ids(), use_cache=True)) is not None
    assert plain.config.use_cache is True
    copied = copy.deepcopy(twin)
    assert torch.equal(copied(input_ids=ids()).logits, twin(input_ids=ids()).logits)


# ------------------------------------------------------------------------------------------------- masks and documents


@pytest.mark.parametrize(("layers", "attention", "init"), [(None, None, "new"), ([1], "eager", "from_attention"), ([1], None, "new")])
@pytest.mark.parametrize(
    ("architecture", "rows"),
    [("Llama", "left"), ("Llama", "right"), *((name, rows) for name in ARCHITECTURES for rows in ("mixed", "holes"))],
)
def test_padding_is_exact(architecture, layers, attention, init, rows):
    wide = {"sliding_window": 64} if rows == "holes" else {}  # the remaining attention counts padding in its window
    net, mask = model(architecture, layers, attention=attention, init=init, **wide).eval(), torch.tensor(ROWS[rows])
    logits = net(input_ids=ids(), attention_mask=mask).logits
    other = net(input_ids=torch.where(mask == 1, ids(), ids(seed=2)), attention_mask=mask).logits
    for i in range(2):
        real = mask[i] == 1
        assert_close(logits[i, real], net(input_ids=ids()[i : i + 1, real]).logits[0])
        assert_close(other[i, real], logits[i, real])


@pytest.mark.parametrize("init", ["new", "from_attention"])
@pytest.mark.parametrize(("layers", "preset"), [(None, "yaad_linear"), ([1], "yaad_linear"), ([1], "yaad")])
def test_gradients_under_padding_are_those_of_the_real_tokens(layers, preset, init):
    net, mask = model("Qwen2", layers, preset=preset, init=init), torch.tensor(ROWS["mixed"])
    weight = torch.randn(2, LENGTH, VOCAB, generator=torch.Generator().manual_seed(3))
    (net(input_ids=ids(), attention_mask=mask).logits * weight)[mask == 1].sum().backward()
    padded = {n: p.grad.clone() for n, p in net.named_parameters()}
    net.zero_grad()
    for i in range(2):
        real = mask[i] == 1
        (net(input_ids=ids()[i : i + 1, real]).logits * weight[i, real]).sum().backward()
    for n, p in net.named_parameters():
        assert_close(padded[n], p.grad)


@pytest.mark.parametrize("form", ["bool", "additive"])
def test_four_dimensional_masks(form):
    net, mask = model(layers=[0, 1], attention="sdpa" if form == "bool" else "eager").eval(), torch.tensor(ROWS["left"])
    seen = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril() & (mask[:, None, None] == 1)
    given = seen if form == "bool" else torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    a = net(input_ids=ids(), attention_mask=given, position_ids=positions).logits
    b = net(input_ids=ids(), attention_mask=mask, position_ids=positions).logits
    assert_close(a[mask == 1], b[mask == 1])


@pytest.mark.parametrize(
    ("architecture", "preset"), [*((name, "yaad_linear") for name in ARCHITECTURES), ("Llama", "yaad"), ("Llama", "ttt_mlp")]
)
@pytest.mark.parametrize(("layers", "init"), [(None, "new"), ([1], "from_attention")])
def test_packed_documents_are_separate(architecture, preset, layers, init):
    net, lengths = model(architecture, layers, preset=preset, init=init).eval(), (5, 1, 7)
    packed = ids(1)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    alone = torch.cat([net(input_ids=part).logits for part in packed.split(lengths, 1)], 1)
    assert_close(net(input_ids=packed, position_ids=positions).logits, alone)
    offsets = torch.tensor([0, 5, 6, 13], dtype=torch.int32)
    assert_close(net(input_ids=packed, cu_seq_lens_q=offsets, cu_seq_lens_k=offsets).logits, alone)
    assert_close(net(input_ids=packed, attention_mask=torch.ones_like(packed), cu_seq_lens_q=offsets).logits, alone)
    twice = net(input_ids=packed.expand(2, -1), position_ids=positions).logits
    assert_close(twice, alone.expand(2, -1, -1))


def test_increasing_positions_are_one_document():
    net = model().eval()
    expected = net(input_ids=ids()).logits
    assert torch.equal(net(input_ids=ids(), position_ids=torch.arange(3, 3 + LENGTH)[None]).logits, expected)
    assert torch.equal(net(ids(), torch.ones_like(ids())).logits, expected)  # positional arguments
    assert_close(net(inputs_embeds=net.get_input_embeddings()(ids())).logits, expected)


def test_a_decoder_layer_called_alone_finds_the_padding_in_its_mask():
    net, mask = model().eval(), torch.tensor(ROWS["left"])
    attention, x = net.model.layers[0].self_attn, torch.randn(2, LENGTH, 24)
    seen = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril() & (mask[:, None, None] == 1)
    assert torch.equal(attention(x, attention_mask=seen)[0], attention(x, attention_mask=mask)[0])


# -------------------------------------------------------------------------------------------------------------- errors


def meta_model():
    with torch.device("meta"):
        return model(layers=())


class Strange(Bias):
    """A bias that a configuration cannot store."""


class Own(transformers.LlamaForCausalLM):
    """A user's own class, for which there is no class with memories."""


def other_pattern():
    return torch.ones(2, 1, LENGTH, LENGTH, dtype=torch.bool).tril().triu(-3)


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (lambda: replace_attention(torch.nn.Linear(2, 2)), TypeError, r"model: expected a transformers model \(not wrapped.*got Linear"),
        (
            lambda: replace_attention(transformers.BloomModel(transformers.BloomConfig(n_layer=1, hidden_size=8, n_head=1, vocab_size=9))),
            TypeError,
            r"model: expected one built on LlamaModel, .* GPTNeoXModel, got BloomModel\. .*needs residual, .*register_host",
        ),
        (lambda: replace_attention(meta_model()), ValueError, "model: layer 0 has no data"),
        (lambda: replace_attention(model(layers=()), "mneta"), ValueError, "preset: expected one of 'moneta', .* got 'mneta'"),
        (
            lambda: replace_attention(model(layers=()), layers="first"),
            TypeError,
            "layers: expected None, 'all' or layer indices, got 'first'",
        ),
        (lambda: replace_attention(model(layers=()), layers=1), TypeError, "layers: expected None, 'all' or layer indices, got 1"),
        (lambda: replace_attention(model(layers=()), layers=[]), ValueError, "layers: expected at least one layer index, got none"),
        (lambda: replace_attention(model(layers=()), layers=[3]), ValueError, "layers: expected indices from 0 to 2, got 3"),
        (lambda: replace_attention(model(layers=()), layers=[-1]), ValueError, "layers: expected indices from 0 to 2, got -1"),
        (lambda: replace_attention(model(layers=()), layers=["0"]), TypeError, "layers: expected integers, got '0'"),
        (lambda: replace_attention(model(layers=()), layers=[1, 1]), ValueError, r"layers: expected every index once, got \[1, 1\]"),
        (lambda: replace_attention(model(layers=[1])), ValueError, "layers: layer 1 has been replaced already"),
        (lambda: replace_attention(model(layers=()), num_heads=0), ValueError, "num_heads: expected an integer >= 1, got 0"),
        (lambda: replace_attention(plain(), init="copy"), ValueError, "init: expected one of 'new', 'from_attention', got 'copy'"),
        (
            lambda: replace_attention(plain(), init="from_attention", num_heads=2),
            ValueError,
            "num_heads: with init='from_attention' it is that of the attention layer; expected None, got 2",
        ),
        (
            lambda: replace_attention(plain(), Preset(Strange(), "one", None, 4, "")),
            ValueError,
            "preset: expected a bias of miras_kernels itself, .* got Strange",
        ),
        (
            lambda: replace_attention(plain("Gemma3", use_bidirectional_attention=True)),
            ValueError,
            "model: a memory reads causally; .* got one with bidirectional attention",
        ),
        (lambda: replace_attention(plain().model.layers[0]), TypeError, "model: expected a transformers model .*got LlamaDecoderLayer"),
        (lambda: replace_attention(torch.compile(plain())), TypeError, "not compiled.*got OptimizedModule"),
        (lambda: replace_attention(Own(plain().config)), TypeError, "with a head of transformers for text, got Own"),
        (lambda: memory_config(transformers.BloomConfig()), TypeError, "config: expected .* LlamaConfig, .*got BloomConfig"),
        (lambda: model(init="from_attention").model.layers[0].self_attn(torch.randn(1, 3, 24)), ValueError, "position_embeddings: .*None"),
        (
            lambda: model()(input_ids=ids(1), attention_mask=torch.tensor(ROWS["left"][:1]), cu_seq_lens_q=torch.tensor([0, 5, 13])),
            ValueError,
            "cu_seq_lens_q: packed documents have no padding",
        ),
        (lambda: model()(input_ids=ids(), is_causal=False), ValueError, "is_causal: a memory reads causally"),
        (lambda: model()(input_ids=ids(), encoder_hidden_states=ids()), ValueError, "encoder_hidden_states: .*expected None"),
        (lambda: replace_attention(model(layers=()), chunksize=2), TypeError, "unexpected keyword argument 'chunksize'"),
        (lambda: model()(input_ids=ids(), output_attentions=True), ValueError, "output_attentions: .*expected False, got True"),
        (lambda: model()(input_ids=ids(), attention_mask=torch.ones(2, 5)), ValueError, r"attention_mask: expected \[B, T\] with T = 13"),
        (lambda: model()(input_ids=ids(), attention_mask=other_pattern()), ValueError, "expected a 4-D mask that is causal plus padding"),
        (lambda: model()(input_ids=ids(), attention_mask=torch.ones(2, 5, 5)), ValueError, r"attention_mask: expected \[B, T\] \(or"),
        (lambda: model()(input_ids=ids(), attention_mask={"full": None}), TypeError, "attention_mask: expected a tensor .*got dict"),
    ],
)
def test_errors_name_argument_expectation_and_what_came(call, kind, text):
    with pytest.raises(kind, match=text):
        call()


def test_a_refused_call_does_not_change_the_model():
    net = model(layers=())
    before = net(input_ids=ids()).logits
    with pytest.raises(ValueError, match="layers"):
        replace_attention(net, layers=[0, 9])
    assert torch.equal(net(input_ids=ids()).logits, before)
    assert type(net) is transformers.LlamaForCausalLM and not hasattr(net.config, "miras")
