"""Search for an attentional bias: do random expressions remember better than the built-in biases?

    python -m examples.search_bias [--candidates 400] [--seed 0] [--workers 2] [--out FILE.md]

Every candidate is a linear memory with decay and a random psi (:class:`~miras_kernels.CustomBias`): the error, damped, cut off or bent by
its own size or by that of its row. It is tuned on the study's streams (``examples/which_bias``) with wrong values, drift and colliding
keys, at the hardest level; the best three of each task then get the study's full budget, as all built-in biases do, and are compared with
the best built-in one on other streams, stream by stream. Built-in biases are chosen on those same other streams, which favours them; among
many candidates some would be lucky, which is why none is chosen there.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import re
import statistics
import sys
import time
import warnings
from pathlib import Path

import torch

from miras_kernels import CustomBias

from .which_bias import methods, search, tasks
from .which_bias.plan import FULL
from .which_bias.results import CONFIDENCE, MATERIAL, compare

TASKS = ("outliers", "drift", "collisions")
SMALL = search.Budget(points=12, tuning=4, repeats=0)  # for candidates
NUMBERS = ("a", "b", "delta", "delta")  # a and b are drawn with the expression, delta is tuned
FINALISTS = 3  # of each task
LEVELS = 2  # the hardest ones are reported; candidates are chosen at the hardest


def expression(draw: random.Random) -> CustomBias:
    """A random psi of bounded slope."""
    while True:
        text = _error(draw, 2)
        used = {name: float(f"{10 ** draw.uniform(-1, 1):.2g}") for name in ("a", "b") if re.search(rf"\b{name}\b", text)}
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            try:
                return CustomBias(text, **used)
            except (ValueError, UserWarning):
                pass


def _error(draw: random.Random, depth: int) -> str:
    """An odd function of the error, at most ``depth`` levels of choices deep."""
    kind = draw.choice(["damped", "damped", "damped", "clip", "tanh", "sum", "root", "log", "row"]) if depth else "e"
    inner = _error(draw, depth - 1) if kind in ("clip", "tanh", "sum", "row") else ""
    number = draw.choice(NUMBERS)
    return {
        "e": "e",
        "damped": f"e * {_damping(draw, depth)}",
        "clip": f"clip({inner}, -{number}, {number})",
        "tanh": f"{number} * tanh(({inner}) / ({number} + 1e-3))",
        "sum": f"({inner} + {draw.choice(['a', 'b'])} * {_error(draw, depth - 1) if depth else 'e'})",
        "root": "sign(e) * (sqrt(abs(e) / a + 1) - 1)",
        "log": "sign(e) * log(1 + abs(e) / a)",
        "row": f"({inner}) * {_damping(draw, depth, row=True)}",
    }[kind]


def _damping(draw: random.Random, depth: int, row: bool = False) -> str:
    """A function of the error's size that lies in (0, 1] or grows no faster than the error."""
    of_row = row or draw.random() < 0.5
    number = draw.choice(NUMBERS)
    size = f"norm2 / (32 * {number}**2 + 1e-6)" if of_row else f"(e / ({number} + 1e-3))**2"
    return draw.choice([
        f"1 / (1 + {size})", f"exp(-({size}))", f"1 / sqrt(1 + {size})", f"1 / (1 + sqrt({size}))", f"(1 + {size})**-0.25",
        f"where({size} <= 1, 1, 0.1)", f"max(1 - {size}, 0)", f"where({size} <= 1, (1 - {size})**2, 0)", f"(1 + tanh({size}))",
    ])  # fmt: skip


def _candidate(seed: int, index: int) -> tuple[str, CustomBias]:
    return f"candidate {index}", expression(random.Random(f"{seed} {index}"))


def _method(name: str, bias: CustomBias) -> methods.Method:
    return methods.written(name, bias)[1]  # with decay


def _try(job: tuple[int, int]) -> tuple[int, list[float]]:
    """A candidate's error on the tuning streams of every task, with the best of the hyperparameters tried."""
    seed, index = job
    method, errors = _method(*_candidate(seed, index)), []
    seeds, _ = search.seeds(seed, SMALL)
    for task in TASKS:
        stream = tasks.draw(tasks.TABLE[task], tasks.TABLE[task].levels[-1], seeds)
        best = search.tune(method, SMALL, stream, seeds)[:1]
        errors.append(methods.score(methods.read(method, best, stream, seeds), stream)["error"].mean().item())
    return index, errors


def _report(job: tuple[int, str, float, list[int]]) -> tuple[str, float, dict[str, list[float]]]:
    """Errors of all built-in biases and of the finalists on streams that were not used for tuning."""
    seed, task, level, finalists = job
    builtin = [row.name for row in methods.TABLE.values() if row.kind == "linear" and not isinstance(row.bias, CustomBias)]
    rows = [_method(*_candidate(seed, index)) for index in finalists]
    methods.TABLE.update({row.name: row for row in rows})
    cells = search.measure(task, level, [*builtin, *(row.name for row in rows)], FULL.budget, seed)
    return task, level, {cell.method: cell.error for cell in cells}


def page(seed: int, tried: dict[int, list[float]], finalists: dict[str, list[int]], found: list) -> str:
    """The table, in Markdown."""
    lines = [
        "| task, level | best built-in bias | error | candidate | error | against the built-in |", "| --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    spread = lambda values: "{1:.3f} ({0:.3f} to {2:.3f})".format(*statistics.quantiles(values, n=4))
    better = 0
    for task, level, errors in found:
        names = {f"candidate {i} + decay": i for i in finalists[task]}
        best = min((name for name in errors if name not in names), key=lambda name: statistics.median(errors[name]))
        for name in names:
            verdict = compare(errors[name], errors[best], less_is_better=True)
            better += verdict == "better"
            lines.append(f"| {task}, {tasks.TABLE[task].level(level)} | {best} | {spread(errors[best])} | {names[name]} | "
                         f"{spread(errors[name])} | {verdict} |")  # fmt: skip
    lines += ["", "| candidate | psi |", "| --- | --- |"]
    for i in sorted({i for some in finalists.values() for i in some}):
        bias = _candidate(seed, i)[1]
        lines.append(f"| {i} | `{bias.text}`{''.join(f', {name} = {value:g}' for name, value in bias.values)} |")
    lines += [
        "",
        f"{len(tried)} expressions were tried. Relative errors: median and quartiles over {FULL.budget.repeats} streams that were not used",
        f'for tuning. "better" and "worse" need a median paired difference of at least {MATERIAL:g} whose {CONFIDENCE:.0%} interval',
        f"excludes 0; else it is a tie. Of {len(found) * FINALISTS} comparisons {better} were better.",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.search_bias", description=__doc__.splitlines()[0])
    parser.add_argument("--candidates", type=int, default=400, help="expressions that are tried (default: 400)")
    parser.add_argument("--seed", type=int, default=0, help="of expressions and streams (default: 0)")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1), help="processes, one thread each (default: up to 2)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the table, Markdown")
    args = parser.parse_args()
    if args.candidates < FINALISTS:
        parser.error(f"--candidates: expected at least {FINALISTS}")
    began, tried = time.monotonic(), {}
    with multiprocessing.get_context("spawn").Pool(args.workers, torch.set_num_threads, (1,)) as pool:
        for index, errors in pool.imap_unordered(_try, [(args.seed, i) for i in range(args.candidates)]):
            tried[index] = errors
            if len(tried) % 50 == 0:
                print(f"{len(tried)} of {args.candidates} expressions, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        finalists = {task: sorted(tried, key=lambda i: (tried[i][place], i))[:FINALISTS] for place, task in enumerate(TASKS)}
        jobs = [(args.seed, task, level, finalists[task]) for task in TASKS for level in tasks.TABLE[task].levels[-LEVELS:]]
        found = list(pool.imap(_report, jobs))
    text = page(args.seed, tried, finalists, found)
    print(text)
    print(f"{time.monotonic() - began:.0f} s", file=sys.stderr)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
