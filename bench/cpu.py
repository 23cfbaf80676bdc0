"""The C++ kernels on this CPU: right first, then how fast, against what PyTorch offers, all in one run.

    python bench/cpu.py                        everything, markdown on stdout
    python bench/cpu.py --json out.json        and JSON
    python bench/cpu.py --quick                about a minute: one thread, no torch.compile, fewer cases
    python bench/cpu.py --only shapes,bias     some studies; --list names them

This process only starts others and writes the report: every measurement has a fresh process with the same malloc settings
for all contenders. bench/README.md says how to read the numbers, bench/harness.py how they are taken.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import harness
import program
from contenders import RECURRENCE_SHAPES, SHAPES, Settings
from report import judge, report, summary
from studies import HELPERS, MARK, STUDIES, start


def worker(text: str) -> None:
    """A measuring process: prints its results as marked JSON lines."""
    import torch

    spec = json.loads(text)
    torch.set_num_threads(spec["threads"])
    study = {**STUDIES, **HELPERS}[spec["study"]]
    for result in study(spec["case"], spec["threads"], Settings(**spec["settings"])):
        print(MARK + json.dumps(result), flush=True)


# -------------------------------------------------------------------------------------------------------------- main


def jobs(only: Sequence[str], shapes: Sequence[str], threads: Sequence[int], settings: Settings) -> list[tuple[str, str, int]]:
    """``(study, shape, threads)`` in order. The comparison with PyTorch runs at every thread count, the rest at the first."""
    found = []
    for study in only:
        if study == "shapes":
            found += [(study, shape, n) for n in threads for shape in shapes]
        elif study in ("checkpoint", "memory"):
            found += [(study, shape, threads[0]) for shape in shapes]
        elif study == "recurrence":
            found += [(study, shape, threads[0]) for shape in [s for s in shapes if s in RECURRENCE_SHAPES] or shapes[:1]]
        elif study != "capability" or settings.backend == "cpp":
            found.append((study, shapes[0], threads[0]))
    return found


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the results there as well")
    parser.add_argument("--quick", action="store_true", help="about a minute: one thread, no torch.compile, fewer cases")
    parser.add_argument("--only", metavar="STUDY,...", help=f"some of {', '.join(STUDIES)}")
    parser.add_argument("--shapes", metavar="SHAPE,...", help=f"some of {', '.join(SHAPES)}")
    parser.add_argument("--threads", metavar="N,...", help="thread counts (default 1,2; 1 with --quick)")
    parser.add_argument("--seconds", type=float, help="per interleaved measurement (default 8; 1 with --quick)")
    parser.add_argument("--compile-seconds", type=float, help="torch.compile is given up after this long (default 300; 0 leaves it out)")
    parser.add_argument("--backend", default="cpp", choices=("cpp", "reference"), help="what to measure")
    parser.add_argument("--toy", action="store_true", help="tiny shapes: checks this program, measures nothing")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a target's 'at least' is not met")
    parser.add_argument("--list", action="store_true", help="name the studies and shapes")
    parser.add_argument("--show", type=Path, metavar="PATH", help="print the report of an earlier run's JSON")
    parser.add_argument("--summary", action="store_true", help="with --show: the part that the README has")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    default = ("shapes", "bias", "decay") if args.quick else tuple(STUDIES)
    args.only = program.names(parser, "--only", args.only, tuple(STUDIES), default)
    args.shapes = program.names(parser, "--shapes", args.shapes, tuple(SHAPES), tuple(SHAPES))
    try:
        args.threads = [int(n) for n in (args.threads or ("1" if args.quick else "1,2")).split(",")]
    except ValueError:
        parser.error(f"--threads: expected integers such as 1,2, got {args.threads!r}")
    if min(args.threads) < 1:
        parser.error(f"--threads: expected integers >= 1, got {args.threads}")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and report; 1 if a parity gate was red or a measuring process failed."""
    args = parse(arguments)
    if args.worker:
        worker(args.worker)
        return 0
    if args.show:
        print((summary if args.summary else report)(json.loads(args.show.read_text())))
        return 0
    if args.list:
        print("\n".join([*(f"{name:12s} {study.__doc__.splitlines()[0]}" for name, study in STUDIES.items()), *SHAPES]))
        return 0
    quick = args.quick
    settings = Settings(
        backend=args.backend,
        seconds=args.seconds if args.seconds is not None else 1.0 if quick else 8.0,
        min_rounds=3 if quick else 7,
        compile_seconds=args.compile_seconds if args.compile_seconds is not None else 0.0 if quick else 300.0,
        quick=quick,
        toy=args.toy,
    )
    common = {"settings": dataclasses.asdict(settings)}
    (probe,) = start({"study": "probe", "case": "", "threads": 1, **common})
    if "error" in probe or probe["unavailable"]:
        print(f"bench: backend {args.backend!r} cannot run here: {probe.get('error') or probe['unavailable']}", file=sys.stderr)
        return 1
    results = []
    planned = jobs(args.only, args.shapes, args.threads, settings)
    for i, (study, shape, threads) in enumerate(planned, 1):
        print(f"[{i}/{len(planned)}] {study} {shape}, {threads} threads", file=sys.stderr, flush=True)
        results += start({"study": study, "case": shape, "threads": threads, **common})
    avx512 = bool(probe["capability"]) and "avx512" in probe["capability"]["possible"]
    document = {
        "program": "bench/cpu.py", "date": harness.today(), **harness.commit(), "machine": harness.machine(),
        "versions": probe["versions"], "capability": probe["capability"], "settings": dataclasses.asdict(settings),
        "malloc": harness.MALLOC, "threads": args.threads, "results": results,
        "targets": [] if args.toy else judge(results, args.threads, avx512),
    }  # fmt: skip
    print(report(document))
    if args.json:
        program.write_json(document, args.json)
    red = any("error" in r or not all(g["ok"] for g in r["parity"].values()) for r in results)
    missed = any(m["verdict"] == "NOT met" for t in document["targets"] for m in t["measured"].values())
    return int(red or (args.strict and missed))


if __name__ == "__main__":
    sys.exit(main())
