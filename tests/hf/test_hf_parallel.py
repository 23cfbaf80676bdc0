"""Memories beside attention (``mode="parallel"``): no change before training; a layer of the cache has keys, values and state."""

from __future__ import annotations

import copy
import itertools
import pickle

import peft
import pytest
import torch
import transformers
from hf_tiny import ARCHITECTURES, CACHE, LENGTH, ROWS, assert_close, cache_of, gradients, ids, model, plain
from transformers import DynamicCache

import miras_kernels.hf as hf
from miras_kernels.hf import load, memory_config, replace_attention, report
from miras_kernels.hf.attention import ParallelAttention
from miras_kernels.hf.cache import MemoryCacheLayer, ParallelCacheLayer, StaticMemoryCacheLayer
from miras_kernels.layers import MemoryBlock

MASK = torch.tensor(ROWS["left"])


def net(architecture="Llama", layers=(0, 2), **options):
    """A model whose output gates are not zero."""
    of = model(architecture, layers, mode="parallel", **options)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for module in of.modules():
            if isinstance(module, MemoryBlock):
                module.output_gate.copy_(torch.randn(module.output_gate.shape, generator=generator))
    return of.eval()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_outputs_do_not_change_before_training(architecture):
    before, of = plain(architecture).eval(), model(architecture, [0, 2], mode="parallel").eval()
    assert type(of).__name__ == f"Miras{type(before).__name__}"
    positions = (MASK.cumsum(1) - 1).clamp(min=0)  # a model with memories derives these itself
    for given in ({}, dict(attention_mask=MASK, position_ids=positions)):
        assert torch.equal(of(input_ids=ids(), **given).logits, before(input_ids=ids(), **given).logits)
    assert not torch.equal(net(architecture)(input_ids=ids()).logits, before(input_ids=ids()).logits)
    old, parts = dict(before.named_parameters()), report(of)
    assert old.keys() | set(parts.new) == dict(of.named_parameters()).keys() and not parts.copied
    grads = gradients(of, input_ids=ids(), labels=ids())
    assert grads["model.layers.0.self_attn.memory.output_gate"].abs().max() > 0  # training changes it
    for n, grad in gradients(net(architecture), input_ids=ids(), labels=ids()).items():
        assert torch.isfinite(grad).all() and grad.abs().max() > 0, n


@pytest.mark.parametrize(("architecture", "layers"), [("Llama", None), ("Mistral", [1]), ("Qwen2", None), ("Gemma3", [1])])
def test_generation(architecture, layers):
    of = net(architecture, layers)
    for mask in (None, MASK):
        for how in ({}, dict(num_beams=3, num_return_sequences=2), dict(prefill_chunk_size=5)):
            options = dict(attention_mask=mask, max_new_tokens=6, do_sample=False)
            text = of.generate(ids(), **options, **how)
            assert torch.equal(of.generate(ids(), **options, **how, cache_implementation="static"), text)
            if "prefill_chunk_size" not in how:  # has no meaning without a cache
                assert torch.equal(of.generate(ids(), **options, **how, use_cache=False), text)


@torch.no_grad()
@pytest.mark.parametrize("rows", ROWS)
def test_several_turns_with_padding(rows):
    of, text, cache, logits = net("Qwen2"), ids(2, LENGTH + 6), DynamicCache(), []
    mask = torch.cat([torch.tensor(ROWS[rows]), torch.tensor([[0] * 4, [1, 0, 1, 0]]), torch.ones(2, 2, dtype=torch.int64)], 1)
    for begin, end in itertools.pairwise([0, 3, LENGTH, LENGTH + 4, LENGTH + 5, LENGTH + 6]):
        logits.append(of(input_ids=text[:, begin:end], attention_mask=mask[:, :end], **{CACHE: cache}).logits)
    for row in range(2):
        real = mask[row] == 1
        assert_close(torch.cat(logits, 1)[row, real], of(input_ids=text[row : row + 1, real]).logits[0])


def test_packed_documents_are_separate():
    of, lengths = net(), (5, 1, 7)
    alone = torch.cat([of(input_ids=part).logits for part in ids(1).split(lengths, 1)], 1)
    offsets = torch.tensor([0, 5, 6, 13], dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    assert_close(of(input_ids=ids(1), position_ids=positions).logits, alone)
    assert_close(of(input_ids=ids(1), cu_seq_lens_q=offsets, cu_seq_lens_k=offsets).logits, alone)


@torch.no_grad()
def test_operations_on_the_cache():
    of, turn = net(layers=[0, 1]), ids(2, 4, seed=3)
    read = lambda text: cache_of(of(input_ids=text, use_cache=True))
    after = lambda cache, text: of(input_ids=text, **{CACHE: cache}).logits
    cache = read(ids())
    assert [type(layer) is ParallelCacheLayer for layer in cache.layers] == [True, True, False]
    assert type(cache.layers[0].memory) is MemoryCacheLayer and cache.layers[0].keys.shape[2] == cache.get_seq_length() == LENGTH
    other = copy.deepcopy(cache)
    expected = after(cache, turn)
    other.reorder_cache(torch.tensor([1, 0]))
    other.batch_repeat_interleave(2)
    assert_close(after(other, turn.flip(0).repeat_interleave(2, 0)), expected.flip(0).repeat_interleave(2, 0))
    other.batch_select_indices(torch.tensor([3, 0]))
    assert_close(after(other, turn)[:, -1], after(read(torch.cat([ids(), turn], 1)), turn)[:, -1])
    with pytest.raises(ValueError, match="crop: a memory takes back tokens only if it has kept them"):
        other.crop(-1)
    with pytest.raises(ValueError, match="layer 0 of the model is a memory; .* got keys and values for 13 tokens"):
        of(input_ids=turn, **{CACHE: cache_of(plain().eval()(input_ids=ids(), use_cache=True))})
    static = cache_of(of.generate(ids(), max_new_tokens=2, cache_implementation="static", return_dict_in_generate=True))
    assert type(static.layers[0].memory) is StaticMemoryCacheLayer and static.is_compileable


@pytest.mark.parametrize("architecture", ["Llama", "Gemma3"])
def test_it_is_saved_and_loaded(architecture, tmp_path):
    of = replace_attention(net(architecture, [0]), "l2", [2], chunk_size=4)  # both modes in one model
    of.save_pretrained(tmp_path)
    for loaded in (load(tmp_path), transformers.AutoModelForCausalLM.from_pretrained(tmp_path), pickle.loads(pickle.dumps(of))):
        assert type(loaded) is type(of) and isinstance(loaded.model.layers[0].self_attn, ParallelAttention)
        assert torch.equal(loaded.eval()(input_ids=ids()).logits, of(input_ids=ids()).logits)
    base = plain(architecture)
    base.save_pretrained(tmp_path / "base")
    config = memory_config(base.config, layers=[0, 2], mode="parallel")
    made, info = getattr(hf, type(of).__name__).from_pretrained(tmp_path / "base", config=config, output_loading_info=True)
    assert set(info["missing_keys"]) == set(report(made).new) and not info["unexpected_keys"]
    assert torch.equal(made(input_ids=ids()).logits, base.eval()(input_ids=ids()).logits)


def test_adapters_of_attention_work(tmp_path):
    of = net("Qwen2")
    expected = of(input_ids=ids()).logits
    config = peft.LoraConfig(r=2, target_modules=r".*self_attn\.[qv]_proj", modules_to_save=["memory"], init_lora_weights=False)
    adapted = peft.get_peft_model(of, config).eval()
    logits = adapted(input_ids=ids()).logits
    assert (logits - expected).norm() > 1e-3 * expected.norm()
    text = adapted.generate(input_ids=ids(), max_new_tokens=5, do_sample=False)
    assert torch.equal(text, adapted.generate(input_ids=ids(), max_new_tokens=5, do_sample=False, use_cache=False))
    adapted.train()(input_ids=ids(), labels=ids()).loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in adapted.parameters() if p.requires_grad)
    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(net("Qwen2"), tmp_path).eval()
    assert_close(again(input_ids=ids()).logits, logits)


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (lambda: model(mode="both"), ValueError, "mode: expected one of 'replace', 'parallel', got 'both'"),
        (lambda: model(mode="parallel", init="from_attention"), ValueError, "init: with mode='parallel' attention keeps its projections"),
        (lambda: replace_attention(net()), ValueError, "layers: layer 0 has been replaced already"),
        (lambda: net()(input_ids=ids(), output_attentions=True), ValueError, "output_attentions: .*expected False, got True"),
    ],
)
def test_errors(call, kind, text):
    with pytest.raises(kind, match=text):
        call()


def test_attention_of_another_class_is_refused():
    of = plain()
    of.model.layers[1].self_attn.__class__ = type("Own", (type(of.model.layers[1].self_attn),), {})
    with pytest.raises(TypeError, match="mode: 'parallel' needs the attention class of the original model, got Own"):
        replace_attention(of, mode="parallel")
    assert not isinstance(of.model.layers[0].self_attn, ParallelAttention)
