"""The Triton kernels on this GPU: right first, then how fast, against PyTorch and other libraries, all in one run.

    python bench/gpu.py                          everything within nine minutes; JSON in bench/out/gpu.json, markdown on stdout
    python bench/gpu.py --only parity,bench      some parts; --list names them
    python bench/gpu.py --only bench --merge A   and the other parts from an earlier run's JSON
    python bench/gpu.py --wheels DIR             with other libraries, from wheels in a folder; nothing is fetched
    python bench/gpu.py --dry-run                the same plan on toy sizes in Triton's interpreter, without a GPU

This process only starts others and writes the report: whatever touches the device runs in a worker that may hang or die. What
the time does not allow is left out and said so; results are written after every part. bench/README.md tells how to read them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import gpu_parts
import gpu_peers
import gpu_process
import harness
import program
from gpu_plan import MLP_SMALLEST, MLP_TARGET, PARTS, SHAPES, SMALLEST, TARGET, Budget, Settings
from gpu_report import is_red, judge, report, summary

DEFAULT_JSON = harness.ROOT / "bench" / "out" / "gpu.json"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--json", type=Path, default=DEFAULT_JSON, metavar="PATH", help="where the results go (default bench/out/gpu.json)")
    parser.add_argument("--only", metavar="PART,...", help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--shapes", metavar="SHAPE,...", help=f"some of {', '.join(SHAPES)}")
    parser.add_argument("--minutes", type=float, default=9.0, help="of wall clock for everything (default 9)")
    parser.add_argument("--seconds", type=float, default=4.0, help="per interleaved measurement (default 4)")
    parser.add_argument("--compile-seconds", type=float, default=60.0, help="torch.compile is given up after this long (0 leaves it out)")
    parser.add_argument("--jobs", type=int, default=default_jobs(), help="processes that check configurations at the same time")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="wheels to unpack for this run alone")
    parser.add_argument("--ptxas", metavar="PATH", help='the assembler that Triton shall use; "wheels": the one in --wheels')
    parser.add_argument("--merge", type=Path, metavar="PATH", help="take the parts that do not run now from an earlier run's JSON")
    parser.add_argument("--backend", default="triton", choices=("triton", "reference"), help="what to measure")
    parser.add_argument("--dry-run", action="store_true", help="toy sizes on the CPU: checks this program, measures nothing")
    parser.add_argument("--list", action="store_true", help="name the parts, shapes and peers")
    parser.add_argument("--show", type=Path, metavar="PATH", help="print the report of an earlier run's JSON")
    parser.add_argument("--summary", action="store_true", help="with --show: the part that the README has")
    for hidden in ("--worker", "--once", "--plant"):
        parser.add_argument(hidden, default="", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    args.only = program.names(parser, "--only", args.only, tuple(PARTS), tuple(PARTS))
    default = (TARGET, MLP_TARGET, SMALLEST, MLP_SMALLEST) if args.dry_run else tuple(SHAPES)
    args.shapes = program.names(parser, "--shapes", args.shapes, tuple(SHAPES), default)
    if args.jobs < 1 or args.minutes <= 0:
        parser.error(f"--jobs and --minutes must be positive, got {args.jobs} and {args.minutes:g}")
    return args


def default_jobs() -> int:
    return max(1, min(8, (os.cpu_count() or 2) // 2))


def settings_of(args: argparse.Namespace) -> Settings:
    toy = {"device": "cpu", "toy": True, "seconds": 0.0, "min_rounds": 1, "compile_seconds": 0.0} if args.dry_run else {}
    given = {"backend": args.backend, "seconds": args.seconds, "compile_seconds": args.compile_seconds, "plant": args.plant}
    return Settings(**(given | toy))


def new_document(args: argparse.Namespace, settings: Settings) -> dict:
    document = {}
    if args.merge:
        document = {name: part for name, part in json.loads(args.merge.read_text()).items() if name in PARTS}
    head = {"program": "bench/gpu.py", "date": harness.today(), **harness.commit(), "settings": dataclasses.asdict(settings),
            "only": list(args.only), "minutes": args.minutes, "merged": str(args.merge.name) if args.merge else None, "notes": [],
            "took_s": {}}  # fmt: skip
    return head | document


def run_parts(args: argparse.Namespace, folder: Path) -> dict:
    """Do the parts, each within its share of the time; the document is on disk after every one."""
    settings, budget = settings_of(args), Budget(args.minutes)
    document = new_document(args, settings)
    paths, wheels = [gpu_process.site(folder)], None
    if args.wheels:
        wheels, trouble = gpu_process.install(args.wheels, folder)
        paths.append(wheels)
        document["notes"] += [trouble] if trouble else []
    ptxas = gpu_process.find_ptxas(args.ptxas, wheels)
    if args.ptxas and not (ptxas and Path(ptxas).exists()):
        document["notes"].append(f"--ptxas {args.ptxas}: not found, so Triton uses its own")
        ptxas = None
    env = gpu_process.environment(settings, paths, ptxas)
    worker = gpu_process.Worker(settings, env)
    run = gpu_parts.Run(settings, env, args.shapes, args.jobs, document, worker)
    parts = [part for part in PARTS if part in args.only or part == "environment"]
    try:
        for i, part in enumerate(parts):
            began = time.time()
            print(f"[{i + 1}/{len(parts)}] {part}, {budget.left():.0f} s left", file=sys.stderr, flush=True)
            try:
                document[part] = gpu_parts.DO[part](run, budget.part_end(part, parts[i + 1 :]))
            except Exception as error:  # a fault of this program must not cost the other parts
                document[part] = {"error": f"{type(error).__name__}: {error}"}
            document["took_s"][part] = time.time() - began
            document["targets"] = [] if settings.toy else judge(document)
            program.write_json(document, args.json)
            missing = document["environment"].get("error") or document["environment"].get("unavailable")
            if missing:
                document["environment"]["error"] = f"{settings.backend} on {settings.device} cannot run here: {missing}"
                break
    finally:
        worker.close()
    program.write_json(document, args.json)
    return document


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, measure and report; 1 if something was wrong (not if something was slow)."""
    args = parse(arguments)
    if args.worker:
        import gpu_worker

        settings = Settings(**json.loads(args.worker))
        gpu_worker.once(settings, json.loads(args.once)) if args.once else gpu_worker.serve(settings)
        return 0
    if args.list:
        names = [f"{name:12s} {text}" for name, text in PARTS.items()]
        print("\n".join([*names, "", *SHAPES, "", *(f"{name} ({peer.package})" for name, peer in gpu_peers.PEERS.items())]))
        return 0
    if args.show:
        print((summary if args.summary else report)(json.loads(args.show.read_text())))
        return 0
    with tempfile.TemporaryDirectory(prefix="miras-gpu-") as folder:
        document = run_parts(args, Path(folder))
    print(report(document))
    return int(is_red(document))


if __name__ == "__main__":
    sys.exit(main())
