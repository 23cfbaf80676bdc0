"""The study "hybrid" of bench.cpu: a model in the shape of Qwen3.5-0.8B, random weights, as transformers runs it and by ``hf.accelerate``;
and its matrix products alone, which bound what kernels for the memory can gain."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn import functional as F

from ..common.implementations import BOTH, FORWARD, agreement
from ..common.results import machine
from ..common.timing import clock_for, timed
from .cases import Settings
from .studies import SAME, measure

#: direction, tokens, dtype; Qwen3.5 is published in bfloat16
RUNS = {
    f"{name}, {dtype}": (direction, tokens, getattr(torch, dtype))
    for name, direction, tokens in (("prefill", FORWARD, 2048), ("training step", BOTH, 512))
    for dtype in ("bfloat16", "float32")
}
#: three layers of linear attention and one of full attention; the 0.8B model has 24 layers and a vocabulary of 248,320
SIZES = dict(
    vocab_size=8192, hidden_size=1024, intermediate_size=3584, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2,
    head_dim=256, linear_num_key_heads=16, linear_num_value_heads=16, linear_key_head_dim=128, linear_value_head_dim=128, pad_token_id=0,
)  # fmt: skip
TOY = SIZES | dict(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16,
)  # fmt: skip


def study_hybrid(name: str, threads: int, settings: Settings) -> Iterator[dict]:
    """transformers' PyTorch, the same by ``accelerate``, and the products of all ``nn.Linear`` of the model."""
    import transformers

    from miras_kernels.hf import accelerate

    direction, tokens, dtype = RUNS[name]
    torch.manual_seed(0)
    theirs = transformers.Qwen3_5ForCausalLM(transformers.Qwen3_5TextConfig(**(TOY if settings.toy else SIZES))).to(dtype)
    ours = accelerate(copy.deepcopy(theirs))
    ids = torch.randint(1, theirs.config.vocab_size, (1, 24 if settings.toy else tokens))
    runs = {"accelerate": _model(ours, ids, direction), "transformers": _model(theirs, ids, direction)}
    expected, budget = runs["transformers"](), SAME
    if dtype == torch.bfloat16:  # a float32 model with the same weights, to which ours must be as close as transformers' is
        exact = _model(copy.deepcopy(theirs).float(), ids, direction)()
        budget = 2 * agreement(expected, exact) + torch.finfo(dtype).eps
        expected = exact
    error = agreement(runs["accelerate"](), expected)
    gate = {"ok": error <= budget, "worst": {"tensor": "worst against transformers", "error": error, "budget": budget}}
    runs["projections"] = _projections(theirs, ids, direction)
    samplers = {who: timed(run, clock_for(threads)[1]) for who, run in runs.items()}
    head = {"study": "hybrid", "case": name, "direction": direction}
    result = measure(head, samplers, "accelerate", dict.fromkeys(runs, gate), threads, settings)
    if dtype == torch.bfloat16 and not {"avx512_bf16", "amx_bf16"} & set(machine()["vector_flags"]):
        result["notes"].append("this CPU does not multiply in bfloat16: PyTorch converts, or computes otherwise")
    yield result


def _model(model: nn.Module, ids: torch.Tensor, direction: str) -> Callable[[], tuple]:
    """Logits of all tokens; with a backward the loss and the gradients of a layer's matrices."""
    model.train(direction == BOTH)

    def run() -> tuple:
        if direction == FORWARD:
            with torch.no_grad():
                return (model(ids, use_cache=False).logits,)
        model.zero_grad()
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        return loss.detach(), *(x.grad for x in model.model.layers[0].parameters() if x.dim() > 1)

    return run


def _projections(model: nn.Module, ids: torch.Tensor, direction: str) -> Callable[[], tuple]:
    weights = [x.weight for x in model.modules() if isinstance(x, nn.Linear)]
    inputs = [torch.randn(1, ids.shape[1], x.shape[1], dtype=x.dtype, requires_grad=direction == BOTH) for x in weights]

    def run() -> tuple:
        for x, weight in zip(inputs, weights, strict=True):
            with torch.set_grad_enabled(direction == BOTH):
                out = F.linear(x, weight)
            if direction == BOTH:
                torch.autograd.grad(out, (x, weight), out.detach())
        return ()

    return run


STUDIES = {"hybrid": study_hybrid}
