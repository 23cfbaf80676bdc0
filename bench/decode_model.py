"""A whole model's token: a Llama with memories in the place of attention, and with its attention, after texts of several lengths."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import harness
from harness import Watch, figures, interleave, timed, whole_chunks

CONTEXTS = {"1k": 1024, "8k": 8192, "64k": 65536}
MODEL_CASE = "Llama, 4 layers of 4 heads of 64"
#: what takes the place of attention in all layers; None: nothing
MODELS = {"linear": "yaad_linear", "mlp": "yaad", "attention": None}
#: of these presets
CHUNK = 16
#: tokens of a prompt that are read at a time
PIECE = 2048


def llama(preset: str | None, toy: bool):
    """The model, with memories of a preset in all layers or with its attention."""
    import torch
    import transformers

    from miras_kernels.hf import replace_attention

    heads, dim = (2, 16) if toy else (4, 64)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=heads * dim, intermediate_size=3 * heads * dim, num_hidden_layers=4, num_attention_heads=heads,
        num_key_value_heads=heads, head_dim=dim, max_position_embeddings=2 * max(CONTEXTS.values()),
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    return model if preset is None else replace_attention(model, preset)


def text(length: int):
    import torch

    return torch.randint(0, 512, (1, length), generator=torch.Generator().manual_seed(1))


def gate(model) -> dict:
    """Logits of a text whose end is read token by token against those of all of it in float64: within three times the error that it has
    in float32 read at once, and the roundings of a sum over the hidden channels.
    """
    import torch

    from miras_kernels.hf.compat import CACHE
    from miras_kernels.testing.parity import ARITHMETIC, ULPS, relative_error

    ids = text(40)
    exact = copy.deepcopy(model).double()(ids, use_cache=False).logits[:, 8:]
    usual = relative_error(model(ids, use_cache=False).logits[:, 8:], exact)
    cache = model(ids[:, :8], use_cache=True)[CACHE]
    tokens = [model(token, **{CACHE: cache}, use_cache=True).logits for token in ids[:, 8:].split(1, dim=1)]
    error, budget = relative_error(torch.cat(tokens, 1), exact), 3 * usual + ARITHMETIC * (model.config.hidden_size**0.5 + ULPS)
    return {"ok": error <= budget, "error": error, "budget": budget, "tensor": "logits"}


def steps(model, name: str, context: int) -> tuple[Callable[[], object], int]:
    """A call that reads a token after so many others, and the bytes of the cache. Attention forgets the token again."""
    import torch
    import transformers

    from miras_kernels.hf.compat import CACHE

    cache, token = transformers.DynamicCache(config=model.config), text(1)
    if MODELS[name] is None:  # what keys and values are does not matter to the time
        shape = (1, model.config.num_key_value_heads, context, model.config.head_dim)
        for layer in range(model.config.num_hidden_layers):
            cache.update(torch.randn(shape), torch.randn(shape), layer)
    else:
        for piece in text(context).split(PIECE, dim=1):
            model(piece, **{CACHE: cache}, use_cache=True, logits_to_keep=1)

    def run() -> None:
        model(token, **{CACHE: cache}, use_cache=True, logits_to_keep=1)
        if MODELS[name] is None:
            cache.crop(-1)

    attention = sum(x.keys.nbytes + x.values.nbytes for x in cache.layers if MODELS[name] is None)
    return run, attention or sum(x.nbytes for x in cache.layers)


def study_model(size: str, threads: int, settings: dict) -> Iterator[dict]:
    """A token of a whole model with memories, and with attention, after texts of 1k, 8k and 64k tokens."""
    import torch

    result = {"study": "model", "case": size, "threads": threads, "clock": harness.clock_for(threads)[0], "notes": []}
    clock, samplers, cache_bytes = harness.clock_for(threads)[1], {}, {}
    with torch.no_grad():
        models = {name: llama(preset, settings["toy"]) for name, preset in MODELS.items()}
        gates = [gate(model) for model in models.values()]
        result["parity"] = max(gates, key=lambda gate: gate["error"] / gate["budget"])
        if not result["parity"]["ok"]:
            result["notes"].append("parity is red, not timed")
            yield result
            return
        for name, model in models.items():
            for label, context in CONTEXTS.items():
                run, cache_bytes[f"{name} {label}"] = steps(model, name, context // 64 if settings["toy"] else context)
                samplers[f"{name} {label}"] = timed(run, clock) if MODELS[name] is None else whole_chunks(run, clock, CHUNK)
        with Watch(threads) as watch:
            times = interleave(samplers, settings["seconds"], settings["min_rounds"])
    yield {**result, **figures(times, "linear 1k", 1), "cache_bytes": cache_bytes, "watch": watch.report()}
