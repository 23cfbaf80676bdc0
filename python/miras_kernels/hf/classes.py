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
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import transformers
from torch import nn
from transformers import AutoConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.generation import GenerationMode

from ..layers import MemoryBlock
from . import compat, hosts, plan
from .attention import MemoryAttention, ParallelAttention, describe_batch, mask_of_tokens
from .cache import check_cache, memory_layer
from .card import replace_generated, write_card
from .hosts import Host
from .plan import Memories
from .quantised import leave_out_memories

_SHIM = "modeling_miras"
_GUESSES = 128  # tokens that assisted generation may have to take back, if it does not guess more at once
#: the end of a class' name -> that of its AutoModel class
_HEADS = {name: name for name in ("ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")}
_HEADS["LMHeadModel"] = "ForCausalLM"


class Family(NamedTuple):
    """The classes of one architecture."""

    original: type[PreTrainedConfig]  # its configuration in transformers
    config: type[PreTrainedConfig]  # ... with memories
    base: type[PreTrainedModel]  # the base model with memories
    models: dict[type[PreTrainedModel], type[PreTrainedModel]]  # original class -> the one with memories
    host: Host  # how its layers are built


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

    _tp_plan = None

    def __init__(self, config: PreTrainedConfig, *args, **kwargs):
        groups = plan.read(config)
        if not groups:
            raise ValueError(f"config.miras: {type(self).__name__} needs the layers that have memories, see miras_kernels.hf; got None")
        super().__init__(config, *args, **kwargs)
        base = self.base_model
        family = FAMILIES[self.config_class]
        if not isinstance(base, MirasModelMixin):  # created by the original __init__
            adopt(base, family)
        install(base, family.host, build(base, family.host, config, groups))

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
        if kwargs.get("quantization_config") is not None:
            kwargs["quantization_config"] = leave_out_memories(kwargs["quantization_config"])
        return super().from_pretrained(*args, **kwargs)

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, generation_mode, *args, **kwargs):
        """Also lets memories take back tokens where assisted generation will need that, of this model or of the one that it helps."""
        super()._prepare_cache_for_generation(generation_config, model_kwargs, generation_mode, *args, **kwargs)
        if generation_mode != GenerationMode.ASSISTED_GENERATION and not generation_config.is_assistant:
            return
        guesses = [getattr(generation_config, name, None) or 0 for name in ("prompt_lookup_num_tokens", "num_assistant_tokens")]
        cache, base = model_kwargs[compat.CACHE], self.base_model
        check_cache(cache)
        generation_config.disable_compile = True  # a state that takes back tokens is a value
        for i, layer in enumerate(hosts.attentions(base, FAMILIES[self.config_class].host)):
            if isinstance(layer, MemoryAttention | ParallelAttention):
                memory = memory_layer(cache, i, isinstance(layer, ParallelAttention))
                memory.keep(max(_GUESSES, 2 * max(guesses)))

    def save_pretrained(self, save_directory, is_main_process: bool = True, *args, **kwargs) -> None:
        """Also records in the configuration which classes load the model, and writes a README.md unless there is one."""
        self.config.auto_map = auto_map(type(self))
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        if is_main_process:
            write_card(self, save_directory)

    def _upload_modified_files(self, working_dir, *args, **kwargs):
        """Called by ``push_to_hub`` and ``save_pretrained(push_to_hub=True)``, after the card has been written."""
        replace_generated(self, working_dir)
        return super()._upload_modified_files(working_dir, *args, **kwargs)

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


def build(
    base: PreTrainedModel, host: Host, config: PreTrainedConfig, groups: list[Memories], backend: str = "auto"
) -> dict[int, MemoryAttention | MemoryBlock]:
    """New memories by layer, for the layers of ``groups`` that have none yet; a :class:`MemoryBlock` for one beside attention."""
    layers = hosts.attentions(base, host)
    for group in groups:
        plan.indices(group.layers, len(layers))
    return {
        i: _layer(base, layers[i], host, config, group, i, backend)
        for group in groups
        for i in group.layers
        if not isinstance(layers[i], MemoryAttention | ParallelAttention)
    }


def install(base: PreTrainedModel, host: Host, new: dict[int, MemoryAttention | MemoryBlock]) -> None:
    """Put memories in place of attention, or beside it."""
    for i, memory in new.items():
        layer = getattr(base, host.layers)[i]
        if isinstance(memory, MemoryAttention):
            setattr(layer, host.attention, memory)
        else:
            attention = getattr(layer, host.attention)
            attention.__class__, attention.memory = PARALLEL[type(attention)], memory


def adopt(model: PreTrainedModel, family: Family) -> None:
    """Change a model's class to the one with memories."""
    model.__class__ = family.models[type(model)]
    compat.record_outputs(model)


def _layer(
    base: PreTrainedModel, attention: nn.Module, host: Host, config: PreTrainedConfig, group: Memories, index: int, backend: str
) -> MemoryAttention | MemoryBlock:
    linearised, parallel, name = group.init == "from_attention", group.mode == "parallel", type(attention).__name__
    if parallel and type(attention) not in PARALLEL:
        raise TypeError(f"mode: 'parallel' needs the attention class of the original model, got {name}")
    absent = [x for x in (*(host.projections or ()), host.output) if linearised and not isinstance(getattr(attention, x, None), nn.Module)]
    if absent:
        raise ValueError(f"init: 'from_attention' needs the modules {', '.join(absent)}, which {name} (layer {index}) does not have")
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
    block = block.to(hosts.device_of(attention), base.dtype).train(attention.training)
    if parallel:
        return block
    return MemoryAttention(block, index, attention if linearised else None, host).train(attention.training)


# ------------------------------------------------------------------------------------------------- making the classes


def _positional(method: Callable) -> list[str]:
    """The names of a method's arguments that may be positional, without self."""
    return [name for name, p in inspect.signature(method).parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD][1:]


def _forward(original: type[PreTrainedModel], host: Host):
    names = _positional(original.forward)

    @compat.accepts_old_name
    @functools.wraps(original.forward)
    def forward(self, *args, **kwargs):
        return original.forward(self, **describe_batch(self, host, {**dict(zip(names, args, strict=False)), **kwargs}))

    return forward


def _prepare_inputs(original: type[PreTrainedModel]):
    method = original.prepare_inputs_for_generation
    names = _positional(method)

    @functools.wraps(method)  # generate inspects the names of the arguments
    def prepare_inputs_for_generation(self, *args, **kwargs):
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        return mask_of_tokens(method(self, **given), given.get("attention_mask"), given.get("is_first_iteration", False))

    return prepare_inputs_for_generation


def _model_class(original: type[PreTrainedModel], config: type[PreTrainedConfig], base_of: Host | None) -> type[PreTrainedModel]:
    what = "with memories in the layers that ``config.miras`` lists"
    body = {"__module__": __name__, "__doc__": f":class:`transformers.{original.__name__}` {what}.", "config_class": config,
            "__annotations__": {"config": config}}  # fmt: skip
    for name in ("_can_set_attn_implementation", "_can_set_experts_implementation"):  # they read the source of a class' module
        body[name] = classmethod(lambda cls, name=name: getattr(original, name)())
    if base_of is not None:
        body["forward"] = _forward(original, base_of)
    if issubclass(original, GenerationMixin):
        body["prepare_inputs_for_generation"] = _prepare_inputs(original)
    return type(f"Miras{original.__name__}", (MirasModelMixin, original), body)


def _parallel_class(attention: type[nn.Module], host: Host) -> type[nn.Module]:
    body = {"__module__": __name__, "__doc__": f":class:`{attention.__name__}` with a memory beside it.", "host": host}
    return type(f"Miras{attention.__name__}", (ParallelAttention, attention), body)


def _family(base: type[PreTrainedModel], heads: Iterable[type[PreTrainedModel]], attention: type[nn.Module] | None, host: Host) -> Family:
    """Makes the classes of an architecture and registers them."""
    original = base.config_class
    what = "with the field ``miras``, see :mod:`miras_kernels.hf.plan`"
    body = {"__module__": __name__, "__doc__": f":class:`transformers.{original.__name__}` {what}.",
            "model_type": f"miras_{original.model_type}",
            "base_model_tp_plan": None, "miras": None, "__annotations__": {"miras": dict | None}}  # fmt: skip
    config = type(f"Miras{original.__name__}", (MirasConfigMixin, original), body)
    models = {cls: _model_class(cls, config, host if cls is base else None) for cls in (base, *heads) if cls.config_class is original}
    family = Family(original, config, models[base], models, host)
    register(family)
    FAMILIES[original] = family
    made = [config, *models.values()]
    if attention is not None:
        PARALLEL[attention] = _parallel_class(attention, host)
        globals()[PARALLEL[attention].__name__] = PARALLEL[attention]
    for cls in made:  # for imports and pickle
        globals()[cls.__name__] = cls
    NAMES.extend(cls.__name__ for cls in made)
    return family


def _from_table(base_name: str, module_name: str, host: Host) -> None:
    module = importlib.import_module(f"transformers.models.{module_name}.modeling_{module_name}")
    stem = base_name.removesuffix("Model").removesuffix("Text")
    heads = [getattr(module, stem + middle + head, None) for head in _HEADS for middle in ("", "Text")]
    _family(getattr(module, base_name), [cls for cls in heads if cls is not None], getattr(module, f"{stem}Attention"), host)


def register_host(
    base: type[PreTrainedModel], *heads: type[PreTrainedModel], attention_class: type[nn.Module] | None = None, **names: Any
) -> type[PreTrainedModel]:
    """Let :func:`replace_attention` change models of an architecture that it does not know.

    ::

        miras_kernels.hf.register_host(MyModel, MyForCausalLM, layers="blocks", attention="mixer")

    Every process that loads such a model with memories has to make the same call first.

    Args:
        base: the base model, without a head; with its own ``config_class``.
        heads: models that contain it; their names end as those of transformers do (``ForCausalLM``, ``ForSequenceClassification`` ...).
        attention_class: the class of attention modules, for ``mode="parallel"``.
        names: what differs from Llama: the arguments of :class:`~miras_kernels.hf.hosts.Host`.

    Returns:
        The class of the base model with memories.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    host = Host(**names)
    for cls in (base, *heads):
        if not isinstance(cls, type) or not issubclass(cls, PreTrainedModel):
            raise TypeError(f"base, heads: expected subclasses of PreTrainedModel, got {cls!r}")
        if cls.config_class is None or cls.config_class in (PreTrainedConfig, *FAMILIES) or cls.config_class is not base.config_class:
            raise ValueError(
                f"config_class: expected a class of its own, not registered before, the same for {base.__name__} and its heads; got "
                f"{getattr(cls.config_class, '__name__', None)} in {cls.__name__}"
            )
        if cls is not base and auto_class(cls) == "AutoModel":
            raise ValueError(f"heads: expected names that end in {', '.join(_HEADS)}, got {cls.__name__}")
    if not hosts.hands_on(base.forward):
        raise TypeError(f"base: {base.__name__}.forward must take **kwargs and hand them on to its layers")
    return _family(base, heads, attention_class, host).base


def auto_map(model: type[PreTrainedModel]) -> dict[str, str]:
    """The classes by AutoClass, for ``config.json``."""
    classes = {"AutoConfig": model.config_class, "AutoModel": FAMILIES[model.config_class].base, auto_class(model): model}
    return {name: f"{_SHIM}.{cls.__name__.removeprefix('FSDP')}" for name, cls in classes.items()}  # fully_shard renames classes


def auto_class(model: type[PreTrainedModel]) -> str:
    """The name of the AutoModel class that loads ``model``."""
    return "AutoModel" + next((auto for head, auto in _HEADS.items() if model.__name__.endswith(head)), "")


def register(family: Family) -> None:
    """Register a family with AutoConfig and the AutoModel classes."""
    FAMILIES[family.config] = family
    AutoConfig.register(family.config.model_type, family.config, exist_ok=True)
    compat.register_conversions(family.config.model_type, family.original.model_type)
    for cls in family.models.values():
        getattr(transformers, auto_class(cls)).register(family.config, cls, exist_ok=True)


#: configuration class, with or without memories -> family
FAMILIES: dict[type[PreTrainedConfig], Family] = {}
#: attention class -> the same with a memory beside it
PARALLEL: dict[type[nn.Module], type[nn.Module]] = {}
#: the names of the public classes created here
NAMES: list[str] = []
for _name, (_module, _host) in hosts.TABLE.items():
    _from_table(_name, _module, _host)

__all__ = ["FAMILIES", "NAMES", "register", "register_host", *NAMES]
