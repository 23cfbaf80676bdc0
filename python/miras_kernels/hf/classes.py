"""The classes of models with memories: ``MirasLlamaForCausalLM`` is a ``LlamaForCausalLM`` some of whose layers have memories.

When this module is imported, it creates a class for each original class (of every head), with a configuration whose ``model_type`` is
``"miras_llama"`` and whose field ``miras`` says which layers have memories (:mod:`.plan`), and registers them with AutoConfig and the
AutoModel classes. ``save_pretrained`` also writes two lines of Python, so that the saved model loads with ``trust_remote_code=True``
where this package is installed but not imported, and the error says what to install where it is not.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
import transformers
from torch import nn
from transformers import AutoConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel

from ..layers import MemoryBlock
from . import compat, plan
from .attention import MemoryAttention, ParallelAttention, describe_batch, mask_of_tokens
from .plan import Memories

#: module of transformers.models -> its base model; their decoder layers call ``self_attn`` with the arguments of :class:`MemoryAttention`
ARCHITECTURES = {
    "llama": "LlamaModel",
    "mistral": "MistralModel",
    "qwen2": "Qwen2Model",
    "qwen3": "Qwen3Model",
    "gemma": "GemmaModel",
    "gemma2": "Gemma2Model",
    "gemma3": "Gemma3TextModel",
}
_SHIM = "modeling_miras"
_HEADS = ("ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")


class Family(NamedTuple):
    """The classes of one architecture."""

    original: type[PreTrainedConfig]  # its configuration in transformers
    config: type[PreTrainedConfig]  # ... with memories
    base: type[PreTrainedModel]  # the base model with memories
    models: dict[type[PreTrainedModel], type[PreTrainedModel]]  # original class -> the one with memories


if TYPE_CHECKING:  # the attributes that the mixins use
    from transformers import PreTrainedModel as _Original
else:
    _Original = object


class MirasConfigMixin(_Original):
    """Adds the field ``miras`` to a configuration."""

    def save_pretrained(self, save_directory, **kwargs) -> None:
        """Also writes the file that ``trust_remote_code=True`` loads (a model saves its configuration with this method)."""
        self.auto_map = getattr(self, "auto_map", None) or {"AutoConfig": f"{_SHIM}.{type(self).__name__}"}
        names = ", ".join(sorted({name.split(".")[1] for name in self.auto_map.values()}))
        text = f'"""Needs the package miras-kernels."""\n\nfrom miras_kernels.hf import {names}  # noqa: F401\n'
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        (Path(save_directory) / f"{_SHIM}.py").write_text(text, encoding="utf-8")
        super().save_pretrained(save_directory, **kwargs)

    @classmethod
    def register_for_auto_class(cls, *args, **kwargs) -> None:
        """Does nothing: a saved model refers to the installed classes and has no copy of their code."""


class MirasModelMixin(compat.GenerationMethods, _Original):
    """How a model with memories differs from the original class.

    Parameters that a checkpoint lacks are initialised by :meth:`MemoryBlock.reset_parameters
    <miras_kernels.layers.MemoryBlock.reset_parameters>` with the configuration's ``initializer_range``; the others keep the loaded values.
    """

    _is_stateful = True  # transformers then refuses assisted generation and prompt lookup
    _tp_plan = None

    def __init__(self, config: PreTrainedConfig, *args, **kwargs):
        groups = plan.read(config)
        if not groups:
            raise ValueError(f"config.miras: {type(self).__name__} needs the layers that have memories, see miras_kernels.hf; got None")
        super().__init__(config, *args, **kwargs)
        base = self.base_model
        if not isinstance(base, MirasModelMixin):  # created by the original __init__
            adopt(base, FAMILIES[self.config_class])
        install(base, build(base, config, groups))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if not isinstance(module, MemoryBlock):
            return super()._init_weights(module)
        loaded = {p: p.clone() for p in module.parameters() if getattr(p, "_is_hf_initialized", False)}
        if len(loaded) == len(list(module.parameters())):
            return
        module.reset_parameters(initializer_range(self.config))
        for parameter, values in loaded.items():
            parameter.copy_(values)

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        for name in ("tp_plan", "tp_size"):
            if kwargs.get(name) is not None:
                raise NotImplementedError(f"{name}: a model with memories has no tensor-parallel plan; expected None, got {kwargs[name]!r}")
        return super().from_pretrained(*args, **kwargs)

    def save_pretrained(self, *args, **kwargs) -> None:
        """Also records in the configuration which classes load the model."""
        self.config.auto_map = auto_map(type(self))
        super().save_pretrained(*args, **kwargs)

    @classmethod
    def register_for_auto_class(cls, *args, **kwargs) -> None:
        """Does nothing: a saved model refers to the installed classes and has no copy of their code."""

    def init_continuous_batching(self, *args, **kwargs):
        raise NotImplementedError("generate_batch: a model with memories has no continuous batching; use generate with a padded batch")

    generate_batch = continuous_batching_context_manager = init_continuous_batching


# ------------------------------------------------------------------------------------------------- layers of a model


def initializer_range(config: PreTrainedConfig) -> float:
    """Standard deviation with which projections are initialised."""
    return getattr(config, "initializer_range", None) or 0.02


def has_memory(layer: nn.Module) -> bool:
    """Whether a decoder layer has a memory, in the place of attention or beside it."""
    return isinstance(layer.self_attn, MemoryAttention | ParallelAttention)


def build(
    base: PreTrainedModel, config: PreTrainedConfig, groups: list[Memories], backend: str = "auto"
) -> dict[int, MemoryAttention | MemoryBlock]:
    """New memories by layer, for the layers of ``groups`` that have none yet; a :class:`MemoryBlock` for one beside attention."""
    for group in groups:
        plan.indices(group.layers, len(base.layers))
    return {i: _layer(base, config, group, i, backend) for group in groups for i in group.layers if not has_memory(base.layers[i])}


def install(base: PreTrainedModel, new: dict[int, MemoryAttention | MemoryBlock]) -> None:
    """Put memories in place of attention, or beside it."""
    for i, memory in new.items():
        if isinstance(memory, MemoryAttention):
            base.layers[i].self_attn = memory
        else:
            attention = base.layers[i].self_attn
            attention.__class__, attention.memory = PARALLEL[type(attention)], memory


def adopt(model: PreTrainedModel, family: Family) -> None:
    """Change a model's class to the one with memories."""
    model.__class__ = family.models[type(model)]
    compat.record_outputs(model)


def _layer(base: PreTrainedModel, config: PreTrainedConfig, group: Memories, index: int, backend: str) -> MemoryAttention | MemoryBlock:
    layer, linearised, parallel = base.layers[index], group.init == "from_attention", group.mode == "parallel"
    if parallel and type(layer.self_attn) not in PARALLEL:
        raise TypeError(f"mode: 'parallel' needs the attention class of the original model, got {type(layer.self_attn).__name__}")
    block = MemoryBlock(
        config.hidden_size,
        group.num_heads,
        group.head_dim,
        preset=group.preset,
        conv_width=group.conv_width,
        gate_rank=group.gate_rank,
        init_std=initializer_range(config),
        projections=not linearised,
        output_gate=parallel,
        backend=backend,
    )
    # Cast after initialisation, so that the random numbers do not depend on the model's dtype.
    block = block.to(next(layer.parameters()).device, base.dtype).train(layer.training)
    return block if parallel else MemoryAttention(block, index, layer.self_attn if linearised else None).train(layer.training)


# ------------------------------------------------------------------------------------------------- making the classes


def _positional(method: Callable) -> list[str]:
    """The names of a method's arguments that may be positional, without self."""
    return [name for name, p in inspect.signature(method).parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD][1:]


def _forward(original: type[PreTrainedModel]):
    names = _positional(original.forward)

    @compat.accepts_old_name
    @functools.wraps(original.forward)
    def forward(self, *args, **kwargs):
        return original.forward(self, **describe_batch(self, {**dict(zip(names, args, strict=False)), **kwargs}))

    return forward


def _prepare_inputs(original: type[PreTrainedModel]):
    method = original.prepare_inputs_for_generation
    names = _positional(method)

    @functools.wraps(method)  # generate inspects the names of the arguments
    def prepare_inputs_for_generation(self, *args, **kwargs):
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        return mask_of_tokens(method(self, **given), given.get("attention_mask"), given.get("is_first_iteration", False))

    return prepare_inputs_for_generation


def _model_class(original: type[PreTrainedModel], config: type[PreTrainedConfig], is_base: bool) -> type[PreTrainedModel]:
    what = "with memories in the layers that ``config.miras`` lists"
    body = {"__module__": __name__, "__doc__": f":class:`transformers.{original.__name__}` {what}.", "config_class": config,
            "__annotations__": {"config": config}}  # fmt: skip
    if is_base:
        body["forward"] = _forward(original)
    if issubclass(original, GenerationMixin):
        body["prepare_inputs_for_generation"] = _prepare_inputs(original)
    return type(f"Miras{original.__name__}", (MirasModelMixin, original), body)


def _family(module_name: str, base_name: str) -> Family:
    module = importlib.import_module(f"transformers.models.{module_name}.modeling_{module_name}")
    base = getattr(module, base_name)
    original = base.config_class
    what = "with the field ``miras``, see :mod:`miras_kernels.hf.plan`"
    body = {"__module__": __name__, "__doc__": f":class:`transformers.{original.__name__}` {what}.",
            "model_type": f"miras_{original.model_type}",
            "base_model_tp_plan": None, "miras": None, "__annotations__": {"miras": dict | None}}  # fmt: skip
    config = type(f"Miras{original.__name__}", (MirasConfigMixin, original), body)
    stem = base_name.removesuffix("Model").removesuffix("Text")
    attention = getattr(module, f"{stem}Attention")
    body = {"__module__": __name__, "__doc__": f":class:`{attention.__name__}` of transformers with a memory beside it."}
    PARALLEL[attention] = type(f"Miras{attention.__name__}", (ParallelAttention, attention), body)
    classes = [base, *(getattr(module, stem + middle + head, None) for head in _HEADS for middle in ("", "Text"))]
    models = {cls: _model_class(cls, config, cls is base) for cls in classes if cls is not None and cls.config_class is original}
    return Family(original, config, models[base], models)


def auto_map(model: type[PreTrainedModel]) -> dict[str, str]:
    """The classes by AutoClass, for ``config.json``."""
    classes = {"AutoConfig": model.config_class, "AutoModel": FAMILIES[model.config_class].base, auto_class(model): model}
    return {name: f"{_SHIM}.{cls.__name__.removeprefix('FSDP')}" for name, cls in classes.items()}  # fully_shard renames classes


def auto_class(model: type[PreTrainedModel]) -> str:
    """The name of the AutoModel class that loads ``model``."""
    return "AutoModel" + next((head for head in _HEADS if model.__name__.endswith(head)), "")


def register(family: Family) -> None:
    """Register a family with AutoConfig and the AutoModel classes."""
    FAMILIES[family.config] = family
    AutoConfig.register(family.config.model_type, family.config, exist_ok=True)
    for cls in family.models.values():
        getattr(transformers, auto_class(cls)).register(family.config, cls, exist_ok=True)


#: configuration class, with or without memories -> family
FAMILIES: dict[type[PreTrainedConfig], Family] = {}
#: attention class -> the same with a memory beside it
PARALLEL: dict[type[nn.Module], type[nn.Module]] = {}
#: the names of the public classes created here
NAMES: list[str] = []
for _names in ARCHITECTURES.items():
    _made = _family(*_names)
    register(_made)
    FAMILIES[_made.original] = _made
    for _cls in (_made.config, *_made.models.values()):
        globals()[_cls.__name__] = _cls  # for imports and pickle
        NAMES.append(_cls.__name__)
globals().update({_cls.__name__: _cls for _cls in PARALLEL.values()})

__all__ = ["FAMILIES", "NAMES", "register", *NAMES]
