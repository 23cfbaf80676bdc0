"""A memory with the call of a decoder layer's ``self_attn``, and what it must know of a batch.

Which tokens are padding and where packed documents begin is found once per forward, by the base model
(:func:`describe_batch`), and handed down to the layers as one keyword argument, which the hosts pass on: nothing is stored
on the model between two calls, so that a layer computed again for its gradient sees what it saw.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, StaticCache

from ..layers import MemoryBlock, Projected
from .cache import MemoryCacheLayer, check_cache, memory_layer, refuse_state
from .compat import CACHE, accepts_old_name, drops_cache

__all__ = ["Batch", "MemoryAttention", "ParallelAttention", "describe_batch", "mask_of_tokens"]

#: the keyword argument by which a mask ``[B, T]`` of the tokens themselves reaches the base model beside one made for attention
MASK = "memory_mask"
#: what a memory takes over from an attention layer: projections, and the norms of queries and keys that some have
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")


class Batch(NamedTuple):
    """Where the tokens of a batch belong; at most one of the two is given."""

    mask: Tensor | None  # [B, T] bool, True at real tokens
    cu_seqlens: Tensor | None  # [N + 1], documents in the flattened batch


class MemoryAttention(nn.Module):
    """A :class:`~miras_kernels.layers.MemoryBlock` with the call of a decoder layer's ``self_attn``.

    All new parameters are the child ``memory``'s, and read inside its forward. With ``attention`` the projections are that
    layer's own modules, under the names they had (and so are its norms of queries and keys), called, never read: grouped keys and
    values are repeated for their heads, and the rotary positions turn queries and keys.

    Args:
        memory: the block, without projections if ``attention`` is given.
        layer_idx: the layer's place in the model and its cache.
        attention: the layer that is linearised.
    """

    # the attention layer's, where there is one
    q_proj: Any
    k_proj: Any
    v_proj: Any
    o_proj: Any
    q_norm: Any
    k_norm: Any

    def __init__(self, memory: MemoryBlock, layer_idx: int, attention: nn.Module | None = None):
        super().__init__()
        self.memory = memory
        self.layer_idx = layer_idx
        self.is_causal = True
        for name in PROJECTIONS if attention is not None else ():
            if hasattr(attention, name):
                setattr(self, name, getattr(attention, name))

    @accepts_old_name
    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        *,
        memory_batch: Batch | None = None,
        **kwargs,
    ) -> tuple[Tensor, None]:
        """``hidden_states [B, T, D]`` to ``(out [B, T, D], None)``; a cache (the argument ``cache``, ``past_key_values`` before
        transformers 5.24) is read and advanced by T tokens. Other arguments are the host's business; without ``memory_batch`` (a layer
        called by itself) the mask is the one that the host made for attention."""
        cache = _cache_layer(self, kwargs)
        projected = self._project(hidden_states, position_embeddings)
        out = _recall(self.memory, hidden_states, attention_mask, memory_batch, cache, projected)
        return out if projected is None else self.o_proj(out), None

    def _project(self, x: Tensor, position_embeddings: tuple[Tensor, Tensor] | None) -> Projected | None:
        """Queries, keys and values as the attention layer would have read them, but not turned yet."""
        if self.memory.q_proj is not None:
            return None
        if position_embeddings is None:
            raise ValueError("position_embeddings: a memory made from attention needs the host's (cos, sin), got None")
        heads, size = self.memory.num_heads, self.memory.head_dim
        q, k, v = (projection(x).unflatten(-1, (-1, size)) for projection in (self.q_proj, self.k_proj, self.v_proj))
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        k, v = (t.repeat_interleave(heads // t.shape[2], 2) for t in (k, v))
        cos, sin = (t.expand(*x.shape[:2], -1) for t in position_embeddings)
        return Projected(torch.cat([q.flatten(2), k.flatten(2), v.flatten(2)], -1), cos, sin)


class ParallelAttention:
    """What makes a host's attention layer one with a memory beside it, its child ``memory``: their outputs are added.

    The layer's own parameters keep their names. A :class:`~miras_kernels.layers.MemoryBlock` with an ``output_gate`` adds nothing at the
    start. Arguments and result are those of the host's layer.
    """

    layer_idx: int
    memory: MemoryBlock

    @accepts_old_name
    def forward(self, hidden_states: Tensor, *args, memory_batch: Batch | None = None, **kwargs):
        cache = _cache_layer(self, kwargs, beside_attention=True)
        recalled = _recall(self.memory, hidden_states, kwargs.get("attention_mask"), memory_batch, cache, None)
        out, weights = super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]  # the host's layer is the other base
        return out + recalled, weights


def _cache_layer(layer: Any, kwargs: dict, beside_attention: bool = False) -> MemoryCacheLayer | None:
    """The layer's place in the cache among its keyword arguments."""
    refuse_state(kwargs)
    cache = kwargs.get(CACHE)
    return None if cache is None else memory_layer(cache, layer.layer_idx, beside_attention)


def _recall(
    block: MemoryBlock,
    x: Tensor,
    attention_mask: Tensor | None,
    batch: Batch | None,
    cache: MemoryCacheLayer | None,
    projected: Projected | None,
) -> Tensor:
    """What a block answers to ``x [B, T, D]``; the cache is read and advanced by T tokens."""
    tokens = x.shape[1]
    if batch is None:
        batch = Batch(_token_mask(attention_mask, tokens, tokens), None)
    if batch.cu_seqlens is not None:
        if cache is not None:
            raise ValueError(PACKED_CACHE)
        pack = lambda x: x.flatten(0, 1).unsqueeze(0)
        out, _ = block(pack(x), cu_seqlens=batch.cu_seqlens, projected=projected and projected.map(pack))
        return out.unflatten(1, x.shape[:2]).squeeze(0)
    before = None if cache is None else cache.before(tokens, batch.mask is not None)
    out, state = block(x, batch.mask, initial_state=before, output_final_state=cache is not None, projected=projected)
    if cache is not None:
        cache.advance(block, state, tokens)
    return out


# ---------------------------------------------------------------------------------------------------- what a batch holds

PACKED_CACHE = (
    "use_cache: documents packed into a row leave no state to go on from; expected use_cache=False (or no position_ids or cu_seq_lens_q "
    "that pack documents), got a cache"
)


def describe_batch(model: PreTrainedModel, kwargs: dict) -> dict:
    """The keyword arguments of the base model's own forward: refuses what memories cannot serve, and adds ``memory_batch``.

    Positions are those of the real tokens if a padding mask ``[B, past + T]`` comes without ``position_ids``, and in training no
    cache is made unless asked for.
    """
    _refuse(model, kwargs)
    kwargs, cache = dict(kwargs), kwargs.get(CACHE)
    tokens = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
    if tokens is None:
        return kwargs  # the host complains
    if kwargs.get("use_cache") is None and cache is None and model.training:
        kwargs["use_cache"] = False
    given, length = kwargs.get("attention_mask"), tokens.shape[1]
    if MASK in kwargs:  # generate has asked already
        mask, documents, past = kwargs.pop(MASK), None, 0
    else:
        past = _past(cache, given, length)
        mask = _token_mask(given, length, past + length)
        documents = _documents(tokens, kwargs, mask)
    if documents is not None:
        if cache is not None or kwargs.get("use_cache"):
            raise ValueError(PACKED_CACHE)
        # Without a mask the attention that is left finds the documents in the positions.
        kwargs["use_cache"], kwargs["attention_mask"], mask = False, None, None
        if kwargs.get("position_ids") is None:
            kwargs["position_ids"] = _positions(documents, tokens)
    elif given is not None and mask is not None and kwargs.get("position_ids") is None:
        before = given[:, :past].count_nonzero(1).unsqueeze(1) if past else 0
        kwargs["position_ids"] = (before + mask.long().cumsum(1) - 1).clamp(min=0)
    if mask is not None:
        mask = mask.to(tokens.device).expand(tokens.shape[0], -1)
        carries_state = cache is not None or kwargs.get("use_cache") is not False
        if not torch.compiler.is_compiling() and (mask.device.type == "cpu" or carries_state) and bool(mask.all()):
            mask = None
    if all(isinstance(layer.self_attn, MemoryAttention) for layer in model.layers):
        # No layer reads the mask: one that is already four-dimensional is handed on as it is, and none is made.
        kwargs["attention_mask"] = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=tokens.device)
    return {**kwargs, "memory_batch": Batch(mask, documents)}


def mask_of_tokens(inputs: dict, attention_mask: Tensor | None, is_first_iteration: bool) -> dict:
    """What ``generate`` hands to a forward; for a static cache, where it has made a mask for attention of ``attention_mask [B, past + T]``
    already, that of the T tokens as well: bool, or None if none is padding (no token is that it wrote itself).

    This runs outside of what is compiled, so all looks at values are here.
    """
    if not isinstance(inputs.get(CACHE), StaticCache) or (attention_mask is not None and attention_mask.dim() != 2):
        return inputs
    tokens = inputs["inputs_embeds"] if inputs.get("input_ids") is None else inputs["input_ids"]
    mask, length = None, tokens.shape[1]
    if attention_mask is not None and (is_first_iteration or length > 1):
        mask = attention_mask[:, attention_mask.shape[1] - length :] != 0
        mask = None if bool(mask.all()) else mask
    if _documents(tokens, inputs, mask) is not None:
        raise ValueError(PACKED_CACHE)
    return {**inputs, MASK: mask}


def _past(cache: Any, given: object, tokens: int) -> int:
    """How many tokens the cache has read, where a mask asks for it."""
    if cache is None or given is None:
        return 0
    past = cache.get_seq_length()
    if torch.compiler.is_compiling() and isinstance(past, Tensor):  # a static cache counts on its device: the mask is believed
        return given.shape[1] - tokens if isinstance(given, Tensor) and given.dim() == 2 else 0
    return int(past)


def _refuse(model: PreTrainedModel, kwargs: dict) -> None:
    refuse_state(kwargs)
    if kwargs.get(CACHE) is not None:
        check_cache(kwargs[CACHE])
        if drops_cache(model):
            raise ValueError(
                f"{CACHE}: gradient checkpointing computes layers again, which have no cache then; expected None, or a model in eval() mode"
            )
    if kwargs.get("encoder_hidden_states") is not None:
        raise ValueError("encoder_hidden_states: a memory does not attend to another sequence; expected None")
    if kwargs.get("is_causal") is False:
        raise ValueError("is_causal: a memory reads causally; expected True, got False")
    wanted = kwargs.get("output_attentions")
    if model.config.output_attentions if wanted is None else wanted:
        raise ValueError("output_attentions: a memory has no attention weights; expected False, got True")


def _documents(tokens: Tensor, kwargs: dict, mask: Tensor | None) -> Tensor | None:
    """``cu_seqlens`` of packed documents, by transformers' own rules: told by ``cu_seq_lens_q``, or (without a mask) seen in
    ``position_ids`` that do not go up by one (``transformers.masking_utils.find_packed_sequence_indices``)."""
    rows, length = tokens.shape[:2]
    told, position_ids = kwargs.get("cu_seq_lens_q"), kwargs.get("position_ids")
    if told is not None:
        if mask is not None:
            _refuse_padding(mask)
        return told
    if position_ids is None or mask is not None or length == 1:
        return None
    return _documents_of_positions(position_ids, rows, length)


@torch.compiler.disable(reason="attention_mask: its values are looked at; expected None beside cu_seq_lens_q with fullgraph=True")
def _refuse_padding(mask: Tensor) -> None:
    if not bool(mask.all()):
        raise ValueError("cu_seq_lens_q: packed documents have no padding; expected no attention_mask, or one without zeros")


@torch.compiler.disable(
    reason="position_ids: where documents begin is seen in their values; with fullgraph=True expected cu_seq_lens_q (or, for one document "
    "a row, an attention_mask of ones)"
)
def _documents_of_positions(position_ids: Tensor, rows: int, length: int) -> Tensor | None:
    starts = F.pad(position_ids.diff(dim=-1) != 1, (1, 0), value=True).expand(rows, length)
    if bool((starts.sum() == rows).item()):
        return None
    end = torch.tensor([rows * length], device=starts.device)
    return torch.cat([starts.flatten().nonzero().squeeze(1), end])


def _positions(documents: Tensor, tokens: Tensor) -> Tensor:
    """``[B, T]``, each token's place in its document."""
    rows, length = tokens.shape[:2]
    at, offsets = torch.arange(rows * length, device=tokens.device), documents.to(tokens.device, torch.int64)
    return (at - offsets[torch.bucketize(at, offsets[1:], right=True)]).view(rows, length)


def _token_mask(mask: object, tokens: int, seen: int) -> Tensor | None:
    """``[B, tokens]`` bool from any mask a host makes or takes: None, 2-D over the ``seen`` tokens (those in the cache included), or,
    without a past, 4-D boolean or additive (causal plus padding)."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise TypeError(f"attention_mask: expected a tensor [B, {seen}], got {type(mask).__name__}")
    if mask.dim() == 2:
        if mask.shape[1] != seen:
            past = "" if seen == tokens else f" ({seen - tokens} in the cache and {tokens} new ones)"
            raise ValueError(f"attention_mask: expected [B, T] with T = {seen}{past}, got {tuple(mask.shape)}")
        return mask[:, seen - tokens :] != 0
    if mask.dim() != 4 or tuple(mask.shape[-2:]) != (tokens, tokens) or seen != tokens:
        raise ValueError(f"attention_mask: expected [B, T] (or, without a cache, [B, 1, T, T]) with T = {seen}, got {tuple(mask.shape)}")
    if torch.compiler.is_compiling():
        raise NotImplementedError("attention_mask: a 4-D mask cannot be checked under torch.compile; expected [B, T] or None")
    visible = mask if mask.dtype == torch.bool else mask >= 0  # additive: 0 where a token is seen, else the dtype's minimum
    real = visible[:, 0].diagonal(dim1=-2, dim2=-1)
    causal = torch.ones(tokens, tokens, dtype=torch.bool, device=mask.device).tril()
    expected = (causal & real.unsqueeze(1)).unsqueeze(1)
    if bool(((visible != expected) & real[:, None, :, None]).any()):
        raise ValueError("attention_mask: a memory reads causally; expected a 4-D mask that is causal plus padding, got another pattern")
    return real
