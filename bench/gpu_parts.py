"""The parts of bench/gpu.py: what each asks of the workers, and what it makes of their answers."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import gpu_peers
from gpu_plan import (
    BOTH,
    COMPILED,
    COMPILED_AT,
    DECODING,
    DIRECTIONS,
    EAGER,
    MLP_TARGET,
    OURS,
    RECURRENCE_SHAPES,
    SHAPES,
    TARGET,
    WARMED,
    Settings,
    concerns,
    contenders_at,
    few_at,
    recurrences,
)
from gpu_process import Answer, Worker, last_line, limited, spread
from gpu_verdicts import LATE, deny, pardoned, read_sanitizer, refused, settle, verdict
from harness import ROOT

#: seconds that a measurement needs at least to be worth its start
LEAST = 6.0


@dataclasses.dataclass
class Run:
    """One run of the program."""

    settings: Settings
    env: dict[str, str]
    shapes: tuple[str, ...]
    jobs: int
    document: dict
    worker: Worker

    def pool(self) -> list[Worker]:
        """Fresh workers that share the device: for what is right or wrong, not fast or slow."""
        return [Worker(self.settings, self.env) for _ in range(self.jobs)]

    def ask(self, item: dict, end: float, most: float = 300.0) -> Answer | None:
        """An answer of the one worker that has the device to itself; None if there is no time for it."""
        left = end - time.time()
        return self.worker.ask(item, min(most, left)) if left > LEAST else None

    @property
    def kernels(self) -> dict[str, list[str]]:
        return self.document.get("environment", {}).get("configs", {})


def note(text: str) -> None:
    print(f"  {text}", file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------------- environment


SMI_FIELDS = ("name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit", "power.draw",
              "temperature.gpu", "utilization.gpu", "memory.used", "memory.total")  # fmt: skip


def environment(run: Run, end: float) -> dict:
    answer = run.worker.ask({"task": "environment"}, 60.0)  # whatever the time: the rest refers to it
    if not answer.results:
        return {"error": answer.error}
    return {**answer.results[0], "smi": _smi() if run.settings.device == "cuda" else "needs a GPU"}


def _smi() -> dict | str:
    """The card as it is found: driver, clocks, power. It is asked, never told."""
    if shutil.which("nvidia-smi") is None:
        return "nvidia-smi not found"
    status, output = limited(["nvidia-smi", "--query-gpu=" + ",".join(SMI_FIELDS), "--format=csv,noheader", "--id=0"], dict(os.environ), 20)
    if status != 0:
        return f"nvidia-smi did not answer: {last_line(output)}"
    return dict(zip(SMI_FIELDS, (value.strip() for value in last_line(output).split(",")), strict=False))


# ------------------------------------------------------------------------------------------------------------- tests


def tests(run: Run, end: float) -> dict:
    path = ROOT / "tests" / "test_triton.py"
    if not path.exists():
        return {"status": "missing", "notes": [f"{path.name} is not there"]}
    if end - time.time() < LEAST:
        return {"status": "left out", "notes": [LATE]}
    command = [sys.executable, "-m", "pytest", str(path), "-q", "-p", "no:cacheprovider", "--no-header", "-m", "not slow", "-rfE"]
    if run.settings.toy:
        command.append("--collect-only")
    elif importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(run.jobs)]
    status, output = limited(command, run.env, end - time.time())
    words = r"(\d+) (passed|failed|errors?|skipped|xfailed|xpassed|tests? collected)"
    counts = {what: int(n) for n, what in re.findall(words, last_line(output))}
    found = {"status": "late" if status is None else "ok" if status == 0 else "failed", "counts": counts, "last_line": last_line(output)}
    failures = [line for line in output.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    return {**found, "failures": failures[:60], "tail": "" if status == 0 else output[-4000:]}


# ------------------------------------------------------------------------------------------------------------ parity


def parity(run: Run, end: float) -> dict:
    """Every configuration; beside them the kernels' own choices, to tell a wrong configuration from a wrong call."""
    if not run.kernels:
        return {"results": [], "deny": [], "notes": [f"no kernels: {run.document.get('environment', {}).get('unavailable')}"]}
    width = max(len(labels) for labels in run.kernels.values())
    turns = [(name, labels[i]) for i in range(width) for name, labels in run.kernels.items() if i < len(labels)]
    items = [{"task": "parity", "kernel": name, "label": label} for name, label in [(None, None), *turns]]
    pool, results = run.pool(), []
    try:
        for item, answer in spread(items, pool, 120.0, end):
            result = {"kernel": item["kernel"], "label": item["label"], **verdict(answer)}
            if result["status"] not in ("ok", "unused"):
                note(f"{item['kernel']} {item['label']}: {result['status']} {result.get('error') or ''}")
            results.append(result)
    finally:
        for worker in pool:
            worker.close()
    results.sort(key=lambda r: (list(run.kernels).index(r["kernel"]) if r["kernel"] else -1, r["label"] or ""))
    settle(results)
    here = run.document["environment"]
    return {"results": results, "deny": deny(results, here), "notes": refused(results) + pardoned(results, here)}


# --------------------------------------------------------------------------------------------------------- sanitizer


def sanitizer(run: Run, end: float) -> dict:
    if run.settings.device == "cpu":
        return {"results": [], "notes": ["needs a GPU"]}
    tool = find_sanitizer(run.env)
    if tool is None:
        return {"results": [], "notes": ["compute-sanitizer not found"]}
    every = [(memory, []) for memory in ("linear", "mlp")] + [("linear" if concerns(k, "linear") else "mlp", [k]) for k in run.kernels]
    checks = [(check, memory, kernels) for memory, kernels in every for check in ("memcheck", "racecheck")]
    results: list[dict] = []
    waiting = iter(checks)
    lock = threading.Lock()

    def work() -> None:
        while True:
            with lock:
                item = next(waiting, None)
            if item is None:
                return
            check, memory, kernels = item
            results.append({"tool": check, "memory": memory, "kernels": kernels, **_sanitize(tool, *item, run, end)})

    threads = [threading.Thread(target=work) for _ in range(min(4, run.jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    order = lambda r: checks.index((r["tool"], r["memory"], r["kernels"]))
    return {"results": sorted(results, key=order), "notes": [], "program": tool}


def find_sanitizer(env: dict[str, str]) -> str | None:
    homes = [env[name] for name in ("CUDA_HOME", "CUDA_PATH") if env.get(name)] + ["/usr/local/cuda"]
    folders = [env.get("PATH", ""), *(str(Path(home) / "bin") for home in homes)]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


def _sanitize(tool: str, check: str, memory: str, kernels: list[str], run: Run, end: float) -> dict:
    left = end - time.time()
    if left < 2 * LEAST:
        return {"status": "left out", "error": LATE}
    program = [sys.executable, str(ROOT / "bench" / "gpu.py"), "--worker", json.dumps(dataclasses.asdict(run.settings)),
               "--once", json.dumps({"task": "toy", "memory": memory, "kernels": kernels})]  # fmt: skip
    env = {**run.env, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # so that the end of a tensor is the end of an allocation
    status, output = limited([tool, "--tool", check, "--error-exitcode", "99", *program], env, min(left, 180.0))
    return read_sanitizer(status, output)


# ---------------------------------------------------------------------------------------------------------- ceilings


def ceilings(run: Run, end: float) -> dict:
    answer = run.ask({"task": "ceilings"}, end, 60.0)
    if answer is None or not answer.results:
        return {"notes": [answer.error if answer else LATE]}
    return answer.results[0]


# ------------------------------------------------------------------------------------------------------------- bench


def bench(run: Run, end: float) -> dict:
    """The linear memory."""
    return {"first": _first(run, end), **_times(run, end, "linear")}


def mlp(run: Run, end: float) -> dict:
    """The MLP memory."""
    found = _times(run, end, "mlp")
    if run.settings.compile_seconds:
        others = [shape for shape in run.shapes if SHAPES[shape].hidden and shape not in COMPILED_AT["mlp"]]
        found["left_out"] += [f"{shape}, {COMPILED}: it unrolls {_chunks(shape)} chunks, which takes minutes" for shape in others]
    return found


def _chunks(shape: str) -> int:
    return -(-SHAPES[shape].tokens // SHAPES[shape].chunk_size)


def _times(run: Run, end: float, memory: str) -> dict:
    """Times at every shape of a memory."""
    shapes = [shape for shape in run.shapes if SHAPES[shape].memory == memory]
    ours = [(shape, name) for shape in shapes if shape in WARMED for name in SHAPES[shape].ours]
    found = {"warm": _warm(run, end, ours), "results": [], "left_out": []}
    for item in _bench_items(run, memory, shapes):
        _measure(run, item, end, found)
    return found


def _bench_items(run: Run, memory: str, shapes: list[str]) -> Iterator[dict]:
    """The target row, then the other shapes, then torch.compile, whose first call may take a minute."""
    for shape in shapes:
        who = contenders_at(shape, gpu_peers.of_memory(memory), gpu_peers.few(memory))
        for direction in reversed(DIRECTIONS):
            yield {"task": "bench", "shape": shape, "direction": direction, "contenders": who}
    if run.settings.compile_seconds:
        for shape in (shape for shape in COMPILED_AT[memory] if shape in shapes):
            for direction in DIRECTIONS:
                yield {"task": "bench", "shape": shape, "direction": direction, "contenders": [SHAPES[shape].base, EAGER, COMPILED]}


def recurrence(run: Run, end: float) -> dict:
    """Retention gates, momentum and channel-wise gates against the plain recurrence."""
    shapes = [shape for shape in RECURRENCE_SHAPES if shape in run.shapes]
    who = {shape: recurrences(SHAPES[shape].memory) for shape in shapes}
    found = {"warm": _warm(run, end, [(shape, name) for shape in shapes for name in who[shape]]), "results": [], "left_out": []}
    for shape in shapes:
        _measure(run, {"task": "bench", "shape": shape, "direction": BOTH, "contenders": list(who[shape])}, end, found)
    return found


def _measure(run: Run, item: dict, end: float, found: dict, retries: int = 4) -> None:
    """Do an item, without those who made the device unusable the last time."""
    exclude: list[str] = []
    what = f"{item['shape']} {item['direction']}"
    for _ in range(retries):
        note(f"{what}{', without ' + ', '.join(exclude) if exclude else ''}")
        answer = run.ask({**item, "exclude": exclude}, end)
        if answer is None:
            found["left_out"].append(f"{what} ({', '.join(item['contenders'])}): {LATE}")
            return
        found["results"] += answer.results
        if answer.results or answer.fate == "failed" or answer.doing not in item["contenders"]:
            break
        exclude = [*exclude, answer.doing]
    if answer.error:
        found["left_out"].append(f"{what}, {answer.doing}: {answer.error}")


def _first(run: Run, end: float) -> dict:
    """The first call ever: a fresh process, and nothing compiled before."""
    left = end - time.time()
    if left < LEAST:
        return {"error": LATE}
    with tempfile.TemporaryDirectory() as folder:
        worker = Worker(run.settings, {**run.env, "TRITON_CACHE_DIR": folder})
        try:
            answer = worker.ask({"task": "first", "shape": TARGET, "biases": list(OURS[:2])}, min(60.0, left))
        finally:
            worker.close()
    return answer.results[0] if answer.results else {"error": answer.error}


def _warm(run: Run, end: float, ours: list[tuple[str, str]]) -> dict:
    """Compile, with all processors, what these ``(shape, contender)`` of ours need, and the peers that tune at the target row, before
    times are taken."""
    if run.settings.device == "cpu" or not ours:
        return {"notes": ["needs a GPU"] if run.settings.device == "cpu" else []}
    items = [{"shape": shape, "contender": name, "index": 0, "count": 1} for shape, name in ours]
    tuners = [name for name, peer in gpu_peers.PEERS.items() if peer.tunes and (TARGET, OURS[0]) in ours]
    items += [{"shape": TARGET, "contender": name, "index": i, "count": run.jobs} for name in tuners for i in range(run.jobs)]
    began, pool, notes = time.time(), run.pool(), []
    try:
        every = [{"task": "warm", **item} for item in items]
        for item, answer in spread(every, pool, 90.0, time.time() + 0.35 * (end - time.time())):
            if answer is None or answer.error:
                notes.append(f"{item['shape']} {item['contender']}: compiling it before: {answer.error if answer else LATE}")
    finally:
        for worker in pool:
            worker.close()
    return {"seconds": time.time() - began, "notes": sorted(set(notes))}


# ------------------------------------------------------------------------------------------------------------ decode


def decode(run: Run, end: float) -> dict:
    """Of a dry run one size of each memory."""
    found: dict = {"results": [], "left_out": []}
    for shape in list(DECODING)[: 2 if run.settings.toy else None]:
        note(f"{shape} decode")
        answer = run.ask({"task": "decode", "shape": shape}, end, 120.0)
        found["results"] += answer.results if answer else []
        if answer is None or answer.error:
            found["left_out"].append(f"{shape} decode: {answer.error if answer else LATE}")
    return found


# ------------------------------------------------------------------------------------------------------------ memory


def memory(run: Run, end: float) -> dict:
    found: dict = {"results": [], "left_out": []}
    for shape in sorted(run.shapes, key=lambda shape: shape not in (TARGET, MLP_TARGET)):
        who = few_at(shape, gpu_peers.few(SHAPES[shape].memory))
        for direction in reversed(DIRECTIONS):
            _measure(run, {"task": "memory", "shape": shape, "direction": direction, "contenders": who}, end, found)
    return found


# ------------------------------------------------------------------------------------------------------------ tuning


def tuning(run: Run, end: float) -> dict:
    found: dict = {"results": [], "left_out": []}
    wrong = {(row[3], row[4]) for row in run.document.get("parity", {}).get("deny", [])}
    some = slice(1 if run.settings.toy else None), slice(3 if run.settings.toy else None)  # what a dry run has time for
    for shape in run.shapes[some[0]]:
        for kernel, labels in [kept for kept in run.kernels.items() if concerns(kept[0], SHAPES[shape].memory)][some[1]]:
            skip = [label for label in labels if (kernel, label) in wrong]
            for _ in range(4):
                answer = run.ask({"task": "tuning", "shape": shape, "kernel": kernel, "skip": skip}, end, 90.0)
                if answer is None or answer.results or answer.doing not in labels or answer.doing in skip:
                    break
                skip = [*skip, answer.doing]
            found["results"] += answer.results if answer else []
            if answer is None or answer.error:
                found["left_out"].append(f"{shape} {kernel}: {answer.error if answer else LATE}")
    return found


DO: dict[str, Callable[[Run, float], dict]] = {
    "environment": environment, "tests": tests, "parity": parity, "sanitizer": sanitizer, "ceilings": ceilings, "bench": bench,
    "mlp": mlp, "recurrence": recurrence, "decode": decode, "memory": memory, "tuning": tuning,
}  # fmt: skip
__all__ = ["BOTH", "DO", "Run"]
