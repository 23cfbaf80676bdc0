"""The C++ kernels on this CPU: right first, then how fast, against what PyTorch offers, all in one run.

    python bench/cpu.py                        everything, markdown on stdout
    python bench/cpu.py --json out.json        and JSON
    python bench/cpu.py --quick                about a minute: one thread, no torch.compile, fewer cases
    python bench/cpu.py --only shapes,bias     some studies; --list names them

This process only starts others and writes the report: every measurement has a fresh process with the same malloc settings
for all contenders. bench/README.md says how to read the numbers, bench/harness.py how they are taken.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import harness
from harness import MM_FLOPS, OTHERS, Watch, interleave, ratio, spread, table, timed

FORWARD, BOTH = "forward", "forward+backward"
DIRECTIONS = (FORWARD, BOTH)
MARK = "@result "


@dataclasses.dataclass(frozen=True)
class Settings:
    """What every measuring process is told.

    Attributes:
        backend: the contender that is measured, "cpp" but for tests of this program.
        seconds: per interleaved measurement.
        min_rounds: however long they take.
        compile_seconds: torch.compile is given up after this long per function; 0 leaves it out.
        quick: fewer contenders.
        toy: tiny shapes, to check this program itself.
    """

    backend: str = "cpp"
    seconds: float = 8.0
    min_rounds: int = 7
    compile_seconds: float = 300.0
    quick: bool = False
    toy: bool = False


SHAPES = {
    "D64 C64": dict(batch=2, tokens=1024, heads=4, key_dim=64, value_dim=64, chunk_size=64),
    "D64 C16": dict(batch=2, tokens=1024, heads=4, key_dim=64, value_dim=64, chunk_size=16),
    "D128 C64": dict(batch=1, tokens=4096, heads=8, key_dim=128, value_dim=128, chunk_size=64),
}
TOY = dict(batch=1, tokens=48, heads=2, key_dim=16, value_dim=12, chunk_size=16)


def make_case(shape: str, settings: Settings, **changes):
    """The registry's kind of case in one of the benchmark's shapes."""
    from miras_kernels.testing import Case

    return Case(f"bench {shape}", **({"initial": "none"} | (TOY if settings.toy else SHAPES[shape]) | changes))


def flops(case) -> dict[str, int]:
    """Useful floating-point operations: triangles counted as triangles, recomputation not counted."""
    dk, dv, forward, backward = case.key_dim, case.value_dim, 0, 0
    for start in range(0, case.tokens, case.chunk_size):
        c = min(case.chunk_size, case.tokens - start)
        forward += 6 * c * dk * dv + c * (c + 1) * (dk + dv)
        backward += 14 * c * dk * dv + c * (c + 1) * (2 * dk + 3 * dv)
    heads = case.batch * case.heads
    return {FORWARD: heads * forward, BOTH: heads * (forward + backward)}


# -------------------------------------------------------------------------------------------------------- contenders


def kernel(inputs, backend: str, direction: str, **options) -> Callable[[], tuple]:
    """The public function; ``options`` as in :func:`miras_kernels.override`."""
    import torch

    import miras_kernels

    arguments = {**inputs.arguments(), "output_final_state": False, "backend": backend}
    leaves = tuple(inputs.leaves().values())

    def forward() -> tuple:
        with torch.no_grad():
            return (miras_kernels.linear_memory(**arguments)[0],)

    def both() -> tuple:
        with miras_kernels.override(**options):
            out, _ = miras_kernels.linear_memory(**arguments)
        return torch.autograd.grad(out, leaves, inputs.grad_out)

    return forward if direction == FORWARD else both


def eager(inputs, direction: str) -> Callable[[], tuple]:
    """The chunkwise matrix form in PyTorch; for the backward, autograd through it."""
    import torch

    from miras_kernels.reference import chunkwise

    call, leaves = inputs.call(), tuple(inputs.leaves().values())

    def forward() -> tuple:
        with torch.no_grad():
            return (chunkwise.run(call)[0],)

    return forward if direction == FORWARD else lambda: torch.autograd.grad(chunkwise.run(call)[0], leaves, inputs.grad_out)


def compiled(inputs, direction: str) -> Callable[[], tuple]:
    """torch.compile of the whole of :func:`eager`."""
    import torch

    from miras_kernels.reference import chunkwise

    call, names, leaves = inputs.call(), tuple(inputs.leaves()), tuple(inputs.leaves().values())

    def function(*tensors):
        return chunkwise.run(call.replace(**dict(zip(names, tensors, strict=True))))[0]

    run = torch.compile(function, dynamic=False, fullgraph=True)

    def forward() -> tuple:
        with torch.no_grad():
            return (run(*leaves),)

    return forward if direction == FORWARD else lambda: torch.autograd.grad(run(*leaves), leaves, inputs.grad_out)


def derived(inputs, direction: str) -> Callable[[], tuple]:
    """The hand-derived backward in batched PyTorch, without autograd."""
    import torch

    from miras_kernels.reference import derived as reference

    call, names = inputs.call(), tuple(inputs.leaves())

    def forward() -> tuple:
        with torch.no_grad():
            return (reference.forward(call)[0],)

    def both() -> tuple:
        with torch.no_grad():
            _, _, saved = reference.forward(call)
            grads = reference.backward(call, saved, inputs.grad_out, None)
        return tuple(grads[name] for name in names)

    return forward if direction == FORWARD else both


# ---------------------------------------------------------------------------------------------------------- parity


def parity(case, backend: str, dtype=None) -> dict:
    """The gate: outputs, final states and every gradient against float64, with the tests' own budgets."""
    import torch

    from miras_kernels.testing import check

    report = check(case, backend, dtype or torch.float32)
    errors = {row.name: row.error for row in report.rows}
    worst = report.worst
    return {
        "ok": report.ok,
        "forward_error": max(e for name, e in errors.items() if not name.startswith("grad_")),
        "gradient_error": max(e for name, e in errors.items() if name.startswith("grad_")),
        "worst": {"tensor": worst.name, "error": worst.error, "budget": worst.budget},
    }


def agreement(ours: tuple, theirs: tuple) -> float:
    """The largest relative difference between two contenders' results: do they compute the same thing?"""
    from miras_kernels.testing import relative_error

    return max(relative_error(x, y) for x, y in zip(ours, theirs, strict=True))


def measure(head: dict, samplers: dict, base: str, gates: dict, threads: int, settings: Settings, work: int | None = None) -> dict:
    """Time the contenders whose gate is green, in one interleaved run; without a green base nothing is timed.

    Args:
        head: what the result begins with: study, case, direction ...
        samplers: contenders by name, see :func:`harness.interleave`.
        base: the contender to which ratios refer: ``ratios[x] = time of x / time of base``.
        gates: parity by contender; one without a gate of its own is not checked here.
        work: floating-point operations of one call of ``base``; adds GFLOP/s and the share of ``torch.mm``.
    """
    result = {**head, "threads": threads, "clock": harness.clock_for(threads)[0], "parity": gates, "notes": []}
    red = [name for name, gate in gates.items() if not gate["ok"]]
    result["notes"] += [f"{name}: parity is red, not timed ({gates[name]['worst']})" for name in red]
    if base in red:
        return result
    samplers = {name: sampler for name, sampler in samplers.items() if name not in red}
    with Watch(threads) as watch:
        times = interleave(samplers, settings.seconds, settings.min_rounds)
    milliseconds = {name: [1e3 * t for t in ts] for name, ts in times.items()}
    result["rounds"] = len(times[base])
    result["ms"] = {name: spread(ts) for name, ts in milliseconds.items()}
    result["ratios"] = {name: ratio(ts, times[base]) for name, ts in times.items() if name not in (base, "mm")}
    if work is not None:
        result["gflops"] = work / spread(times[base])["median"] / 1e9
        result["mm_gflops"] = MM_FLOPS / spread(times["mm"])["median"] / 1e9
        result["share_of_mm"] = spread([work / MM_FLOPS * mm / t for mm, t in zip(times["mm"], times[base], strict=True)])
    return {**result, "watch": watch.report()}


# ---------------------------------------------------------------------------------------------------------- studies
# Each yields results; it runs in a process of its own with `threads` threads.


def study_shapes(shape: str, threads: int, settings: Settings) -> Iterator[dict]:
    """The kernel against eager PyTorch, torch.compile and the hand-derived backward."""
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
            "derived": derived(inputs, direction),
        }
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
        samplers = {name: timed(run, clock) for name, run in {**runs, "mm": harness.matrix_product()}.items()}
        result = measure(head, samplers, "kernel", gates, threads, settings, flops(case)[direction])
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
    gates = {name: parity(case, settings.backend, dtype) for name, (case, dtype) in cases.items()}
    drawn = {name: case.draw(dtype) for name, (case, dtype) in cases.items()}
    for direction in directions:
        samplers = {name: timed(kernel(inputs, settings.backend, direction), clock) for name, inputs in drawn.items()}
        yield measure({"study": study, "case": shape, "direction": direction}, samplers, base, gates, threads, settings)


def study_bias(shape: str, threads: int, settings: Settings) -> Iterator[dict]:
    """Every bias of the table, and a p without a kernel of its own, against L2."""
    from miras_kernels import Lp, biases

    label = lambda row: f"{row.name} {row.p:g}" if isinstance(row, Lp) else row.name
    rows = {label(row): row for row in (*biases.TABLE.values(), Lp(2.5))}
    rows = {"l2": rows.pop("l2"), **rows}
    if settings.quick:
        rows = {name: rows[name] for name in ("l2", "huber_switch", "lp 2.5")}
    cases = {name: (make_case(shape, settings, bias=bias), _float32()) for name, bias in rows.items()}
    return _variants("bias", shape, threads, settings, cases, "l2")


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
    peaks, saved, notes, gate = {}, {}, [], None
    for contender in MEMORY_CONTENDERS:
        spec = {"study": "peak", "case": f"{shape}|{contender}", "threads": threads, "settings": dataclasses.asdict(settings)}
        (result,) = list(start(spec, harness.environment(threads, malloc=False)))
        gate = result.get("parity", gate)
        peaks[contender], saved[contender] = result.get("peak_mib"), result.get("saved_mib")
        notes += result["notes"]
    yield {"study": "memory", "case": shape, "direction": BOTH, "threads": threads, "parity": {"kernel": gate}, "peak_mib": peaks,
           "saved_mib": saved, "notes": notes}  # fmt: skip


def study_peak(name: str, threads: int, settings: Settings) -> Iterator[dict]:
    """One contender of :func:`study_memory`."""
    shape, contender = name.split("|")
    case, result = make_case(shape, settings), {"study": "peak", "case": name, "notes": []}
    if contender == "kernel":
        result["parity"] = {**parity(make_case(shape, dataclasses.replace(settings, toy=True)), settings.backend), "toy": True}
        if not result["parity"]["ok"]:
            yield {**result, "notes": ["kernel: parity is red, memory not measured"]}
            return
    make = {"kernel": lambda i: kernel(i, settings.backend, BOTH), "eager": lambda i: eager(i, BOTH), "derived": lambda i: derived(i, BOTH)}
    make[contender](make_case(shape, dataclasses.replace(settings, toy=True)).draw(_float32()))()  # loads what loads once
    inputs = case.draw(_float32())
    run = make[contender](inputs)
    if not harness.reset_peak():
        yield {**result, "notes": [f"{contender}: this system does not allow the peak to be reset"]}
        return
    before = harness.resident("VmRSS")
    run()
    result["peak_mib"] = harness.resident("VmHWM") - before
    result["saved_mib"] = None if contender == "derived" else saved_bytes(run, inputs) / 2**20
    yield result


def study_capability(shape: str, threads: int, settings: Settings) -> Iterator[dict]:
    """The kernels' instruction sets against each other, a process for each, taking turns."""
    from miras_kernels import dispatch

    levels = dispatch.BACKENDS["cpp"].extension.cpu_capabilities()
    spec = {"study": "serve", "case": shape, "threads": threads, "settings": dataclasses.asdict(settings)}
    servers = {level: Server(spec, harness.environment(threads, capability=level)) for level in levels}
    try:
        gates = {level: server.answer() for level, server in servers.items()}
        for direction in DIRECTIONS:
            samplers = {level: server.sampler(direction) for level, server in servers.items()}
            head = {"study": "capability", "case": shape, "direction": direction}
            yield measure(head, samplers, levels[0], gates, threads, settings)
    finally:
        for server in servers.values():
            server.close()


class Server:
    """A process that holds a case and times calls when it is asked to."""

    def __init__(self, spec: dict, env: dict[str, str]):
        self.process = subprocess.Popen(_command(spec), env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def answer(self):
        for line in self.process.stdout:
            if line.startswith(MARK):
                return json.loads(line[len(MARK) :])
        raise RuntimeError("a measuring process ended early")

    def sampler(self, direction: str) -> harness.Sampler:
        def sample(count: int) -> float:
            print(json.dumps([direction, count]), file=self.process.stdin, flush=True)
            return self.answer()

        return sample

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=30)


def study_serve(shape: str, threads: int, settings: Settings) -> Iterator[object]:
    """The other end of :class:`Server`."""
    case, clock = make_case(shape, settings), harness.clock_for(threads)[1]
    yield parity(case, settings.backend)
    inputs = case.draw(_float32())
    samplers = {direction: timed(kernel(inputs, settings.backend, direction), clock) for direction in DIRECTIONS}
    for line in sys.stdin:
        direction, count = json.loads(line)
        yield samplers[direction](count)


def study_probe(_: str, threads: int, settings: Settings) -> Iterator[dict]:
    """What is installed and what the measured backend says of itself."""
    import torch

    import miras_kernels
    from miras_kernels import dispatch

    versions = {**harness.versions("transformers", "triton"), "torch": torch.__version__, "miras-kernels": miras_kernels.__version__}
    extension = dispatch.BACKENDS["cpp"].extension
    capability = {"used": extension.cpu_capability(), "possible": extension.cpu_capabilities()} if extension else None
    yield {"versions": versions, "capability": capability, "unavailable": dispatch.unavailable(settings.backend)}


STUDIES = {name: globals()[f"study_{name}"] for name in ("shapes", "bias", "capability", "decay", "checkpoint", "dtype", "memory")}
HELPERS = {"peak": study_peak, "serve": study_serve, "probe": study_probe}


# -------------------------------------------------------------------------------------------------------- processes


def _command(spec: dict) -> list[str]:
    return [sys.executable, str(Path(__file__).resolve()), "--worker", json.dumps(spec)]


def start(spec: dict, env: dict[str, str] | None = None) -> Iterator[dict]:
    """Run one study in a fresh process and yield its results; what it cannot do becomes a result with an error."""
    env = env or harness.environment(spec["threads"])
    process = subprocess.Popen(_command(spec), env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    with process:
        for line in process.stdout:
            if line.startswith(MARK):
                yield json.loads(line[len(MARK) :])
    if process.returncode:
        yield {"study": spec["study"], "case": spec["case"], "threads": spec["threads"], "direction": "", "parity": {},
               "error": f"the measuring process ended with status {process.returncode}",
               "notes": [f"the measuring process ended with status {process.returncode}"]}  # fmt: skip


def worker(text: str) -> None:
    """A measuring process: prints its results as marked JSON lines."""
    import torch

    spec = json.loads(text)
    torch.set_num_threads(spec["threads"])
    study = {**STUDIES, **HELPERS}[spec["study"]]
    for result in study(spec["case"], spec["threads"], Settings(**spec["settings"])):
        print(MARK + json.dumps(result), flush=True)


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

    def value(self, results: Sequence[dict], threads: int) -> float | None:
        for result in results:
            if all(result.get(key) == getattr(self, key) for key in ("study", "case", "direction")) and result["threads"] == threads:
                found = result
                for key in self.path:
                    found = found.get(key) if isinstance(found, dict) else None
                return found
        return None

    def verdict(self, value: float | None) -> str:
        if value is None:
            return "not measured"
        reached = (lambda limit: value <= limit) if self.at_most else (lambda limit: value >= limit)
        if self.goal is not None and reached(self.goal):
            return "goal"
        return "met" if reached(self.least) else "NOT met"


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
        found += [Target(f"{direction} {name}", s, "shapes", direction, path, a, b) for s, a, b in zip(SHAPES, least, goals, strict=True)]
    for direction, least, goal in ((FORWARD, (0.55, 0.50, 0.55), 0.70), (BOTH, (0.45, 0.35, 0.45), 0.60)):
        path = ("share_of_mm", "median")
        found += [
            Target(f"{direction}, share of torch.mm", s, "shapes", direction, path, a, goal) for s, a in zip(SHAPES, least, strict=True)
        ]
    for direction in DIRECTIONS:
        path = ("ratios", "lp 2.5", "median")
        found.append(Target(f"{direction}, generic p / L2", "D64 C64", "bias", direction, path, 1.3, 1.15, at_most=True))
        path = ("ratios", "avx2", "median")
        found.append(Target(f"{direction}, AVX2 / AVX-512", "D64 C64", "capability", direction, path, 1.9, 1.6, at_most=True))
        path = ("ratios", "strong (alpha 0.05..0.2)", "median")
        found.append(Target(f"{direction}, small decays / mild", "D64 C64", "decay", direction, path, 1.1, 1.02, at_most=True))
    for name, key, limit in (("outputs and states", "forward_error", 1e-5), ("gradients", "gradient_error", 1e-4)):
        path = ("parity", "kernel", key)
        found += [Target(f"relative error, {name}", s, "shapes", BOTH, path, limit, None, at_most=True) for s in SHAPES]
    return found


def judge(results: Sequence[dict], threads: Sequence[int], avx512: bool) -> list[dict]:
    """Every target with what was measured, per thread count. Doubtful measurements are told, not judged."""
    rows = []
    for target in targets():
        row = {"name": target.name, "case": target.case, "at_most": target.at_most, "least": target.least, "goal": target.goal}
        row["measured"] = {}
        for n in threads:
            value = target.value(results, n)
            verdict = target.verdict(value)
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
        "1 thread: process CPU time. More threads: wall time. `bench/README.md` tells how to read this.",
    ]
    for name, section in _SECTIONS.items():
        results = [r for r in document["results"] if r["study"] == name]
        text = section(results)
        if text:
            lines += ["", text]
    notes = _notes(document["results"])
    if document["targets"]:
        lines += ["", "## Targets", "", _target_table(document)]
    if notes:
        lines += ["", "## Notes", "", *notes]
    return "\n".join(lines) + "\n"


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
    rows = []
    for r in results:
        gate = r["parity"].get("kernel", {})
        row = [r["case"], r["direction"], str(r["threads"]), _gate(gate)]
        if "ms" in r:
            took = "" if r.get("compile_seconds") is None else f" ({r['compile_seconds']:.0f} s)"
            row += [f"{r['ms']['kernel']['median']:.2f}", f"{r['gflops']:.0f}", f"{r['share_of_mm']['median']:.2f} of {r['mm_gflops']:.0f}"]
            row += [
                _times(r["ratios"].get("eager"), 1),
                _times(r["ratios"].get("compile"), 1) + took,
                _times(r["ratios"].get("derived"), 1),
            ]
        else:
            row += ["-"] * 6
        rows.append(row)
    if not rows:
        return ""
    header = ["shape", "direction", "threads", "error/budget", "ms", "GFLOP/s", "of torch.mm", "vs eager", "vs compile (first call)",
              "vs hand-derived"]  # fmt: skip
    return "## Against PyTorch, float32, L2, scalar decay\n\n" + table(header, rows)


def _variant_section(title: str) -> Callable[[Sequence[dict]], str]:
    def section(results: Sequence[dict]) -> str:
        rows = []
        for r in results:
            base = next((name for name in r["parity"] if name not in r.get("ratios", {})), None)
            for name, gate in r["parity"].items():
                timed_here = name in r.get("ms", {})
                ms = f"{r['ms'][name]['median']:.2f}" if timed_here else "-"
                times = "1" if name == base and timed_here else _times(r.get("ratios", {}).get(name))
                memory = r.get("saved_mib", {}).get(name)
                rows.append([r["case"], r["direction"], str(r["threads"]), name, _gate(gate), ms, times,
                             "-" if memory is None else f"{memory:.1f}"])  # fmt: skip
        if not rows:
            return ""
        header = ["shape", "direction", "threads", "what", "error/budget", "ms", "time against the first", "saved MiB"]
        if all(row[-1] == "-" for row in rows):
            header, rows = header[:-1], [row[:-1] for row in rows]
        return f"## {title}\n\n" + table(header, rows)

    return section


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


_SECTIONS = {
    "shapes": _shapes_section,
    "bias": _variant_section("Biases"),
    "capability": _variant_section("Instruction sets"),
    "decay": _variant_section("Decays"),
    "checkpoint": _variant_section("Saving every n-th chunk's state"),
    "dtype": _variant_section("Input types"),
    "memory": _memory_section,
}


# -------------------------------------------------------------------------------------------------------------- main


def jobs(only: Sequence[str], shapes: Sequence[str], threads: Sequence[int], settings: Settings) -> list[tuple[str, str, int]]:
    """``(study, shape, threads)`` in order. The comparison with PyTorch runs at every thread count, the rest at the first."""
    found = []
    for study in only:
        if study == "shapes":
            found += [(study, shape, n) for n in threads for shape in shapes]
        elif study in ("checkpoint", "memory"):
            found += [(study, shape, threads[0]) for shape in shapes]
        elif study != "capability" or settings.backend == "cpp":
            found.append((study, shapes[0], threads[0]))
    return found


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the results there as well")
    parser.add_argument("--quick", action="store_true", help="about a minute: one thread, no torch.compile, fewer cases")
    parser.add_argument("--only", metavar="STUDY,...", help=f"some of {', '.join(STUDIES)}")
    parser.add_argument("--shapes", metavar="SHAPE,...", help=f"some of {', '.join(SHAPES)}")
    parser.add_argument("--threads", metavar="N,...", help="thread counts (default 1,2; 1 with --quick)")
    parser.add_argument("--seconds", type=float, help="per interleaved measurement (default 8; 1 with --quick)")
    parser.add_argument("--compile-seconds", type=float, help="torch.compile is given up after this long (default 300; 0 leaves it out)")
    parser.add_argument("--backend", default="cpp", choices=("cpp", "reference"), help="what to measure")
    parser.add_argument("--toy", action="store_true", help="tiny shapes: checks this program, measures nothing")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a target's 'at least' is not met")
    parser.add_argument("--list", action="store_true", help="name the studies and shapes")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    default = ("shapes", "bias", "decay") if args.quick else tuple(STUDIES)
    args.only = _names(parser, "--only", args.only, tuple(STUDIES), default)
    args.shapes = _names(parser, "--shapes", args.shapes, tuple(SHAPES), tuple(SHAPES))
    try:
        args.threads = [int(n) for n in (args.threads or ("1" if args.quick else "1,2")).split(",")]
    except ValueError:
        parser.error(f"--threads: expected integers such as 1,2, got {args.threads!r}")
    if min(args.threads) < 1:
        parser.error(f"--threads: expected integers >= 1, got {args.threads}")
    return args


def _names(parser: argparse.ArgumentParser, option: str, text: str | None, known: tuple, default: tuple) -> tuple:
    names = default if text is None else tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in known:
            parser.error(f"{option}: unknown {name!r}: expected some of {', '.join(known)}")
    return names


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and report; 1 if a parity gate was red or a measuring process failed."""
    args = parse(arguments)
    if args.worker:
        worker(args.worker)
        return 0
    if args.list:
        print("\n".join([*(f"{name:12s} {study.__doc__.splitlines()[0]}" for name, study in STUDIES.items()), *SHAPES]))
        return 0
    quick = args.quick
    settings = Settings(
        backend=args.backend,
        seconds=args.seconds if args.seconds is not None else 1.0 if quick else 8.0,
        min_rounds=3 if quick else 7,
        compile_seconds=args.compile_seconds if args.compile_seconds is not None else 0.0 if quick else 300.0,
        quick=quick,
        toy=args.toy,
    )
    common = {"settings": dataclasses.asdict(settings)}
    (probe,) = start({"study": "probe", "case": "", "threads": 1, **common})
    if "error" in probe or probe["unavailable"]:
        print(f"bench: backend {args.backend!r} cannot run here: {probe.get('error') or probe['unavailable']}", file=sys.stderr)
        return 1
    results = []
    todo = jobs(args.only, args.shapes, args.threads, settings)
    for i, (study, shape, threads) in enumerate(todo, 1):
        print(f"[{i}/{len(todo)}] {study} {shape}, {threads} threads", file=sys.stderr, flush=True)
        results += start({"study": study, "case": shape, "threads": threads, **common})
    avx512 = bool(probe["capability"]) and "avx512" in probe["capability"]["possible"]
    document = {
        "program": "bench/cpu.py", "date": harness.today(), **harness.commit(), "machine": harness.machine(),
        "versions": probe["versions"], "capability": probe["capability"], "settings": dataclasses.asdict(settings),
        "malloc": harness.MALLOC, "threads": args.threads, "results": results,
        "targets": [] if args.toy else judge(results, args.threads, avx512),
    }  # fmt: skip
    print(report(document))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(_plain(document), indent=1, allow_nan=False) + "\n")
    red = any("error" in r or not all(g["ok"] for g in r["parity"].values()) for r in results)
    missed = any(m["verdict"] == "NOT met" for t in document["targets"] for m in t["measured"].values())
    return int(red or (args.strict and missed))


def _plain(x: object) -> object:
    """JSON has no infinities: they become null."""
    if isinstance(x, dict):
        return {str(key): _plain(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [_plain(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


if __name__ == "__main__":
    sys.exit(main())
