"""The public functions decode short calls without gradients: the same numbers as the whole sequence, and states that are values."""

from __future__ import annotations

import itertools

import pytest
import torch

import miras_kernels as mk
from decoding import MLP, PAIRS, SIZES
from miras_kernels import autograd, memory, validation
from miras_kernels.backends.cpp import Steps
from miras_kernels.decode import earlier
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


SEQUENCES = [
    dict(initial="none", decay="none"),
    dict(final=False, tokens=43),
    dict(bias=mk.Huber("norm"), delta="float", retention=mk.LqRetention(1.5)),
    dict(bias=mk.Huber("coordinate"), lr="channel", decay="channel", delta="channel"),
]


@pytest.mark.parametrize("changes", SEQUENCES, ids=str)
def test_a_sequence_like_an_earlier_one(changes, monkeypatch):
    """The second call of a signature takes the short way, with the same bits; what does not fit takes the long one, with its errors."""
    changes, final = dict(changes), changes.get("final", True)
    changes.pop("final", None)
    case, second = (Case("sequence", seed=seed, **(dict(tokens=48, chunk_size=16) | changes)) for seed in (0, 1))
    first, second = ({**x.draw(torch.float32).arguments(), "backend": "cpp", "output_final_state": final} for x in (case, second))
    monkeypatch.setattr(earlier, "_earlier", {})
    with torch.no_grad():
        case.function(**first)
        (known,) = earlier._earlier.values()
        taken, run = [], known.run
        monkeypatch.setattr(known, "run", lambda *args: taken.append(run(*args)) or taken[-1])
        strided = {**second, "q": second["q"].transpose(1, 2).contiguous().transpose(1, 2)}
        (out, state), (again, _) = case.function(**second), case.function(**strided)
        assert len(taken) == 2 and out is taken[0][0] and torch.equal(again, out)
        case.function(**{**second, "lr": second["lr"].double().float().bfloat16()})
        if second["log_decay"] is not None:
            with pytest.raises(ValueError, match="log_decay"):
                case.function(**{**second, "log_decay": -second["log_decay"]})
        assert all(x is None for x in taken[2:]) and len(taken) > 2
        monkeypatch.setattr(memory, "repeat", lambda *_: None)
        wanted, last = case.function(**second)
    assert torch.equal(out, wanted) and (state is None) == (last is None) == (not final)
    assert not final or torch.equal(state.dual[0], last.dual[0])
