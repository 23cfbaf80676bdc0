"""The studies of bench.cpu.decode: one token at a time in a decoder, against PyTorch and against attention with its cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

import miras_kernels
from miras_kernels.testing import Case, check_steps, steps

from ..common.timing import Clock, clock_for, figures, interleave, spread, timed, whole_chunks
from .cases import Settings
from .watch import Watch

#: batch, heads, head dimension, chunk size (16 is that of the presets); an MLP memory has four hidden units per channel
SIZES = {
    "B1 H1 D64": (1, 1, 64, 16), "B1 H8 D64": (1, 8, 64, 16), "B8 H8 D64": (8, 8, 64, 16), "B8 H8 D64 C64": (8, 8, 64, 64),
    "B32 H8 D64": (32, 8, 64, 16), "B8 H8 D128": (8, 8, 128, 16),
}  # fmt: skip
TOY = (2, 2, 16, 16)
CONTEXTS = {"1k": 1024, "8k": 8192, "64k": 65536}


class Setting:
    """One memory of one size after a prompt, and the next token."""

    def __init__(self, memory: str, size: str, settings: Settings):
        batch, heads, dim, self.chunk = TOY if settings.toy else SIZES[size]
        self.heads, self.dim, self.batch, self.backend = heads, dim, batch, settings.backend
        self.case = Case(
            f"decode {memory} {size}", memory=memory, batch=batch, heads=heads, key_dim=dim, value_dim=dim, hidden=4 * dim,
            tokens=self.chunk + 16, chunk_size=self.chunk, decay="slight",
        )  # fmt: skip
        drawn = self.case.draw(torch.float32).arguments()
        self.arguments = {n: x.detach() if isinstance(x, torch.Tensor) else x for n, x in drawn.items()}
        self.function = self.case.function
        with torch.no_grad():
            _, self.state = self.function(**{**self.arguments, **self.tokens(0, self.chunk + 7)}, backend=self.backend)
            token = {**self.arguments, **self.tokens(self.chunk + 7, self.chunk + 8), "initial_state": self.state}
            _, self.state = self.function(**token, backend=self.backend)  # a state as the call for one token leaves it
        self.token = self.tokens(self.chunk + 8, self.chunk + 9)

    def tokens(self, a: int, b: int) -> dict:
        found = steps.cut(self.arguments, a, b)
        return {name: x.contiguous() if isinstance(x, torch.Tensor) else x for name, x in found.items()}

    def decoder(self, backend: str) -> miras_kernels.Decoder:
        return steps.decoder(self.case, self.arguments, self.state, backend)


def parity(setting: Setting, backend: str) -> dict:
    """The gate: steps across a chunk's end against the whole sequence in float64, within the tests' own budgets."""
    worst = check_steps(setting.case, backend, cuts=range(setting.chunk - 8, setting.case.tokens + 1)).worst
    return {"ok": worst.ok, "error": worst.error, "budget": worst.budget, "tensor": worst.name}


def by_position(setting: Setting, backend: str, clock: Clock, rounds: int) -> list[float]:
    """Median seconds of a step at each position in its chunk; the last one closes the chunk."""
    reader = setting.decoder(backend)
    times: list[list[float]] = [[] for _ in range(setting.chunk)]
    for _ in range(rounds * setting.chunk):
        place = int(reader.buffers.position[0])
        began = clock()
        reader.step(**setting.token)
        times[place].append(clock() - began)
    return [spread(x)["median"] for x in times]


def function_steps(setting: Setting) -> Callable[[], object]:
    """The public function, each call from the state that the last one returned."""
    state = setting.state

    def run() -> None:
        nonlocal state
        _, state = setting.function(**{**setting.arguments, **setting.token, "initial_state": state}, backend=setting.backend)

    return run


def baddbmm(setting: Setting) -> Callable[[], object]:
    """Only the matrix products of a linear step, in place, with all shapes prepared: no chunk ends, no checkpoint is copied."""
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


def attention(setting: Setting, context: int) -> Callable[[], object]:
    """Softmax attention of one token over a preallocated cache of so many tokens, to which the token's key and value are written."""
    shape = (setting.batch, setting.heads, context, setting.dim)
    keys, values = torch.randn(shape), torch.randn(shape)
    q, k, v = (setting.token[name].transpose(1, 2).contiguous() for name in "qkv")

    def run() -> torch.Tensor:
        keys[:, :, -1:].copy_(k)
        values[:, :, -1:].copy_(v)
        return torch.nn.functional.scaled_dot_product_attention(q, keys, values)

    return run


def _latency(memory: str, size: str, threads: int, settings: Settings) -> Iterator[dict]:
    """A token's latency: the decoder's step, the public function, the same step in eager PyTorch (in place on the same buffers), and the
    state's dual read and written once."""
    setting = Setting(memory, size, settings)
    result = head(memory, size, threads, parity(setting, settings.backend))
    if not result["parity"]["ok"]:
        yield result
        return
    reader, eager, clock = setting.decoder(settings.backend), setting.decoder("reference"), clock_for(threads)[1]
    tokens = {"step": lambda: reader.step(**setting.token), "eager": lambda: eager.step(**setting.token)}
    tokens["function"] = function_steps(setting)
    samplers = {name: whole_chunks(run, clock, setting.chunk) for name, run in tokens.items()}
    dual = torch.randn_like(reader.buffers.start)
    samplers["touch"] = timed(lambda: dual.mul_(1.0), clock)
    if memory == "linear":
        samplers["baddbmm"] = timed(baddbmm(setting), clock)
    with torch.no_grad(), Watch(threads) as watch:
        times = interleave(samplers, settings.seconds, settings.min_rounds)
        places = by_position(setting, settings.backend, clock, settings.min_rounds)
    result |= {"closing_us": 1e6 * places[-1], "slowest_us": 1e6 * max(places), "slowest_token": 1 + places.index(max(places))}
    yield {**result, **per_token(times, "step", setting.batch), "watch": watch.report()}


def head(study: str, size: str, threads: int, *gates: dict) -> dict:
    """What every result begins with; of several gates the one that came closest to its budget."""
    gate = max(gates, key=lambda gate: gate["error"] / gate["budget"])
    notes = [] if gate["ok"] else ["parity is red, not timed"]
    return {"study": study, "case": size, "threads": threads, "clock": clock_for(threads)[0], "parity": gate, "notes": notes}


def per_token(times: dict[str, list[float]], base: str, batch: int) -> dict:
    """Figures of steps that read a token of ``batch`` sequences each; ratios to ``base``."""
    return {
        "us": {name: {p: 1e6 * x for p, x in spread(t).items()} for name, t in times.items()},
        "ratios": figures(times, base)["ratios"],
        "tokens_per_second": {name: batch / spread(t)["median"] for name, t in times.items() if name != "touch"},
    }


def study_linear(size: str, threads: int, settings: Settings) -> Iterator[dict]:
    """One token of the linear memory against eager PyTorch and the time to read and write its state."""
    yield from _latency("linear", size, threads, settings)


def study_mlp(size: str, threads: int, settings: Settings) -> Iterator[dict]:
    """The same for the MLP memory."""
    yield from _latency("mlp", size, threads, settings)


def study_attention(size: str, threads: int, settings: Settings) -> Iterator[dict]:
    """One token of both memories against softmax attention with a cache of 1k, 8k and 64k tokens."""
    clock, backend = clock_for(threads)[1], settings.backend
    memories = {memory: Setting(memory, size, settings) for memory in ("linear", "mlp")}
    result = head("attention", size, threads, *(parity(setting, backend) for setting in memories.values()))
    if not result["parity"]["ok"]:
        yield result
        return
    readers = {memory: setting.decoder(backend) for memory, setting in memories.items()}
    read = lambda memory: lambda: readers[memory].step(**memories[memory].token)
    samplers = {memory: whole_chunks(read(memory), clock, memories[memory].chunk) for memory in memories}
    some = memories["linear"]
    for name, context in CONTEXTS.items():
        context = context // 64 if settings.toy else context
        size_of_cache = 2 * 4 * some.batch * some.heads * context * some.dim
        if size_of_cache > settings.cache_bytes:
            result["notes"].append(f"attention over {name} left out: its cache would take {size_of_cache / 2**30:.1f} GiB")
            continue
        samplers[name] = timed(attention(some, context), clock)
    with torch.no_grad(), Watch(threads) as watch:
        times = interleave(samplers, settings.seconds, settings.min_rounds)
    state = {m: sum(x.numel() * x.element_size() for x in r.buffers.tensors()) / 2**20 for m, r in readers.items()}
    yield {**result, **per_token(times, "linear", some.batch), "state_mib": state, "watch": watch.report()}


STUDIES = {"linear": study_linear, "mlp": study_mlp, "attention": study_attention}
