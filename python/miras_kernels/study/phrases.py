"""Sentences and cells that are functions of the results: nothing here knows how they came out."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from . import contestants, mqar, tasks
from .document import Document
from .verdicts import Verdict, spread

#: metric: (name, what is best)
METRICS = {"error": ("relative error", "least"), "accuracy": ("accuracy", "greatest")}
DOT = ("dot product", "dot product + decay")
DECAY = " + decay"
LEARNED = 0.5  # a trained memory of less accuracy on its own task has not learned it
MANY = 9  # more names than that are not a list but a number


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def listed(items: Sequence[str]) -> str:
    """``a, b and c``."""
    items = list(items)
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def shown(values: Sequence[float]) -> str:
    """Median and quartiles."""
    low, median, high = spread(values)
    return f"{median:.2f} [{low:.2f}, {high:.2f}]"


def levels(task: str, some: Sequence[float]) -> str:
    """Levels of a task in words."""
    row = tasks.TABLE[task]
    return listed([row.level(level) for level in some])


def span(task: str, some: Sequence[float]) -> str:
    """From the first level to the last."""
    row = tasks.TABLE[task]
    return " ... ".join(row.level(level) for level in dict.fromkeys((some[0], some[-1])))


def grouped(names: Sequence[str], among: Sequence[str]) -> str:
    """Contestants, those that stand both with and without decay said once."""
    said: dict[str, str] = {}
    for name in names:
        base = name.removesuffix(DECAY)
        pair = {base, base + DECAY}
        both = pair <= set(names)
        said.setdefault(base, f"{base} (± decay)" if both and pair <= set(among) else name)
    return listed(said.values())


def count_outcomes(verdicts: Sequence[Verdict]) -> dict[str, int]:
    outcomes = [verdict.outcome for verdict in verdicts]
    return {name: outcomes.count(name) for name in ("better", "tie", "worse")}


def judgement(counts: dict[str, int]) -> str:
    """What comparisons say of a claim that the first is better."""
    better, tie, worse = counts["better"], counts["tie"], counts["worse"]
    total = better + tie + worse
    if total == 0:
        return "not measured"
    if better == total:
        return "borne out, every time"
    if better == worse == 0:
        return "no difference, every time"
    if worse == 0:
        return f"borne out in {better} of {total}, no difference in the others"
    if better == 0:
        return f"the opposite in {worse} of {total}" + (", no difference in the others" if tie else "")
    return f"mixed: better in {better} of {total}, worse in {worse}, no difference in {tie}"


def dot(document: Document, task: str, level: float, metric: str) -> str:
    """The dot product with or without decay, whichever has the better median."""
    return document.ranked(task, level, metric, DOT)[0]


def dot_stands(document: Document, task: str, metric: str) -> list[float]:
    """Levels at which a dot product is among the leading memories."""
    return [level for level in document.levels[task] if set(DOT) & set(document.leaders(task, level, metric))]


def reader_outcomes(document: Document, task: str, metric: str) -> dict[str, int]:
    """The best memory against the better of the two softmax attentions, by level."""
    found = []
    for level in document.levels[task]:
        attention = document.ranked(task, level, metric, (name for name in document.names if name.startswith("softmax")))[0]
        found.append(document.compare(task, level, document.leaders(task, level, metric)[0], attention, metric))
    return count_outcomes(found)


def leading(document: Document, task: str, metric: str) -> str:
    """Those that lead at every level, in words."""
    always = always_leading(document, task, metric)
    if not always:
        return "no memory"
    if len(always) == len(document.memories):
        return "every memory"
    if len(always) > MANY:
        among = "with" if set(DOT) & set(always) else "without"
        return f"{len(always)} of {len(document.memories)} memories, {among} the dot product among them"
    return f"**{grouped(always, document.names)}**"


def always_leading(document: Document, task: str, metric: str) -> list[str]:
    """Memories that lead, or are level with the leader, at every level."""
    groups = [document.leaders(task, level, metric) for level in document.levels[task]]
    return [name for name in document.memories if all(name in group for group in groups)]


def task_sentences(document: Document, task: str) -> str:
    """What won a task, where the dot product stands, what decay did, and how softmax attention compares."""
    measured, said = document.levels[task], []
    for metric, (word, best) in METRICS.items():
        said.append(f"The {best} {word} at every level, alone or level with others: {leading(document, task, metric)}.")
    if measured_nothing := [x for x in measured if _nothing_learned(document, task, x)]:
        said.append(f"At {levels(task, measured_nothing)} no memory's error is below that of answering nothing, 1.")
    said.append(_dot_sentence(document, task))
    said.append(_decay_sentence(document, task))
    outcome = reader_outcomes(document, task, "accuracy")
    said.append(
        f"Against softmax attention, which keeps every pair, the best memory's accuracy is better at {outcome['better']}, "
        f"level at {outcome['tie']} and worse at {outcome['worse']} of {plural(len(measured), 'level')}."
    )
    return " ".join(said)


def _nothing_learned(document: Document, task: str, level: float) -> bool:
    return document.median(task, level, document.leaders(task, level, "error")[0], "error") >= 1 - 0.01


def _dot_sentence(document: Document, task: str) -> str:
    said = []
    for metric, (word, _) in METRICS.items():
        beaten = [x for x in document.levels[task] if x not in dot_stands(document, task, metric)]
        if not beaten:
            said.append(f"is level with the best memory by {word} at every level")
            continue
        gaps = []
        for level in beaten:
            pair = document.leaders(task, level, metric)[0], dot(document, task, level, metric)
            gaps.append(document.compare(task, level, *pair, metric).difference)
        where = "every level" if len(beaten) == len(document.levels[task]) else levels(task, beaten)
        size = " to ".join(dict.fromkeys((f"{min(gaps):.2f}", f"{max(gaps):.2f}")))
        said.append(f"is beaten by {word} at {where}, by {size}")
    return f"The dot product (with or without decay) {said[0]}, and {said[1]}."


def decay_outcomes(document: Document, task: str, metric: str = "error") -> dict[str, int]:
    """Each linear bias with decay against itself without, over the levels."""
    pairs = [(name + DECAY, name) for name in document.memories if name + DECAY in document.memories]
    return count_outcomes([document.compare(task, level, *pair, metric) for level in document.levels[task] for pair in pairs])


def _decay_sentence(document: Document, task: str) -> str:
    found = decay_outcomes(document, task)
    return (
        f"Decay lowered the error in {found['better']}, raised it in {found['worse']} and made no difference in {found['tie']} comparisons."
    )


def trained_sentences(document: Document, pairs: int) -> str:
    """Who leads among trained models at a number of pairs."""
    leaders = document.trained_leaders(pairs)
    best = leaders[0]
    text = f"With {pairs} pairs: **{best}**, {statistics.median(document.trained_values(best, pairs)):.2f}"
    others = [name for name in leaders if name != best]
    behind = [name for name in document.trained if name not in leaders]
    text += f"; level with it: {listed(others)}" if others else "; no other is level with it"
    return text + (f"; behind: {listed(behind)}." if behind else ".")


def unlearned(document: Document) -> str:
    """Which memories had not learned the task that they were trained on: they say little about what a bias remembers."""
    some = [name for name in document.trained if statistics.median(document.trained_values(name, mqar.PAIRS)) < LEARNED]
    if not some:
        return f"Every memory learned the task: at {mqar.PAIRS} pairs its median accuracy is at least {LEARNED:g}."
    steps = document.about["training_steps"]
    return (
        f"Not learned within {steps} steps (median accuracy below {LEARNED:g} at the {mqar.PAIRS} pairs of training): {listed(some)}. "
        "Their numbers tell how slowly a model learns to use the memory, not what it holds."
    )


def kind(name: str) -> str:
    """Of a contestant, as tables have it."""
    row = contestants.TABLE[name]
    return {"linear": "matrix", "mlp": "MLP", "reader": "keeps all"}[row.kind]
