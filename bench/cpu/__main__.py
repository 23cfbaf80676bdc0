"""The C++ kernels on this CPU: parity first, then times against PyTorch, all in one run.

    python -m bench.cpu                        everything, markdown on stdout
    python -m bench.cpu --json out.json        and JSON; --plots FOLDER draws it
    python -m bench.cpu --quick                about a minute: one thread, no torch.compile, fewer cases
    python -m bench.cpu --only shapes,bias     some studies; --list names them
    python -m bench.cpu --base HEAD            this tree against another commit of it

This process only starts others and writes the report: every measurement has a fresh process with the same malloc settings for all
implementations. docs/benchmarks.md explains how to read the numbers.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from ..common import processes, results
from . import base, plots, program, scaling, studies
from .cases import ONE_OF_EACH, SHAPES, Settings, registered
from .report import report, summary
from .targets import judged

MODULE = "bench.cpu"
STUDIES = {**studies.STUDIES, **scaling.STUDIES}
#: tasks of a measuring process besides the studies that can be asked for
HELPERS = {**studies.HELPERS, **scaling.HELPERS, **base.STUDIES}


def jobs(only: Sequence[str], shapes: Sequence[str], threads: Sequence[int], settings: Settings) -> list[tuple[str, str, int]]:
    """``(study, case, threads)`` in order. The comparison with PyTorch runs at every thread count, the rest at the first."""
    found = []
    pair = [shape for shape in shapes if shape in ONE_OF_EACH] or [shapes[0]]
    for study in only:
        if study == "shapes":
            found += [(study, shape, n) for n in threads for shape in shapes]
        elif study in ("checkpoint", "memory"):
            found += [(study, shape, threads[0]) for shape in shapes]
        elif study == "recurrence":
            found += [(study, shape, threads[0]) for shape in pair]
        elif study == "scaling":
            axes = {"tokens": threads[:1], "heads": threads, "threads": [max(threads)] if max(threads) > 1 else []}
            found += [(study, f"{shape}, {axis}", n) for shape in pair for axis, counts in axes.items() for n in counts]
        elif study != "capability" or settings.backend == "cpp":
            found.append((study, shapes[0], threads[0]))
    return found


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = program.parser(MODULE, __doc__.split("\n", 1)[0], tuple(STUDIES), "no torch.compile, fewer cases", "8; 1 with --quick")
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
    args.only = results.chosen(parser, "--only", args.only, tuple(STUDIES), default)
    known = tuple(SHAPES)
    if args.shapes and not {name.strip() for name in args.shapes.split(",")} <= set(SHAPES):
        known += tuple(registered())
    args.shapes = results.chosen(parser, "--shapes", args.shapes, known, tuple(SHAPES))
    args.threads = program.thread_counts(parser, args)
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and report; 1 if a parity gate was red or a measuring process failed."""
    args = parse(arguments)
    if args.worker:
        processes.serve({name: program.task(study) for name, study in {**STUDIES, **HELPERS}.items()})
        return 0
    if args.show:
        document = json.loads(args.show.read_text())
        print((summary if args.summary else report)(document))
        _draw(document, args.plots)
        return 0
    if args.list:
        print("\n".join([*(f"{name:12s} {study.__doc__.splitlines()[0]}" for name, study in STUDIES.items()), *SHAPES]))
        return 0
    compile_seconds = args.compile_seconds if args.compile_seconds is not None else 0.0 if args.quick else 300.0
    return measure(args, program.settings_of(args, seconds=(8.0, 1.0), min_rounds=(7, 3), compile_seconds=compile_seconds))


def measure(args: argparse.Namespace, settings: Settings) -> int:
    (probe,) = program.start(MODULE, program.request("probe", "", 1, settings))
    if "error" in probe or probe["unavailable"]:
        print(f"bench: backend {args.backend!r} cannot run here: {probe.get('error') or probe['unavailable']}", file=sys.stderr)
        return 1
    with contextlib.ExitStack() as stack:
        planned, compared, options = jobs(args.only, args.shapes, args.threads, settings), None, {}
        if args.base:
            try:
                compared, options = stack.enter_context(base.prepared(args.base, settings.backend))
            except base.Unusable as error:
                print(f"bench: {error}", file=sys.stderr)
                return 1
            options["launches"] = 1 if args.toy else args.launches
            planned = [("base", shape, n) for n in args.threads for shape in args.shapes]
        found = program.run(MODULE, planned, settings, **options)
    avx512 = bool(probe["capability"]) and "avx512" in probe["capability"]["possible"]
    document = {
        **results.heading(MODULE), "machine": results.machine(), "versions": probe["versions"], "capability": probe["capability"],
        "settings": dataclasses.asdict(settings), "malloc": program.MALLOC, "threads": args.threads, "base": compared, "results": found,
        "targets": [] if args.toy or args.base else judged(found, args.threads, avx512),
    }  # fmt: skip
    _draw(document, args.plots)
    red = any("error" in r or not all(gate and gate.get("ok") for gate in r["parity"].values()) for r in found)
    return program.finish(document, report(document), red, args)


def _draw(document: dict, folder: Path | None) -> None:
    for path in plots.draw(document, folder) if folder else ():
        print(f"drew {path}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
