"""The report ``docs/which-bias.md``: a function of the results."""

from __future__ import annotations

import statistics

from . import contestants, mqar, phrases, recall, tasks
from .document import Document
from .phrases import METRICS, judgement, levels, listed, plural, shown
from .verdicts import MATERIAL, interval_rank

__all__ = ["CLAIMS", "in_short", "render"]

#: claim, where it is made, tasks that it is about, pairs (first is better, second)
_DECAYS = ("", " + decay")
CLAIMS: tuple[tuple[str, str, tuple[str, ...], tuple[tuple[str, str], ...]], ...] = (
    ("L2 is sensitive to outliers, and Huber's loss lessens their effect", "Miras, 5.1", ("outliers",),
     tuple((f"Huber {kind}{d}", f"L2{d}") for kind in ("coordinate", "norm", "switch") for d in _DECAYS)),
    ("The same for an MLP memory (Yaad)", "Miras, 5.3", ("outliers",), (("MLP Huber switch + decay", "MLP L2 + decay"),)),
    ("L3, Moneta's bias, keeps better than L2 under noise", "Miras, 5.1", ("value noise", "key noise"),
     tuple((f"L3{d}", f"L2{d}") for d in _DECAYS)),
    ("A loss for the worst case (robust L2) withstands shifted values", "Miras, 5.1", ("value noise",),
     tuple((f"robust L2{d}", f"L2{d}") for d in _DECAYS)),
    ("The q-norm gate suits L3 (Moneta)", "Miras, 5.2", tuple(tasks.TABLE), (("L3 + Lq + decay", "L3 + decay"),)),
    ("Regression (L2) manages a memory better than the dot product", "Miras, 3", tuple(tasks.TABLE),
     tuple((f"L2{d}", f"dot product{d}") for d in _DECAYS)),
    ("Forgetting manages a memory that is too small", "Miras, 3", ("drift", "stream"),
     tuple((f"{bias} + decay", bias) for bias in ("dot product", "L2", "L1", "L3"))),
    ("A deeper memory stores more (here from a random start)", "Titans, arXiv 2501.00663", ("load",), (("MLP L2 + decay", "L2 + decay"),)),
)  # fmt: skip

_METHOD = """\
Each contestant reads a stream of pairs once, one token at a time (`chunk_size=1`), and is then asked. Keys are unit vectors of
{dim} channels, values have channels of size 1. A matrix memory holds {matrix:,} numbers, an MLP memory {mlp:,}: compare within a
kind. An MLP's start is random here, not learned as in a trained model, and its LayerNorm gives answers a fixed size: it cannot
answer "nothing", and its relative error can exceed 1 where its accuracy is fine. The KL gate's matrix has no negative entries.
The readers keep every pair: softmax attention (with and without a decay by age), hard attention (the newest of the nearest
keys), and ridge regression, the best matrix for all pairs at once.

- **Relative error**: distance of the answers from the right values, over the size of these; answering nothing has 1. Errors are
  cut at {huge:g}, which stands for a memory that diverged.
- **Accuracy**: the share of answers to which, among the candidates, the right value is the nearest by angle.
- **Tuning**: everybody's step size, decay, threshold or temperature is searched with the same budget, {points} choices spread
  over the ranges and {more} around the best so far, for each level of each task and for each of the two measures, on {tuning}
  streams. Reported are {repeats} *other* streams, the same for all.
- **Spread**: median [quartiles] over streams. Two contestants are compared stream by stream: their difference counts if the
  {coverage:.1%} interval of its median (order statistics, no assumption on the distribution) leaves out zero and it is at least
  {material}. Else it is a **tie**, and called so. The tuning is done once: its luck is in the numbers, and not in their spread.
"""

_TRAINED = """\
Two layers of `MemoryBlock` (width {width}, one head of {head} channels, chunks of {chunk}), trained for {steps} steps on
sequences of {pairs} pairs out of {symbols} keys and {symbols} values, then asked for {asked} pairs. All biases have the same gates and
the same {rates} learning rates to choose from, on another seed than the {repeats} that are reported. Median [least, greatest]
accuracy; chance is {chance:.2f}. With {repeats} seeds two memories are told apart only if one is ahead on every seed (coverage
{coverage:.0%}), by at least {material} in the median; a memory that varies much can then be level with the best where a steadier one
of a greater median is not.
"""


def _winners(document: Document) -> str:
    """Who leads each task throughout, and how far from the dot product at its hardest level."""
    rows = []
    for task, measured in document.levels.items():
        row, hardest = tasks.TABLE[task], measured[-1]
        best, dot = document.leaders(task, hardest, "error")[0], phrases.dot(document, task, hardest, "error")
        medians = [f"{document.median(task, hardest, name, 'error'):.2f}" for name in (best, dot)]
        rows.append([f"{row.title}, {phrases.span(task, measured)}", *(phrases.leading(document, task, metric) for metric in METRICS),
                     f"{medians[0]} ({best}), {medians[1]}"])  # fmt: skip
    heads = [f"{best} {word} at every level" for word, best in METRICS.values()]
    return _table(["task, levels", *heads, "error at the hardest level: best, dot product"], rows)


def _dot_bullets(document: Document) -> list[str]:
    lines = []
    for metric, (word, _) in METRICS.items():
        found = {task: phrases.dot_stands(document, task, metric) for task in document.levels}
        said = [f"{task} ({levels(task, some)})" for task, some in found.items() if some]
        total = sum(map(len, document.levels.values()))
        count = sum(map(len, found.values()))
        where = f": {'; '.join(said)}" if said else ""
        places = f"{count} of {plural(total, 'task level')}{where}"
        lines.append(f"- By {word}, a matrix with the dot product is level with the best memory at {places}.")
    return lines


def in_short(document: Document) -> str:
    """The first part of the report: what won where, and where the dot product is hard to beat."""
    lines = ["## In short", "", "Among memories whose size is fixed, alone or level with others:", "", _winners(document)]
    lines += ["", "Where the dot product is hard to beat:", "", *_dot_bullets(document)]
    if document.trained:
        lines += ["", "Trained on multi-query recall:", ""]
        lines += [f"- {phrases.trained_sentences(document, pairs)}" for pairs in mqar.ASKED]
        lines.append(f"- {phrases.unlearned(document)}")
    return "\n".join(lines)


def _table(header: list[str], rows: list[list[str]]) -> str:
    line = lambda cells: "| " + " | ".join(cells) + " |"
    return "\n".join([line(header), line(["---"] * len(header)), *map(line, rows)])


def _bold(text: str, so: bool) -> str:
    return f"**{text}**" if so else text


def _overview(document: Document, metric: str) -> str:
    """Medians at the hardest level of every task; leaders in bold."""
    hardest = {task: some[-1] for task, some in document.levels.items()}
    leaders = {task: document.leaders(task, level, metric) for task, level in hardest.items()}
    rows = []
    for name in document.names:
        medians = {task: f"{document.median(task, level, name, metric):.2f}" for task, level in hardest.items()}
        rows.append([name, phrases.kind(name), *(_bold(x, name in leaders[task]) for task, x in medians.items())])
    return _table(["", "memory", *(f"{task}, {tasks.TABLE[task].level(level)}" for task, level in hardest.items())], rows)


def _task_section(document: Document, task: str) -> str:
    row, measured = tasks.TABLE[task], document.levels[task]
    lines = [f"### {row.title}", "", f"{row.about[0].upper()}{row.about[1:]}.", "", phrases.task_sentences(document, task), ""]
    for metric, (word, _) in METRICS.items():
        leaders = {level: document.leaders(task, level, metric) for level in measured}
        rows = []
        for name in document.names:
            values = {level: document.values(task, level, name, metric) for level in measured}
            rows.append([name, *(_bold(shown(x), name in leaders[level]) for level, x in values.items())])
        summary = f"{word[0].upper()}{word[1:]} of everybody; leading memories in bold"
        body = _table([word, *map(row.level, measured)], rows)
        lines += [f"<details><summary>{summary}</summary>", "", body, "", "</details>"]
    return "\n".join(lines)


def _claims(document: Document) -> str:
    rows = []
    for claim, source, about, pairs in CLAIMS:
        known = [pair for pair in pairs if set(pair) <= set(document.names)]
        cells = []
        for metric in METRICS:
            places = [(task, level) for task in about for level in document.levels.get(task, [])]
            counts = phrases.count_outcomes([document.compare(*place, *pair, metric) for place in places for pair in known])
            cells.append(judgement(counts))
        rows.append([claim, source, ", ".join(about) if len(about) < len(tasks.TABLE) else "all", *cells])
    return _table(["claim", "source, section", "tasks", *(f"measured: {word}" for word, _ in METRICS.values())], rows)


def _trained(document: Document) -> str:
    about = document.about
    _, coverage = interval_rank(about["training_repeats"])
    text = _TRAINED.format(
        width=mqar.WIDTH, head=mqar.HEAD, chunk=mqar.CHUNK, steps=about["training_steps"], pairs=mqar.PAIRS, symbols=mqar.SYMBOLS,
        asked=listed([str(n) for n in mqar.ASKED]), rates=len(mqar.RATES), repeats=about["training_repeats"], chance=1 / mqar.SYMBOLS,
        coverage=coverage, material=MATERIAL,
    )  # fmt: skip
    leaders = {pairs: document.trained_leaders(pairs) for pairs in mqar.ASKED}
    rows = []
    for name in document.trained:
        cells = []
        for pairs in mqar.ASKED:
            values = document.trained_values(name, pairs)
            cell = f"{statistics.median(values):.2f} [{min(values):.2f}, {max(values):.2f}]"
            cells.append(_bold(cell, name in leaders[pairs]))
        rows.append([name, *cells, f"{next(r.rate for r in document.runs if r.memory == name):g}"])
    table = _table(["memory", *(f"{n} pairs" for n in mqar.ASKED), "learning rate"], rows)
    return "\n".join([text, phrases.unlearned(document), "", table])


def render(document: Document, figures: str | None = None) -> str:
    """The whole page; ``figures`` is the folder of the plots, seen from the page."""
    about, state = document.about, contestants.STATE
    _, coverage = interval_rank(about["repeats"])
    later = 2 * (about["points"] // 4) * len(recall.BOXES)
    image = lambda name, text: [] if figures is None else [f"![{text}]({figures}/{name}.png)", ""]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    parts = [
        "# Which attentional bias remembers what", "",
        "Written by `python -m miras_kernels study` (`make study`) from its measurements; every sentence with a result is computed.",
        f"Seed {about['seed']}; {versions}; {about['cpu_minutes']:g} minutes of CPU time.", "",
        in_short(document), "", *image("recall", "Relative error of some contestants by task and level"),
        "## What the papers say, and what was measured", "",
        "Miras is arXiv 2504.13173. A cell counts comparisons over levels, kinds and decay, in these tasks: the papers speak of",
        "language models, whose streams may have other difficulties.", "",
        _claims(document), "",
        "## How it was measured", "",
        _METHOD.format(
            dim=tasks.DIM, huge=contestants.HUGE, matrix=state["linear"], mlp=state["mlp"], points=about["points"], more=later,
            tuning=about["tuning"], repeats=about["repeats"], coverage=coverage, material=MATERIAL,
        ),
        "## Everybody at the hardest level", "", "Medians; leading memories, and those level with them, in bold.", "",
    ]  # fmt: skip
    for metric, (word, _) in METRICS.items():
        parts += [f"{word[0].upper()}{word[1:]}:", "", _overview(document, metric), ""]
    parts += [*image("accuracy", "Accuracy of everybody at the hardest level"), "## Task by task", ""]
    for task in document.levels:
        parts += [_task_section(document, task), ""]
    if document.trained:
        parts += ["## Trained models", "", _trained(document), "", *image("trained", "Accuracy of trained models by the number of pairs")]
    return "\n".join(parts).rstrip("\n") + "\n"
