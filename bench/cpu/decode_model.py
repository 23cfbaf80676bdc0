"""One token of a whole model: a Llama with memories in place of attention, and with attention, after texts of several lengths."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch

from ..common.timing import clock_for, interleave, timed, whole_chunks
from .cases import Settings
from .decode_studies import CONTEXTS, head, per_token
from .watch import Watch

MODEL_CASE = "Llama, 4 layers of 4 heads of 64"
#: the preset that replaces attention in all layers; None: nothing
MODELS = {"linear": "yaad_linear", "mlp": "yaad", "attention": None}
CHUNK, PREFILL = 16, 2048  # the presets' chunk size; tokens of the prompt per prefill call


def llama(preset: str | None, toy: bool):
    """The model, with memories of a preset in all layers or with its attention."""
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
    return torch.randint(0, 512, (1, length), generator=torch.Generator().manual_seed(1))


def gate(model) -> dict:
    """Logits of a text whose end is decoded token by token, against those of the whole text in float64. The budget is three times the error
    of the whole text in float32, plus the roundings of a sum over the hidden channels."""
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
    """A call that decodes a token after so many others, and the bytes of the cache. Attention's cache is cropped again after each token."""
    import transformers

    from miras_kernels.hf.compat import CACHE

    cache, token = transformers.DynamicCache(config=model.config), text(1)
    if MODELS[name] is None:  # the time does not depend on the values of keys and values
        shape = (1, model.config.num_key_value_heads, context, model.config.head_dim)
        for layer in range(model.config.num_hidden_layers):
            cache.update(torch.randn(shape), torch.randn(shape), layer)
    else:
        for part in text(context).split(PREFILL, dim=1):
            model(part, **{CACHE: cache}, use_cache=True, logits_to_keep=1)

    def run() -> None:
        model(token, **{CACHE: cache}, use_cache=True, logits_to_keep=1)
        if MODELS[name] is None:
            cache.crop(-1)

    attention = sum(x.keys.nbytes + x.values.nbytes for x in cache.layers if MODELS[name] is None)
    return run, attention or sum(x.nbytes for x in cache.layers)


def study_model(size: str, threads: int, settings: Settings) -> Iterator[dict]:
    """A token of a whole model with memories, and with attention, after texts of 1k, 8k and 64k tokens."""
    clock, samplers, cache_bytes = clock_for(threads)[1], {}, {}
    with torch.no_grad():
        models = {name: llama(preset, settings.toy) for name, preset in MODELS.items()}
        result = head("model", size, threads, *(gate(model) for model in models.values()))
        if not result["parity"]["ok"]:
            yield result
            return
        for name, model in models.items():
            for label, context in CONTEXTS.items():
                run, cache_bytes[f"{name} {label}"] = steps(model, name, context // 64 if settings.toy else context)
                samplers[f"{name} {label}"] = timed(run, clock) if MODELS[name] is None else whole_chunks(run, clock, CHUNK)
        with Watch(threads) as watch:
            times = interleave(samplers, settings.seconds, settings.min_rounds)
    yield {**result, **per_token(times, "linear 1k", 1), "cache_bytes": cache_bytes, "watch": watch.report()}
