"""How to measure on a CPU that others may use: interleaved contenders, load and core checks, tables.

Times are taken round by round, every contender in every round, in rotating order; a ratio is the median of the rounds'
ratios. With one thread the clock is the process' CPU time, which other processes can hardly disturb; with more threads it is
the wall clock, and then the run also checks that the threads had real cores of their own (:class:`Watch`).
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import importlib.metadata
import math
import os
import platform
import signal
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

#: keeps freed outputs in the process: otherwise page faults, a third of a backward's time, hide the arithmetic of everyone
MALLOC = "glibc.malloc.trim_threshold=1073741824:glibc.malloc.mmap_threshold=1073741824"

#: seconds that one contender gets per round, in as many calls as fit
SLICE = 0.01

#: how a flag about foreign load begins
OTHERS = "other processes used"

Clock = Callable[[], float]
#: runs so many calls and returns the seconds that one took
Sampler = Callable[[int], float]


def environment(threads: int, *, root: Path = ROOT, malloc: bool = True, capability: str | None = None) -> dict[str, str]:
    """The environment of a measuring process, which imports the package of the source tree ``root``."""
    env = dict(os.environ, OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads), PYTHONUNBUFFERED="1")
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root / "python"), env.get("PYTHONPATH")]))
    if malloc:
        env["GLIBC_TUNABLES"] = MALLOC
    if capability is not None:
        env["MIRAS_CPU_CAPABILITY"] = capability
    return env


def clock_for(threads: int) -> tuple[str, Clock]:
    """The clock's name and the clock: CPU time for one thread, wall time for more."""
    return ("cpu", time.process_time) if threads == 1 else ("wall", time.perf_counter)


# ------------------------------------------------------------------------------------------------------------ timing


def timed(run: Callable[[], object], clock: Clock) -> Sampler:
    """A sampler of calls in this process."""

    def sample(count: int) -> float:
        began = clock()
        for _ in range(count):
            run()
        return (clock() - began) / count

    return sample


def whole_chunks(run: Callable[[], object], clock: Clock, chunk: int) -> Sampler:
    """A sampler of calls that read one token each: seconds a token, of whole chunks at least as many as the calls asked for."""
    sample = timed(run, clock)
    return lambda count: sample(-(-count // chunk) * chunk)


def interleave(samplers: dict[str, Sampler], seconds: float, min_rounds: int) -> dict[str, list[float]]:
    """Seconds per call of every contender, one number per round, all lists of one length.

    Runs for about ``seconds``, and for ``min_rounds`` at least.
    """
    calls = {}
    for name, sample in samplers.items():
        sample(1)
        calls[name] = max(1, min(1000, math.ceil(SLICE / max(sample(1), 1e-7))))
    times: dict[str, list[float]] = {name: [] for name in samplers}
    names = list(samplers)
    end = time.perf_counter() + seconds
    with no_garbage_collection():
        done = 0
        while done < min_rounds or time.perf_counter() < end:
            for name in names[done % len(names) :] + names[: done % len(names)]:
                times[name].append(samplers[name](calls[name]))
            done += 1
    return times


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and the 10th and 90th percentile."""
    ordered = sorted(values)
    at = lambda p: ordered[min(len(ordered) - 1, max(0, round(p * (len(ordered) - 1))))]
    return {"median": statistics.median(ordered), "p10": at(0.1), "p90": at(0.9)}


def ratio(over: Sequence[float], under: Sequence[float]) -> dict[str, float]:
    """Spread of the rounds' ratios ``over / under``."""
    return spread([a / b for a, b in zip(over, under, strict=True)])


class OverBudget(BaseException):
    """Raised in the main thread by :func:`time_limit`; no ``except Exception`` on the way holds it up."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise :class:`OverBudget` in the block once it has taken this long (not where there are no alarms: Windows)."""
    if not hasattr(signal, "SIGALRM"):
        yield
        return

    def ring(*_: object) -> None:
        raise OverBudget

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# ------------------------------------------------------------------------------------------------------------ checks


class Watch:
    """Notes, while a block runs, how many cores other processes used and whether N threads meant N cores.

    Attributes:
        others: cores' worth of work done by other processes (and stolen by the host), None where /proc/stat is missing.
        speedup: of ``threads`` threads over one on a large matrix product, before and after the block; None for one thread.

    Args:
        helpers: processes that work for this one within the block, and are no others.
    """

    #: more foreign work than this is told beside the result
    LOAD = 0.1
    #: share of the ideal speed-up below which the threads shared cores
    SHARE = 0.9

    def __init__(self, threads: int, helpers: Sequence[int] = ()):
        self.threads = threads
        self.helpers = helpers
        self.others: float | None = None
        self.speedup: tuple[float, float] | None = None

    def __enter__(self) -> Watch:
        self._before = _thread_speedup(self.threads)
        self._start = (time.perf_counter(), _busy(), self._own())
        return self

    def __exit__(self, *_: object) -> None:
        began, busy, own = self._start
        elapsed = time.perf_counter() - began
        if busy is not None and elapsed > 0:
            self.others = max(0.0, (_busy() - busy) - (self._own() - own)) / elapsed
        if self.threads > 1:
            self.speedup = (self._before, _thread_speedup(self.threads))

    def _own(self) -> float:
        return time.process_time() + sum(map(_worked, self.helpers))

    def flags(self) -> list[str]:
        """What makes the numbers doubtful, in words."""
        found = []
        if self.others is not None and self.others > self.LOAD:
            found.append(f"{OTHERS} {self.others:.2f} cores")
        if self.speedup is not None and min(self.speedup) < self.SHARE * self.threads:
            before, after = self.speedup
            found.append(f"{self.threads} threads were {before:.2f}x (before) and {after:.2f}x (after) one: not {self.threads} real cores")
        return found

    def report(self) -> dict:
        return {"other_load_cores": self.others, "thread_speedup": self.speedup, "flags": self.flags()}


def verdict(value: float | None, least: float, goal: float | None, at_most: bool) -> str:
    """What is said of a figure: "goal", "met", "NOT met" or "not measured"."""
    if value is None:
        return "not measured"
    reached = (lambda limit: value <= limit) if at_most else (lambda limit: value >= limit)
    if goal is not None and reached(goal):
        return "goal"
    return "met" if reached(least) else "NOT met"


def figures(times: dict[str, list[float]], base: str, batch: int) -> dict:
    """What is written down of steps that read a token of ``batch`` sequences; ratios are to ``base``."""
    return {
        "us": {name: {p: 1e6 * x for p, x in spread(t).items()} for name, t in times.items()},
        "ratios": {name: ratio(t, times[base]) for name, t in times.items() if name != base},
        "tokens_per_second": {name: batch / spread(t)["median"] for name, t in times.items() if not name.startswith("touch")},
    }


def _busy() -> float | None:
    """Seconds that all cores together have been busy, stolen time included."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    except OSError:
        return None
    user, nice, system, _idle, _wait, irq, softirq, steal = map(int, fields)
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _worked(process: int) -> float:
    """CPU seconds of another process so far; 0 where that cannot be told."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _thread_speedup(threads: int) -> float:
    if threads == 1:
        return 1.0
    import torch

    times = {}
    multiply = matrix_product()
    for n in (1, threads):
        torch.set_num_threads(n)
        multiply()
        samples = []
        for _ in range(5):
            began = time.perf_counter()
            multiply()
            samples.append(time.perf_counter() - began)
        times[n] = statistics.median(samples)
    return times[1] / times[threads]


MM_SIZE = 1024
MM_FLOPS = 2 * MM_SIZE**3


def matrix_product() -> Callable[[], object]:
    """The yardstick: a float32 ``torch.mm`` of 1024^3."""
    import torch

    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(MM_SIZE, MM_SIZE, generator=generator) for _ in range(2))
    out = torch.empty(MM_SIZE, MM_SIZE)
    return lambda: torch.mm(a, b, out=out)


#: of the copied tensor: more than the caches of most machines
COPY_BYTES = 128 << 20


def memory_copy() -> Callable[[], object]:
    """The other yardstick, of the memory: a copy, which reads and writes so many bytes."""
    import torch

    source, target = torch.ones(COPY_BYTES // 4), torch.zeros(COPY_BYTES // 4)
    return lambda: target.copy_(source)


def resident(name: str) -> float:
    """A memory figure of this process, ``VmRSS`` (now) or ``VmHWM`` (the most so far), in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"no {name} in /proc/self/status")


def reset_peak() -> bool:
    """Give freed memory back and start ``VmHWM`` anew; False where the system does not allow it."""
    import ctypes

    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (AttributeError, OSError):
        return False
    return True


def peak_rise(run: Callable[[], object]) -> float | None:
    """How many MiB a call raises the resident memory at its highest; None where the system does not tell."""
    if not reset_peak():
        return None
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


# ----------------------------------------------------------------------------------------------------------- reports


def machine() -> dict:
    """The machine, without names that tell whose it is."""
    model, flags = platform.processor() or platform.machine(), []
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            elif key.strip() == "flags" and not flags:
                flags = [f for f in value.split() if f.startswith(("avx", "amx", "fma"))]
    return {"device": "cpu", "cpu": model, "cores": os.cpu_count(), "vector_flags": flags, "system": platform.system(),
            "architecture": platform.machine()}  # fmt: skip


def versions(*distributions: str) -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in distributions:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def commit() -> dict:
    """The commit measured, and whether the files differ from it."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(ROOT), *arguments], check=False, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    changes = git("status", "--porcelain")
    return {"commit": git("rev-parse", "HEAD"), "modified": None if changes is None else bool(changes)}


def today() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table, padded so that it reads well as plain text too."""
    lines = [list(header), *map(list, rows)]
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(header))]
    text = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in lines]
    return "\n".join([text[0], "| " + " | ".join("-" * w for w in widths) + " |", *text[1:]])
