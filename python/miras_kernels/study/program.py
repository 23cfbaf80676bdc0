"""The command ``python -m miras_kernels study``: measure, and write what was asked for."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import multiprocessing
import os
import platform
import sys
import time
from pathlib import Path

import torch

from .. import __version__, dispatch
from . import contestants, mqar, page, recall, tasks
from .document import Document

__all__ = ["FULL", "QUICK", "Plan", "command", "measure"]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a study measures.

    Attributes:
        budget, training: how much each contestant and each trained memory gets.
        levels: of each task, counted from the hard end; None for all.
        tasks, memories: recall tasks, and memories that are trained.
    """

    budget: recall.Budget
    training: mqar.Training
    levels: int | None = None
    tasks: tuple[str, ...] = tuple(tasks.TABLE)
    memories: tuple[str, ...] = tuple(mqar.MEMORIES)

    def jobs(self) -> list[tuple[str, ...]]:
        """What can be measured alone; what takes longest comes first, so that processes end together."""
        trained = [("trained", name) for name in sorted(self.memories, key=lambda name: mqar.MEMORIES[name].memory == "linear")]
        hard = slice(None) if self.levels is None else slice(-self.levels, None)
        return trained + [("recall", name, level) for name in self.tasks for level in tasks.TABLE[name].levels[hard]]


FULL = Plan(recall.Budget(points=48, tuning=8, repeats=16), mqar.Training(steps=300, repeats=5))
QUICK = Plan(recall.Budget(points=4, tuning=2, repeats=4), mqar.Training(steps=2, repeats=2), levels=1, memories=("dot product", "L2"))


def _do(arguments: tuple[Plan, int, tuple]) -> tuple[tuple, list, float]:
    """A job, its results, and the CPU time that it took."""
    plan, seed, job = arguments
    began = time.process_time()
    kind, *what = job
    found = mqar.run(*what, plan.training, seed) if kind == "trained" else recall.measure(*what, list(contestants.TABLE), plan.budget, seed)
    return job, found, time.process_time() - began


def measure(plan: Plan, seed: int, workers: int) -> Document:
    """Do a plan. Each process has one thread, so that results do not depend on how many share the work."""
    jobs, found, seconds = plan.jobs(), {}, 0.0
    calls = [(plan, seed, job) for job in jobs]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = None if workers == 1 else multiprocessing.get_context("spawn").Pool(workers, torch.set_num_threads, (1,))
    try:
        for job, results, took in map(_do, calls) if pool is None else pool.imap_unordered(_do, calls):
            found[job] = results
            seconds += took
            print(f"study: {len(found)} of {len(jobs)}: {' '.join(map(str, job))}, {took:.1f} s of CPU time", file=sys.stderr, flush=True)
    finally:
        torch.set_num_threads(before)
        if pool is not None:
            pool.terminate()
            pool.join()
    of_kind = lambda kind, order: [x for job in order if job[0] == kind for x in found[job]]
    by_memory = sorted((job for job in jobs if job[0] == "trained"), key=lambda job: list(mqar.MEMORIES).index(job[1]))
    about = {
        "seed": seed, **dataclasses.asdict(plan.budget), **{f"training_{k}": v for k, v in dataclasses.asdict(plan.training).items()},
        "versions": {"miras-kernels": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "backend": "reference" if dispatch.unavailable("cpp") else "cpp", "cpu_minutes": round(seconds / 60, 1),
    }  # fmt: skip
    return Document(about, of_kind("recall", jobs), of_kind("trained", by_memory))


# ------------------------------------------------------------------------------------------------------- the command


def command(args: argparse.Namespace) -> int:
    """Measure, or read results; write what is asked for, and print what the report has in short."""
    if args.plots is not None and importlib.util.find_spec("matplotlib") is None:  # told before the minutes, not after
        print("study: --plots needs matplotlib, which is not installed: pip install matplotlib", file=sys.stderr)
        return 2
    if args.results is None:
        document = measure(QUICK if args.quick else FULL, args.seed, 1 if args.quick else args.workers)
        document = Document.load(document.dump())  # as rounded as a reader of the JSON has it
    else:
        try:
            document = Document.load(args.results.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            print(f"study: --results {args.results}: {error}", file=sys.stderr)
            return 2
    if args.json is not None:
        _write(args.json, document.dump())
    if args.plots is not None:
        from . import plots

        for path in plots.draw(document, args.plots):
            print(f"study: wrote {path}", file=sys.stderr)
    if args.page is not None:
        figures = None if args.plots is None else os.path.relpath(args.plots, args.page.parent)
        _write(args.page, page.render(document, figures))
    print(page.in_short(document))
    return 0


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    print(f"study: wrote {path}", file=sys.stderr)
