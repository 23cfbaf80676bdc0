"""Tasks of ``bench.gpu times``: implementations in rounds at a shape, first calls, and configurations by time."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import torch

from miras_kernels import dispatch
from miras_kernels.testing import check

from ..common.implementations import DIRECTIONS, agreement
from ..common.implementations import kernel as kernel_of
from ..common.processes import first_line
from ..common.timing import OverBudget, figures, interleave, shares, spread
from . import baselines
from .configurations import forced, launches, table
from .device import first_call, kernel_us, peak_mib, release, sampler, usable, yardsticks
from .inputs import DTYPE, case_of, draw
from .plan import PLAIN, Settings, Shape, is_ours, least_work, shape_of

#: in bfloat16, PyTorch's results may differ from ours by so much
SAME = 0.05


@functools.cache
def gate(shape: Shape, name: str, settings: Settings) -> dict:
    """The parity gate: a short case of the same sizes with an odd tail, against float64 within the tests' budgets. Also the relative
    errors, ours and PyTorch's in bfloat16, of the output and of the worst gradient. An MLP memory has four heads here, since the rounding
    errors of one head are correlated."""
    several = 2 if shape.hidden and not settings.smoke else 1
    tokens = (1 if settings.smoke else 2) * shape.chunk_size + 5
    few = dataclasses.replace(shape, batch=several, tokens=tokens, heads=several)
    report = check(case_of(few, name, initial="dual"), settings.backend, DTYPE, settings.device)
    (out,) = (row for row in report.rows if row.name == "out")
    gradient = max((row for row in report.rows if row.name.startswith("grad_")), key=lambda row: row.error)
    return {"ok": report.ok, "worst": dataclasses.asdict(report.worst), "output_error": out.error, "output_error_eager": out.usual,
            "gradient_error": gradient.error, "gradient_error_eager": gradient.usual}  # fmt: skip


class LeftOut(Exception):
    """Why an implementation is not timed."""


class Field:
    """The implementations to time at a shape, in a direction; ours come first, and ratios refer to ``base``."""

    def __init__(self, settings: Settings, shape: str, direction: str, names: Sequence[str]):
        self.settings, self.direction, self.names = settings, direction, names
        self.shape = shape_of(shape, settings)
        self.base = PLAIN if PLAIN in names else self.shape.biases[0]
        self.runs: dict[str, Callable] = {}
        self.once: dict[str, float] = {}
        self.result: dict = {"direction": direction, "parity": {}, "first_s": {}, "refused": {}, "notes": []}

    def enter(self, exclude: Sequence[str]) -> Iterator[dict]:
        """Check every implementation and make its first call; what fails becomes a note. Yields who it is at."""
        notes = self.result["notes"]
        notes += [f"{name}: left out, the process was lost with it" for name in exclude]
        for name in (name for name in self.names if name not in exclude):
            yield {"doing": name}
            try:
                self._enter(name)
            except LeftOut as why:
                notes.append(f"{name}: {why}")
            except OverBudget:
                notes.append(f"{name}: did not run: its first call took longer than {self.settings.first_seconds:.0f} s")
            except Exception as error:
                if not usable():
                    raise
                notes.append(f"{name}: did not run: {first_line(error)}")
            release()

    def _enter(self, name: str) -> None:
        ours, limit = is_ours(name), self.settings.first_seconds
        if ours:
            self._check(name)
            run = kernel_of(draw(self.shape, name, self.settings), self.settings.backend, self.direction)
        else:
            run = baselines.MAKE[name](draw(self.shape, self.base, self.settings), self.direction)
        self.result["first_s"][name], result = first_call(run, limit)
        if not all(bool(x.isfinite().all()) for x in result):
            if ours:
                self.result["parity"][name]["ok"] = False
                raise LeftOut("parity is red, not timed (not all results are finite)")
            self.result["notes"].append(f"{name}: not all of its results are finite")
        if name in ("eager", "compile") and self.base in self.runs:
            off = self._difference(result)
            if not off < SAME:
                raise LeftOut(f"computes something else than {self.base} (relative difference {off:.1e}), not timed")
        if not ours and self.result["first_s"][name] > self.settings.call_seconds:
            seconds, _ = first_call(run, limit)
            if seconds > self.settings.call_seconds:
                self.once[name] = seconds
                raise LeftOut("too slow for the rounds, timed once")
        self.runs[name] = run

    def _check(self, name: str) -> None:
        reason = dispatch.explain(draw(self.shape, name, self.settings).call(), differentiate=True)[self.settings.backend]
        if reason is not None:
            self.result["refused"][name] = reason
            raise LeftOut(f"refused: {reason}")
        verdict = self.result["parity"][name] = dict(gate(self.shape, name, self.settings))
        if not verdict["ok"]:
            raise LeftOut("parity is red, not timed ({name}: error {error:.1e}, budget {budget:.1e})".format(**verdict["worst"]))

    def _difference(self, result: tuple) -> float:
        """How far PyTorch's results at full size are from ours: all of them, or of an MLP memory, which amplifies rounding errors, those
        that only its first four chunks decide: their outputs, or the gradients of their q."""
        ours = self.runs[self.base]()
        if self.shape.memory == "mlp":
            tokens = 4 * self.shape.chunk_size
            ours, result = (ours[0][:, :tokens],), (result[0][:, :tokens],)
        return agreement(ours, result)


def times(settings: Settings, shape: str, direction: str, names: Sequence[str], exclude: Sequence[str] = ()) -> Iterator[dict]:
    """Times at a shape in one direction, the share of the device's peak, peak memory, and time by kernel."""
    field = Field(settings, shape, direction, names)
    yield from field.enter(exclude)
    calls, amounts = yardsticks(settings)
    yield {"doing": "the rounds"}
    samplers = {name: sampler(run, settings) for name, run in {**field.runs, **calls}.items()}
    found = interleave(samplers, settings.seconds, settings.min_rounds, slice_seconds=0)
    base = field.base if field.base in found else "mm"  # without ours, only the baselines have times
    result = {**field.result, "base": field.base if field.base in found else None, **figures(found, base, tuple(amounts))}
    result["ms"] |= {name: spread([1e3 * seconds]) for name, seconds in field.once.items()}
    if result["base"]:
        bias = base if base in field.shape.biases else field.shape.biases[0]
        result |= shares(found, base, least_work(field.shape, direction, bias), amounts)
    if settings.device != "cpu":
        yield {"doing": "peak memory"}
        result["peak_mib"] = {name: peak_mib(run) for name, run in field.runs.items()}
        total = torch.cuda.get_device_properties(0).total_memory / 2**20
        result["peak_share"] = {name: mib / total for name, mib in result["peak_mib"].items()}
        if base in field.runs:
            yield {"doing": "time by kernel"}
            result["kernel_us"] = kernel_us(field.runs[base])
    yield result


def tuning(settings: Settings, shape: str, kernel: str, exclude: Sequence[str] = ()) -> Iterator[dict]:
    """Every configuration of a kernel at a shape: times of the whole call, which differ only by this kernel."""
    size = shape_of(shape, settings)
    inputs = draw(size, size.biases[0], settings)
    result: dict = {"kernel": kernel, "notes": [f"{label}: left out, the process was lost with it" for label in exclude]}
    for direction in DIRECTIONS:  # the shorter call that launches it, so that its share of the time is larger
        with launches(settings) as seen:
            first_call(_call(inputs, settings, direction), settings.first_seconds)
        if kernel in seen:
            break
    else:
        yield {**result, "status": "not launched", "detail": "the call does not launch this kernel"}
        return
    samplers = {}
    for label in (label for label in table(settings)[kernel] if label not in exclude):
        yield {"doing": label}
        try:
            call = _call(inputs, settings, direction, kernel, label)
            first_call(call, settings.first_seconds)
            samplers[label] = sampler(call, settings)
        except ValueError:
            result["notes"].append(f"{label}: not for this shape")
        except (Exception, OverBudget) as error:
            if not usable():
                raise
            result["notes"].append(f"{label}: {first_line(error)}")
    found = interleave(samplers, settings.seconds / 2, settings.min_rounds, slice_seconds=0) if samplers else {}
    ms = {label: spread([1e3 * t for t in ts]) for label, ts in found.items()}
    fastest = min(ms, key=lambda label: ms[label]["median"], default=None)
    chosen = seen[kernel] if seen[kernel] in ms else None
    loss = ms[chosen]["median"] / ms[fastest]["median"] if chosen else None
    yield {**result, "direction": direction, "ms": ms, "chosen": chosen, "fastest": fastest, "chosen_over_fastest": loss}


def _call(inputs, settings: Settings, direction: str, kernel: str | None = None, label: str | None = None) -> Callable:
    run = kernel_of(inputs, settings.backend, direction)

    def call():
        with forced(kernel, label, settings):
            return run()

    return call
