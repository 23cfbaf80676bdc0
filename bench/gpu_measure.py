"""How bench/gpu.py takes times and memory: all contenders in every round, device events, a cold L2 before each call."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

import harness
from gpu_plan import Settings
from harness import ratio, spread

Run = Callable[[], object]

#: bytes written between two calls: more than any L2 cache, so that nobody finds the inputs there
FLUSH = 512 * 2**20

#: no contender is called more often than this per measurement
MAX_ROUNDS = 200


def interleave(runs: dict[str, Run], seconds: float, settings: Settings) -> tuple[dict[str, list[float]], dict[str, float], dict[str, str]]:
    """Milliseconds per call of every contender, one number per round, all lists of one length.

    Every contender must have run before: no compilation happens here.

    Returns:
        the times; the milliseconds that the host took to enqueue a call (median); who failed on the way, and why.
    """
    if settings.device == "cpu":
        sample = {name: harness.timed(run, time.perf_counter) for name, run in runs.items()}
        rounds = [{name: 1e3 * sample[name](1) for name in runs} for _ in range(settings.min_rounds)]
        return {name: [times[name] for times in rounds] for name in runs}, {}, {}
    return _on_device(dict(runs), seconds, settings.min_rounds)


def _on_device(runs: dict[str, Run], seconds: float, min_rounds: int):
    flush = torch.empty(FLUSH, dtype=torch.uint8, device="cuda")
    times: dict[str, list[float]] = {name: [] for name in runs}
    host: dict[str, list[float]] = {name: [] for name in runs}
    failed: dict[str, str] = {}
    end, done = time.perf_counter() + seconds, 0
    with harness.no_garbage_collection():
        while runs and done < MAX_ROUNDS and (done < min_rounds or time.perf_counter() < end):
            names = list(runs)
            samples = {}
            for name in names[done % len(names) :] + names[: done % len(names)]:
                try:
                    samples[name] = _sample(runs[name], flush)
                except torch.OutOfMemoryError as error:
                    failed[name] = f"ran out of memory: {first_line(error)}"
                    del runs[name]
                    torch.cuda.empty_cache()
            torch.cuda.synchronize()
            for name, (start, stop, enqueued) in samples.items():
                times[name].append(start.elapsed_time(stop))
                host[name].append(1e3 * enqueued)
            done += 1
    kept = {name: ts for name, ts in times.items() if name in runs}
    return kept, {name: spread(host[name])["median"] for name in kept}, failed


def _sample(run: Run, flush: torch.Tensor):
    """One call between two events. The flush also keeps the device busy while the call is enqueued."""
    flush.zero_()
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    began = time.perf_counter()
    start.record()
    run()
    stop.record()
    return start, stop, time.perf_counter() - began


def summary(times: dict[str, list[float]], base: str | None) -> dict:
    """Spreads of the times, and of the rounds' ratios to the base."""
    found = {"ms": {name: spread(ts) for name, ts in times.items()}, "rounds": len(next(iter(times.values()), []))}
    if base in times:
        found["ratios"] = {name: ratio(ts, times[base]) for name, ts in times.items() if name != base}
    return found


def first_call(run: Run, seconds: float) -> tuple[float, object]:
    """Seconds that a contender's first call takes, compilation and tuning included, and what it returned.

    Raises:
        harness.OverBudget: it takes longer than this.
    """
    began = time.perf_counter()
    with harness.time_limit(seconds):
        result = run()
        synchronize()
    return time.perf_counter() - began, result


def peak_mib(run: Run) -> float:
    """How far a call raises the allocated memory of the device."""
    run()
    synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run()
    synchronize()
    del result
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def by_kernel(run: Run, calls: int = 3) -> dict[str, float]:
    """Milliseconds on the device per call, by the kernels' names, longest first; those under 1 % are left out."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(calls):
            run()
        synchronize()
    total = {event.key: event.self_device_time_total / 1e3 / calls for event in profiler.key_averages()}
    floor = 0.01 * sum(total.values())
    return dict(sorted(((name[:80], ms) for name, ms in total.items() if ms > floor), key=lambda row: -row[1]))


def synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def usable() -> bool:
    """Whether the process can still use its device: after an illegal access no call works any more."""
    try:
        synchronize()
    except RuntimeError:
        return False
    return True


def release() -> None:
    """Give unused device memory back, for the next contender."""
    import gc

    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def first_line(error: BaseException) -> str:
    """An error for a note."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300]}" if text else type(error).__name__
