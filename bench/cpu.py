"""The C++ kernels on this CPU: right first, then how fast, against what PyTorch offers, all in one run.

    python bench/cpu.py                        everything, markdown on stdout
    python bench/cpu.py --json out.json        and JSON; --plots FOLDER draws it
    python bench/cpu.py --quick                about a minute: one thread, no torch.compile, fewer cases
    python bench/cpu.py --only shapes,bias     some studies; --list names them
    python bench/cpu.py --base HEAD            this tree against another commit of it

This process only starts others and writes the report: every measurement has a fresh process with the same malloc settings
for all contenders. docs/benchmarks.md says how to read the numbers, bench/harness.py how they are taken.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import base
import harness
import plots
import process
import program
import scaling
import studies
from contenders import RECURRENCE_SHAPES, SHAPES, Settings, registered
from report import judge, report, summary

STUDIES = {**studies.STUDIES, **scaling.STUDIES}
#: what a measuring process can do beside the studies that may be asked for
HELPERS = {**studies.HELPERS, **scaling.HELPERS, **base.STUDIES}


# -------------------------------------------------------------------------------------------------------------- main


def jobs(only: Sequence[str], shapes: Sequence[str], threads: Sequence[int], settings: Settings) -> list[tuple[str, str, int]]:
    """``(study, case, threads)`` in order. The comparison with PyTorch runs at every thread count, the rest at the first."""
    found = []
    for study in only:
        if study == "shapes":
            found += [(study, shape, n) for n in threads for shape in shapes]
        elif study in ("checkpoint", "memory"):
            found += [(study, shape, threads[0]) for shape in shapes]
        elif study == "recurrence":
            found += [(study, shape, threads[0]) for shape in _some(shapes, RECURRENCE_SHAPES)]
        elif study == "scaling":
            axes = {"tokens": threads[:1], "heads": threads, "threads": [max(threads)] if max(threads) > 1 else []}
            for shape in _some(shapes, scaling.SCALING_SHAPES):
                found += [(study, f"{shape}, {axis}", n) for axis, counts in axes.items() for n in counts]
        elif study != "capability" or settings.backend == "cpp":
            found.append((study, shapes[0], threads[0]))
    return found


def _some(shapes: Sequence[str], preferred: Sequence[str]) -> list[str]:
    """The shapes that a study of a few has: of the preferred ones, or else the first."""
    return [shape for shape in shapes if shape in preferred] or [shapes[0]]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    summary_line = __doc__.split("\n", 1)[0]
    parser = program.cpu_parser(summary_line, tuple(STUDIES), quick="no torch.compile, fewer cases", seconds="8; 1 with --quick")
    parser.add_argument("--shapes", metavar="SHAPE,...", help=f"some of {', '.join(SHAPES)}, or of the tests' cases")
    parser.add_argument("--compile-seconds", type=float, help="torch.compile is given up after this long (default 300; 0 leaves it out)")
    parser.add_argument("--base", metavar="REF", help="instead of the studies, compare with this commit, which is built elsewhere")
    parser.add_argument("--launches", type=int, default=base.LAUNCHES, help=f"of each side, with --base (default {base.LAUNCHES})")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="draw the results there, as PNG (needs matplotlib)")
    parser.add_argument("--summary", action="store_true", help="with --show: the part that the README has")
    args = parser.parse_args(arguments)
    if args.base and args.only:
        parser.error("--base: it is a study of its own, and --only names others: expected one of the two")
    if args.launches < 1:
        parser.error(f"--launches: expected at least 1, got {args.launches}")
    if args.plots and (missing := plots.missing()):
        parser.error(f"--plots: {missing}")
    default = ("shapes", "bias", "decay") if args.quick else tuple(STUDIES)
    args.only = program.names(parser, "--only", args.only, tuple(STUDIES), default)
    known = tuple(SHAPES)
    if args.shapes and not {name.strip() for name in args.shapes.split(",")} <= set(SHAPES):
        known += tuple(registered())
    args.shapes = program.names(parser, "--shapes", args.shapes, known, tuple(SHAPES))
    args.threads = program.thread_counts(parser, args)
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and report; 1 if a parity gate was red or a measuring process failed."""
    args = parse(arguments)
    if args.worker:
        spec = process.read(args.worker)
        study = {**STUDIES, **HELPERS}[spec["study"]]
        process.tell(study(spec["case"], spec["threads"], Settings(**spec["settings"]), **spec.get("options", {})))
        return 0
    if args.show:
        document = json.loads(args.show.read_text())
        print((summary if args.summary else report)(document))
        _draw(document, args.plots)
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
    (probe,) = process.start("cpu.py", {"study": "probe", "case": "", "threads": 1, **common})
    if "error" in probe or probe["unavailable"]:
        print(f"bench: backend {args.backend!r} cannot run here: {probe.get('error') or probe['unavailable']}", file=sys.stderr)
        return 1
    with contextlib.ExitStack() as stack:
        planned, compared = jobs(args.only, args.shapes, args.threads, settings), None
        if args.base:
            try:
                compared, options = stack.enter_context(base.prepared(args.base, settings.backend))
            except base.Unusable as error:
                print(f"bench: {error}", file=sys.stderr)
                return 1
            common["options"] = {**options, "launches": 1 if args.toy else args.launches}
            planned = [("base", shape, n) for n in args.threads for shape in args.shapes]
        results = []
        for i, (study, case, threads) in enumerate(planned, 1):
            print(f"[{i}/{len(planned)}] {study} {case}, {threads} threads", file=sys.stderr, flush=True)
            results += process.start("cpu.py", {"study": study, "case": case, "threads": threads, **common})
    avx512 = bool(probe["capability"]) and "avx512" in probe["capability"]["possible"]
    document = {
        "program": "bench/cpu.py", "date": harness.today(), **harness.commit(), "machine": harness.machine(),
        "versions": probe["versions"], "capability": probe["capability"], "settings": dataclasses.asdict(settings),
        "malloc": harness.MALLOC, "threads": args.threads, "base": compared, "results": results,
        "targets": [] if args.toy or args.base else judge(results, args.threads, avx512),
    }  # fmt: skip
    print(report(document))
    if args.json:
        program.write_json(document, args.json)
    _draw(document, args.plots)
    red = any("error" in r or not all(gate and gate.get("ok") for gate in r["parity"].values()) for r in results)
    return program.status(document, red, args.strict)


def _draw(document: dict, folder: Path | None) -> None:
    for path in plots.draw(document, folder) if folder else ():
        print(f"drew {path}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
