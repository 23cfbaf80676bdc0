"""The model of the Miras paper as a transformers model, for training from scratch.

A stack of decoder layers, each ``x + memory(norm(x))`` and then ``x + mlp(norm(x))``: the memory is a
:class:`~miras_kernels.layers.MemoryBlock`, the MLP a SwiGLU, the norms are RMSNorm (Miras, arXiv 2504.13173, section 5.3). Some
layers may be sliding-window attention with rotary positions instead (the paper's hybrid). It is a Mistral model with memories and
shares all its code, so it trains, generates, saves and loads like the models of :func:`~miras_kernels.hf.replace_attention` ::

    from transformers import AutoModelForCausalLM
    from miras_kernels.hf import MirasConfig, MirasForCausalLM

    model = MirasForCausalLM(MirasConfig(vocab_size=256, hidden_size=256, num_hidden_layers=4, num_attention_heads=4, preset="yaad"))
    model.save_pretrained("here")
    model = AutoModelForCausalLM.from_pretrained("here")
"""

from huggingface_hub.dataclasses import strict
from transformers import MistralConfig
from transformers.models.mistral import modeling_mistral as mistral

from ..layers.presets import resolve
from . import classes, plan
from .classes import Family, MirasConfigMixin, register

__all__ = ["MirasConfig", "MirasForCausalLM", "MirasForSequenceClassification", "MirasForTokenClassification", "MirasModel"]


@strict
class MirasConfig(MirasConfigMixin, MistralConfig):
    """The configuration of a :class:`MirasForCausalLM`; all other arguments are those of MistralConfig.

    Args:
        preset: a name from :data:`miras_kernels.layers.PRESETS`; its values are saved (field ``miras``).
        chunk_size: overrides the preset's.
        conv_width, gate_rank: see :class:`~miras_kernels.layers.MemoryBlock`.
        attention_layers: indices of the layers that are sliding-window attention instead; none by default, at most all but one.
        sliding_window: number of tokens such a layer attends to.
        num_attention_heads, head_dim: of memories and attention; ``num_key_value_heads`` of attention (by default the same number).

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """

    model_type = "miras"
    base_model_tp_plan = None

    hidden_size: int = 768
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    sliding_window: int | None = 512
    preset: str = "yaad"
    chunk_size: int | None = None
    conv_width: int = 4
    gate_rank: int = 16
    attention_layers: list[int] | tuple[int, ...] = ()
    miras: dict | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.attention_layers = list(self.attention_layers)
        if self.miras is not None:  # from a saved configuration
            return
        for i in self.attention_layers:
            if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < self.num_hidden_layers:
                raise ValueError(f"attention_layers: expected indices from 0 to {self.num_hidden_layers - 1}, got {i!r}")
        layers = tuple(i for i in range(self.num_hidden_layers) if i not in self.attention_layers)
        if not layers:
            raise ValueError("attention_layers: expected at least one layer to be a memory, got all layers")
        rule = resolve(self.preset, self.chunk_size)
        self.miras = plan.write([plan.Memories(layers, rule, self.num_attention_heads, self.head_dim, self.conv_width, self.gate_rank)])


class MirasModel(classes.MirasMistralModel):
    """The stack without a head: :class:`transformers.MistralModel` with memories."""

    config_class = MirasConfig
    config: MirasConfig


class MirasForCausalLM(classes.MirasMistralForCausalLM):
    """The language model: :class:`transformers.MistralForCausalLM` with memories, randomly initialised."""

    config_class = MirasConfig
    config: MirasConfig


class MirasForSequenceClassification(classes.MirasMistralForSequenceClassification):
    """:class:`MirasModel` with a head for sequences."""

    config_class = MirasConfig
    config: MirasConfig


class MirasForTokenClassification(classes.MirasMistralForTokenClassification):
    """:class:`MirasModel` with a head for tokens."""

    config_class = MirasConfig
    config: MirasConfig


register(
    Family(
        MistralConfig,
        MirasConfig,
        MirasModel,
        {
            mistral.MistralModel: MirasModel,
            mistral.MistralForCausalLM: MirasForCausalLM,
            mistral.MistralForSequenceClassification: MirasForSequenceClassification,
            mistral.MistralForTokenClassification: MirasForTokenClassification,
        },
        classes.FAMILIES[MistralConfig].host,
    )
)
