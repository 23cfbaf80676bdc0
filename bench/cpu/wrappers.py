"""The study "wrappers" of bench.cpu: what a model of transformers adds to the time of its memories, its MLPs, norms and head aside."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from torch import nn

from ..common.implementations import BOTH, FORWARD, agreement
from ..common.timing import clock_for, timed
from .cases import Settings
from .studies import SAME, measure

#: preset, direction, tokens
RUNS = {
    f"{preset}, {name} of {tokens} tokens": (preset, direction, tokens)
    for preset in ("yaad_linear", "yaad")
    for name, direction in (("forward", FORWARD), ("training step", BOTH))
    for tokens in (128, 2048)
}
LAYERS, WIDTH, HEADS = 4, 256, 4


class Nothing(nn.Module):
    """In the place of an MLP."""

    def forward(self, x):
        return 0.0


def study_wrappers(name: str, threads: int, settings: Settings) -> Iterator[dict]:
    """A Llama whose attention has been replaced, without MLPs, norms, embedding and head; and its memory blocks one after another."""
    import transformers

    from miras_kernels.hf import replace_attention

    preset, direction, tokens = RUNS[name]
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=8, hidden_size=WIDTH, intermediate_size=8, num_hidden_layers=LAYERS,
                                      num_attention_heads=HEADS)  # fmt: skip
    model = replace_attention(transformers.LlamaForCausalLM(config), preset, backend=settings.backend).model
    model.norm = nn.Identity()
    for layer in model.layers:
        layer.mlp, layer.input_layernorm, layer.post_attention_layernorm = Nothing(), nn.Identity(), nn.Identity()
    inside = nn.ModuleList([layer.self_attn.memory for layer in model.layers])
    blocks = copy.deepcopy(inside)
    x = torch.randn(1, 20 if settings.toy else tokens, WIDTH, requires_grad=direction == BOTH)

    def bare() -> torch.Tensor:
        y = x
        for block in blocks:
            y = y + block(y)[0]
        return y

    whole = lambda: model(inputs_embeds=x, use_cache=False).last_hidden_state
    runs = {"blocks": _run(bare, x, blocks, direction), "model": _run(whole, x, inside, direction)}
    model.train(direction == BOTH)
    error = agreement(runs["model"](), runs["blocks"]())
    gate = {"ok": error <= SAME, "worst": {"tensor": "worst against the blocks", "error": error, "budget": SAME}}
    samplers = {who: timed(run, clock_for(threads)[1]) for who, run in runs.items()}
    head = {"study": "wrappers", "case": name, "direction": direction}
    yield measure(head, samplers, "blocks", dict.fromkeys(runs, gate), threads, settings)


def _run(forward: Callable[[], torch.Tensor], x: torch.Tensor, blocks: nn.Module, direction: str) -> Callable[[], tuple]:
    """The outputs; with a backward also the gradients of the inputs and of the blocks' parameters."""
    wanted = [x, *blocks.parameters()]

    def run() -> tuple:
        if direction == FORWARD:
            with torch.no_grad():
                return (forward(),)
        out = forward()
        return out.detach(), *torch.autograd.grad(out.square().mean(), wanted)

    return run


STUDIES = {"wrappers": study_wrappers}
