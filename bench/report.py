"""What bench/cpu.py says of a run: the targets with their verdicts, and the tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import harness
from base import NO_DIFFERENCE
from contenders import BOTH, DIRECTIONS, FORWARD, LINEAR_SHAPES, MLP_SHAPES, MOMENTUM, PLAIN, RECURRENCE_SHAPES, RETENTIONS
from harness import OTHERS, Watch, table, verdict
from scaling import SCALING_SHAPES

# ----------------------------------------------------------------------------------------------------------- targets


@dataclasses.dataclass(frozen=True)
class Target:
    """A figure that must be reached (``least``) and one that is aimed at (``goal``); ``at_most``: smaller is better."""

    name: str
    case: str
    study: str
    direction: str
    path: tuple[str, ...]
    least: float
    goal: float | None
    at_most: bool = False

    def result(self, results: Sequence[dict], threads: int) -> dict | None:
        """What it is read from."""
        mine = (r for r in results if all(r.get(key) == getattr(self, key) for key in ("study", "case", "direction")))
        return next((r for r in mine if r["threads"] == threads), None)

    def value(self, results: Sequence[dict], threads: int) -> float | None:
        found = self.result(results, threads)
        for key in self.path:
            found = found.get(key) if isinstance(found, dict) else None
        return found

    def verdict(self, value: float | None) -> str:
        return verdict(value, self.least, self.goal, self.at_most)


def targets() -> list[Target]:
    """The table of what the CPU kernels must reach on a machine with AVX-512."""
    found = []
    per_shape = [
        ("against eager", FORWARD, "eager", (4, 6, 2.5), (6, 10, 3.5)),
        ("against torch.compile", FORWARD, "compile", (2.5, 4, 1.7), (3.5, 6, 2.2)),
        ("against eager autograd", BOTH, "eager", (5, 10, 6), (8, 16, 9)),
        ("against the hand-derived backward", BOTH, "derived", (2.5, 3.5, 1.8), (3.5, 5, 2.5)),
    ]
    for name, direction, contender, least, goals in per_shape:
        path = ("ratios", contender, "median")
        limits = zip(LINEAR_SHAPES, least, goals, strict=True)
        found += [Target(f"{direction} {name}", s, "shapes", direction, path, a, b) for s, a, b in limits]
    for direction, least, goal in ((FORWARD, (0.55, 0.50, 0.55), 0.70), (BOTH, (0.45, 0.35, 0.45), 0.60)):
        path = ("share_of_mm", "median")
        names = zip(LINEAR_SHAPES, least, strict=True)
        found += [Target(f"{direction}, share of torch.mm", s, "shapes", direction, path, a, goal) for s, a in names]
    for direction in DIRECTIONS:
        path = ("ratios", "lp 2.5", "median")
        found.append(Target(f"{direction}, generic p / L2", "D64 C64", "bias", direction, path, 1.3, 1.15, at_most=True))
        path = ("ratios", "avx2", "median")
        found.append(Target(f"{direction}, AVX2 / AVX-512", "D64 C64", "capability", direction, path, 1.9, 1.6, at_most=True))
        path = ("ratios", "strong (alpha 0.05..0.2)", "median")
        found.append(Target(f"{direction}, small decays / mild", "D64 C64", "decay", direction, path, 1.1, 1.02, at_most=True))
    for name, key, limit in (("outputs and states", "forward_error", 1e-5), ("gradients", "gradient_error", 1e-4)):
        path = ("parity", "kernel", key)
        found += [Target(f"relative error, {name}", s, "shapes", BOTH, path, limit, None, at_most=True) for s in LINEAR_SHAPES]
    for shape in RECURRENCE_SHAPES:
        for name, limit in [(name, 1.5) for name in RETENTIONS] + [(MOMENTUM, 1.6)]:
            path = ("ratios", name, "median")
            found.append(Target(f"{BOTH}, {name} / {PLAIN}", shape, "recurrence", BOTH, path, limit, None, at_most=True))
    for shape in SCALING_SHAPES:
        case = f"{shape}, tokens"
        found.append(Target("time as a power of the tokens", case, "scaling", BOTH, ("fit", "time"), 1.05, None, at_most=True))
        found.append(Target("saved for the backward / promised", case, "scaling", BOTH, ("saved_over_promised",), 1.0, None, at_most=True))
    return found + _mlp_targets()


def _mlp_targets() -> list[Target]:
    found = []
    per_shape = [
        ("against eager autograd", ("ratios", "eager", "median"), (2.5, 4), (4, 7)),
        ("against titans-pytorch", ("ratios", "titans", "median"), (4, 15), (None, None)),
        ("share of torch.mm", ("share_of_mm", "median"), (0.45, 0.45), (None, None)),
    ]
    for name, path, least, goals in per_shape:
        found += [Target(f"{BOTH} {name}", s, "shapes", BOTH, path, a, b) for s, a, b in zip(MLP_SHAPES, least, goals, strict=True)]
    found += [Target("peak memory / eager", s, "memory", BOTH, ("peak_share",), 0.5, None, at_most=True) for s in MLP_SHAPES]
    for name, key, limit in (("outputs and states", "forward_error", 2e-5), ("gradients", "gradient_error", 5e-4)):
        path = ("parity", "kernel", key)
        found += [Target(f"relative error, {name}", s, "shapes", BOTH, path, limit, None, at_most=True) for s in MLP_SHAPES]
    return found


def judge(results: Sequence[dict], threads: Sequence[int], avx512: bool) -> list[dict]:
    """Every target of the studies that ran with what was measured, per thread count. Doubtful measurements are told, not judged."""
    rows, asked = [], {r["study"] for r in results}
    for target in (t for t in targets() if t.study in asked):
        row = {"name": target.name, "case": target.case, "at_most": target.at_most, "least": target.least, "goal": target.goal}
        row["measured"] = {}
        for n in threads:
            value = target.value(results, n)
            verdict = target.verdict(value)
            if value is None and set(target.path) & set((target.result(results, n) or {}).get("refused", ())):
                verdict = "refused: see notes"
            if value is not None and target.path[0] != "parity":
                if not avx512:
                    verdict = "not judged: no AVX-512 here"
                elif n > 1 and _doubtful(results, target, n):
                    verdict = "not judged: see notes"
            row["measured"][str(n)] = {"value": value, "verdict": verdict}
        rows.append(row)
    return rows


def _doubtful(results: Sequence[dict], target: Target, threads: int) -> bool:
    keys = ("study", "case", "direction")
    same = [r for r in results if r["threads"] == threads and all(r.get(k) == getattr(target, k) for k in keys)]
    return any(r.get("watch", {}).get("flags") for r in same)


# ------------------------------------------------------------------------------------------------------------ report


def _times(values: dict | None, digits: int = 2) -> str:
    if values is None:
        return "-"
    return f"{values['median']:.{digits}f}x [{values['p10']:.{digits}f}, {values['p90']:.{digits}f}]"


def _gate(gate: dict) -> str:
    if "worst" not in gate:
        return "?"
    worst = gate["worst"]
    return f"{'ok' if gate['ok'] else 'RED'} {worst['error']:.0e}/{worst['budget']:.0e}"


def report(document: dict) -> str:
    """The run as markdown."""
    m, lines = document["machine"], ["# miras-kernels on the CPU", ""]
    modified = " with local changes" if document["modified"] else ""
    lines += [
        f"{m['cpu']}, {m['cores']} cores; kernels: {document['capability'] and document['capability']['used']}; "
        + ", ".join(f"{name} {version}" for name, version in document["versions"].items() if version),
        f"{document['date']}, commit {(document['commit'] or 'none')[:12]}{modified}. Ratios: median [10th, 90th percentile] of rounds.",
        "1 thread: process CPU time. More threads: wall time. `docs/benchmarks.md` tells how to read this.",
    ]
    for name, section in _SECTIONS:
        results = [r for r in document["results"] if r["study"] == name]
        text = section(results)
        if text:
            lines += ["", text]
    if document.get("base"):
        lines += ["", _base_section(document["base"], document["results"])]
    notes = _notes(document["results"])
    if document["targets"]:
        lines += ["", "## Targets", "", _target_table(document)]
    if notes:
        lines += ["", "## Notes", "", *notes]
    return "\n".join(lines) + "\n"


def summary(document: dict) -> str:
    """The comparison with PyTorch, and how many targets were met, as the README shows them."""
    m, shapes = document["machine"], [r for r in document["results"] if r["study"] == "shapes"]
    used, date = document["capability"]["used"], document["date"][:10]
    lines = [
        f"{m['cpu']}, {m['cores']} cores, {used}; torch {document['versions']['torch']}; {date}. Ratios are medians of one run in which",
        "all contenders took turns, after each had passed the parity gate: CPU time for one thread, wall time for more.",
        "",
        *(line for text in (_shapes_section(shapes), _mlp_section(shapes)) if text for line in (text.removeprefix("## "), "")),
        _target_line(document),
    ]
    return "\n".join(lines)


def _target_line(document: dict) -> str:
    """How many figures meet their target, and which miss it; what was not measured or is doubtful does not count."""
    judged = [(t, n, m) for t in document["targets"] for n, m in t["measured"].items() if m["verdict"] in ("goal", "met", "NOT met")]
    missed = [
        f"{t['name']}, {t['case']}, {n} thread{'s' if n != '1' else ''} ({m['value']:.3g}, asked {t['least']:g})"
        for t, n, m in judged
        if m["verdict"] == "NOT met"
    ]
    told = f" Not met: {'; '.join(missed)}." if missed else ""
    return f"{len(judged) - len(missed)} of {len(judged)} figures that have a target meet it.{told} `bench/cpu.py --show` lists them all."


def _notes(results: Sequence[dict]) -> list[str]:
    """What is particular about single results, each said once."""
    found: dict[str, list[str]] = {}
    for r in results:
        where = f"{r['study']} {r['case']} {r['direction']}, {r['threads']} thread{'s' if r['threads'] > 1 else ''}"
        for note in [*r["notes"], *(flag for flag in r.get("watch", {}).get("flags", []) if not flag.startswith(OTHERS))]:
            found.setdefault(note, []).append(where)
    several = lambda places: f"{len(places)} measurements, {places[0]} first"
    notes = [f"- {note}: {'; '.join(places) if len(places) < 4 else several(places)}" for note, places in found.items()]
    loads = [r["watch"]["other_load_cores"] for r in results if r.get("watch", {}).get("other_load_cores") is not None]
    busy = [load for load in loads if load > Watch.LOAD]
    if busy:
        notes.append(f"- {OTHERS} {min(busy):.1f} to {max(busy):.1f} cores during {len(busy)} of {len(loads)} measurements")
    return notes


def _target_table(document: dict) -> str:
    threads = [str(n) for n in document["threads"]]
    clocks = [f"{n} thread{'s' if n != '1' else ''} ({harness.clock_for(int(n))[0]})" for n in threads]

    def show(x: float | None) -> str:
        return "-" if x is None else f"{x:.3g}" if x >= 0.01 else f"{x:.1e}"

    rows = []
    for t in document["targets"]:
        bound = "<=" if t["at_most"] else ">="
        cells = [f"{show(t['measured'][n]['value'])} {t['measured'][n]['verdict']}" for n in threads]
        rows.append([t["name"], t["case"], f"{bound} {show(t['least'])}", show(t["goal"]), *cells])
    return table(["target", "case", "at least", "goal", *clocks], rows)


def _shapes_section(results: Sequence[dict]) -> str:
    columns = {"vs eager": "eager", "vs compile (first call)": "compile", "vs hand-derived": "derived"}
    return _comparison("Against PyTorch, float32, L2, scalar decay", columns, [r for r in results if r["case"] not in MLP_SHAPES])


def _mlp_section(results: Sequence[dict]) -> str:
    columns = {"vs eager": "eager", "vs compile (first call)": "compile", "vs titans-pytorch": "titans"}
    title = "The MLP memory, float32, coordinate-wise Huber, slight decay"
    return _comparison(title, columns, [r for r in results if r["case"] in MLP_SHAPES])


def _comparison(title: str, columns: dict[str, str], results: Sequence[dict]) -> str:
    """The kernel's figures and its ratios to contenders, by column."""
    rows = []
    for r in results:
        row = [r["case"], r["direction"], str(r["threads"]), _gate(r["parity"].get("kernel", {}))]
        if "ms" in r:
            took = "" if r.get("compile_seconds") is None else f" ({r['compile_seconds']:.0f} s)"
            row += [f"{r['ms']['kernel']['median']:.2f}", f"{r['gflops']:.0f}", f"{r['share_of_mm']['median']:.2f} of {r['mm_gflops']:.0f}"]
            row += [f"{r['share_of_roofline']['median']:.2f} at {r['gbytes']:.1f} of {r['copy_gbytes']:.0f} GB/s" if "gbytes" in r else "-"]
            row += [_times(r["ratios"].get(name), 1) + (took if name == "compile" else "") for name in columns.values()]
        else:
            row += ["-"] * (4 + len(columns))
        rows.append(row)
    if not rows:
        return ""
    header = ["shape", "direction", "threads", "error/budget", "ms", "GFLOP/s", "of torch.mm", "of the roofline", *columns]
    return f"## {title}\n\n" + _filled_table(header, rows, "of the roofline")


def _variant_section(title: str) -> Callable[[Sequence[dict]], str]:
    def section(results: Sequence[dict]) -> str:
        rows = []
        for r in results:
            base = next((name for name in r.get("ms", ()) if name not in r.get("ratios", {})), None)
            for name, gate in r["parity"].items():
                timed_here = name in r.get("ms", {})
                ms = f"{r['ms'][name]['median']:.2f}" if timed_here else "-"
                times = "1" if name == base and timed_here else _times(r.get("ratios", {}).get(name))
                memory = r.get("saved_mib", {}).get(name)
                rows.append([r["case"], r["direction"], str(r["threads"]), name, _gate(gate), ms, times,
                             "-" if memory is None else f"{memory:.1f}"])  # fmt: skip
            rows += [[r["case"], r["direction"], str(r["threads"]), name, "refused", "-", "-", "-"] for name in r.get("refused", ())]
        if not rows:
            return ""
        header = ["shape", "direction", "threads", "what", "error/budget", "ms", "time against the first", "saved MiB"]
        return f"## {title}\n\n" + _filled_table(header, rows, "saved MiB")

    return section


def _filled_table(header: Sequence[str], rows: Sequence[Sequence[str]], *optional: str) -> str:
    """A table without those optional columns that nobody has anything in."""
    kept = [i for i, name in enumerate(header) if name not in optional or any(row[i] != "-" for row in rows)]
    return table([header[i] for i in kept], [[row[i] for i in kept] for row in rows])


def _scaling_section(results: Sequence[dict]) -> str:
    """Against linear: 1 is a time in proportion to tokens or heads, or in inverse proportion to threads."""
    rows, fits, memory = [], [], ("peak_mib", "saved_mib", "promised_mib")
    for r in results:
        least = min(r["sizes"].values())
        for name, size in r["sizes"].items():
            ideal = least / size if r["axis"] == "threads" else size / least
            row = [r["case"], name, str(r["threads"]), _gate(r["parity"].get(name, {})), "-", "-", "-"]
            if name in r.get("ms", {}):
                row[4] = f"{r['ms'][name]['median']:.2f}"
                row[5] = "1" if size == least else _times({key: x / ideal for key, x in r["ratios"][name].items()})
            if f"mm {name}" in r.get("ms", {}):
                row[6] = f"{r['ms'][f'mm {name}']['median'] / r['ms'][f'mm {least}']['median'] / ideal:.2f}x"
            rows.append(row + [f"{r[key][name]:.1f}" if name in r.get(key, {}) else "-" for key in memory])
        fits += [f"- {r['case']}: {what} grows as {r['axis']}^{power:.2f}" for what, power in r.get("fit", {}).items() if power]
    if not rows:
        return ""
    columns = [f"{key.removesuffix('_mib')} MiB" for key in memory]
    header = ["shape, axis", "size", "threads", "error/budget", "ms", "against linear", "torch.mm, so", *columns]
    text = _filled_table(header, rows, *header[6:])
    return "\n".join(["## Scaling, forward and backward", "", text, *(["", *fits] if fits else [])])


def _base_section(base: dict, results: Sequence[dict]) -> str:
    """This tree against another commit; ratios are times of the other process over that of this tree."""
    span = lambda x: f"{x['median']:.3f}x [{x['low']:.3f}, {x['high']:.3f}]"
    rows = []
    for r in results:
        row = [r["case"], r["direction"], str(r["threads"]), *(_gate(r["parity"].get(side, {})) for side in ("this", "base"))]
        if "verdict" in r:
            row += [f"{r['ms'][side]:.2f}" for side in ("this", "base")] + [span(r["ratios"][side]) for side in ("base", "again")]
            row.append(f"{NO_DIFFERENCE}: not distinguishable" if r["verdict"] == NO_DIFFERENCE else f"this tree is {r['verdict']}")
        else:
            row += ["-"] * 5
        rows.append(row)
    header = ["shape", "direction", "threads", "this: error", "base: error", "this ms", "base ms", "base / this", "this / this", "verdict"]
    launches = max((r.get("launches", 0) for r in results), default=0)
    title = f"## This tree against {base['ref']} ({base['commit'][:12]})"
    told = f"Medians of {launches} launches [least, most]; this / this is the same code in another process."
    return "\n\n".join([title, told, table(header, rows)])


def _memory_section(results: Sequence[dict]) -> str:
    def show(x: float | None) -> str:
        return "-" if x is None else f"{x:.1f}"

    rows = [
        [r["case"], name, show(r["peak_mib"][name]), show(r["saved_mib"][name])]
        for r in results if "peak_mib" in r for name in r["peak_mib"]
    ]  # fmt: skip
    if not rows:
        return ""
    return "## Memory of one forward and backward, beyond the inputs\n\n" + table(
        ["shape", "what", "peak resident MiB", "saved for the backward MiB"], rows
    )


_SECTIONS = (
    ("shapes", _shapes_section),
    ("shapes", _mlp_section),
    ("bias", _variant_section("Biases")),
    ("recurrence", _variant_section("Retention gates, momentum and channel-wise gates")),
    ("capability", _variant_section("Instruction sets")),
    ("decay", _variant_section("Decays")),
    ("checkpoint", _variant_section("Saving every n-th chunk's state")),
    ("dtype", _variant_section("Input types")),
    ("memory", _memory_section),
    ("scaling", _scaling_section),
)
