"""What a run of bench.gpu reached: targets, tables, and what is missing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..common.implementations import BOTH, DIRECTIONS, MOMENTUM, PLAIN, retentions
from ..common.results import Target, document_text, gate, notes, number, origin, span, table, target_table
from .chips import CHIPS
from .counts import modelled
from .plan import DECODING, FLA, MLP_SMALLEST, MLP_TARGET, RECURRENCE_SHAPES, SHAPES, TARGET, TITANS, is_ours

#: statuses that make a run red
RED = ("wrong", "failed", "lost")


def targets() -> Iterator[Target]:
    """At the target rows, in bfloat16."""
    ms, ratio = lambda name: ("ms", name, "median"), lambda name: ("ratios", name, "median")
    linear, mlp = SHAPES[TARGET].biases, SHAPES[MLP_TARGET].biases[0]
    for bias in ("huber_coordinate", "lp 3"):
        for rival in FLA:
            yield Target(f"{bias}: time of {rival} / ours", "times", TARGET, BOTH, ms(rival), 1.0, under=ms(bias))
    for direction in DIRECTIONS:
        for bias in linear[1:]:
            yield Target(f"{direction}, {bias} / {linear[0]}", "times", TARGET, direction, ratio(bias), 1.25, at_most=True)
    for bias in linear:
        for key, limit in (("output_error", 0.005), ("gradient_error", 0.008)):
            name, path = f"relative RMS {key.replace('_', ' ')}, {bias}", ("parity", bias, key)
            yield Target(name, "times", TARGET, BOTH, path, limit, at_most=True)
            yield Target(f"{name} / PyTorch's", "times", TARGET, BOTH, path, 1.5, at_most=True, under=("parity", bias, f"{key}_eager"))
    yield Target(f"{BOTH}: share of the bf16 matrix product", "times", MLP_TARGET, BOTH, ("share_of_mm", "median"), 0.25)
    for shape in (MLP_TARGET, MLP_SMALLEST):
        yield Target(f"{BOTH}: time of {TITANS} / ours", "times", shape, BOTH, ms(TITANS), 10.0, under=ms(mlp))
    yield Target(f"{BOTH}: share of the device's memory", "times", MLP_TARGET, BOTH, ("peak_share", mlp), 1.0, at_most=True)
    for shape in RECURRENCE_SHAPES:
        for name, limit in [*((name, 1.5) for name in retentions()), (MOMENTUM, 1.6)]:
            yield Target(f"{BOTH}, {name} / {PLAIN}", "recurrence", shape, BOTH, ratio(name), limit, at_most=True)


def is_red(document: dict) -> bool:
    """Whether something was wrong, as opposed to slow or missing."""
    gates = [verdict["ok"] for r in document["results"] for verdict in r.get("parity", {}).values()]
    return "error" in document or not all(gates) or any(r.get("status") in RED for r in document["results"])


def report(document: dict) -> str:
    """The run as markdown."""
    e = document["environment"]
    device = ", ".join(f"{key.replace('_', ' ')} {number(x) if isinstance(x, float) else x}" for key, x in e.get("device", {}).items())
    versions = ", ".join(f"{name} {version}" for name, version in e.get("versions", {}).items() if version)
    head = [f"{device}.", f"{origin(document)}; {versions}; see `bench/README.md` on how to read this."]
    head += [f"NOT RUN: {document['error']}"] if "error" in document else []
    head += ["A smoke test: the sizes are tiny, and the times mean nothing."] if document["settings"]["smoke"] else []
    found = document["results"]
    of = lambda *studies: [r for r in found if r["study"] in studies]
    timed = sorted(of("times", "recurrence"), key=lambda r: list(SHAPES).index(r["case"]))
    lost = [r | {"notes": [f"{r['status']}: {r['detail']}"]} for r in found if r.get("status") in RED and "detail" in r]
    listed = lambda lines: "\n".join(f"- {line}" for line in lines)
    sections = [
        ("Targets", target_table(document, {"device": "measured"}) if document["targets"] else ""),
        ("Checks", _checks(of("repeat", "parity", "sanitizer"))),
        *((f"{r['study']}: {r['case']} {r['direction']}", _times(r)) for r in timed if "ms" in r),
        *((f"Measured against modelled: {r['case']} {r['direction']}", _modelled(r, e)) for r in timed if "kernel_us" in r),
        ("Decoding, mean over a chunk", _decoding(of("decoding"))),
        ("Configurations by time", _tuning(of("tuning"))),
        ("Not reached", listed(document["left_out"])),
        ("Notes", listed(notes(found + lost, _where))),
    ]
    return document_text(f"miras-kernels on a GPU: {document['command']}", head, sections)


def _where(r: dict) -> str:
    return " ".join(filter(None, (r["study"], r["case"], r.get("kernel"), r.get("direction"))))


def _checks(found: Sequence[dict]) -> str:
    """The checks that went wrong or did not happen in full; the others in one line per study."""
    lines, rows = [], []
    for study in dict.fromkeys(r["study"] for r in found):
        counts: dict[str, int] = {}
        for r in (r for r in found if r["study"] == study):
            counts[r["status"]] = counts.get(r["status"], 0) + 1
            if r["status"] != "ok":
                rows.append([study, r["case"], r["status"], r["detail"]])
        lines.append(f"- {study}: {', '.join(f'{n} {status}' for status, n in counts.items())}")
    return "\n".join([*lines, *(["", table(["study", "what", "status", "detail"], rows)] if rows else [])])


def _times(r: dict) -> str:
    rows, base = [], r["base"]
    for name, ms in sorted(r["ms"].items(), key=lambda pair: pair[1]["median"]):
        ratio = span(r["ratios"].get(name) or {key: x / r["ms"][base]["median"] for key, x in ms.items()}) if base else "-"
        verdict = r["parity"].get(name)
        errors = f"{number(verdict['output_error'])}, {number(verdict['gradient_error'])}" if verdict else "-"
        rows.append([f"**{name}**" if is_ours(name) else name, span(ms, 3, ""), ratio, errors, number(r["first_s"].get(name), 1),
                     number(r.get("peak_mib", {}).get(name), 0)])  # fmt: skip
    rows += [[f"**{name}**", "refused", "-", "-", "-", "-"] for name in r["refused"]]
    text = table(["implementation", "ms", f"time / {base or '-'}", "error: output, gradient", "first call s", "peak MiB"], rows)
    if base:
        text += (
            f"\n\n{base}: {r['gflops'] / 1e3:.1f} of {r['mm_gflops'] / 1e3:.0f} TFLOP/s, {r['gbytes']:.0f} of {r['copy_gbytes']:.0f} GB/s;"
        )
        text += f" share of the matrix product {r['share_of_mm']['median']:.2f}, of the roofline {r['share_of_roofline']['median']:.2f}."
    return text


def _modelled(r: dict, environment: dict) -> str:
    """Kernels by measured time, beside the model's (counts.py), where the table of counts has the call and chips.py the device."""
    chip = next((name for name in CHIPS if name in environment["device"]["name"]), None)
    expected = modelled(SHAPES[r["case"]], r["base"], r["direction"], chip, environment["versions"].get("triton")) if chip else {}
    rows = [[kernel, f"{us:.0f}", f"{expected[kernel]:.0f}" if kernel in expected else "-",
             number(us / expected[kernel]) if kernel in expected else "-"]
            for kernel, us in sorted(r["kernel_us"].items(), key=lambda pair: -pair[1])]  # fmt: skip
    return table(["kernel", "measured us", "modelled us", "measured / modelled"], rows)


def _decoding(found: Sequence[dict]) -> str:
    """Microseconds of a token."""
    rows = []
    for r in sorted((r for r in found if "ms" in r), key=lambda r: list(DECODING).index(r["case"])):
        for name, ms in sorted(r["ms"].items(), key=lambda pair: pair[1]["median"]):
            verdict = r["parity"].get(name.split(",")[0])
            micro = span({key: 1e3 * x for key, x in ms.items()}, 1, "")
            rows.append([r["case"], name, micro, span(r["ratios"].get(name)), gate(verdict) if verdict else "-"])
    return table(["size", "implementation", "us a token", "time / eager", "error/budget"], rows) if rows else ""


def _tuning(found: Sequence[dict]) -> str:
    rows = []
    for r in (r for r in found if r.get("fastest")):
        every = ", ".join(f"{label} {ms['median']:.3f}" for label, ms in sorted(r["ms"].items(), key=lambda pair: pair[1]["median"]))
        rows.append([r["case"], r["kernel"], str(r["chosen"]), r["fastest"], number(r["chosen_over_fastest"], 3), every])
    return table(["shape", "kernel", "chosen", "fastest", "chosen / fastest", "ms of the whole call"], rows) if rows else ""
