"""Decoding in bench/gpu.py: are the steps of each backend right, and how long does a token take?"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator

import torch

from gpu_measure import first_call, first_line, interleave, release, summary, usable
from gpu_plan import EAGER, Settings, Shape, decoding
from gpu_tensors import DTYPE
from miras_kernels import L2, Decoder, Huber, KLRetention, LqRetention, MemoryState, dispatch
from miras_kernels.testing import Case, check_steps, steps
from miras_kernels.testing.parity import Report

Doing = Callable[[str], None]


def step_kernels(settings: Settings) -> tuple[str, ...]:
    """Kernels that only a decoder launches."""
    if settings.backend == "reference":
        return ()
    from miras_kernels.kernels.common import configs

    return configs.STEPS


def check(case: Case, backend: str, dtype: torch.dtype, device: str) -> Report:
    """Steps up to a chunk's end, at once and one by one, and into the next one, against float64 with the tests' budgets."""
    c = case.chunk_size
    cuts = sorted({max(c - 3, 0), c - 1, c, c + 2})
    case = dataclasses.replace(case, tokens=cuts[-1])
    found = steps.read(steps.inputs_of(case, backend, dtype).to(dtype, device), backend, cuts)
    return check_steps(case, backend, dtype, cuts, found={name: x.cpu() for name, x in found.items()})


def cases(shape: Shape) -> list[Case]:
    """What is timed, on fewer heads, and memories with more to do."""
    sizes = dict(memory=shape.memory, batch=2, heads=2, key_dim=shape.key_dim, value_dim=shape.value_dim, chunk_size=shape.chunk_size)
    sizes |= dict(hidden=shape.hidden, decay="slight") if shape.hidden else {}
    more = [dict(retention=LqRetention(), momentum=True), dict(retention=KLRetention(), bias=Huber("switch"))]
    more += [] if shape.hidden else [dict(decay="channel", lr="channel", momentum=True)]
    return [Case(f"decode {shape} {i}", **sizes | changes) for i, changes in enumerate([dict(bias=L2()), *more])]


def decode(item: dict, settings: Settings, doing: Doing) -> Iterator[dict]:
    """A token's time, mean over a whole chunk: by every backend that has steps here, launched one by one and from a CUDA graph."""
    shape = decoding(item["shape"], settings)
    result = {"shape": item["shape"], "gates": {}, "first_s": {}, "notes": []}
    runs = {}
    for name in _backends(settings):
        doing(name)
        try:
            worst = max((check(case, name, DTYPE, settings.device).worst for case in cases(shape)), key=lambda row: row.error / row.budget)
            result["gates"][name] = {**dataclasses.asdict(worst), "ok": worst.ok and not settings.planted("red", f"{name} steps")}
            if not result["gates"][name]["ok"]:
                result["notes"].append(f"{name}: parity is red, not timed ({worst.name}: {worst.error:.1e}, budget {worst.budget:.1e})")
                continue
            runs[name] = one_by_one(shape, name, settings)
            if settings.device == "cuda":
                runs[f"{name}, graph"] = replayed(shape, name, settings)
        except Exception as error:
            if not usable():
                raise
            result["notes"].append(f"{name}: did not run: {first_line(error)}")
            release()
    runs[EAGER] = one_by_one(shape, "reference", settings)
    for name, run in runs.items():
        doing(name)
        result["first_s"][name], _ = first_call(run, settings.first_seconds)
    times, _, failed = interleave(runs, max(0.0, min(settings.seconds, item["until"] - time.time())), settings)
    result["notes"] += [f"{name}: {why}" for name, why in failed.items()]
    times = {name: [ms / shape.chunk_size for ms in found] for name, found in times.items()}
    yield {**result, **summary(times, EAGER), "bytes": least_bytes(shape)}


def _backends(settings: Settings) -> list[str]:
    """Those that have steps and can run here, the one that is measured first."""
    others = ["cuda"] if settings.device == "cuda" and dispatch.unavailable("cuda") is None else []
    return [settings.backend, *others]


def _reader(shape: Shape, backend: str, settings: Settings) -> tuple[Decoder, dict]:
    """A decoder at a chunk's start, and a token for it."""
    case = dataclasses.replace(cases(shape)[0], batch=shape.batch, heads=shape.heads, tokens=1)
    inputs = case.draw(torch.float32, settings.device).to(DTYPE, settings.device)
    arguments = {name: x.detach() if isinstance(x, torch.Tensor) else x for name, x in inputs.arguments().items()}
    reader = steps.decoder(case, arguments, MemoryState(tuple(x.detach() for x in inputs.duals)), backend)
    return reader, steps.cut(arguments, 0, 1)


def one_by_one(shape: Shape, backend: str, settings: Settings) -> Callable:
    """The steps of a chunk, each launched by Python."""
    reader, token = _reader(shape, backend, settings)

    def run() -> torch.Tensor:
        for _ in range(shape.chunk_size):
            out = reader.step(**token)
        return out

    return run


def replayed(shape: Shape, backend: str, settings: Settings) -> Callable:
    """The steps of a chunk from a CUDA graph of one step."""
    reader, token = _reader(shape, backend, settings)
    out = torch.empty_like(token["v"])
    for _ in range(shape.chunk_size):
        reader.step(**token, out=out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        reader.step(**token, out=out)

    def run() -> torch.Tensor:
        for _ in range(shape.chunk_size):
            graph.replay()
        return out

    return run


def least_bytes(shape: Shape) -> float:
    """What a token must move on average: the primal once, half a chunk's factors, and the matrices read and written once a chunk."""
    matrix = sum(rows * columns for rows, columns in shape.matrices)
    factors = sum(rows + columns for rows, columns in shape.matrices)
    return 4 * shape.batch * shape.heads * (matrix * (1 + 2 / shape.chunk_size) + factors * (shape.chunk_size + 1) / 2)
