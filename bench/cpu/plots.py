"""The README's picture of a run of bench.cpu. Only this needs matplotlib."""

from __future__ import annotations

from pathlib import Path

from .report import where

#: titles of the baselines, in the order of the bars
BASELINES = {"eager": "eager PyTorch", "compile": "torch.compile", "derived": "PyTorch, hand-derived backward", "titans": "titans-pytorch"}


def draw(document: dict, folder: Path) -> Path | None:
    """Times of forward and backward of the baselines over the kernel's, with the 10th and 90th percentile of the rounds, as a PNG file."""
    from matplotlib.figure import Figure

    found = [r for r in document["results"] if r["study"] == "shapes" and r.get("ratios") and r["direction"] == "forward+backward"]
    if not found:
        return None
    figure = Figure(figsize=(10, 0.7 * len(found) + 1.2), layout="constrained")
    axes, names = figure.subplots(), [name for name in BASELINES if any(name in r["ratios"] for r in found)]
    for i, name in enumerate(names):
        rows = [(row + 0.8 * (i + 0.5) / len(names), r["ratios"][name]) for row, r in enumerate(found) if name in r["ratios"]]
        places, middles = [place for place, _ in rows], [x["median"] for _, x in rows]
        errors = [[x["median"] - x["p10"] for _, x in rows], [x["p90"] - x["median"] for _, x in rows]]
        axes.barh(places, middles, 0.8 / len(names), xerr=errors, label=BASELINES[name], error_kw={"linewidth": 1})
        for place, x in rows:
            axes.annotate(f"{x['median']:.1f}x", (x["p90"], place), (4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.axvline(1, color="grey", linestyle=":")
    axes.set_yticks([row + 0.4 for row in range(len(found))], [where(r).replace(" forward+backward", "") for r in found])
    axes.invert_yaxis()
    title = f"Forward and backward: {document['machine']['cpu']}, {document['capability']['used']}"
    axes.set(xlabel="time / time of the kernel", title=title, xmargin=0.08)
    axes.legend(frameon=False, loc="upper right")
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "ratios.png", dpi=110)
    return folder / "ratios.png"
