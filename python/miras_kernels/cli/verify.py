"""``verify``: compare this machine's kernels with the reference."""

from __future__ import annotations

import argparse

from .shared import memory_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    memory_arguments(parser)
    parser.add_argument("--device", help="default: cuda where there is a GPU")
    parser.set_defaults(**{action.dest: None for action in parser._actions if action.dest != "help"})  # None: all of them
    parser.add_argument("--seconds", type=float, default=60.0, metavar="N", help="when to stop (default: 60)")


def run(args: argparse.Namespace) -> int:
    """Try the kernels of this machine."""
    from ..testing import verifying

    return verifying.command(args)
