"""States that take back their last tokens."""

from __future__ import annotations

import pickle

import pytest
import torch

import miras_kernels as mk
from miras_kernels import MemoryState, linear_memory, mlp_memory
from miras_kernels.decode import step
from miras_kernels.retention import LqRetention

HEADS, SIZE, TOKENS = 2, 8, 30
MLP = dict(retention=LqRetention(4))


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


def tokens(kind="linear", rows=2, length=TOKENS, dtype=torch.float32, seed=0):
    """Arguments of a memory, and its function with a start state."""
    g = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=g).to(dtype)
    gate = lambda: torch.rand(rows, length, HEADS, generator=g)
    given = dict(
        q=unit(normal(rows, length, HEADS, SIZE)), k=unit(normal(rows, length, HEADS, SIZE)), v=normal(rows, length, HEADS, SIZE),
        lr=gate() / 4, log_decay=-gate() / 10, momentum=gate() / 2,
    )  # fmt: skip
    if kind == "linear":
        return given, linear_memory, dict(delta=0.5, bias=mk.Huber("switch")), (torch.zeros(rows, HEADS, SIZE, SIZE),)
    weights = tuple(torch.randn(rows, HEADS, *shape, generator=g) / 4 for shape in ((SIZE, 2 * SIZE), (2 * SIZE, SIZE)))
    return given, mlp_memory, dict(ln_weight=torch.ones(HEADS, SIZE), ln_bias=torch.zeros(HEADS, SIZE), **MLP), weights


def cut(given, begin, end):
    return {name: x[:, begin:end] for name, x in given.items()}


def read(case, pieces, state, chunk_size=4, backend="auto"):
    """The outputs and the state after reading ``pieces``, ends of calls."""
    given, run, settings, _ = case
    outputs, begin = [], 0
    for end in pieces:
        out, state = run(**cut(given, begin, end), **settings, chunk_size=chunk_size, initial_state=state, output_final_state=True,
                         backend=backend)  # fmt: skip
        outputs.append(out)
        begin = end
    return torch.cat(outputs, 1), state


def start(case, window=None):
    state = MemoryState(case[3], tuple(map(torch.zeros_like, case[3])))
    return state if window is None else state.keep(window)


def assert_same(a: MemoryState, b: MemoryState, chunk_size=4):
    """Bitwise; an open chunk without tokens may be there or not."""
    for x, y in zip(a.matrices(), b.matrices(), strict=True):
        assert torch.equal(x, y)
    if a.open_chunk is not None and b.open_chunk is not None:
        assert torch.equal(a.open_chunk.position, b.open_chunk.position)
        for x, y in zip(a.tensors(), b.tensors(), strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize(
    ("pieces", "window", "back"),
    [
        ((10, 14), 8, 3),  # inside of the last call
        ((10, 14), 8, 4),  # exactly it
        ((10, 14), 8, 6),  # across it
        ((10, *range(11, 31)), 5, 5),  # single tokens
        ((10, *range(11, 31)), 5, 1),
        ((12, 20, 22, 30), 10, 10),
        ((2, 3, 5), 10, 5),  # back to the start
        ((5,), 10, 0),
    ],
)
def test_the_state_has_the_bits_of_one_that_never_read_the_tokens(backend, kind, pieces, window, back):
    case = tokens(kind)
    out, state = read(case, pieces, start(case, window), backend=backend)
    plain_out, plain = read(case, pieces, start(case), backend=backend)
    assert torch.equal(out, plain_out) or pieces[0] > 2 * window  # a long call is made in two parts
    before = [end for end in pieces if end <= pieces[-1] - back]
    ends = [*before, pieces[-1] - back] if pieces[-1] - back not in (*before, 0) else before
    _, expected = read(case, ends, start(case), backend=backend) if ends else (None, start(case))
    assert_same(state.crop(back), expected)
    assert_same(state, plain)  # it is a value
    again = state.crop(back)
    if ends:  # goes on as the other does
        rest = (cut(case[0], pieces[-1] - back, pieces[-1]), *case[1:])
        ours, theirs = (read(rest, [back], s, backend=backend) for s in (again, expected))
        assert torch.equal(ours[0], theirs[0])
    if back:
        smaller = state.crop(1)
        for _ in range(back - 1):
            smaller = smaller.crop(1)
        assert_same(smaller, again)


@pytest.mark.parametrize("length", [9, 17, 30])
def test_a_long_call_is_read_in_two_parts(length):
    case = tokens(rows=1)
    out, state = read(case, [length], start(case, 4))
    plain, _ = read(case, [length], start(case))
    torch.testing.assert_close(out, plain, rtol=1e-5, atol=1e-5)
    assert 4 <= state.window.count <= 8 if length > 8 else state.window.count == length
    assert_same(state.crop(3), read(case, [length - 4, length - 3], start(case))[1])


def test_memory_stays_bounded():
    case = tokens()
    _, state = read(case, range(1, TOKENS + 1), start(case, 5))
    assert len(state.window.pieces) <= 2 and 5 <= state.window.count < 20


def test_windows_are_indexed_moved_and_pickled():
    case = tokens(rows=3)
    _, state = read(case, (9, 12, 13), start(case, 6))
    order = torch.tensor([2, 0])
    expected = state.crop(3).map(lambda x: x[order])
    for other in (state.map(lambda x: x[order]), pickle.loads(pickle.dumps(state)).map(lambda x: x[order])):
        assert_same(other.crop(3), expected)
    wide = state.to(torch.float64).crop(3)
    assert wide.dual[0].dtype == torch.float64 and (wide.open_chunk is None or wide.open_chunk.position.dtype == torch.int64)
    torch.testing.assert_close(wide.dual[0].float(), state.crop(3).dual[0], rtol=1e-4, atol=1e-5)
    older = MemoryState(state.dual)
    del older.__dict__["window"]  # a pickle of an earlier version
    assert pickle.loads(pickle.dumps(older)).window is None


def test_gradients_reach_the_tokens_that_stay():
    case = tokens()
    moving = {name: x.requires_grad_() for name, x in case[0].items() if name != "q"}
    _, state = read(case, (10, 15), start(case, 8), backend="reference")
    got = torch.autograd.grad(state.crop(2).dual[0].square().sum(), list(moving.values()))
    _, expected = read(case, (10, 13), start(case), backend="reference")
    wanted = torch.autograd.grad(expected.dual[0].square().sum(), list(moving.values()))
    for name, x, y in zip(moving, got, wanted, strict=True):
        assert torch.equal(x, y), name


def test_autocast_is_that_of_the_call():
    case = tokens()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, state = read(case, (10, 15), start(case, 8))
        _, expected = read(case, (10, 13), start(case))
    assert_same(state.crop(2), expected)


def packed():
    case = tokens(rows=1)
    case = (*case[:2], case[2] | dict(cu_seqlens=torch.tensor([0, TOKENS])), case[3])
    return read(case, [TOKENS], start(case, 4))[1]


def filled(window):
    case = tokens()
    return read(case, (10, 14), start(case, window))[1]


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (
            lambda: filled(None).crop(1),
            ValueError,
            r"tokens: this state cannot take back tokens; expected one with a window, made by keep\(n\)",
        ),
        (
            lambda: filled(4).crop(9),
            ValueError,
            r"tokens: expected 0 to 4, since the window holds 4 tokens \(of keep\(4\)\), got 9; keep more",
        ),
        (lambda: filled(4).crop(-1), ValueError, "tokens: expected 0 to 4, .*got -1"),
        (lambda: filled(4).crop(1.0), TypeError, "tokens: expected a number of tokens, got 1.0"),
        (lambda: filled(0), ValueError, "tokens: expected an integer >= 1, got 0"),
        (lambda: filled(True), TypeError, "tokens: expected an integer >= 1, got True"),
        (lambda: packed().crop(1), ValueError, "tokens: expected 0 to 0, since the window holds 0 tokens"),
    ],
)
def test_errors(call, kind, text):
    with pytest.raises(kind, match=text):
        call()


# ------------------------------------------------------------------------------------------------------------ decoders


def decoder(case, chunk_size=4, **options):
    return mk.Decoder(start(case), chunk_size=chunk_size, memory="linear" if case[1] is linear_memory else "mlp",
                      bias=case[2].get("bias", mk.L2()), retention=case[2].get("retention", mk.L2Retention()), **options)  # fmt: skip


def steps(of, case, begin, ends):
    rest = {name: x for name, x in case[2].items() if name in ("delta",)}
    outputs = []
    for end in ends:
        outputs.append(of.step(**cut(case[0], begin, end), **rest))
        begin = end
    return outputs


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize(("ends", "back"), [((1, 2, 3, 4, 5, 6), 4), ((3, 6, 7), 4), ((5, 9), 3), ((2, 4, 6), 6), (range(1, 25), 5)])
def test_a_decoder_has_the_bits_of_one_that_never_read_the_tokens(backend, ends, back):
    case = tokens()
    ours, theirs = decoder(case, backend=backend), decoder(case, backend=backend)
    ours.keep(6)
    for x, y in zip(steps(ours, case, 0, ends), steps(theirs, case, 0, ends), strict=True):
        assert torch.equal(x, y)
    theirs = decoder(case, backend=backend)
    left = ends[-1] - back
    addresses = [x.data_ptr() for x in ours.buffers.tensors()]
    ours.crop(back)
    steps(theirs, case, 0, [end for end in (*[e for e in ends if e < left], left) if end])
    for x, y in zip(ours.state().tensors(), theirs.state().tensors(), strict=True):
        assert torch.equal(x, y)
    assert [x.data_ptr() for x in ours.buffers.tensors()] == addresses
    assert torch.equal(steps(ours, case, left, [left + 2])[0], steps(theirs, case, left, [left + 2])[0])


def test_a_decoder_whose_decay_comes_first_and_that_is_reordered():
    case = tokens()
    case = ({name: x for name, x in case[0].items() if name not in ("momentum", "log_decay")}, case[1], {}, case[3])
    make = lambda: mk.Decoder(MemoryState(case[3]), chunk_size=1)
    ours, theirs, order = make(), make(), torch.tensor([1, 0])
    ours.keep(4)
    for of, length in ((ours, 9), (theirs, 6)):
        for t in range(length):
            if t == 5:
                of.reorder(order)
            of.decay(torch.full((2, HEADS), -0.1 * t))
            steps(of, case, t, [t + 1])
    ours.crop(3)
    assert all(torch.equal(x, y) for x, y in zip(ours.buffers.tensors(), theirs.buffers.tensors(), strict=True))
    ours.crop(1)
    ours.load(theirs.state())
    with pytest.raises(ValueError, match="tokens: expected 0 to 0, since the window holds 0 tokens"):
        ours.crop(1)
    with pytest.raises(ValueError, match="tokens: this state cannot take back tokens"):
        theirs.crop(1)
    with pytest.raises(ValueError, match="tokens: expected an integer >= 1, got 0"):
        theirs.keep(0)
    with pytest.raises(ValueError, match="decoder: one that keeps tokens is read by its method step"):
        step(ours, **cut(case[0], 0, 1))
