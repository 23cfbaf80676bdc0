"""The Triton kernels on a GPU, in two commands that together fit a quarter of an hour of device time.

    python -m bench.gpu correctness             equal bits in repeated calls, parity of every configuration, compute-sanitizer
    python -m bench.gpu times                   times at the target rows against baselines; decoding; configurations by time
    python -m bench.gpu times --smoke           the same plan with tiny sizes in Triton's interpreter, without a GPU
    python -m bench.gpu launches                host time of launches, without a GPU
    python -m bench.gpu --show FILE             the report of an earlier run's JSON

Whatever uses the device runs in a worker process that may hang or crash; then that item is reported as lost, and the next one has a fresh
process. Results are written after every item, to bench/out/gpu-COMMAND.json. bench/README.md explains the report.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ..common import results
from ..common.processes import ROOT, Lost, serve
from . import plan, report
from .plan import Item, Settings
from .runner import MODULE, Runner

COMMANDS = ("correctness", "times", "launches")


def find_kernels() -> None:
    """In a source tree that is not installed, kernels/ lies beside python/."""
    import miras_kernels

    if importlib.util.find_spec("miras_kernels.kernels") is None:
        miras_kernels.__path__.append(str(ROOT))


def work() -> None:
    """A worker process."""
    find_kernels()
    from . import correctness, decode, device, times

    def task(function: Callable) -> Callable:
        def run(settings: dict, **arguments) -> Iterator:
            yield from function(Settings(**settings), **arguments)
            device.release()

        return run

    checks = (
        correctness.repeat,
        correctness.repeat_steps,
        correctness.parity,
        correctness.parity_of,
        correctness.launch,
        correctness.launch_all,
    )
    serve({function.__name__: task(function) for function in (probe, *checks, times.times, times.tuning, decode.decode)})


def probe(settings: Settings) -> Iterator[dict]:
    """The machine, the versions, why the backend cannot run here, and what there is to check."""
    from miras_kernels import dispatch

    from . import configurations, correctness, device

    found, reason = device.describe(settings), dispatch.unavailable(settings.backend)
    if reason is None and settings.device != "cpu" and "architecture" not in found:
        reason = "there is no GPU here"
    labels = {} if reason else {name: list(rows) for name, rows in configurations.table(settings).items()}
    yield {"host": results.machine(), "device": found, "unavailable": reason, "configurations": labels,
           "versions": results.versions("torch", "triton", "miras-kernels", "fla-core", "titans-pytorch"),
           "cases": len(correctness.parity_cases(settings))}  # fmt: skip


def measure(args: argparse.Namespace) -> int:
    smoke = {"device": "cpu", "smoke": True, "seconds": 0.0, "min_rounds": 1} if args.smoke else {}
    settings, began = Settings(backend=args.backend, **smoke), time.time()
    path = args.json or ROOT / "bench" / "out" / f"gpu-{args.command}.json"
    python = os.pathsep.join(filter(None, [str(ROOT / "python"), os.environ.get("PYTHONPATH")]))  # this source tree; nothing is installed
    env = {**os.environ, "PYTHONPATH": python, **({"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"} if args.smoke else {})}
    runner = Runner(settings, env, args.jobs, began + 60 * args.minutes)
    document = {**results.heading(MODULE), "command": args.command, "minutes": args.minutes, "settings": dataclasses.asdict(settings),
                "environment": {}, "results": [], "left_out": [], "targets": []}  # fmt: skip
    items: list[Item] = []
    try:
        found = document["environment"] = runner.ask({"task": "probe"}, 90)[0]
        if found["unavailable"]:
            document["error"] = f"{settings.backend} on {settings.device} cannot run here: {found['unavailable']}"
        elif args.command == "correctness":
            items = list(plan.correctness(found["configurations"], found["cases"], settings))
        else:
            items = list(plan.times(found["configurations"], settings))
    except Lost as lost:
        document["error"] = f"the first process was lost: {lost}"
    for study in dict.fromkeys(item.study for item in items):
        mine = [item for item in items if item.study == study]
        print(f"plan: {study}: {len(mine)} items of at most {max(item.seconds for item in mine):.0f} s", file=sys.stderr)

    def say(item: Item, answers: list[dict]) -> None:
        document["results"] += [r for r in answers if item.study != "compilation" or r["status"] in report.RED]
        if not answers:
            document["left_out"].append(f"{item.study} {item.case} {item.arguments.get('direction', '')}".strip() + ": no time left")
        document["targets"] = [] if args.smoke else results.judge(report.targets(), document["results"], {"device": {}})
        document["took_s"] = time.time() - began
        results.write_json(document, path)
        states = ", ".join(dict.fromkeys(r.get("status", "done") for r in answers)) or "no time left"
        print(f"{document['took_s']:5.0f} s  {item.study} {item.case}: {states}", file=sys.stderr, flush=True)

    try:
        runner.run(items, say)
    finally:
        runner.close()
    results.write_json(document, path)
    print(report.report(document))
    return int(report.is_red(document))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__.split("\n", 1)[0])
    parser.add_argument("command", nargs="?", choices=COMMANDS, help="what to do")
    parser.add_argument("--minutes", type=float, default=6.0, help="of wall clock for everything (default 6)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="where the results go (default bench/out/gpu-COMMAND.json)")
    jobs = max(1, min(8, (os.cpu_count() or 2) // 2))
    parser.add_argument("--jobs", type=int, default=jobs, help="workers at once, where no times are taken")
    parser.add_argument("--backend", default="triton", choices=("triton", "reference"), help="what to measure")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on the CPU: checks this program, measures nothing")
    parser.add_argument("--show", type=Path, metavar="PATH", help="print the report of an earlier run's JSON")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if not (args.command or args.show or args.worker):
        parser.error(f"expected one of {', '.join(COMMANDS)}")
    if args.jobs < 1 or args.minutes <= 0:
        parser.error(f"--jobs and --minutes must be positive, got {args.jobs} and {args.minutes:g}")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Check or measure, and report; 1 if something was wrong (not if something was slow)."""
    args = parse(arguments)
    if args.worker:
        work()
    elif args.show:
        print(report.report(json.loads(args.show.read_text())))
    elif args.command == "launches":
        find_kernels()
        from . import launches

        return launches.report()
    else:
        return measure(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
