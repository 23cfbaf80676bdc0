"""The studies of bench/cpu.py: each yields results, in a measuring process of its own with so many threads."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable, Iterator

import harness
from contenders import (
    BOTH,
    DIRECTIONS,
    PLAIN,
    Settings,
    agreement,
    compiled,
    derived,
    eager,
    is_derived,
    kernel,
    least_work,
    make_case,
    parity,
    recurrence,
    recurrences,
    refusal,
    titans,
)
from harness import COPY_BYTES, MM_FLOPS, Watch, interleave, ratio, spread, timed
from process import Server, start

#: contenders that show what the machine does: arithmetic and memory
YARDSTICKS = ("mm", "copy")


def measure(
    head: dict, samplers: dict, base: str, gates: dict, threads: int, settings: Settings, work: dict | None = None, helpers=()
) -> dict:
    """Time the contenders whose gate is green, in one interleaved run; without a green base nothing is timed.

    Args:
        head: what the result begins with: study, case, direction, perhaps who was refused by the backend and why ...
        samplers: contenders by name, see :func:`harness.interleave`.
        base: the contender to which ratios refer: ``ratios[x] = time of x / time of base``.
        gates: parity by contender; one without a gate of its own is not checked here.
        work: what a call of ``base`` has to do, of :func:`contenders.least_work`; with ``mm`` and ``copy`` among the contenders it adds
            GFLOP/s, GB/s and the shares of what these two yardsticks reach.
        helpers: processes in which contenders run.
    """
    result = {**head, "threads": threads, "clock": harness.clock_for(threads)[0], "parity": gates, "notes": []}
    red = [name for name, gate in gates.items() if not gate["ok"]]
    result["notes"] += [f"{name}: parity is red, not timed ({gates[name]['worst']})" for name in red]
    result["notes"] += [f"{name}: refused: {reason}" for name, reason in head.get("refused", {}).items()]
    if not gates.get(base, {"ok": False})["ok"]:
        return result
    samplers = {name: sampler for name, sampler in samplers.items() if name not in red}
    with Watch(threads, helpers) as watch:
        times = interleave(samplers, settings.seconds, settings.min_rounds)
    milliseconds = {name: [1e3 * t for t in ts] for name, ts in times.items()}
    result["rounds"] = len(times[base])
    result["ms"] = {name: spread(ts) for name, ts in milliseconds.items()}
    result["ratios"] = {name: ratio(ts, times[base]) for name, ts in times.items() if name not in (base, *YARDSTICKS)}
    if work is not None:
        result |= _shares(work, times, base)
    return {**result, "watch": watch.report()}


def _shares(work: dict, times: dict[str, list[float]], base: str) -> dict:
    """What a contender does in a second, and its share of what the machine did in the same rounds.

    The roofline is the time that nobody can undercut: the operations at the speed of ``torch.mm`` or the bytes at that of the copy,
    whichever takes longer.
    """
    took, mm, copy = (spread(times[name])["median"] for name in (base, *YARDSTICKS))
    rounds = list(zip(*(times[name] for name in (base, *YARDSTICKS)), strict=True))
    arithmetic, memory = work["flops"] / MM_FLOPS, work["bytes"] / (2 * COPY_BYTES)
    return {
        "work": work, "gflops": work["flops"] / took / 1e9, "mm_gflops": MM_FLOPS / mm / 1e9,
        "gbytes": work["bytes"] / took / 1e9, "copy_gbytes": 2 * COPY_BYTES / copy / 1e9,
        "share_of_mm": spread([arithmetic * mm / t for t, mm, _ in rounds]),
        "share_of_roofline": spread([max(arithmetic * mm, memory * copy) / t for t, mm, copy in rounds]),
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- studies
# Each yields results; it runs in a process of its own with `threads` threads.


def study_shapes(shape: str, threads: int, settings: Settings) -> Iterator[dict]:
    """The kernel against eager PyTorch, torch.compile and the hand-derived backward, or (MLP) titans-pytorch."""
    clock = harness.clock_for(threads)[1]
    case = make_case(shape, settings)
    gates = {"kernel": parity(case, settings.backend)}
    inputs = case.draw(_float32())
    for direction in DIRECTIONS:
        head = {"study": "shapes", "case": shape, "direction": direction}
        if not gates["kernel"]["ok"]:
            yield measure(head, {}, "kernel", gates, threads, settings)
            continue
        runs = {
            "kernel": kernel(inputs, settings.backend, direction),
            "eager": eager(inputs, direction),
        }
        if is_derived(inputs):
            runs["derived"] = derived(inputs, direction)
        notes, seconds = [], None
        if settings.compile_seconds:
            try:
                runs["compile"], seconds = _compile(compiled(inputs, direction), settings.compile_seconds)
            except harness.OverBudget:
                notes.append(f"torch.compile given up after {settings.compile_seconds:.0f} s of compilation")
            except Exception as error:
                notes.append(f"torch.compile failed: {type(error).__name__}: {str(error).splitlines()[0]}")
        else:
            notes.append("torch.compile left out, as asked")
        expected = runs["kernel"]()
        for name in [name for name in runs if name != "kernel"]:
            difference = agreement(runs[name](), expected)
            if not difference < 1e-3:
                notes.append(f"{name}: computes something else (relative difference {difference:.1e}), not timed")
                del runs[name]
        if case.memory == "mlp":
            if settings.quick:
                notes.append("titans-pytorch left out, as asked")
            else:
                try:
                    runs["titans"] = titans(inputs, direction)
                    notes.append("titans: the same sizes, another recurrence; its results are not compared")
                except ImportError as error:
                    notes.append(f"titans-pytorch cannot be imported: {error}")
        runs |= {"mm": harness.matrix_product(), "copy": harness.memory_copy()}
        samplers = {name: timed(run, clock) for name, run in runs.items()}
        result = measure(head, samplers, "kernel", gates, threads, settings, least_work(inputs)[direction])
        yield {**result, "notes": result["notes"] + notes, "compile_seconds": seconds}


def _compile(run: Callable[[], tuple], seconds: float) -> tuple[Callable[[], tuple], float]:
    """Compile within a budget: the function and how long its first call took."""
    import time

    import torch

    torch.compiler.reset()
    began = time.perf_counter()
    with harness.time_limit(seconds):
        run()
    return run, time.perf_counter() - began


def _float32():
    import torch

    return torch.float32


def _variants(study: str, shape: str, threads: int, settings: Settings, cases: dict, base: str, directions=DIRECTIONS) -> Iterator[dict]:
    """The kernel alone over cases that differ in one property, by name; ratios to the one named ``base``."""
    clock = harness.clock_for(threads)[1]
    drawn = {name: case.draw(dtype) for name, (case, dtype) in cases.items()}
    asked = {name: refusal(inputs, settings.backend) for name, inputs in drawn.items()}
    refused = {name: reason for name, reason in asked.items() if reason is not None}
    served = [name for name in cases if name not in refused]
    gates = {name: parity(cases[name][0], settings.backend, cases[name][1]) for name in served}
    for direction in directions:
        head = {"study": study, "case": shape, "direction": direction, "refused": refused}
        samplers = {name: timed(kernel(drawn[name], settings.backend, direction), clock) for name in served}
        yield measure(head, samplers, base, gates, threads, settings)


def study_bias(shape: str, threads: int, settings: Settings) -> Iterator[dict]:
    """Every bias of the table, and a p without a kernel of its own, against L2."""
    from miras_kernels import Lp
    from miras_kernels.tables import biases

    label = lambda row: f"{row.name} {row.p:g}" if isinstance(row, Lp) else row.name
    rows = {label(row): row for row in (*biases.TABLE.values(), Lp(2.5))}
    rows = {"l2": rows.pop("l2"), **rows}
    if settings.quick:
        rows = {name: rows[name] for name in ("l2", "huber_switch", "lp 2.5")}
    cases = {name: (make_case(shape, settings, bias=bias), _float32()) for name, bias in rows.items()}
    return _variants("bias", shape, threads, settings, cases, "l2")


def study_recurrence(shape: str, threads: int, settings: Settings) -> Iterator[dict]:
    """Every retention gate, momentum and channel-wise gates against plain decay."""
    names = recurrences(make_case(shape, settings).memory)
    cases = {name: (make_case(shape, settings, **recurrence(name)), _float32()) for name in names}
    return _variants("recurrence", shape, threads, settings, cases, PLAIN, (BOTH,))


def study_decay(shape: str, threads: int, settings: Settings) -> Iterator[dict]:
    """Decays that underflow within a chunk against mild ones: denormal numbers must not be met."""
    kinds = {"mild (alpha 0.82..1)": "scalar", "none": "none", "strong (alpha 0.05..0.2)": "strong", "extreme": "extreme"}
    cases = {name: (make_case(shape, settings, decay=kind), _float32()) for name, kind in kinds.items()}
    return _variants("decay", shape, threads, settings, cases, "mild (alpha 0.82..1)")


def study_dtype(shape: str, threads: int, settings: Settings) -> Iterator[dict]:
    """bfloat16 inputs against float32 ones; arithmetic and state are float32 in both."""
    import torch

    case = make_case(shape, settings)
    return _variants("dtype", shape, threads, settings, {"float32": (case, torch.float32), "bfloat16": (case, torch.bfloat16)}, "float32")


def study_checkpoint(shape: str, threads: int, settings: Settings) -> Iterator[dict]:
    """Time and memory when only every n-th chunk's state is saved for the backward."""
    import miras_kernels

    clock = harness.clock_for(threads)[1]
    case = make_case(shape, settings)
    inputs, samplers, gates, saved, first = case.draw(_float32()), {}, {}, {}, ()
    for n in (1, 2, 4, 8):
        name, run = f"every {n}", kernel(inputs, settings.backend, BOTH, checkpoint_every=n)
        if n == 1:
            with miras_kernels.override(checkpoint_every=1):
                gates[name] = parity(case, settings.backend)
            first = run()
        else:
            difference = agreement(run(), first)
            worst = {"tensor": "gradients against every 1", "error": difference, "budget": 1e-6}
            gates[name] = {"ok": difference <= worst["budget"], "worst": worst}
        samplers[name], saved[name] = timed(run, clock), saved_bytes(run, inputs) / 2**20
    head = {"study": "checkpoint", "case": shape, "direction": BOTH, "saved_mib": saved}
    yield measure(head, samplers, "every 1", gates, threads, settings)


def saved_bytes(run: Callable[[], object], inputs) -> int:
    """Bytes that autograd keeps for the backward, the inputs themselves not counted."""
    import torch

    own = {x.untyped_storage().data_ptr() for x in inputs.leaves().values()}
    kept: dict[int, int] = {}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        run()
    return sum(kept.values())


MEMORY_CONTENDERS = ("kernel", "eager", "derived")


def study_memory(shape: str, threads: int, settings: Settings) -> Iterator[dict]:
    """How far one forward and backward raises the resident memory of a fresh process, per contender."""
    tiny = make_case(shape, dataclasses.replace(settings, toy=True)).draw(_float32())
    names = MEMORY_CONTENDERS if is_derived(tiny) else MEMORY_CONTENDERS[:2]
    found = {name: peak("peak", f"{shape}|{name}", threads, settings) for name in names}
    peaks, saved = ({name: result.get(key) for name, result in found.items()} for key in ("peak_mib", "saved_mib"))
    share = peaks["kernel"] / peaks["eager"] if peaks["kernel"] and peaks["eager"] else None
    yield {"study": "memory", "case": shape, "direction": BOTH, "threads": threads, "parity": {"kernel": found["kernel"].get("parity")},
           "peak_mib": peaks, "peak_share": share, "saved_mib": saved,
           "notes": [note for result in found.values() for note in result["notes"]]}  # fmt: skip


def peak(study: str, name: str, threads: int, settings: Settings) -> dict:
    """What a study that measures memory says, in a process with default malloc settings."""
    spec = {"study": study, "case": name, "threads": threads, "settings": dataclasses.asdict(settings)}
    (result,) = start("cpu.py", spec, harness.environment(threads, malloc=False))
    return result


def study_peak(name: str, threads: int, settings: Settings) -> Iterator[dict]:
    """One contender of :func:`study_memory`."""
    shape, contender = name.split("|")
    tiny, result = make_case(shape, dataclasses.replace(settings, toy=True)), {"study": "peak", "case": name, "notes": []}
    if contender == "kernel":
        result["parity"] = {**parity(tiny, settings.backend), "toy": True}
        if not result["parity"]["ok"]:
            yield {**result, "notes": ["kernel: parity is red, memory not measured"]}
            return
    make = {"kernel": lambda i: kernel(i, settings.backend, BOTH), "eager": lambda i: eager(i, BOTH), "derived": lambda i: derived(i, BOTH)}
    yield result | memory_of(make[contender], tiny.draw(_float32()), make_case(shape, settings).draw(_float32()), contender)


def memory_of(make: Callable, small, inputs, name: str) -> dict:
    """Peak and saved MiB of ``make(inputs)``, a call. One of ``make(small)`` comes before: it loads what loads once."""
    make(small)()
    run = make(inputs)
    peak_mib = harness.peak_rise(run)
    notes = [] if peak_mib is not None else [f"{name}: this system does not allow the peak to be reset"]
    saved = None if name == "derived" else saved_bytes(run, inputs) / 2**20
    return {"peak_mib": peak_mib, "saved_mib": saved, "notes": notes}


def study_capability(shape: str, threads: int, settings: Settings) -> Iterator[dict]:
    """The kernels' instruction sets against each other, a process for each, taking turns."""
    from miras_kernels import dispatch

    levels = dispatch.BACKENDS["cpp"].extension.cpu_capabilities()
    spec = {"study": "serve", "case": shape, "threads": threads, "settings": dataclasses.asdict(settings)}
    with contextlib.ExitStack() as stack:
        enter = lambda level: stack.enter_context(Server(spec, harness.environment(threads, capability=level)))
        servers = {level: enter(level) for level in levels}
        gates = {level: server.ask("parity") for level, server in servers.items()}
        helpers = [server.process.pid for server in servers.values()]
        for direction in DIRECTIONS:
            samplers = {level: server.sampler(direction) for level, server in servers.items()}
            head = {"study": "capability", "case": shape, "direction": direction}
            yield measure(head, samplers, levels[0], gates, threads, settings, helpers=helpers)


def study_serve(shape: str, threads: int, settings: Settings) -> Iterator[object]:
    """The other end of :class:`process.Server`: parity, a digest of the inputs, or the time of so many calls."""
    case, clock = make_case(shape, settings), harness.clock_for(threads)[1]
    inputs = case.draw(_float32())
    samplers = {direction: timed(kernel(inputs, settings.backend, direction), clock) for direction in DIRECTIONS}
    for line in sys.stdin:
        what, count = json.loads(line)
        if what == "parity":
            yield parity(case, settings.backend)
        elif what == "inputs":
            yield hashlib.sha256(b"".join(x.detach().numpy().tobytes() for x in inputs.leaves().values())).hexdigest()
        else:
            yield samplers[what](count)


def study_probe(_: str, threads: int, settings: Settings) -> Iterator[dict]:
    """What is installed and what the measured backend says of itself."""
    import torch

    import miras_kernels
    from miras_kernels import dispatch

    versions = {**harness.versions("transformers", "triton"), "torch": torch.__version__, "miras-kernels": miras_kernels.__version__}
    extension = dispatch.BACKENDS["cpp"].extension
    capability = {"used": extension.cpu_capability(), "possible": extension.cpu_capabilities()} if extension else None
    yield {"versions": versions, "capability": capability, "unavailable": dispatch.unavailable(settings.backend)}


NAMES = ("shapes", "bias", "recurrence", "capability", "decay", "checkpoint", "dtype", "memory")
STUDIES = {name: globals()[f"study_{name}"] for name in NAMES}
HELPERS = {"peak": study_peak, "serve": study_serve, "probe": study_probe}
