"""Pictures of a run of bench/cpu.py: ratios, the roofline, scaling. matplotlib is needed for these alone."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from base import NO_DIFFERENCE

SIZE = (8, 4.5)


def missing() -> str | None:
    """Why nothing can be drawn, or None."""
    return None if importlib.util.find_spec("matplotlib") else "needs matplotlib (pip install matplotlib, or the extra 'demo')"


def draw(document: dict, folder: Path) -> list[Path]:
    """Every picture that the results have something for, as PNG files."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, picture in PICTURES.items():
        figure = picture(plt, document["results"])
        if figure is not None:
            written.append(folder / f"{name}.png")
            figure.savefig(written[-1], dpi=130)
            plt.close(figure)
    return written


def ratios(plt, results: Sequence[dict]):
    """How many times the kernel's time each contender takes, with the 10th and 90th percentile of the rounds."""
    found = [r for r in results if r["study"] == "shapes" and r.get("ratios")]
    if not found:
        return None
    names = list(dict.fromkeys(name for r in found for name in r["ratios"]))
    figure, axes = plt.subplots(figsize=(SIZE[0], 1.2 + 0.28 * len(found) * len(names)), layout="constrained")
    thick = 0.8 / len(names)
    for i, name in enumerate(names):
        bars = [(row + i * thick, r["ratios"][name]) for row, r in enumerate(found) if name in r["ratios"]]
        places, spreads = zip(*bars, strict=True)
        middles = [x["median"] for x in spreads]
        errors = [[x["median"] - x["p10"] for x in spreads], [x["p90"] - x["median"] for x in spreads]]
        axes.barh(places, middles, thick, xerr=errors, label=name, error_kw={"linewidth": 1})
    axes.axvline(1, color="grey", linestyle=":")
    axes.set_yticks([row + 0.4 - thick / 2 for row in range(len(found))], [_where(r) for r in found])
    axes.invert_yaxis()
    axes.set(xlabel="time / time of the kernel", title="Against PyTorch, in the same rounds")
    axes.legend(frameon=False)
    return figure


def roofline(plt, results: Sequence[dict]):
    """GFLOP/s over operations per byte, below what the copy and torch.mm reached in the same run."""
    found = [r for r in results if r["study"] == "shapes" and "gbytes" in r]
    if not found:
        return None
    figure, axes = plt.subplots(figsize=SIZE, layout="constrained")
    intensity = {id(r): r["work"]["flops"] / r["work"]["bytes"] for r in found}
    reach = (min(intensity.values()) / 4, max(intensity.values()) * 4)
    for n, color in zip(sorted({r["threads"] for r in found}), ("C0", "C1", "C2", "C3", "C4"), strict=False):
        mine = [r for r in found if r["threads"] == n]
        copy, mm = (max(r[key] for r in mine) for key in ("copy_gbytes", "mm_gflops"))
        corner = mm / copy
        label = f"{n} thread{'s' if n > 1 else ''}: copy {copy:.0f} GB/s, torch.mm {mm:.0f} GFLOP/s"
        line = sorted({min(reach[0], corner), corner, max(reach[1], corner)})
        axes.plot(line, [min(mm, copy * x) for x in line], color=color, label=label)
        for direction, marker in (("forward", "o"), ("forward+backward", "s")):
            points = [(intensity[id(r)], r["gflops"]) for r in mine if r["direction"] == direction]
            if points:
                axes.plot(*zip(*points, strict=True), marker, color=color, label=f"{direction}, {n} thread{'s' if n > 1 else ''}")
        for r in mine:
            axes.annotate(r["case"], (intensity[id(r)], r["gflops"]), fontsize=6, xytext=(4, 3), textcoords="offset points")
    axes.set(xscale="log", yscale="log", xlabel="useful operations per byte, inputs read and results written", ylabel="GFLOP/s")
    axes.legend(frameon=False, fontsize=7)
    return figure


def scaling(plt, results: Sequence[dict]):
    """Time by tokens, heads and threads, the memory by tokens, and what is proportional (dotted)."""
    found = [r for r in results if r["study"] == "scaling" and r.get("ms")]
    if not found:
        return None
    axes_of = [axis for axis in ("tokens", "heads", "threads") if any(r["axis"] == axis for r in found)]
    panels = [*axes_of, *(["memory"] if any(r.get("peak_mib") for r in found) else [])]
    figure, grid = plt.subplots(1, len(panels), figsize=(4 * len(panels), 4), layout="constrained", squeeze=False)
    for panel, axes in zip(panels, grid[0], strict=True):
        for i, r in enumerate(r for r in found if r["axis"] == ("tokens" if panel == "memory" else panel)):
            kinds = (("peak_mib", "-o"), ("saved_mib", "--s"), ("promised_mib", ":")) if panel == "memory" else (("ms", "-o"),)
            for key, style in kinds:
                values = {r["sizes"][n]: x["median"] if key == "ms" else x for n, x in r.get(key, {}).items() if n in r["sizes"]}
                what = key.removesuffix("_mib") if panel == "memory" else f"{r['threads']} threads" if panel == "heads" else ""
                axes.plot(list(values), list(values.values()), style, color=f"C{i}", markersize=4, label=f"{r['case']} {what}".strip())
            if panel != "memory":
                (first, took), *_ = values.items()
                ideal = [took * (first / n if panel == "threads" else n / first) for n in values]
                axes.plot(list(values), ideal, ":", color=f"C{i}")
        axes.set(xscale="log", yscale="log", xlabel="tokens" if panel == "memory" else panel, ylabel="MiB" if panel == "memory" else "ms")
        axes.legend(frameon=False, fontsize=6)
    figure.suptitle("Forward and backward; dotted: in proportion")
    return figure


def base(plt, results: Sequence[dict]):
    """The other commit's time over this tree's, beside the same of this tree's own second process."""
    found = [r for r in results if r["study"] == "base" and "verdict" in r]
    if not found:
        return None
    figure, axes = plt.subplots(figsize=(SIZE[0], 1.5 + 0.5 * len(found)), layout="constrained")
    for offset, side, label in ((-0.15, "base", "base / this"), (0.15, "again", "this / this")):
        spreads = [r["ratios"][side] for r in found]
        middles = [x["median"] for x in spreads]
        errors = [[x["median"] - x["low"] for x in spreads], [x["high"] - x["median"] for x in spreads]]
        axes.errorbar(middles, [row + offset for row in range(len(found))], xerr=errors, fmt="o", capsize=3, label=label)
    axes.axvline(1, color="grey", linestyle=":")
    names = [_where(r) + ("" if r["verdict"] == NO_DIFFERENCE else f"\n{r['verdict']}") for r in found]
    axes.set_yticks(range(len(found)), names)
    axes.invert_yaxis()
    axes.set(xlabel="time / time of this tree: median and extremes of the launches", title="This tree against another commit")
    axes.legend(frameon=False)
    return figure


def _where(r: dict) -> str:
    return f"{r['case']} {r['direction']}, {r['threads']} thread{'s' if r['threads'] > 1 else ''}"


PICTURES = {"ratios": ratios, "roofline": roofline, "scaling": scaling, "base": base}
