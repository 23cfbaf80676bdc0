"""The public functions decode short calls without gradients: the same numbers as the whole sequence, and states that are values."""

from __future__ import annotations

import itertools

import pytest
import torch

from decoding import MLP, PAIRS, SIZES
from miras_kernels import autograd, memory, validation
from miras_kernels.backends.cpp import Steps
from miras_kernels.tables import memories
from miras_kernels.testing import Case, check_steps, steps
from miras_kernels.testing.steps import cut

#: every token is a chunk
CHUNK_1 = [
    Case("chunk-1-momentum-channels", chunk_size=1, momentum=True, decay="channel", lr="channel"),
    Case("chunk-1-mlp-momentum", chunk_size=1, momentum=True, **MLP),
]


@pytest.mark.parametrize("case", [*PAIRS[::2], *SIZES, *CHUNK_1], ids=str)
def test_short_inputs_are_decoded(case, monkeypatch, poisoned):
    """A sequence cut into single tokens and short runs gives the results of the whole, on the kernels, for all gates."""
    taken, on_value = [], Steps.on_value
    monkeypatch.setattr(memory, "repeat", lambda *_: None)
    monkeypatch.setattr(Steps, "on_value", lambda self: taken.append(self.call.q.shape[1]) or on_value(self))
    arguments, outs = steps.inputs_of(case, "cpp", torch.float32).arguments(), []
    with torch.no_grad():
        _, state = case.function(**{**arguments, **cut(arguments, 0, 13)}, backend="reference")
        cuts = [13, 14, 15, 16, 17, 18, 20, 23, 24, *range(28, case.tokens, 4), case.tokens]
        for a, b in itertools.pairwise(cuts):
            out, state = case.function(**{**arguments, **cut(arguments, a, b), "initial_state": state}, backend="cpp")
            outs.append(out)
    few = min(row.kernels["cpp"].few for row in memories.TABLE.values())
    assert taken == [b - a for a, b in itertools.pairwise(cuts)] and max(taken) == 4 == few
    report = check_steps(case, "cpp", cuts=[13], found=steps.final(torch.cat(outs, 1), state))
    assert report.ok, report


@pytest.mark.parametrize("shape", [{}, MLP], ids=["linear", "mlp"])
def test_a_state_is_a_value(shape):
    """A short call does not change the given state, and returns tensors of its own."""
    case = Case("value", **shape)
    arguments = case.draw(torch.float32).arguments()
    with torch.no_grad():
        _, state = case.function(**{**arguments, **cut(arguments, 0, 13)}, backend="cpp")
        for t in range(13, 20):
            before = [x.clone() for x in state.tensors()]
            _, after = case.function(**{**arguments, **cut(arguments, t, t + 1), "initial_state": state}, backend="cpp")
            assert all(torch.equal(x, y) for x, y in zip(state.tensors(), before, strict=True))
            assert not {x.data_ptr() for x in state.tensors()} & {x.data_ptr() for x in after.tensors()}
            state = after


@pytest.mark.parametrize("shape", [{}, MLP | dict(batch=1, heads=1)], ids=["linear", "mlp"])
def test_the_operator_gives_a_state_of_its_own(shape):
    """The operator that torch.compile calls: its results are contiguous, as its fake promises, and share no memory."""
    case = Case("operator", initial="dual", **shape)
    arguments = case.draw(torch.float32).arguments()
    with torch.no_grad():
        _, state = case.function(**{**arguments, **cut(arguments, 0, 13)}, backend="cpp")
        short = {**arguments, **cut(arguments, 13, 14), "initial_state": state}
        wanted, after = case.function(**short, backend="cpp")
        tokens = [short.pop(name) for name in ("q", "k", "v", "lr", "log_decay")]
        operands = (*autograd._flatten(validation.make_call(memories.TABLE[case.memory], *tokens, **short)), "cpp", 0)
        torch.library.opcheck(torch.ops.miras_kernels.memory, operands, test_utils=("test_schema", "test_faketensor"))
        out, final, _ = torch.ops.miras_kernels.memory(*operands)
    assert torch.equal(out, wanted)
    assert all(torch.equal(x, y) and x.is_contiguous() for x, y in zip(final, after.tensors(), strict=True))
    assert len({x.untyped_storage().data_ptr() for x in final}) == len(final)
