"""Exact steps in blocks (docs/mathematics.md, section 13): the same numbers for every size of a block, cut and number of threads."""

from __future__ import annotations

import itertools

import pytest
import torch

import miras_kernels as mk
from equal_keys import EqualKeys
from miras_kernels import _C
from miras_kernels.__main__ import main
from miras_kernels.backends.reference import blocks, definition
from miras_kernels.testing import Case, check, evaluate, relative_error
from miras_kernels.testing.parity import ARITHMETIC
from quick import combinations

# Two float64 computations of one function, and two float32 orders of the same sums, as in test_reference.py and test_identities.py.
EXACT, CLOSE = 1e-9, 64 * ARITHMETIC
CHUNKS = (1, 2, 4, 7, 8, 15)
DECAYS = ("scalar", "none", "strong", "extreme")


STEPS = ("1.0", "1.9", "2.0")


def sized(monkeypatch, tokens: int) -> None:
    monkeypatch.setattr(blocks, "BLOCK", tokens)


@pytest.mark.parametrize("size", [16, 32, 64])
@pytest.mark.parametrize("chunk_size, decay", combinations(CHUNKS, DECAYS, quick=lambda chunk, decay: (chunk + decay) % 3 == 0), ids=str)
def test_blocks_are_the_definition(monkeypatch, chunk_size, decay, size):
    sized(monkeypatch, size)
    for tokens, lengths in ((71, None), (4, None), (63, (0, 1, 16, 0, 41, 5))):
        inputs = Case("blocks", chunk_size=chunk_size, decay=decay, tokens=tokens, lengths=lengths, key_dim=5, value_dim=4).draw()
        wanted, found = evaluate(inputs, definition.run), evaluate(inputs, "reference")
        for name, x in wanted.items():
            assert relative_error(found[name], x) < EXACT, (tokens, name)


@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_the_size_of_a_block_is_not_part_of_the_model(monkeypatch, chunk_size):
    inputs = Case("sizes", chunk_size=chunk_size, tokens=150, key_dim=24, value_dim=20).draw(torch.float32)
    found = []
    for size in (16, 32, 64, 128):
        sized(monkeypatch, size)
        found.append(evaluate(inputs, "cpp"))
    for name, x in found[0].items():
        for other in found[1:]:
            assert relative_error(other[name], x) < CLOSE, name
    assert not torch.equal(found[0]["out"], found[2]["out"])  # other sums: the size does reach the kernels


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("decay", ["none", "scalar"])
@pytest.mark.parametrize("step", STEPS)
def test_equal_keys_at_the_largest_stable_step(monkeypatch, step, decay, backend):
    for size, chunk_size in ((32, 1), (64, 1), (64, 2)):
        if chunk_size > 1 and step != "1.0":
            continue  # a chunk of two equal keys moves twice as far
        sized(monkeypatch, size)
        report = check(EqualKeys(step, chunk_size=chunk_size, decay=decay, tokens=130, key_dim=32, value_dim=24), backend)
        assert report.ok, report


@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_pieces_of_chunks_are_the_whole(chunk_size):
    """A cut may lie anywhere in a chunk or a block, and a state tells where its open chunk began."""
    inputs = Case("pieces", chunk_size=chunk_size, tokens=79).draw(torch.float32)
    given = inputs.arguments()
    tokens = {name: given.pop(name) for name in ("q", "k", "v", "lr", "log_decay")}
    with torch.no_grad():
        wanted, end = mk.linear_memory(**tokens, **given, backend="reference")
        for bounds in ((0, 9, 26, 59, 79), (0, 11, 79), (0, 64, 79)):  # pieces of more tokens than decoding kernels read
            state, outs = given["initial_state"], []
            for a, b in itertools.pairwise(bounds):
                piece = {name: x[:, a:b] for name, x in tokens.items()}
                out, state = mk.linear_memory(**piece, **{**given, "initial_state": state}, backend="cpp")
                outs.append(out)
            assert relative_error(torch.cat(outs, 1), wanted) < CLOSE
            assert (state.open_chunk is None) == (chunk_size == 1)
            for x, y in zip(state.tensors(), end.tensors(), strict=True):
                assert relative_error(x, y) < CLOSE if y.any() else not x.any()


@pytest.mark.parametrize("level", _C.cpu_capabilities())
@pytest.mark.parametrize("chunk_size", [1, 4])
def test_no_output_depends_on_what_comes_later_or_on_threads(monkeypatch, level, chunk_size):
    monkeypatch.setenv("MIRAS_CPU_CAPABILITY", level)
    inputs = Case("prefix", chunk_size=chunk_size, batch=1, heads=1, tokens=75, value_dim=96).draw(torch.float32)
    given = inputs.arguments()
    tokens = {name: given.pop(name) for name in ("q", "k", "v", "lr", "log_decay")}
    before = torch.get_num_threads()
    try:
        with torch.no_grad():
            whole, state = mk.linear_memory(**tokens, **given, backend="cpp")
            for end in (9, 31, 46, 74):
                first = {name: x[:, :end] for name, x in tokens.items()}
                for final in (False, True):
                    out, _ = mk.linear_memory(**first, **{**given, "output_final_state": final}, backend="cpp")
                    assert torch.equal(out, whole[:, :end])
            for threads in (2, 4):  # which share out the value rows
                torch.set_num_threads(threads)
                out, again = mk.linear_memory(**tokens, **given, backend="cpp")
                assert torch.equal(out, whole) and torch.equal(again.dual[0], state.dual[0])
    finally:
        torch.set_num_threads(before)


def test_explain_says_what_is_computed_in_blocks():
    inputs = Case("explained", chunk_size=4).draw(torch.float32)
    given = inputs.arguments()
    algorithm = lambda **changes: mk.explain(**{**given, **changes}).algorithms["cpp"]
    assert algorithm() == algorithm(log_decay=None) == "exact steps in blocks of 32 tokens"
    assert algorithm(chunk_size=7) == "exact steps in blocks of 28 tokens"
    assert algorithm(chunk_size=16) == algorithm(bias=mk.L1(), chunk_size=16) == "chunks of 16 tokens"
    others = [dict(bias=mk.L1()), dict(retention=mk.KLRetention()), dict(momentum=given["lr"]), dict(lr=given["v"].detach().abs())]
    assert {algorithm(**other) for other in others} == {"chunks of 4 tokens"}
    with torch.no_grad():
        detached = {name: x.detach()[:, :2] if isinstance(x, torch.Tensor) and name != "initial_state" else x for name, x in given.items()}
        assert mk.explain(**{**detached, "initial_state": None}).algorithms["cpp"] == "token by token"


def test_the_command_line_says_so_too(capsys):
    main(["explain", "--chunk", "1", "--dim", "16"])
    assert "cpp        can serve it, exact steps in blocks of 32 tokens" in capsys.readouterr().out
    main(["explain", "--chunk", "1", "--dim", "16", "--bias", "l1"])
    assert "blocks" not in capsys.readouterr().out
