"""How time and memory grow: with the tokens of a sequence, with heads, and with threads."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterator

import torch

import miras_kernels
from miras_kernels import L2, Huber
from miras_kernels.tables.memories import find

from ..common.implementations import BOTH, agreement, kernel
from ..common.timing import clock_for, timed
from .cases import Settings, make_case, parity
from .studies import measure, memory_of, peak
from .watch import matrix_product

TOKENS = {f"{n}k": n << 10 for n in (1, 2, 4, 8, 16, 32, 64, 128)}
TOY_TOKENS = {"48": 48, "96": 96, "192": 192}
HEADS = {str(n): n for n in (1, 2, 4, 8, 16)}
FEW_HEADS = 2  # on the axis of tokens


def study_scaling(name: str, threads: int, settings: Settings) -> Iterator[dict]:
    """Forward and backward of one sequence of 1k to 128k tokens, of 1 to 16 heads, and with 1 to all threads: the shape, and one head."""
    shape, _, axis = name.rpartition(", ")
    axes = {"tokens": _tokens, "heads": _heads, "threads": _threads, "one head": _one_head, "coupled head": _coupled_head}
    yield axes[axis](shape, threads, settings)


def _tokens(shape: str, threads: int, settings: Settings) -> dict:
    """Each longer sequence continues the shorter ones; each peak is measured in a process of its own."""
    sizes = TOY_TOKENS if settings.toy else {name: n for name, n in TOKENS.items() if not settings.quick or n <= 16 << 10}
    inputs = draw(shape, settings, max(sizes.values()), FEW_HEADS)
    firsts = {name: part(inputs, "tokens", 0, n) for name, n in sizes.items()}
    result = _measure(shape, "tokens", sizes, firsts, threads, settings)
    if "ms" not in result:
        return result
    found = {name: peak("long", f"{shape}|{n}", threads, settings) for name, n in sizes.items() if name in result["ms"]}
    result["notes"] += [note for x in found.values() for note in x["notes"]]
    for key in ("peak_mib", "saved_mib"):
        result[key] = {name: x[key] for name, x in found.items() if x.get(key) is not None}
    result["promised_mib"] = {name: promised_bytes(x.case) / 2**20 for name, x in firsts.items()}
    result["saved_over_promised"] = max((x / result["promised_mib"][name] for name, x in result["saved_mib"].items()), default=None)
    medians = {name: x["median"] for name, x in result["ms"].items()}
    result["fit"] = {"time": exponent(sizes, medians), "peak memory": exponent(sizes, result["peak_mib"])}
    return result


def study_long(name: str, threads: int, settings: Settings) -> Iterator[dict]:
    """Memory of one of the sequences of :func:`_tokens`."""
    shape, tokens = name.split("|")
    small, inputs = (draw(shape, settings, n, FEW_HEADS) for n in (min(TOY_TOKENS.values()), int(tokens)))
    yield {"study": "long", "case": name, **memory_of(lambda x: kernel(x, settings.backend, BOTH), small, inputs, "kernel")}


def _heads(shape: str, threads: int, settings: Settings) -> dict:
    sizes = {name: n for name, n in HEADS.items() if n <= 4 or not settings.toy}
    inputs = draw(shape, settings, 48 if settings.toy else 1024, max(sizes.values()))
    return _measure(shape, "heads", sizes, {name: part(inputs, "heads", 0, n) for name, n in sizes.items()}, threads, settings)


def _one_head(shape: str, threads: int, settings: Settings) -> dict:
    """As :func:`_threads`, of one sequence with one head: threads share it."""
    return _threads(shape, threads, settings, "one head", batch=1, heads=1)


def _coupled_head(shape: str, threads: int, settings: Settings) -> dict:
    """As :func:`_one_head`, with a bias that couples the value rows of a linear memory."""
    return _threads(shape, threads, settings, "coupled head", batch=1, heads=1, bias=Huber("norm"))


def _threads(shape: str, threads: int, settings: Settings, axis: str = "threads", **changes: object) -> dict:
    """The shape as it is; wall time, and ``torch.mm`` with as many threads beside it."""
    case = make_case(shape, settings, **changes)
    sizes = {str(n): n for n in sorted({*(2**i for i in range(threads.bit_length())), threads})}
    run, product = kernel(case.draw(torch.float32), settings.backend, BOTH), matrix_product()

    def by(n: int, call: Callable[[], object]) -> Callable[[], object]:
        return lambda: (torch.set_num_threads(n), call())[1]

    expected, gates = by(1, run)(), {"1": parity(case, settings.backend)}
    gates |= {name: _same(by(n, run)(), expected, case.tokens, "one thread") for name, n in sizes.items() if n > 1}
    runs = {name: by(n, run) for name, n in sizes.items()} | {f"mm {name}": by(n, product) for name, n in sizes.items()}
    return _timed(shape, axis, sizes, runs, gates, threads, settings)


def _measure(shape: str, axis: str, sizes: dict[str, int], inputs: dict, threads: int, settings: Settings) -> dict:
    """The kernel at all sizes of an axis, taking turns. The smallest is compared with float64, the others with parts of that size."""
    runs = {name: kernel(x, settings.backend, BOTH) for name, x in inputs.items()}
    smallest = next(iter(sizes))
    gates = {smallest: parity(inputs[smallest].case, settings.backend, inputs=inputs[smallest])}
    if gates[smallest]["ok"]:
        for name in list(sizes)[1:]:
            parts = in_parts(inputs[name], settings.backend, axis, sizes[smallest])
            gates[name] = _same(runs[name](), parts, inputs[name].case.tokens, f"parts of {smallest} {axis}")
    return _timed(shape, axis, sizes, runs, gates, threads, settings)


def _timed(shape: str, axis: str, sizes: dict[str, int], runs: dict, gates: dict, threads: int, settings: Settings) -> dict:
    head = {"study": "scaling", "axis": axis, "case": f"{shape}, {axis}", "direction": BOTH, "sizes": sizes}
    samplers = {name: timed(run, clock_for(threads)[1]) for name, run in runs.items()}
    return measure(head, samplers, next(iter(sizes)), gates, threads, settings)


def _same(results: tuple, expected: tuple, tokens: int, other: str) -> dict:
    """A gate: results may differ by as much as sums over all tokens in another order."""
    from miras_kernels.testing.parity import ARITHMETIC, ULPS

    difference, budget = agreement(results, expected), ARITHMETIC * (math.sqrt(tokens) + ULPS)
    worst = {"tensor": f"gradients against {other}", "error": difference, "budget": budget}
    return {"ok": difference <= budget, "worst": worst}


def exponent(sizes: dict[str, int], values: dict[str, float]) -> float | None:
    """The p of ``value = a size^p`` that fits best (least squares of the logarithms); None for fewer than two values."""
    if len(values) < 2:
        return None
    x, y = [math.log(sizes[name]) for name in values], [math.log(max(value, 1e-9)) for value in values.values()]
    return statistics.linear_regression(x, y).slope


def promised_bytes(case) -> int:
    """Bytes of the tensors that autograd may hold between forward and backward, beyond the inputs: a checkpoint every n chunks, of an MLP
    memory two products and a row of scores for every token, and the initial state, where the call made it as zeros."""
    every = miras_kernels.options.checkpoint_interval(case.chunk_size, find(case.memory).kernels["cpp"].checkpoint)
    states = case.batch * math.ceil(case.tokens / (case.chunk_size * every)) + (case.batch if case.initial == "none" else 0)
    mlp = case.memory == "mlp"
    state = (2 * case.hidden if mlp else case.key_dim) * case.value_dim
    token = 2 * case.value_dim + case.chunk_size if mlp else 0
    return 4 * case.heads * (states * state + case.batch * case.tokens * token)


def draw(shape: str, settings: Settings, tokens: int, heads: int):
    """Float32 inputs of one sequence. The bias is L2: to draw for one with a kink, the reference would have to run over all tokens. The
    decays of an MLP memory get slighter with the length, so that all of them together leave a third of it: LayerNorm overflows on a memory
    that shrinks to nothing."""
    inputs = make_case(shape, settings, batch=1, tokens=tokens, heads=heads, bias=L2()).draw(torch.float32)
    if inputs.case.memory == "mlp":
        with torch.no_grad():
            inputs.tensors["log_decay"].mul_(min(1.0, 1024 / tokens))
    return inputs


def part(inputs, axis: str, start: int, end: int):
    """Some tokens or some heads of inputs, as leaves of their own that share storage."""
    own, views = lambda x: x.detach().requires_grad_(), cut(inputs, axis, start, end)
    return dataclasses.replace(views, tensors={name: own(x) for name, x in views.tensors.items()}, duals=tuple(map(own, views.duals)))


def cut(inputs, axis: str, start: int, end: int):
    """Views of some tokens or some heads of inputs."""
    along = lambda x, dim: x if dim is None else x.narrow(dim, start, end - start)
    token, norm, state = (1, None, None) if axis == "tokens" else (2, 0, 1)  # of [B, T, H, ...], LayerNorm's [H, D], states [N, H, ...]
    tensors = {name: along(x, norm if name.startswith("ln_") else token) for name, x in inputs.tensors.items()}
    states = {name: tuple(along(x, state) for x in getattr(inputs, name)) for name in ("duals", "grad_duals")}
    case = dataclasses.replace(inputs.case, **{axis: end - start})
    return dataclasses.replace(inputs, case=case, tensors=tensors, grad_out=along(inputs.grad_out, token), **states)


def in_parts(inputs, backend: str, axis: str, size: int) -> tuple:
    """Gradients of a call that is made in parts: of tokens, each from the final state of the one before, or of heads."""
    function = inputs.case.function
    leaves, outputs, state = inputs.leaves(), [], None
    for start in range(0, getattr(inputs.case, axis), size):
        given = cut(inputs, axis, start, start + size).arguments() | {"backend": backend}
        if axis == "tokens" and state is not None:
            given["initial_state"] = state
        out, state = function(**given)
        outputs.append(out)
    return torch.autograd.grad(torch.cat(outputs, 1 if axis == "tokens" else 2), tuple(leaves.values()), inputs.grad_out)


STUDIES, HELPERS = {"scaling": study_scaling}, {"long": study_long}
