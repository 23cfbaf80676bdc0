"""The studies of bench.cpu: each yields results, in a measuring process of its own with so many threads."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator

import torch

import miras_kernels
from miras_kernels import dispatch

from ..common import implementations as impl
from ..common.implementations import BOTH, DIRECTIONS, PLAIN, agreement, kernel
from ..common.processes import Worker, first_line
from ..common.timing import OverBudget, clock_for, figures, interleave, shares, time_limit, timed
from .cases import Settings, least_work, make_case, parity
from .measuring import environment, request, start
from .watch import YARDSTICKS, Watch, peak_rise, saved_bytes, yardsticks

#: PyTorch must agree with the kernel to so much, in float32
SAME = 1e-3


def measure(head: dict, samplers: dict, base: str, gates: dict, threads: int, settings: Settings, work=None, helpers=()) -> dict:
    """Time the implementations whose gate is green, in one interleaved run; nothing is timed if that of ``base`` is not.

    Args:
        head: what the result begins with: study, case, direction, what the backend refused and why ...
        samplers: implementations by name (:func:`timing.interleave`); ``ratios`` are their times over that of ``base``.
        gates: parity by implementation; one without a gate of its own is not checked here.
        work: of a call of ``base`` (:func:`cases.least_work`), for the shares of what ``mm`` and ``copy`` among the samplers reach.
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
    runs, notes, seconds = {"kernel": kernel(inputs, settings.backend, direction), "eager": impl.eager(inputs, direction)}, [], None
    if derived := impl.derived(inputs, direction):
        runs["derived"] = derived
    if settings.compile_seconds:
        try:
            began = time.perf_counter()
            with time_limit(settings.compile_seconds):
                runs["compile"] = impl.compiled(inputs, direction)
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
            runs["titans"] = impl.titans(inputs, direction)
            notes.append("titans: the same sizes, another recurrence; its results are not compared")
        except ImportError as error:
            notes.append(f"titans-pytorch cannot be imported: {error}")
    return runs | yardsticks(), notes, seconds


def _variants(study: str, shape: str, threads: int, settings: Settings, changes: dict, base: str, directions=DIRECTIONS) -> Iterator[dict]:
    """The kernel over cases that differ in one property (or dtype), by name; ratios to the one named ``base``."""
    cases = {name: make_case(shape, settings, **change) for name, change in changes.items()}
    dtypes = {name: torch.bfloat16 if name == "bfloat16" else torch.float32 for name in cases}
    drawn = {name: case.draw(dtypes[name]) for name, case in cases.items()}
    asked = {name: dispatch.explain(inputs.call(), differentiate=True)[settings.backend] for name, inputs in drawn.items()}
    refused = {name: reason for name, reason in asked.items() if reason is not None}
    gates = {name: parity(case, settings.backend, dtypes[name]) for name, case in cases.items() if name not in refused}
    for direction in directions:
        samplers = {name: timed(kernel(drawn[name], settings.backend, direction), clock_for(threads)[1]) for name in gates}
        yield measure({"study": study, "case": shape, "direction": direction, "refused": refused}, samplers, base, gates, threads, settings)


def study_bias(shape: str, threads: int, settings: Settings) -> Iterator[dict]:
    """Every bias of the table, and a p without a kernel of its own, against L2."""
    from miras_kernels import Lp
    from miras_kernels.tables import biases

    label = lambda row: f"{row.name} {row.p:g}" if isinstance(row, Lp) else row.name
    rows = {label(row): row for row in (*biases.TABLE.values(), Lp(2.5))}
    rows = {"l2": rows.pop("l2"), **rows}
    if settings.quick:
        rows = {name: rows[name] for name in ("l2", "huber_switch", "lp 2.5")}
    return _variants("bias", shape, threads, settings, {name: {"bias": bias} for name, bias in rows.items()}, "l2")


def study_recurrence(shape: str, threads: int, settings: Settings) -> Iterator[dict]:
    """Every retention gate, momentum and channel-wise gates against the plain recurrence."""
    changes = {name: impl.recurrence(name) for name in impl.recurrences(make_case(shape, settings).memory)}
    return _variants("recurrence", shape, threads, settings, changes, PLAIN, (BOTH,))


def study_decay(shape: str, threads: int, settings: Settings) -> Iterator[dict]:
    """Decays that underflow within a chunk against mild ones: they must not lead to denormal numbers."""
    kinds = {"mild (alpha 0.82..1)": "scalar", "none": "none", "strong (alpha 0.05..0.2)": "strong", "extreme": "extreme"}
    return _variants("decay", shape, threads, settings, {name: {"decay": kind} for name, kind in kinds.items()}, "mild (alpha 0.82..1)")


def study_dtype(shape: str, threads: int, settings: Settings) -> Iterator[dict]:
    """bfloat16 inputs against float32 ones; arithmetic and state are float32 in both, except for products at avx512_bf16."""
    return _variants("dtype", shape, threads, settings, {"float32": {}, "bfloat16": {}}, "float32")


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
        gates = {level: server.get("parity") for level, server in servers.items()}
        helpers = [server.process.pid for server in servers.values()]
        for direction in DIRECTIONS:
            samplers = {level: server.sampler(direction) for level, server in servers.items()}
            head = {"study": "capability", "case": shape, "direction": direction}
            yield measure(head, samplers, levels[0], gates, threads, settings, helpers=helpers)


MEMORY_OF = {"kernel": lambda inputs, backend: kernel(inputs, backend, BOTH), "eager": lambda inputs, _: impl.eager(inputs, BOTH),
             "derived": lambda inputs, _: impl.derived(inputs, BOTH)}  # fmt: skip


def study_memory(shape: str, threads: int, settings: Settings) -> Iterator[dict]:
    """How far one forward and backward raises the resident memory of a fresh process, per implementation."""
    tiny = make_case(shape, dataclasses.replace(settings, toy=True)).draw(torch.float32)
    names = [name for name, make in MEMORY_OF.items() if make(tiny, settings.backend)]
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
    make = lambda inputs: MEMORY_OF[who](inputs, settings.backend)
    yield result | memory_of(make, tiny.draw(torch.float32), make_case(shape, settings).draw(torch.float32), who)


def memory_of(make: Callable, small, inputs, name: str) -> dict:
    """Peak and saved MiB of ``make(inputs)``, a call, after one of ``make(small)``, which loads what is loaded once."""
    make(small)()
    peak_mib = peak_rise(run := make(inputs))
    notes = [] if peak_mib is not None else [f"{name}: this system does not allow the peak to be reset"]
    saved = None if name == "derived" else saved_bytes(run, inputs) / 2**20
    return {"peak_mib": peak_mib, "saved_mib": saved, "notes": notes}


class Server(Worker):
    """A process that holds a case and checks it or times its calls on request; ``root``: the source tree that it measures."""

    def __init__(self, shape: str, threads: int, settings: Settings, env: dict[str, str], **root: str):
        super().__init__("bench.cpu", env)
        self.request = request("serve", shape, threads, settings, **root)
        self.start()

    def get(self, what: str, count: int = 1):
        """See :func:`study_serve`. Raises ``Lost`` if the process has ended."""
        (answer,) = self.ask({**self.request, "what": what, "count": count})
        return answer

    def sampler(self, direction: str) -> Callable[[int], float]:
        return lambda count: self.get(direction, count)


def study_serve(shape: str, threads: int, settings: Settings, what: str, count: int) -> Iterator[object]:
    """The other end of :class:`Server`: parity, or the seconds of so many calls in a direction."""
    inputs, samplers = _held(shape, threads, settings)
    if what == "parity":
        yield parity(inputs.case, settings.backend)
    else:
        yield samplers[what](count)


@functools.cache
def _held(shape: str, threads: int, settings: Settings):
    inputs = make_case(shape, settings).draw(torch.float32)
    return inputs, {d: timed(kernel(inputs, settings.backend, d), clock_for(threads)[1]) for d in DIRECTIONS}


STUDIES = {"shapes": study_shapes, "bias": study_bias, "recurrence": study_recurrence, "capability": study_capability, "decay": study_decay,
           "checkpoint": study_checkpoint, "dtype": study_dtype, "memory": study_memory}  # fmt: skip
HELPERS = {"peak": study_peak, "serve": study_serve}
