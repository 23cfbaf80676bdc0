"""Memories in Hugging Face transformers (5.4 or later, below 6). The only part of the library that imports transformers.

**Existing models.** :func:`replace_attention` replaces attention by memories, in all layers or some, in place::

    from transformers import AutoModelForCausalLM
    from miras_kernels.hf import load, replace_attention

    model = AutoModelForCausalLM.from_pretrained(name)
    replace_attention(model, "yaad", layers=[1, 3, 5], init="from_attention")
    ...                                                     # train: Trainer, PEFT, torch.compile, DDP, FSDP2 as for any model
    model.generate(**tokenizer(prompts, padding=True, return_tensors="pt"), max_new_tokens=64)
    model.save_pretrained(folder)
    model = load(folder)                                    # or AutoModelForCausalLM.from_pretrained(folder)

With ``mode="parallel"`` attention stays and memories are added beside it, behind gates that are zero at first: the model's outputs do not
change until it is trained. Each layer of the cache then holds both keys and values and the memory's state.

**Keeping the quality.** A replaced model must be trained before it is of use. :func:`linearize` does it in stages: each memory learns
its attention layer's outputs, the layers that lose most get attention back, and the whole is finetuned; on the command line
``python -m miras_kernels linearize``. See docs/transformers.md.

**From scratch.** :class:`MirasConfig` and :class:`MirasForCausalLM` are the paper's model, see :mod:`miras_kernels.hf.model`.

**Linear attention that is there already.** :func:`accelerate` runs that of Qwen3-Next, Qwen3.5, OLMo hybrid and Kimi Linear on this
library's kernels, with their own weights, see :mod:`miras_kernels.hf.linear_attention`.

**Generation.** The state of the memories is in the model's own cache (:class:`MemoryCacheLayer`), in float32, and does not grow. Greedy
search, sampling, beam search, several sequences per prompt, chunked prefill and continuing from a cache all give the results of reading
the whole text at once. In static caches (``cache_implementation="static"``, :class:`~transformers.StaticCache`) the state is in buffers
of fixed addresses and decoding steps update it in place: a compiled step is one graph (``fullgraph=True``) and is not recompiled. Compile
the decoding steps and not the prefill, as ``generate`` does. Static caches have no gradients. The cache is the argument ``cache``
(``past_key_values`` before transformers 5.24, accepted with a warning until 5.40; :data:`.compat.CACHE`); a state under any other name is
refused. Quantized caches and continuous batching (``generate_batch``) are refused.
``python -m miras_kernels`` says whether the installed version of transformers is a tested one.

**Taking tokens back.** Assisted generation (``assistant_model=``, with memories in either model or both) and prompt lookup
(``prompt_lookup_num_tokens=``) give the texts of greedy search. ``generate`` tells the cache's layers to keep what they need for that;
elsewhere ``layer.keep(n)`` does, before the tokens are read that ``cache.crop(-m)`` takes back. See docs/transformers.md.

**Padding and packing.** The result of a padded row is that of its real tokens alone, wherever the padding is, and positions count real
tokens. (Attention layers behave as in transformers: padding between tokens counts in a sliding window.) Documents that are packed by
``position_ids`` (without a mask) or ``cu_seq_lens_q`` are separate sequences; they leave no cache. With ``torch.compile(model,
fullgraph=True)`` only ``cu_seq_lens_q`` can mark their bounds; its values are not checked.

**Training.** In training mode no cache is created unless ``use_cache=True``, and with gradient checkpointing a cache is refused.
``output_attentions`` is refused, since a memory has none. New parameters are named ``...self_attn.memory.*``
(``modules_to_save=["memory"]`` in PEFT); with ``init="from_attention"`` LoRA finds q_proj, k_proj, v_proj and o_proj under their old
names. PEFT has no default target modules for these models: pass ``target_modules=["q_proj", "v_proj"]`` or ``"all-linear"``. With
``mode="parallel"`` the memory's own projections have the same last names; ``r".*self_attn\\.[qv]_proj"`` selects those of attention
alone.

**Loading.** The classes are registered with AutoClasses when this package is imported. Parameters that a checkpoint lacks are initialised
as in :class:`~miras_kernels.layers.MemoryBlock`. A saved model's ``model_type`` is ``miras_llama`` ..., so that no other class loads it
as a plain model. ``save_pretrained`` also writes a README.md, if there is none, that says which memories the model has.
"""

from . import classes
from .attention import MemoryAttention
from .cache import MemoryCacheLayer
from .classes import *  # noqa: F403
from .classes import register_host
from .hosts import Host
from .linear_attention import accelerate
from .model import MirasConfig, MirasForCausalLM, MirasForSequenceClassification, MirasForTokenClassification, MirasModel
from .recipe import Linearized, linearize
from .replace import Report, load, memory_config, replace_attention, report
from .stages import Finetune, Rank, Transfer

__all__ = [
    "Finetune",
    "Host",
    "Linearized",
    "MemoryAttention",
    "MemoryCacheLayer",
    "MirasConfig",
    "MirasForCausalLM",
    "MirasForSequenceClassification",
    "MirasForTokenClassification",
    "MirasModel",
    "Rank",
    "Report",
    "Transfer",
    "accelerate",
    "linearize",
    "load",
    "memory_config",
    "register_host",
    "replace_attention",
    "report",
    *classes.NAMES,
]
