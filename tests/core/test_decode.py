"""A Decoder computes, token by token and in place, what the whole sequence gives at once: every memory, gate and place in a chunk."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch

import miras_kernels as mk
from decoding import MLP, PAIRS, SIZES
from miras_kernels.backends.reference import chunkwise
from miras_kernels.call import Call
from miras_kernels.tables.biases import TABLE as BIASES
from miras_kernels.tables.retention import TABLE as GATES
from miras_kernels.testing import Case, check_steps, relative_error, steps
from miras_kernels.testing.steps import before, check_results, cut, decoder, results
from quick import slow

CUTS = [13, 14, 15, 16, 17, 20, 36]  # in chunks of 16: into a chunk, across its end, several at once


@pytest.mark.parametrize("case", [*PAIRS, *SIZES], ids=str)
def test_the_reference_continues_a_prompt(case):
    inputs = case.draw(torch.float64)
    found, wanted = steps.read(inputs, "reference", [*CUTS, case.tokens]), steps.whole(inputs, CUTS[0])
    for name, x in wanted.items():
        assert relative_error(found[name], x) < 1e-11, name


@pytest.mark.parametrize("case", [*PAIRS, *SIZES], ids=str)
def test_kernels_continue_a_prompt(case, poisoned):
    report = check_steps(case, "cpp", torch.float32, [*CUTS, case.tokens])
    assert report.ok, report


@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [*PAIRS, *SIZES][1::3], ids=str)
def test_kernels_continue_a_prompt_of_sixteen_bits(case, dtype, poisoned):
    report = check_steps(case, "cpp", dtype, [*CUTS, case.tokens])
    assert report.ok, report


@pytest.mark.parametrize("case", [case for case in SIZES[::3] if not case.momentum], ids=str)
def test_kernels_start_without_a_prompt(case, poisoned):
    report = check_steps(case, "cpp", torch.float32, range(case.tokens + 1))
    assert report.ok, report


@pytest.mark.parametrize("case", [*PAIRS, *SIZES][::4], ids=str)
@pytest.mark.parametrize("level", ["avx2", "portable"])
def test_every_instruction_set(level, case, poisoned, instruction_set):
    """The other code paths of the same binary."""
    report = check_steps(case, "cpp", torch.float32, [*CUTS, case.tokens])
    assert report.ok, report


def places(case: Case, lengths: tuple[int, ...]):
    """A batch whose sequences have read ``lengths`` tokens: its inputs, state, and the tokens that are left."""
    inputs = dataclasses.replace(case, batch=len(lengths)).draw(torch.float32)
    arguments, more = inputs.arguments(), case.tokens - max(lengths)
    rows = lambda n: {name: x[n : n + 1] if isinstance(x, torch.Tensor) and name in Call.PER_TOKEN else x for name, x in arguments.items()}
    states = []
    for n, length in enumerate(lengths):
        row = {**rows(n), "initial_state": tuple(x[n : n + 1] for x in inputs.duals)}
        states.append(case.function(**{**row, **cut(row, 0, length)}, backend="reference")[1])
    positions = torch.tensor([length % case.chunk_size for length in lengths])
    state = states[0].replace_tensors([torch.cat(x) for x in zip(*(s.tensors() for s in states), strict=True)])
    state = dataclasses.replace(state, open_chunk=dataclasses.replace(state.open_chunk, position=positions))
    rest = [cut(rows(n), length, length + more) for n, length in enumerate(lengths)]
    tokens = {name: torch.cat([x[name] for x in rest]) if isinstance(rest[0][name], torch.Tensor) else rest[0][name] for name in rest[0]}
    return inputs, state, tokens, more


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("gate", GATES.values(), ids=lambda g: g.name)
@pytest.mark.parametrize("shape", [{}, MLP], ids=["linear", "mlp"])
def test_sequences_at_different_places(backend, gate, shape):
    case, lengths = Case("places", retention=gate, initial="dual", tokens=53, chunk_size=8, **shape), (3, 17, 21, 12)
    with torch.no_grad():
        inputs, state, tokens, more = places(case, lengths)
        order = torch.tensor([2, 0, 3, 1])
        reader = decoder(case, inputs.arguments(), state.map(lambda x: x[order]), backend)
        reader.reorder(order.argsort())  # positions are reordered too
        found = torch.cat([reader.step(**cut(tokens, a, b)) for a, b in itertools.pairwise([*range(10), 20, more])], 1)
        own = lambda out: {"out": torch.cat([out[n : n + 1, length : length + more] for n, length in enumerate(lengths)])}
        check_results(inputs, {"out": found}, lambda call: own(chunkwise.run(call)[0]))


def prepared(case: Case, backend: str, tokens: int = 13):
    """Arguments and a decoder that has read some of them."""
    arguments = case.draw(torch.float32).arguments()
    with torch.no_grad():
        _, state = case.function(**{**arguments, **cut(arguments, 0, tokens)}, backend="reference")
    return arguments, decoder(case, arguments, state, backend)


ROUND = [
    Case("linear-l2"),
    Case("linear-lq-momentum", retention=GATES[1], momentum=True),
    Case("linear-channel", decay="channel"),
    Case("linear-chunk-1", chunk_size=1),
    Case("mlp-l2", **MLP),
    Case("mlp-kl-momentum", **MLP, retention=GATES[2], momentum=True),
]


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("case", ROUND, ids=str)
def test_state_and_load_are_inverse(case, backend):
    arguments, reader = prepared(case, backend)
    inputs, outs = case.draw(torch.float32), [reader.step(**cut(arguments, 13, 15))]
    state, places = reader.state(), [x.data_ptr() for x in reader.buffers.tensors()]
    on = reader.step(**cut(arguments, 15, 20))
    other = decoder(case, arguments, state, backend)
    again = other.state()
    with torch.no_grad():
        for end in (state, again):
            check_results(before(inputs, 15), results(outs[0], end), lambda call: read_from(13, *chunkwise.run(call)))
    assert torch.equal(again.open_chunk.position, state.open_chunk.position)
    reader.load(state)
    assert [x.data_ptr() for x in reader.buffers.tensors()] == places
    for t in range(15, 20):
        outs.append(reader.step(**cut(arguments, t, t + 1)))
        assert torch.equal(other.step(**cut(arguments, t, t + 1)), outs[-1])
    for x, y in zip(reader.state().tensors(), other.state().tensors(), strict=True):
        assert torch.equal(x, y)
    with torch.no_grad():  # the public functions take a decoder's state
        rest = case.function(**{**arguments, **cut(arguments, 20, 37), "initial_state": reader.state()}, backend="reference")[0]
        for end in (rest, reader.step(**cut(arguments, 20, 37))):
            found = {"on": on, "out": torch.cat([*outs, end], 1)}
            check_results(inputs, found, lambda call: (lambda out: {"on": out[:, 15:20], "out": out[:, 13:]})(chunkwise.run(call)[0]))


def read_from(token: int, out: torch.Tensor, state: mk.MemoryState) -> dict[str, torch.Tensor]:
    return results(out[:, token:], state)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("case", [case for case in ROUND if case.chunk_size > 1], ids=str)
def test_matrices_are_written_when_a_chunk_closes(case, backend):
    arguments, reader = prepared(case, backend)
    matrices = lambda: [x.clone() for x in (reader.buffers.start, reader.buffers.written, reader.buffers.momenta) if x is not None]
    before = matrices()
    reader.step(**cut(arguments, 13, 15))
    assert all(torch.equal(x, y) for x, y in zip(matrices(), before, strict=True))
    reader.step(**cut(arguments, 15, 16))
    assert not torch.equal(reader.buffers.start, before[0])
    assert torch.equal(reader.buffers.start, reader.buffers.matrices()[0])


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("case", [case for case in ROUND if case.chunk_size > 1], ids=str)
def test_rows_of_later_tokens_are_ignored(case, backend):
    arguments, reader = prepared(case, backend)
    _, other = prepared(case, backend)
    for r in (reader, other):
        r.step(**cut(arguments, 13, 18))  # two tokens into the next chunk
    x = other.buffers
    x.left[..., 2:, :], x.right[..., 2:, :], x.weights[:, :, 4:] = 3.0, -5.0, 7.0
    if x.momentum_weights is not None:
        x.momentum_weights[:, :, 4:] = 11.0
    for a, b in zip(reader.state().tensors(), other.state().tensors(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(reader.step(**cut(arguments, 18, 37)), other.step(**cut(arguments, 18, 37)))


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("case", ROUND, ids=str)
def test_reorder(case, backend):
    """Sequences are reordered as in beam search, with everything that they have read."""
    arguments, reader = prepared(case, backend)
    index = torch.tensor([1, 1])
    places = [x.data_ptr() for x in reader.buffers.tensors()]
    tokens = cut(arguments, 13, 18)
    wanted = reader.step(**tokens)[1]
    _, reader = prepared(case, backend)
    reader.reorder(index)
    swapped = {name: x[index] if isinstance(x, torch.Tensor) else x for name, x in tokens.items()}
    assert all(torch.equal(x, wanted) for x in reader.step(**swapped))
    assert len(places) == len(reader.buffers.tensors())


@pytest.mark.parametrize("shape", [{}, MLP], ids=["linear", "mlp"])
def test_a_long_chunk_keeps_few_factors(shape):
    """The kernels add the factors to ``written`` once reading them would take longer than reading that matrix."""
    case = Case("few", **{**dict(key_dim=8, value_dim=8), **shape}, chunk_size=50, tokens=100)
    arguments, reader = prepared(case, "cpp", 50)
    x, most = reader.buffers, 0
    for t in range(50, 99):
        reader.step(**cut(arguments, t, t + 1))
        weights = x.weights[:, :, 2 : 2 + t - 49]
        assert torch.equal(weights[:, :, -1], torch.ones_like(weights[:, :, -1]))
        most = max(most, int((weights != 0).sum(2).max()))
    assert most == 8 + x.start[0, 0, 0].numel() // sum(x.start.shape[-2:])
    assert (x.weights[:, :, 0] != 0).all()
    assert check_steps(case, "cpp", cuts=[50, *range(51, 101)]).ok


#: as SIZES[5], large enough for a step to be shared out over threads
MANY = [
    Case("linear-many-heads-coupled", batch=9, heads=8, key_dim=64, value_dim=64, bias=mk.Huber("norm"), retention=GATES[1]),
    Case("mlp-many-sequences", memory="mlp", batch=9, heads=2, key_dim=64, value_dim=64, hidden=64, bias=mk.RobustL2()),
]


@pytest.mark.parametrize("case", [*ROUND, SIZES[5], *map(slow, MANY)], ids=str)
def test_bitwise_repeatable_for_any_number_of_threads_and_batch(case):
    def run(rows: slice) -> torch.Tensor:
        arguments, reader = prepared(case, "cpp")
        state = reader.state().map(lambda x: x[rows])
        tokens = {n: x[rows] if isinstance(x, torch.Tensor) else x for n, x in cut(arguments, 13, 37).items()}
        reader = decoder(case, arguments, state, "cpp")
        return torch.cat([reader.step(**cut(tokens, a, b)) for a, b in [(0, 1), (1, 2), (2, 9), (9, 24)]], 1)

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = run(slice(None))
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert torch.equal(run(slice(None)), first)
        assert torch.equal(run(slice(1, 2)), first[1:2])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("case", ROUND, ids=str)
def test_strides_out_and_gates_of_other_dtypes(case):
    arguments, reader = prepared(case, "cpp")
    tokens = cut(arguments, 13, 16)
    wanted = reader.step(**tokens)
    strange = {n: x.transpose(1, -1).contiguous().transpose(1, -1) if isinstance(x, torch.Tensor) else x for n, x in tokens.items()}
    _, reader = prepared(case, "cpp")
    room = torch.full_like(wanted, math.nan)
    assert reader.step(**strange, out=room) is room and torch.equal(room, wanted)
    _, reader = prepared(case, "cpp")
    room = torch.full_like(wanted, math.nan).transpose(1, -1).contiguous().transpose(1, -1)
    reader.step(**tokens, out=room)
    assert torch.equal(room, wanted)
    halves = {n: x.bfloat16() if isinstance(x, torch.Tensor) and n not in "qkv" else x for n, x in tokens.items()}
    _, reader = prepared(case, "cpp")
    found = [reader.step(**cut(halves, t, t + 1)) for t in range(3)]
    _, reader = prepared(case, "cpp")
    wide = {n: x.float() if isinstance(x, torch.Tensor) else x for n, x in halves.items()}
    assert torch.equal(torch.cat(found, 1), reader.step(**wide))


def test_delta_as_a_number_may_change():
    case = Case("number", bias=mk.Huber("coordinate"), delta="float")
    arguments, reader = prepared(case, "cpp")
    _, other = prepared(case, "cpp")
    for t, delta in enumerate([0.5, 0.7, 1, 2.5], 13):
        tokens = cut(arguments, t, t + 1)
        full = torch.full(tokens["lr"].shape, float(delta))
        assert torch.equal(reader.step(**{**tokens, "delta": delta}), other.step(**{**tokens, "delta": full}))
    assert len(reader._steps) <= 2


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("case", ROUND, ids=str)
def test_steps_allocate_only_their_output(case, backend):
    arguments, reader = prepared(case, backend)
    before = [x.data_ptr() for x in reader.buffers.tensors()]
    for t in range(13, 37):
        reader.step(**cut(arguments, t, t + 1))
    assert [x.data_ptr() for x in reader.buffers.tensors()] == before
    assert reader.buffers.position.tolist() == [37 % case.chunk_size] * 2


def test_auto_uses_the_kernels():
    arguments, reader = prepared(Case("auto"), "auto")
    reader.step(**cut(arguments, 13, 14))
    assert type(reader._latest).__name__ == "LinearStepper"
    arguments = Case("double").draw(torch.float64).arguments()
    _, state = mk.linear_memory(**arguments)
    reader = decoder(Case("double"), arguments, state.detach(), "auto")
    assert reader.step(**cut(arguments, 0, 1)).dtype == torch.float64
    with pytest.raises(ValueError, match="backend: 'cpp' cannot decode this: it computes in float32"):
        decoder(Case("double"), arguments, state.detach(), "cpp").step(**cut(arguments, 0, 1))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": None}, TypeError, "q: expected a tensor, got NoneType"),
        ({"k": torch.zeros(2, 1, 2, 5)}, ValueError, "k: expected the shape of q"),
        ({"v": torch.zeros(2, 1, 2, 12, dtype=torch.bfloat16)}, TypeError, "v: expected dtype torch.float32 as q"),
        ({"lr": torch.zeros(2, 1)}, ValueError, r"lr: expected shape \[B, T, H\]"),
        ({"lr": 0.1}, TypeError, "lr: expected a tensor, got 0.1"),
        ({"log_decay": torch.full((2, 1, 2), 0.1)}, ValueError, "log_decay: expected values <= 0"),
        ({"log_decay": torch.zeros(2, 1, 2, 12)}, ValueError, r"log_decay: expected \[N, T, H\], got shape"),
        ({"delta": 0.5}, ValueError, "delta: the bias L2.* uses none"),
        ({"momentum": torch.zeros(2, 1, 2)}, ValueError, "momentum: the decoder's state carries none"),
        ({"out": torch.zeros(2, 1, 2, 11)}, ValueError, "out: expected shape"),
        ({"out": torch.zeros(2, 1, 2, 12).bfloat16()}, ValueError, "out: expected shape"),
        ({"out": 3}, TypeError, "out: expected a tensor or None, got int"),
    ],
)
@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
def test_errors_name_the_argument(changes, error, message, first):
    arguments, reader = prepared(Case("errors"), "cpp")
    tokens = cut(arguments, 13, 14)
    if not first:
        reader.step(**tokens)
    before = [x.clone() for x in reader.buffers.tensors()]
    with pytest.raises(error, match=message):
        reader.step(**{**tokens, **changes})
    assert all(torch.equal(x, y) for x, y in zip(reader.buffers.tensors(), before, strict=True))
    reader.step(**tokens)


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        (Case("momentum", momentum=True), {"momentum": torch.ones(2, 1, 2)}, r"momentum: expected values in \[0, 1\)"),
        (Case("momentum", momentum=True), {"momentum": None}, "initial_state.momentum: the state carries momentum"),
        (Case("delta", bias=mk.Huber("norm")), {"delta": torch.full((2, 1, 2), -1.0)}, "delta: expected values >= 0"),
        (Case("delta", bias=mk.Huber("norm")), {"delta": -1.0}, "delta: expected a finite value >= 0, got -1.0"),
        (Case("delta", bias=mk.Huber("norm")), {"delta": math.inf}, "delta: expected a finite value >= 0, got inf"),
    ],
)
def test_errors_of_values(case, changes, message):
    arguments, reader = prepared(case, "cpp")
    reader.step(**cut(arguments, 13, 14))
    with pytest.raises(ValueError, match=message):
        reader.step(**{**cut(arguments, 14, 15), **changes})


def test_a_decoder_needs_a_state():
    with pytest.raises(TypeError, match="state: expected a MemoryState, got Tensor"):
        mk.Decoder(torch.zeros(2, 2, 12, 16), chunk_size=16)


@pytest.mark.parametrize("shape", [{}, MLP], ids=["linear", "mlp"])
def test_a_planted_bug_is_caught(monkeypatch, shape):
    """The comparison can fail: it finds a step with a slightly wrong decay, and one that does not close its chunk."""
    case, cuts = Case("planted", **shape), range(13, 38)
    assert check_steps(case, "cpp", cuts=cuts).ok
    right = mk.Decoder.step

    def decays_less(self, *tokens, log_decay, **named):
        return right(self, *tokens, log_decay=0.9999 * log_decay, **named)

    def forgets_an_end(self, *tokens, **named):
        self.buffers.position.clamp_(max=14)
        return right(self, *tokens, **named)

    for wrong in (decays_less, forgets_an_end):
        monkeypatch.setattr(mk.Decoder, "step", wrong)
        assert not check_steps(case, "cpp", cuts=cuts).ok


def test_every_bias_and_gate_is_among_the_cases():
    for memory in ("linear", "mlp"):
        cases = [case for case in PAIRS if case.memory == memory]
        assert {case.bias.tag for case in cases} == set(BIASES) and {case.retention.tag for case in cases} == set(GATES)
        assert {case.momentum for case in cases} == {True, False}
