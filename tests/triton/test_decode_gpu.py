"""The Triton decoding steps, without a GPU in the interpreter, against the float64 reference of the whole sequence; CUDA graphs."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import miras_kernels as mk
from decoding import DEVICE, LONG, PAIRS, SHAPES, assert_right, at_different_places, unavailable
from miras_kernels import dispatch
from miras_kernels.tables.retention import TABLE as GATES
from miras_kernels.testing import Case
from miras_kernels.testing.steps import cut, decoder

#: what takes the interpreter seconds: every bias, every retention gate; with momentum, channel-wise and float thresholds
SAMPLE = [case for i, case in enumerate(PAIRS) if DEVICE == "cuda" or case.memory == "linear" or i % 3 == 0]


@pytest.mark.parametrize("case", SAMPLE, ids=str)
def test_triton_steps(case, poisoned):
    """Two tokens that end a chunk of 16, and the first token of the next."""
    assert_right(case, "triton", [14, 16, 17])


@pytest.mark.parametrize("name", SHAPES)
def test_triton_sizes(name, poisoned):
    assert_right(SHAPES[name], "triton", [15, 16, 17])


@pytest.mark.parametrize("memory", LONG)
def test_triton_chunks_of_many_tokens(memory, poisoned):
    """More factors than a kernel reads at once."""
    assert_right(LONG[memory], "triton", [60, 68, 70, 71])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("memory", ["linear", "mlp"])
def test_triton_sixteen_bits(memory, dtype, poisoned):
    """Tokens of 16 bits, a state of 32: only outputs are rounded."""
    case = Case("sixteen", memory=memory, batch=1, heads=1, value_dim=16, hidden=20, momentum=True, retention=GATES[3])
    assert_right(case, "triton", [15, 16, 17], dtype)


@pytest.mark.parametrize("memory", ["linear", "mlp"])
def test_triton_sequences_at_different_places(memory):
    at_different_places("triton", memory)


def test_out_may_have_any_strides():
    """Nothing outside ``out`` is written."""
    case = Case("out", batch=2, heads=2, key_dim=8, value_dim=6)
    arguments = case.draw(torch.float32, DEVICE).arguments()
    with torch.no_grad():
        _, state = mk.linear_memory(**{**arguments, **cut(arguments, 0, 3)}, backend="reference")
        wanted = decoder(case, arguments, state, "triton").step(**cut(arguments, 3, 4))
        for room in (torch.full((2, 1, 6, 2), 7.0).transpose(2, 3), torch.full((2, 1, 2, 11), 7.0)[..., 2:8]):
            room = room.to(DEVICE)
            out = decoder(case, arguments, state, "triton").step(**cut(arguments, 3, 4), out=room)
            assert out is room and torch.equal(room, wanted)


def test_refusals_name_the_reason():
    case = Case("refused", tokens=4, batch=1, heads=1, key_dim=300)
    arguments = case.draw(torch.float32, DEVICE).arguments()
    _, state = mk.linear_memory(**arguments, backend="reference")
    with pytest.raises(ValueError, match="'triton' cannot decode this: head dimensions are limited to 256, got 300"):
        decoder(case, arguments, state, "triton").step(**cut(arguments, 0, 1))


def test_a_planted_bug_is_caught(monkeypatch):
    """A wrong momentum, a wrong decay."""
    case = next(case for case in PAIRS if case.momentum and case.decay != "none" and case.memory == "linear")
    backend = dispatch.BACKENDS["triton"]
    prepare = type(backend).stepper
    for name in ("log_decay", "momentum"):

        def wrong(self, call, name=name):
            run = prepare(self, call)
            order = ("q", "k", "v", "lr", "log_decay", "delta", "momentum", "out")

            def changed(buffers, *tokens):
                tokens = dict(zip(order, tokens, strict=True))
                run(buffers, *{**tokens, name: tokens[name] * 0.999}.values())

            return changed

        monkeypatch.setattr(type(backend), "stepper", wrong)
        with pytest.raises(AssertionError):
            assert_right(case, "triton", [14, 15])


def on_a_gpu(backend: str):
    """A test's parameter, skipped where the backend cannot run on a GPU."""
    return pytest.param(backend, marks=pytest.mark.skipif(unavailable(backend) != "", reason=f"{backend}: {unavailable(backend)}"))


@pytest.mark.parametrize("memory", LONG)
@pytest.mark.parametrize("backend", [on_a_gpu("triton"), on_a_gpu("cuda")])
def test_a_step_in_a_graph(memory, backend):
    """Captured once inside a chunk and replayed beyond its end: bit for bit the results of single steps."""
    case = dataclasses.replace(LONG[memory], batch=2, heads=2, tokens=40, chunk_size=16)
    arguments = case.draw(torch.float32, DEVICE).arguments()
    with torch.no_grad():
        _, state = case.function(**{**arguments, **cut(arguments, 0, 13)}, backend="reference")
        single, graphed = (decoder(case, arguments, state, backend) for _ in range(2))
        wanted = [single.step(**cut(arguments, t, t + 1)) for t in range(13, 34)]
        token = {name: x.clone() for name, x in cut(arguments, 13, 14).items()}
        graphed.step(**token)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = graphed.step(**token)
        for t in range(14, 34):
            for name, x in cut(arguments, t, t + 1).items():
                token[name].copy_(x)
            graph.replay()
            assert torch.equal(out, wanted[t - 13])
        assert all(torch.equal(x, y) for x, y in zip(graphed.state().tensors(), single.state().tensors(), strict=True))
