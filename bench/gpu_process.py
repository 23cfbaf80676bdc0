"""The processes of bench/gpu.py: what they see, and how to talk to one that may hang or die.

A kernel that was compiled wrongly can loop for ever or poison its process' CUDA context. So nothing on the device happens in
the program's own process: a :class:`Worker` does items, one after the other, and tells what it is doing; when it dies or
takes too long, the item it was at is answered with that fact and the next item gets a fresh process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from gpu_plan import Settings
from harness import ROOT

#: how a worker's messages begin: "@name {json}"
MARK = "@"

#: a child leads a group, so that it can be ended with its own children, but stays in our session: it ends with that
OWN_GROUP = {"process_group": 0} if sys.version_info >= (3, 11) else {"start_new_session": True}


# -------------------------------------------------------------------------------------------------------- environment


def site(folder: Path) -> Path:
    """A folder for PYTHONPATH that has the package as an installation would, kernels included; nothing is installed."""
    package = folder / "site" / "miras_kernels"
    package.mkdir(parents=True)
    for source in (ROOT / "python" / "miras_kernels").iterdir():
        if source.name not in ("__pycache__", "kernels"):  # an editable installation may have them there
            (package / source.name).symlink_to(source)
    (package / "kernels").symlink_to(ROOT / "kernels")
    return package.parent


def install(wheels: Path, folder: Path) -> tuple[Path, str | None]:
    """Unpack the wheels of a folder, without a network: where they are, and what went wrong."""
    target = folder / "wheels"
    files = sorted(str(path) for path in wheels.glob("*.whl"))
    if not files:
        return target, f"no wheels in {wheels}"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--target"]
    status, output = limited([*pip, str(target), *files], dict(os.environ), 180)
    return target, None if status == 0 else f"pip could not install the wheels: {last_line(output)}"


def find_ptxas(asked: str | None, wheels: Path | None) -> str | None:
    """``--ptxas``: a path, or "wheels" for the one that came in a wheel."""
    if asked != "wheels":
        return asked
    found = sorted(wheels.rglob("bin/ptxas")) if wheels else []
    return str(found[0]) if found else None


def environment(settings: Settings, paths: Sequence[Path], ptxas: str | None) -> dict[str, str]:
    """The environment of every worker."""
    env = dict(os.environ, PYTHONUNBUFFERED="1", PYTHONDONTWRITEBYTECODE="1")
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [*map(str, paths), env.get("PYTHONPATH")]))
    if settings.device == "cpu":
        env["TRITON_INTERPRET"] = "1"
        env["OMP_NUM_THREADS"] = "1"
    if ptxas:
        env["TRITON_PTXAS_PATH"] = env["TRITON_PTXAS_BLACKWELL_PATH"] = ptxas
    return env


def last_line(text: str) -> str:
    """What a program said last, short enough for a note."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def limited(command: Sequence[str], env: dict[str, str], seconds: float, cwd: Path = ROOT) -> tuple[int | None, str]:
    """Run a program: its exit status (None: it took too long and was ended, with all that it had started) and its output."""
    process = subprocess.Popen(
        command, env=env, cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", **OWN_GROUP,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=max(1.0, seconds))
    except subprocess.TimeoutExpired:
        _end(process)
        output, _ = process.communicate()
        return None, output or ""
    return process.returncode, output


def _end(process: subprocess.Popen) -> None:
    """End a process that we started, with its children (compilers, say)."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


# ------------------------------------------------------------------------------------------------------------ worker


@dataclasses.dataclass
class Answer:
    """What became of an item.

    Attributes:
        results: as many as it gave before it ended.
        error: why there are no more, or None if it was done.
        doing: what it was at when it failed.
        fate: "done", "failed" (an exception), "crashed" (the process died or its CUDA context is unusable) or "late".
    """

    results: list[dict] = dataclasses.field(default_factory=list)
    error: str | None = None
    doing: str = ""
    fate: str = "done"


class Worker:
    """A process that does items. It starts when it is needed, and again after it has died."""

    #: for Python, torch, Triton and the device to get ready
    START_SECONDS = 90.0

    def __init__(self, settings: Settings, env: dict[str, str]):
        self.settings, self.env = settings, env
        self.process: subprocess.Popen | None = None
        self._lines: queue.Queue = queue.Queue()

    def ask(self, item: dict, seconds: float) -> Answer:
        """Do an item within so many seconds; the start of a fresh process is not counted."""
        answer = Answer()
        if self.process is None:
            self._start()
            if self._next(self.START_SECONDS)[0] != "ready":
                return self._gone(answer, "crashed", "a worker could not start")
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps({"limit": seconds, **item}), file=self.process.stdin, flush=True)
        end = time.monotonic() + seconds
        while True:
            name, value = self._next(end - time.monotonic())
            if name == "result":
                answer.results.append(value)
            elif name == "doing":
                answer.doing = value
            elif name == "failed":
                answer.error, answer.fate = value, "failed"
            elif name == "done":
                return answer
            elif name == "poisoned":
                return self._gone(answer, "crashed", value)
            elif name == "late":
                return self._gone(answer, "late", f"no answer within {seconds:.0f} s")
            elif name == "ended":
                return self._gone(answer, "crashed", "")

    def close(self) -> None:
        if self.process is not None:
            _end(self.process)
            self._forget()

    def _start(self) -> None:
        self._errors = tempfile.TemporaryFile(mode="w+", errors="replace")  # noqa: SIM115  closed by _forget
        command = [sys.executable, str(Path(__file__).with_name("gpu.py")), "--worker", json.dumps(dataclasses.asdict(self.settings))]
        self.process = subprocess.Popen(
            command, env=self.env, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
            errors="replace", **OWN_GROUP,
        )  # fmt: skip
        self._lines = queue.Queue()
        threading.Thread(target=_read, args=(self.process.stdout, self._lines), daemon=True).start()

    def _next(self, seconds: float) -> tuple[str, object]:
        try:
            return self._lines.get(timeout=max(0.0, seconds))
        except queue.Empty:
            return "late", None

    def _gone(self, answer: Answer, fate: str, error: str) -> Answer:
        """The process is of no use any more: end it, and say why."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(0.0 if error else 5.0)  # its pipe closes a moment before it is gone
        exited = self.process.poll()
        _end(self.process)
        said = self._said()
        self._forget()
        if not error:
            error = f"the process ended with status {exited}" + (f": {said}" if said else "")
        answer.error, answer.fate = error, fate
        return answer

    def _said(self) -> str:
        self._errors.seek(0)
        return last_line(self._errors.read()[-4000:])

    def _forget(self) -> None:
        self.process = None
        self._errors.close()


def _read(pipe, lines: queue.Queue) -> None:
    """A worker's messages into a queue; whatever else it prints is not ours."""
    with pipe:
        for line in pipe:
            name, _, text = line.partition(" ")
            if name.startswith(MARK):
                with contextlib.suppress(ValueError):
                    lines.put((name[len(MARK) :], json.loads(text)))
    lines.put(("ended", None))


def spread(items: Sequence[dict], workers: Sequence[Worker], seconds: float, end: float) -> Iterator[tuple[dict, Answer | None]]:
    """Items with their answers as they come, done by several workers at once; None for those that time did not allow.

    Args:
        seconds: for one item.
        end: time.time() after which no item is begun, and at which those under way are ended.
    """
    waiting: queue.SimpleQueue = queue.SimpleQueue()
    answers: queue.SimpleQueue = queue.SimpleQueue()
    for item in items:
        waiting.put(item)

    def work(worker: Worker) -> None:
        while True:
            try:
                item = waiting.get_nowait()
            except queue.Empty:
                return
            left = end - time.time()
            try:
                answers.put((item, worker.ask(item, min(seconds, left)) if left > 1 else None))
            except Exception as error:  # whatever happens to one item, the reader waits for all of them
                answers.put((item, Answer(error=f"{type(error).__name__}: {error}", fate="failed")))

    threads = [threading.Thread(target=work, args=(worker,), daemon=True) for worker in workers[: len(items)]]
    for thread in threads:
        thread.start()
    for _ in items:
        yield answers.get()
    for thread in threads:
        thread.join()
