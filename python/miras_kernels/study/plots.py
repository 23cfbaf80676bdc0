"""Pictures of the results. Needs matplotlib, which nothing else in the package does."""

from __future__ import annotations

import io
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image  # comes with matplotlib

from . import contestants, mqar, tasks
from .document import Document
from .verdicts import spread

__all__ = ["draw"]

#: contestants of the first picture, and how their lines look
LINES = {
    "dot product + decay": "tab:blue", "L2 + decay": "tab:orange", "L1 + decay": "tab:olive", "L3 + decay": "tab:red",
    "Huber norm + decay": "tab:green", "robust L2 + decay": "tab:purple", "MLP L2 + decay": "tab:brown",
    "softmax attention + decay": "grey",
}  # fmt: skip
COLOURS = 256  # of a palette: half of the bytes


def draw(document: Document, folder: Path) -> list[Path]:
    """Draw what there is into a folder; returns the files written."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {"recall": _recall, "accuracy": _accuracy} | ({"trained": _trained} if document.trained else {})
    written = []
    for name, picture in pictures.items():
        figure = picture(document)
        written.append(folder / f"{name}.png")
        _save(figure, written[-1])
        plt.close(figure)
    return written


def _save(figure, path: Path) -> None:
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=75)
    Image.open(drawn).convert("RGB").quantize(COLOURS).save(path, optimize=True)


def _recall(document: Document):
    """Error against the level, a panel for each task."""
    figure, axes = plt.subplots(2, 4, figsize=(12, 5.6), layout="constrained", sharey=True)
    for axis, task in zip(axes.flat, document.levels, strict=False):
        at = range(len(document.levels[task]))
        for name, colour in LINES.items():
            low, middle, high = zip(*(spread(document.values(task, level, name, "error")) for level in document.levels[task]), strict=True)
            style = "--" if contestants.TABLE[name].kind == "reader" else "-"
            axis.plot(at, middle, style, marker="o", markersize=3, color=colour, label=name)
            axis.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)
        axis.set_xticks(at, [tasks.TABLE[task].level(level) for level in document.levels[task]], fontsize=8)
        axis.set_title(tasks.TABLE[task].title, fontsize=10)
        axis.set_ylim(0, 1.35)
        axis.axhline(1, color="black", linewidth=0.5, linestyle=":")
    for axis in axes[:, 0]:
        axis.set_ylabel("relative error")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure


def _accuracy(document: Document):
    """Accuracy of everybody at the hardest level, a shade for each."""
    hardest = {task: some[-1] for task, some in document.levels.items()}
    grid = [[document.median(task, level, name, "accuracy") for task, level in hardest.items()] for name in document.names]
    figure, axis = plt.subplots(figsize=(8, 0.24 * len(grid) + 1), layout="constrained")
    shades = axis.imshow(grid, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    figure.colorbar(shades, fraction=0.03)
    axis.set_xticks(range(len(hardest)), [f"{task}\n{tasks.TABLE[task].level(level)}" for task, level in hardest.items()], fontsize=8)
    axis.set_yticks(range(len(grid)), document.names, fontsize=8)
    axis.xaxis.tick_top()
    return figure


def _trained(document: Document):
    """Accuracy of trained models by the number of pairs, every seed a dot."""
    figure, axis = plt.subplots(figsize=(8, 3.6), layout="constrained")
    shades = plt.get_cmap("viridis")
    for j, pairs in enumerate(mqar.ASKED):
        colour = shades(j / len(mqar.ASKED))
        for i, name in enumerate(document.trained):
            values, x = document.trained_values(name, pairs), i + 0.18 * (j - (len(mqar.ASKED) - 1) / 2)
            axis.plot([x] * len(values), values, ".", color=colour, markersize=4)
            axis.plot([x - 0.07, x + 0.07], [statistics.median(values)] * 2, color=colour, label=f"{pairs} pairs" if i == 0 else None)
    axis.axhline(1 / mqar.SYMBOLS, color="black", linewidth=0.5, linestyle=":")
    axis.set_xticks(range(len(document.trained)), document.trained, rotation=25, ha="right", fontsize=8)
    axis.set(ylabel="accuracy", ylim=(0, 1.02), title=f"Trained on {mqar.PAIRS} pairs; lines are medians, dots seeds")
    figure.legend(loc="outside lower center", frameon=False, ncols=len(mqar.ASKED), fontsize=8)
    return figure
