"""Decoding on this CPU: a token's latency in both memories, parity first, against PyTorch and against attention with its cache.

    python -m bench.cpu.decode                     everything, markdown on stdout
    python -m bench.cpu.decode --json out.json     and JSON
    python -m bench.cpu.decode --quick             a few minutes: one thread, short measurements, contexts up to 8k
    python -m bench.cpu.decode --only linear,mlp   some studies; --list names them

Implementations take turns as in bench.cpu; docs/benchmarks.md explains how to read the numbers. A token's time is the mean over whole
chunks, because the tokens of a chunk do not cost the same.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Sequence

from ..common import processes, results
from ..common.results import Target, document_text, gate, judge, origin, table
from . import decode_studies, program
from .decode_model import MODEL_CASE, MODELS, study_model
from .decode_studies import CACHE_BYTES, CONTEXTS, SIZES
from .report import ending, versions
from .targets import flagged

MODULE = "bench.cpu.decode"
STUDIES = {**decode_studies.STUDIES, "model": study_model}

# ------------------------------------------------------------------------------------------------------------- targets


def targets() -> Iterator[Target]:
    us = lambda name: ("us", name, "median")
    eager, touch = "eager steps / step", "state read and written once"
    yield Target(f"linear memory, {eager}", "linear", "B8 H8 D64", None, us("eager"), 6, under=us("step"))
    yield Target("linear memory, step / W.mul_(1.0)", "linear", "B8 H8 D64", None, us("step"), 1.5, 1.0, True, us("touch"))
    yield Target(f"linear memory, {eager}", "linear", "B1 H1 D64", None, us("eager"), 12, under=us("step"))
    for size in ("B1 H1 D64", "B8 H8 D64"):
        yield Target(f"MLP memory, step / {touch}", "mlp", size, None, us("step"), 2.0, None, True, us("touch"))
    for memory in (name for name, preset in MODELS.items() if preset):
        name = f"a model's token after 64k / after 1k, {memory}"
        yield Target(name, "model", MODEL_CASE, None, us(f"{memory} 64k"), 1.1, None, True, us(f"{memory} 1k"))


def judged(found: Sequence[dict], threads: Sequence[int]) -> list[dict]:
    """Every target with its figures, per thread count."""
    return judge(targets(), found, {str(n): {"threads": n} for n in threads}, flagged)


# -------------------------------------------------------------------------------------------------------------- report


def report(document: dict) -> str:
    """The run as markdown."""
    m = document["machine"]
    head = [
        f"{m['cpu']}, {m['cores']} cores; {versions(document)}",
        f"{origin(document)}.",
        "Microseconds per token, over whole chunks, median of rounds; one thread: CPU time, more: wall time. See `docs/benchmarks.md`.",
    ]
    sections = []
    for name, title, section in _SECTIONS:
        found = [r for r in document["results"] if r["study"] == name]
        sections += [(title, section(found))] if found else []
    return document_text("Decoding on the CPU", head, [*sections, *ending(document)])


def _us(r: dict, name: str) -> str:
    return f"{r['us'][name]['median']:.1f}" if name in r.get("us", {}) else "-"


def _memory(found: Sequence[dict]) -> str:
    """A step beside the last token of a chunk, the slowest one with its number, and the baselines."""
    shown, rows = {"eager": "eager / step", "baddbmm": "bare products / step", "touch": "W.mul_(1.0) / step"}, []
    for r in found:
        row = [r["case"], str(r["threads"]), gate(r["parity"]), _us(r, "step"), "-", "-", _us(r, "function"), "-"]
        if "us" in r:
            row[4], row[5] = f"{r['closing_us']:.1f}", f"{r['slowest_us']:.1f} (token {r['slowest_token']})"
            row[7] = f"{r['tokens_per_second']['step']:,.0f}"
        rows.append(row + [f"{r['ratios'][name]['median']:.2f}x" if name in r.get("ratios", {}) else "-" for name in shown])
    header = ["size", "threads", "error/budget", "step us", "closing us", "slowest us", "function us", "tokens/s", *shown.values()]
    return table(header, rows)


def _attention(found: Sequence[dict]) -> str:
    rows = []
    for r in found:
        state = f"{r['state_mib']['linear']:.2f} / {r['state_mib']['mlp']:.2f}" if "state_mib" in r else "-"
        rows.append([r["case"], str(r["threads"]), _us(r, "linear"), _us(r, "mlp"), *(_us(r, c) for c in CONTEXTS), state])
    return table(["size", "threads", "linear us", "mlp us", *(f"attention {c} us" for c in CONTEXTS), "states MiB"], rows)


def _model(found: Sequence[dict]) -> str:
    rows = []
    for r in found:
        for name, preset in MODELS.items():
            labels = [f"{name} {context}" for context in CONTEXTS]
            sizes = [f"{r['cache_bytes'][x] / 2**20:.2f}" if "cache_bytes" in r else "-" for x in labels]
            rows.append([preset or "attention", str(r["threads"]), gate(r["parity"]), *(_us(r, x) for x in labels), *sizes])
    columns = [f"{what} {context}" for what in ("us after", "MiB after") for context in CONTEXTS]
    return table(["layers", "threads", "error/budget", *columns], rows)


_SECTIONS = (
    ("linear", "The linear memory", _memory),
    ("mlp", "The MLP memory", _memory),
    ("attention", "Against attention with its cache", _attention),
    ("model", "A whole model: " + MODEL_CASE, _model),
)

# ---------------------------------------------------------------------------------------------------------------- main


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    quick = "short measurements, contexts up to 8k"
    parser = program.parser(MODULE, __doc__.split("\n", 1)[0], tuple(STUDIES), quick, "5; 0.7 with --quick")
    parser.add_argument("--sizes", metavar="SIZE,...", help=f"some of {', '.join(SIZES)}")
    args = parser.parse_args(arguments)
    args.only = results.chosen(parser, "--only", args.only, tuple(STUDIES), tuple(STUDIES))
    args.sizes = results.chosen(parser, "--sizes", args.sizes, tuple(SIZES), tuple(SIZES))
    args.threads = program.thread_counts(parser, args)
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and report; 1 if a parity gate was red or a measuring process failed."""
    args = parse(arguments)
    if args.worker:
        processes.serve({name: program.task(study) for name, study in STUDIES.items()})
        return 0
    if args.show:
        print(report(json.loads(args.show.read_text())))
        return 0
    if args.list:
        print("\n".join([*(f"{name:12s} {study.__doc__.splitlines()[0]}" for name, study in STUDIES.items()), *SIZES]))
        return 0
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    cache_bytes = min(available // 3, 1 << 29 if args.quick else CACHE_BYTES)
    settings = program.settings_of(args, seconds=(5.0, 0.7), min_rounds=(9, 3), cache_bytes=cache_bytes)
    sizes = {"model": [MODEL_CASE]}  # the model has a size of its own
    jobs = [(study, size, n) for n in args.threads for study in args.only for size in sizes.get(study, args.sizes)]
    found = program.run(MODULE, jobs, settings)
    red = {"ok": False, "error": 0.0, "budget": 0.0}  # of a study that failed
    found = [r | {"clock": "", "parity": red} if "error" in r else r for r in found]
    document = {
        **results.heading(MODULE), "machine": results.machine(), "versions": results.versions("torch"),
        "settings": dataclasses.asdict(settings), "malloc": program.MALLOC, "threads": args.threads, "results": found,
        "targets": [] if args.toy else judged(found, args.threads),
    }  # fmt: skip
    return program.finish(document, report(document), any(not r["parity"]["ok"] for r in found), args)


if __name__ == "__main__":
    sys.exit(main())
