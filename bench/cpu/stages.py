"""``--stages``: where the time of a chunk goes, in a build of this tree with counters (``MIRAS_PROFILE=1``). One thread."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

import torch

from miras_kernels import dispatch

from ..common.implementations import BOTH, kernel
from ..common.processes import ROOT
from ..common.results import gate, table
from .base import Unusable
from .cases import Settings, make_case, parity
from .measuring import environment
from .watch import multiply_adds

FIELDS = ("count", "ticks", "operations", "bytes")


def prepared() -> dict[str, str]:
    """The package and its C++ kernels, built with counters beside this tree: the environment of a process that imports them."""
    folder = ROOT / "build" / "profile"
    print("building the C++ kernels with counters (some minutes the first time)", file=sys.stderr, flush=True)
    env = dict(os.environ, MIRAS_PROFILE="1", MIRAS_REQUIRE_CPP="1", MIRAS_CUDA="0")
    command = [sys.executable, "setup.py", "-q", "build", "--build-lib", str(folder / "python")]
    done = subprocess.run(command, check=False, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        raise Unusable("--stages: building failed:\n" + "\n".join((done.stdout + done.stderr).splitlines()[-20:]))
    return environment(1, root=folder)


def study_stages(shape: str, threads: int, settings: Settings) -> Iterator[dict]:
    """The least ticks of every stage over the rounds, and those of the multiply-adds of the same rounds."""
    extension = dispatch.BACKENDS["cpp"].extension
    case = make_case(shape, settings)
    gates = {"kernel": parity(case, "cpp")}
    result = {"study": "stages", "case": shape, "direction": BOTH, "threads": threads, "parity": gates, "notes": []}
    if not gates["kernel"]["ok"]:
        yield {**result, "notes": [f"kernel: parity is red, not timed ({gates['kernel']['worst']})"]}
        return
    run, peak, best = kernel(case.draw(torch.float32), "cpp", BOTH), multiply_adds(), {}
    run(), peak(), extension.take_stages()
    end, rounds = time.perf_counter() + settings.seconds, 0
    while rounds < settings.min_rounds or time.perf_counter() < end:
        run(), peak()
        for part, stage, *values in extension.take_stages():
            new = dict(zip(FIELDS, values, strict=True))
            best[part, stage] = min(new, best.get((part, stage), new), key=lambda x: x["ticks"])
        rounds += 1
    (yardstick,) = (best.pop(key) for key in [key for key in best if key[0] == "peak"])
    stages = [{"pass": part, "stage": stage, **values} for (part, stage), values in best.items()]
    yield {**result, "rounds": rounds, "stages": stages, "peak_per_tick": yardstick["operations"] / yardstick["ticks"]}


def section(results: Sequence[dict]) -> str:
    """A table for every shape; the rows of a pass, then its sum."""
    texts = []
    for r in results:
        rows, total = [], sum(x["ticks"] for x in r.get("stages", ()))
        for part in dict.fromkeys(x["pass"] for x in r.get("stages", ())):
            stages = [x for x in r["stages"] if x["pass"] == part]
            chunks = statistics.mode(x["count"] for x in stages)  # some stages come twice in a chunk, or not in each
            whole = {"stage": "all of it", **{field: sum(x[field] for x in stages) for field in FIELDS}}
            for x in [*stages, whole]:
                speed = x["operations"] / x["ticks"]
                rows.append([part, x["stage"], f"{x['ticks'] / total:.1%}", *(f"{x[field] / chunks:.0f}" for field in FIELDS[1:]),
                             f"{x['bytes'] / x['ticks']:.1f}", f"{speed:.1f}", f"{speed / r['peak_per_tick']:.2f}"])  # fmt: skip
        header = ["pass", "stage", "of the time", "ticks", "FLOP", "bytes", "bytes/tick", "FLOP/tick", "of the peak"]
        peak = f", peak {r['peak_per_tick']:.1f} FLOP/tick, {r['rounds']} rounds" if rows else ""
        texts.append(f"{r['case']}: {gate(r['parity'].get('kernel'))}{peak}\n\n" + (table(header, rows) if rows else ""))
    return "\n\n".join(texts)


STUDIES = {"stages": study_stages}
