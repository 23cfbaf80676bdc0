"""``fuzz``: random calls of everything public, checked against the reference."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .. import dispatch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backend", choices=(*dispatch.NAMES[1:], "all"), default="all", help="all: those that run on this CPU (the default)"
    )
    parser.add_argument("--seconds", type=float, default=60.0, metavar="N", help="for each backend (default: 60)")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="S", help="the same seed tries the same calls in the same order (default: 0)"
    )
    parser.add_argument("--custom", action="store_true", help="biases and retention gates that are random expressions")
    parser.add_argument("--replay", metavar="JSON", help="try one example again, as a failing run printed it")


def run(args: argparse.Namespace) -> int:
    """Try random calls against the reference; 1 if one was wrong."""
    from ..testing import fuzzing

    names = list(fuzzing.backends(args.backend))
    for name in names:
        reason = dispatch.unavailable(name)
        if reason is not None:
            print(f"fuzz: backend {name!r} cannot run here: {reason}", file=sys.stderr)
            return 2
    if args.replay is not None:
        return _replay(args.replay, names)
    for name in names:
        outcome = fuzzing.fuzz(name, args.seconds, args.seed, fuzzing.examples(name, custom=args.custom))
        routes = ", ".join(f"{count} {route}" for route, count in outcome.tried.most_common())
        print(f"{name}: {sum(outcome.tried.values())} calls tried ({routes}); {sum(outcome.refused.values())} drawn and not tried")
        for reason, count in outcome.refused.most_common(5):
            print(f"  {count} times: {reason}")
        if outcome.failure is not None:
            example, complaint = outcome.failure
            setting = "TRITON_INTERPRET=1 " if name == "triton" else ""  # examples are CPU tensors
            command = f"{setting}python -m miras_kernels fuzz --backend {name} --replay '{example.encode()}'"
            print(f"WRONG: {complaint}\nrepeat with:\n  {command}")
            return 1
    return 0


def _replay(text: str, names: Sequence[str]) -> int:
    from ..testing import fuzzing

    try:
        example = fuzzing.Example.decode(text)
    except ValueError as error:
        print(f"fuzz: {error}", file=sys.stderr)
        return 2
    wrong = 0
    for name in names:
        try:
            fuzzing.run_example(example, name)
            print(f"{name}: right")
        except fuzzing.Refused as reason:
            print(f"{name}: does not serve it: {reason}")
        except fuzzing.Failure as failure:
            print(f"{name}: WRONG: {failure}")
            wrong = 1
    return wrong
