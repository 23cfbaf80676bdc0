"""The ways in which the fuzzer computes the results of a case: in one call, in pieces, sequence by sequence, permuted, at a limit."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from operator import itemgetter

import torch
from torch import Tensor

from ..call import Call
from ..state import MemoryState
from ..tables import memories
from ..tables.biases import L2, CustomBias, Huber, RobustL2
from ..tables.retention import CustomRetention, ElasticNetRetention, L2Retention, LqRetention
from ..validation import make_call
from .cases import Case, Inputs
from .parity import evaluate

__all__ = ["ROUTES", "of_tokens", "results_of"]

TOKENS = Call.PER_TOKEN


def results_of(case: Case, arguments: dict, run: str | Callable) -> tuple[Tensor, MemoryState]:
    """Outputs and state; ``run`` is a backend's name or a function of a :class:`~miras_kernels.call.Call`."""
    if callable(run):
        tokens = [arguments[name] for name in TOKENS[:5]]
        rest = {name: x for name, x in arguments.items() if name not in TOKENS[:5]}
        return run(make_call(memories.TABLE[case.memory], *tokens, **rest))
    out, state = case.function(**arguments, backend=run)
    assert state is not None, "output_final_state is set"
    return out, state


def _named(out: Tensor, state: MemoryState) -> dict[str, Tensor]:
    results = {"out": out} | {f"final_dual_{i}": x for i, x in enumerate(state.dual)}
    return results | {f"final_momentum_{i}": x for i, x in enumerate(state.momentum or ())}


def of_tokens(arguments: dict, function: Callable[[Tensor], Tensor]) -> dict:
    return arguments | {name: function(x) for name, x in arguments.items() if name in TOKENS and isinstance(x, Tensor)}


def _of_states(state: MemoryState | tuple | Tensor | None, function: Callable[[Tensor], Tensor]):
    if state is None or isinstance(state, MemoryState):
        return None if state is None else state.map(function)
    return tuple(map(function, state)) if isinstance(state, tuple) else function(state)


def _one_call(inputs: Inputs, run, at: int) -> dict[str, Tensor]:
    """Outputs, states and every gradient."""
    return evaluate(inputs, run)


@torch.no_grad()
def _in_pieces(inputs: Inputs, run, at: int) -> dict[str, Tensor]:
    """Piece by piece, each from the state of the one before: split at ``at``, after one more token, and in the middle of the rest."""
    arguments, case = inputs.arguments(), inputs.case
    length = inputs.tensors["q"].shape[1]
    if case.lengths is not None or length < 2:
        return _named(*results_of(case, arguments, run))
    first = 1 + at % (length - 1)
    bounds = sorted({0, first, min(first + 1, length), (first + length) // 2, length})
    outs, state = [], arguments["initial_state"]
    for a, b in itertools.pairwise(bounds):
        piece = of_tokens(arguments, itemgetter((slice(None), slice(a, b))))
        out, state = results_of(case, piece | {"initial_state": state}, run)
        outs.append(out)
    return _named(torch.cat(outs, 1), state)


@torch.no_grad()
def _separately(inputs: Inputs, run, at: int) -> dict[str, Tensor]:
    """Every sequence of a batch or of a pack in a call of its own."""
    arguments, case = inputs.arguments(), inputs.case
    lengths = case.lengths or ()
    ends = list(itertools.accumulate(lengths))
    results = []
    for n in range(case.sequences):
        rows, time_ = (slice(n, n + 1), slice(None)) if not ends else (slice(None), slice(ends[n] - lengths[n], ends[n]))
        alone = of_tokens(arguments, itemgetter((rows, time_))) | {"cu_seqlens": None}
        if case.initial == "dual":
            alone["initial_state"] = _of_states(arguments["initial_state"], itemgetter(slice(n, n + 1)))
        results.append(_named(*results_of(case, alone, run)))
    axis = {"out": 1 if ends else 0}
    return {name: torch.cat([r[name] for r in results], axis.get(name, 0)) for name in results[0]}


@torch.no_grad()
def _permuted(inputs: Inputs, run, at: int) -> dict[str, Tensor]:
    """Heads, and the sequences of a batch, in reverse order."""
    arguments, case = inputs.arguments(), inputs.case
    batch = (0,) if case.lengths is None else ()
    turned = of_tokens(arguments, lambda x: x.flip((*batch, 2)))
    shared = case.initial == "shared"
    turned["initial_state"] = _of_states(arguments["initial_state"], lambda x: x.flip((0,) if shared else (*batch, 1)))
    turned |= {name: arguments[name].flip(0) for name in ("ln_weight", "ln_bias") if name in arguments}
    results = _named(*results_of(case, turned, run))
    return {name: x.flip((*batch, 2) if name == "out" else (*batch, 1)) for name, x in results.items()}


@torch.no_grad()
def _at_a_limit(inputs: Inputs, run, at: int) -> dict[str, Tensor]:
    """A gate or a bias replaced by a more general one at the limit where both are equal."""
    arguments, case = inputs.arguments(), inputs.case
    shape = inputs.tensors["q"].shape[:3]
    like = lambda value: torch.full(shape, value, dtype=inputs.tensors["lr"].dtype, device=inputs.tensors["lr"].device)
    choices: list[dict] = []
    if case.decay == "none":
        choices.append({"log_decay": like(0.0)})
    if not case.momentum and not case.variants:
        choices.append({"momentum": like(0.0)})
    if case.bias == L2() and not case.variants:
        choices += [{"bias": Huber(kind), "delta": like(1e9)} for kind in ("coordinate", "norm", "switch")]
        choices += [{"bias": RobustL2(), "delta": like(0.0)}, {"bias": CustomBias("e")}]
    if case.retention == L2Retention() and not case.variants:
        choices += [{"retention": ElasticNetRetention(0.0)}, {"retention": LqRetention(2.0)}, {"retention": CustomRetention("A")}]
    change = choices[at % len(choices)] if choices else {}
    out, state = results_of(case, arguments | change, run)
    return _named(out, MemoryState(state.dual) if "momentum" in change else state)


ROUTES: dict[str, Callable[[Inputs, str | Callable, int], dict[str, Tensor]]] = {
    "one call": _one_call,
    "in pieces": _in_pieces,
    "separately": _separately,
    "permuted": _permuted,
    "at a limit": _at_a_limit,
}
