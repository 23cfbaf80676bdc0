"""Decoding on this CPU: a token's latency in both memories, parity first, against PyTorch and against attention with its cache.

    python -m bench.cpu.decode                     everything, markdown on stdout; options as those of bench.cpu
    python -m bench.cpu.decode --quick             a few minutes: one thread, short measurements, contexts up to 8k
    python -m bench.cpu.decode --only linear,mlp   some studies; --list names them

Times are microseconds per token, means over whole chunks, because the tokens of a chunk do not cost the same.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

from ..common.results import Target, gate, table
from . import decode_studies, program
from .decode_model import MODEL_CASE, MODELS, study_model
from .decode_studies import CONTEXTS, SIZES


def targets() -> Iterator[Target]:
    us = lambda name: ("us", name, "median")
    eager, touch = "eager steps / step", "state read and written once"
    yield Target(f"linear memory, {eager}", "linear", "B8 H8 D64", None, us("eager"), 6, under=us("step"))
    yield Target("linear memory, step / W.mul_(1.0)", "linear", "B8 H8 D64", None, us("step"), 1.5, 1.0, True, us("touch"))
    yield Target(f"linear memory, {eager}", "linear", "B1 H1 D64", None, us("eager"), 12, under=us("step"))
    for size in ("B1 H1 D64", "B8 H8 D64"):
        yield Target(f"MLP memory, step / {touch}", "mlp", size, None, us("step"), 2.0, None, True, us("touch"))
    for memory in (name for name, preset in MODELS.items() if preset):
        name = f"a model's token after 64k / after 1k, {memory}"
        yield Target(name, "model", MODEL_CASE, None, us(f"{memory} 64k"), 1.1, None, True, us(f"{memory} 1k"))


def _us(r: dict, name: str) -> str:
    return f"{r['us'][name]['median']:.1f}" if name in r.get("us", {}) else "-"


def _memory(found: Sequence[dict]) -> str:
    """A step beside the last token of a chunk, the slowest one with its number, and the baselines."""
    shown, rows = {"eager": "eager / step", "baddbmm": "bare products / step", "touch": "W.mul_(1.0) / step"}, []
    for r in found:
        row = [r["case"], str(r["threads"]), gate(r["parity"]), _us(r, "step"), "-", "-", _us(r, "function"), "-"]
        if "us" in r:
            row[4], row[5] = f"{r['closing_us']:.1f}", f"{r['slowest_us']:.1f} (token {r['slowest_token']})"
            row[7] = f"{r['tokens_per_second']['step']:,.0f}"
        rows.append(row + [f"{r['ratios'][name]['median']:.2f}x" if name in r.get("ratios", {}) else "-" for name in shown])
    header = ["size", "threads", "error/budget", "step us", "closing us", "slowest us", "function us", "tokens/s", *shown.values()]
    return table(header, rows)


def _attention(found: Sequence[dict]) -> str:
    rows = []
    for r in found:
        state = f"{r['state_mib']['linear']:.2f} / {r['state_mib']['mlp']:.2f}" if "state_mib" in r else "-"
        rows.append([r["case"], str(r["threads"]), _us(r, "linear"), _us(r, "mlp"), *(_us(r, c) for c in CONTEXTS), state])
    return table(["size", "threads", "linear us", "mlp us", *(f"attention {c} us" for c in CONTEXTS), "states MiB"], rows)


def _model(found: Sequence[dict]) -> str:
    rows = []
    for r in found:
        for name, preset in MODELS.items():
            labels = [f"{name} {context}" for context in CONTEXTS]
            sizes = [f"{r['cache_bytes'][x] / 2**20:.2f}" if "cache_bytes" in r else "-" for x in labels]
            rows.append([preset or "attention", str(r["threads"]), gate(r["parity"]), *(_us(r, x) for x in labels), *sizes])
    columns = [f"{what} {context}" for what in ("us after", "MiB after") for context in CONTEXTS]
    return table(["layers", "threads", "error/budget", *columns], rows)


PROGRAM = program.Program(
    module="bench.cpu.decode", title="Decoding on the CPU", studies={**decode_studies.STUDIES, "model": study_model}, helpers={},
    quick=(*decode_studies.STUDIES, "model"), shapes=tuple(SIZES), targets=targets, seconds=(5.0, 0.7), min_rounds=(9, 3),
    jobs=lambda only, shapes, threads, _: [
        (study, shape, n) for n in threads for study in only for shape in ([MODEL_CASE] if study == "model" else shapes)
    ],
    sections=(
        ("linear", "The linear memory", _memory),
        ("mlp", "The MLP memory", _memory),
        ("attention", "Against attention with its cache", _attention),
        ("model", "A whole model: " + MODEL_CASE, _model),
    ),
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(program.main(PROGRAM))
