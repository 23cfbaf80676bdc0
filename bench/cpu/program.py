"""What bench.cpu and bench.cpu.decode share: their options, and how a study runs in a fresh process."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

import miras_kernels

from ..common import results
from ..common.processes import ROOT, Lost, Worker
from .cases import Settings

#: keeps freed outputs in the process: otherwise page faults, a third of a backward's time, hide the arithmetic of everyone
MALLOC = "glibc.malloc.trim_threshold=1073741824:glibc.malloc.mmap_threshold=1073741824"


def environment(threads: int, *, root: Path = ROOT, malloc: bool = True, capability: str | None = None) -> dict[str, str]:
    """The environment of a measuring process, which imports the package of the source tree ``root``."""
    env = dict(os.environ, OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads), PYTHONUNBUFFERED="1")
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root / "python"), env.get("PYTHONPATH")]))
    if malloc:
        env["GLIBC_TUNABLES"] = MALLOC
    if capability is not None:
        env["MIRAS_CPU_CAPABILITY"] = capability
    return env


def task(study: Callable) -> Callable:
    """A study as a measuring process does it.

    The process has ``threads`` threads from here on. RuntimeError where the package does not come from ``root``.
    """

    def run(case: str, threads: int, settings: dict, root: str | None = None, **options) -> Iterator:
        torch.set_num_threads(threads)
        package = Path(miras_kernels.__file__).resolve()
        if root is not None and not package.is_relative_to(Path(root).resolve()):
            raise RuntimeError(f"the package of {root} was asked for, but it was imported from {package.parent}")
        yield from study(case, threads, Settings(**settings), **options)

    return run


def request(study: str, case: str, threads: int, settings: Settings, **options) -> dict:
    return {"task": study, "case": case, "threads": threads, "settings": dataclasses.asdict(settings), **options}


def start(module: str, asked: dict, env: dict[str, str] | None = None) -> list[dict]:
    """The results of one study, in a fresh process; if it fails, the last one has an error."""
    with Worker(module, env or environment(asked["threads"])) as worker:
        try:
            return worker.ask(asked)
        except Lost as lost:
            error = f"the measuring process failed: {lost}"
            head = {"study": asked["task"], "case": asked["case"], "threads": asked["threads"], "direction": "", "parity": {}}
            return [*lost.results, {**head, "error": error, "notes": [error]}]


def run(module: str, jobs: Sequence[tuple[str, str, int]], settings: Settings, **options) -> list[dict]:
    """The results of ``(study, case, threads)``, one after the other."""
    found = []
    for i, (study, case, threads) in enumerate(jobs, 1):
        print(f"[{i}/{len(jobs)}] {study} {case}, {threads} threads", file=sys.stderr, flush=True)
        found += start(module, request(study, case, threads, settings, **options))
    return found


def parser(module: str, description: str, studies: Sequence[str], quick: str, seconds: str) -> argparse.ArgumentParser:
    """The options that both programs have; ``quick`` and ``seconds`` complete the help of these."""
    made = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    made.add_argument("--json", type=Path, metavar="PATH", help="write the results there as well")
    made.add_argument("--quick", action="store_true", help=f"about a minute: one thread, {quick}")
    made.add_argument("--only", metavar="STUDY,...", help=f"some of {', '.join(studies)}")
    made.add_argument("--threads", metavar="N,...", help="thread counts (default 1,2; 1 with --quick)")
    made.add_argument("--seconds", type=float, help=f"per interleaved measurement (default {seconds})")
    made.add_argument("--backend", default="cpp", choices=("cpp", "reference"), help="what to measure")
    made.add_argument("--toy", action="store_true", help="tiny sizes: checks this program, measures nothing")
    made.add_argument("--strict", action="store_true", help="exit with 1 if a target's 'at least' is not met")
    made.add_argument("--list", action="store_true", help="name the studies and shapes")
    made.add_argument("--show", type=Path, metavar="PATH", help="print the report of an earlier run's JSON")
    made.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return made


def thread_counts(made: argparse.ArgumentParser, args: argparse.Namespace) -> list[int]:
    """``--threads`` as numbers."""
    try:
        counts = [int(n) for n in (args.threads or ("1" if args.quick else "1,2")).split(",")]
    except ValueError:
        made.error(f"--threads: expected integers such as 1,2, got {args.threads!r}")
    if min(counts) < 1:
        made.error(f"--threads: expected integers >= 1, got {counts}")
    return counts


def settings_of(args: argparse.Namespace, seconds: tuple[float, float], min_rounds: tuple[int, int], **more) -> Settings:
    """The settings that the options ask for; pairs are the defaults without and with ``--quick``."""
    asked = seconds[args.quick] if args.seconds is None else args.seconds
    return Settings(backend=args.backend, seconds=asked, min_rounds=min_rounds[args.quick], quick=args.quick, toy=args.toy, **more)


def finish(document: dict, text: str, red: bool, args: argparse.Namespace) -> int:
    """Print the report and write the JSON; the exit status: 1 if something was wrong or, with ``--strict``, a target was missed."""
    print(text)
    if args.json:
        results.write_json(document, args.json)
    return int(red or (args.strict and any(m["verdict"] == "NOT met" for t in document["targets"] for m in t["measured"].values())))
