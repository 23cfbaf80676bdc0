"""What the tests of decoding share, whatever the backend: cases, and comparisons with the float64 reference of the whole sequence."""

from __future__ import annotations

import dataclasses
import itertools

import torch

import miras_kernels as mk
from miras_kernels import dispatch
from miras_kernels.backends.reference import chunkwise
from miras_kernels.call import Call
from miras_kernels.memory import FUNCTIONS
from miras_kernels.tables.retention import TABLE as GATES
from miras_kernels.testing import Case, Inputs, check_steps, registry, relative_error
from miras_kernels.testing.parity import ARITHMETIC, judge
from miras_kernels.testing.steps import before, check_results, cut, decoder, final, inputs_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

PAIRS = [case for case in registry() if "-pairs-" in case.name and case.lengths is None and case.initial != "none"]
MLP = dict(memory="mlp", key_dim=16, value_dim=16, hidden=24)
SIZES = [
    Case("linear-one-by-one", key_dim=1, value_dim=1),
    Case("linear-odd", key_dim=19, value_dim=33, retention=GATES[2], decay="channel", lr="channel"),
    Case("linear-wide", key_dim=48, value_dim=136, retention=GATES[1], momentum=True, heads=1),
    Case("linear-common", key_dim=64, value_dim=64),
    Case("linear-largest", key_dim=256, value_dim=256, heads=1, batch=1, momentum=True),
    Case("linear-many-heads", batch=9, heads=8, key_dim=64, value_dim=64),
    Case("linear-chunk-1", chunk_size=1),
    Case("linear-chunk-1-momentum", chunk_size=1, momentum=True),
    *(Case(f"linear-chunk-1-{gate.name}", chunk_size=1, retention=gate, decay="strong", seed=i) for i, gate in GATES.items() if i),
    Case("linear-chunk-3-lq", chunk_size=3, retention=GATES[1], momentum=True),
    Case("linear-long-chunk", key_dim=9, value_dim=11, chunk_size=50, tokens=110, retention=GATES[1], momentum=True, decay="channel"),
    Case("linear-extreme-channel-decay", decay="extreme_channel", tokens=60, retention=GATES[4]),
    Case("linear-float-delta", bias=mk.Huber("norm"), delta="float"),
    Case("linear-channel-delta", bias=mk.Huber("coordinate"), delta="channel", value_dim=21),
    Case("linear-fused", layout="fused"),
    Case("linear-heads-first", layout="heads_first"),
    Case("mlp-odd", **MLP | dict(key_dim=19, value_dim=19, hidden=37), retention=GATES[3], momentum=True),
    Case("mlp-tiny", **MLP | dict(key_dim=1, value_dim=1, hidden=3), bias=mk.Huber("coordinate"), batch=1),
    Case("mlp-common", **MLP | dict(key_dim=64, value_dim=64, hidden=256), batch=1, chunk_size=8),
    Case("mlp-wide", **MLP | dict(key_dim=136, value_dim=136, hidden=40), retention=GATES[3], batch=1),
    Case("mlp-long-chunk", **MLP, chunk_size=50, tokens=110, retention=GATES[2], momentum=True),
    Case("mlp-chunk-1", **MLP, chunk_size=1),
    Case("mlp-chunk-1-lq", **MLP, chunk_size=1, retention=GATES[1]),
    Case("mlp-fused-float-delta", **MLP, bias=mk.RobustL2(), delta="float", layout="fused"),
]

SHAPES = {
    # more channels than a tile: several programs for a head ...
    "wide": Case("wide", batch=1, heads=1, key_dim=20, value_dim=41, decay="channel", lr="channel", momentum=True, seed=1),
    # ... or one program for all tiles, if the error's norm or the whole matrix couples them
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

LONG = {
    memory: Case(
        f"long-{memory}", memory=memory, batch=1, heads=1, key_dim=5, value_dim=5, hidden=20, chunk_size=70, momentum=True, decay="slight",
        retention=GATES[2],
    )
    for memory in ("linear", "mlp")
}  # fmt: skip


@torch.no_grad()
def run(inputs: Inputs, backend: str, cuts: list[int]) -> tuple[torch.Tensor, mk.MemoryState]:
    """Outputs and state of a decoder after a prompt of ``cuts[0]`` tokens, with one step for the tokens between two cuts."""
    arguments = inputs.arguments()
    _, prompt = inputs.case.function(**{**arguments, **cut(arguments, 0, cuts[0])}, backend="reference")
    reader = decoder(inputs.case, arguments, prompt, backend)
    outs = [reader.step(**cut(arguments, a, b)) for a, b in itertools.pairwise(cuts)]
    return torch.cat(outs, 1).cpu(), reader.state().to("cpu")


def assert_right(case: Case, backend: str, cuts: list[int], dtype: torch.dtype = torch.float32, device: str = DEVICE) -> None:
    """Within the budgets of ``check_steps``; so is the open chunk, which starts from the dual after the tokens before it."""
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


def at_different_places(backend: str, memory: str, device: str = DEVICE) -> None:
    """Sequences at different places in their chunks, one at a boundary: each as if it were alone."""
    case = Case(
        "apart", memory=memory, batch=3, heads=2, key_dim=8, value_dim=8, hidden=12, chunk_size=4, retention=GATES[1], momentum=True
    )
    inputs = case.draw(torch.float32).to(torch.float32, device)
    arguments = inputs.arguments()
    read = FUNCTIONS[memory]
    with torch.no_grad():
        prompts = [
            read(**{**arguments, **cut(arguments, 0, 4 + n)}, backend="reference")[1].map(lambda x, n=n: x[n : n + 1]) for n in range(3)
        ]
        prompts = [decoder(case, arguments, state, "reference").state() for state in prompts]  # has a position, even at a boundary
        tensors = [torch.cat(parts) for parts in zip(*(state.tensors() for state in prompts), strict=True)]
        state = prompts[0].replace_tensors(tensors)
        state = dataclasses.replace(state, open_chunk=dataclasses.replace(state.open_chunk, position=torch.arange(3, device=device)))
        own = lambda x, n, s: x[n : n + 1, 4 + n + s : 5 + n + s]  # the s-th token after sequence n's prompt
        together, found = decoder(case, arguments, state, backend), {}
        for s in range(3):
            pick = lambda n, s=s: {x: own(arguments[x], n, s) for x in Call.PER_TOKEN if arguments.get(x) is not None}
            parts = [pick(n) for n in range(3)]
            found[str(s)] = together.step(**{x: torch.cat([part[x] for part in parts]) for x in parts[0]})
        assert together.buffers.position.tolist() == [3, 0, 1]

        rows = lambda out: {s: torch.cat([own(out, n, int(s)) for n in range(3)]) for s in found}
        check_results(inputs, found, lambda call: rows(chunkwise.run(call)[0]))


def unavailable(backend: str) -> str:
    """The reason why a backend cannot run on a GPU here, or an empty string."""
    return "there is no GPU here" if DEVICE == "cpu" else dispatch.unavailable(backend) or ""
