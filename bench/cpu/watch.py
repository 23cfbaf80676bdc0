"""The machine under a measurement: load by other processes, real cores for the threads, memory, and the yardsticks."""

from __future__ import annotations

import ctypes
import gc
import os
import re
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from miras_kernels import dispatch

from ..common.timing import timed

#: how a flag about foreign load begins
OTHERS = "other processes used"


class Watch:
    """Notes, while a block runs, how many cores other processes used and whether N threads had N real cores. ``others``: cores used by
    other processes than this and its ``helpers``, time stolen by the host included. ``speedup``: of the threads over one on a large matrix
    product, before and after the block. None where unknown."""

    LOAD = 0.1  # more foreign load is flagged
    SHARE = 0.9  # of the ideal speed-up; with less, the threads shared cores

    def __init__(self, threads: int, helpers: Sequence[int] = ()):
        self.threads, self.helpers = threads, helpers
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
        return time.process_time() + sum(map(cpu_seconds, self.helpers))

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


def _busy() -> float | None:
    """Seconds that all cores together have been busy, stolen time included."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    except OSError:
        return None
    user, nice, system, _idle, _wait, irq, softirq, steal = map(int, fields)
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def cpu_seconds(process: int) -> float:
    """CPU seconds of another process so far; 0 where that is unknown."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _thread_speedup(threads: int) -> float:
    if threads == 1:
        return 1.0
    times, sample = {}, timed(matrix_product(), time.perf_counter)
    for n in (1, threads):
        torch.set_num_threads(n)
        sample(1)
        times[n] = statistics.median(sample(1) for _ in range(5))
    return times[1] / times[threads]


_MM_SIZE = 1024
_COPY_BYTES = 128 << 20  # more than the caches of most machines
#: operations of the matrix product; bytes that the copy reads and writes; operations in registers
YARDSTICKS = {"mm": 2 * _MM_SIZE**3, "copy": 2 * _COPY_BYTES, "peak": 3 << 25}


def matrix_product() -> Callable[[], object]:
    """The yardstick for arithmetic: a float32 ``torch.mm`` of 1024^3."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(_MM_SIZE, _MM_SIZE, generator=generator) for _ in range(2))
    out = torch.empty(_MM_SIZE, _MM_SIZE)
    return lambda: torch.mm(a, b, out=out)


def memory_copy() -> Callable[[], object]:
    """The yardstick for memory: a copy of 128 MiB."""
    source, target = torch.ones(_COPY_BYTES // 4), torch.zeros(_COPY_BYTES // 4)
    return lambda: target.copy_(source)


def multiply_adds() -> Callable[[], object]:
    """The yardstick for what the cores could do at most: multiplications and additions in registers, with the kernels' instructions."""
    extension = dispatch.BACKENDS["cpp"].extension
    return lambda: extension.multiply_adds(YARDSTICKS["peak"])


def yardsticks() -> dict[str, Callable[[], object]]:
    """By name; there is no peak without the C++ extension."""
    return {"mm": matrix_product(), "copy": memory_copy()} | ({} if dispatch.unavailable("cpp") else {"peak": multiply_adds()})


def peak_rise(run: Callable[[], object]) -> float | None:
    """How many MiB a call raises the resident memory at its highest; None where the system does not report it."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # give freed memory back
        Path("/proc/self/clear_refs").write_text("5")  # start VmHWM anew
    except (AttributeError, OSError):
        return None
    resident = lambda name: int(re.search(rf"^{name}:\s+(\d+)", Path("/proc/self/status").read_text(), re.MULTILINE)[1]) / 1024
    before = resident("VmRSS")  # now
    run()
    return resident("VmHWM") - before  # the most so far


def saved_bytes(run: Callable[[], object], inputs) -> int:
    """Bytes of the saved tensors that autograd holds between forward and backward, without the inputs."""
    own = {x.untyped_storage().data_ptr() for x in inputs.leaves().values()}
    saved: dict[int, int] = {}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        run()
    return sum(saved.values())
