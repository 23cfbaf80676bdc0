"""The command lines of bench.cpu and bench.cpu.decode. This process only starts others and writes the report."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from miras_kernels import dispatch

from ..common import processes, results
from . import base, measuring, plots, report, stages
from .cases import Settings, registered
from .targets import judged


@dataclasses.dataclass(frozen=True)
class Program:
    """What the two programs differ in; ``seconds`` and ``min_rounds``: without and with ``--quick``."""

    module: str
    title: str
    studies: dict[str, Callable]
    helpers: dict[str, Callable]  # tasks of a measuring process besides the studies that can be asked for
    quick: tuple[str, ...]  # studies with --quick
    shapes: tuple[str, ...]
    jobs: Callable[[Sequence[str], Sequence[str], Sequence[int], Settings], list[tuple[str, str, int]]]
    targets: Callable
    sections: tuple
    seconds: tuple[float, float]
    min_rounds: tuple[int, int]


def parse(program: Program, arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"python -m {program.module}", description=program.title)
    add, studies = parser.add_argument, ", ".join(program.studies)
    add("--json", type=Path, metavar="PATH", help="write the results there as well")
    add("--quick", action="store_true", help="one thread, short measurements, no torch.compile, fewer cases")
    add("--only", metavar="STUDY,...", help=f"some of {studies}")
    add("--shapes", metavar="SHAPE,...", help=f"some of {', '.join(program.shapes)}; for bench.cpu, also of the tests' cases")
    add("--threads", metavar="N,...", help="thread counts (default 1,2; 1 with --quick)")
    add("--seconds", type=float, help=f"per interleaved measurement (default {program.seconds[0]:g}; {program.seconds[1]:g} with --quick)")
    add("--compile-seconds", type=float, help="torch.compile is given up after this long (default 300; 0 leaves it out)")
    add("--base", metavar="REF", help="instead of the studies, compare bench.cpu's shapes with this commit, which is built elsewhere")
    add("--stages", action="store_true", help="instead of the studies, the time of every stage of a chunk, in a build with counters")
    add("--launches", type=int, default=base.LAUNCHES, help=f"of each side, with --base (default {base.LAUNCHES})")
    add("--plots", type=Path, metavar="FOLDER", help="draw the ratios of the study shapes there, as PNG (needs matplotlib)")
    add("--backend", default="cpp", choices=("cpp", "reference"), help="what to measure")
    add("--toy", action="store_true", help="tiny sizes: checks this program, measures nothing")
    add("--strict", action="store_true", help="exit with 1 if a target's 'at least' is not met")
    add("--list", action="store_true", help="name the studies and shapes")
    add("--show", type=Path, metavar="PATH", help="print the report of an earlier run's JSON")
    add("--summary", action="store_true", help="with --show: the part that the README has")
    add("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.base and (args.only or "base" not in program.helpers):
        parser.error("--base: it is a study of its own in bench.cpu, without --only")
    if args.stages and (args.only or args.base or args.backend != "cpp" or "stages" not in program.helpers):
        parser.error("--stages: it is a study of its own in bench.cpu, of the C++ kernels, without --only and --base")
    if args.launches < 1:
        parser.error(f"--launches: expected at least 1, got {args.launches}")
    if args.plots and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plots: needs matplotlib (pip install matplotlib, or the extra 'demo')")
    args.only = _names(parser, "--only", args.only, tuple(program.studies), program.quick if args.quick else tuple(program.studies))
    known = program.shapes + (tuple(registered()) if args.shapes and "base" in program.helpers else ())
    args.shapes = _names(parser, "--shapes", args.shapes, known, program.shapes)
    threads = args.threads or ("1" if args.quick else "1,2")
    if not all(n.strip().isdecimal() and int(n) for n in threads.split(",")):
        parser.error(f"--threads: expected integers >= 1 such as 1,2, got {threads!r}")
    args.threads = [int(n) for n in threads.split(",")]
    return args


def _names(parser: argparse.ArgumentParser, option: str, text: str | None, known: Sequence[str], default: Sequence[str]) -> tuple[str, ...]:
    """A comma-separated list of names that are known, or the default where nothing was given."""
    names = tuple(default) if text is None else tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in known:
            parser.error(f"{option}: unknown {name!r}: expected some of {', '.join(known)}")
    return names


def main(program: Program, arguments: Sequence[str] | None = None) -> int:
    """Measure and report; 1 if a parity gate was red or a measuring process failed."""
    args = parse(program, arguments)
    if args.worker:
        processes.serve({name: measuring.task(study) for name, study in {**program.studies, **program.helpers}.items()})
    elif args.list:
        print("\n".join([*(f"{name:12s} {study.__doc__.splitlines()[0]}" for name, study in program.studies.items()), *program.shapes]))
    elif args.show:
        document = json.loads(args.show.read_text())
        print(report.summary(document, program.sections) if args.summary else report.report(document, program.title, program.sections))
        _draw(document, args.plots)
    else:
        return _measure(program, args)
    return 0


def _measure(program: Program, args: argparse.Namespace) -> int:
    quick, available = args.quick, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    settings = Settings(
        backend=args.backend, seconds=program.seconds[quick] if args.seconds is None else args.seconds, quick=quick, toy=args.toy,
        min_rounds=program.min_rounds[quick], cache_bytes=min(available // 3, 1 << 29 if quick else 6 << 30),
        compile_seconds=(0.0 if quick else 300.0) if args.compile_seconds is None else args.compile_seconds,
    )  # fmt: skip
    if reason := dispatch.unavailable(settings.backend):
        print(f"bench: backend {args.backend!r} cannot run here: {reason}", file=sys.stderr)
        return 1
    with contextlib.ExitStack() as stack:
        planned, compared, options, env = program.jobs(args.only, args.shapes, args.threads, settings), None, {}, None
        try:
            if args.base:
                compared, options = stack.enter_context(base.prepared(args.base, settings.backend))
            elif args.stages:
                planned, env = [("stages", shape, 1) for shape in args.shapes], stages.prepared()
        except base.Unusable as error:
            print(f"bench: {error}", file=sys.stderr)
            return 1
        if args.base:
            options["launches"] = 1 if args.toy else args.launches
            planned = [("base", shape, n) for n in args.threads for shape in args.shapes]
        found = []
        for i, (study, case, threads) in enumerate(planned, 1):
            print(f"[{i}/{len(planned)}] {study} {case}, {threads} threads", file=sys.stderr, flush=True)
            found += measuring.start(program.module, measuring.request(study, case, threads, settings, **options), env)
    extension = dispatch.BACKENDS["cpp"].extension
    capability = {"used": extension.cpu_capability(), "possible": extension.cpu_capabilities()} if extension else None
    document = {
        **results.heading(program.module), "machine": results.machine(), "capability": capability,
        "versions": results.versions("torch", "miras-kernels", "transformers", "triton"), "settings": dataclasses.asdict(settings),
        "malloc": measuring.MALLOC, "threads": args.threads, "base": compared, "results": found,
        "targets": [] if args.toy or args.base else judged(program.targets(), found, args.threads, capability and capability["used"]),
    }  # fmt: skip
    print(report.report(document, program.title, program.sections))
    if args.json:
        results.write_json(document, args.json)
    _draw(document, args.plots)
    red = any("error" in r or not all(gate and gate.get("ok") for gate in report.gates(r)) for r in found)
    return int(red or (args.strict and any(m["verdict"] == "NOT met" for t in document["targets"] for m in t["measured"].values())))


def _draw(document: dict, folder: Path | None) -> None:
    if folder and (path := plots.draw(document, folder)):
        print(f"drew {path}", file=sys.stderr)
