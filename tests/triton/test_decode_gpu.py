"""The decoding steps made for GPUs, Triton's in its interpreter, against the float64 reference of the whole sequence."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from test_decode import PAIRS

import miras_kernels as mk
from miras_kernels import dispatch
from miras_kernels.backends.reference import chunkwise
from miras_kernels.call import Call
from miras_kernels.tables.retention import TABLE as GATES
from miras_kernels.testing import Case, Inputs, check_steps, relative_error
from miras_kernels.testing.parity import ARITHMETIC, judge
from miras_kernels.testing.steps import before, check_results, cut, decoder, final, function, inputs_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

#: what the interpreter reaches in seconds: every bias, every gate; with momentum, channel-wise and float thresholds
SAMPLE = [case for i, case in enumerate(PAIRS) if DEVICE == "cuda" or case.memory == "linear" or i % 3 == 0]


@torch.no_grad()
def run(inputs: Inputs, backend: str, cuts: list[int]) -> tuple[torch.Tensor, mk.MemoryState]:
    """Outputs and state of a decoder after a prompt of ``cuts[0]`` tokens, a run between two cuts at a time."""
    arguments = inputs.arguments()
    _, prompt = function(inputs.case)(**{**arguments, **cut(arguments, 0, cuts[0])}, backend="reference")
    reader = decoder(inputs.case, arguments, prompt, backend)
    outs = [reader.step(**cut(arguments, a, b)) for a, b in itertools.pairwise(cuts)]
    return torch.cat(outs, 1).cpu(), reader.state().to("cpu")


def assert_right(case: Case, backend: str, cuts: list[int], dtype: torch.dtype = torch.float32, device: str = DEVICE) -> None:
    """Within the budgets of ``check_steps``; the open chunk as well: it starts from the dual after the tokens before it."""
    case = dataclasses.replace(case, tokens=cuts[-1])
    inputs = inputs_of(case, backend, dtype)
    out, state = run(inputs.to(dtype, device), backend, cuts)
    report = check_steps(case, backend, dtype, cuts, found=final(out, state))
    assert report.ok, report
    opened, inside = state.open_chunk, cuts[-1] % case.chunk_size
    starts = {f"final_dual_{i}": x for i, x in enumerate(opened.start)}
    report = judge(before(inputs, cuts[-1] - inside), starts, torch.float32)
    assert report.ok, report
    assert opened.position.tolist() == [inside] * case.batch
    exact = inputs.tensors.get("log_decay")
    wanted = torch.zeros_like(opened.log_decay) if exact is None else exact[:, case.tokens - inside :].double().sum(1)
    assert relative_error(opened.log_decay, wanted) <= case.chunk_size * ARITHMETIC  # all of one sign


@pytest.mark.parametrize("case", SAMPLE, ids=str)
def test_triton_steps(case, poisoned):
    """A run that ends a chunk of 16, and the token that begins the next."""
    assert_right(case, "triton", [14, 16, 17])


SHAPES = {
    # more channels than a tile: the programs of a head stand apart ...
    "wide": Case("wide", batch=1, heads=1, key_dim=20, value_dim=41, decay="channel", lr="channel", momentum=True, seed=1),
    # ... or one program goes over them, for the sake of the error's norm, or of the whole matrix
    "coupled": Case("coupled", batch=1, heads=1, key_dim=20, value_dim=70, bias=mk.Huber("norm"), retention=GATES[2], seed=2),
    "entire": Case("entire", batch=1, heads=1, key_dim=7, value_dim=70, retention=GATES[1], decay="channel", seed=3),
    "threshold": Case("threshold", batch=1, heads=3, key_dim=8, value_dim=9, bias=mk.Huber("coordinate"), delta="float", seed=4),
    "every-token": Case("every-token", batch=2, heads=2, key_dim=8, value_dim=8, chunk_size=1, retention=GATES[3], seed=5),
    "fused": Case("fused", batch=1, heads=2, key_dim=8, value_dim=8, layout="fused", decay="extreme_channel", seed=6),
    "mlp": Case("mlp", memory="mlp", batch=1, heads=1, key_dim=19, value_dim=19, hidden=150, bias=mk.Huber("switch"), seed=7),
    "mlp-gated": Case(
        "mlp-gated", memory="mlp", batch=1, heads=1, key_dim=16, value_dim=16, hidden=300, retention=GATES[2], decay="extreme", seed=8
    ),
    "mlp-entire": Case("mlp-entire", memory="mlp", batch=1, heads=1, key_dim=5, value_dim=5, hidden=7, retention=GATES[1], seed=9),
    "mlp-every-token": Case("mlp-every-token", memory="mlp", heads=1, key_dim=8, value_dim=8, hidden=8, chunk_size=1, seed=10),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_triton_sizes(name, poisoned):
    assert_right(SHAPES[name], "triton", [15, 16, 17])


LONG = {
    memory: Case(
        f"long-{memory}", memory=memory, batch=1, heads=1, key_dim=5, value_dim=5, hidden=20, chunk_size=70, momentum=True, decay="slight",
        retention=GATES[2],
    )
    for memory in ("linear", "mlp")
}  # fmt: skip


@pytest.mark.parametrize("memory", LONG)
def test_triton_chunks_of_many_tokens(memory, poisoned):
    """More factors than a kernel takes at once."""
    assert_right(LONG[memory], "triton", [60, 68, 70, 71])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("memory", ["linear", "mlp"])
def test_triton_sixteen_bits(memory, dtype, poisoned):
    """Tokens of 16 bits, a state of 32: only outputs are rounded."""
    case = Case("sixteen", memory=memory, batch=1, heads=1, value_dim=16, hidden=20, momentum=True, retention=GATES[3])
    assert_right(case, "triton", [15, 16, 17], dtype)


def standing_apart(backend: str, memory: str, device: str = DEVICE) -> None:
    """Sequences at different places of their chunks, one at a boundary: each as if it were alone."""
    case = Case(
        "apart", memory=memory, batch=3, heads=2, key_dim=8, value_dim=8, hidden=12, chunk_size=4, retention=GATES[1], momentum=True
    )
    inputs = case.draw(torch.float32).to(torch.float32, device)
    arguments = inputs.arguments()
    read = mk.linear_memory if memory == "linear" else mk.mlp_memory
    with torch.no_grad():
        prompts = [
            read(**{**arguments, **cut(arguments, 0, 4 + n)}, backend="reference")[1].map(lambda x, n=n: x[n : n + 1]) for n in range(3)
        ]
        prompts = [decoder(case, arguments, state, "reference").state() for state in prompts]  # says where it stands, even at a boundary
        tensors = [torch.cat(parts) for parts in zip(*(state.tensors() for state in prompts), strict=True)]
        state = prompts[0].replace_tensors(tensors)
        state = dataclasses.replace(state, open_chunk=dataclasses.replace(state.open_chunk, position=torch.arange(3, device=device)))
        own = lambda x, n, s: x[n : n + 1, 4 + n + s : 5 + n + s]  # the s-th token after sequence n's prompt
        together, found = decoder(case, arguments, state, backend), {}
        for s in range(3):
            pick = lambda n, s=s: {x: own(arguments[x], n, s) for x in Call.PER_TOKEN if arguments[x] is not None}
            parts = [pick(n) for n in range(3)]
            found[str(s)] = together.step(**{x: torch.cat([part[x] for part in parts]) for x in parts[0]})
        assert together.buffers.position.tolist() == [3, 0, 1]

        rows = lambda out: {s: torch.cat([own(out, n, int(s)) for n in range(3)]) for s in found}
        check_results(inputs, found, lambda call: rows(chunkwise.run(call)[0]))


@pytest.mark.parametrize("memory", ["linear", "mlp"])
def test_triton_sequences_stand_apart(memory):
    standing_apart("triton", memory)


def test_a_result_may_lie_anywhere():
    """``out`` with any strides; nothing beside it is touched."""
    case = Case("out", batch=2, heads=2, key_dim=8, value_dim=6)
    arguments = case.draw(torch.float32, DEVICE).arguments()
    with torch.no_grad():
        _, state = mk.linear_memory(**{**arguments, **cut(arguments, 0, 3)}, backend="reference")
        wanted = decoder(case, arguments, state, "triton").step(**cut(arguments, 3, 4))
        for room in (torch.full((2, 1, 6, 2), 7.0).transpose(2, 3), torch.full((2, 1, 2, 11), 7.0)[..., 2:8]):
            room = room.to(DEVICE)
            out = decoder(case, arguments, state, "triton").step(**cut(arguments, 3, 4), out=room)
            assert out is room and torch.equal(room, wanted)


def test_what_triton_cannot_decode_is_said():
    case = Case("refused", tokens=4, batch=1, heads=1, key_dim=300)
    arguments = case.draw(torch.float32, DEVICE).arguments()
    _, state = mk.linear_memory(**arguments, backend="reference")
    with pytest.raises(ValueError, match="'triton' cannot decode this: head dimensions are limited to 256, got 300"):
        decoder(case, arguments, state, "triton").step(**cut(arguments, 0, 1))


def test_a_planted_bug_is_caught(monkeypatch):
    """A momentum that is not kept, a decay that is forgotten."""
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


def unavailable(backend: str) -> str:
    """Why a backend cannot be run on a GPU, or nothing."""
    return "there is no GPU here" if DEVICE == "cpu" else dispatch.unavailable(backend) or ""


def on_a_gpu(backend: str):
    """A test's parameter, skipped where the backend cannot run on a GPU."""
    return pytest.param(backend, marks=pytest.mark.skipif(unavailable(backend) != "", reason=f"{backend}: {unavailable(backend)}"))


@pytest.mark.parametrize("memory", LONG)
@pytest.mark.parametrize("backend", [on_a_gpu("triton"), on_a_gpu("cuda")])
def test_a_step_in_a_graph(memory, backend):
    """Captured once inside a chunk and replayed beyond its end: bit for bit what steps give one by one."""
    case = dataclasses.replace(LONG[memory], batch=2, heads=2, tokens=40, chunk_size=16)
    arguments = case.draw(torch.float32, DEVICE).arguments()
    with torch.no_grad():
        _, state = function(case)(**{**arguments, **cut(arguments, 0, 13)}, backend="reference")
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
