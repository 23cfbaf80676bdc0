"""Tiny random transformers models with memories, for the tests of miras_kernels.hf."""

from __future__ import annotations

import inspect
import math

import torch
import transformers

from miras_kernels.hf import Host, hosts, replace_attention
from miras_kernels.hf.compat import CACHE
from miras_kernels.versions import minor

ARCHITECTURES = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Gemma3")
#: what differs in the configurations of the other architectures; experts, layers without positions and every kind of window are there
EXPERTS = dict(num_experts=4, num_local_experts=4, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
LATENT = dict(
    EXPERTS, kv_lora_rank=12, q_lora_rank=10, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8, head_dim=4, first_k_dense_replace=1,
    n_shared_experts=1, n_group=1, topk_group=1, num_key_value_heads=4, topk_method="greedy",
)  # fmt: skip
WINDOWS = dict(sliding_window=6, layer_types=["sliding_attention", "full_attention", "sliding_attention"])
HOSTS = {
    **{name: {} for name in ARCHITECTURES},
    "Mixtral": EXPERTS,
    "Qwen2Moe": dict(EXPERTS, shared_expert_intermediate_size=16),
    "Qwen3Moe": EXPERTS,
    "Granite": {},
    "Phi3": dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5)),
    "Olmo2": {},
    "Olmo3": WINDOWS,
    "SmolLM3": dict(no_rope_layers=[1, 0, 1]),
    "GptOss": dict(EXPERTS, **WINDOWS),
    "Cohere": dict(use_qk_norm=True),
    "Cohere2": WINDOWS,
    "DeepseekV2": LATENT,
    "DeepseekV3": LATENT,
    "GPT2": dict(n_embd=32, n_head=4, n_layer=3, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "GPTNeoX": dict(hidden_size=32, rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5)),
}
MLP = ("l2_mlp", "memora", "moneta", "titans", "ttt_mlp", "yaad")
LENGTH, VOCAB, LAYERS = 13, 50, 3
#: where the padding is -> mask [2, LENGTH]
ROWS = {
    "left": ([0] * 5 + [1] * 8, [0] + [1] * 12),
    "right": ([1] * 8 + [0] * 5, [1] * 12 + [0]),
    "mixed": ([0] * 4 + [1] * 9, [1] * 6 + [0] * 7),
    "holes": ([0] + [1] * 3 + [0] * 3 + [1] * 6, [1] * 6 + [0] * 2 + [1] * 5),
}


def host(architecture) -> Host:
    """The row of an architecture."""
    return hosts.TABLE[architecture + ("TextModel" if architecture == "Gemma3" else "Model")][1]


def unavailable(architecture) -> str:
    """Why this version of transformers does not have an architecture; empty if it does."""
    if architecture not in ("Olmo2", "Olmo3", "Cohere2") or minor(transformers.__version__) > (5, 4):
        return ""
    return f"the {architecture}Config of transformers 5.4 refuses its own defaults (annotated as int) with a recent huggingface_hub"


def plain(architecture="Llama", *, kind="ForCausalLM", dtype=torch.float32, attention=None, seed=0, **options):
    """A model without memories, with SDPA where possible. Sliding windows are shorter than the texts; Qwen2's biases are not zero."""
    torch.manual_seed(seed)
    name = architecture + ("TextConfig" if architecture == "Gemma3" else "Config")
    sizes = dict(
        vocab_size=VOCAB, hidden_size=24, intermediate_size=32, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, max_position_embeddings=64, initializer_range=0.2, bos_token_id=None, eos_token_id=None, pad_token_id=0,
        attn_implementation=attention or ("eager" if architecture in ("Gemma2", "GptOss") else "sdpa"),
    )  # fmt: skip
    if architecture in ("Mistral", "Gemma2", "Gemma3"):
        sizes["sliding_window"] = 6
    known = inspect.signature(getattr(transformers, name)).parameters
    if architecture == "GPT2":
        sizes = {key: value for key, value in sizes.items() if key in known or key.startswith("attn_")}
    config = getattr(transformers, name)(**{**sizes, **HOSTS[architecture], **options})
    net = getattr(transformers, architecture + ("LMHeadModel" if (architecture, kind) == ("GPT2", "ForCausalLM") else kind))(config)
    for parameter in [p for name, p in net.named_parameters() if name.endswith("bias")]:
        torch.nn.init.normal_(parameter)
    return net.to(dtype)


def model(architecture="Llama", layers=None, *, preset="yaad_linear", mode="replace", init="new", backend="auto", conv_width=4,
          gate_rank=16, num_heads=None, chunk_size=4, **options):  # fmt: skip
    """The same with memories of ``chunk_size=4`` (``layers=()``: without)."""
    net = plain(architecture, **options)
    if layers == ():
        return net
    return replace_attention(net, preset, layers, mode=mode, init=init, chunk_size=chunk_size, backend=backend, conv_width=conv_width,
                             gate_rank=gate_rank, num_heads=num_heads)  # fmt: skip


def cache_of(outputs):
    """The cache among the outputs of a forward or of ``generate``, by its name in this version."""
    return getattr(outputs, CACHE)


def ids(batch=2, length=LENGTH, seed=1) -> torch.Tensor:
    return torch.randint(1, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def assert_close(x: torch.Tensor, y: torch.Tensor, terms: int = 4096):
    """Equal up to the order of summation: the bound is 8 times the error of ``terms`` roundings that add up like a random walk."""
    x, y = x.detach(), y.detach()
    assert x.shape == y.shape and torch.isfinite(x).all()
    error, bound = (x - y).norm().item(), 8 * math.sqrt(terms) * torch.finfo(x.dtype).eps * max(y.norm().item(), 1e-30)
    assert error <= bound, f"{error:.2e} > {bound:.2e}"


def gradients(net, **inputs) -> dict[str, torch.Tensor]:
    net.zero_grad()
    net(**inputs).loss.backward()
    return {n: p.grad.clone() for n, p in net.named_parameters()}
