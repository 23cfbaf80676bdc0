"""Put memories into an existing model, in place of attention or beside it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable
from pathlib import Path

import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from ..layers import Preset
from ..layers.presets import resolve
from . import compat, plan
from .attention import MemoryAttention, ParallelAttention
from .classes import FAMILIES, Family, adopt, build, install
from .hosts import TABLE, attentions, device_of, missing
from .plan import Memories
from .quantised import check_projections, leave_out_of

__all__ = ["Report", "load", "memory_config", "replace_attention", "report"]


def replace_attention(
    model: PreTrainedModel,
    preset: str | Preset = "yaad_linear",
    layers: str | Iterable[int] | None = None,
    *,
    mode: str = "replace",
    init: str = "new",
    num_heads: int | None = None,
    head_dim: int | None = None,
    chunk_size: int | None = None,
    conv_width: int = 4,
    gate_rank: int = 16,
    backend: str = "auto",
) -> PreTrainedModel:
    """Replace the attention of a model by memories, in place, or add them to it.

    The architectures are those of :data:`miras_kernels.hf.hosts.TABLE`: Llama, Mistral, Mixtral, Qwen 2 and 3 (also with experts),
    Gemma 1 to 3, Granite, Phi-3, OLMo 2 and 3, SmolLM3, GPT-OSS, Cohere 1 and 2, DeepSeek V2 and V3, GPT-2 and GPT-NeoX;
    :func:`register_host` adds others. In a model for images and text whose text model is one of these (LLaVA ...), the layers of the
    text model are replaced.

    The model's class changes to the one with memories (``LlamaForCausalLM`` becomes ``MirasLlamaForCausalLM``, with its own
    configuration), which saves, loads, generates and trains like the original. The other layers keep their attention; a second call
    can replace them, with another preset.

    The new layers are :class:`~miras_kernels.layers.MemoryBlock` in the model's dtype and on the layer's device, initialised from
    torch's random generator with the model's ``initializer_range``. *A pretrained model whose attention has been replaced must be
    trained before it is of use again* (:func:`linearize`). All new parameters are named ``...self_attn.memory.*`` (``attn`` in GPT-2,
    ``attention`` in GPT-NeoX); :func:`report` lists them.

    Args:
        model: a ``PreTrainedModel`` of these architectures, with any of transformers' heads for text, on real devices and not wrapped.
            Pass the whole model, not the base model inside it: its own class and configuration must change too.
        preset: see :data:`miras_kernels.layers.PRESETS`.
        layers: indices of the decoder layers to replace; None or ``"all"`` for all.
        mode: ``"replace"``; or ``"parallel"``: attention stays and a memory's output is added, multiplied by a gate
            (``memory.output_gate``, one number per channel) that is zero at first, so that the model's outputs do not change.
        init: ``"new"``: the memory has its own projections, and no position embedding. ``"from_attention"``, for linearising a
            pretrained model: the memory uses the layer's q_proj, k_proj, v_proj and o_proj (the same modules, under the same
            names, fused ones too; also the norms of queries and keys), grouped keys and values are repeated for all heads,
            queries and keys keep their rotary position embedding, and the convolution is initialised to the identity. A sliding
            window, attention sinks and dropout inside of attention are dropped. DeepSeek's compressed keys and values are refused.
        num_heads, head_dim: by default those of the model's queries; not allowed with ``init="from_attention"``, which uses those.
        chunk_size, conv_width, gate_rank, backend: see :class:`~miras_kernels.layers.MemoryBlock`. The backend is not saved.

    Returns:
        The same model.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came. The model is then unchanged.
    """
    compat.warn_if_untested()
    part, family = _part(model)
    base, old = part.base_model, part.config
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError("model: expected one without adapters (replace attention first, then add them), got one with adapters")
    config, group = _add_memories(
        old, preset, layers, mode=mode, init=init, num_heads=num_heads, head_dim=head_dim, chunk_size=chunk_size,
        conv_width=conv_width, gate_rank=gate_rank,
    )  # fmt: skip
    layers_of_base = attentions(base, family.host)
    for i in plan.indices(group.layers, len(layers_of_base)):
        if device_of(layers_of_base[i]).type == "meta":
            raise ValueError(
                f"model: layer {i} has no data (meta device); expected a model whose weights are loaded (or load them with "
                f"from_pretrained of {family.base.__name__} or another class with memories and config=memory_config(...))"
            )
        if init == "from_attention":
            inner = group.num_heads * (group.head_dim or config.hidden_size // group.num_heads)
            check_projections(layers_of_base[i], family.host, i, base.dtype, (config.hidden_size, inner))
    new = build(base, family.host, config, [group], backend)
    changed = {id(old): config}
    if model.config is not old:  # that of a model for images and text, which other models may share too
        outer = changed[id(model.config)] = copy.deepcopy(model.config)
        leave_out_of(outer)
        setattr(outer, next(name for name, value in vars(model.config).items() if value is old), config)
    for module in model.modules():
        for name, value in vars(module).items():
            if id(value) in changed:
                setattr(module, name, changed[id(value)])
    for x in {id(x): x for x in (part, base)}.values():
        if type(x) in family.models:
            adopt(x, family)
    install(base, family.host, new)
    return model


def memory_config(
    config: PreTrainedConfig,
    preset: str | Preset = "yaad_linear",
    layers: str | Iterable[int] | None = None,
    *,
    mode: str = "replace",
    init: str = "new",
    num_heads: int | None = None,
    head_dim: int | None = None,
    chunk_size: int | None = None,
    conv_width: int = 4,
    gate_rank: int = 16,
) -> PreTrainedConfig:
    """The configuration of a model with memories: a copy of a given one (which may have memories in other layers), with more memories.

    For models that :func:`replace_attention` cannot change in place: a checkpoint that is sharded over devices, quantised, or loaded
    without ever creating a model of the original class ::

        config = memory_config(AutoConfig.from_pretrained(name), "yaad", init="from_attention")
        model = MirasLlamaForCausalLM.from_pretrained(name, config=config)    # initialises self_attn.memory.*, loads everything else

    Args:
        config: of one of the supported architectures. The other arguments are those of :func:`replace_attention`.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    new, _ = _add_memories(
        config, preset, layers, mode=mode, init=init, num_heads=num_heads, head_dim=head_dim, chunk_size=chunk_size,
        conv_width=conv_width, gate_rank=gate_rank,
    )  # fmt: skip
    return new


def _add_memories(
    config: PreTrainedConfig, preset: str | Preset, layers: str | Iterable[int] | None, *, mode: str, init: str, num_heads: int | None,
    head_dim: int | None, chunk_size: int | None, conv_width: int, gate_rank: int,
) -> tuple[PreTrainedConfig, Memories]:  # fmt: skip
    """The configuration of :func:`memory_config`, and the memories that it adds."""
    family = FAMILIES.get(type(config))
    if family is None:
        names = ", ".join(kind.__name__ for kind in dict.fromkeys(family.original for family in FAMILIES.values()))
        raise TypeError(f"config: expected a configuration of one of the classes {names}, got {type(config).__name__}")
    if getattr(config, "use_bidirectional_attention", None) or getattr(config, "is_causal", True) is False:
        raise ValueError("model: a memory reads causally; expected a model with causal attention, got one with bidirectional attention")
    before = plan.read(config)
    chosen = plan.indices(layers, config.num_hidden_layers, [i for group in before for i in group.layers])
    if init == "from_attention" and family.host.projections is None:
        raise ValueError(
            f"init: {family.original.__name__} has compressed keys and values (multi-head latent attention), which a memory cannot use; "
            "expected 'new', got 'from_attention'"
        )
    heads, size = _heads(config, family.host.head_dim, mode, init, num_heads, head_dim)
    group = Memories(chosen, resolve(preset, chunk_size), heads, size, conv_width, gate_rank, init, mode)
    new = copy.deepcopy(config)
    leave_out_of(new)
    new.__class__ = family.config
    new.miras = plan.write([*before, group])
    return new, group


def load(path: str | Path, **kwargs) -> PreTrainedModel:
    """Load a model with memories that ``save_pretrained`` has written, as an instance of the class that was saved.

    The same as ``from_pretrained`` of that class, or (once ``miras_kernels.hf`` has been imported) of the AutoModel class for its
    head. Where it has not been imported but is installed, AutoModel classes load the model with ``trust_remote_code=True``.

    Args:
        path: the folder, or a model's name on the Hub.
        kwargs: of ``from_pretrained`` (``dtype``, ``device_map`` ...).

    Raises:
        ValueError: the folder has no model with memories.
    """
    config = AutoConfig.from_pretrained(path)
    names = {cls.__name__: cls for family in FAMILIES.values() for cls in family.models.values()}
    saved = (config.architectures or ["no class"])[0]
    if plan.read(config.get_text_config()) and hasattr(transformers, saved):  # a model for images and text
        return getattr(transformers, saved).from_pretrained(path, **kwargs)
    if saved not in names:
        raise ValueError(
            f"path: expected a model with memories (saved after replace_attention), got {saved} of type {config.model_type!r} in {path}"
        )
    return names[saved].from_pretrained(path, **kwargs)


@dataclasses.dataclass(frozen=True)
class Report:
    """Names of the parameters in the layers that have memories.

    Attributes:
        copied: parameters taken from attention.
        new: parameters of the memories.
        sizes: name -> number of elements.
    """

    copied: tuple[str, ...]
    new: tuple[str, ...]
    sizes: dict[str, int] = dataclasses.field(repr=False)

    def __str__(self) -> str:
        lines = []
        for title in ("copied", "new"):
            names = getattr(self, title)
            lines.append(f"{title}: {len(names)} tensors, {sum(self.sizes[name] for name in names):,} values")
            lines += [f"  {name}  {self.sizes[name]:,}" for name in names]
        return "\n".join(lines)


def report(model: PreTrainedModel) -> Report:
    """Which parameters of a model's memories were taken from attention, and which are new.

    To train only the new ones first, as recipes for linearising do (RADLADS, LoLCATs)::

        new = set(report(model).new)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in new)
    """
    copied, new = [], []
    for prefix, module in model.named_modules():
        if isinstance(module, MemoryAttention | ParallelAttention):
            new += [f"{prefix}.memory.{name}" for name, _ in module.memory.named_parameters()]
        if isinstance(module, MemoryAttention):
            copied += [f"{prefix}.{name}" for name, _ in module.named_parameters() if name.split(".")[0] != "memory"]
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    return Report(tuple(copied), tuple(new), {name: sizes[name] for name in [*copied, *new]})


# ---------------------------------------------------------------------------------------------------- checks


def _part(model: object) -> tuple[PreTrainedModel, Family]:
    """The model whose class changes, with its family: the given one, or the text model inside it."""
    if not isinstance(model, PreTrainedModel) or type(model).__name__.startswith("FSDP"):
        raise TypeError(f"model: expected a transformers model (not wrapped, not compiled), got {type(model).__name__}")
    family, text = FAMILIES.get(type(model.config)), model.config.get_text_config()
    if family is not None and type(model) in {*family.models, *family.models.values()}:
        reasons = missing(model, family.host)
        if reasons:
            raise TypeError(f"model: {type(model).__name__} is not built as its architecture: {'; '.join(reasons)}")
        return model, family
    if model.config.model_type in ("gemma3", "paligemma"):
        raise TypeError(
            f"model: {type(model).__name__} attends to the tokens of an image in both directions, and a memory reads causally; expected "
            f"its text model alone, or a model that reads images causally (LLaVA ...)"
        )
    if family is None and text is not model.config and type(text) in FAMILIES:
        family = FAMILIES[type(text)]
        for part in model.modules():
            if isinstance(part, PreTrainedModel) and part.config is text and type(part) in {*family.models, *family.models.values()}:
                return part, family
    if family is not None:
        raise TypeError(
            f"model: expected one built on {family.base.__name__.removeprefix('Miras')} with a head of transformers for text, got "
            f"{type(model).__name__}"
        )
    reasons = missing(model)
    raise TypeError(
        f"model: expected one built on {', '.join(TABLE)}, got {type(model).__name__}. "
        + ("A memory cannot replace its attention: " + "; ".join(reasons) if reasons else "It may be registered")
        + ". See miras_kernels.hf.register_host, which says what an architecture needs and how to name its parts"
    )


def _heads(
    config: PreTrainedConfig, size_name: str, mode: str, init: str, num_heads: int | None, head_dim: int | None
) -> tuple[int, int | None]:
    for name, given, choices in (("mode", mode, plan.MODES), ("init", init, plan.INITS)):
        if given not in choices:
            raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {given!r}")
    if mode == "parallel" and init != "new":
        raise ValueError(f"init: with mode='parallel' attention keeps its projections; expected 'new', got {init!r}")
    own = getattr(config, size_name, None) or config.hidden_size // config.num_attention_heads
    if init == "from_attention":
        for name, size in (("num_heads", num_heads), ("head_dim", head_dim)):
            if size is not None:
                raise ValueError(f"{name}: with init='from_attention' it is that of the attention layer; expected None, got {size!r}")
    if num_heads is None:
        return config.num_attention_heads, own if head_dim is None else head_dim
    return num_heads, head_dim
