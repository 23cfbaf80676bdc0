"""The page ``docs/which-bias.md``: fills the results into the template ``page.md``."""

from __future__ import annotations

import statistics
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from . import methods, search, tasks, training
from .results import MATERIAL, Results, interval_rank

__all__ = ["CLAIMS", "render", "summary", "verdict"]

METRICS = {"error": "relative error", "accuracy": "accuracy"}
KINDS = {"linear": "matrix", "mlp": "MLP", "baseline": "stores all"}
DECAY = " + decay"
DOT = ("dot product", "dot product" + DECAY)
ATTENTION = ("softmax attention", "softmax attention" + DECAY)
LEARNED = 0.5  # a trained memory of lower accuracy on its own task has not learned it
MANY = 9  # longer lists of names are given as a number

_BOTH = ("", DECAY)
#: claim, where it is made, tasks that it is about, pairs (first is better, second)
CLAIMS: tuple[tuple[str, str, tuple[str, ...], tuple[tuple[str, str], ...]], ...] = (
    ("L2 is sensitive to outliers, and Huber's loss lessens their effect", "Miras, 5.1", ("outliers",),
     tuple((f"Huber {kind}{d}", f"L2{d}") for kind in ("coordinate", "norm", "switch") for d in _BOTH)),
    ("The same for an MLP memory (Yaad)", "Miras, 5.3", ("outliers",), (("MLP Huber switch + decay", "MLP L2 + decay"),)),
    ("L3, Moneta's bias, remembers better than L2 under noise", "Miras, 5.1", ("value noise", "key noise"),
     tuple((f"L3{d}", f"L2{d}") for d in _BOTH)),
    ("A loss for the worst case (robust L2) is robust to shifted values", "Miras, 5.1", ("value noise",),
     tuple((f"robust L2{d}", f"L2{d}") for d in _BOTH)),
    ("The q-norm gate suits L3 (Moneta)", "Miras, 5.2", tuple(tasks.TABLE), (("L3 + Lq + decay", "L3 + decay"),)),
    ("Regression (L2) manages a memory better than the dot product", "Miras, 3", tuple(tasks.TABLE),
     tuple((f"L2{d}", f"dot product{d}") for d in _BOTH)),
    ("Forgetting helps a memory that is too small", "Miras, 3", ("drift", "stream"),
     tuple((bias + DECAY, bias) for bias in ("dot product", "L2", "L1", "L3"))),
    ("A deeper memory stores more (here from a random start)", "Titans, arXiv 2501.00663", ("load",), (("MLP L2 + decay", "L2 + decay"),)),
)  # fmt: skip


def verdict(outcomes: Iterable[str]) -> str:
    """What the outcomes of comparisons say about a claim that the first of each pair is better."""
    counts = Counter(outcomes)
    better, tie, worse = (counts[name] for name in ("better", "tie", "worse"))
    if not counts:
        return "not measured"
    if better and worse:
        word = "mixed"
    elif better:
        word = "partly supported" if tie else "supported"
    elif worse:
        word = "partly contradicted" if tie else "contradicted"
    else:
        word = "no difference"
    return f"{word}: {better} better, {tie} tied, {worse} worse"


def render(results: Results, figure: str | None = None) -> str:
    """The whole page; ``figure`` is the path of the plot, relative to the page."""
    about, state = results.about, methods.STATE
    unlearned = [name for name in results.trained if statistics.median(results.trained_values(name, training.PAIRS)) < LEARNED]
    template = string.Template(Path(__file__).with_name("page.md").read_text(encoding="utf-8"))
    text = template.substitute(
        about,
        versions=", ".join(f"{name} {version}" for name, version in about["versions"].items()),
        material=MATERIAL, summary=_summary(results), claims=_claims(results), dim=tasks.DIM, matrix=f"{state['linear']:,}",
        mlp=f"{state['mlp']:,}", huge=f"{methods.HUGE:g}", more=2 * (about["points"] // 4) * len(search.BOXES),
        coverage=f"{interval_rank(about['repeats'])[1]:.1%}",
        hardest_error=_hardest(results, "error"), hardest_accuracy=_hardest(results, "accuracy"),
        tasks="\n\n".join(_task(results, task) for task in results.levels),
        width=training.WIDTH, head=training.HEAD, chunk=training.CHUNK, pairs=training.PAIRS, symbols=training.SYMBOLS,
        rates=len(training.RATES), chance=f"{1 / training.SYMBOLS:.2f}",
        training_coverage=f"{interval_rank(about['training_repeats'])[1]:.0%}", learned=LEARNED,
        unlearned=", ".join(unlearned) or "none", trained=_trained(results),
        plot="" if figure is None else f"![Relative error of some methods by task and level]({figure})",
    )  # fmt: skip
    return text.replace("\n\n\n\n", "\n\n")  # where there is no plot


def summary(text: str) -> str:
    """The page's first section."""
    return "## " + text.split("\n## ")[1].strip()


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    line = lambda cells: "| " + " | ".join(cells) + " |"
    return "\n".join([line(header), line(["---"] * len(header)), *map(line, rows)])


def _bold(text: str, leads: bool) -> str:
    return f"**{text}**" if leads else text


def _counted(outcomes: Iterable[str]) -> str:
    counts = Counter(outcomes)
    return " / ".join(str(counts[name]) for name in ("better", "tie", "worse"))


def _always_leading(results: Results, task: str, metric: str) -> str:
    """Names of the memories that lead at every level of a task."""
    leaders = [results.leaders(task, level, metric) for level in results.levels[task]]
    names = [name for name in results.memories if all(name in some for some in leaders)]
    if len(names) > MANY:
        return f"{len(names)} of {len(results.memories)}, {'with' if set(DOT) & set(names) else 'without'} the dot product"
    both = {name.removesuffix(DECAY) for name in names if {name.removesuffix(DECAY), name.removesuffix(DECAY) + DECAY} <= set(names)}
    merged = dict.fromkeys(f"{base} (± decay)" if (base := name.removesuffix(DECAY)) in both else name for name in names)
    return ", ".join(merged) or "none"


def _summary(results: Results) -> str:
    rows = []
    for task, levels in results.levels.items():
        row, hardest = tasks.TABLE[task], levels[-1]
        pair = (results.best(task, hardest, "error", names) for names in (results.memories, DOT))
        best, dot = (f"{results.median(task, hardest, name, 'error'):.2f} ({name})" for name in pair)
        dot_leads = [sum(bool(set(DOT) & set(results.leaders(task, x, metric))) for x in levels) for metric in METRICS]
        decays = [(name + DECAY, name) for name in results.memories if name + DECAY in results.memories]
        decay = [results.compare(task, level, *pair, "error") for level in levels for pair in decays]
        attention = []
        for level in levels:
            memory, reader = (results.best(task, level, "accuracy", names) for names in (results.memories, ATTENTION))
            attention.append(results.compare(task, level, memory, reader, "accuracy"))
        rows.append([
            f"{row.title}, {row.level(levels[0])} to {row.level(hardest)}",
            *(_always_leading(results, task, metric) for metric in METRICS),
            f"{best}; {dot}",
            f"{dot_leads[0]} and {dot_leads[1]} of {len(levels)}",
            _counted(decay),
            _counted(attention),
        ])  # fmt: skip
    leads = [f"leads at all levels: {word}" for word in METRICS.values()]
    header = [
        "task, levels",
        *leads,
        "error at the hardest level: best; dot product",
        "dot product leads",
        "decay",
        "against softmax attention",
    ]
    return _table(header, rows)


def _claims(results: Results) -> str:
    rows = []
    for claim, source, about, pairs in CLAIMS:
        places = [(task, level) for task in about for level in results.levels.get(task, [])]
        cells = [verdict(results.compare(*place, *pair, metric) for place in places for pair in pairs) for metric in METRICS]
        rows.append([claim, source, ", ".join(about) if len(about) < len(tasks.TABLE) else "all", *cells])
    return _table(["claim", "source, section", "tasks", *METRICS.values()], rows)


def _hardest(results: Results, metric: str) -> str:
    """Medians at the hardest level of every task."""
    hardest = {task: levels[-1] for task, levels in results.levels.items()}
    leaders = {task: results.leaders(task, level, metric) for task, level in hardest.items()}
    rows = []
    for name in results.names:
        medians = {task: f"{results.median(task, level, name, metric):.2f}" for task, level in hardest.items()}
        rows.append([name, KINDS[methods.TABLE[name].kind], *(_bold(x, name in leaders[task]) for task, x in medians.items())])
    return _table(["", "kind", *(f"{task}, {tasks.TABLE[task].level(level)}" for task, level in hardest.items())], rows)


def _task(results: Results, task: str) -> str:
    row, levels = tasks.TABLE[task], results.levels[task]
    parts = [f"### {row.title}", f"{row.about[0].upper()}{row.about[1:]}."]
    for metric, word in METRICS.items():
        leaders = {level: results.leaders(task, level, metric) for level in levels}
        rows = []
        for name in results.names:
            cells = []
            for level in levels:
                low, median, high = statistics.quantiles(results.values(task, level, name, metric), n=4, method="inclusive")
                cells.append(_bold(f"{median:.2f} [{low:.2f}, {high:.2f}]", name in leaders[level]))
            rows.append([name, *cells])
        parts += [f"<details><summary>{word.capitalize()}</summary>", _table([word, *map(row.level, levels)], rows), "</details>"]
    return "\n\n".join(parts)


def _trained(results: Results) -> str:
    leaders = {pairs: results.trained_leaders(pairs) for pairs in training.ASKED} if results.trained else {}
    rows = []
    for name in results.trained:
        cells = []
        for pairs, some in leaders.items():
            values = results.trained_values(name, pairs)
            cells.append(_bold(f"{statistics.median(values):.2f} [{min(values):.2f}, {max(values):.2f}]", name in some))
        rows.append([name, *cells, f"{next(r.rate for r in results.runs if r.memory == name):g}"])
    return _table(["memory", *(f"{n} pairs" for n in training.ASKED), "learning rate"], rows)
