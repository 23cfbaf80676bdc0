"""What bench/gpu.py makes of answers: which configurations are wrong, and which only look so."""

from __future__ import annotations

import re

from gpu_process import Answer, last_line

LATE = "left out: time"


def verdict(answer: Answer | None) -> dict:
    """What a configuration's cases say together."""
    if answer is None:
        return {"status": "left out", "cases": [], "error": LATE}
    found = {"cases": answer.results, "error": answer.error, "at": answer.doing}
    statuses = [row["status"] for row in answer.results]
    if answer.fate in ("crashed", "late"):
        return {"status": answer.fate, **found}
    if answer.error:
        return {"status": "failed", **found}
    worst = next((s for s in ("wrong", "failed", "ok", "left out") if s in statuses), "unused")
    return {"status": worst, **found}


def settle(results: list[dict]) -> None:
    """Where the kernels' own choices are wrong too, a configuration is not to blame for it, unless it is the chosen one and
    another configuration of its kernel puts the case right."""
    (chosen,) = (r for r in results if r["kernel"] is None)
    bad = {row["case"] for row in chosen["cases"] if row["status"] in ("wrong", "failed")}
    if chosen["status"] in ("crashed", "late"):
        bad.add(chosen["at"])
    taken = {row["case"]: row.get("launches", {}) for row in chosen["cases"]}
    right = {(r["kernel"], row["case"]) for r in results for row in r["cases"] if row["status"] == "ok"}
    for result in results:
        if result["kernel"] is None or result["status"] not in ("wrong", "failed"):
            continue
        guilty = []
        for row in (row for row in result["cases"] if row["status"] in ("wrong", "failed")):
            mine = taken.get(row["case"], {}).get(result["kernel"]) == result["label"]
            row["guilty"] = row["case"] not in bad or (mine and (result["kernel"], row["case"]) in right)
            guilty.append(row["guilty"])
        if guilty and not any(guilty):
            result["status"] = "undecided"
            result["error"] = "the kernels' own choices are wrong on the same cases"


def deny(results: list[dict], environment: dict) -> list[list]:
    """Rows for the deny-list: architecture, Triton, ptxas, kernel, configuration, reason."""
    device, triton = environment.get("device", {}), environment.get("triton", {})
    where = [device.get("architecture"), triton.get("version"), triton.get("ptxas_version")]
    return [[*where, r["kernel"], r["label"], _reason(r)] for r in results if r["kernel"] and r["status"] in ("wrong", "failed", "crashed")]


def _reason(result: dict) -> str:
    if result["status"] == "crashed":
        return f"{result['at']}: {result['error']}"
    for row in result["cases"]:
        if row.get("guilty", True) and row["status"] == "wrong":
            return f"{row['case']}: {row['worst']['name']} error {row['worst']['error']:.1e}, budget {row['worst']['budget']:.1e}"
        if row.get("guilty", True) and row["status"] == "failed":
            return f"{row['case']}: {row['note']}"
    return str(result["error"])


def refused(results: list[dict]) -> list[str]:
    """Cases that no kernel was asked about, and why."""
    (chosen,) = (r for r in results if r["kernel"] is None)
    return [f"{row['case']}: {row['status']}: {row['note']}" for row in chosen["cases"] if row["status"] in ("not for this case", "failed")]


def pardoned(results: list[dict], environment: dict) -> list[str]:
    """Denied configurations that were right in this run."""
    right = {(r["kernel"], r["label"]) for r in results if r["status"] == "ok"}
    return [f"in the deny-list, but right here: {row}" for row in environment.get("denied", []) if tuple(row[3:5]) in right]


def read_sanitizer(status: int | None, output: str) -> dict:
    """What compute-sanitizer found."""
    summary = re.search(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)", output)
    if status is None:
        return {"status": "late", "error": "took too long"}
    if summary is None or (status not in (0, 99)):
        return {"status": "did not run", "error": last_line(output)}
    found = int(summary[1] or summary[2])
    lines = [line for line in output.splitlines() if line.startswith("=========")]
    return {"status": "ok" if found == 0 and status == 0 else "wrong", "found": found, "lines": [] if found == 0 else lines[:30]}
