"""Pictures of a run of bench.cpu: ratios to the baselines, and scaling. Only these need matplotlib."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from .report import where


def missing() -> str | None:
    """Why nothing can be drawn, or None."""
    return None if importlib.util.find_spec("matplotlib") else "needs matplotlib (pip install matplotlib, or the extra 'demo')"


def draw(document: dict, folder: Path) -> list[Path]:
    """Every picture for which there are results, as PNG files."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, picture in {"ratios": ratios, "scaling": scaling}.items():
        figure = Figure(figsize=(9, 5), layout="constrained")
        if picture(figure.subplots(), document["results"]):
            written.append(folder / f"{name}.png")
            figure.savefig(written[-1], dpi=130)
    return written


def ratios(axes, results: Sequence[dict]) -> bool:
    """How many times the kernel's time each baseline takes, with the 10th and 90th percentile of the rounds."""
    found = [r for r in results if r["study"] == "shapes" and r.get("ratios")]
    names = list(dict.fromkeys(name for r in found for name in r["ratios"]))
    for i, name in enumerate(names):
        rows = [(row, r["ratios"][name]) for row, r in enumerate(found) if name in r["ratios"]]
        errors = [[x["median"] - x["p10"] for _, x in rows], [x["p90"] - x["median"] for _, x in rows]]
        places, middles = [row + 0.8 * i / len(names) for row, _ in rows], [x["median"] for _, x in rows]
        axes.barh(places, middles, 0.8 / len(names), xerr=errors, label=name)
    axes.axvline(1, color="grey", linestyle=":")
    axes.set_yticks([row + 0.4 for row in range(len(found))], [where(r) for r in found])
    axes.invert_yaxis()
    axes.set(xlabel="time / time of the kernel", title="Against PyTorch, in the same rounds")
    if found:
        axes.legend(frameon=False)
    return bool(found)


def scaling(axes, results: Sequence[dict]) -> bool:
    """Times over the smallest one, by size; dotted: proportional growth."""
    found = [r for r in results if r["study"] == "scaling" and r.get("ratios")]
    for i, r in enumerate(found):
        least = min(r["sizes"].values())
        sizes, grown = zip(*((r["sizes"][name] / least, x["median"]) for name, x in r["ratios"].items()), strict=True)
        axes.plot([1, *sizes], [1, *grown], "-o", color=f"C{i}", label=where(r))
        axes.plot([1, *sizes], [1, *(1 / n if r["axis"] == "threads" else n for n in sizes)], ":", color=f"C{i}")
    axes.set(
        xscale="log", yscale="log", xlabel="size / smallest", ylabel="time / smallest", title="Forward and backward; dotted: proportional"
    )
    if found:
        axes.legend(frameon=False)
    return bool(found)
