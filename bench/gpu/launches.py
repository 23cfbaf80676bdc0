"""Host time of launches, which bounds short calls on a GPU. There is no device here: the driver of kernels/offline/driver.py launches
nothing, tensors are the CPU's, and the time is that of Python from a kernel's arguments to the driver."""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from collections.abc import Callable

import torch

from miras_kernels.testing import Case

CASES = {
    "linear": Case("linear", batch=1, tokens=256, heads=4, key_dim=64, value_dim=64, chunk_size=64, initial="none"),
    "linear, packed": Case("packed", tokens=256, heads=4, key_dim=64, value_dim=64, chunk_size=64, initial="none", lengths=(100, 156)),
    "mlp": Case("mlp", memory="mlp", batch=1, tokens=128, heads=4, key_dim=64, value_dim=64, hidden=64, chunk_size=64),
}
#: Triton's own launch comes second
WAYS = {"here": True, "by Triton": False}
#: calls in a row by one way, of which the first is not timed: a process launches in one way, and the other's code is not in its caches
TURN = 10


class Clock:
    """Takes the place of `launch` wherever it was imported, and notes how long each launch takes."""

    def __init__(self):
        from miras_kernels.kernels.common import launch

        self.launch, self.times = launch.launch, []
        for module in [module for module in sys.modules.values() if getattr(module, "launch", None) is self.launch]:
            module.launch = self

    def __call__(self, *arguments, **named) -> None:
        began = time.perf_counter()
        self.launch(*arguments, **named)
        self.times.append(time.perf_counter() - began)


def report(turns: int = 50) -> int:
    """Print the medians; both ways take turns."""
    from miras_kernels.kernels.common import bound
    from miras_kernels.kernels.linear import sequence as _linear  # noqa: F401  so that `Clock` finds their launches
    from miras_kernels.kernels.mlp import sequence as _mlp  # noqa: F401
    from miras_kernels.kernels.offline.driver import without_device

    torch.set_num_threads(1)
    clock, middle = Clock(), lambda seconds: f"{1e6 * statistics.median(seconds):.1f}"
    print("| call | launches | us a launch, here | by Triton | us a call, here | by Triton |\n| --- | --- | --- | --- | --- | --- |")
    with without_device(lambda *_: None):
        for name, direction in itertools.product(CASES, ("forward", "forward+backward")):
            run = call_of(CASES[name], direction)
            launches: dict[str, list] = {way: [] for way in WAYS}
            calls: dict[str, list] = {way: [] for way in WAYS}
            for turn in range(turns + 1):  # the first one compiles
                for way, bound.KNOWN in WAYS.items():
                    for i in range(TURN):
                        clock.times, began = [], time.perf_counter()
                        run()
                        if turn and i:
                            calls[way].append(time.perf_counter() - began)
                            launches[way] += clock.times
            cells = [*map(middle, launches.values()), *map(middle, calls.values())]
            print(f"| {name}, {direction} | {len(clock.times)} | {' | '.join(cells)} |", flush=True)
    return 0


def call_of(case: Case, direction: str) -> Callable[[], object]:
    inputs = case.draw(torch.float32).to(torch.bfloat16)
    arguments = {**inputs.arguments(), "output_final_state": False, "backend": "triton"}

    def run() -> None:
        with torch.set_grad_enabled(direction != "forward"):
            out, _ = case.function(**arguments)
        if direction != "forward":
            torch.autograd.grad(out, list(inputs.leaves().values()), inputs.grad_out)

    return run
