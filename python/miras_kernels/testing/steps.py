"""Compare a decoder's outputs and state after a prompt with the float64 reference on the whole sequence."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..backends.reference import chunkwise
from ..call import Call
from ..decode import Decoder
from ..state import MemoryState
from .cases import Case, Inputs
from .parity import Report, compare, expect, margin, operands

__all__ = ["before", "check_results", "check_steps", "cut", "decoder", "final", "read", "results", "whole"]


def cut(arguments: dict, a: int, b: int) -> dict:
    """The per-token arguments of tokens ``a`` to ``b``."""
    given = {name: x for name, x in arguments.items() if name in Call.PER_TOKEN and x is not None}
    return {name: x[:, a:b] if isinstance(x, Tensor) else x for name, x in given.items()}


def decoder(case: Case, arguments: dict, state: MemoryState, backend: str) -> Decoder:
    settings = ("chunk_size", "bias", "retention", "ln_weight", "ln_bias", "ln_eps")
    given = {name: arguments[name] for name in settings if name in arguments}
    return Decoder(state, **given, channel_wise_decay=case.decay.endswith("channel"), backend=backend)


@torch.no_grad()
def read(inputs: Inputs, backend: str, cuts: Sequence[int]) -> dict[str, Tensor]:
    """Outputs and final state of a decoder: the reference reads a prompt of ``cuts[0]`` tokens, then steps read from cut to cut."""
    case, arguments = inputs.case, inputs.arguments()
    state = arguments["initial_state"]
    if cuts[0]:
        _, state = case.function(**{**arguments, **cut(arguments, 0, cuts[0])}, backend="reference")
    elif not isinstance(state, MemoryState):
        state = MemoryState(tuple(state) if isinstance(state, tuple) else (state,))
    reader = decoder(case, arguments, state, backend)
    outs = [reader.step(**cut(arguments, a, b)) for a, b in itertools.pairwise(cuts)]
    return final(torch.cat(outs, 1), reader.state())


@torch.no_grad()
def whole(inputs: Inputs, prompt: int) -> dict[str, Tensor]:
    """The same from the whole sequence at once."""
    out, state = chunkwise.run(inputs.call())
    return final(out[:, prompt:], state)


def final(out: Tensor, state: MemoryState) -> dict[str, Tensor]:
    """Results by the names of :func:`evaluate`."""
    found = {"out": out} | {f"final_dual_{i}": x for i, x in enumerate(state.dual)}
    return found | {f"final_momentum_{i}": x for i, x in enumerate(state.momentum or ())}


def before(inputs: Inputs, tokens: int) -> Inputs:
    """A case's first ``tokens`` tokens."""
    tensors = {name: x[:, :tokens] if name in Call.PER_TOKEN else x for name, x in inputs.tensors.items()}
    case = dataclasses.replace(inputs.case, tokens=tokens)
    return dataclasses.replace(inputs, case=case, tensors=tensors, grad_out=inputs.grad_out[:, :tokens])


def results(out: Tensor, state: MemoryState) -> dict[str, Tensor]:
    """Outputs and all floating-point tensors of a state."""
    return {"out": out} | {f"state {i}": x for i, x in enumerate(state.tensors()) if x.is_floating_point()}


def check_results(inputs: Inputs, found: dict[str, Tensor], run: Callable[[Call], dict[str, Tensor]]) -> None:
    """Compare float32 results with those of ``run``, a reference, in float64.

    Raises:
        AssertionError: an error exceeds its budget.
    """
    report = compare(inputs.case, torch.float32, found, expect(inputs, torch.float32, lambda x: run(x.call())))
    if not report.ok:
        raise AssertionError(str(report))


def check_steps(
    case: Case, backend: str = "auto", dtype: torch.dtype = torch.float32, cuts: Sequence[int] = (0, 1), found: dict | None = None,
    device: str | torch.device = "cpu",
) -> Report:  # fmt: skip
    """Compare a decoder with float64, within the budgets of :func:`check`.

    Args:
        cuts: see :func:`read`; the last one is the number of tokens.
        found: other results to compare, computed from ``inputs_of(case, dtype)``.
    """
    inputs = inputs_of(case, backend, dtype, device)
    found = read(inputs, backend, cuts) if found is None else found
    wanted = expect(inputs, torch.float32, lambda x: whole(x, cuts[0]))
    if wanted.keys() != found.keys():
        raise AssertionError(f"{case.name}: expected {list(wanted)}, got {list(found)}")
    return compare(case, dtype, found, wanted)


def inputs_of(case: Case, backend: str, dtype: torch.dtype, device: str | torch.device = "cpu") -> Inputs:
    """The inputs of :func:`check_steps`."""
    return case.draw(dtype, device, margin(case, operands(backend, dtype)))
