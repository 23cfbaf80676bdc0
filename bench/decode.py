"""Decoding on this CPU: a token's latency in both memories, right first, against what PyTorch offers and against attention's cache.

    python bench/decode.py                     everything, markdown on stdout
    python bench/decode.py --json out.json     and JSON
    python bench/decode.py --quick             a few minutes: one thread, short measurements, contexts up to 8k
    python bench/decode.py --only linear,mlp   some studies; --list names them

Contenders take turns as bench/cpu.py has them; docs/benchmarks.md says how to read the numbers. A token's time is the mean over whole
chunks: the tokens of a chunk do not cost the same.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import harness
import process
import program
from decode_model import CONTEXTS, MODEL_CASE, study_model
from decode_report import judge, report
from harness import Watch, figures, interleave, spread, timed, whole_chunks

#: batch, heads, head dimension, chunk size (that of the presets, but for one); an MLP memory has four hidden units per channel
SIZES = {
    "B1 H1 D64": (1, 1, 64, 16), "B1 H8 D64": (1, 8, 64, 16), "B8 H8 D64": (8, 8, 64, 16), "B8 H8 D64 C64": (8, 8, 64, 64),
    "B32 H8 D64": (32, 8, 64, 16), "B8 H8 D128": (8, 8, 128, 16),
}  # fmt: skip
TOY = (2, 2, 16, 16)
#: attention's caches larger than this are left out
CACHE_BYTES = 6 << 30


class Setting:
    """One memory of one size after a prompt, and the tokens that come."""

    def __init__(self, memory: str, size: str, toy: bool, backend: str):
        import torch

        import miras_kernels
        from miras_kernels.testing import Case

        batch, heads, dim, self.chunk = TOY if toy else SIZES[size]
        self.heads, self.dim, self.batch = heads, dim, batch
        self.case = Case(
            f"decode {memory} {size}", memory=memory, batch=batch, heads=heads, key_dim=dim, value_dim=dim, hidden=4 * dim,
            tokens=self.chunk + 16, chunk_size=self.chunk, decay="slight",
        )  # fmt: skip
        self.arguments = {n: x.detach() if isinstance(x, torch.Tensor) else x for n, x in self.case.draw(torch.float32).arguments().items()}
        self.function = miras_kernels.linear_memory if memory == "linear" else miras_kernels.mlp_memory
        self.backend = backend
        with torch.no_grad():
            _, self.state = self.function(**{**self.arguments, **self.tokens(0, self.chunk + 7)}, backend=backend)
            token = {**self.arguments, **self.tokens(self.chunk + 7, self.chunk + 8), "initial_state": self.state}
            _, self.state = self.function(**token, backend=backend)  # a state as the call for one token leaves it
        self.token = self.tokens(self.chunk + 8, self.chunk + 9)

    def tokens(self, a: int, b: int) -> dict:
        names = ("q", "k", "v", "lr", "log_decay", "delta", "momentum")
        return {name: self.arguments[name][:, a:b].contiguous() for name in names if self.arguments[name] is not None}

    def decoder(self, backend: str):
        import miras_kernels

        names = ("chunk_size", "bias", "retention", "ln_weight", "ln_bias", "ln_eps")
        return miras_kernels.Decoder(self.state, **{n: self.arguments[n] for n in names if n in self.arguments}, backend=backend)


def parity(setting: Setting, backend: str) -> dict:
    """Steps across a chunk's end against the whole sequence in float64, with the tests' own budgets."""
    from miras_kernels.testing import check_steps

    worst = check_steps(setting.case, backend, cuts=range(setting.chunk - 8, setting.case.tokens + 1)).worst
    return {"ok": worst.ok, "error": worst.error, "budget": worst.budget, "tensor": worst.name}


# -------------------------------------------------------------------------------------------------------- contenders


def by_position(setting: Setting, backend: str, clock: harness.Clock, rounds: int) -> list[float]:
    """Median seconds of a step at each place in its chunk; the last one closes it."""
    reader = setting.decoder(backend)
    times: list[list[float]] = [[] for _ in range(setting.chunk)]
    for _ in range(rounds * setting.chunk):
        place = int(reader.buffers.position[0])
        began = clock()
        reader.step(**setting.token)
        times[place].append(clock() - began)
    return [spread(x)["median"] for x in times]


def function_steps(setting: Setting) -> Callable[[], object]:
    """The public function, each call from the state that the one before it returned."""
    state = setting.state

    def run() -> None:
        nonlocal state
        _, state = setting.function(**{**setting.arguments, **setting.token, "initial_state": state}, backend=setting.backend)

    return run


def eager_steps(setting: Setting) -> Callable[[], object]:
    """The same step in PyTorch, in place on the same buffers (``reference/step.py``)."""
    reader = setting.decoder("reference")
    return lambda: reader.step(**setting.token)


def baddbmm(setting: Setting) -> Callable[[], object]:
    """The bare products of a linear step, in place, all shapes prepared: no chunk that ends, no start that is copied."""
    import torch

    n, d = setting.batch * setting.heads, setting.dim
    q, k, v = (setting.token[name].reshape(n, 1, d) for name in "qkv")
    lr, log_decay = (setting.token[name].reshape(n, 1, 1) for name in ("lr", "log_decay"))
    start, state = (setting.state.dual[0].transpose(-1, -2).reshape(n, d, d).contiguous() for _ in range(2))
    u = torch.empty_like(v)

    def run() -> torch.Tensor:
        torch.baddbmm(v, k, start, beta=-1, out=u)
        state.mul_(log_decay.exp()).baddbmm_(k.transpose(1, 2), u.mul_(lr), alpha=-1)
        return torch.bmm(q, state)

    return run


def touch(x) -> Callable[[], object]:
    """Reads and writes it once."""
    return lambda: x.mul_(1.0)


def attention(setting: Setting, context: int) -> Callable[[], object]:
    """Softmax attention of one token over a cache of so many, allocated before; the token's key and value are written to it."""
    import torch

    shape = (setting.batch, setting.heads, context, setting.dim)
    keys, values = torch.randn(shape), torch.randn(shape)
    q, k, v = (setting.token[name].transpose(1, 2).contiguous() for name in "qkv")

    def run() -> torch.Tensor:
        keys[:, :, -1:].copy_(k)
        values[:, :, -1:].copy_(v)
        return torch.nn.functional.scaled_dot_product_attention(q, keys, values)

    return run


def study(memory: str, size: str, threads: int, settings: dict) -> Iterator[dict]:
    """A token's latency: the decoder's step, the public function, eager PyTorch, the state read and written once."""
    import torch

    backend, toy = settings["backend"], settings["toy"]
    setting = Setting(memory, size, toy, backend)
    result = {"study": memory, "case": size, "threads": threads, "clock": harness.clock_for(threads)[0], "notes": []}
    result["parity"] = parity(setting, backend)
    if not result["parity"]["ok"]:
        result["notes"].append("parity is red, not timed")
        yield result
        return
    reader, clock = setting.decoder(backend), harness.clock_for(threads)[1]
    tokens = {"step": lambda: reader.step(**setting.token), "function": function_steps(setting), "eager": eager_steps(setting)}
    samplers = {name: whole_chunks(run, clock, setting.chunk) for name, run in tokens.items()}
    samplers["touch"] = timed(touch(torch.randn_like(reader.buffers.start)), clock)
    if memory == "linear":
        samplers["baddbmm"] = timed(baddbmm(setting), clock)
    with torch.no_grad(), Watch(threads) as watch:
        times = interleave(samplers, settings["seconds"], settings["min_rounds"])
        places = by_position(setting, backend, clock, settings["min_rounds"])
    result |= {"closing_us": 1e6 * places[-1], "slowest_us": 1e6 * max(places), "slowest_token": 1 + places.index(max(places))}
    yield {**result, **figures(times, "step", setting.batch), "watch": watch.report()}


def study_linear(size: str, threads: int, settings: dict) -> Iterator[dict]:
    """One token of the linear memory against eager PyTorch and the time to read and write its state."""
    yield from study("linear", size, threads, settings)


def study_mlp(size: str, threads: int, settings: dict) -> Iterator[dict]:
    """One token of the MLP memory, likewise."""
    yield from study("mlp", size, threads, settings)


def study_attention(size: str, threads: int, settings: dict) -> Iterator[dict]:
    """One token of both memories against softmax attention with a cache of 1k, 8k and 64k tokens."""
    import torch

    clock = harness.clock_for(threads)[1]
    memories = {memory: Setting(memory, size, settings["toy"], settings["backend"]) for memory in ("linear", "mlp")}
    gates = {memory: parity(setting, settings["backend"]) for memory, setting in memories.items()}
    result = {"study": "attention", "case": size, "threads": threads, "clock": harness.clock_for(threads)[0], "notes": []}
    result["parity"] = max(gates.values(), key=lambda gate: gate["error"] / gate["budget"])
    if not result["parity"]["ok"]:
        result["notes"].append("parity is red, not timed")
        yield result
        return
    readers = {memory: setting.decoder(settings["backend"]) for memory, setting in memories.items()}
    reads = {memory: lambda reader=readers[memory], token=memories[memory].token: reader.step(**token) for memory in memories}
    samplers = {memory: whole_chunks(read, clock, memories[memory].chunk) for memory, read in reads.items()}
    some = memories["linear"]
    for name, context in CONTEXTS.items():
        context = context // 64 if settings["toy"] else context
        size_of_cache = 2 * 4 * some.batch * some.heads * context * some.dim
        if size_of_cache > min(CACHE_BYTES, settings["cache_bytes"]):
            result["notes"].append(f"attention over {name} left out: its cache would take {size_of_cache / 2**30:.1f} GiB")
            continue
        samplers[name] = timed(attention(some, context), clock)
    with torch.no_grad(), Watch(threads) as watch:
        times = interleave(samplers, settings["seconds"], settings["min_rounds"])
    state = {m: sum(x.numel() * x.element_size() for x in r.buffers.tensors()) / 2**20 for m, r in readers.items()}
    yield {**result, **figures(times, "linear", some.batch), "state_mib": state, "watch": watch.report()}


STUDIES = {"linear": study_linear, "mlp": study_mlp, "attention": study_attention, "model": study_model}

# -------------------------------------------------------------------------------------------------------------- main


def start(study: str, size: str, threads: int, settings: dict) -> Iterator[dict]:
    """One study in a fresh process; what it cannot do becomes a result with an error."""
    for result in process.start("decode.py", {"study": study, "case": size, "threads": threads, "settings": settings}):
        gate = {"ok": False, "error": 0.0, "budget": 0.0}
        yield result | ({"clock": "", "parity": gate} if "error" in result else {})


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    summary_line, quick = __doc__.split("\n", 1)[0], "short measurements, contexts up to 8k"
    parser = program.cpu_parser(summary_line, tuple(STUDIES), quick=quick, seconds="5; 0.7 with --quick")
    parser.add_argument("--sizes", metavar="SIZE,...", help=f"some of {', '.join(SIZES)}")
    args = parser.parse_args(arguments)
    args.only = program.names(parser, "--only", args.only, tuple(STUDIES), tuple(STUDIES))
    args.sizes = program.names(parser, "--sizes", args.sizes, tuple(SIZES), tuple(SIZES))
    args.threads = program.thread_counts(parser, args)
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and report; 1 if a parity gate was red or a measuring process failed."""
    args = parse(arguments)
    if args.worker:
        spec = process.read(args.worker)
        process.tell(STUDIES[spec["study"]](spec["case"], spec["threads"], spec["settings"]))
        return 0
    if args.show:
        print(report(json.loads(args.show.read_text())))
        return 0
    if args.list:
        print("\n".join([*(f"{name:12s} {function.__doc__.splitlines()[0]}" for name, function in STUDIES.items()), *SIZES]))
        return 0
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    settings = {
        "backend": args.backend, "toy": args.toy, "min_rounds": 3 if args.quick else 9,
        "seconds": args.seconds if args.seconds is not None else 0.7 if args.quick else 5.0,
        "cache_bytes": min(available // 3, 1 << 29 if args.quick else CACHE_BYTES),
    }  # fmt: skip
    sizes = {"model": [MODEL_CASE]}  # the model has a size of its own
    results, jobs = [], [(study, size, n) for n in args.threads for study in args.only for size in sizes.get(study, args.sizes)]
    for i, job in enumerate(jobs, 1):
        print(f"[{i}/{len(jobs)}] {job[0]} {job[1]}, {job[2]} threads", file=sys.stderr, flush=True)
        results += start(*job, settings)
    document = {
        "program": "bench/decode.py", "date": harness.today(), **harness.commit(), "machine": harness.machine(),
        "versions": harness.versions("torch"), "settings": settings, "malloc": harness.MALLOC, "threads": args.threads,
        "results": results, "targets": [] if args.toy else judge(results, args.threads),
    }  # fmt: skip
    print(report(document))
    if args.json:
        program.write_json(document, args.json)
    return program.status(document, any("error" in r or not r["parity"]["ok"] for r in results), args.strict)


if __name__ == "__main__":
    sys.exit(main())
