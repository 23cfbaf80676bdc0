"""The studies of bench.cpu: each yields results, in a measuring process of its own with so many threads."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import time
from collections.abc import Callable, Iterator

import torch

import miras_kernels
from miras_kernels import dispatch

from ..common import results
from ..common.implementations import (
    BOTH,
    DIRECTIONS,
    PLAIN,
    agreement,
    compiled,
    derived,
    eager,
    kernel,
    recurrence,
    recurrences,
    refusal,
    titans,
)
from ..common.processes import Worker, first_line
from ..common.timing import OverBudget, clock_for, figures, interleave, shares, time_limit, timed
from .cases import Settings, least_work, make_case, parity
from .program import environment, request, start
from .watch import YARDSTICKS, Watch, matrix_product, memory_copy, peak_rise, saved_bytes

#: PyTorch must agree with the kernel to so much, in float32
SAME = 1e-3


def measure(
    head: dict, samplers: dict, base: str, gates: dict, threads: int, settings: Settings, work: dict | None = None, helpers=()
) -> dict:
    """Time the implementations whose gate is green, in one interleaved run; nothing is timed if that of ``base`` is not.

    Args:
        head: what the result begins with: study, case, direction, perhaps what the backend refused and why ...
        samplers: implementations by name, see :func:`timing.interleave`.
        base: the one to which ratios refer: ``ratios[x] = time of x / time of base``.
        gates: parity by implementation; one without a gate of its own is not checked here.
        work: what a call of ``base`` has to do, from :func:`cases.least_work`; adds GFLOP/s, GB/s and the shares of what ``mm`` and
            ``copy`` reach, which must be among the samplers.
        helpers: processes in which implementations run.
    """
    result = {**head, "threads": threads, "clock": clock_for(threads)[0], "parity": gates, "notes": []}
    red = [name for name, gate in gates.items() if not gate["ok"]]
    result["notes"] += [f"{name}: parity is red, not timed ({gates[name]['worst']})" for name in red]
    result["notes"] += [f"{name}: refused: {reason}" for name, reason in head.get("refused", {}).items()]
    if not gates.get(base, {"ok": False})["ok"]:
        return result
    samplers = {name: sampler for name, sampler in samplers.items() if name not in red}
    with Watch(threads, helpers) as watch:
        times = interleave(samplers, settings.seconds, settings.min_rounds)
    result |= figures(times, base, tuple(YARDSTICKS))
    if work is not None:
        result |= shares(times, base, work, YARDSTICKS)
    return {**result, "watch": watch.report()}


# ------------------------------------------------------------------------------------------------------ against PyTorch


def study_shapes(shape: str, threads: int, settings: Settings) -> Iterator[dict]:
    """The kernel against eager PyTorch, torch.compile and the hand-derived backward, or (MLP) titans-pytorch."""
    case, clock = make_case(shape, settings), clock_for(threads)[1]
    gates = {"kernel": parity(case, settings.backend)}
    inputs = case.draw(torch.float32)
    for direction in DIRECTIONS:
        head = {"study": "shapes", "case": shape, "direction": direction}
        runs, notes, seconds = {}, [], None
        if gates["kernel"]["ok"]:
            runs, notes, seconds = _baselines(inputs, direction, settings)
        samplers = {name: timed(run, clock) for name, run in runs.items()}
        result = measure(head, samplers, "kernel", gates, threads, settings, least_work(inputs)[direction])
        yield {**result, "notes": result["notes"] + notes, "compile_seconds": seconds}


def _baselines(inputs, direction: str, settings: Settings) -> tuple[dict[str, Callable], list[str], float | None]:
    """What takes part, notes on what does not, and how long torch.compile took."""
    runs = {"kernel": kernel(inputs, settings.backend, direction), "eager": eager(inputs, direction), "derived": derived(inputs, direction)}
    runs, notes, seconds = {name: run for name, run in runs.items() if run}, [], None
    if settings.compile_seconds:
        try:
            began = time.perf_counter()
            with time_limit(settings.compile_seconds):
                runs["compile"] = compiled(inputs, direction)
                runs["compile"]()
            seconds = time.perf_counter() - began
        except OverBudget:
            notes.append(f"torch.compile given up after {settings.compile_seconds:.0f} s of compilation")
        except Exception as error:
            notes.append(f"torch.compile failed: {first_line(error)}")
        if seconds is None:
            del runs["compile"]
    else:
        notes.append("torch.compile left out, as asked")
    expected = runs["kernel"]()
    for name in [name for name in runs if name != "kernel"]:
        difference = agreement(runs[name](), expected)
        if not difference < SAME:
            notes.append(f"{name}: computes something else (relative difference {difference:.1e}), not timed")
            del runs[name]
    if inputs.case.memory == "mlp" and settings.quick:
        notes.append("titans-pytorch left out, as asked")
    elif inputs.case.memory == "mlp":
        try:
            runs["titans"] = titans(inputs, direction)
            notes.append("titans: the same sizes, another recurrence; its results are not compared")
        except ImportError as error:
            notes.append(f"titans-pytorch cannot be imported: {error}")
    return runs | {"mm": matrix_product(), "copy": memory_copy()}, notes, seconds


# -------------------------------------------------------------------------------------------- the kernel against itself


def _variants(study: str, shape: str, threads: int, settings: Settings, cases: dict, base: str, directions=DIRECTIONS) -> Iterator[dict]:
    """The kernel over cases that differ in one property, by name; ratios to the one named ``base``."""
    clock = clock_for(threads)[1]
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
    cases = {name: (make_case(shape, settings, bias=bias), torch.float32) for name, bias in rows.items()}
    return _variants("bias", shape, threads, settings, cases, "l2")


def study_recurrence(shape: str, threads: int, settings: Settings) -> Iterator[dict]:
    """Every retention gate, momentum and channel-wise gates against the plain recurrence."""
    names = recurrences(make_case(shape, settings).memory)
    cases = {name: (make_case(shape, settings, **recurrence(name)), torch.float32) for name in names}
    return _variants("recurrence", shape, threads, settings, cases, PLAIN, (BOTH,))


def study_decay(shape: str, threads: int, settings: Settings) -> Iterator[dict]:
    """Decays that underflow within a chunk against mild ones: they must not lead to denormal numbers."""
    kinds = {"mild (alpha 0.82..1)": "scalar", "none": "none", "strong (alpha 0.05..0.2)": "strong", "extreme": "extreme"}
    cases = {name: (make_case(shape, settings, decay=kind), torch.float32) for name, kind in kinds.items()}
    return _variants("decay", shape, threads, settings, cases, "mild (alpha 0.82..1)")


def study_dtype(shape: str, threads: int, settings: Settings) -> Iterator[dict]:
    """bfloat16 inputs against float32 ones; arithmetic and state are float32 in both."""
    case = make_case(shape, settings)
    return _variants("dtype", shape, threads, settings, {"float32": (case, torch.float32), "bfloat16": (case, torch.bfloat16)}, "float32")


def study_checkpoint(shape: str, threads: int, settings: Settings) -> Iterator[dict]:
    """Time and memory with a checkpoint every n chunks."""
    clock, case = clock_for(threads)[1], make_case(shape, settings)
    inputs, samplers, gates, saved, first = case.draw(torch.float32), {}, {}, {}, ()
    for n in (1, 2, 4, 8):
        name, run = f"every {n}", kernel(inputs, settings.backend, BOTH, checkpoint_every=n)
        if n == 1:
            with miras_kernels.override(checkpoint_every=1):
                gates[name] = parity(case, settings.backend)
            first = run()
        else:
            worst = {"tensor": "gradients against every 1", "error": agreement(run(), first), "budget": 1e-6}
            gates[name] = {"ok": worst["error"] <= worst["budget"], "worst": worst}
        samplers[name], saved[name] = timed(run, clock), saved_bytes(run, inputs) / 2**20
    head = {"study": "checkpoint", "case": shape, "direction": BOTH, "saved_mib": saved}
    yield measure(head, samplers, "every 1", gates, threads, settings)


def study_capability(shape: str, threads: int, settings: Settings) -> Iterator[dict]:
    """The kernels' instruction sets against each other, a process for each, taking turns."""
    levels = dispatch.BACKENDS["cpp"].extension.cpu_capabilities()
    with contextlib.ExitStack() as stack:
        enter = lambda level: stack.enter_context(Server(shape, threads, settings, environment(threads, capability=level)))
        servers = {level: enter(level) for level in levels}
        gates = {level: server.ask("parity") for level, server in servers.items()}
        helpers = [server.worker.process.pid for server in servers.values()]
        for direction in DIRECTIONS:
            samplers = {level: server.sampler(direction) for level, server in servers.items()}
            head = {"study": "capability", "case": shape, "direction": direction}
            yield measure(head, samplers, levels[0], gates, threads, settings, helpers=helpers)


# -------------------------------------------------------------------------------------------------------------- memory


MEMORY_OF = {"kernel": kernel, "eager": lambda inputs, _, direction: eager(inputs, direction),
             "derived": lambda inputs, _, direction: derived(inputs, direction)}  # fmt: skip


def study_memory(shape: str, threads: int, settings: Settings) -> Iterator[dict]:
    """How far one forward and backward raises the resident memory of a fresh process, per implementation."""
    tiny = make_case(shape, dataclasses.replace(settings, toy=True)).draw(torch.float32)
    names = [name for name, make in MEMORY_OF.items() if make(tiny, settings.backend, BOTH)]
    found = {name: peak("peak", f"{shape}|{name}", threads, settings) for name in names}
    peaks, saved = ({name: result.get(key) for name, result in found.items()} for key in ("peak_mib", "saved_mib"))
    share = peaks["kernel"] / peaks["eager"] if peaks["kernel"] and peaks["eager"] else None
    yield {"study": "memory", "case": shape, "direction": BOTH, "threads": threads, "parity": {"kernel": found["kernel"].get("parity")},
           "peak_mib": peaks, "peak_share": share, "saved_mib": saved,
           "notes": [note for result in found.values() for note in result["notes"]]}  # fmt: skip


def peak(study: str, name: str, threads: int, settings: Settings) -> dict:
    """The result of a study that measures memory, in a process with default malloc settings."""
    (result,) = start("bench.cpu", request(study, name, threads, settings), environment(threads, malloc=False))
    return result


def study_peak(name: str, threads: int, settings: Settings) -> Iterator[dict]:
    """One implementation of :func:`study_memory`."""
    shape, who = name.split("|")
    tiny, result = make_case(shape, dataclasses.replace(settings, toy=True)), {"study": "peak", "case": name, "notes": []}
    if who == "kernel":
        result["parity"] = {**parity(tiny, settings.backend), "toy": True}
        if not result["parity"]["ok"]:
            yield {**result, "notes": ["kernel: parity is red, memory not measured"]}
            return
    make = lambda inputs: MEMORY_OF[who](inputs, settings.backend, BOTH)
    yield result | memory_of(make, tiny.draw(torch.float32), make_case(shape, settings).draw(torch.float32), who)


def memory_of(make: Callable, small, inputs, name: str) -> dict:
    """Peak and saved MiB of ``make(inputs)``, a call, after one of ``make(small)``, which loads what is loaded once."""
    make(small)()
    run = make(inputs)
    peak_mib = peak_rise(run)
    notes = [] if peak_mib is not None else [f"{name}: this system does not allow the peak to be reset"]
    saved = None if name == "derived" else saved_bytes(run, inputs) / 2**20
    return {"peak_mib": peak_mib, "saved_mib": saved, "notes": notes}


# ------------------------------------------------------------------------------------------------------------ processes


class Server:
    """A process that holds a case and checks it or times its calls on request; ``root``: the source tree that it measures."""

    def __init__(self, shape: str, threads: int, settings: Settings, env: dict[str, str], **root: str):
        self.worker, self.request = Worker("bench.cpu", env), request("serve", shape, threads, settings, **root)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.worker.close()

    def ask(self, what: str, count: int = 1):
        """See :func:`study_serve`. Raises ``Lost`` if the process has ended."""
        (answer,) = self.worker.ask({**self.request, "what": what, "count": count})
        return answer

    def sampler(self, direction: str) -> Callable[[int], float]:
        return lambda count: self.ask(direction, count)


def study_serve(shape: str, threads: int, settings: Settings, what: str, count: int) -> Iterator[object]:
    """The other end of :class:`Server`: parity, a digest of the inputs, or the seconds of so many calls in a direction."""
    inputs, samplers = _held(shape, threads, settings)
    if what == "parity":
        yield parity(inputs.case, settings.backend)
    elif what == "inputs":
        yield hashlib.sha256(b"".join(x.detach().numpy().tobytes() for x in inputs.leaves().values())).hexdigest()
    else:
        yield samplers[what](count)


@functools.cache
def _held(shape: str, threads: int, settings: Settings):
    inputs = make_case(shape, settings).draw(torch.float32)
    return inputs, {d: timed(kernel(inputs, settings.backend, d), clock_for(threads)[1]) for d in DIRECTIONS}


def study_probe(_: str, threads: int, settings: Settings) -> Iterator[dict]:
    """What is installed and what the measured backend reports of itself."""
    found = {**results.versions("transformers", "triton"), "torch": torch.__version__, "miras-kernels": miras_kernels.__version__}
    extension = dispatch.BACKENDS["cpp"].extension
    capability = {"used": extension.cpu_capability(), "possible": extension.cpu_capabilities()} if extension else None
    yield {"versions": found, "capability": capability, "unavailable": dispatch.unavailable(settings.backend)}


NAMES = ("shapes", "bias", "recurrence", "capability", "decay", "checkpoint", "dtype", "memory")
STUDIES = {name: globals()[f"study_{name}"] for name in NAMES}
HELPERS = {"peak": study_peak, "serve": study_serve, "probe": study_probe}
