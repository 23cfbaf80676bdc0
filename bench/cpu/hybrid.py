"""The study "hybrid" of bench.cpu: a model in Qwen3.5's shape, random weights, as transformers runs it and by ``hf.accelerate``; and its
matrix products alone, which bound what kernels for the memory can gain."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn import functional as F

from ..common.implementations import BOTH, FORWARD, agreement
from ..common.timing import clock_for, timed
from .cases import Settings
from .studies import SAME, measure

#: direction, tokens
RUNS = {"prefill": (FORWARD, 2048), "training step": (BOTH, 512)}
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

    direction, tokens = RUNS[name]
    torch.manual_seed(0)
    theirs = transformers.Qwen3_5ForCausalLM(transformers.Qwen3_5TextConfig(**(TOY if settings.toy else SIZES)))
    ours = accelerate(copy.deepcopy(theirs))
    ids = torch.randint(1, theirs.config.vocab_size, (1, 24 if settings.toy else tokens))
    runs = {"accelerate": _model(ours, ids, direction), "transformers": _model(theirs, ids, direction)}
    error = agreement(runs["accelerate"](), runs["transformers"]())
    gate = {"ok": error <= SAME, "worst": {"tensor": "worst against transformers", "error": error, "budget": SAME}}
    runs["projections"] = _projections(theirs, ids, direction)
    samplers = {who: timed(run, clock_for(threads)[1]) for who, run in runs.items()}
    head = {"study": "hybrid", "case": name, "direction": direction}
    yield measure(head, samplers, "accelerate", dict.fromkeys(runs, gate), threads, settings)


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
    inputs = [torch.randn(1, ids.shape[1], x.shape[1], requires_grad=direction == BOTH) for x in weights]

    def run() -> tuple:
        for x, weight in zip(inputs, weights, strict=True):
            with torch.set_grad_enabled(direction == BOTH):
                out = F.linear(x, weight)
            if direction == BOTH:
                torch.autograd.grad(out, (x, weight), out.detach())
        return ()

    return run


STUDIES = {"hybrid": study_hybrid}
