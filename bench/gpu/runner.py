"""Does the items of a plan in worker processes, until the time is over."""

from __future__ import annotations

import dataclasses
import os
import queue
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path

from ..common.processes import Lost, Worker
from .plan import Item, Settings

MODULE = "bench.gpu"
#: an item is not begun with fewer seconds left
LEAST = 6.0


class Runner:
    """Several workers at once; only one where times are taken."""

    def __init__(self, settings: Settings, env: dict[str, str], jobs: int, end: float):
        self.settings, self.env, self.end = settings, env, end
        self.workers = [Worker(MODULE, env) for _ in range(jobs)]
        self.idle: queue.LifoQueue = queue.LifoQueue()
        for worker in self.workers:
            self.idle.put(worker)

    def run(self, items: Sequence[Item], say: Callable[[Item, list[dict]], None]) -> None:
        """Do the items in order; ``say`` gets the results of each, an empty list where no time was left."""
        lock = threading.Lock()

        def do(item: Item) -> None:
            found = self.do(item)
            with lock:
                say(item, found)

        for alone, group in groupby(items, key=lambda item: item.alone):
            with ThreadPoolExecutor(1 if alone else len(self.workers)) as pool:
                list(pool.map(do, group))

    def do(self, item: Item) -> list[dict]:
        """The results of an item; tried again without those implementations with which its process was lost."""
        exclude: list[str] = []
        head = {"study": item.study, "case": item.case}
        while (left := self.end - time.time()) > LEAST:
            request = {"task": item.task, **item.arguments} | ({"exclude": exclude} if exclude else {})
            seconds, error = min(item.seconds, left), None
            if item.tool:
                return [head | self._sanitize(item.tool, request, seconds)]
            try:
                answers = self.ask(request, seconds)
            except Lost as lost:
                answers, error = lost.results, str(lost)
            found = [head | answer for answer in answers if "doing" not in answer]
            if error is None:
                return found
            doing = next((answer["doing"] for answer in reversed(answers) if "doing" in answer), "")
            if item.task not in ("times", "tuning") or not doing or doing in exclude or len(exclude) == 3:
                return [*found, head | {"status": "lost", "detail": f"{doing}: {error}".removeprefix(": ")}]
            exclude.append(doing)
        return []

    def ask(self, request: dict, seconds: float) -> list:
        """The answers of a worker that is idle."""
        worker = self.idle.get()
        try:
            return worker.ask({**request, "settings": dataclasses.asdict(self.settings)}, seconds)
        finally:
            self.idle.put(worker)

    def _sanitize(self, check: str, request: dict, seconds: float) -> dict:
        """A request under a check of compute-sanitizer."""
        tool = shutil.which("compute-sanitizer", path=os.pathsep.join([self.env.get("PATH", ""), "/usr/local/cuda/bin"]))
        if tool is None or self.settings.device == "cpu":
            return {"status": "not run", "detail": "needs a GPU" if self.settings.device == "cpu" else "compute-sanitizer not found"}
        env = {**self.env, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # so that the end of a tensor is the end of an allocation
        with tempfile.TemporaryDirectory() as folder:
            log, error, answers = Path(folder) / "log", None, []
            with Worker(MODULE, env, prefix=[tool, "--tool", check, "--log-file", str(log)]) as worker:
                try:
                    answers = worker.ask({**request, "settings": dataclasses.asdict(self.settings)}, seconds)
                except Lost as lost:
                    error = str(lost)
            found = read_sanitizer(log.read_text(errors="replace") if log.exists() else "", error)
            return found | {"detail": "; ".join([found["detail"], *(answer["detail"] for answer in answers)])}

    def close(self) -> None:
        for worker in self.workers:
            worker.close()


def read_sanitizer(log: str, error: str | None) -> dict:
    """What compute-sanitizer found."""
    summary = re.search(r"ERROR SUMMARY: (\d+) error", log)
    if summary is None:
        return {"status": "not run", "detail": error or (log.strip().splitlines() or ["no output"])[-1]}
    if int(summary[1]):
        return {"status": "wrong", "detail": f"{summary[1]} errors", "lines": log.splitlines()[:40]}
    return {"status": "ok" if error is None else "lost", "detail": error or "no errors"}
