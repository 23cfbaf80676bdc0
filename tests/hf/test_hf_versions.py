"""Differences between versions of transformers: the cache's name, gradient checkpointing, and the tested range."""

from __future__ import annotations

import warnings

import pytest
import torch
from hf_tiny import CACHE, LENGTH, assert_close, cache_of, ids, model
from transformers import DynamicCache, StaticCache

from miras_kernels.hf import compat, replace_attention
from miras_kernels.layers import BlockDecoder
from miras_kernels.versions import TRANSFORMERS, in_tested_range

OLD = "past_key_values"


def net(mode="replace", layers=(0, 2), **options):
    return model("Llama", layers, mode=mode, **options).eval()


def state(layer):
    """The state in a cache layer, static or not, beside attention or not."""
    layer = getattr(layer, "memory", layer)
    return layer.decoder.state() if getattr(layer, "decoder", None) is not None else layer.state


# ----------------------------------------------------------------------------------------------- the state is carried


@pytest.mark.parametrize("mode", ["replace", "parallel"])
@pytest.mark.parametrize("static", [False, True])
@torch.no_grad()
def test_the_cache_after_generate_has_the_state_of_the_text(static, mode):
    """... and no deprecated name is used on the way."""
    of = net(mode)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        options = dict(cache_implementation="static") if static else {}
        out = of.generate(ids(), max_new_tokens=6, do_sample=False, return_dict_in_generate=True, **options)
        expected = cache_of(of(input_ids=out.sequences[:, :-1], use_cache=True))
    assert cache_of(out).get_seq_length() == LENGTH + 5 and isinstance(cache_of(out), StaticCache) == static
    for i in (0, 2):
        ours, whole = (state(cache.layers[i]) for cache in (cache_of(out), expected))
        for a, b in zip(ours.memory.matrices(), whole.memory.matrices(), strict=True):
            assert_close(a, b)
        assert_close(ours.conv, whole.conv)


@torch.no_grad()
@pytest.mark.parametrize("name", dict.fromkeys([CACHE, OLD]))
def test_every_name_of_the_cache(name):
    """As an argument of ``generate``, the model, the base model and a layer; the old name warns where both are accepted."""
    of, turn = net(), ids(2, 3, seed=3)
    layer, x, longer = of.model.layers[0].self_attn, torch.randn(2, 5, 24), torch.cat([ids(), turn], 1)
    expected, cache = of(input_ids=longer).logits[:, LENGTH:], DynamicCache()
    read = lambda: cache_of(of(input_ids=ids(), use_cache=True))
    options = dict(attention_mask=torch.ones_like(longer), max_new_tokens=4, do_sample=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert_close(of(input_ids=turn, **{name: read()}).logits, expected)
        assert_close(of.lm_head(of.model(input_ids=turn, **{name: read()}).last_hidden_state), expected)
        assert_close(of.lm_head(of.model(turn, None, None, read()).last_hidden_state), expected)  # positional
        assert torch.equal(of.generate(longer, **{name: read()}, **options), of.generate(longer, **options))
        assert_close(torch.cat([layer(piece, **{name: cache})[0] for piece in x.split([3, 2], 1)], 1), layer(x)[0])
    assert cache.layers[0].length == 5
    callers = {str(w.message).split("`")[3].split(".")[0] for w in caught if issubclass(w.category, FutureWarning)}
    assert callers == (set() if name == CACHE else {"MirasLlamaForCausalLM", "MirasLlamaModel", "MemoryAttention"})


@pytest.mark.parametrize("mode", ["replace", "parallel"])
def test_a_state_under_another_name_is_refused(mode):
    of, x, angles = net(mode), torch.randn(2, 1, 24), torch.zeros(1, 1, 8)
    read = lambda: cache_of(of(input_ids=ids(), use_cache=True))
    block = of.model.layers[0].self_attn.memory
    _, kept = block(x, output_final_state=True)
    given = {"my_cache": DynamicCache(), "caches": [read()], "by_layer": {0: read().layers[0]}, "initial_state": kept,
             "decoder": BlockDecoder(block, kept), "cache_params": torch.ones(1), "layer_past": read(), "mems": (x,)}  # fmt: skip
    given[({"cache", OLD} - {CACHE}).pop()] = read()
    for name, value in given.items():
        if name == OLD:  # transformers renames it
            continue
        for call in (
            lambda **state: of(input_ids=ids(2, 1), **state),
            lambda **state: of.model.layers[0].self_attn(x, (angles, angles), attention_mask=None, **state),
        ):
            with pytest.raises(TypeError, match=f"{name}: expected None, a model with memories reads the argument {CACHE}, and has no"):
                call(**{name: value})
    assert torch.isfinite(of(input_ids=ids(), my_option=3, use_cache=True).logits).all()  # other arguments are ignored


# -------------------------------------------------------------------------------------------- gradient checkpointing


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`")
def test_gradient_checkpointing_and_caches():
    """Layers get no cache in training mode (before 5.24 also without gradients), so continuing from one is refused."""
    of, turn = net(), ids(2, 3, seed=3)
    expected = of(input_ids=torch.cat([ids(), turn], 1)).logits[:, LENGTH:]
    cache = cache_of(of(input_ids=ids(), use_cache=True))
    of.gradient_checkpointing_enable()
    assert_close(of(input_ids=turn, **{CACHE: cache}).logits, expected)  # not in training
    of.train()
    assert cache_of(of(input_ids=ids(), use_cache=True)) is None  # transformers creates none
    refused = pytest.raises(ValueError, match=rf"{CACHE}: gradient checkpointing recomputes .* expected None, or a model in eval\(\) mode")
    with refused:
        of(input_ids=turn, **{CACHE: DynamicCache()})
    with pytest.raises(TypeError, match="layer_past: expected None"):  # the layers would not get that either
        of(input_ids=turn, layer_past=cache)
    if CACHE == OLD:
        with refused:
            of.generate(ids(), max_new_tokens=4)
    else:
        text = of.generate(ids(), max_new_tokens=4, do_sample=False)
        assert torch.equal(text, of.eval().generate(ids(), max_new_tokens=4, do_sample=False))


# ------------------------------------------------------------------------------------------------------ tested versions


def test_the_tested_range():
    oldest, newest = TRANSFORMERS
    assert all(map(in_tested_range, (oldest, f"{oldest}.0", "5.12.1", newest, f"{newest}.0", f"{newest}.7", f"{newest}.0rc1")))
    assert not any(map(in_tested_range, ("5.3.9", "4.57.6", "5.25.0", "5.240", "6.0.0.dev0", "6")))


def test_a_version_out_of_range_warns_once(monkeypatch):
    monkeypatch.setattr(compat.transformers, "__version__", "5.99.0")
    compat.warn_if_untested.cache_clear()
    with pytest.warns(UserWarning, match=r"transformers 5.99.0 has not been tested with memories, expected 5\.4 to ") as caught:
        for layer in range(2):
            replace_attention(model(layers=()), layers=[layer])
    assert [w.filename for w in caught if "5.99.0" in str(w.message)] == [__file__]
    compat.warn_if_untested.cache_clear()
