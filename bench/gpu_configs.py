"""The tasks of bench/gpu.py that go through the kernels' launch configurations: is each one right, and which is fastest?"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterator

import torch

import gpu_decode
from contenders import kernel
from gpu_measure import first_call, first_line, interleave, release, summary, usable
from gpu_plan import BOTH, DIRECTIONS, Settings, concerns, shape_of
from gpu_tensors import DTYPE, Tensors
from harness import OverBudget
from miras_kernels import L2, DotProduct, ElasticNetRetention, Huber, KLRetention, Lp, LqRetention, SigmoidRetention
from miras_kernels.testing import Case, check

Doing = Callable[[str], None]


# ------------------------------------------------------------------------------------------------------------- table


def table(settings: Settings) -> dict[str, dict[str, object]]:
    """Every configuration of every kernel: ``{kernel: {label: configuration}}``. The reference has pretended ones."""
    if settings.backend == "reference":
        return {"reference_forward": {"a": "a", "b": "b"}, "reference_backward": {"a": "a"}}
    from miras_kernels.kernels.common import configs

    return {name: {str(config): config for config in frozen} for name, frozen in configs.KERNELS.items()}


def forced(kernel_name: str | None, label: str | None, settings: Settings):
    """A context in which a kernel's launches take one configuration; None leaves the choice to each kernel."""
    if settings.backend == "reference" or kernel_name is None:
        return contextlib.nullcontext()
    from miras_kernels.kernels.common import configs

    return configs.force(kernel_name, table(settings)[kernel_name][label])


def denied(settings: Settings) -> list[list]:
    """The rows of the deny-list as it is."""
    if settings.backend == "reference":
        return []
    from miras_kernels.kernels.common import configs

    return [list(row) for row in configs.DENIED]


@contextlib.contextmanager
def launches(settings: Settings) -> Iterator[dict[str, str]]:
    """The configuration that each kernel was launched with inside the block; a kernel that is not there was not needed."""
    if settings.backend == "reference":
        yield {name: next(iter(labels)) for name, labels in table(settings).items()}
        return
    from miras_kernels.kernels.common import configs

    seen: dict[str, str] = {}
    choose = configs.choose

    def watched(kernel_name, *arguments, **more):
        config = choose(kernel_name, *arguments, **more)
        seen[kernel_name] = str(config)
        return config

    configs.choose = watched
    try:
        yield seen
    finally:
        configs.choose = choose


# ------------------------------------------------------------------------------------------------------------ parity


def parity_cases(settings: Settings) -> list[tuple[Case, torch.dtype]]:
    """What every configuration must get right, in the order in which time may run out: the sizes that are timed first, then
    other chunks, dtypes, and heads that are no multiple of anything."""

    def case(bias, dim: int, chunk: int, dtype: torch.dtype, **changes) -> tuple[Case, torch.dtype]:
        sizes = dict(batch=2, tokens=2 * chunk + 5, heads=2, key_dim=dim, value_dim=dim, chunk_size=chunk) | changes
        dims = f"D{dim}" if sizes["value_dim"] == dim else f"D{dim}x{sizes['value_dim']}"
        dims += f" Hd{sizes['hidden']}" if sizes.get("memory") == "mlp" else ""
        more = [sizes["retention"].name] if "retention" in sizes else []
        more += [word for word, has in (("momentum", "momentum"), ("channel-wise", "lr")) if has in sizes]
        return Case(" ".join([bias.name, dims, f"C{chunk}", str(dtype).removeprefix("torch."), *more]), bias=bias, **sizes), dtype

    coordinate, half, single = Huber("coordinate"), torch.float16, torch.float32
    mlp, channel = dict(memory="mlp", heads=1, decay="slight"), dict(decay="channel", lr="channel", delta="channel")
    if settings.toy:
        toys = [case(coordinate, 16, 16, dtype, batch=1, heads=1, tokens=21) for dtype in (DTYPE, single)]
        return [*toys, case(coordinate, 16, 16, DTYPE, batch=1, tokens=21, hidden=64, **mlp)]
    return [
        case(coordinate, 128, 64, DTYPE),
        case(L2(), 64, 64, DTYPE),
        case(Huber("switch"), 128, 64, DTYPE),
        case(L2(), 256, 64, DTYPE, heads=1),
        case(Lp(3.0), 64, 16, DTYPE, decay="strong"),
        case(L2(), 128, 64, single),
        case(Huber("norm"), 64, 32, half),
        case(DotProduct(), 128, 64, DTYPE),
        case(coordinate, 64, 64, DTYPE, hidden=256, **mlp),
        case(Huber("switch"), 64, 16, DTYPE, hidden=128, **mlp),
        case(L2(), 128, 32, half, hidden=256, **mlp),
        case(L2(), 64, 32, single, hidden=96, **mlp),
        case(L2(), 128, 64, DTYPE, retention=LqRetention(), momentum=True),
        case(coordinate, 64, 64, DTYPE, retention=KLRetention(), **channel),
        case(L2(), 64, 64, DTYPE, hidden=256, retention=LqRetention(), momentum=True, **mlp),
        case(coordinate, 64, 16, DTYPE, hidden=128, retention=ElasticNetRetention(0.05), **mlp),
        case(L2(), 64, 32, single, retention=SigmoidRetention(), momentum=True, **channel),
        case(coordinate, 48, 64, DTYPE, value_dim=136, decay="none"),
    ]


def parity(item: dict, settings: Settings, doing: Doing) -> Iterator[dict]:
    """One configuration of one kernel on every case; the other kernels (all of them, for None) take what they choose."""
    where = f"{item['kernel']} {item['label']}"
    for case, dtype in parity_cases(settings):
        if not concerns(item["kernel"], case.memory):
            continue
        row = {"case": case.name}
        if time.time() > item["until"]:
            yield {**row, "status": "left out", "note": "left out: time"}
            continue
        doing(case.name)
        if settings.planted("crash", where):
            os._exit(7)
        try:
            with launches(settings) as seen, forced(item["kernel"], item["label"], settings):
                judge = gpu_decode.check if item["kernel"] in gpu_decode.step_kernels(settings) else check
                report = judge(case, settings.backend, dtype, settings.device)
        except ValueError as error:  # of the configuration or of the backend, which a case may be too large for
            yield {**row, "status": "not for this case", "note": first_line(error)}
            continue
        except Exception as error:
            yield {**row, "status": "failed", "note": first_line(error)}
            if not usable():
                raise
            release()
            continue
        if item["kernel"] and seen and item["kernel"] not in seen:
            yield {**row, "status": "not for this case", "note": "the call does not launch this kernel"}
            continue
        worst = dataclasses.asdict(report.worst)
        if settings.planted("wrong", where):
            worst["error"] = 1.0
        yield {**row, "status": "ok" if report.ok and worst["error"] <= worst["budget"] else "wrong", "worst": worst, "launches": seen}
        if settings.toy and item["kernel"]:  # one case will do; the next is for kernels that this one does not need
            return


# ------------------------------------------------------------------------------------------------------------ tuning


def tuning(item: dict, settings: Settings, doing: Doing) -> Iterator[dict]:
    """Every configuration of a kernel at a shape: times of the whole call, which differ by this kernel alone."""
    name, shape = item["kernel"], shape_of(item["shape"], settings)
    if name in gpu_decode.step_kernels(settings):
        yield _untimed(item, "a decoder launches it, with one configuration for these sizes")
        return
    inputs = Tensors(shape, settings).inputs(shape.base)
    for direction in DIRECTIONS:  # the shorter call that launches it, so that its share of the time is larger
        run = kernel(inputs, settings.backend, direction)
        with launches(settings) as seen:
            first_call(run, settings.first_seconds)
        if name in seen or not seen:
            break
    else:
        yield _untimed(item, "the call does not launch this kernel")
        return
    runs, notes = {}, []
    for label in table(settings)[name]:
        if label in item["skip"]:
            notes.append(f"{label}: wrong, not timed")
            continue
        doing(label)
        try:
            call = _under(run, name, label, settings)
            first_call(call, settings.first_seconds)
            runs[label] = call
        except ValueError:
            notes.append(f"{label}: not for this shape")
        except (Exception, OverBudget) as error:
            notes.append(f"{label}: {first_line(error)}")
            if not usable():
                raise
    seconds = max(0.0, min(settings.seconds / 2, item["until"] - time.time()))
    times, _, failed = interleave(runs, seconds, settings) if runs else ({}, {}, {})
    notes += [f"{label}: {why}" for label, why in failed.items()]
    ms = summary(times, None)["ms"]
    fastest = min(ms, key=lambda label: ms[label]["median"], default=None)
    mine = seen.get(name)
    loss = ms[mine]["median"] / ms[fastest]["median"] if mine in ms else None
    yield {"shape": item["shape"], "kernel": name, "direction": direction, "ms": ms, "fastest": fastest, "chosen": mine,
           "chosen_over_fastest": loss, "notes": notes}  # fmt: skip


def _untimed(item: dict, why: str) -> dict:
    return {"shape": item["shape"], "kernel": item["kernel"], "direction": BOTH, "ms": {}, "fastest": None, "chosen": None,
            "chosen_over_fastest": None, "notes": [why]}  # fmt: skip


def _under(run: Callable, kernel_name: str, label: str, settings: Settings) -> Callable:
    def call():
        with forced(kernel_name, label, settings):
            return run()

    return call
