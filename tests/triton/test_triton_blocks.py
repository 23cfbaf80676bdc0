"""Exact steps in blocks (kernels/linear/block.py; docs/mathematics.md, sections 13 and 14), in Triton's interpreter or on a GPU."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

import miras_kernels as mk
from equal_keys import EqualKeys
from miras_kernels import dispatch
from miras_kernels.interop.fla import chunk_gated_delta_rule, chunk_kda
from miras_kernels.layers import MemoryBlock
from miras_kernels.testing import Case, check, evaluate, relative_error
from miras_kernels.testing.parity import ARITHMETIC, ULPS, expect
from quick import combinations, slow

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# two float32 orders of the same sums, as in tests/core/test_blocks.py
CLOSE = 64 * ARITHMETIC
SMALL = Case("block", chunk_size=1, batch=1, tokens=70)
FIRST = dataclasses.replace(SMALL, decay_first=True)
KEYED = dataclasses.replace(FIRST, decay="key", heads=1)
CASES = {
    "plain": dataclasses.replace(SMALL, batch=2, layout="fused"),
    "no-decay": dataclasses.replace(SMALL, decay="none", key_dim=40, value_dim=72),
    "extreme": dataclasses.replace(SMALL, decay="extreme", keys="zero", initial="none", key_dim=72, heads=1),
    "packed": dataclasses.replace(SMALL, lengths=(1, 40, 0, 33, 64), keys="repeated", initial="shared"),
    "huge": dataclasses.replace(SMALL, keys="huge", layout="heads_first", heads=3, tokens=33),
    "first": dataclasses.replace(FIRST, key_dim=24, value_dim=40),
    "first-extreme": dataclasses.replace(FIRST, decay="extreme", lengths=(1, 40, 0, 33), keys="repeated"),
    "first-no-decay": dataclasses.replace(FIRST, decay="none", tokens=40),
    "one-block": dataclasses.replace(SMALL, tokens=9),
    "whole-chunks": dataclasses.replace(SMALL, chunk_size=7),
    "erase": dataclasses.replace(SMALL, erase_k=True, heads=1, tokens=20),
    "erase-packed": dataclasses.replace(SMALL, erase_k=True, decay="strong", lengths=(1, 40, 0, 33), keys="huge", layout="fused"),
    "erase-first": dataclasses.replace(FIRST, erase_k=True, key_dim=72, value_dim=40, heads=1),
    "keyed": dataclasses.replace(KEYED, key_dim=24, value_dim=40, tokens=18),
    "keyed-plain": dataclasses.replace(KEYED, decay_first=False, batch=2, layout="fused", keys="zero", initial="none", tokens=35),
    "keyed-extreme": dataclasses.replace(KEYED, decay_first=False, decay="extreme_key", erase_k=True, tokens=20),
    "keyed-packed": dataclasses.replace(KEYED, decay="extreme_key", lengths=(1, 16, 0, 21), keys="repeated", initial="shared"),
    "keyed-wide": dataclasses.replace(KEYED, erase_k=True, key_dim=72, value_dim=136, layout="heads_first", keys="huge", tokens=20),
}
QUICK = ("erase", "keyed", "keyed-extreme", *(name for name in CASES if "erase" not in name and "keyed" not in name))


@pytest.mark.parametrize("name", [name if name in QUICK else slow(name) for name in CASES])
def test_float32(name, poisoned):
    """Outputs, states and every gradient against the float64 reference."""
    report = check(CASES[name], "triton", device=DEVICE)
    assert report.ok, report


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("plain", BF16), ("packed", F16), ("first-extreme", BF16), slow("no-decay", F16), slow("extreme", F16), slow("first", F16),
        slow("erase-packed", BF16), slow("erase-first", F16), slow("keyed-plain", BF16), slow("keyed-extreme", F16),
        slow("keyed-packed", BF16),
    ],
    ids=str,
)  # fmt: skip
def test_sixteen_bits(name, dtype, poisoned):
    case = CASES[name]
    report = check(case if "keyed" in name else dataclasses.replace(case, tokens=150), "triton", dtype, DEVICE)
    assert report.ok, report


@pytest.mark.parametrize("name", ["plain", "packed", "first", *map(slow, ("erase", "keyed", "keyed-packed"))])
def test_states_in_registers(name, poisoned):
    """The chains of 16-bit inputs in float32 arithmetic, where rounding errors cannot hide an error of logic."""
    from miras_kernels.kernels.common import configs

    with configs.stream(False):
        report = check(CASES[name], "triton", device=DEVICE)
    assert report.ok, report


@pytest.mark.parametrize(
    ("name", "dtype"), [("plain", F32), ("packed", F32), ("first-extreme", F32), ("no-decay", BF16), slow("erase", F32)], ids=str
)
def test_with_the_output_in_the_chain(name, dtype, poisoned):
    from miras_kernels.kernels.common import configs

    with configs.fuse(True):
        report = check(CASES[name], "triton", dtype, DEVICE)
    assert report.ok, report


@pytest.mark.parametrize(
    ("step", "decay", "dtype"),
    combinations(["1.0", "1.9", "2.0"], ["none", "scalar"], [F32, BF16], quick=lambda step, decay, dtype: (step + decay + dtype) % 3 == 2),
    ids=str,
)
def test_equal_keys_at_the_largest_stable_step(step, decay, dtype):
    report = check(EqualKeys(step, chunk_size=1, decay=decay, batch=1, tokens=130, key_dim=32, value_dim=24), "triton", dtype, DEVICE)
    assert report.ok, report


def short_chunks(inputs, backend: str) -> dict[str, torch.Tensor]:
    """Without a final state: what sequences of chunks of several tokens are computed in blocks with."""
    arguments = inputs.arguments() | dict(output_final_state=False)
    out, _ = mk.linear_memory(**arguments, backend=backend)
    leaves = inputs.leaves()
    grads = torch.autograd.grad(out, tuple(leaves.values()), inputs.grad_out.to(out.dtype))
    return {"out": out.detach()} | {f"grad_{name}": x for name, x in zip(leaves, grads, strict=True)}


@pytest.mark.parametrize(
    ("chunk_size", "changes"),
    combinations(
        [2, 7, 8, 15], [{}, {"decay": "none"}, {"decay": "extreme", "lengths": (1, 40, 0, 33)}], quick=lambda chunk, kind: chunk % 3 == kind
    ),
    ids=str,
)
def test_short_chunks(chunk_size, changes, poisoned):
    inputs = dataclasses.replace(SMALL, chunk_size=chunk_size, heads=1, **changes).draw(F32, DEVICE)
    wanted = expect(inputs, F32, lambda x: short_chunks(x, "reference"))
    for name, x in short_chunks(inputs, "triton").items():
        assert relative_error(x, wanted[name].exact) < wanted[name].budget + ULPS * ARITHMETIC, name


@pytest.mark.parametrize("decay_first", [False, True])
def test_pieces_are_the_whole(decay_first):
    """A cut may lie anywhere in a block; pieces of few tokens are decoded."""
    inputs = dataclasses.replace(SMALL, tokens=79, decay_first=decay_first).draw(F32, DEVICE)
    given = inputs.arguments()
    tokens = {name: given.pop(name) for name in ("q", "k", "v", "lr", "log_decay")}
    with torch.no_grad():
        wanted, end = mk.linear_memory(**tokens, **given, backend="reference")
        for bounds in ((0, 9, 10, 42, 79), (0, 64, 67, 79)):
            state, outs = given["initial_state"], []
            for a, b in itertools.pairwise(bounds):
                piece = {name: x[:, a:b] for name, x in tokens.items()}
                out, state = mk.linear_memory(**piece, **{**given, "initial_state": state}, backend="triton")
                outs.append(out)
            assert relative_error(torch.cat(outs, 1), wanted) < CLOSE
            assert state.open_chunk is None and relative_error(state.dual[0], end.dual[0]) < CLOSE


def test_packed_states_go_on():
    """The final state of packed sequences has an open chunk of no tokens, as that of the reference does."""
    inputs = dataclasses.replace(SMALL, lengths=(3, 0, 50)).draw(F32, DEVICE)
    given = inputs.arguments()
    with torch.no_grad():
        for _ in range(2):
            out, state = mk.linear_memory(**given, backend="triton")
            wanted, end = mk.linear_memory(**given, backend="reference")
            assert relative_error(out, wanted) < CLOSE
            assert not state.open_chunk.position.any() and not state.open_chunk.log_decay.any()
            for x, y in ((state.dual[0], end.dual[0]), (state.open_chunk.start[0], end.dual[0])):
                assert relative_error(x, y) < CLOSE
            given["initial_state"] = state


def test_the_checkpoint_interval_does_not_change_a_bit():
    inputs = dataclasses.replace(SMALL, tokens=110, heads=1).draw(F32, DEVICE)
    found = []
    for every in (1, 64, 1000):
        with mk.override(checkpoint_every=every):
            found.append(evaluate(inputs, "triton"))
    for name, x in found[0].items():
        assert torch.equal(found[1][name], x) and torch.equal(found[2][name], x), name


def test_no_output_depends_on_what_comes_later():
    inputs = dataclasses.replace(SMALL, heads=1, tokens=75).draw(F32, DEVICE)
    given = inputs.arguments()
    tokens = {name: given.pop(name) for name in ("q", "k", "v", "lr", "log_decay")}
    with torch.no_grad():
        whole, _ = mk.linear_memory(**tokens, **given, backend="triton")
        for end in (9, 31, 46):
            out, _ = mk.linear_memory(**{name: x[:, :end] for name, x in tokens.items()}, **given, backend="triton")
            assert torch.equal(out, whole[:, :end])


def test_explain_says_what_is_computed_in_blocks():
    given = SMALL.draw(F32, DEVICE).arguments()
    explained = lambda **changes: mk.explain(**{**given, **changes})
    algorithm = lambda **changes: explained(**changes).algorithms["triton"]
    halves = {name: given[name].bfloat16() for name in "qkv"}
    assert algorithm() == algorithm(log_decay=None) == algorithm(decay_first=True) == "exact steps in blocks of 32 tokens"
    assert algorithm(**halves) == "exact steps in blocks of 64 tokens"
    assert algorithm(**halves, chunk_size=7, output_final_state=False) == "exact steps in blocks of 63 tokens"
    assert algorithm(chunk_size=7) == "exact steps in blocks of 28 tokens"
    assert algorithm(chunk_size=8) == "chunks of 8 tokens"  # the sequence ends inside a chunk
    others = [dict(bias=mk.L1()), dict(retention=mk.KLRetention()), dict(momentum=given["lr"].detach()), dict(lr=given["v"].detach().abs())]
    assert {algorithm(**other) for other in others} == {"chunks of 1 tokens"}
    for other in others[::2]:
        assert "it serves decay_first with L2()" in explained(**other, decay_first=True)["triton"]
    assert algorithm(erase_k=given["k"]) == "exact steps in blocks of 32 tokens"
    by_key = dict(log_decay=None, key_log_decay=-given["k"].detach().abs())
    assert algorithm(**by_key) == algorithm(**by_key, **halves) == "exact steps in blocks of 16 tokens"


@pytest.mark.parametrize(
    ("preset", "function", "decay"),
    [("gated_deltanet", chunk_gated_delta_rule, ()), ("kda", chunk_kda, (16,))],
    ids=["gated_deltanet", "kda"],
)
def test_layers_and_flash_linear_attentions_functions_run_on_triton(preset, function, decay, monkeypatch):
    """A preset, forward and backward, and the function of its rule with two value heads for every key head."""
    torch.manual_seed(0)
    block, x = MemoryBlock(32, 2, preset=preset).to(DEVICE), torch.randn(1, 20, 32, device=DEVICE)
    q, k, v = (torch.randn(1, 20, h, 16, device=DEVICE) for h in (2, 2, 4))
    g, beta = -torch.rand(1, 20, 4, *decay, device=DEVICE), torch.rand(1, 20, 4, device=DEVICE)
    found = {}
    for backend in ("triton", "reference"):
        block.backend = backend
        monkeypatch.setattr(dispatch, "candidates", lambda device, backend=backend: (backend,))
        grads = torch.autograd.grad(block(x)[0].square().sum(), tuple(block.parameters()))
        found[backend] = [*grads, *function(q, k, v, g, beta, use_qk_l2norm_in_kernel=True, output_final_state=True)]
    for a, b in zip(*found.values(), strict=True):
        assert relative_error(a, b) < CLOSE
