"""How times are taken: all implementations take turns, round by round, in rotating order.

A ratio is the median of the rounds' ratios: what slows a whole round down slows both sides, and cancels.
"""

from __future__ import annotations

import contextlib
import gc
import math
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

#: seconds that an implementation gets per round, in as many calls as fit
SLICE = 0.01

Clock = Callable[[], float]
Sampler = Callable[[int], float]  # makes so many calls: seconds per call


def clock_for(threads: int) -> tuple[str, Clock]:
    """The clock's name and the clock: CPU time of the process for one thread, wall time for more."""
    return ("cpu", time.process_time) if threads == 1 else ("wall", time.perf_counter)


def timed(run: Callable[[], object], clock: Clock) -> Sampler:
    """A sampler of calls in this process."""

    def sample(count: int) -> float:
        began = clock()
        for _ in range(count):
            run()
        return (clock() - began) / count

    return sample


def whole_chunks(run: Callable[[], object], clock: Clock, chunk: int) -> Sampler:
    """A sampler of decoding steps: seconds per token over whole chunks, at least as many tokens as asked for."""
    sample = timed(run, clock)
    return lambda count: sample(-(-count // chunk) * chunk)


def interleave(samplers: dict[str, Sampler], seconds: float, min_rounds: int, slice_seconds: float = SLICE) -> dict[str, list[float]]:
    """Seconds per call of every implementation, one number per round, all lists of one length. The rounds go on for ``seconds``, and are at
    least ``min_rounds``; ``slice_seconds=0`` makes one call per round, without calibration."""
    names, calls = list(samplers), dict.fromkeys(samplers, 1)
    for name in names if slice_seconds else ():
        samplers[name](1)
        calls[name] = max(1, min(1000, math.ceil(slice_seconds / max(samplers[name](1), 1e-7))))
    times: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + seconds
    gc.collect()
    gc.disable()
    try:
        done = 0
        while done < min_rounds or time.perf_counter() < end:
            for name in names[done % len(names) :] + names[: done % len(names)]:
                times[name].append(samplers[name](calls[name]))
            done += 1
    finally:
        gc.enable()
    return times


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and the 10th and 90th percentile."""
    ordered = sorted(values)
    at = lambda p: ordered[min(len(ordered) - 1, max(0, round(p * (len(ordered) - 1))))]
    return {"median": statistics.median(ordered), "p10": at(0.1), "p90": at(0.9)}


def ratio(over: Sequence[float], under: Sequence[float]) -> dict[str, float]:
    """Spread of the rounds' ratios ``over / under``."""
    return spread([a / b for a, b in zip(over, under, strict=True)])


def figures(times: dict[str, list[float]], base: str, yardsticks: Sequence[str] = ()) -> dict:
    """Milliseconds per call, and the times of the others over that of ``base``."""
    others = [name for name in times if name not in (base, *yardsticks)]
    return {
        "rounds": len(times[base]),
        "ms": {name: spread([1e3 * t for t in ts]) for name, ts in times.items()},
        "ratios": {name: ratio(times[name], times[base]) for name in others},
    }


def shares(times: dict[str, list[float]], base: str, work: dict[str, float], yardsticks: dict[str, float]) -> dict:
    """What ``base`` does per second, and its share of what the machine reached in the same rounds. The roofline is the least time possible:
    the operations at the speed of the matrix product, or the bytes at the speed of the copy, whichever takes longer. ``work``: flops and
    bytes of a call; ``yardsticks``: those of ``mm`` and ``copy``, which are among the times, and of ``peak``, which may be; its share has
    also that of both sides' best rounds."""
    took, mm, copy = (spread(times[name])["median"] for name in (base, "mm", "copy"))
    arithmetic, memory = work["flops"] / yardsticks["mm"], work["bytes"] / yardsticks["copy"]
    rounds = list(zip(times[base], times["mm"], times["copy"], strict=True))
    found = {}
    if "peak" in times:
        least, fastest = work["flops"] / yardsticks["peak"], min(times["peak"])
        share = spread([least * peak / t for t, peak in zip(times[base], times["peak"], strict=True)])
        share["best"] = least * fastest / min(times[base])
        found = {"peak_gflops": yardsticks["peak"] / fastest / 1e9, "share_of_peak": share}
    return found | {
        "work": work, "gflops": work["flops"] / took / 1e9, "mm_gflops": yardsticks["mm"] / mm / 1e9,
        "gbytes": work["bytes"] / took / 1e9, "copy_gbytes": yardsticks["copy"] / copy / 1e9,
        "share_of_mm": spread([arithmetic * mm / t for t, mm, _ in rounds]),
        "share_of_roofline": spread([max(arithmetic * mm, memory * copy) / t for t, mm, copy in rounds]),
    }  # fmt: skip


class OverBudget(BaseException):
    """Raised in the main thread by :func:`time_limit`; a BaseException, so that no ``except Exception`` on the way stops it."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise :class:`OverBudget` in the block once it has taken this long."""

    def ring(*_: object) -> None:
        raise OverBudget

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
