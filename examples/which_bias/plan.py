"""What the study measures, in one or several processes."""

from __future__ import annotations

import dataclasses
import multiprocessing
import platform
import sys
import time

import torch

from miras_kernels import __version__, dispatch

from . import methods, search, tasks, training
from .results import Results

__all__ = ["FULL", "QUICK", "Plan", "measure"]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the study measures.

    Attributes:
        budget, training: how much each method and each trained memory gets.
        levels: how many levels of each task, the hardest ones; None for all.
        tasks, memories: names of tasks on streams, and of memories that are trained.
        added: methods besides those of the table.
    """

    budget: search.Budget
    training: training.Training
    levels: int | None = None
    tasks: tuple[str, ...] = tuple(tasks.TABLE)
    memories: tuple[str, ...] = tuple(training.MEMORIES)
    added: tuple[methods.Method, ...] = ()

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
    methods.TABLE.update({row.name: row for row in plan.added})  # also in a process of its own
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
