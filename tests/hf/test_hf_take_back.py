"""Generation that guesses tokens and takes the wrong ones back: the texts are those of greedy search."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from hf_tiny import CACHE, LENGTH, assert_close, cache_of, ids, model, plain
from transformers import DynamicCache, StaticCache

from miras_kernels.hf import replace_attention
from miras_kernels.versions import minor
from quick import slow

PRESETS, MORE = ("yaad_linear", "deltanet", "kda", "titans", "yaad"), ("gated_deltanet", "mamba2", "moneta")
#: a text that repeats itself, so that some guesses are right
TEXT = ids(1, 6).repeat(1, 4)
MASK = torch.ones_like(TEXT)
MASK[0, :3] = 0
#: before 5.5 prompt lookup needs an end-of-text token; 49 is not generated
OPTIONS = dict(max_new_tokens=16, do_sample=False, eos_token_id=49)
OLD = minor(transformers.__version__) < (5, 5)
LAYERS = {"all": dict(layers=None), "some": dict(layers=[1]), "beside": dict(layers=[0, 2], mode="parallel")}


def net(preset="yaad_linear", seed=0, opened=True, **options):
    of = model(preset=preset, seed=seed, chunk_size=1 if preset in ("gated_deltanet", "kda") else 4, **options).eval()
    for name, p in of.named_parameters():
        if name.endswith("output_gate") and opened:
            torch.nn.init.normal_(p)
    return of


@pytest.mark.parametrize(
    ("preset", "layers", "guesses"),
    [
        *((preset, "all", 4) for preset in PRESETS),
        *(slow(preset, "all", 4) for preset in MORE),
        ("yaad_linear", "all", 2),
        ("yaad_linear", "some", 9),
        ("yaad", "beside", 4),
    ],
)
def test_prompt_lookup(preset, layers, guesses):
    of = net(preset, **LAYERS[layers])
    for mask in (None, MASK):
        expected = of.generate(TEXT, attention_mask=mask, **OPTIONS)
        text = of.generate(TEXT, attention_mask=mask, **OPTIONS, prompt_lookup_num_tokens=guesses)
        if OLD:  # it may write more tokens than were asked for, without memories too
            text = text[:, : expected.shape[1]]
        assert torch.equal(text, expected)


@pytest.mark.parametrize(("target", "draft"), [("all", "all"), ("all", None), (None, "all"), ("some", "beside"), ("beside", "some")])
def test_assisted_generation(target, draft):
    """A model with memories helps, is helped, or both; also by itself, so that all guesses are right."""
    made = [plain().eval() if layers is None else net("yaad", **LAYERS[layers]) for layers in (target, draft)]
    other = copy.deepcopy(made[1])
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    expected = made[0].generate(TEXT, **OPTIONS)
    for helper in (made[1], other):
        assert torch.equal(made[0].generate(TEXT, **OPTIONS, assistant_model=helper), expected)


def test_constrained_decoding_and_sampling_with_one_choice():
    of = net("yaad_linear", layers=[0, 2])
    banned = dict(bad_words_ids=[[int(x)] for x in of.generate(TEXT, **OPTIONS)[0, -3:]], repetition_penalty=1.2)
    assert torch.equal(of.generate(TEXT, **OPTIONS, **banned, prompt_lookup_num_tokens=3), of.generate(TEXT, **OPTIONS, **banned))
    sampled = OPTIONS | dict(do_sample=True, top_k=1)
    assert torch.equal(of.generate(TEXT, **sampled, prompt_lookup_num_tokens=3), of.generate(TEXT, **OPTIONS))


@pytest.mark.skipif(OLD, reason="transformers 5.4 refuses static caches in assisted generation")
@pytest.mark.parametrize("layers", LAYERS)
def test_static_caches(layers):
    of = net(**LAYERS[layers])
    expected = of.generate(TEXT, **OPTIONS)
    cache = StaticCache(config=of.config, max_cache_len=80)
    assert torch.equal(of.generate(TEXT, **OPTIONS, prompt_lookup_num_tokens=4, **{CACHE: cache}), expected)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dynamic", "static", "beside"])
@pytest.mark.parametrize("preset", ["yaad_linear", slow("titans"), "gated_deltanet"])
def test_crop_of_a_cache(preset, kind):
    of = net(preset, layers=[0, 1, 2], mode="parallel" if kind == "beside" else "replace")
    make = lambda: StaticCache(config=of.config, max_cache_len=64) if kind == "static" else DynamicCache(config=of.config)
    text, cache, other = ids(2, LENGTH + 9), make(), make()
    step = lambda cache, begin, end: of(input_ids=text[:, begin:end], **{CACHE: cache}).logits
    step(cache, 0, 8)
    for layer in cache.layers:
        getattr(layer, "memory", layer).keep(6)
    for begin, end in ((8, 12), (12, 13), (13, 14)):
        step(cache, begin, end)
    cache.crop(-4)
    step(other, 0, 8)
    step(other, 8, 10)
    for ours, theirs in zip(cache.layers, other.layers, strict=True):
        ours, theirs = (getattr(layer, "memory", layer) for layer in (ours, theirs))
        assert ours.get_seq_length() == theirs.get_seq_length() == 10
        a, b = (x.state if x.state is not None else x.decoder.state() for x in (ours, theirs))
        for x, y in zip((*a.memory.matrices(), a.conv), (*b.memory.matrices(), b.conv), strict=True):
            assert_close(x, y)  # the projections of 4 tokens are not those of 2 to the bit
    assert_close(step(cache, 10, 15), step(other, 10, 15))
    cache.crop(-5)
    assert_close(step(cache, 10, 12), of(input_ids=text[:, :12]).logits[:, 10:])
    with pytest.raises(ValueError, match=r"tokens: expected 0 to 2, since the window holds 2 tokens \(of keep\(6\)\), got 3"):
        cache.crop(-3)


def test_without_a_window_the_error_says_how_to_keep_one():
    of = net()
    cache = cache_of(of(input_ids=ids(), use_cache=True))
    with pytest.raises(
        ValueError, match=r"crop: a memory takes back tokens only if it has kept them; expected keep\(n\) of this cache layer"
    ):
        cache.crop(-2)
    cache.layers[0].crop(-0) if CACHE == "cache" else None  # nothing to take back


def test_states_are_kept_only_where_they_are_needed():
    of = net()
    written = of.generate(TEXT, **OPTIONS, return_dict_in_generate=True)
    assert all(layer.window is None and layer.state.memory.window is None for layer in cache_of(written).layers)
    replaced = replace_attention(plain(), layers=[0])
    assert not replaced._is_stateful
