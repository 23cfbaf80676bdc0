"""``study``: measure which attentional bias remembers what."""

from __future__ import annotations

import argparse
import os
import pathlib

from .shared import positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="seconds: one level of each task and tiny budgets; the numbers mean nothing")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of streams, starts and training data (default: 0)")
    parser.add_argument("--workers", type=positive, default=min(2, os.cpu_count() or 1), metavar="N",
                        help="processes that share the work, one thread each; results do not depend on it (default: up to 2)")  # fmt: skip
    parser.add_argument("--results", type=pathlib.Path, metavar="FILE", help="measure nothing: take an earlier run's JSON")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the results")
    parser.add_argument("--page", type=pathlib.Path, metavar="FILE", help="write the report, Markdown; with --plots it shows these")
    parser.add_argument("--plots", type=pathlib.Path, metavar="FOLDER", help="draw them (needs matplotlib)")


def run(args: argparse.Namespace) -> int:
    """Measure which attentional bias remembers what."""
    from ..study import program

    return program.command(args)
