"""Modules that a decoder layer calls as its ``self_attn``, and what they need to know about a batch.

The base model finds out once per forward which tokens are padding and where packed documents begin (:func:`describe_batch`), and passes
it to the layers as one keyword argument. Nothing is stored on the model between two calls, so that gradient checkpointing recomputes a
layer with the same arguments.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, StaticCache

from ..layers import MemoryBlock, Projected
from .cache import MemoryCacheLayer, check_cache, fetch_next, memory_layer, refuse_state
from .compat import CACHE, accepts_old_name, drops_cache
from .hosts import Host, attentions

__all__ = ["Batch", "MemoryAttention", "ParallelAttention", "describe_batch", "mask_of_tokens"]

#: keyword argument of the base model: a padding mask ``[B, T]``, where ``attention_mask`` has been expanded for attention already
MASK = "memory_mask"


class Batch(NamedTuple):
    """Padding or packed documents; at most one of the two is given."""

    mask: Tensor | None  # [B, T] bool, True at real tokens
    cu_seqlens: Tensor | None  # [N + 1], bounds of the documents in the flattened batch


class MemoryAttention(nn.Module):
    """A :class:`~miras_kernels.layers.MemoryBlock` that a decoder layer calls as its attention (``self_attn`` in most models).

    All new parameters belong to the child ``memory``. With ``attention``, the projections (and the norms of queries and keys) are that
    layer's own modules, under the same names; they are called as modules, so that adapters and hooks on them work.

    Args:
        memory: the block, without projections if ``attention`` is given.
        layer_idx: index of the layer in the model and its cache.
        attention: the layer that is linearised.
        host: how the model's attention layers are built.
    """

    # set only where there is an attention layer
    q_norm: Any
    k_norm: Any
    host, turns = Host(), True  # of modules that an earlier version has pickled

    def __init__(self, memory: MemoryBlock, layer_idx: int, attention: nn.Module | None = None, host: Host = host):
        super().__init__()
        self.memory = memory
        self.layer_idx = layer_idx
        self.is_causal = True
        self.host, self.turns = host, attention is not None and host.turns(attention)
        for name in host.modules() if attention is not None else ():
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
        """``hidden_states [B, T, D]`` to ``(out [B, T, D], None)``.

        A cache (the argument ``cache``, ``past_key_values`` before transformers 5.24) is read and advanced by T tokens. Other arguments
        are ignored. Without ``memory_batch`` (a layer called on its own) padding is read from ``attention_mask``.
        """
        cache = _cache_layer(self, kwargs)
        projected = self._project(hidden_states, position_embeddings)
        out = _run_memory(self.memory, hidden_states, attention_mask, memory_batch, cache, projected)
        return out if projected is None else getattr(self, self.host.output)(out), None

    def _project(self, x: Tensor, position_embeddings: tuple[Tensor, Tensor] | None) -> Projected | None:
        """The attention layer's queries, keys and values, and the rotary position embedding that the memory applies to them."""
        if self.memory.q_proj is not None:
            return None
        if self.turns and position_embeddings is None:
            raise ValueError("position_embeddings: a memory made from attention needs the model's (cos, sin), got None")
        heads = self.memory.num_heads
        q, k, v = self._heads(x)
        if hasattr(self, "q_norm"):
            if self.host.norm == "flat":
                q, k = (norm(t.flatten(2)).view_as(t) for norm, t in ((self.q_norm, q), (self.k_norm, k)))
            else:
                q, k = self.q_norm(q), self.k_norm(k)
        k, v = (t.repeat_interleave(heads // t.shape[2], 2) for t in (k, v))
        angles: Any = (None, None)
        if self.turns and position_embeddings is not None:
            angles = (t.expand(*x.shape[:2], -1) for t in position_embeddings)
            if self.host.rotary == "angles":
                angles = (torch.cat([t, t], -1) for t in angles)
            elif self.host.rotary == "interleaved":  # a memory does not depend on the order of a head's channels, so change it
                q, k = (torch.cat([t[..., ::2], t[..., 1::2]], -1) for t in (q, k))
                angles = (torch.cat([t[..., ::2], t[..., 1::2]], -1) for t in angles)
        return Projected(torch.cat([q.flatten(2), k.flatten(2), v.flatten(2)], -1), *angles)

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values ``[B, T, heads, head_dim]``; keys and values may have fewer heads than queries."""
        heads, names = self.memory.num_heads, self.host.projections or ()
        made = [getattr(self, name)(x).unflatten(-1, (-1, self.memory.head_dim)) for name in names]
        if len(made) == 1:
            if self.host.fused == "heads":
                made = made[0].unflatten(2, (heads, 3)).unbind(3)
            else:
                groups = (made[0].shape[2] - heads) // 2
                made = made[0].split([heads, groups, groups], 2)
        q, k, v = made
        return q, k, v


class ParallelAttention:
    """A mixin that adds a memory, the child ``memory``, beside an attention layer; their outputs are added.

    The layer's own parameters keep their names. The memory's ``output_gate`` is zero at first. Arguments and result are those of the
    attention layer.
    """

    host = Host()
    layer_idx: int
    memory: MemoryBlock

    @accepts_old_name
    def forward(self, hidden_states: Tensor, *args, memory_batch: Batch | None = None, **kwargs):
        cache = _cache_layer(self, kwargs, beside_attention=True)
        read = _run_memory(self.memory, hidden_states, kwargs.get("attention_mask"), memory_batch, cache, None)
        out, weights = super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]  # the attention layer is the other base class
        return out + read, weights


def _cache_layer(layer: Any, kwargs: dict, beside_attention: bool = False) -> MemoryCacheLayer | None:
    """The layer of the cache that is among the keyword arguments."""
    name = layer.host.cache
    refuse_state(kwargs if name == CACHE else {key: value for key, value in kwargs.items() if key != name})
    cache = kwargs.get(name)
    if cache is None:
        return None
    if not beside_attention:
        fetch_next(cache, layer.layer_idx)
    return memory_layer(cache, layer.layer_idx, beside_attention)


def _run_memory(
    block: MemoryBlock,
    x: Tensor,
    attention_mask: Tensor | None,
    batch: Batch | None,
    cache: MemoryCacheLayer | None,
    projected: Projected | None,
) -> Tensor:
    """The block's outputs for ``x [B, T, D]``; the cache is read and advanced by T tokens."""
    tokens = x.shape[1]
    if batch is None:
        batch = Batch(_token_mask(attention_mask, tokens, tokens), None)
    if batch.cu_seqlens is not None:
        if cache is not None:
            raise ValueError(PACKED_CACHE)
        pack = lambda x: x.flatten(0, 1).unsqueeze(0)
        out, _ = block(pack(x), cu_seqlens=batch.cu_seqlens, projected=projected and projected.map(pack))
        return out.unflatten(1, x.shape[:2]).squeeze(0)
    before = None if cache is None else cache.before(block, x.shape[0], tokens, batch.mask is not None)
    out, state = block(x, batch.mask, initial_state=before, output_final_state=cache is not None, projected=projected)
    if cache is not None:
        cache.advance(block, state, tokens)
    return out


# ----------------------------------------------------------------------------------- padding, packed documents, refusals

PACKED_CACHE = (
    "use_cache: packed documents leave no state to continue from; expected use_cache=False (or no position_ids or cu_seq_lens_q that pack "
    "documents), got a cache"
)


def describe_batch(model: PreTrainedModel, host: Host, kwargs: dict) -> dict:
    """The keyword arguments for the original forward, with ``memory_batch``; refuses what memories do not support.

    If a padding mask ``[B, past + T]`` comes without ``position_ids``, positions count real tokens. In training mode no cache is created
    unless ``use_cache=True``.
    """
    _refuse(model, kwargs)
    kwargs, cache = dict(kwargs), kwargs.get(CACHE)
    tokens = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
    if tokens is None:
        return kwargs  # the original forward raises the error
    if kwargs.get("use_cache") is None and cache is None and model.training:
        kwargs["use_cache"] = False
    given, length = kwargs.get("attention_mask"), tokens.shape[1]
    every = all(isinstance(layer, MemoryAttention) for layer in attentions(model, host))
    if MASK in kwargs:  # from mask_of_tokens
        mask, documents, past = kwargs.pop(MASK), None, 0
    else:
        past = _past(cache, given, length)
        mask = _token_mask(given, length, past + length)
        documents = _documents(tokens, kwargs, mask)
    if any(layer.memory.context is not None for layer in attentions(model, host) if isinstance(layer, MemoryAttention)):
        _check_stretch(kwargs, documents)
    if documents is not None:
        if cache is not None or kwargs.get("use_cache"):
            raise ValueError(PACKED_CACHE)
        if not (host.packs or every or "flash" in str(model.config._attn_implementation)):
            raise ValueError(
                f"position_ids, cu_seq_lens_q: the attention of {type(model).__name__} does not separate packed documents; expected one "
                "document per row, memories in all layers, or attn_implementation='flash_attention_2'"
            )
        # Without a mask, the remaining attention layers find the documents by the positions.
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
    if every:
        # No layer reads this mask; since it has four dimensions, transformers creates no other one.
        kwargs["attention_mask"] = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=tokens.device)
    return {**kwargs, "memory_batch": Batch(mask, documents)}


def _check_stretch(kwargs: dict, documents: Tensor | None) -> None:
    """With context parallelism (:mod:`miras_kernels.parallel`) a rank cannot know what lies before its tokens."""
    if kwargs.get("position_ids") is None:
        raise ValueError("position_ids: with context parallelism expected those of this rank's tokens (ContextParallel.shard), got None")
    if documents is not None and kwargs.get("cu_seq_lens_q") is None:
        raise ValueError("cu_seq_lens_q: with context parallelism expected the offsets of all ranks' packed documents, got None")


def mask_of_tokens(inputs: dict, attention_mask: Tensor | None, is_first_iteration: bool) -> dict:
    """The arguments that ``generate`` passes to a forward, with :data:`MASK` added for a static cache.

    There ``generate`` has already expanded ``attention_mask [B, past + T]`` for attention, so the mask of the T new tokens is passed too:
    bool, or None if none of them is padding (generated tokens never are). This runs outside of the compiled step, so it may read values.
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
    """How many tokens the cache has read; 0 where no mask needs it."""
    if cache is None or given is None:
        return 0
    past = cache.get_seq_length()
    if torch.compiler.is_compiling() and isinstance(past, Tensor):  # a static cache counts on its device: take it from the mask
        return given.shape[1] - tokens if isinstance(given, Tensor) and given.dim() == 2 else 0
    return int(past)


def _refuse(model: PreTrainedModel, kwargs: dict) -> None:
    refuse_state(kwargs)
    if kwargs.get(CACHE) is not None:
        check_cache(kwargs[CACHE])
        if drops_cache(model):
            raise ValueError(
                f"{CACHE}: gradient checkpointing recomputes layers without the cache; expected None, or a model in eval() mode"
            )
    if kwargs.get("encoder_hidden_states") is not None:
        raise ValueError("encoder_hidden_states: a memory does not attend to another sequence; expected None")
    if kwargs.get("is_causal") is False:
        raise ValueError("is_causal: a memory reads causally; expected True, got False")
    wanted = kwargs.get("output_attentions")
    if model.config.output_attentions if wanted is None else wanted:
        raise ValueError("output_attentions: a memory has no attention weights; expected False, got True")


def _documents(tokens: Tensor, kwargs: dict, mask: Tensor | None) -> Tensor | None:
    """``cu_seqlens`` of packed documents, by the rules of transformers: ``cu_seq_lens_q``, or (without a mask) ``position_ids`` that do
    not increase by one (``transformers.masking_utils.find_packed_sequence_indices``)."""
    rows, length = tokens.shape[:2]
    given, position_ids = kwargs.get("cu_seq_lens_q"), kwargs.get("position_ids")
    if given is not None:
        if mask is not None:
            _refuse_padding(mask)
        return given
    if position_ids is None or mask is not None or length == 1:
        return None
    return _documents_of_positions(position_ids, rows, length)


@torch.compiler.disable(reason="attention_mask: its values are read; expected None beside cu_seq_lens_q with fullgraph=True")
def _refuse_padding(mask: Tensor) -> None:
    if not bool(mask.all()):
        raise ValueError("cu_seq_lens_q: packed documents have no padding; expected no attention_mask, or one without zeros")


@torch.compiler.disable(
    reason="position_ids: their values say where documents begin; with fullgraph=True expected cu_seq_lens_q (or, for one document "
    "per row, an attention_mask of ones)"
)
def _documents_of_positions(position_ids: Tensor, rows: int, length: int) -> Tensor | None:
    starts = F.pad(position_ids.diff(dim=-1) != 1, (1, 0), value=True).expand(rows, length)
    if bool((starts.sum() == rows).item()):
        return None
    end = torch.tensor([rows * length], device=starts.device)
    return torch.cat([starts.flatten().nonzero().squeeze(1), end])


def _positions(documents: Tensor, tokens: Tensor) -> Tensor:
    """``[B, T]``, each token's position in its document."""
    rows, length = tokens.shape[:2]
    at, offsets = torch.arange(rows * length, device=tokens.device), documents.to(tokens.device, torch.int64)
    return (at - offsets[torch.bucketize(at, offsets[1:], right=True)]).view(rows, length)


def _token_mask(mask: object, tokens: int, seen: int) -> Tensor | None:
    """``[B, tokens]`` bool from any mask that transformers uses: None, 2-D over the ``seen`` tokens (including those in the cache), or,
    without a cache, 4-D boolean or additive (causal plus padding)."""
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
    visible = mask if mask.dtype == torch.bool else mask >= 0  # additive: 0 where a token is visible, else the dtype's minimum
    real = visible[:, 0].diagonal(dim1=-2, dim2=-1)
    causal = torch.ones(tokens, tokens, dtype=torch.bool, device=mask.device).tril()
    expected = (causal & real.unsqueeze(1)).unsqueeze(1)
    if bool(((visible != expected) & real[:, None, :, None]).any()):
        raise ValueError("attention_mask: a memory reads causally; expected a 4-D mask that is causal plus padding, got another pattern")
    return real
