"""Memories inside Hugging Face transformers (5.4 or later, below 6). The only part of the library that imports transformers.

**Into an existing model.** :func:`replace_attention` puts memories in the place of attention, in all layers or some, in place::

    from transformers import AutoModelForCausalLM
    from miras_kernels.hf import load, replace_attention

    model = AutoModelForCausalLM.from_pretrained(name)
    replace_attention(model, "yaad", layers=[1, 3, 5], init="from_attention")
    ...                                                     # train: Trainer, PEFT, torch.compile, DDP, FSDP2 as for any model
    model.generate(**tokenizer(prompts, padding=True, return_tensors="pt"), max_new_tokens=64)
    model.save_pretrained(folder)
    model = load(folder)                                    # or AutoModelForCausalLM.from_pretrained(folder)

With ``mode="parallel"`` attention stays and memories are added beside it, behind gates that are zero at the start: the model begins as what
it was, and one layer of the cache holds both the keys and values and the state.

**From scratch.** :class:`MirasConfig` and :class:`MirasForCausalLM` are the paper's model, see :mod:`miras_kernels.hf.model`.

**Linear attention that is there already.** :func:`accelerate` runs that of Qwen3-Next, Qwen3.5, OLMo hybrid and Kimi Linear on this
library's kernels, with their own weights, see :mod:`miras_kernels.hf.linear_attention`.

**Generation.** The memories' state lies in the model's own cache (:class:`MemoryCacheLayer`), in float32, and does not grow. Greedy
search, sampling, beams, several sequences a prompt, chunked prefill and going on with a cache all give what reading the whole text
again would. Static caches (``cache_implementation="static"``, :class:`~transformers.StaticCache`) hold it in buffers of fixed
addresses, and single tokens are read in place: a compiled step is one graph (``fullgraph=True``), which is not compiled again.
Compile the steps and not the prompt, as ``generate`` does. Static caches carry no gradients. The cache is the argument ``cache``
(``past_key_values`` before transformers 5.24, with a warning until 5.40; :data:`.compat.CACHE`); a state under any other name is
refused. Quantized caches, assisted generation, prompt lookup, continuous batching (``generate_batch``) and cropping a cache are
refused. ``python -m miras_kernels`` tells whether the installed version of transformers is a tested one.

**Padding and packing.** A padded row's result is that of its real tokens alone, wherever the padding stands, and positions count
real tokens. (Attention that is left has its host's habits: padding between tokens counts in a sliding window.) Documents packed by
``position_ids`` (without a mask) or ``cu_seq_lens_q`` are separate; they leave no cache. With ``torch.compile(model,
fullgraph=True)`` only ``cu_seq_lens_q`` can tell where they begin, whose values nobody looks at.

**Training.** In training mode no cache is made unless asked for (``use_cache=True``), and with gradient checkpointing a given one
is refused. ``output_attentions`` is refused: a memory has none. What is new is ``...self_attn.memory.*``
(``modules_to_save=["memory"]`` in PEFT); with ``init="from_attention"`` LoRA finds q_proj, k_proj, v_proj and o_proj where they
were. PEFT has no default for these models, and no place to register one: name them, as in ``target_modules=["q_proj", "v_proj"]``
(or ``"all-linear"``); beside attention a memory's own have the same last names, and ``r".*self_attn\\.[qv]_proj"`` means those of
attention alone.

**Loading.** The classes are registered with AutoClasses when this package is imported. Tensors that a checkpoint lacks start as in
:class:`~miras_kernels.layers.MemoryBlock`; the others stay as loaded. A saved model's ``model_type`` is ``miras_llama`` ..., so that
no other class takes it for a plain one.
"""

from . import classes
from .attention import MemoryAttention
from .cache import MemoryCacheLayer
from .classes import *  # noqa: F403
from .linear_attention import accelerate
from .model import MirasConfig, MirasForCausalLM, MirasForSequenceClassification, MirasForTokenClassification, MirasModel
from .replace import Report, load, memory_config, replace_attention, report

__all__ = [
    "MemoryAttention",
    "MemoryCacheLayer",
    "MirasConfig",
    "MirasForCausalLM",
    "MirasForSequenceClassification",
    "MirasForTokenClassification",
    "MirasModel",
    "Report",
    "accelerate",
    "load",
    "memory_config",
    "replace_attention",
    "report",
    *classes.NAMES,
]
