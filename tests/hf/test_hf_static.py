"""Static caches: the same texts as with dynamic ones, buffers of fixed addresses, one compiled graph."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from hf_tiny import CACHE, LENGTH, ROWS, assert_close, cache_of, ids, model
from torch._dynamo.backends.debugging import aot_eager
from transformers import CompileConfig, DynamicCache, StaticCache

from miras_kernels.hf import replace_attention
from miras_kernels.hf.cache import StaticMemoryCacheLayer
from quick import slow

MASK = torch.tensor(ROWS["left"])
#: presets with every kind of state: linear and MLP, momentum, another mirror map, chunk_size 1, no dependence on chunk_size
PRESETS = ("yaad_linear", "deltanet", "mamba2", "titans", "moneta", "yaad")


def net(architecture="Llama", layers=None, **options):
    return model(architecture, layers, **options).eval()


def cache_for(of, length=40) -> StaticCache:
    return StaticCache(config=of.config, max_cache_len=length)


def addresses(cache: StaticCache) -> list[int]:
    layers = [getattr(layer, "memory", layer) for layer in cache.layers]
    return [x.data_ptr() for layer in layers if isinstance(layer, StaticMemoryCacheLayer) for x in layer.decoder.tensors()]


@pytest.mark.parametrize(
    ("architecture", "layers"),
    [("Llama", None), *((name, [1]) for name in ("Llama", "Mistral", "Gemma2", "Gemma3"))],  # every kind of mask
)
def test_generation_equals_that_with_a_dynamic_cache(architecture, layers):
    of = net(architecture, layers, init="from_attention")
    for mask in (None, MASK):
        for how in ({}, dict(num_beams=3, num_return_sequences=2), dict(prefill_chunk_size=5)):
            options = dict(attention_mask=mask, max_new_tokens=7, do_sample=False, **how)
            expected = of.generate(ids(), **options)
            for _ in range(1 if how else 2):  # some versions of transformers keep the cache for the next call
                assert torch.equal(of.generate(ids(), **options, cache_implementation="static"), expected)


@pytest.mark.parametrize(("preset", "layers"), [("yaad", None), *((preset, [0, 2]) for preset in PRESETS)])
def test_every_kind_of_memory(preset, layers):
    of = net("Qwen2", layers, preset=preset)
    options = dict(attention_mask=MASK, max_new_tokens=9, do_sample=False, output_logits=True, return_dict_in_generate=True)
    grown, static = of.generate(ids(), **options), of.generate(ids(), **options, cache_implementation="static")
    assert torch.equal(grown.sequences, static.sequences)
    assert_close(torch.stack(static.logits), torch.stack(grown.logits))
    assert isinstance(cache_of(static).layers[0], StaticMemoryCacheLayer)


@torch.no_grad()
@pytest.mark.parametrize("layers", [None, [1]])
def test_several_turns_with_padding_and_a_cache_that_is_reused(layers):
    """A prompt, a second turn that is shorter in one row, decoding steps, one of them padding; then all of it again in the same buffers."""
    of, text = net("Qwen3", layers), ids(2, LENGTH + 9)
    turns = torch.tensor([[1] * 5 + [1, 0, 1, 1], [1, 1, 0, 0, 0] + [1] * 4])
    mask, cuts = torch.cat([MASK, turns], 1), (0, LENGTH, LENGTH + 5, *range(LENGTH + 6, LENGTH + 10))
    cache, stay = cache_for(of), None
    for _ in range(2):
        logits = []
        for begin, end in itertools.pairwise(cuts):
            logits.append(of(input_ids=text[:, begin:end], attention_mask=mask[:, :end], **{CACHE: cache}).logits)
            stay = stay or addresses(cache)
            assert addresses(cache) == stay and cache.get_seq_length() == end
        for row in range(2):
            real = mask[row] == 1
            assert_close(torch.cat(logits, 1)[row, real], of(input_ids=text[row : row + 1, real]).logits[0])
        cache.reset()
        assert cache.get_seq_length() == 0


@torch.no_grad()
def test_operations_on_a_static_cache():
    of, turn = net("Llama", [0, 1], preset="titans"), ids(2, 1, seed=3)
    cache, other = cache_for(of), cache_for(of)
    of(input_ids=ids(), **{CACHE: cache})
    of(input_ids=ids().flip(0), **{CACHE: other})
    kept, stay, layer = copy.deepcopy(other), addresses(other), other.layers[0]
    assert (layer.batch_size, layer.max_batch_size, layer.get_max_length(), layer.get_mask_sizes(1)) == (2, 2, 40, (40, 0))
    assert layer.nbytes == sum(x.nbytes for x in layer.decoder.tensors())
    other.reorder_cache(torch.tensor([1, 0]))
    expected = of(input_ids=turn, **{CACHE: cache}).logits
    assert torch.equal(of(input_ids=turn, **{CACHE: other}).logits, expected)
    assert torch.equal(of(input_ids=turn.flip(0), **{CACHE: kept}).logits.flip(0), expected)
    assert addresses(other) == stay and not set(addresses(kept)) & set(stay)
    with pytest.raises(NotImplementedError, match="a static cache has buffers for a fixed number of sequences"):
        layer.batch_repeat_interleave(2)


@torch.no_grad()
def test_the_buffers_are_in_float32():
    of = net("Llama", [0], dtype=torch.bfloat16)
    text = of.generate(ids(), max_new_tokens=5, do_sample=False, cache_implementation="static", return_dict_in_generate=True)
    buffers = cache_of(text).layers[0].decoder.memory.buffers.tensors()
    assert {x.dtype for x in buffers if x.is_floating_point()} == {torch.float32} and text.sequences.shape == (2, LENGTH + 5)
    embedded = net("Llama", [0]).generate(inputs_embeds=torch.randn(2, 5, 24), max_new_tokens=5, cache_implementation="static")
    assert embedded.shape == (2, 5)


def test_a_static_cache_has_no_gradients():
    of = net()
    with pytest.raises(ValueError, match=rf"{CACHE}: a StaticCache .* expected torch.no_grad\(\) or a DynamicCache"):
        of(input_ids=ids(), **{CACHE: cache_for(of)})


def test_packed_documents_are_refused_in_generate_too():
    with pytest.raises(ValueError, match="use_cache: packed documents leave no state"):
        net().generate(ids(), position_ids=torch.arange(LENGTH)[None] % 5, max_new_tokens=2, cache_implementation="static")


def test_the_capacity_is_not_that_of_a_sliding_window():
    """Where a memory replaces sliding-window attention and full attention follows, its cache layer must have the capacity of the latter."""
    of = net("Gemma3", [0], layer_types=["sliding_attention", "sliding_attention", "full_attention"])
    options = dict(attention_mask=MASK, max_new_tokens=9, do_sample=False, return_dict_in_generate=True)
    static = of.generate(ids(), **options, cache_implementation="static")
    assert torch.equal(static.sequences, of.generate(ids(), **options).sequences)
    assert cache_of(static).layers[0].max_cache_len == cache_of(static).layers[2].max_cache_len > 6


def counting():
    """A backend of torch.compile that counts its graphs; a function, since configurations do not copy functions."""

    def backend(graph, inputs):
        backend.count += 1
        return aot_eager(graph, inputs)

    torch._dynamo.reset()
    backend.count = 0
    return backend


def mixed():
    """Three layers: a memory beside attention, attention, and a memory in place of attention."""
    return replace_attention(net("Llama", [0], mode="parallel"), "titans", [2], chunk_size=4).eval()


@torch.no_grad()
@pytest.mark.parametrize(
    ("make", "kind", "graphs"), [(mixed, "static", 1), slow(lambda: net("Llama", [0], num_hidden_layers=2), "dynamic", 2)]
)
def test_a_compiled_step_is_not_recompiled(make, kind, graphs):
    """With a dynamic cache the second step is compiled for all lengths, as without memories."""
    of, text, backend = make(), ids(2, LENGTH + 20), counting()
    cache, compiled = cache_for(of) if kind == "static" else DynamicCache(), torch.compile(of, backend=backend, fullgraph=True)
    logits = [of(input_ids=text[:, :LENGTH], **{CACHE: cache}).logits]
    stay = addresses(cache)
    for t in range(LENGTH, LENGTH + 20):
        logits.append(compiled(input_ids=text[:, t : t + 1], position_ids=torch.tensor([[t]]), **{CACHE: cache}).logits)
    assert backend.count == graphs and addresses(cache) == stay and bool(stay) == (kind == "static")
    assert_close(torch.cat(logits, 1), of(input_ids=text).logits)


def test_generate_compiles_one_graph():
    of, backend = net("Llama", [0, 2]), counting()
    configuration = CompileConfig(backend=backend, fullgraph=True, mode=None)
    configuration._compile_all_devices = True  # on a CPU as on a GPU
    options = dict(max_new_tokens=20, do_sample=False)
    for mask in (MASK, None):
        static = of.generate(ids(), attention_mask=mask, **options, cache_implementation="static", compile_config=configuration)
        assert torch.equal(static, of.generate(ids(), attention_mask=mask, **options))
    assert backend.count == 1
