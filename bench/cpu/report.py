"""A run of bench.cpu as tables in markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..common.results import document_text, gate, notes, number, origin, span, table, target_table
from ..common.timing import clock_for
from . import stages
from .base import NO_DIFFERENCE
from .cases import MLP_SHAPES
from .targets import summary_line
from .watch import OTHERS, Watch


def report(document: dict, title: str, sections: Sequence[tuple]) -> str:
    """The whole run; ``sections``: study, title, and what makes the text of its results."""
    m, capability = document["machine"], document.get("capability")
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items() if version)
    head = [
        f"{m['cpu']}, {m['cores']} cores; kernels: {capability and capability['used']}; {versions}",
        f"{origin(document)}. Ratios: median [10th, 90th percentile] of rounds.",
        "1 thread: process CPU time. More threads: wall time. See `docs/benchmarks.md` on how to read this.",
    ]
    texts = [(name, section([r for r in document["results"] if r["study"] == study])) for study, name, section in sections]
    texts += [_base_section(document["base"], document["results"])] if document.get("base") else []
    headers = {str(n): f"{n} thread{'s' if n != 1 else ''} ({clock_for(n)[0]})" for n in document["threads"]}
    texts.append(("Targets", target_table(document, headers) if document["targets"] else ""))
    return document_text(title, head, [*texts, ("Notes", "\n".join(f"- {line}" for line in _notes(document["results"])))])


def gates(result: dict) -> list[dict]:
    """The parity verdicts of a result: one, or several by name."""
    return [result["parity"]] if "error" in result["parity"] else list(result["parity"].values())


def summary(document: dict, sections: Sequence[tuple]) -> str:
    """The comparison with PyTorch, and how many targets were met, as the README shows them."""
    m, shapes = document["machine"], [r for r in document["results"] if r["study"] == "shapes"]
    tables = [line for _, title, section in sections[:2] if (text := section(shapes)) for line in (title, "", text, "")]
    return "\n".join([
        f"{m['cpu']}, {m['cores']} cores, {document['capability']['used']}; torch {document['versions']['torch']}; "
        f"{document['date'][:10]}. Ratios are medians of one run in which",
        "all implementations took turns, after each had passed the parity gate: CPU time for one thread, wall time for more.",
        "", *tables, summary_line(document),
    ])  # fmt: skip


def _notes(results: Sequence[dict]) -> list[str]:
    flagged = [{**r, "notes": r["notes"] + [f for f in r.get("watch", {}).get("flags", []) if not f.startswith(OTHERS)]} for r in results]
    lines = notes(flagged, lambda r: f"{r['study']} {where(r)}")
    loads = [r["watch"]["other_load_cores"] for r in results if r.get("watch", {}).get("other_load_cores") is not None]
    busy = [load for load in loads if load > Watch.LOAD]
    if busy:
        lines.append(f"{OTHERS} {min(busy):.1f} to {max(busy):.1f} cores during {len(busy)} of {len(loads)} measurements")
    return lines


def where(r: dict) -> str:
    """Case, direction and threads of a result."""
    return f"{r['case']} {r.get('direction', '')}".strip() + f", {r['threads']} thread{'s' if r['threads'] > 1 else ''}"


def _comparison(columns: dict[str, str], mlp: bool) -> Callable[[Sequence[dict]], str]:
    """The kernel's figures and its ratios to the baselines, by column."""

    def section(results: Sequence[dict]) -> str:
        rows = []
        for r in (r for r in results if (r["case"] in MLP_SHAPES) == mlp):
            row = [r["case"], r["direction"], str(r["threads"]), gate(r["parity"].get("kernel"))]
            if "ms" in r:
                took = "" if r.get("compile_seconds") is None else f" ({r['compile_seconds']:.0f} s)"
                row += [f"{r['ms']['kernel']['median']:.2f}", f"{r['gflops']:.0f}"]
                row += [f"{r['share_of_mm']['median']:.2f} of {r['mm_gflops']:.0f}"]
                peak = "share_of_peak" in r and "{best:.2f} ({median:.2f})".format_map(r["share_of_peak"]) + f" of {r['peak_gflops']:.0f}"
                row += [peak or "-"]
                roofline = "gbytes" in r and f"{r['share_of_roofline']['median']:.2f} at {r['gbytes']:.1f} of {r['copy_gbytes']:.0f} GB/s"
                row += [roofline or "-"]
                row += [span(r["ratios"].get(name), 1) + (took if name == "compile" else "") for name in columns.values()]
            else:
                row += ["-"] * (5 + len(columns))
            rows.append(row)
        optional = ["of the peak", "of the roofline"]
        header = ["shape", "direction", "threads", "error/budget", "ms", "GFLOP/s", "of torch.mm", *optional, *columns]
        return table(header, rows, optional) if rows else ""

    return section


def _variants(results: Sequence[dict]) -> str:
    """The kernel with itself."""
    rows = []
    for r in results:
        base = next((name for name in r.get("ms", ()) if name not in r.get("ratios", {})), None)
        for name, verdict in r["parity"].items():
            timed_here = name in r.get("ms", {})
            ms = f"{r['ms'][name]['median']:.{2 if r['ms'][name]['median'] >= 1 else 4}f}" if timed_here else "-"
            times = "1" if name == base and timed_here else span(r.get("ratios", {}).get(name))
            memory = number(r.get("saved_mib", {}).get(name), 1)
            rows.append([r["case"], r["direction"], str(r["threads"]), name, gate(verdict), ms, times, memory])
        rows += [[r["case"], r["direction"], str(r["threads"]), name, "refused", "-", "-", "-"] for name in r.get("refused", ())]
    header = ["shape", "direction", "threads", "what", "error/budget", "ms", "time against the first", "saved MiB"]
    return table(header, rows, ["saved MiB"]) if rows else ""


def _memory(results: Sequence[dict]) -> str:
    rows = [[r["case"], name, number(r["peak_mib"][name], 1), number(r["saved_mib"][name], 1)]
            for r in results if "peak_mib" in r for name in r["peak_mib"]]  # fmt: skip
    return table(["shape", "what", "peak resident MiB", "saved for the backward MiB"], rows) if rows else ""


def _scaling(results: Sequence[dict]) -> str:
    """Against linear: 1 is a time in proportion to tokens or heads, or in inverse proportion to threads."""
    rows, fits, memory = [], [], ("peak_mib", "saved_mib", "promised_mib")
    for r in results:
        least = min(r["sizes"].values())
        for name, size in r["sizes"].items():
            ideal = least / size if r["axis"] in ("threads", "one head", "coupled head") else size / least
            row = [r["case"], name, str(r["threads"]), gate(r["parity"].get(name)), "-", "-", "-"]
            if name in r.get("ms", {}):
                row[4] = f"{r['ms'][name]['median']:.2f}"
                row[5] = "1" if size == least else span({key: x / ideal for key, x in r["ratios"][name].items()})
            if f"mm {name}" in r.get("ms", {}):
                row[6] = f"{r['ms'][f'mm {name}']['median'] / r['ms'][f'mm {least}']['median'] / ideal:.2f}x"
            rows.append(row + [number(r.get(key, {}).get(name), 1) for key in memory])
        fits += [f"- {r['case']}: {what} grows as {r['axis']}^{power:.2f}" for what, power in r.get("fit", {}).items() if power]
    header = ["shape, axis", "size", "threads", "error/budget", "ms", "against linear", "torch.mm", *(f"{key[:-4]} MiB" for key in memory)]
    return "\n".join([table(header, rows, header[6:]), *(["", *fits] if fits else [])]) if rows else ""


def _base_section(base: dict, results: Sequence[dict]) -> tuple[str, str]:
    """This tree against another commit; ratios are times of the other process over that of this tree."""
    rows = []
    for r in results:
        row = [r["case"], r["direction"], str(r["threads"]), *(gate(r["parity"].get(side)) for side in ("this", "base"))]
        if "verdict" in r:
            row += [f"{r['ms'][side]:.2f}" for side in ("this", "base")] + [span(r["ratios"][side], 3) for side in ("base", "again")]
            row.append(f"{NO_DIFFERENCE}: not distinguishable" if r["verdict"] == NO_DIFFERENCE else f"this tree is {r['verdict']}")
        else:
            row += ["-"] * 5
        rows.append(row)
    header = ["shape", "direction", "threads", "this: error", "base: error", "this ms", "base ms", "base / this", "this / this", "verdict"]
    launches = max((r.get("launches", 0) for r in results), default=0)
    caption = f"Medians of {launches} launches [least, most]; this / this is the same code in another process."
    return f"This tree against {base['ref']} ({base['commit'][:12]})", caption + "\n\n" + table(header, rows)


_COLUMNS = {"vs eager": "eager", "vs compile (first call)": "compile"}
SECTIONS = (
    ("shapes", "Against PyTorch, float32, L2, scalar decay", _comparison({**_COLUMNS, "vs hand-derived": "derived"}, mlp=False)),
    ("shapes", "The MLP memory, float32, coordinate-wise Huber, slight decay",
     _comparison({**_COLUMNS, "vs titans-pytorch": "titans"}, mlp=True)),
    ("bias", "Biases", _variants),
    ("recurrence", "Retention gates, momentum and channel-wise gates", _variants),
    ("capability", "Instruction sets", _variants),
    ("decay", "Decays", _variants),
    ("checkpoint", "A checkpoint every n chunks", _variants),
    ("dtype", "Input types", _variants),
    ("delta rule", "The delta rule: exact steps of one token", _variants),
    ("hybrid", "A model in Qwen3.5's shape", _variants),
    ("wrappers", "A model of transformers and its memory blocks alone", _variants),
    ("memory", "Memory of one forward and backward, beyond the inputs", _memory),
    ("scaling", "Scaling, forward and backward", _scaling),
    ("stages", "The stages of a chunk, the least ticks of the rounds", stages.section),
)  # fmt: skip
