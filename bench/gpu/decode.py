"""Decoding steps: parity, and the time of a token."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch

from miras_kernels import Decoder, MemoryState, dispatch
from miras_kernels.testing import Case, Report, check_steps, steps

from ..common.processes import first_line
from ..common.timing import figures, interleave
from .device import release, sampler, usable
from .inputs import DTYPE
from .plan import Settings, Shape, shape_of


def check(case: Case, backend: str, dtype: torch.dtype, device: str) -> Report:
    """Steps up to a chunk's end, together and one by one, and into the next chunk, against float64 within the tests' budgets."""
    c = case.chunk_size
    cuts = sorted({max(c - 3, 0), c - 1, c, c + 2})
    case = dataclasses.replace(case, tokens=cuts[-1])
    found = steps.read(steps.inputs_of(case, backend, dtype).to(dtype, device), backend, cuts)
    return check_steps(case, backend, dtype, cuts, found={name: x.cpu() for name, x in found.items()})


def case_of(shape: Shape, batch: int, heads: int) -> Case:
    sizes = {key: getattr(shape, key) for key in ("memory", "key_dim", "value_dim", "chunk_size")}
    sizes |= dict(hidden=shape.hidden, decay="slight") if shape.hidden else {}
    return Case(f"decode {shape}", batch=batch, heads=heads, tokens=1, **sizes)


def reader(shape: Shape, backend: str, settings: Settings) -> tuple[Decoder, dict]:
    """A decoder at a chunk's start, and a token for it."""
    case = case_of(shape, shape.batch, shape.heads)
    inputs = case.draw(torch.float32, settings.device).to(DTYPE, settings.device)
    arguments = {name: x.detach() if isinstance(x, torch.Tensor) else x for name, x in inputs.arguments().items()}
    made = steps.decoder(case, arguments, MemoryState(tuple(x.detach() for x in inputs.duals)), backend)
    return made, steps.cut(arguments, 0, 1)


def chunk_of_steps(shape: Shape, backend: str, settings: Settings, graph: bool = False) -> Callable[[], None]:
    """The steps of a chunk, each launched by Python, or replayed from a CUDA graph of one step."""
    made, token = reader(shape, backend, settings)
    out = torch.empty_like(token["v"])
    step = lambda: made.step(**token, out=out)
    if graph:
        for _ in range(shape.chunk_size):
            step()
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            step()
        step = captured.replay

    def run() -> None:
        for _ in range(shape.chunk_size):
            step()

    return run


def decode(settings: Settings, shape: str) -> Iterator[dict]:
    """A token's time, mean over a whole chunk, with every backend that decodes here, beside eager PyTorch."""
    size, runs = shape_of(shape, settings), {}
    result: dict = {"direction": None, "parity": {}, "notes": []}
    for backend in (settings.backend, *(["cuda"] if settings.device == "cuda" and dispatch.unavailable("cuda") is None else [])):
        yield {"doing": backend}
        try:
            worst = check(case_of(size, 2, 2), backend, DTYPE, settings.device).worst
            result["parity"][backend] = {"ok": worst.ok, "worst": dataclasses.asdict(worst)}
            if not worst.ok:
                result["notes"].append(f"{backend}: parity is red, not timed ({worst.name}: {worst.error:.1e}, budget {worst.budget:.1e})")
                continue
            for graph in (False, True) if settings.device == "cuda" else (False,):
                runs[f"{backend}, graph" if graph else backend] = chunk_of_steps(size, backend, settings, graph)
        except Exception as error:
            if not usable():
                raise
            result["notes"].append(f"{backend}: did not run: {first_line(error)}")
            release()
    runs["eager"] = chunk_of_steps(size, "reference", settings)
    for run in runs.values():
        run()
    times = interleave({name: sampler(run, settings) for name, run in runs.items()}, settings.seconds, settings.min_rounds, slice_seconds=0)
    yield {**result, **figures({name: [t / size.chunk_size for t in ts] for name, ts in times.items()}, "eager")}
