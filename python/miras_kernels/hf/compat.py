"""All differences between versions of transformers that matter to memories, each with its version.

No other module here depends on the version.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable

import torch
import transformers
from transformers import GenerationMixin, PreTrainedModel, conversion_mapping
from transformers.cache_utils import CacheLayerMixin, DynamicLayer
from transformers.utils import output_capturing
from transformers.utils.deprecation import deprecate_kwarg

from ..versions import TRANSFORMERS, in_tested_range, minor

#: name of the cache in ``generate``, forwards and outputs: "cache" from 5.24 on, "past_key_values" before
CACHE = "cache" if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters else "past_key_values"
#: names of caches and states in other versions and models; before 5.24 "cache" was that of continuous batching
ALIASES = {"cache", "cache_params", "layer_past", "mems", "past_buckets_states", "past_key_value", "past_key_values", "state"} - {CACHE}


def accepts_old_name(function: Callable) -> Callable:
    """``function``, which takes the cache as :data:`CACHE`; from 5.24 to 5.40 "past_key_values" is accepted too, with a warning."""
    return deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")(function) if CACHE == "cache" else function


_ALWAYS_CHECKPOINTS = minor(transformers.__version__) < (5, 24)


def drops_cache(model: PreTrainedModel) -> bool:
    """Whether gradient checkpointing drops the cache: in training mode, from 5.24 on only with gradients enabled."""
    return getattr(model, "gradient_checkpointing", False) and model.training and (_ALWAYS_CHECKPOINTS or torch.is_grad_enabled())


_CROPS_TO_LENGTH = "max_length" in inspect.signature(DynamicLayer.crop).parameters


def tokens_to_remove(argument: int, length: int) -> int:
    """How many of ``length`` tokens ``crop(argument)`` removes: -argument; before 5.17 a number >= 0 is the length that stays."""
    if _CROPS_TO_LENGTH and argument >= 0:
        return max(length - argument, 0)
    if argument > 0:
        raise ValueError(f"crop: expected minus the number of tokens to remove, got {argument}")
    return -argument


def record_outputs(model: PreTrainedModel) -> None:
    """Register the outputs (hidden states ...) that the class of ``model`` can record, as transformers does in a model's ``__init__``:
    in a dict whose key is the class' name; from 5.24 on its ``__setitem__`` expects the model instead."""
    dict.__setitem__(output_capturing._CAN_RECORD_REGISTRY, str(model.__class__), model._can_record_outputs)


def register_conversions(model_type: str, original: str) -> None:
    """Read and write checkpoints of ``model_type`` in the format of ``original`` (that of mixtures of experts on the Hub)."""
    mapping = conversion_mapping.get_checkpoint_conversion_mapping(original)
    if mapping is not None:
        conversion_mapping.register_checkpoint_conversion_mapping(model_type, mapping, overwrite=True)


class GenerationMethods:
    """Class methods that ``generate`` calls."""

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return True  # before 5.8 a stateful model gets no cache otherwise


#: name of the method that returns a cache layer's capacity in tokens; it changed between 5.12 and 5.23
MAX_LENGTH = "get_max_length" if hasattr(CacheLayerMixin, "get_max_length") else "get_max_cache_shape"


class CacheLayerMethods:
    """Methods of a cache layer whose names changed between 5.12 and 5.23."""

    def get_max_cache_shape(self) -> int:
        return self.get_max_length()  # type: ignore[attr-defined]  # of the layer

    @property
    def max_batch_size(self) -> int:
        return self.batch_size  # type: ignore[attr-defined]  # of the layer


@functools.cache
def warn_if_untested() -> None:
    """Warn once if this version of transformers is outside the tested range."""
    version = transformers.__version__
    if not in_tested_range(version):
        tested = " to ".join(TRANSFORMERS)
        warnings.warn(f"transformers {version} has not been tested with memories, expected {tested}", stacklevel=3)
