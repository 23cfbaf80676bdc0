"""What bench/decode.py says of a run: the targets with their verdicts, and the tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from decode_model import CONTEXTS, MODEL_CASE, MODELS
from harness import table, verdict


@dataclasses.dataclass(frozen=True)
class Target:
    """A ratio of two contenders' times that must be reached (``least``), and one that is aimed at (``goal``)."""

    name: str
    study: str
    case: str
    over: str  # the time of which contender ...
    under: str  # ... divided by that of which
    least: float
    goal: float | None = None
    at_most: bool = False

    def value(self, results: Sequence[dict], threads: int) -> float | None:
        for r in results:
            if (r["study"], r["case"], r["threads"]) == (self.study, self.case, threads) and "us" in r:
                return r["us"][self.over]["median"] / r["us"][self.under]["median"]
        return None

    def verdict(self, value: float | None) -> str:
        return verdict(value, self.least, self.goal, self.at_most)


TARGETS = (
    Target("linear memory, eager steps / step", "linear", "B8 H8 D64", "eager", "step", 6),
    Target("linear memory, step / W.mul_(1.0)", "linear", "B8 H8 D64", "step", "touch", 1.5, 1.0, at_most=True),
    Target("linear memory, eager steps / step", "linear", "B1 H1 D64", "eager", "step", 12),
    *(Target("MLP memory, step / state read and written once", "mlp", size, "step", "touch", 2.0, at_most=True)
      for size in ("B1 H1 D64", "B8 H8 D64")),
    *(Target(f"a model's token after 64k / after 1k, {memory}", "model", MODEL_CASE, f"{memory} 64k", f"{memory} 1k", 1.1, at_most=True)
      for memory, preset in MODELS.items() if preset),
)  # fmt: skip


def judge(results: Sequence[dict], threads: Sequence[int]) -> list[dict]:
    """Every target with what was measured, per thread count. Doubtful measurements are told, not judged."""
    rows = []
    for target in TARGETS:
        row = {key: getattr(target, key) for key in ("name", "case", "least", "goal", "at_most")} | {"measured": {}}
        for n in threads:
            value = target.value(results, n)
            verdict = target.verdict(value)
            if value is not None and n > 1 and _doubtful(results, target, n):
                verdict = "not judged: see notes"
            row["measured"][str(n)] = {"value": value, "verdict": verdict}
        rows.append(row)
    return rows


def _doubtful(results: Sequence[dict], target: Target, threads: int) -> bool:
    same = [r for r in results if (r["study"], r["case"], r["threads"]) == (target.study, target.case, threads)]
    return any(r.get("watch", {}).get("flags") for r in same)


def report(document: dict) -> str:
    """The run as markdown."""
    m, modified = document["machine"], " with local changes" if document["modified"] else ""
    lines = [
        "# Decoding on the CPU", "",
        f"{m['cpu']}, {m['cores']} cores; " + ", ".join(f"{name} {v}" for name, v in document["versions"].items() if v),
        f"{document['date']}, commit {(document['commit'] or 'none')[:12]}{modified}.",
        "Microseconds a token, over whole chunks, median of rounds; one thread: CPU time, more: wall time. `docs/benchmarks.md` explains.",
    ]  # fmt: skip
    for name, title, section in _SECTIONS:
        results = [r for r in document["results"] if r["study"] == name]
        if results:
            lines += ["", f"## {title}", "", section(results)]
    if document["targets"]:
        lines += ["", "## Targets", "", _targets(document)]
    notes = [
        f"- {r['study']} {r['case']}, {r['threads']} threads: {note}"
        for r in document["results"]
        for note in [*r["notes"], *r.get("watch", {}).get("flags", [])]
    ]
    if notes:
        lines += ["", "## Notes", "", *notes]
    return "\n".join(lines) + "\n"


def _gate(r: dict) -> str:
    return f"{'ok' if r['parity']['ok'] else 'RED'} {r['parity']['error']:.0e}/{r['parity']['budget']:.0e}"


def _us(r: dict, name: str) -> str:
    return f"{r['us'][name]['median']:.1f}" if name in r.get("us", {}) else "-"


def _places(r: dict) -> list[str]:
    """The token that closes a chunk, and the slowest with its number."""
    if "us" not in r:
        return ["-", "-"]
    return [f"{r['closing_us']:.1f}", f"{r['slowest_us']:.1f} (token {r['slowest_token']})"]


def _times(r: dict, name: str) -> str:
    return f"{r['ratios'][name]['median']:.2f}x" if name in r.get("ratios", {}) else "-"


def _memory(results: Sequence[dict]) -> str:
    shown = {"eager": "eager / step", "baddbmm": "bare products / step", "touch": "W.mul_(1.0) / step"}
    rows = [
        [r["case"], str(r["threads"]), _gate(r), _us(r, "step"), *_places(r), _us(r, "function"),
         f"{r['tokens_per_second']['step']:,.0f}" if "us" in r else "-", *(_times(r, name) for name in shown)]
        for r in results
    ]  # fmt: skip
    return table(
        ["size", "threads", "error/budget", "step us", "closing us", "slowest us", "function us", "tokens/s", *shown.values()], rows
    )


def _attention(results: Sequence[dict]) -> str:
    rows = []
    for r in results:
        state = f"{r['state_mib']['linear']:.2f} / {r['state_mib']['mlp']:.2f}" if "state_mib" in r else "-"
        rows.append([r["case"], str(r["threads"]), _us(r, "linear"), _us(r, "mlp"), *(_us(r, c) for c in CONTEXTS), state])
    return table(["size", "threads", "linear us", "mlp us", *(f"attention {c} us" for c in CONTEXTS), "states MiB"], rows)


def _model(results: Sequence[dict]) -> str:
    rows = []
    for r in results:
        for name, preset in MODELS.items():
            labels = [f"{name} {context}" for context in CONTEXTS]
            sizes = [f"{r['cache_bytes'][x] / 2**20:.2f}" if "cache_bytes" in r else "-" for x in labels]
            rows.append([preset or "attention", str(r["threads"]), _gate(r), *(_us(r, x) for x in labels), *sizes])
    columns = [f"{what} {context}" for what in ("us after", "MiB after") for context in CONTEXTS]
    return table(["layers", "threads", "error/budget", *columns], rows)


_SECTIONS = (
    ("linear", "The linear memory", _memory),
    ("mlp", "The MLP memory", _memory),
    ("attention", "Against attention with its cache", _attention),
    ("model", "A whole model: " + MODEL_CASE, _model),
)


def _targets(document: dict) -> str:
    rows = []
    for t in document["targets"]:
        cells = [t["measured"][str(n)] for n in document["threads"]]
        show = [f"{'-' if c['value'] is None else format(c['value'], '.3g')} {c['verdict']}" for c in cells]
        rows.append(
            [
                t["name"],
                t["case"],
                f"{'<=' if t['at_most'] else '>='} {t['least']:g}",
                "-" if t["goal"] is None else f"{t['goal']:g}",
                *show,
            ]
        )
    return table(["target", "size", "at least", "goal", *(f"{n} thread{'s' if n > 1 else ''}" for n in document["threads"])], rows)
