"""A memory in the place of attention, inside an existing model.

The host's ``self_attn`` is replaced; everything else stays the host's. What the memory must know of a batch (which tokens
are padding, where packed documents begin) is derived once per forward by a hook on the base model and handed down to the
layers as one keyword argument, which the hosts pass on: nothing is stored on the model between two calls.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaModel
from transformers.models.mistral.modeling_mistral import MistralModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model

from ..layers import MemoryBlock, Preset

__all__ = ["MemoryAttention", "replace_attention"]

#: the base models whose decoder layers call ``self_attn`` as :class:`MemoryAttention` is called
HOSTS = (LlamaModel, MistralModel, Qwen2Model, Qwen3Model)


def replace_attention(
    model: PreTrainedModel,
    preset: str | Preset = "yaad_linear",
    layers: str | Iterable[int] | None = None,
    *,
    num_heads: int | None = None,
    head_dim: int | None = None,
    chunk_size: int | None = None,
    conv_width: int = 4,
    gate_rank: int = 16,
    backend: str = "auto",
) -> PreTrainedModel:
    """Replace the attention of a Llama, Mistral, Qwen2 or Qwen3 model by a memory, in place.

    The new layers are :class:`~miras_kernels.layers.MemoryBlock` in the model's dtype and on the layer's device, started from
    torch's random generator with the model's ``initializer_range``. They are new: a pretrained model is no language model
    any more until it has been trained. All parameters of a new layer are ``...self_attn.memory.*``.

    Padding masks and documents packed by ``position_ids`` (no attention mask) or ``cu_seq_lens_q`` are exact. A memory has no
    position embedding and no sliding window.

    Not supported yet, and refused with an error: a cache (``generate`` needs ``use_cache=False``, which reads the
    whole text again for every token; a plain forward runs without one), ``save_pretrained`` (a saved model would load as the
    plain architecture without a word: use ``state_dict`` and this function), ``output_attentions`` (a memory has none), and
    4-D masks that are not causal plus padding.

    Args:
        model: a ``PreTrainedModel`` of the four architectures, with any head, on real devices and not wrapped.
        preset: see :data:`miras_kernels.layers.PRESETS`.
        layers: indices of the decoder layers to replace; None or ``"all"`` for all. The others keep their attention.
        num_heads, head_dim: those of the host's queries by default.
        chunk_size, conv_width, gate_rank, backend: see :class:`~miras_kernels.layers.MemoryBlock`.

    Returns:
        The same model.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came. The model is then unchanged.
    """
    base = _base(model)
    config = base.config
    heads = config.num_attention_heads if num_heads is None else num_heads
    if head_dim is None and num_heads is None:
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    new = {}
    for i in _indices(layers, base.layers):
        device = next(base.layers[i].parameters()).device
        if device.type == "meta":
            raise ValueError(f"model: layer {i} has no data (meta device); expected a model whose weights are loaded")
        block = MemoryBlock(
            config.hidden_size,
            heads,
            head_dim,
            preset=preset,
            chunk_size=chunk_size,
            conv_width=conv_width,
            gate_rank=gate_rank,
            init_std=getattr(config, "initializer_range", 0.02),
            backend=backend,
        ).to(device, model.dtype)  # fmt: skip  started in float32, so that the numbers drawn do not depend on the model's dtype
        new[i] = MemoryAttention(block, i).train(base.layers[i].training)
    first = not any(isinstance(layer.self_attn, MemoryAttention) for layer in base.layers)
    for i, attention in new.items():
        base.layers[i].self_attn = attention
    if first:
        names = tuple(inspect.signature(type(base).forward).parameters)[1:]
        base.register_forward_pre_hook(functools.partial(_describe_batch, names), with_kwargs=True)
    for part in {id(m): m for m in (model, base)}.values():
        part.save_pretrained = _refuse_saving
    return model


class MemoryAttention(nn.Module):
    """A :class:`~miras_kernels.layers.MemoryBlock` with the call of a decoder layer's ``self_attn``."""

    def __init__(self, memory: MemoryBlock, layer_idx: int):
        super().__init__()
        self.memory = memory
        self.layer_idx = layer_idx
        self.is_causal = True

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: object | None = None,
        memory_batch: Batch | None = None,
        **kwargs,
    ) -> tuple[Tensor, None]:
        """``hidden_states [B, T, D]`` to ``(out [B, T, D], None)``. Position embeddings and other arguments are the host's
        business; without ``memory_batch`` (a layer called by itself) the mask is the one that the host made for attention."""
        if past_key_values is not None:
            raise NotImplementedError(_NO_CACHE.format("past_key_values", type(past_key_values).__name__))
        if memory_batch is None:
            memory_batch = Batch(_token_mask(attention_mask, hidden_states.shape[1]), None)
        if memory_batch.cu_seqlens is None:
            return self.memory(hidden_states, memory_batch.mask)[0], None
        packed = hidden_states.flatten(0, 1).unsqueeze(0)
        return self.memory(packed, cu_seqlens=memory_batch.cu_seqlens)[0].view_as(hidden_states), None


# ---------------------------------------------------------------------------------------------------- what a batch holds


class Batch(NamedTuple):
    """Where the tokens of a batch belong; at most one of the two is given."""

    mask: Tensor | None  # [B, T] bool, True at real tokens
    cu_seqlens: Tensor | None  # [N + 1], documents in the flattened batch


_NO_CACHE = (
    "{}: a model with miras_kernels memories cannot use a cache yet, got {}; call generate(..., use_cache=False), which reads the "
    "whole text again for every token"
)


def _describe_batch(names: tuple[str, ...], module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Forward pre-hook of the base model, whose forward takes ``names``: refuses what memories cannot serve, and adds ``memory_batch``."""
    kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
    if kwargs.get("past_key_values") is not None:
        raise NotImplementedError(_NO_CACHE.format("past_key_values", type(kwargs["past_key_values"]).__name__))
    if kwargs.get("use_cache"):
        raise NotImplementedError(_NO_CACHE.format("use_cache", kwargs["use_cache"]))
    if kwargs.get("cache") is not None:
        raise NotImplementedError(_NO_CACHE.format("cache", type(kwargs["cache"]).__name__) + " (continuous batching needs one)")
    wanted = kwargs.get("output_attentions")
    if module.config.output_attentions if wanted is None else wanted:
        raise ValueError("output_attentions: a memory has no attention weights; expected False, got True")
    tokens = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
    batch = Batch(None, None)
    if tokens is not None:  # otherwise the host complains
        mask = _token_mask(kwargs.get("attention_mask"), tokens.shape[1])
        batch = Batch(mask, None) if mask is not None else Batch(None, _documents(tokens, kwargs))
    return (), {**kwargs, "use_cache": False, "memory_batch": batch}


def _documents(tokens: Tensor, kwargs: dict) -> Tensor | None:
    """``cu_seqlens`` of packed documents, by transformers' own rules: told by ``cu_seq_lens_q``, or seen in ``position_ids``
    that do not go up by one (``transformers.masking_utils.find_packed_sequence_indices``)."""
    rows, length = tokens.shape[:2]
    told, position_ids = kwargs.get("cu_seq_lens_q"), kwargs.get("position_ids")
    if told is not None:
        return told
    if position_ids is None:
        return None
    starts = F.pad(position_ids.diff(dim=-1) != 1, (1, 0), value=True).expand(rows, length)
    if bool((starts.sum() == rows).item()):
        return None
    end = torch.tensor([rows * length], device=starts.device)
    return torch.cat([starts.flatten().nonzero().squeeze(1), end])


def _token_mask(mask: object, tokens: int) -> Tensor | None:
    """``[B, T]`` bool from any mask a host makes or takes: None, 2-D, or 4-D boolean or additive (causal plus padding)."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise TypeError(f"attention_mask: expected a tensor [B, T] or [B, 1, T, T], got {type(mask).__name__}")
    if mask.dim() == 2:
        if mask.shape[1] != tokens:
            raise ValueError(f"attention_mask: expected [B, T] with T = {tokens}, got {tuple(mask.shape)}")
        return mask != 0
    if mask.dim() != 4 or tuple(mask.shape[-2:]) != (tokens, tokens):
        raise ValueError(f"attention_mask: expected [B, T] or [B, 1, T, T] with T = {tokens}, got {tuple(mask.shape)}")
    if torch.compiler.is_compiling():
        raise NotImplementedError("attention_mask: a 4-D mask cannot be checked under torch.compile; expected [B, T] or None")
    seen = mask if mask.dtype == torch.bool else mask >= 0  # additive: 0 where a token is seen, else the dtype's minimum
    real = seen[:, 0].diagonal(dim1=-2, dim2=-1)
    causal = torch.ones(tokens, tokens, dtype=torch.bool, device=mask.device).tril()
    expected = (causal & real.unsqueeze(1)).unsqueeze(1)
    if bool(((seen != expected) & real[:, None, :, None]).any()):
        raise ValueError("attention_mask: a memory reads causally; expected a 4-D mask that is causal plus padding, got another pattern")
    return real


# ---------------------------------------------------------------------------------------------------- checks


def _base(model: object) -> PreTrainedModel:
    names = ", ".join(host.__name__ for host in HOSTS)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: expected a transformers model (not wrapped, not compiled), got {type(model).__name__}")
    base = model.base_model
    if not isinstance(base, HOSTS):
        raise TypeError(f"model: expected one built on {names}, got {type(model).__name__}")
    return base


def _indices(layers: object, stack: nn.ModuleList) -> list[int]:
    if layers is None or (isinstance(layers, str) and layers == "all"):
        chosen = list(range(len(stack)))
    elif isinstance(layers, str) or not isinstance(layers, Iterable):
        raise TypeError(f"layers: expected None, 'all' or layer indices, got {layers!r}")
    else:
        chosen = list(layers)
    if not chosen:
        raise ValueError("layers: expected at least one layer index, got none")
    for i in chosen:
        if isinstance(i, bool) or not isinstance(i, int):
            raise TypeError(f"layers: expected integers, got {i!r}")
        if not 0 <= i < len(stack):
            raise ValueError(f"layers: expected indices from 0 to {len(stack) - 1}, got {i}")
        replaced = isinstance(stack[i].self_attn, MemoryAttention)
        if replaced:
            raise ValueError(f"layers: layer {i} has been replaced already")
    if len(set(chosen)) != len(chosen):
        raise ValueError(f"layers: expected every index once, got {chosen}")
    return chosen


def _refuse_saving(*args, **kwargs) -> None:
    raise NotImplementedError(
        "save_pretrained: a saved model with miras_kernels memories would load as the plain architecture, its memories dropped; save "
        "model.state_dict(), and to load build the model, call replace_attention with the same arguments, then load_state_dict"
    )
