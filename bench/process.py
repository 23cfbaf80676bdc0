"""Measuring processes: each runs one study, or serves samples on demand, and prints what it has as marked JSON lines."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from harness import Sampler, environment

#: how a line begins that is a result; everything else on stdout is somebody's chatter
MARK = "@result "


def command(program: str, spec: dict) -> list[str]:
    """How a program of this folder is started as a measuring process; ``spec`` is what :func:`read` gives it."""
    return [sys.executable, str(Path(__file__).resolve().with_name(program)), "--worker", json.dumps(spec)]


def read(text: str) -> dict:
    """What a measuring process was told; from here on it has that many threads, and it measures the package that it was meant to.

    Raises:
        RuntimeError: the package comes from elsewhere than ``spec["root"]``.
    """
    import torch

    import miras_kernels

    spec = json.loads(text)
    torch.set_num_threads(spec["threads"])
    package = Path(miras_kernels.__file__).resolve()
    if "root" in spec and not package.is_relative_to(Path(spec["root"]).resolve()):
        raise RuntimeError(f"the package of {spec['root']} was asked for, but it was imported from {package.parent}")
    return spec


def tell(results: Iterable[object]) -> None:
    """A measuring process' answers, each as soon as it is there."""
    for result in results:
        print(MARK + json.dumps(result), flush=True)


def start(program: str, spec: dict, env: dict[str, str] | None = None) -> Iterator[dict]:
    """Run one study in a fresh process and yield its results; what it cannot do becomes a result with an error."""
    env = env or environment(spec["threads"])
    process = subprocess.Popen(command(program, spec), env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    with process:
        for line in process.stdout:
            if line.startswith(MARK):
                yield json.loads(line[len(MARK) :])
    if process.returncode:
        error = f"the measuring process ended with status {process.returncode}"
        yield {"study": spec["study"], "case": spec["case"], "threads": spec["threads"], "direction": "", "parity": {},
               "error": error, "notes": [error]}  # fmt: skip


class Server:
    """A process that holds a case and, when it is asked, checks it or times calls: the study ``serve`` of cpu.py."""

    def __init__(self, spec: dict, env: dict[str, str]):
        self.process = subprocess.Popen(command("cpu.py", spec), env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has ended already
            self.process.stdin.close()
        self.process.wait(timeout=30)

    def ask(self, what: str, count: int = 1):
        """The answer to ``[what, count]``.

        Raises:
            RuntimeError: the process has ended; why is on its stderr.
        """
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps([what, count]), file=self.process.stdin, flush=True)
        for line in self.process.stdout:
            if line.startswith(MARK):
                return json.loads(line[len(MARK) :])
        raise RuntimeError(f"a measuring process ended early, with status {self.process.wait(timeout=30)}")

    def sampler(self, direction: str) -> Sampler:
        return lambda count: self.ask(direction, count)
