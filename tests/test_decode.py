"""Token by token in place: the same numbers as the whole sequence at once, whatever the memory, the gate and the place in a chunk."""

from __future__ import annotations

import itertools

import pytest
import torch

import miras_kernels as mk
from miras_kernels.testing import Case, registry, relative_error

PAIRS = [case for case in registry() if "-pairs-" in case.name and case.lengths is None and case.initial != "none"]


def decoder(case: Case, arguments: dict, state: mk.MemoryState, backend: str) -> mk.Decoder:
    norm = {name: arguments[name] for name in ("ln_weight", "ln_bias", "ln_eps") if name in arguments}
    settings = {name: arguments[name] for name in ("chunk_size", "bias", "retention")}
    return mk.Decoder(state, **settings, **norm, channel_wise_decay=case.decay.endswith("channel"), backend=backend)


def cut(arguments: dict, a: int, b: int) -> dict:
    """The per-token arguments of some tokens."""
    return {n: x[:, a:b] if isinstance(x, torch.Tensor) else x for n, x in arguments.items() if n in TOKENS and x is not None}


TOKENS = ("q", "k", "v", "lr", "log_decay", "delta", "momentum")


@torch.no_grad()
def read(case: Case, inputs, backend: str, cuts) -> tuple[torch.Tensor, mk.MemoryState, torch.Tensor, mk.MemoryState]:
    """Outputs and state of a decoder that begins after a prompt of ``cuts[0]`` tokens, and those of the whole."""
    arguments = inputs.arguments()
    memory = mk.linear_memory if case.memory == "linear" else mk.mlp_memory
    whole, final = memory(**arguments, backend="reference")
    prompt = {**arguments, **cut(arguments, 0, cuts[0])}
    _, state = memory(**prompt, backend="reference")
    reader = decoder(case, arguments, state, backend)
    outs = [reader.step(**cut(arguments, a, b)) for a, b in itertools.pairwise(cuts)]
    return torch.cat(outs, 1), reader.state(), whole[:, cuts[0] :], final


@pytest.mark.parametrize("case", PAIRS, ids=str)
def test_steps_continue_a_prompt(case):
    inputs = case.draw(torch.float64)
    out, state, wanted, final = read(case, inputs, "reference", [13, 14, 15, 16, 17, 20, case.tokens])
    assert relative_error(out, wanted) < 1e-12
    for x, y in zip(state.dual, final.dual, strict=True):
        assert relative_error(x, y) < 1e-12
