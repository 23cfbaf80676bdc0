"""What the command lines of cpu.py, decode.py and gpu.py share: options, lists of names, and results as JSON."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path


def cpu_parser(description: str, studies: Sequence[str], *, quick: str, seconds: str) -> argparse.ArgumentParser:
    """The options that cpu.py and decode.py have in common; :func:`thread_counts` reads ``--threads``, :func:`names` reads ``--only``.

    Args:
        quick: what ``--quick`` leaves out.
        seconds: the defaults of ``--seconds``.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the results there as well")
    parser.add_argument("--quick", action="store_true", help=f"about a minute: one thread, {quick}")
    parser.add_argument("--only", metavar="STUDY,...", help=f"some of {', '.join(studies)}")
    parser.add_argument("--threads", metavar="N,...", help="thread counts (default 1,2; 1 with --quick)")
    parser.add_argument("--seconds", type=float, help=f"per interleaved measurement (default {seconds})")
    parser.add_argument("--backend", default="cpp", choices=("cpp", "reference"), help="what to measure")
    parser.add_argument("--toy", action="store_true", help="tiny sizes: checks this program, measures nothing")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a target's 'at least' is not met")
    parser.add_argument("--list", action="store_true", help="name what --only and the like may have")
    parser.add_argument("--show", type=Path, metavar="PATH", help="print the report of an earlier run's JSON")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser


def thread_counts(parser: argparse.ArgumentParser, args: argparse.Namespace) -> list[int]:
    """``--threads`` as numbers."""
    try:
        counts = [int(n) for n in (args.threads or ("1" if args.quick else "1,2")).split(",")]
    except ValueError:
        parser.error(f"--threads: expected integers such as 1,2, got {args.threads!r}")
    if min(counts) < 1:
        parser.error(f"--threads: expected integers >= 1, got {counts}")
    return counts


def names(parser: argparse.ArgumentParser, option: str, text: str | None, known: tuple, default: tuple) -> tuple:
    """A comma-separated list of names that are known, or the default where nothing was given."""
    chosen = default if text is None else tuple(name.strip() for name in text.split(","))
    for name in chosen:
        if name not in known:
            parser.error(f"{option}: unknown {name!r}: expected some of {', '.join(known)}")
    return chosen


def status(document: dict, red: bool, strict: bool) -> int:
    """The exit status: 1 if something was wrong or, where that is asked, if a target was missed."""
    missed = any(m["verdict"] == "NOT met" for t in document["targets"] for m in t["measured"].values())
    return int(red or (strict and missed))


def plain(x: object) -> object:
    """JSON has no infinities: they become null."""
    if isinstance(x, dict):
        return {str(key): plain(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [plain(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


def write_json(document: dict, path: Path) -> None:
    """The results, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".part")
    draft.write_text(json.dumps(plain(document), indent=1, allow_nan=False) + "\n")
    draft.replace(path)
