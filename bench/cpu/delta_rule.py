"""The study "delta rule" of bench.cpu: exact steps of one token (docs/mathematics.md, section 13) against chunks of 64 tokens, against
transformers' PyTorch, and against llama.cpp's fused operator; then a single token in the three ways to decode it."""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable, Iterator

import torch

import miras_kernels
from miras_kernels.testing import Case

from ..common.implementations import BOTH, DIRECTIONS, FORWARD, agreement, differentiated, kernel
from ..common.timing import clock_for, timed
from .cases import Settings, parity
from .studies import SAME, measure

#: batch, tokens, heads, head dimension
SIZES = {"D64": (2, 1024, 4, 64), "D128": (1, 1024, 8, 128), "one token D64": (8, 1, 8, 64)}
TOY = {"D64": (1, 40, 2, 16), "D128": (1, 40, 1, 32), "one token D64": (2, 1, 2, 16)}


def study_delta_rule(size: str, threads: int, settings: Settings) -> Iterator[dict]:
    """Exact steps of one token against chunks of 64, transformers' PyTorch and llama.cpp's operator; and decoding one token."""
    batch, tokens, heads, dim = (TOY if settings.toy else SIZES)[size]
    shape = dict(batch=batch, tokens=tokens, heads=heads, key_dim=dim, value_dim=dim)
    exact = Case(f"bench delta rule {size}", chunk_size=1, decay_first=True, initial="dual" if tokens == 1 else "none", **shape)
    inputs = exact.draw(torch.float32)
    for direction in DIRECTIONS if tokens > 1 else (FORWARD,):
        ours, theirs = _decoding(inputs, settings) if tokens == 1 else _sequences(inputs, direction, settings)
        base, expected = next(iter(ours)), next(iter(ours.values()))()
        gates = {name: parity(exact, settings.backend) if name == base else _same(run(), expected) for name, run in ours.items()}
        if tokens > 1:  # another model, which has its own gate
            chunked = Case(f"bench chunks {size}", chunk_size=64, initial="none", **shape)
            ours["chunk 64"] = kernel(chunked.draw(torch.float32), settings.backend, direction)
            gates["chunk 64"] = parity(chunked, settings.backend)
        runs, notes = dict(ours), []
        for name, make in theirs.items():
            try:
                runs[name] = make()
                gates[name] = _same(runs[name](), expected)
            except ImportError as error:
                notes.append(f"{name}: left out, it cannot be imported: {error}")
        samplers = {name: timed(run, clock_for(threads)[1]) for name, run in runs.items()}
        result = measure({"study": "delta rule", "case": size, "direction": direction}, samplers, base, gates, threads, settings)
        yield {**result, "notes": result["notes"] + notes}


def _same(found: tuple, expected: tuple) -> dict:
    """The gate of an implementation that must compute what ours does."""
    error = agreement(found, expected)
    return {"ok": error <= SAME, "worst": {"tensor": "worst against ours", "error": error, "budget": SAME}}


def _sequences(inputs, direction: str, settings: Settings) -> tuple[dict[str, Callable], dict[str, Callable]]:
    """Ours, and what makes the others."""
    theirs = {"transformers": lambda: transformers(inputs, direction), "ggml": lambda: Ggml(inputs)}
    if direction == BOTH:
        del theirs["ggml"]
    return {"chunk 1": kernel(inputs, settings.backend, direction)}, theirs


def _decoding(inputs, settings: Settings) -> tuple[dict[str, Callable], dict[str, Callable]]:
    """A token, from a state in the layout of those that calls return. Where the state is overwritten, the first step is compared."""
    x = {name: tensor.detach() for name, tensor in inputs.tensors.items()}
    state = miras_kernels.MemoryState((inputs.duals[0].detach().mT.contiguous().mT,))
    inplace, decoder = state.map(torch.clone), miras_kernels.Decoder(state, chunk_size=1, backend=settings.backend)
    call = functools.partial(miras_kernels.linear_memory, **x, chunk_size=1, decay_first=True, backend=settings.backend)

    def step() -> tuple:
        decoder.decay(x["log_decay"][:, 0])
        return (decoder.step(*(x[name] for name in ("q", "k", "v", "lr"))),)

    ours = {
        "public function": lambda: (call(initial_state=state, output_final_state=True)[0],),
        "public function, in place": lambda: (call(initial_state=inplace, inplace_state=True)[0],),
        "decoder": step,
    }
    return ours, {"ggml": lambda: Ggml(inputs)}


def transformers(inputs, direction: str) -> Callable[[], tuple]:
    """``torch_chunk_gated_delta_rule``, what Qwen3-Next runs on a CPU; it divides queries by the root of their size."""
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    x, scale = inputs.tensors, math.sqrt(inputs.case.key_dim)
    run = lambda: torch_chunk_gated_delta_rule(x["q"] * scale, x["k"], x["v"], x["log_decay"], x["lr"])[0]
    return differentiated(run, tuple(inputs.leaves().values()), inputs.grad_out, direction)


class Ggml:
    """llama.cpp's fused operator, forward only, through ggml-python, on one thread; ImportError where that is not installed. Its state and
    outputs are laid out as ours; it divides queries by the root of their size."""

    def __init__(self, inputs):
        import ggml

        self.ggml, case = ggml, inputs.case
        x = {name: tensor.detach() for name, tensor in inputs.tensors.items()}
        dual = inputs.duals[0].detach() if inputs.duals else torch.zeros(case.batch, case.heads, case.value_dim, case.key_dim)
        gates = (x["log_decay"].unsqueeze(-1), x["lr"].unsqueeze(-1))
        given = [x["q"] * math.sqrt(case.key_dim), x["k"], x["v"], *gates, dual]
        size = sum(4 * tensor.numel() for tensor in given) + 4 * (x["v"].numel() + dual.numel())
        self.context = ggml.ggml_init(ggml.ggml_init_params(mem_size=size + (1 << 20), mem_buffer=None, no_alloc=False))
        result = ggml.ggml_gated_delta_net(self.context, *map(self.tensor, given), 1)
        self.graph = ggml.ggml_new_graph(self.context)
        ggml.ggml_build_forward_expand(self.graph, result)
        self.plan = ggml.ggml_graph_plan(self.graph, 1, None)
        self.workspace = ctypes.create_string_buffer(max(1, self.plan.work_size))
        self.plan.work_data = ctypes.cast(self.workspace, type(self.plan.work_data))
        memory = (ctypes.c_float * x["v"].numel()).from_address(ggml.ggml_get_data(result))  # outputs, then the final state
        self.out = torch.frombuffer(memory, dtype=torch.float32).view_as(x["v"])

    def tensor(self, x: torch.Tensor):
        """A copy, with the axes in reverse order, as ggml counts them."""
        made = self.ggml.ggml_new_tensor_4d(self.context, self.ggml.GGML_TYPE_F32, *reversed(x.shape))
        ctypes.memmove(self.ggml.ggml_get_data(made), x.contiguous().data_ptr(), 4 * x.numel())
        return made

    def __call__(self) -> tuple:
        self.ggml.ggml_graph_compute(self.graph, ctypes.byref(self.plan))
        return (self.out,)

    def __del__(self):
        if hasattr(self, "context"):
            self.ggml.ggml_free(self.context)


STUDIES = {"delta rule": study_delta_rule}
