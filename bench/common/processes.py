"""Measuring processes: they take requests on stdin, one JSON object per line, and answer with marked lines on stdout."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

#: how a line of an answer begins; all other output is not ours
MARK = "@answer "


class Lost(RuntimeError):
    """A process that ended, or was ended because it took too long; ``results`` are those that it gave before."""

    def __init__(self, reason: str, results: list):
        super().__init__(reason)
        self.results = results


def serve(tasks: dict[str, Callable[..., Iterable]]) -> None:
    """Answer requests ``{"task": name, **arguments}`` until stdin is closed. An exception ends the process."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints must not look like an answer

    def say(kind: str, value: object = None) -> None:
        print(MARK + json.dumps([kind, value]), file=answers, flush=True)

    for line in sys.stdin:
        request = json.loads(line)
        try:
            for result in tasks[request.pop("task")](**request):
                say("result", result)
        except BaseException as error:
            say("failed", first_line(error))
            raise
        say("done")


def _end_with(parent: int) -> None:
    """Do not outlive the program that started this process, not even in a call that never returns."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


class Worker:
    """A process of a module that calls :func:`serve` for ``--worker``; it starts with the first request, and anew after it was lost.
    ``prefix``: a program that runs the process."""

    def __init__(self, module: str, env: dict[str, str], prefix: Sequence[str] = ()):
        self.command = [*prefix, sys.executable, "-m", module, "--worker"]
        self.env, self.process = env, None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        self.process = subprocess.Popen(self.command, cwd=ROOT, env=self.env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                        errors="replace", start_new_session=True)  # fmt: skip

    def ask(self, request: dict, seconds: float | None = None) -> list:
        """The results of a request; ``Lost`` if the process ends, or takes longer than ``seconds``."""
        if self.process is None:
            self.start()
        process, results, reason, late = self.process, [], "", threading.Event()
        timer = threading.Timer(1e6 if seconds is None else seconds, lambda: (late.set(), os.killpg(process.pid, signal.SIGKILL)))
        timer.daemon = True
        timer.start()
        try:
            with contextlib.suppress(BrokenPipeError):
                print(json.dumps(request), file=process.stdin, flush=True)
            for line in process.stdout:
                if not line.startswith(MARK):
                    continue
                kind, value = json.loads(line[len(MARK) :])
                if kind == "done":
                    return results
                if kind == "result":
                    results.append(value)
                else:
                    reason = value
        finally:
            timer.cancel()
        status = self.close()
        raise Lost(f"no answer within {seconds:.0f} s" if late.is_set() else reason or f"the process ended with status {status}", results)

    def close(self) -> int | None:
        """End the process, at once if it does not end by itself: its exit status."""
        process, self.process = self.process, None
        if process is None:
            return None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(timeout=5)
        os.killpg(process.pid, signal.SIGKILL)  # with its children: compilers, say
        return process.wait()


def first_line(error: BaseException) -> str:
    """An error as a note."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300]}" if text else type(error).__name__
