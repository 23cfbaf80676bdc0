"""Which attentional bias remembers what: measure it, and write ``docs/which-bias.md`` (``make study``).

    python -m examples.which_bias --add "cauchy=e/(1+(e/s)**2)" --param s=1
    python -m examples.which_bias --json docs/which-bias.json --page docs/which-bias.md --plot docs/which-bias/recall.png

Streams of key-value pairs with one difficulty each (``tasks.py``) are read by memories and by baselines that store every pair
(``methods.py``); step size, decay and thresholds are searched on other streams than those that are reported (``search.py``); small models
with each bias are trained on multi-query associative recall (``training.py``). ``plan.py`` runs all of this, ``results.py`` stores and
compares the results; ``page.md`` is the template of the page, which ``page.py`` fills in.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from miras_kernels import CustomBias

from . import methods, page
from .plan import FULL, QUICK, measure
from .results import Results


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, or read earlier results; write the files that are asked for, and print the page's summary."""
    parser = argparse.ArgumentParser(prog="python -m examples.which_bias", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="seconds: one level of each task and tiny budgets; the numbers mean nothing")
    parser.add_argument("--add", action="append", default=[], metavar="NAME=EXPRESSION",
                        help="also a linear memory with this psi (CustomBias), with decay and without; may be repeated")  # fmt: skip
    parser.add_argument("--param", action="append", default=[], metavar="NAME=NUMBER", help="a number in the expressions of --add")
    parser.add_argument("--seed", type=int, default=0, help="of streams, initial memories and training data (default: 0)")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1), metavar="N",
                        help="processes, one thread each; the results do not depend on it (default: up to 2)")  # fmt: skip
    parser.add_argument("--results", type=Path, metavar="FILE", help="measure nothing: read the JSON of an earlier run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the page, Markdown; it shows the plot")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the errors (needs matplotlib)")
    args = parser.parse_args(arguments)
    try:
        added = _added(args.add, args.param)
    except ValueError as error:
        parser.error(str(error))
    methods.TABLE.update({row.name: row for row in added})  # the page has their rows, also of --results
    if args.plot is not None:
        from . import plot  # before anything is measured: matplotlib may be missing
    if args.results is None:
        found = measure(dataclasses.replace(QUICK if args.quick else FULL, added=added), args.seed, 1 if args.quick else args.workers)
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


def _added(expressions: Sequence[str], parameters: Sequence[str]) -> tuple[methods.Method, ...]:
    """The methods of ``--add``, with those of the numbers of ``--param`` that an expression uses.

    Raises:
        ValueError: naming the argument.
    """
    numbers: dict[str, float] = {}
    for name, _, value in (text.partition("=") for text in parameters):
        try:
            numbers[name.strip()] = float(value)
        except ValueError:
            raise ValueError(f"--param: expected NAME=NUMBER, got {name}={value}") from None
    rows: list[methods.Method] = []
    unused = set(numbers)
    for name, _, text in (text.partition("=") for text in expressions):
        used = {x: value for x, value in numbers.items() if re.search(rf"\b{re.escape(x)}\b", text)}
        unused -= used.keys()
        new = methods.written(name.strip(), CustomBias(text.strip(), **used)) if name.strip() and text.strip() else []
        if not new or {row.name for row in new} & {*methods.TABLE, *(row.name for row in rows)}:
            raise ValueError(f"--add: expected NAME=EXPRESSION with a new name, got {name}={text}")
        rows += new
    if unused:
        raise ValueError(f"--param: no expression uses {', '.join(sorted(unused))}")
    return tuple(rows)


if __name__ == "__main__":
    sys.exit(main())
