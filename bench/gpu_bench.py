"""The measuring tasks of bench/gpu.py that time or weigh calls: each runs in a worker and yields results."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import torch

import gpu_peers
import harness
from contenders import kernel, refusal
from gpu_gate import CHUNKS, SAYS_LITTLE, gate
from gpu_measure import by_kernel, first_call, first_line, interleave, peak_mib, release, summary, usable
from gpu_plan import BOTH, COMPILED, DIRECTIONS, EAGER, PLAIN, Settings, is_ours, shape_of
from gpu_tensors import DTYPE, Tensors, all_finite, compiled, difference, eager, short

Doing = Callable[[str], None]

#: contenders that compute the same as ours may differ from it by so much in bfloat16
SAME = 0.05


_verdicts: dict[tuple, dict] = {}


class Poisoned(Exception):
    """The process' device is unusable after what a contender did: the item must be done again without it."""


class Field:
    """Who can be timed at a shape and direction: every contender that was right, or at least ran, at its first call.

    Attributes:
        base: the contender to which ratios refer.
        runs: who is timed in rounds.
        gates: our contenders' verdicts.
        first: seconds of the first calls.
        once: milliseconds of a call of those who are too slow for rounds.
        refused: our contenders that the backend does not serve, and why.
        failed: who did not run, and why.
    """

    def __init__(self, item: dict, settings: Settings, doing: Doing):
        self.item, self.settings, self.doing = item, settings, doing
        self.direction = item["direction"]
        self.tensors = Tensors(shape_of(item["shape"], settings), settings)
        self.base = PLAIN if PLAIN in item["contenders"] else self.tensors.shape.base
        self.runs: dict[str, Callable] = {}
        self.gates: dict[str, dict] = {}
        self.first: dict[str, float] = {}
        self.once: dict[str, float] = {}
        self.refused: dict[str, str] = {}
        self.failed: dict[str, str] = {}
        self.notes = [f"{name}: left out, it made the device unusable" for name in item.get("exclude", ())]

    def enter(self, check: bool = True) -> None:
        """Let everyone make a first call; what fails there becomes a note."""
        for name in self.item["contenders"]:
            if name in self.item.get("exclude", ()):
                continue
            if time.time() > self.item["until"]:
                self.notes.append(f"{name}: left out: time")
                continue
            self.doing(name)
            try:
                self._enter(name, check)
            except harness.OverBudget:
                self.fail(name, f"its first call took longer than {self._limit(name):.0f} s")
            except Exception as error:
                if not usable():
                    raise Poisoned(f"{name}: {first_line(error)}") from error
                self.fail(name, first_line(error))

    def fail(self, name: str, why: str) -> None:
        """Leave a contender out, and give back what it held."""
        self.failed[name] = why
        self.notes.append(f"{name}: did not run: {why}")
        release()

    def _enter(self, name: str, check: bool) -> None:
        if is_ours(name):
            inputs = self.tensors.inputs(name)
            reason = refusal(inputs, self.settings.backend)
            if reason is not None:
                self.refused[name] = reason
                self.notes.append(f"{name}: refused: {reason}")
                return
            if check:
                self.gates[name] = self._gate(name)
                if not self.gates[name]["ok"]:
                    self.notes.append(f"{name}: parity is red, not timed ({_why(self.gates[name])})")
                    return
                self._doubt(name)
            run = kernel(inputs, self.settings.backend, self.direction)
        elif name in (EAGER, COMPILED):
            run = (eager if name == EAGER else compiled)(self.tensors.inputs(self.base), self.direction)
        elif self.settings.device == "cpu":
            self.notes.append(f"{name}: needs a GPU")
            return
        else:
            run = gpu_peers.make(name, self.tensors, self.direction)
        self.first[name], result = first_call(run, self._limit(name))
        if check and not self._judge(name, result):
            return
        del result
        if is_ours(name) or not self._is_slow(name, run):
            self.runs[name] = run

    def _doubt(self, name: str) -> None:
        """Where bfloat16 itself is far from float64 (PyTorch's too), a green gate says little, and is told to."""
        loose = max((self.gates[name]["loosest"], self.gates[name]["short"]["loosest"]), key=lambda row: row["budget"])
        if loose["budget"] > SAYS_LITTLE and not self.settings.toy:
            self.notes.append(f"{name}: parity says little, in bfloat16 {loose['name']} may be off by {loose['budget']:.1e} here")

    def _is_slow(self, name: str, run: Callable) -> bool:
        """Whether a call takes too long to be made in every round; then one is timed alone."""
        if self.first[name] <= self.settings.call_seconds:
            return False
        seconds, _ = first_call(run, self._limit(name))
        if seconds <= self.settings.call_seconds:
            return False
        self.once[name] = 1e3 * seconds
        self.notes.append(f"{name}: too slow for the rounds, timed once: {seconds:.1f} s")
        return True

    def _gate(self, name: str) -> dict:
        """The verdict on one of our calls, which holds for both directions."""
        key = (self.tensors.shape, name, self.settings)
        if key not in _verdicts:
            _verdicts[key] = gate(self.tensors.inputs(name), self.tensors.shape, self.settings, name)
        return _verdicts[key]

    def _judge(self, name: str, result: tuple) -> bool:
        """PyTorch must give what ours gives; others must give numbers."""
        if not all_finite(result):
            self.notes.append(f"{name}: not every number it gives is finite")
        if name in (EAGER, COMPILED) and self.base in self.runs:
            off = self._difference(result)
            if not off < SAME:
                self.notes.append(f"{name}: computes something else (relative difference {off:.1e}), not timed")
                return False
        return True

    def _difference(self, result: tuple) -> float:
        """How far PyTorch's results are from ours: all of them, or of an MLP memory, which amplifies what rounding does to it, those
        that only its first chunks decide: their outputs, or the gradients of their q."""
        ours = self.runs[self.base]()
        if self.tensors.shape.memory == "mlp":
            tokens = CHUNKS * self.tensors.shape.chunk_size
            ours, result = (ours[0][:, :tokens],), (result[0][:, :tokens],)
        return difference(ours, result)

    def _limit(self, name: str) -> float:
        most = {EAGER: self.settings.eager_seconds, COMPILED: self.settings.compile_seconds}.get(name, self.settings.first_seconds)
        if name in gpu_peers.PEERS and not gpu_peers.PEERS[name].compiles:
            most = self.settings.eager_seconds
        return max(1.0, min(most, self.item["until"] - time.time()))


def _why(verdict: dict) -> str:
    if not verdict["finite"]:
        return "not every number is finite"
    worst = verdict["worst"] if verdict["worst"]["error"] > verdict["worst"]["budget"] else verdict["short"]["worst"]
    return f"{worst['name']}: error {worst['error']:.1e}, budget {worst['budget']:.1e}"


def bench(item: dict, settings: Settings, doing: Doing) -> Iterator[dict]:
    """Times of everyone at a shape, in one direction."""
    field = Field(item, settings, doing)
    field.enter()
    doing("the rounds")
    seconds = max(0.0, min(settings.seconds, item["until"] - time.time()))
    times, host, failed = interleave(field.runs, seconds, settings) if field.runs else ({}, {}, {})
    notes = field.notes + [f"{name}: {why}" for name, why in failed.items()]
    base = field.base if field.base in times else None
    slow = {name: ms for name, ms in host.items() if is_ours(name) and ms > min(times[name])}
    notes += [f"{name}: its launches bound it, the host takes {ms:.2f} ms to enqueue a call" for name, ms in slow.items()]
    result = {**_head(item), "base": base, **_who(field, failed), "gates": field.gates, "first_s": field.first, "once_ms": field.once,
              "host_ms": host, **summary(times, base)}  # fmt: skip
    if settings.device != "cpu":
        doing("the profiler")
        result["kernels_ms"] = {}
        for name in [name for name in times if is_ours(name)][:2]:
            with contextlib.suppress(Exception):
                result["kernels_ms"][name] = by_kernel(field.runs[name])
    yield {**result, "notes": notes}


def memory(item: dict, settings: Settings, doing: Doing) -> Iterator[dict]:
    """Peak memory of everyone at a shape, in one direction."""
    if settings.device == "cpu":
        yield {**_head(item), "notes": ["needs a GPU"]}
        return
    field = Field(item, settings, doing)
    field.enter(check=False)
    peaks = {}
    for name, run in field.runs.items():
        doing(name)
        try:
            peaks[name] = peak_mib(run)
        except torch.OutOfMemoryError as error:
            field.fail(name, first_line(error))
    yield {**_head(item), **_who(field), "peak_mib": peaks, "notes": field.notes}


def _who(field: Field, failed: dict[str, str] | None = None) -> dict:
    """Who has no figure, and why."""
    return {"refused": field.refused, "failed": {**field.failed, **(failed or {})}}


def _head(item: dict) -> dict:
    return {"shape": item["shape"], "direction": item["direction"]}


def warm(item: dict, settings: Settings, doing: Doing) -> Iterator[dict]:
    """One contender's first call on a short sequence, so that its compiled kernels are on disk when it is to be timed."""
    gpu_peers.compile_share(item["index"], item["count"])
    tensors = Tensors(short(shape_of(item["shape"], settings)), settings)
    name = item["contender"]
    ours = is_ours(name)
    if not ours or refusal(tensors.inputs(name), settings.backend) is None:
        for direction in DIRECTIONS if ours else (BOTH,):
            run = kernel(tensors.inputs(name), settings.backend, direction) if ours else gpu_peers.make(name, tensors, direction)
            run()
    yield {"contender": name}


def ceilings(item: dict, settings: Settings, doing: Doing) -> Iterator[dict]:
    """What the device reaches: bytes read plus bytes written by a copy, operations of a bfloat16 matrix product."""
    count, size = (2**20, 64) if settings.toy else (2**31, 8192)
    source = torch.randn(count // 4, device=settings.device)
    target = torch.empty_like(source)
    a, b = (torch.randn(size, size, device=settings.device, dtype=DTYPE) for _ in range(2))
    out = torch.empty_like(a)
    runs = {"copy": lambda: target.copy_(source), "matmul": lambda: torch.mm(a, b, out=out)}
    for _ in range(3):
        for run in runs.values():
            run()
    times, _, _ = interleave(runs, min(settings.seconds, 3.0), settings)
    ms = summary(times, None)["ms"]
    yield {
        "copy_bytes": 2 * count, "matmul_size": size, "ms": ms, "copy_bytes_per_s": 2 * count / ms["copy"]["median"] * 1e3,
        "matmul_flops_per_s": 2 * size**3 / ms["matmul"]["median"] * 1e3,
    }  # fmt: skip


def first(item: dict, settings: Settings, doing: Doing) -> Iterator[dict]:
    """Seconds of a first forward and backward where nothing was compiled before (the caller sees to that)."""
    tensors = Tensors(short(shape_of(item["shape"], settings)), settings)
    seconds = {}
    for bias in item["biases"]:
        doing(bias)
        seconds[bias], _ = first_call(kernel(tensors.inputs(bias), settings.backend, BOTH), item["until"] - time.time())
    yield {"shape": item["shape"], "first_s": seconds}
