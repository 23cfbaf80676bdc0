"""Decoding steps: are those of each backend right, and how long does a token take?"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch

from miras_kernels import L2, Decoder, Huber, KLRetention, LqRetention, MemoryState, dispatch
from miras_kernels.testing import Case, Report, check_steps, steps

from ..common.processes import first_line
from ..common.timing import figures, interleave, spread
from .device import first_call, release, sampler, usable, yardsticks
from .inputs import DTYPE
from .plan import Settings, Shape, shape_of


def check(case: Case, backend: str, dtype: torch.dtype, device: str) -> Report:
    """Steps up to a chunk's end, together and one by one, and into the next chunk, against float64 within the tests' budgets."""
    c = case.chunk_size
    cuts = sorted({max(c - 3, 0), c - 1, c, c + 2})
    case = dataclasses.replace(case, tokens=cuts[-1])
    found = steps.read(steps.inputs_of(case, backend, dtype).to(dtype, device), backend, cuts)
    return check_steps(case, backend, dtype, cuts, found={name: x.cpu() for name, x in found.items()})


def cases(shape: Shape) -> list[Case]:
    """What is timed, with fewer heads; then variants of the recurrence."""
    sizes = dict(memory=shape.memory, batch=2, heads=2, key_dim=shape.key_dim, value_dim=shape.value_dim, chunk_size=shape.chunk_size)
    sizes |= dict(hidden=shape.hidden, decay="slight") if shape.hidden else {}
    more = [dict(retention=LqRetention(), momentum=True), dict(retention=KLRetention(), bias=Huber("switch"))]
    more += [] if shape.hidden else [dict(decay="channel", lr="channel", momentum=True)]
    return [Case(f"decode {shape} {i}", **sizes | changes) for i, changes in enumerate([dict(bias=L2()), *more])]


def decode(settings: Settings, shape: str) -> Iterator[dict]:
    """A token's time, mean over a whole chunk, with every backend that decodes here: launched by Python, and from a CUDA graph."""
    size, result = shape_of(shape, settings), {"direction": None, "parity": {}, "notes": []}
    runs: dict[str, Callable] = {}
    others = ["cuda"] if settings.device == "cuda" and dispatch.unavailable("cuda") is None else []
    for backend in (settings.backend, *others):
        yield {"doing": backend}
        try:
            worst = max(
                (check(case, backend, DTYPE, settings.device).worst for case in cases(size)), key=lambda row: row.error / row.budget
            )
            result["parity"][backend] = {"ok": worst.ok, "worst": {"tensor": worst.name, "error": worst.error, "budget": worst.budget}}
            if not worst.ok:
                result["notes"].append(f"{backend}: parity is red, not timed ({worst.name}: {worst.error:.1e}, budget {worst.budget:.1e})")
                continue
            runs[backend] = one_by_one(size, backend, settings)
            if settings.device == "cuda":
                runs[f"{backend}, graph"] = replayed(size, backend, settings)
        except Exception as error:
            if not usable():
                raise
            result["notes"].append(f"{backend}: did not run: {first_line(error)}")
            release()
    runs["eager"] = one_by_one(size, "reference", settings)
    for run in runs.values():
        first_call(run, settings.first_seconds)
    copy, amount = yardsticks(settings)
    samplers = {name: sampler(run, settings) for name, run in {**runs, "copy": copy["copy"]}.items()}
    times = interleave(samplers, settings.seconds, settings.min_rounds, slice_seconds=0)
    rate = amount["copy"] / spread(times.pop("copy"))["median"]
    times = {name: [t / size.chunk_size for t in ts] for name, ts in times.items()}
    found = figures(times, "eager")
    result["share_of_copy"] = {name: step_bytes(size) / rate / (1e-3 * ms["median"]) for name, ms in found["ms"].items()}
    yield {**result, **found}


def reader(shape: Shape, backend: str, settings: Settings) -> tuple[Decoder, dict]:
    """A decoder at a chunk's start, and a token for it."""
    case = dataclasses.replace(cases(shape)[0], batch=shape.batch, heads=shape.heads, tokens=1)
    inputs = case.draw(torch.float32, settings.device).to(DTYPE, settings.device)
    arguments = {name: x.detach() if isinstance(x, torch.Tensor) else x for name, x in inputs.arguments().items()}
    made = steps.decoder(case, arguments, MemoryState(tuple(x.detach() for x in inputs.duals)), backend)
    return made, steps.cut(arguments, 0, 1)


def one_by_one(shape: Shape, backend: str, settings: Settings) -> Callable[[], torch.Tensor]:
    """The steps of a chunk, each launched by Python."""
    made, token = reader(shape, backend, settings)

    def run() -> torch.Tensor:
        for _ in range(shape.chunk_size):
            out = made.step(**token)
        return out

    return run


def replayed(shape: Shape, backend: str, settings: Settings) -> Callable[[], torch.Tensor]:
    """The steps of a chunk, as replays of a CUDA graph of one step."""
    made, token = reader(shape, backend, settings)
    out = torch.empty_like(token["v"])
    for _ in range(shape.chunk_size):
        made.step(**token, out=out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made.step(**token, out=out)

    def run() -> torch.Tensor:
        for _ in range(shape.chunk_size):
            graph.replay()
        return out

    return run


def step_bytes(shape: Shape) -> float:
    """What a step must move on average: the primal once, half a chunk's factors, and the matrices read and written once a chunk."""
    matrix = sum(rows * columns for rows, columns in shape.matrices)
    factors = sum(rows + columns for rows, columns in shape.matrices)
    return 4 * shape.batch * shape.heads * (matrix * (1 + 2 / shape.chunk_size) + factors * (shape.chunk_size + 1) / 2)


TASKS = {"decode": decode}
