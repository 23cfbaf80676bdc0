"""Times and memory on the device: events around each call, with a cold L2 cache; or the CPU's clock in the smoke test."""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable

import torch

from ..common.timing import Sampler, time_limit, timed
from .plan import Settings

#: bytes written before each call: more than any L2 cache, so that no call finds its inputs there
FLUSH = 512 * 2**20


def sampler(run: Callable[[], object], settings: Settings) -> Sampler:
    """Seconds of one call. The flush also keeps the device busy while the host enqueues the call. ``triton.testing.do_bench`` times one
    function at a time; here implementations take turns."""
    if settings.device == "cpu":
        return timed(run, time.perf_counter)
    flush = _buffer(settings.device)

    def sample(_: int) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        run()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3

    return sample


@functools.cache
def _buffer(device: str) -> torch.Tensor:
    return torch.empty(FLUSH, dtype=torch.uint8, device=device)


def yardsticks(settings: Settings) -> tuple[dict[str, Callable[[], object]], dict[str, float]]:
    """A bf16 matrix product of 8192^3 and a copy of 2 GiB: calls, and their operations or bytes."""
    count, size = (2**20, 64) if settings.smoke else (2**31, 8192)
    source = torch.ones(count // 4, device=settings.device)
    target = torch.empty_like(source)
    a, b = (torch.randn(size, size, device=settings.device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    calls = {"mm": lambda: torch.mm(a, b, out=out), "copy": lambda: target.copy_(source)}
    for call in calls.values():
        call()
    return calls, {"mm": 2 * size**3, "copy": 2 * count}


def first_call(run: Callable[[], object], seconds: float) -> tuple[float, object]:
    """Seconds of a first call, compilation and tuning included, and its result; ``OverBudget`` if it takes longer than ``seconds``."""
    began = time.perf_counter()
    with time_limit(seconds):
        result = run()
        synchronize()
    return time.perf_counter() - began, result


def peak_mib(run: Callable[[], object]) -> float:
    """How far a call raises the allocated memory of the device."""
    release()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def kernel_us(run: Callable[[], object], calls: int = 5) -> dict[str, float]:
    """Microseconds of each kernel of a call, all its launches together, by the profiler."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(calls):
            run()
        synchronize()
    return {x.key: x.device_time_total / calls for x in found.key_averages() if x.device_time_total}


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
    """Free unused device memory."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def describe(settings: Settings) -> dict:
    """The device; nothing is changed."""
    if settings.device == "cpu" or not torch.cuda.is_available():
        return {"name": "CPU"}
    p = torch.cuda.get_device_properties(0)
    return {"name": p.name, "architecture": f"sm_{p.major}{p.minor}", "multiprocessors": p.multi_processor_count,
            "memory_gib": p.total_memory / 2**30, "cuda": torch.version.cuda}  # fmt: skip
