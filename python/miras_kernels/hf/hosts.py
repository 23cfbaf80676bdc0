"""Which architectures can hold memories: one row each, with what differs between their decoder layers.

A decoder layer must call its attention module with the hidden states ``[B, T, D]`` first and everything else by name (among it
``position_embeddings = (cos, sin)`` where the model has a rotary position embedding, and the cache), must hand on keyword arguments that
it does not know, and must expect ``(out [B, T, D], weights)``. The base model must hand on such arguments too.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections.abc import Callable, Iterator

import torch
from torch import nn
from transformers import PreTrainedModel

from .compat import CACHE

__all__ = ["TABLE", "Host", "attentions", "missing"]

FUSED = ("parts", "heads")
NORMS = ("head", "flat")
ROTARY = ("half", "interleaved", "angles")
GIVEN = ("hidden_states", "position_embeddings", "attention_mask")  # arguments that attention may need


@dataclasses.dataclass(frozen=True)
class Host:
    """What differs between the decoder layers of two architectures. The defaults are those of Llama.

    Args:
        layers: the base model's list of decoder layers.
        attention: the attention module of a decoder layer.
        cache: the argument with which a layer passes the cache to attention.
        projections: the modules that make queries, keys and values; one name where they are fused. None: there are none of this kind,
            and ``init="from_attention"`` is refused.
        fused: order of the outputs of a fused projection: ``"parts"``, all queries, then all keys, then all values; or ``"heads"``,
            query, key and value of each head after another.
        output: the output projection.
        norm: whether ``q_norm`` and ``k_norm``, if any, see a ``"head"`` at a time or the ``"flat"`` projection.
        rotary: the rotary position embedding: ``"half"``, pairs of channels half a head apart, cos and sin of all channels (those of
            fewer channels turn the first ones); ``"interleaved"``, pairs of neighbours; ``"angles"``, as ``"half"`` with one cos and sin
            for a pair. None: none.
        rotates: an attribute of the attention module that is false or None in layers without a position embedding.
        head_dim: where the configuration has the size of a head.
        packs: whether its attention separates packed documents by ``position_ids``; if not, they are refused unless all layers are
            memories or attention is a flash kernel, which finds them itself.
    """

    layers: str = "layers"
    attention: str = "self_attn"
    cache: str = CACHE
    projections: tuple[str, ...] | None = ("q_proj", "k_proj", "v_proj")
    fused: str = "parts"
    output: str = "o_proj"
    norm: str = "head"
    rotary: str | None = "half"
    rotates: str | None = None
    head_dim: str = "head_dim"
    packs: bool = True

    def __post_init__(self):
        for name in ("layers", "attention", "cache", "output", "head_dim"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"{name}: expected a name, got {getattr(self, name)!r}")
        names = self.projections
        if names is not None and (not isinstance(names, tuple) or len(names) not in (1, 3) or not all(isinstance(x, str) for x in names)):
            raise ValueError(f"projections: expected the names of three modules, of one fused module, or None, got {names!r}")
        for name, choices in (("fused", FUSED), ("norm", NORMS), ("rotary", (*ROTARY, None))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {getattr(self, name)!r}")

    def modules(self) -> tuple[str, ...]:
        """The modules of an attention layer that a memory uses."""
        return (*(self.projections or ()), self.output, "q_norm", "k_norm")

    def turns(self, attention: nn.Module) -> bool:
        """Whether an attention layer turns its queries and keys by position."""
        return self.rotary is not None and (self.rotates is None or bool(getattr(attention, self.rotates, None)))


_LLAMA, _FLAT, _LATENT = Host(), Host(norm="flat"), Host(projections=None, head_dim="v_head_dim")

#: base model -> (module of transformers.models, row)
TABLE: dict[str, tuple[str, Host]] = {
    "LlamaModel": ("llama", _LLAMA),
    "MistralModel": ("mistral", _LLAMA),
    "MixtralModel": ("mixtral", _LLAMA),
    "Qwen2Model": ("qwen2", _LLAMA),
    "Qwen2MoeModel": ("qwen2_moe", _LLAMA),
    "Qwen3Model": ("qwen3", _LLAMA),
    "Qwen3MoeModel": ("qwen3_moe", _LLAMA),
    "GemmaModel": ("gemma", _LLAMA),
    "Gemma2Model": ("gemma2", _LLAMA),
    "Gemma3TextModel": ("gemma3", _LLAMA),
    "GraniteModel": ("granite", _LLAMA),
    "Phi3Model": ("phi3", Host(projections=("qkv_proj",))),
    "Olmo2Model": ("olmo2", _FLAT),
    "Olmo3Model": ("olmo3", _FLAT),
    "SmolLM3Model": ("smollm3", Host(rotates="use_rope")),
    "GptOssModel": ("gpt_oss", Host(rotary="angles", packs=False)),
    "CohereModel": ("cohere", Host(rotary="interleaved")),
    "Cohere2Model": ("cohere2", Host(rotary="interleaved", rotates="sliding_window")),
    "DeepseekV2Model": ("deepseek_v2", _LATENT),
    "DeepseekV3Model": ("deepseek_v3", _LATENT),
    "GPT2Model": ("gpt2", Host(layers="h", attention="attn", projections=("c_attn",), output="c_proj", rotary=None)),
    "GPTNeoXModel": (
        "gpt_neox",
        Host(attention="attention", cache="layer_past", projections=("query_key_value",), fused="heads", output="dense"),
    ),
}


def attentions(base: PreTrainedModel, host: Host) -> list[nn.Module]:
    """The attention module, or the memory in its place, of every decoder layer."""
    return [getattr(layer, host.attention) for layer in getattr(base, host.layers)]


def device_of(attention: nn.Module) -> torch.device:
    """The device of a layer; quantised projections may have buffers alone."""
    return next(itertools.chain(attention.parameters(), attention.buffers())).device


# -------------------------------------------------------------------------------------------------- unknown architectures


def missing(model: PreTrainedModel, host: Host | None = None) -> list[str]:
    """Which requirements a model does not meet, in words; with the names of ``host``, or with any plausible ones."""
    return list(_missing(model.base_model, host))


def _missing(base: PreTrainedModel, host: Host | None) -> Iterator[str]:
    config, name = base.config, type(base).__name__
    if getattr(config, "is_encoder_decoder", False):
        yield f"{name} is an encoder and a decoder; a memory reads one sequence causally"
        return
    for field in ("hidden_size", "num_hidden_layers", "num_attention_heads"):
        if getattr(config, field, None) is None:
            yield f"{type(config).__name__} has no {field}"
    if not hands_on(base.forward):
        yield f"{name}.forward does not take **kwargs, which it must hand on to its layers"
    layers = _layers(base, host)
    if layers is None:
        found = "any list of modules" if host is None else f"a list of modules {host.layers!r}"
        yield f"{name} does not have {found} with {getattr(config, 'num_hidden_layers', None)} decoder layers (config.num_hidden_layers)"
        return
    wanted = host.attention if host is not None else _attention(layers[0])
    for i, layer in enumerate(layers):
        kind, attention = f"{type(layer).__name__} (layer {i})", getattr(layer, wanted, None)
        if attention is None:
            yield f"{kind} has no module {wanted!r}, it has {', '.join(name for name, _ in layer.named_children())}"
            return
        if not hands_on(layer.forward):
            yield f"{kind}.forward does not take **kwargs, which it must hand on to its attention"
            return
        arguments = inspect.signature(attention.forward).parameters
        needed = [x for x, p in arguments.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD and x not in GIVEN]
        if needed:
            yield f"{type(attention).__name__}.forward needs {', '.join(needed)}, which a memory does not know"
            return
        if host is None and not any(x in arguments for x in (CACHE, "past_key_values", "layer_past")):
            yield f"{type(attention).__name__}.forward has no argument for the cache (expected {CACHE})"
            return


def _layers(base: nn.Module, host: Host | None) -> nn.ModuleList | None:
    lists = {name: x for name, x in base.named_children() if isinstance(x, nn.ModuleList) and len(x)}
    count = getattr(base.config, "num_hidden_layers", None)
    if host is not None:
        lists = {name: x for name, x in lists.items() if name == host.layers}
    return next((x for x in lists.values() if len(x) == count), None)


def _attention(layer: nn.Module) -> str:
    """A plausible name of its attention."""
    return next((name for name, _ in layer.named_children() if name.endswith(("attn", "attention"))), "self_attn")


def hands_on(function: Callable) -> bool:
    """Whether a function takes keyword arguments that it does not name."""
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values())
