"""Which attentional bias remembers what: measure it, and write ``docs/which-bias.md`` (``make study``).

    python -m examples.which_bias --json docs/which-bias.json --page docs/which-bias.md --plot docs/which-bias/recall.png

Streams of key-value pairs with one difficulty each (``tasks.py``) are read by memories and by baselines that store every pair
(``methods.py``); step size, decay and thresholds are searched on other streams than those that are reported (``search.py``); small models
with each bias are trained on multi-query associative recall (``training.py``). ``plan.py`` runs all of this, ``results.py`` stores and
compares the results; ``page.md`` is the template of the page, which ``page.py`` fills in.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from . import page
from .plan import FULL, QUICK, measure
from .results import Results


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, or read earlier results; write the files that are asked for, and print the page's summary."""
    parser = argparse.ArgumentParser(prog="python -m examples.which_bias", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="seconds: one level of each task and tiny budgets; the numbers mean nothing")
    parser.add_argument("--seed", type=int, default=0, help="of streams, initial memories and training data (default: 0)")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1), metavar="N",
                        help="processes, one thread each; the results do not depend on it (default: up to 2)")  # fmt: skip
    parser.add_argument("--results", type=Path, metavar="FILE", help="measure nothing: read the JSON of an earlier run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the page, Markdown; it shows the plot")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the errors (needs matplotlib)")
    args = parser.parse_args(arguments)
    if args.plot is not None:
        from . import plot  # before anything is measured: matplotlib may be missing
    if args.results is None:
        found = measure(QUICK if args.quick else FULL, args.seed, 1 if args.quick else args.workers)
        results = Results.load(found.dump())  # with the rounding of the JSON
    else:
        try:
            results = Results.load(args.results.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            print(f"--results {args.results}: {error}", file=sys.stderr)
            return 2
    figure = None if args.plot is None else os.path.relpath(args.plot, args.page.parent if args.page else ".")
    text = page.render(results, figure)
    if args.plot is not None:
        plot.draw(results, args.plot)
    for path, content in ((args.json, results.dump()), (args.page, text)):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content, encoding="utf-8")
    print(page.summary(text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
