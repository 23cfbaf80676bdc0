"""Tasks of ``bench.gpu correctness``: repeated calls, parity of every configuration, and small calls for compute-sanitizer."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from miras_kernels import L2, DotProduct, ElasticNetRetention, Huber, KLRetention, Lp, LqRetention, SigmoidRetention
from miras_kernels.testing import Case, Inputs, check

from ..common.implementations import BOTH
from ..common.implementations import kernel as kernel_of
from ..common.processes import first_line
from . import decode
from .configurations import forced, fused, launches, table
from .device import release, synchronize, usable
from .inputs import DTYPE, draw
from .plan import Settings, concerns, shape_of

#: equal calls, whose results must have equal bits: the kernels have no atomics, so a difference is a race
CALLS, SMOKE_CALLS = 50, 3
#: cases that a forced configuration must get right, of those that launch it
CASES = 3


def repeat(settings: Settings, memory: str, name: str) -> Iterator[dict]:
    """The same call many times, with more programs than multiprocessors: outputs, final states and all gradients."""
    shape = shape_of(memory, settings)
    inputs = draw(shape, name, settings)
    yield _compared(lambda: _everything(inputs, settings.backend), settings, shape.batch * shape.heads)


def repeat_steps(settings: Settings, memory: str) -> Iterator[dict]:
    """The same decoding steps many times, across a chunk's end."""
    shape = dataclasses.replace(shape_of(memory, settings), tokens=1)

    def run() -> list[Tensor]:
        reader, token = decode.reader(shape, settings.backend, settings)
        outs = [reader.step(**token).clone() for _ in range(shape.chunk_size + 3)]
        return [*outs, *reader.state().tensors()]

    yield _compared(run, settings, shape.batch * shape.heads)


def _everything(inputs: Inputs, backend: str) -> list[Tensor]:
    memory = inputs.case.function
    out, state = memory(**inputs.arguments(), backend=backend)
    return [out, *state.matrices(), *torch.autograd.grad(out, tuple(inputs.leaves().values()), inputs.grad_out)]


def _compared(run, settings: Settings, programs: int) -> dict:
    first, differing, calls = [_bits(x) for x in run()], 0, SMOKE_CALLS if settings.smoke else CALLS
    for _ in range(calls - 1):
        differing += not all(torch.equal(x, _bits(y)) for x, y in zip(first, run(), strict=True))
    detail = f"{differing} of {calls - 1} further calls differ; {programs} sequences x heads"
    return {"status": "wrong" if differing else "ok", "detail": detail, "calls": calls, "differing": differing, "programs": programs}


def _bits(x: Tensor) -> Tensor:
    """A copy as bytes, so that NaN equals NaN and 0 differs from -0."""
    return x.detach().clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)


def parity_cases(settings: Settings) -> list[tuple[Case, torch.dtype]]:
    """What must agree with float64: the sizes that are timed first, then other chunks, dtypes, and heads that no tile divides."""

    def case(bias, dim: int, chunk: int, dtype: torch.dtype, **changes) -> tuple[Case, torch.dtype]:
        sizes = dict(batch=2, tokens=2 * chunk + 5, heads=2, key_dim=dim, value_dim=dim, chunk_size=chunk) | changes
        dims = f"D{dim}" if sizes["value_dim"] == dim else f"D{dim}x{sizes['value_dim']}"
        dims += f" Hd{sizes['hidden']}" if sizes.get("memory") == "mlp" else ""
        more = [sizes["retention"].name] if "retention" in sizes else []
        more += [word for word, field in (("momentum", "momentum"), ("channel-wise", "lr")) if field in sizes]
        return Case(" ".join([bias.name, dims, f"C{chunk}", str(dtype).removeprefix("torch."), *more]), bias=bias, **sizes), dtype

    coordinate, half, single = Huber("coordinate"), torch.float16, torch.float32
    mlp, channel = dict(memory="mlp", heads=1, decay="slight"), dict(decay="channel", lr="channel", delta="channel")
    if settings.smoke:
        tiny = dict(batch=1, tokens=21)
        return [case(coordinate, 16, 16, DTYPE, heads=1, **tiny), case(coordinate, 16, 16, DTYPE, hidden=64, **tiny, **mlp)]
    return [
        case(coordinate, 128, 64, DTYPE),
        case(coordinate, 64, 64, DTYPE, hidden=256, **mlp),
        case(L2(), 64, 64, DTYPE),
        case(Huber("switch"), 128, 64, DTYPE),
        case(L2(), 256, 64, DTYPE, heads=1),
        case(Lp(3.0), 64, 16, DTYPE, decay="strong"),
        case(L2(), 128, 64, single),
        case(Huber("norm"), 64, 32, half),
        case(DotProduct(), 128, 64, DTYPE),
        case(Huber("switch"), 64, 16, DTYPE, hidden=128, **mlp),
        case(L2(), 128, 32, half, hidden=256, **mlp),
        case(L2(), 64, 32, single, hidden=96, **mlp),
        case(L2(), 128, 64, DTYPE, retention=LqRetention(), momentum=True),
        case(coordinate, 64, 64, DTYPE, retention=KLRetention(), **channel),
        case(L2(), 64, 64, DTYPE, hidden=256, retention=LqRetention(), momentum=True, **mlp),
        case(coordinate, 64, 16, DTYPE, hidden=128, retention=ElasticNetRetention(0.05), **mlp),
        case(L2(), 64, 32, single, retention=SigmoidRetention(), momentum=True, **channel),
        case(L2(), 64, 128, DTYPE, momentum=True),
        case(coordinate, 48, 64, DTYPE, value_dim=136, decay="none"),
    ]


def parity(settings: Settings, index: int) -> Iterator[dict]:
    """A case with the configurations that the kernels choose; calls and decoding steps."""
    case, dtype = parity_cases(settings)[index]
    for judge in (check, decode.check):
        yield _judged(judge, case, dtype, None, None, settings)


def parity_of(settings: Settings, kernel: str, label: str) -> Iterator[dict]:
    """One configuration of a kernel, on the first cases that launch it."""
    done, judge = 0, decode.check if "step" in kernel else check
    for case, dtype in parity_cases(settings):
        if concerns(kernel, case.memory):
            yield {"doing": case.name}
            row = _judged(judge, case, dtype, kernel, label, settings)
            if row["status"] != "not launched":
                yield row
                done += 1
        if done == CASES:
            return
    if not done:
        yield {"status": "not launched", "detail": "no case launches it"}


def _judged(judge, case: Case, dtype: torch.dtype, kernel: str | None, label: str | None, settings: Settings) -> dict:
    what = case.name + (", steps" if judge is decode.check else "")
    try:
        with launches(settings) as seen, forced(kernel, label, settings):
            report = judge(case, settings.backend, dtype, settings.device)
    except ValueError as error:  # refused: the case is too large for the configuration, or not for this backend
        return {"status": "not launched", "detail": f"{what}: {first_line(error)}"}
    except Exception as error:
        if not usable():
            raise
        release()
        return {"status": "failed", "detail": f"{what}: {first_line(error)}"}
    if kernel and kernel not in seen:
        return {"status": "not launched", "detail": what}
    worst = report.worst
    detail = f"{what}: {worst.name} error {worst.error:.1e}, budget {worst.budget:.1e}"
    return {"status": "ok" if report.ok else "wrong", "detail": detail, "error": worst.error, "budget": worst.budget}


def launch(settings: Settings, shape: str, name: str, kernel: str | None = None, label: str | None = None) -> Iterator[dict]:
    """A short forward and backward at a shape: it compiles what the full call launches, perhaps with one configuration forced."""
    size = shape_of(shape, settings)
    size = dataclasses.replace(size, batch=1, tokens=min(size.tokens, 4 * size.chunk_size))
    try:
        with forced(kernel, label, settings):
            kernel_of(draw(size, name, settings), settings.backend, BOTH)()
            synchronize()
    except ValueError as error:
        yield {"status": "refused", "detail": first_line(error)}
    else:
        yield {"status": "ok", "detail": ""}


def launch_all(settings: Settings, memory: str) -> Iterator[dict]:
    """Calls that together launch each kernel of a memory: small cases in both directions, and decoding steps."""
    cases = [case for case, dtype in parity_cases(settings) if case.memory == memory and case.key_dim <= 128 and dtype == DTYPE]
    with launches(settings) as seen:
        for i, case in enumerate([cases[0], *cases]):
            with fused() if i == 0 else contextlib.nullcontext():
                kernel_of(case.draw(torch.float32, settings.device).to(DTYPE, settings.device), settings.backend, BOTH)()
        decode.chunk_of_steps(dataclasses.replace(shape_of(memory, settings), batch=1, tokens=1), settings.backend, settings)()
        synchronize()
    missing = [name for name in table(settings) if concerns(name, memory) and name not in seen]
    yield {"status": "ok", "detail": f"{len(seen)} kernels; not launched: {', '.join(missing) or 'none'}"}
