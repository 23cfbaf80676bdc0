"""How a study runs in a fresh process."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import miras_kernels

from ..common.processes import ROOT, Lost, Worker
from .cases import Settings

#: keeps freed outputs in the process: otherwise page faults, a third of a backward's time, hide the arithmetic
MALLOC = "glibc.malloc.trim_threshold=1073741824:glibc.malloc.mmap_threshold=1073741824"


def environment(threads: int, *, root: Path = ROOT, malloc: bool = True, capability: str | None = None) -> dict[str, str]:
    """The environment of a measuring process, which imports the package of the source tree ``root``."""
    env = dict(os.environ, OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads), PYTHONUNBUFFERED="1")
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root / "python"), env.get("PYTHONPATH")]))
    env |= {"GLIBC_TUNABLES": MALLOC} if malloc else {}
    return env | ({} if capability is None else {"MIRAS_CPU_CAPABILITY": capability})


def task(study: Callable) -> Callable:
    """A study as a measuring process does it: with so many threads, and a RuntimeError where the package does not come from ``root``."""

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
