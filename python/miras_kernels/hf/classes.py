"""The classes of models with memories: ``MirasLlamaForCausalLM`` is a ``LlamaForCausalLM`` some of whose layers are memories.

They are made from the host's classes when this module is imported, one for each (every head the host has), with a
configuration whose ``model_type`` is ``"miras_llama"`` and whose field ``miras`` says which layers are memories
(:mod:`.plan`), and registered with AutoConfig and the AutoModel classes. ``save_pretrained`` also writes two lines of Python, so that
the saved model loads with ``trust_remote_code=True`` where this package is installed but not imported, and says what
to install where it is not.
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

#: the modules of transformers.models whose decoder layers call ``self_attn`` as :class:`MemoryAttention` is called, and their base models
HOSTS = {
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
    """The classes of one host: its configuration; then, with memories, configuration, base model, and those by the host's own."""

    host: type[PreTrainedConfig]
    config: type[PreTrainedConfig]
    base: type[PreTrainedModel]
    models: dict[type[PreTrainedModel], type[PreTrainedModel]]


if TYPE_CHECKING:  # what the mixins below find in the classes that they are mixed into
    from transformers import PreTrainedModel as _OfHost
else:
    _OfHost = object


class MirasConfigMixin(_OfHost):
    """A host's configuration with the field ``miras``."""

    def save_pretrained(self, save_directory, **kwargs) -> None:
        """The host's ``save_pretrained``, and the file that ``trust_remote_code=True`` reads (a model saves it with its configuration)."""
        self.auto_map = getattr(self, "auto_map", None) or {"AutoConfig": f"{_SHIM}.{type(self).__name__}"}
        names = ", ".join(sorted({name.split(".")[1] for name in self.auto_map.values()}))
        text = f'"""Needs the package miras-kernels."""\n\nfrom miras_kernels.hf import {names}  # noqa: F401\n'
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        (Path(save_directory) / f"{_SHIM}.py").write_text(text, encoding="utf-8")
        super().save_pretrained(save_directory, **kwargs)

    @classmethod
    def register_for_auto_class(cls, *args, **kwargs) -> None:
        """Nothing: a saved model names the installed classes, and carries no copy of their code."""


class MirasModelMixin(compat.GenerationMethods, _OfHost):
    """What a model with memories does differently from its host.

    Parameters that a checkpoint lacks get the values that :meth:`MemoryBlock.reset_parameters
    <miras_kernels.layers.MemoryBlock.reset_parameters>` draws (with the configuration's ``initializer_range``); those that it has
    stay as loaded.
    """

    _is_stateful = True  # transformers then refuses assisted generation and prompt lookup
    _tp_plan = None

    def __init__(self, config: PreTrainedConfig, *args, **kwargs):
        if not plan.read(config):
            raise ValueError(f"config.miras: {type(self).__name__} needs to know which layers are memories, see miras_kernels.hf; got None")
        super().__init__(config, *args, **kwargs)
        base = self.base_model
        if not isinstance(base, MirasModelMixin):  # the host's own __init__ has made a base model of its own class
            adopt(base, FAMILIES[self.config_class])
        install(base, build(base, config))

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
        """The host's ``save_pretrained``; the configuration then says which classes load the model."""
        self.config.auto_map = auto_map(type(self))
        super().save_pretrained(*args, **kwargs)

    @classmethod
    def register_for_auto_class(cls, *args, **kwargs) -> None:
        """Nothing: a saved model names the installed classes, and carries no copy of their code."""

    def init_continuous_batching(self, *args, **kwargs):
        raise NotImplementedError("generate_batch: a model with memories does no continuous batching; use generate with a padded batch")

    generate_batch = continuous_batching_context_manager = init_continuous_batching


# ------------------------------------------------------------------------------------------------- layers of a model


def initializer_range(config: PreTrainedConfig) -> float:
    """Standard deviation of new projections."""
    return getattr(config, "initializer_range", None) or 0.02


def has_memory(layer: nn.Module) -> bool:
    """Whether a decoder layer has a memory, in the place of attention or beside it."""
    return isinstance(layer.self_attn, MemoryAttention | ParallelAttention)


def build(base: PreTrainedModel, config: PreTrainedConfig, backend: str = "auto") -> dict[int, MemoryAttention | MemoryBlock]:
    """The memories that ``config`` speaks of and ``base`` has not got yet, started; those beside attention are blocks."""
    for group in plan.read(config):
        plan.indices(group.layers, len(base.layers))
    return {
        i: _layer(base, config, group, i, backend) for group in plan.read(config) for i in group.layers if not has_memory(base.layers[i])
    }


def install(base: PreTrainedModel, new: dict[int, MemoryAttention | MemoryBlock]) -> None:
    """Put memories in the place of attention, or beside it."""
    for i, memory in new.items():
        if isinstance(memory, MemoryAttention):
            base.layers[i].self_attn = memory
        else:
            attention = base.layers[i].self_attn
            attention.__class__, attention.memory = PARALLEL[type(attention)], memory


def adopt(model: PreTrainedModel, family: Family) -> None:
    """Make a model one of the class with memories, in place."""
    model.__class__ = family.models[type(model)]
    compat.record_outputs(model)


def _layer(base: PreTrainedModel, config: PreTrainedConfig, group: Memories, index: int, backend: str) -> MemoryAttention | MemoryBlock:
    layer, linearised, parallel = base.layers[index], group.init == "from_attention", group.mode == "parallel"
    if parallel and type(layer.self_attn) not in PARALLEL:
        raise TypeError(f"mode: 'parallel' needs the attention of the host's own class, got {type(layer.self_attn).__name__}")
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
    # Cast only now: the numbers drawn do not depend on the model's dtype.
    block = block.to(next(layer.parameters()).device, base.dtype).train(layer.training)
    return block if parallel else MemoryAttention(block, index, layer.self_attn if linearised else None).train(layer.training)


# ------------------------------------------------------------------------------------------------- making the classes


def _positional(method: Callable) -> list[str]:
    """The names of a method's arguments that may be given by their place."""
    return [name for name, p in inspect.signature(method).parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD][1:]


def _forward(host: type[PreTrainedModel]):
    names = _positional(host.forward)

    @compat.accepts_old_name
    @functools.wraps(host.forward)
    def forward(self, *args, **kwargs):
        return host.forward(self, **describe_batch(self, {**dict(zip(names, args, strict=False)), **kwargs}))

    return forward


def _prepare_inputs(host: type[PreTrainedModel]):
    original = host.prepare_inputs_for_generation
    names = _positional(original)

    @functools.wraps(original)  # generate looks at the names of the arguments
    def prepare_inputs_for_generation(self, *args, **kwargs):
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        return mask_of_tokens(original(self, **given), given.get("attention_mask"), given.get("is_first_iteration", False))

    return prepare_inputs_for_generation


def _model_class(host: type[PreTrainedModel], config: type[PreTrainedConfig], is_base: bool) -> type[PreTrainedModel]:
    what = "whose attention is replaced by memories, in the layers that ``config.miras`` names"
    body = {"__module__": __name__, "__doc__": f":class:`transformers.{host.__name__}` {what}.", "config_class": config,
            "__annotations__": {"config": config}}  # fmt: skip
    if is_base:
        body["forward"] = _forward(host)
    if issubclass(host, GenerationMixin):
        body["prepare_inputs_for_generation"] = _prepare_inputs(host)
    return type(f"Miras{host.__name__}", (MirasModelMixin, host), body)


def _family(module_name: str, base_name: str) -> Family:
    module = importlib.import_module(f"transformers.models.{module_name}.modeling_{module_name}")
    base = getattr(module, base_name)
    host = base.config_class
    what = "with the field ``miras``, see :mod:`miras_kernels.hf.plan`"
    body = {"__module__": __name__, "__doc__": f":class:`transformers.{host.__name__}` {what}.", "model_type": f"miras_{host.model_type}",
            "base_model_tp_plan": None, "miras": None, "__annotations__": {"miras": dict | None}}  # fmt: skip
    config = type(f"Miras{host.__name__}", (MirasConfigMixin, host), body)
    stem = base_name.removesuffix("Model").removesuffix("Text")
    attention = getattr(module, f"{stem}Attention")
    body = {"__module__": __name__, "__doc__": f":class:`{attention.__name__}` of transformers with a memory beside it."}
    PARALLEL[attention] = type(f"Miras{attention.__name__}", (ParallelAttention, attention), body)
    hosts = [base, *(getattr(module, stem + middle + head, None) for head in _HEADS for middle in ("", "Text"))]
    models = {cls: _model_class(cls, config, cls is base) for cls in hosts if cls is not None and cls.config_class is host}
    return Family(host, config, models[base], models)


def auto_map(model: type[PreTrainedModel]) -> dict[str, str]:
    """What ``config.json`` tells AutoClasses that do not know the model."""
    classes = {"AutoConfig": model.config_class, "AutoModel": FAMILIES[model.config_class].base, auto_class(model): model}
    return {name: f"{_SHIM}.{cls.__name__.removeprefix('FSDP')}" for name, cls in classes.items()}  # fully_shard renames classes


def auto_class(model: type[PreTrainedModel]) -> str:
    """The name of the AutoModel class that loads ``model``."""
    return "AutoModel" + next((head for head in _HEADS if model.__name__.endswith(head)), "")


def register(family: Family) -> None:
    """Make a family known to AutoConfig and the AutoModel classes."""
    FAMILIES[family.config] = family
    AutoConfig.register(family.config.model_type, family.config, exist_ok=True)
    for cls in family.models.values():
        getattr(transformers, auto_class(cls)).register(family.config, cls, exist_ok=True)


#: a host's configuration, or one with memories -> the family
FAMILIES: dict[type[PreTrainedConfig], Family] = {}
#: a host's attention -> the same with a memory beside it
PARALLEL: dict[type[nn.Module], type[nn.Module]] = {}
#: the names of the public classes made here
NAMES: list[str] = []
for _names in HOSTS.items():
    _made = _family(*_names)
    register(_made)
    FAMILIES[_made.host] = _made
    for _cls in (_made.config, *_made.models.values()):
        globals()[_cls.__name__] = _cls  # found by name: pickle, and imports
        NAMES.append(_cls.__name__)
globals().update({_cls.__name__: _cls for _cls in PARALLEL.values()})

__all__ = ["FAMILIES", "NAMES", "register", *NAMES]
