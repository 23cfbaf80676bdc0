"""The fuzzer finds planted bugs within a minute, shrinks the example, and prints a command that repeats it."""

from __future__ import annotations

import dataclasses
import functools
import shlex
import time

import pytest
import torch
from hypothesis import strategies as st

import miras_kernels as mk
from miras_kernels import dispatch
from miras_kernels import expressions as programs
from miras_kernels.__main__ import main
from miras_kernels.backends.reference import chunkwise
from miras_kernels.testing import Case, evaluate, registry
from miras_kernels.testing.cases import KINK_DISTANCE
from miras_kernels.testing.fuzzing import ROUTES, Example, Failure, Refused, examples, fuzz, run_example
from miras_kernels.testing.kinks import has_kinks
from quick import slow

# ------------------------------------------------------------------------------------------------------- planted bugs


def wrong_tail_mask(call):
    """The last token of a chunk that is not full is not written."""
    tail = torch.ones_like(call.lr)
    if call.cu_seqlens is None and call.state.open_chunk is None and call.q.shape[1] % call.chunk_size:
        tail[:, -1] = 0
    return chunkwise.run(call.replace(lr=call.lr * tail))


def missing_decay_in_a_gradient(call):
    """The gradient of log_decay lacks the second half of the tokens."""
    if call.log_decay is None:
        return chunkwise.run(call)
    half = call.q.shape[1] // 2
    decay = torch.cat([call.log_decay[:, :half], call.log_decay[:, half:].detach()], 1)
    return chunkwise.run(call.replace(log_decay=decay))


def off_by_one(call):
    """A token also reads the write of the token after it."""
    out, state = chunkwise.run(call)
    ahead, _ = chunkwise.run(call.replace(k=call.k.roll(-1, 1), v=call.v.roll(-1, 1), lr=call.lr.roll(-1, 1)))
    return out + 0.05 * (ahead - out), state


def stale_initial_state(call):
    """Every sequence starts from the initial state of the first one."""
    first = call.state.map(lambda x: x if x.dtype == torch.int64 else x[:1].expand_as(x))
    return chunkwise.run(call.replace(state=first))


def wrong_rho(call):
    """A chunk's own writes are read as if rho were 1."""
    if not isinstance(call.retention, mk.LqRetention):
        return chunkwise.run(call)

    class Unscaled(mk.LqRetention):
        def phi(self, dual):
            return mk.LqRetention.rho(self, dual) * dual

        def rho(self, dual):
            return dual.new_ones(()).expand(*dual.shape[:-2], 1, 1)

    return chunkwise.run(call.replace(retention=Unscaled(call.retention.q, call.retention.floor)))


def no_coupling(call):
    """The gradient of an expression that couples a row is the diagonal alone."""

    class Diagonal(mk.CustomBias):
        def _derivative(self, e, delta, grad):
            slope, _, slope_delta = programs.evaluate(self.programs.derivatives, e, (e * e).sum(-1, keepdim=True), delta)
            return slope * grad, slope_delta * grad if self.needs_delta else None

    if not call.bias.row_coupled:
        return chunkwise.run(call)
    return chunkwise.run(call.replace(bias=Diagonal.from_fields(call.bias.__getstate__())))


PLANTED = (wrong_tail_mask, missing_decay_in_a_gradient, off_by_one, stale_initial_state, wrong_rho, no_coupling)


@pytest.mark.parametrize("bug", [PLANTED[0], *map(slow, PLANTED[1:])], ids=lambda f: f.__name__)
def test_a_planted_bug_is_found_within_a_minute(bug):
    began = time.process_time()  # CPU time: other processes do not matter
    outcome = fuzz(bug, seconds=600, seed=0, strategy=examples(custom=True) if bug is no_coupling else None, shrink_seconds=1)
    assert outcome.failure is not None, outcome.tried
    assert time.process_time() - began < 60
    example, complaint = outcome.failure
    assert complaint
    with pytest.raises(Failure):  # the printed example repeats it
        run_example(Example.decode(example.encode()), bug)
    run_example(example, chunkwise.run)  # ... and passes without the bug


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_no_failure_without_a_bug(backend):
    cases = st.sampled_from([case for case in registry() if "-pairs-" in case.name])
    outcome = fuzz(
        backend, seconds=2, seed=1, strategy=st.builds(Example, cases, route=st.sampled_from(list(ROUTES)), at=st.integers(0, 40))
    )
    assert outcome.failure is None, outcome.failure
    assert sum(outcome.tried.values()) > 0


def test_the_same_seed_gives_the_same_examples(monkeypatch):
    tried = []

    def twenty(example: Example, run: str) -> None:
        tried[-1].append(example.encode())
        if len(tried[-1]) == 20:
            raise KeyboardInterrupt

    monkeypatch.setattr("miras_kernels.testing.fuzzing.run_example", twenty)
    for seed in (3, 3, 4):
        tried.append([])
        with pytest.raises(KeyboardInterrupt):
            fuzz("reference", seconds=600, seed=seed)
    assert tried[0] == tried[1] != tried[2]


@pytest.mark.parametrize("route", [*ROUTES, "causality"])
@pytest.mark.parametrize("changes", [{}, {"lengths": (3, 9, 1)}, {"memory": "mlp", "value_dim": 16, "momentum": True}], ids=str)
def test_every_route_passes(route, changes):
    example = Example(Case("fuzz", tokens=21, chunk_size=8, **changes), "float32", route, 5)
    assert Example.decode(example.encode()) == dataclasses.replace(example, case=dataclasses.replace(example.case, name="fuzz"))
    run_example(example, "reference")


def test_overflow_in_the_float32_reference_is_no_failure():
    """An inner loop that diverges overflows; it is a failure only where the float32 reference does not."""
    diverging = Case("fuzz", bias=mk.Lp(4.0), batch=1, tokens=4, heads=1, key_dim=2, value_dim=2, chunk_size=1, keys="huge")
    assert not evaluate(diverging.draw(torch.float32), "reference")["out"].isfinite().all()
    run_example(Example(diverging, "float32", "one call", 0), "cpp")
    with pytest.raises(Failure):
        run_example(
            Example(dataclasses.replace(diverging, keys="unit"), "float32", "one call", 0),
            lambda call: chunkwise.run(call.replace(lr=call.lr * 1e20)),
        )


def test_a_call_that_diverges_under_rounding_is_not_judged():
    """Its results are right by luck: some perturbed runs of the reference overflow, so that there is no budget."""
    case = Case("fuzz", memory="mlp", bias=mk.Lp(2.0), retention=mk.ElasticNetRetention(0.5), batch=1, tokens=32, heads=1, key_dim=6,
                value_dim=6, hidden=6, chunk_size=1, keys="huge")  # fmt: skip
    with pytest.raises(Refused, match="diverges under rounding errors"):
        run_example(Example(case, "float32", "one call", 0), "cpp")


@pytest.mark.parametrize("bias, kinks", [
    (mk.CustomBias("e"), False), (mk.CustomBias("e / (1 + abs(e))"), False), (mk.CustomBias("sign(e) * log(1 + abs(e))"), False),
    (mk.CustomBias("e / max(delta, 1)"), False), (mk.CustomBias("e * exp(-norm2 / delta**2)"), False), (mk.CustomBias("e + abs(e)"), True),
    (mk.CustomBias("clip(e, -1, 1)"), True), (mk.CustomBias("where(norm2 < delta, e, 0.5 * e)"), True), (mk.L2(), False),
    (mk.CustomBias("e / (1 + abs(e - e * norm2))"), True), (mk.CustomRetention("A / (1 + abs(A))"), False),
    (mk.CustomRetention("sign(A) * max(abs(A) - 1, 0)"), True),
], ids=repr)  # fmt: skip
def test_an_expression_knows_whether_it_has_kinks(bias, kinks):
    assert has_kinks(bias) == kinks


def test_draws_keep_a_distance_from_the_kinks_of_expressions():
    """A case with so many errors that one in a few draws is near a kink: the seeds of Case.draw are tried until none is."""
    case = Case("kinks", bias=mk.CustomBias("clip(e, -a, a)", a=0.5), batch=8, tokens=512, heads=8, key_dim=8, value_dim=16)
    near = lambda inputs: case._kink_distance(inputs) <= KINK_DISTANCE
    assert any(near(case._draw(seed)) for seed in range(3)) and not near(case.draw(torch.float64))
    with pytest.raises(RuntimeError, match="operands of 16 bits decide the side"):
        case.draw(torch.bfloat16, margin=1e-2)


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"case":{"bias":"99"}}', '{"case":{"size":3}}', '{"case":{},"way":1}'])
def test_invalid_replays_are_refused(text):
    with pytest.raises(ValueError, match="replay: expected the JSON that a failing run printed"):
        Example.decode(text)


def test_the_printed_command_repeats_the_failure(monkeypatch, capsys):
    """The printed command fails while the bug is there, and passes without it."""
    backend = dispatch.BACKENDS["cpp"]
    forward = backend.forward
    monkeypatch.setattr("miras_kernels.testing.fuzzing.fuzz", functools.partial(fuzz, shrink_seconds=2))
    with monkeypatch.context() as patch:
        patch.setattr(backend, "forward", lambda call, every: forward(call.replace(lr=call.lr * 1.01), every))
        assert main(["fuzz", "--backend", "cpp", "--seconds", "30"]) == 1
        printed = capsys.readouterr().out.splitlines()
        words = shlex.split(printed[printed.index("repeat with:") + 1])
        assert words[:3] == ["python", "-m", "miras_kernels"]
        assert main(words[3:]) == 1
        assert "cpp: WRONG: " in capsys.readouterr().out
    assert main(words[3:]) == 0
    assert capsys.readouterr().out == "cpp: right\n"
