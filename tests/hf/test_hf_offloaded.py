"""Caches that keep keys and values on the CPU. Without a GPU the tests make what is there unreadable until it is brought back."""

from __future__ import annotations

import pytest
import torch
from hf_tiny import CACHE, ids, model
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin


class Stream:
    """What a cache uses of a stream of a GPU."""

    device = torch.device("cuda")
    wait_stream = __enter__ = lambda self, *_: None
    __exit__ = lambda self, *_: None


@pytest.fixture
def away(monkeypatch):
    """How often keys and values were taken away."""
    found = []

    def offload(layer):
        if layer.is_initialized and layer.keys.device.type != "meta":
            found.append(layer)
            layer.kept = (layer.keys, layer.values)
            layer.keys, layer.values = layer.keys.to("meta"), layer.values.to("meta")

    def prefetch(layer):
        if layer.is_initialized and layer.keys.device.type == "meta":
            layer.keys, layer.values = layer.kept

    monkeypatch.setattr(CacheLayerMixin, "offload", offload)
    monkeypatch.setattr(CacheLayerMixin, "prefetch", prefetch)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: Stream())
    return found


@pytest.mark.parametrize(("layers", "mode"), [([0], "replace"), ([1], "replace"), ([2], "replace"), ([0, 2], "replace"), ([1], "parallel")])
def test_keys_and_values_come_back_in_time(layers, mode, away):
    net = model("Llama", layers, mode=mode).eval()
    expected = net.generate(ids(), max_new_tokens=5, do_sample=False)
    assert not away
    cache = DynamicCache(config=net.config, offloading=True)
    cache.prefetch_stream = Stream()
    assert torch.equal(net.generate(ids(), max_new_tokens=5, do_sample=False, **{CACHE: cache}), expected)
    assert len(away) == 5 * (3 - len(layers) * (mode == "replace"))


def test_a_model_of_memories_alone_has_nothing_to_offload():
    net = model().eval()
    expected = net.generate(ids(), max_new_tokens=5, do_sample=False)
    assert torch.equal(net.generate(ids(), max_new_tokens=5, do_sample=False, cache_implementation="offloaded"), expected)
