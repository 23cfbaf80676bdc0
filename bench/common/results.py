"""What a run is written down as: where it ran, its results as JSON, targets with verdicts, and tables in markdown."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from .processes import ROOT


def machine() -> dict:
    """The machine, without names that identify its owner."""
    found = {"model name": platform.processor() or platform.machine(), "flags": ""}
    with contextlib.suppress(OSError):
        found |= dict(re.findall(r"^(model name|flags)\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE))
    flags = [flag for flag in found["flags"].split() if flag.startswith(("avx", "amx", "fma"))]
    return {"device": "cpu", "cpu": found["model name"], "cores": os.cpu_count(), "vector_flags": flags, "system": platform.system(),
            "architecture": platform.machine()}  # fmt: skip


def versions(*distributions: str) -> dict[str, str | None]:
    found = {"python": platform.python_version(), **dict.fromkeys(distributions)}
    for name in distributions:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def heading(program: str) -> dict:
    """What every document begins with: the program, the date, the commit measured, and whether the files differ from it."""

    def git(*arguments: str) -> str:
        if shutil.which("git") is None:
            return ""
        return subprocess.run(["git", "-C", str(ROOT), *arguments], check=False, capture_output=True, text=True).stdout.strip()

    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return {"program": program, "date": date, "commit": git("rev-parse", "HEAD"), "modified": bool(git("status", "--porcelain"))}


def origin(document: dict) -> str:
    """Date and commit of a document."""
    return f"{document['date']}, commit {(document['commit'] or 'none')[:12]}{' with local changes' if document['modified'] else ''}"


def write_json(document: dict, path: Path) -> None:
    """The results, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".part")
    draft.write_text(json.dumps(_plain(document), indent=1, allow_nan=False) + "\n")
    draft.replace(path)


def _plain(x: object) -> object:
    """JSON has no infinities: they become null."""
    if isinstance(x, dict):
        return {str(key): _plain(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [_plain(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


@dataclasses.dataclass(frozen=True)
class Target:
    """What ``path`` leads to in a result, divided by what ``under`` leads to: it must reach ``least`` and should reach ``goal``.
    ``at_most``: smaller is better."""

    name: str
    study: str
    case: str
    direction: str | None
    path: tuple[str, ...]
    least: float
    goal: float | None = None
    at_most: bool = False
    under: tuple[str, ...] = ()

    def value(self, result: dict) -> float | None:
        follow = lambda path: functools.reduce(lambda found, key: found.get(key) if isinstance(found, dict) else None, path, result)
        over, under = follow(self.path), follow(self.under) if self.under else 1.0
        return over / under if isinstance(over, (int, float)) and isinstance(under, (int, float)) and under else None

    def verdict(self, value: float | None) -> str:
        """One of "goal", "met", "NOT met" and "not measured"."""
        if value is None:
            return "not measured"
        reached = (lambda limit: value <= limit) if self.at_most else (lambda limit: value >= limit)
        if self.goal is not None and reached(self.goal):
            return "goal"
        return "met" if reached(self.least) else "NOT met"


def judge(targets: Iterable[Target], results: Sequence[dict], columns: dict[str, dict], doubt: Callable = lambda *_: None) -> list[dict]:
    """Every target of the studies that ran, with its figure and verdict per column. ``columns``: what their results have besides study,
    case and direction, such as ``{"threads": 2}``. ``doubt(target, result)``: why a figure is not judged, or None."""
    rows, asked = [], {r["study"] for r in results}
    for target in (t for t in targets if t.study in asked):
        row = {"name": target.name, "case": target.case, "at_most": target.at_most, "least": target.least, "goal": target.goal}
        row["measured"] = {}
        for column, more in columns.items():
            wanted = {"study": target.study, "case": target.case, "direction": target.direction, **more}
            result = next((r for r in results if all(r.get(key) == value for key, value in wanted.items())), {})
            value = target.value(result)
            verdict = target.verdict(value)
            if value is None and set(target.path) & set(result.get("refused", ())):
                verdict = "refused: see notes"
            elif value is not None and (reason := doubt(target, result)):
                verdict = f"not judged: {reason}"
            row["measured"][column] = {"value": value, "verdict": verdict}
        rows.append(row)
    return rows


def table(header: Sequence[str], rows: Sequence[Sequence[str]], optional: Sequence[str] = ()) -> str:
    """A markdown table, padded so that it reads well as plain text too, less those ``optional`` columns that are empty ("-")."""
    kept = [i for i, name in enumerate(header) if name not in optional or any(row[i] != "-" for row in rows)]
    lines = [[line[i] for i in kept] for line in (header, *rows)]
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(kept))]
    text = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in lines]
    return "\n".join([text[0], "| " + " | ".join("-" * w for w in widths) + " |", *text[1:]])


def number(x: float | None, digits: int | None = None) -> str:
    """A figure: three digits, or so many after the point."""
    if x is None:
        return "-"
    return f"{x:.{digits}f}" if digits is not None else f"{x:.3g}" if abs(x) >= 0.01 or x == 0 else f"{x:.1e}"


def span(values: dict | None, digits: int = 2, unit: str = "x") -> str:
    """A median with the 10th and 90th percentile."""
    if values is None:
        return "-"
    low, high = (values[key] for key in (("p10", "p90") if "p10" in values else ("low", "high")))
    return f"{values['median']:.{digits}f}{unit} [{low:.{digits}f}, {high:.{digits}f}]"


def gate(verdict: dict | None) -> str:
    """A parity verdict: the tensor that came closest to its budget."""
    if not verdict:
        return "?"
    worst = verdict.get("worst", verdict)
    error = "not finite" if worst["error"] is None else f"{worst['error']:.0e}"
    return f"{'ok' if verdict['ok'] else 'RED'} {error}/{worst['budget']:.0e}"


def target_table(document: dict, headers: dict[str, str]) -> str:
    """Targets with figures and verdicts; ``headers`` are those of the columns."""
    rows = []
    for t in document["targets"]:
        cells = [f"{number(m['value'])} {m['verdict']}" for m in (t["measured"][column] for column in headers)]
        rows.append([t["name"], t["case"], f"{'<=' if t['at_most'] else '>='} {number(t['least'])}", number(t["goal"]), *cells])
    return table(["target", "case", "at least", "goal", *headers.values()], rows)


def notes(results: Iterable[dict], where: Callable[[dict], str]) -> list[str]:
    """What is particular about single results, each said once."""
    found: dict[str, list[str]] = {}
    for r in results:
        for text in r.get("notes", ()):
            found.setdefault(text, []).append(where(r))
    several = lambda places: f"{len(places)} measurements, {places[0]} first"
    return [f"{text}: {'; '.join(places) if len(places) < 4 else several(places)}" for text, places in found.items()]


def document_text(title: str, head: Sequence[str], sections: Iterable[tuple[str, str]]) -> str:
    """A report in markdown; sections without text are left out."""
    lines = [f"# {title}", "", *head]
    for name, text in sections:
        lines += ["", f"## {name}", "", text] if text else []
    return "\n".join(lines) + "\n"
