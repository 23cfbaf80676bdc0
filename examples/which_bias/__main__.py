"""Which attentional bias remembers what: measure it, and write ``docs/which-bias.md`` (``make study``).

    python -m examples.which_bias --json docs/which-bias.json --page docs/which-bias.md --plot docs/which-bias/recall.png

Streams of key-value pairs with one difficulty each (``tasks.py``) are read by memories and by baselines that store every pair
(``methods.py``); step size, decay and thresholds are searched on other streams than those that are reported (``search.py``); small models
with each bias are trained on multi-query associative recall (``training.py``). ``results.py`` stores and compares the results; ``page.md``
is the template of the page, which ``page.py`` fills in.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from miras_kernels import __version__, dispatch

from . import methods, page, search, tasks, training
from .results import Results


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the study measures.

    Attributes:
        budget, training: how much each method and each trained memory gets.
        levels: how many levels of each task, the hardest ones; None for all.
        tasks, memories: names of tasks on streams, and of memories that are trained.
    """

    budget: search.Budget
    training: training.Training
    levels: int | None = None
    tasks: tuple[str, ...] = tuple(tasks.TABLE)
    memories: tuple[str, ...] = tuple(training.MEMORIES)

    def jobs(self) -> list[tuple]:
        """Independent measurements, the longest first, so that all processes end at about the same time."""
        trained = [("trained", name) for name in sorted(self.memories, key=lambda name: training.MEMORIES[name].memory == "linear")]
        hard = slice(None) if self.levels is None else slice(-self.levels, None)
        return trained + [("recall", name, level) for name in self.tasks for level in tasks.TABLE[name].levels[hard]]


FULL = Plan(search.Budget(points=48, tuning=8, repeats=16), training.Training(steps=300, repeats=5))
QUICK = Plan(search.Budget(points=4, tuning=2, repeats=4), training.Training(steps=2, repeats=2), levels=1, memories=("dot product", "L2"))


def _do(arguments: tuple[Plan, int, tuple]) -> tuple[tuple, list, float]:
    """A job, its results, and its CPU time."""
    plan, seed, job = arguments
    began = time.process_time()
    kind, *what = job
    found = training.run(*what, plan.training, seed) if kind == "trained" else search.measure(*what, list(methods.TABLE), plan.budget, seed)
    return job, found, time.process_time() - began


def measure(plan: Plan, seed: int, workers: int) -> Results:
    """Run a plan. Each process has one thread, so that the results do not depend on the number of processes."""
    jobs, found, seconds = plan.jobs(), {}, 0.0
    calls = [(plan, seed, job) for job in jobs]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = None if workers == 1 else multiprocessing.get_context("spawn").Pool(workers, torch.set_num_threads, (1,))
    try:
        for job, results, took in map(_do, calls) if pool is None else pool.imap_unordered(_do, calls):
            found[job] = results
            seconds += took
            print(f"{len(found)} of {len(jobs)}: {' '.join(map(str, job))}, {took:.1f} s of CPU time", file=sys.stderr, flush=True)
    finally:
        torch.set_num_threads(before)
        if pool is not None:
            pool.terminate()
            pool.join()
    cells = [x for job in jobs if job[0] == "recall" for x in found[job]]
    runs = [x for name in training.MEMORIES if ("trained", name) in found for x in found["trained", name]]
    about = {
        "seed": seed, **dataclasses.asdict(plan.budget), **{f"training_{k}": v for k, v in dataclasses.asdict(plan.training).items()},
        "versions": {"miras-kernels": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "backend": "reference" if dispatch.unavailable("cpp") else "cpp", "cpu_minutes": round(seconds / 60, 1),
    }  # fmt: skip
    return Results(about, cells, runs)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, or read earlier results; write the files that are asked for, and print the page's summary."""
    parser = argparse.ArgumentParser(prog="python -m examples.which_bias", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="seconds: one level of each task and tiny budgets; the numbers mean nothing")
    parser.add_argument("--seed", type=int, default=0, help="of streams, initial memories and training data (default: 0)")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1), metavar="N",
                        help="processes, one thread each; the results do not depend on it (default: up to 2)")  # fmt: skip
    parser.add_argument("--results", type=Path, metavar="FILE", help="measure nothing: read the JSON of an earlier run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the page, Markdown; it shows the plot")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the errors (needs matplotlib)")
    args = parser.parse_args(arguments)
    if args.plot is not None:
        from . import plot  # before anything is measured: matplotlib may be missing
    if args.results is None:
        found = measure(QUICK if args.quick else FULL, args.seed, 1 if args.quick else args.workers)
        results = Results.load(found.dump())  # with the rounding of the JSON
    else:
        try:
            results = Results.load(args.results.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            print(f"--results {args.results}: {error}", file=sys.stderr)
            return 2
    figure = None if args.plot is None else os.path.relpath(args.plot, args.page.parent if args.page else ".")
    text = page.render(results, figure)
    if args.plot is not None:
        plot.draw(results, args.plot)
    for path, content in ((args.json, results.dump()), (args.page, text)):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content, encoding="utf-8")
    print(page.summary(text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
