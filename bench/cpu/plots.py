"""A picture of a run of bench.cpu. Only this needs matplotlib."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from .report import where


def missing() -> str | None:
    """Why nothing can be drawn, or None."""
    return None if importlib.util.find_spec("matplotlib") else "needs matplotlib (pip install matplotlib, or the extra 'demo')"


def draw(document: dict, folder: Path) -> Path | None:
    """How many times the kernel's time each baseline takes, with the 10th and 90th percentile of the rounds, as a PNG file."""
    from matplotlib.figure import Figure

    found = [r for r in document["results"] if r["study"] == "shapes" and r.get("ratios")]
    if not found:
        return None
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes, names = figure.subplots(), list(dict.fromkeys(name for r in found for name in r["ratios"]))
    for i, name in enumerate(names):
        rows = [(row, r["ratios"][name]) for row, r in enumerate(found) if name in r["ratios"]]
        errors = [[x["median"] - x["p10"] for _, x in rows], [x["p90"] - x["median"] for _, x in rows]]
        places, middles = [row + 0.8 * i / len(names) for row, _ in rows], [x["median"] for _, x in rows]
        axes.barh(places, middles, 0.8 / len(names), xerr=errors, label=name)
    axes.axvline(1, color="grey", linestyle=":")
    axes.set_yticks([row + 0.4 for row in range(len(found))], [where(r) for r in found])
    axes.invert_yaxis()
    axes.set(xlabel="time / time of the kernel", title="Against PyTorch, in the same rounds")
    axes.legend(frameon=False)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "ratios.png", dpi=130)
    return folder / "ratios.png"
