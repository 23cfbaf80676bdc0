"""What bench/gpu.py says of a run: the targets with their verdicts, and the tables."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import gpu_peers
from gpu_plan import (
    BASE,
    BOTH,
    DIRECTIONS,
    EAGER,
    FORWARD,
    MLP_BASE,
    MLP_TARGET,
    MOMENTUM,
    NEEDS_DELTA,
    OURS,
    PARTS,
    PLAIN,
    RECURRENCE_SHAPES,
    RETENTIONS,
    SHAPES,
    TARGET,
    Shape,
    floors_ms,
    io_bytes,
    is_ours,
    recurrences,
    traffic_bytes,
)  # fmt: skip
from harness import table

#: the parts that take times of contenders
TIMED = ("bench", "mlp", "recurrence")
#: biases without a kink, where rounding cannot decide which slope an error gets
SMOOTH = tuple(name for name in OURS if name not in NEEDS_DELTA)

# ------------------------------------------------------------------------------------------------------------ lookup


def _results(document: dict, part: str) -> list[dict]:
    return document.get(part, {}).get("results", [])


def _times(document: dict, shape: str, direction: str, part: str | None = None) -> dict:
    """The comparison at a shape: the measurement with the most contenders."""
    part = part or ("mlp" if SHAPES[shape].hidden else "bench")
    found = [r for r in _results(document, part) if (r["shape"], r["direction"]) == (shape, direction)]
    return max(found, key=lambda r: len(r["ms"]), default={})


def _ms(result: dict, name: str) -> float | None:
    """Milliseconds of a call: the rounds' median, or those of the one call of who is too slow for rounds."""
    return result["ms"][name]["median"] if name in result.get("ms", {}) else result.get("once_ms", {}).get(name)


def _ratio(result: dict, over: str, under: str) -> float | None:
    a, b = _ms(result, over), _ms(result, under)
    return None if a is None or b is None else a / b


def floors(document: dict, shape: str, direction: str, bias: str = BASE) -> dict[str, float] | None:
    ceilings = document.get("ceilings", {})
    if "copy_bytes_per_s" not in ceilings:
        return None
    return floors_ms(SHAPES[shape], direction, bias, ceilings)


# ----------------------------------------------------------------------------------------------------------- targets


class Target(NamedTuple):
    """What was measured for a target. Without a limit it is for information."""

    name: str
    value: float | None
    limit: float | None
    at_most: bool  # smaller is better
    refused: bool = False  # by the backend


def judge(document: dict) -> list[dict]:
    """Every target with what was measured: "met", "NOT met", "for information", "refused" or "not measured"."""
    targets = [*_targets(document), *_mlp_targets(document), *_recurrence_targets(document)]
    return [{"name": t.name, "value": t.value, "limit": t.limit, "at_most": t.at_most, "verdict": _verdict(t)} for t in targets]


def _verdict(t: Target) -> str:
    if t.value is None:
        return "refused: see notes" if t.refused else "not measured"
    if t.limit is None:
        return "for information"
    return "met" if (t.value <= t.limit if t.at_most else t.value >= t.limit) else "NOT met"


def _targets(document: dict) -> Iterator[Target]:
    """Of the linear memory."""
    row = {direction: _times(document, TARGET, direction) for direction in DIRECTIONS}
    rivals = [name for name, peer in gpu_peers.PEERS.items() if peer.delta_rule and name in row[BOTH].get("ms", {})]
    fastest = min((_ms(row[BOTH], name) for name in rivals), default=None)
    for bias in ("huber_coordinate", "lp 3"):
        mine = _ms(row[BOTH], bias)
        value = None if fastest is None or mine is None else fastest / mine
        yield Target(f"{BOTH}, {bias}: time of the fastest delta rule of the same state / ours", value, 1.0, False)
    for direction in DIRECTIONS:
        for bias in OURS[1:]:
            yield Target(f"{direction}, {bias} / {BASE}", _ratio(row[direction], bias, BASE), 1.25, True)
    floor, mine = floors(document, TARGET, FORWARD), _ms(row[FORWARD], BASE)
    for kind, limit in (("traffic", 0.5), ("memory", None)):
        bytes_of = "memory traffic of the kernels" if kind == "traffic" else "inputs and outputs alone"
        value = None if floor is None or mine is None else floor[kind] / mine
        yield Target(f"{FORWARD}, {BASE}: share of the floor ({bytes_of})", value, limit, False)
    first = document.get("bench", {}).get("first", {}).get("first_s", {})
    yield Target("first forward and backward, nothing compiled: seconds", max(first.values(), default=None), 20.0, True)
    smooth, kinked = ([gate for name, gate in _gates(document, "bench") if (name in NEEDS_DELTA) == kink] for kink in (False, True))
    yield from _error_targets("smooth biases", smooth)
    yield from _error_targets("Huber", kinked)
    yield from _error_targets("Huber away from its kinks", [gate["short"] for gate in kinked])


def _mlp_targets(document: dict) -> Iterator[Target]:
    """Of the MLP memory, at its own target row."""
    row, floor = _times(document, MLP_TARGET, BOTH), floors(document, MLP_TARGET, BOTH, MLP_BASE)
    mine = _ms(row, MLP_BASE)
    value = None if floor is None or mine is None else floor["arithmetic"] / mine
    yield Target(f"MLP {BOTH}, {MLP_BASE}: share of the bf16 matrix product's rate", value, 0.25, False)
    with_titans = {shape: _ratio(_times(document, shape, BOTH), gpu_peers.TITANS, MLP_BASE) for shape in SHAPES if SHAPES[shape].hidden}
    shape = next((shape for shape, ratio in with_titans.items() if ratio is not None), MLP_TARGET)
    yield Target(f"MLP {BOTH}, {MLP_BASE}: time of {gpu_peers.TITANS} / ours ({shape})", with_titans[shape], 10.0, False)
    yield Target(f"MLP {BOTH}, {MLP_BASE}: time of {EAGER} / ours", _ratio(row, EAGER, MLP_BASE), None, False)
    yield Target(f"MLP {BOTH}, {MLP_BASE}: peak memory in GiB, of the device's", *_peak(document, MLP_TARGET, MLP_BASE), True)
    yield from _error_targets("MLP", [gate for _, gate in _gates(document, "mlp")], limits=(None, None), against_eager=None)


def _peak(document: dict, shape: str, name: str) -> tuple[float | None, float | None]:
    """Peak GiB of a forward and backward, infinite where it failed; and what the device has."""
    found = [r for r in _results(document, "memory") if (r["shape"], r["direction"]) == (shape, BOTH)]
    peaks = [r["peak_mib"][name] / 1024 for r in found if name in r.get("peak_mib", {})]
    failed = [math.inf for r in found if name in r.get("failed", {})]
    return next(iter(peaks + failed), None), document.get("environment", {}).get("device", {}).get("memory_gib")


def _recurrence_targets(document: dict) -> Iterator[Target]:
    """Of gates and momentum against the plain recurrence."""
    for shape in RECURRENCE_SHAPES:
        row, memory = _times(document, shape, BOTH, "recurrence"), SHAPES[shape].memory
        for name in recurrences(memory)[1:]:
            limit = 1.5 if name in RETENTIONS else 1.6 if name == MOMENTUM else None
            what = f"{'MLP ' if memory == 'mlp' else ''}{BOTH}, {name} / {PLAIN} ({shape})"
            yield Target(what, _ratio(row, name, PLAIN), limit, True, name in row.get("refused", {}))


def _gates(document: dict, *parts: str) -> list[tuple[str, dict]]:
    return [pair for part in parts for r in _results(document, part) for pair in r.get("gates", {}).items()]


def _error_targets(kind: str, gates: list[dict], limits=(0.005, 0.008), against_eager: float | None = 1.5) -> Iterator[Target]:
    for key, limit in zip(("output_error", "gradient_error"), limits, strict=True):
        what = f"relative RMS {key.replace('_', ' ')}, {kind}, worst of all shapes"
        yield Target(what, max((_or_infinite(g[key]) for g in gates), default=None), limit, True)
        ratios = [_or_infinite(g[key]) / g[f"{key}_eager"] for g in gates if g[f"{key}_eager"]]
        yield Target(f"{what} / that of PyTorch in bfloat16", max(ratios, default=None), against_eager, True)


def _or_infinite(x: float | None) -> float:
    """JSON has no infinities: they are null there."""
    return math.inf if x is None else x


def is_red(document: dict) -> bool:
    """Whether something was wrong: a test, a configuration, a gate, or a part of this program."""
    parts = [part for part in document.values() if isinstance(part, dict)]
    gates = [gate["ok"] for _, gate in _gates(document, *TIMED, "decode")]
    statuses = [r["status"] for part in ("parity", "sanitizer") for r in _results(document, part)]
    return (
        any("error" in part for part in parts) or not all(gates) or any(s in ("wrong", "failed", "crashed", "undecided") for s in statuses)
        or document.get("tests", {}).get("status") == "failed"
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ report


def report(document: dict) -> str:
    """The run as markdown."""
    lines = ["# miras-kernels on the GPU", "", *_head(document)]
    if document["settings"]["toy"]:
        lines += ["", "A dry run: the sizes are toys, and the times mean nothing."]
    for section in (_target_section, _tests, _parity, _sanitizer, _ceilings, _bench, _kernels, _decode, _memory, _tuning, _notes):
        text = section(document)
        if text:
            lines += ["", text]
    return "\n".join(lines) + "\n"


def summary(document: dict) -> str:
    """The device, the comparison at every shape and the targets, as the README shows them."""
    return "\n".join([*_head(document)[:2], "", _bench(document).split("\n\n", 1)[-1], "", _target_table(document)])


def _head(document: dict) -> list[str]:
    e = document.get("environment", {})
    if "device" not in e:
        return [f"No environment: {e.get('error')}"]
    device, triton, smi = e["device"], e["triton"], e.get("smi")
    size = f", {device['multiprocessors']} multiprocessors, {device['memory_gib']:.0f} GiB" if "multiprocessors" in device else ""
    driver = f", driver {smi['driver_version']}, {smi['clocks.sm']} of {smi['clocks.max.sm']} (idle)" if isinstance(smi, dict) else ""
    versions = ", ".join(f"{name} {version}" for name, version in e["versions"].items() if version)
    modified = " with local changes" if document.get("modified") else ""
    return [
        f"{device['name']} ({device['architecture']}{size}{driver}); Triton {triton.get('version')} with ptxas "
        f"{triton.get('ptxas_version')}; CUDA {device.get('cuda')}, cuDNN {device.get('cudnn')}.",
        f"{document['date']}, commit {(document.get('commit') or 'none')[:12]}{modified}; {versions}.",
        f"ptxas: {triton.get('ptxas') or triton.get('missing') or triton.get('ptxas_unknown')}. `bench/README.md` tells how to read this.",
    ]


def _target_section(document: dict) -> str:
    return "## Targets\n\n" + _target_table(document) if document.get("targets") else ""


def _target_table(document: dict) -> str:
    rows = []
    for t in document.get("targets", []):
        limit = "-" if t["limit"] is None else f"{'<=' if t['at_most'] else '>='} {t['limit']:g}"
        rows.append([t["name"], limit, "-" if t["value"] is None else f"{t['value']:.3g}", t["verdict"]])
    return table([f"target ({TARGET}; MLP: {MLP_TARGET}; bf16)", "limit", "measured", "verdict"], rows)


def _tests(document: dict) -> str:
    t = document.get("tests")
    if not t:
        return ""
    said = t.get("last_line") or t.get("error") or "; ".join(t.get("notes", []))
    return "\n".join(["## Tests", "", f"{t.get('status')}: {said}", *t.get("failures", [])])


def _parity(document: dict) -> str:
    results = _results(document, "parity")
    if not results:
        return ""
    rows = []
    for r in results:
        worst = max(
            (row["worst"] for row in r["cases"] if "worst" in row), key=lambda w: _or_infinite(w["error"]) / w["budget"], default=None
        )
        done = sum(row["status"] == "ok" for row in r["cases"])
        shown = "-" if worst is None else f"{worst['name']} {_number(worst['error'])}/{worst['budget']:.0e}"
        rows.append([r["kernel"] or "as chosen", r["label"] or "-", r["status"], f"{done} of {len(r['cases'])}", shown])
    head = ["kernel", "configuration", "verdict", "cases right", "worst error/budget"]
    text = "## Configurations against float64\n\n" + table(head, rows)
    deny = document["parity"]["deny"]
    if not deny:
        return text
    return "\n".join([text, "", "For the deny-list:", "", "```python", *(f"{tuple(row)!r}," for row in deny), "```"])


def _sanitizer(document: dict) -> str:
    rows = [[r["tool"], ", ".join(r["kernels"]) or f"{r.get('memory', 'linear')}, every bias, as chosen", r["status"],
             str(r.get("found", r.get("error", "-")))]
            for r in _results(document, "sanitizer")]  # fmt: skip
    return "## compute-sanitizer\n\n" + table(["tool", "what", "verdict", "found"], rows) if rows else ""


def _ceilings(document: dict) -> str:
    c = document.get("ceilings", {})
    if "copy_bytes_per_s" not in c:
        return ""
    return (
        f"## Ceilings\n\nA copy of {c['copy_bytes'] / 2**31:.1f} GiB moves {c['copy_bytes_per_s'] / 1e12:.2f} TB/s (bytes read plus bytes "
        f"written); a bf16 matrix product of {c['matmul_size']}^3 runs at {c['matmul_flops_per_s'] / 1e12:.0f} TFLOP/s."
    )


def _bench(document: dict) -> str:
    order = lambda r: (list(SHAPES).index(r["shape"]), DIRECTIONS.index(r["direction"]))
    sections = [_one_shape(document, r) for part in TIMED for r in sorted(_results(document, part), key=order)]
    return "\n\n".join(["## Times", *sections]) if sections else ""


def _one_shape(document: dict, result: dict) -> str:
    shape, direction = result["shape"], result["direction"]
    base, toy, rows = result["base"], document["settings"]["toy"], []
    once = {name: {"median": ms} for name, ms in result.get("once_ms", {}).items()}
    for name, ms in sorted({**result["ms"], **once}.items(), key=lambda pair: pair[1]["median"]):
        floor = floors(document, shape, direction, name) if is_ours(name) and not toy else None
        shares = [f"{100 * floor[kind] / ms['median']:.0f} %" if floor else "-" for kind in ("roofline", "traffic")]
        if name in once:
            took, times = f"{ms['median']:.0f} (once)", f"{ms['median'] / _ms(result, base):.1f}" if base else "-"
        else:
            took, times = _spread(ms, 3), "1" if name == base else _spread(result.get("ratios", {}).get(name), 2)
        gate, first = result["gates"].get(name), result["first_s"].get(name)
        errors = f"{_number(gate['output_error'])}, {_number(gate['gradient_error'])}" if gate else "-"
        rows.append([f"**{name}**" if is_ours(name) else name, took, times, *shares, errors, "-" if first is None else f"{first:.1f}"])
    rows += [[f"**{name}**", "refused", *["-"] * 5] for name in result.get("refused", {})]
    head = ["who", "ms", f"time / {base or '-'}", "of the roofline", "of the traffic", "error: output, gradient", "first call s"]
    sizes = "" if toy else _sizes(SHAPES[shape], direction)
    return f"### {shape} {direction}{sizes}\n\n" + table(head, rows)


def _sizes(shape: Shape, direction: str) -> str:
    return f" ({io_bytes(shape, direction) / 1e9:.2f} GB in and out, {traffic_bytes(shape, direction) / 1e9:.2f} GB of traffic)"


def _kernels(document: dict) -> str:
    rows = [[r["shape"], r["direction"], name, kernel, f"{ms:.3f}"] for part in TIMED for r in _results(document, part)
            for name, kernels in r.get("kernels_ms", {}).items() for kernel, ms in kernels.items()]  # fmt: skip
    return "## Time by kernel\n\n" + table(["shape", "direction", "who", "kernel", "ms per call"], rows) if rows else ""


def _decode(document: dict) -> str:
    """Microseconds of a token."""
    copy, rows = document.get("ceilings", {}).get("copy_bytes_per_s"), []
    for r in _results(document, "decode"):
        for name, ms in sorted(r["ms"].items(), key=lambda pair: pair[1]["median"]):
            gate, micro = r["gates"].get(name.split(",")[0]), {key: 1e3 * x for key, x in ms.items()}
            share = f"{100 * r['bytes'] / copy / (1e-3 * ms['median']):.0f} %" if copy and not document["settings"]["toy"] else "-"
            error = f"{_number(gate['error'])}/{gate['budget']:.0e}" if gate else "-"
            rows.append([r["shape"], name, _spread(micro, 1), _spread(r.get("ratios", {}).get(name), 2), share, error])
    head = ["size", "who", "us a token", f"time / {EAGER}", "of the copy's rate", "worst error/budget"]
    return "## Decoding, mean over a chunk\n\n" + table(head, rows) if rows else ""


def _memory(document: dict) -> str:
    tables = []
    for memory in ("linear", "mlp"):
        results = [r for r in _results(document, "memory") if "peak_mib" in r and SHAPES[r["shape"]].memory == memory]
        names = list(dict.fromkeys(name for r in results for name in r["peak_mib"]))
        rows = [[r["shape"], r["direction"], *(f"{r['peak_mib'][n]:.0f}" if n in r["peak_mib"] else "-" for n in names)] for r in results]
        tables += [table(["shape", "direction", *names], rows)] if rows else []
    return "\n\n".join(["## Peak memory beyond the inputs, MiB", *tables]) if tables else ""


def _tuning(document: dict) -> str:
    rows = []
    for r in _results(document, "tuning"):
        times = ", ".join(f"{label} {ms['median']:.3f}" for label, ms in sorted(r["ms"].items(), key=lambda pair: pair[1]["median"]))
        loss = r["chosen_over_fastest"]
        rows.append([r["shape"], r["kernel"], str(r["chosen"]), str(r["fastest"]), "-" if loss is None else f"{loss:.3f}", times])
    head = ["shape", "kernel", "chosen", "fastest", "chosen / fastest", "ms of the whole call"]
    return "## Configurations by time\n\n" + table(head, rows) if rows else ""


def _notes(document: dict) -> str:
    """What is particular about single results, each said once."""
    found: dict[str, list[str]] = {}
    for part in PARTS:
        section = document.get(part, {})
        said = [*section.get("notes", []), *section.get("left_out", []), *section.get("warm", {}).get("notes", [])]
        for text in [*said, *([section["error"]] if "error" in section else [])]:
            found.setdefault(text, []).append(part)
        for r in section.get("results", []):
            where = " ".join([part, *(str(r[key]) for key in ("shape", "kernel", "direction") if r.get(key))])
            for text in r.get("notes", []):
                found.setdefault(text, []).append(where)
    several = lambda places: f"{len(places)} times, {places[0]} first"
    lines = [f"{text}: {'; '.join(places) if len(places) < 4 else several(places)}" for text, places in found.items()]
    lines = [*document.get("notes", []), *lines]
    return "\n".join(["## Notes", "", *(f"- {line}" for line in lines)]) if lines else ""


def _spread(x: dict | None, digits: int) -> str:
    return "-" if x is None else f"{x['median']:.{digits}f} [{x['p10']:.{digits}f}, {x['p90']:.{digits}f}]"


def _number(x: float | None) -> str:
    return "not finite" if x is None else f"{x:.1e}"
