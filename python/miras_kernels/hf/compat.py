"""Every difference between versions of transformers that concerns memories, each with the version it came with.

No other module here asks for the version, or knows two names of one thing. What the hosts' classes do differently from one version to
the next by themselves (the layers that a cache makes, the keywords that ``device_map`` skips) is theirs.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable

import torch
import transformers
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin
from transformers.utils import output_capturing
from transformers.utils.deprecation import deprecate_kwarg

from ..versions import TRANSFORMERS, in_tested_range, minor

#: what the cache is called in ``generate``, forwards and outputs: "cache" from 5.24 on, "past_key_values" before
CACHE = "cache" if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters else "past_key_values"
#: what it, or another state, is called in other versions and models; "cache" was that of continuous batching before 5.24
ALIASES = {"cache", "cache_params", "layer_past", "mems", "past_buckets_states", "past_key_value", "past_key_values", "state"} - {CACHE}


def accepts_old_name(function: Callable) -> Callable:
    """``function``, which takes the cache as :data:`CACHE`; from 5.24 to 5.40 the hosts take "past_key_values" as well, with a warning."""
    return deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")(function) if CACHE == "cache" else function


_ALWAYS_CHECKPOINTS = minor(transformers.__version__) < (5, 24)


def drops_cache(model: PreTrainedModel) -> bool:
    """Whether gradient checkpointing takes the cache from the layers: in training mode, from 5.24 on only where there are gradients."""
    return getattr(model, "gradient_checkpointing", False) and model.training and (_ALWAYS_CHECKPOINTS or torch.is_grad_enabled())


def record_outputs(model: PreTrainedModel) -> None:
    """Say which outputs (hidden states ...) the class of ``model`` can record, as transformers does when it makes a model of the class:
    in a dict by the class' name, which from 5.24 on takes a model for its key."""
    dict.__setitem__(output_capturing._CAN_RECORD_REGISTRY, str(model.__class__), model._can_record_outputs)


class GenerationMethods:
    """What ``generate`` asks a stateful model for."""

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return True  # before 5.8 a stateful model would get no cache


#: how many tokens a layer of a cache has room for; another name in 5.12, this one by 5.23
MAX_LENGTH = "get_max_length" if hasattr(CacheLayerMixin, "get_max_length") else "get_max_cache_shape"


class CacheLayerMethods:
    """What a cache asks of its layers by another name in 5.12 than in 5.23."""

    def get_max_cache_shape(self) -> int:
        return self.get_max_length()  # type: ignore[attr-defined]  # of the layer

    @property
    def max_batch_size(self) -> int:
        return self.batch_size  # type: ignore[attr-defined]  # of the layer


@functools.cache
def warn_if_untested() -> None:
    """Warn, once, if this version of transformers lies outside of the tested range."""
    version = transformers.__version__
    if not in_tested_range(version):
        tested = " to ".join(TRANSFORMERS)
        warnings.warn(f"transformers {version} is not one that memories have been tested with, expected {tested}", stacklevel=3)
