"""A plot of the results. Needs matplotlib."""

from __future__ import annotations

import io
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image  # comes with matplotlib

from . import methods, tasks
from .results import Results

__all__ = ["draw"]

#: method -> colour
LINES = {
    "dot product + decay": "tab:blue", "L2 + decay": "tab:orange", "L1 + decay": "tab:olive", "L3 + decay": "tab:red",
    "Huber norm + decay": "tab:green", "robust L2 + decay": "tab:purple", "MLP L2 + decay": "tab:brown",
    "softmax attention + decay": "grey",
}  # fmt: skip


def draw(results: Results, path: Path) -> None:
    """Relative error against the level, a panel for each task: medians and quartiles."""
    figure, axes = plt.subplots(2, 4, figsize=(12, 5.6), layout="constrained", sharey=True)
    for axis, (task, levels) in zip(axes.flat, results.levels.items(), strict=False):
        for name, colour in LINES.items():
            quartiles = [statistics.quantiles(results.values(task, x, name, "error"), n=4, method="inclusive") for x in levels]
            low, median, high = zip(*quartiles, strict=True)
            style = "--" if methods.TABLE[name].kind == "baseline" else "-"
            axis.plot(range(len(levels)), median, style, marker="o", markersize=3, color=colour, label=name)
            axis.fill_between(range(len(levels)), low, high, color=colour, alpha=0.15, linewidth=0)
        axis.set_xticks(range(len(levels)), map(tasks.TABLE[task].level, levels), fontsize=8)
        axis.set_title(tasks.TABLE[task].title, fontsize=10)
        axis.set_ylim(0, 1.35)
        axis.axhline(1, color="black", linewidth=0.5, linestyle=":")
    for axis in axes[:, 0]:
        axis.set_ylabel("relative error")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=75)
    plt.close(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.open(drawn).convert("RGB").quantize(256).save(path, optimize=True)  # a palette halves the size of the file
