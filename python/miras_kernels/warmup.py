"""Compile the Triton kernels before a job needs them: ``python -m miras_kernels warmup``.

With a GPU, it makes the calls through the public function, with zeros in every tensor, so that Triton stores the code that later calls
look for in its cache folder. Without one, it records the launches on tensors without storage and compiles them for a named chip, to show
what the compiler makes of them.

**Which later calls find their code.** Triton compiles again for every value of a kernel's constants (head dimensions, chunk size, dtype,
bias and its parameters, whether there is a decay, packing, a gradient). Of integer arguments it distinguishes 1, multiples of 16 and
others. These integers are

* H, and B T H;
* the strides of q, k and v.

The forward is compiled in both of its forms, with the output in the chain over the chunks and after it (docs/backends.md). So a run
with H = 16, the command's default, serves every T and B, every H that is a multiple of 16, and q, k and v in any memory
order, if the head dimensions are multiples of 16. Other numbers of heads need a run with them (``--heads 8``); B T must then be a multiple
of 16 where H is not. With ``--steps`` a :class:`~miras_kernels.Decoder` finds its code too, for any B and any number of tokens. Never
compiled in advance: calls that resume from a state cut inside a chunk, thresholds per channel, and on AMD GPUs tensors beyond 2 GiB. A run
serves one kind of GPU and one version of triton and of this package. A loop that also evaluates without gradients needs a second run with
``--no-grad``.

Importing this module does not import triton.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import autograd, dispatch
from .backends import triton as triton_backend
from .call import Call
from .decode import Decoder
from .memory import linear_memory
from .state import MemoryState
from .tables.biases import Bias, CustomBias
from .tables.memories import LINEAR
from .tables.retention import L2Retention
from .validation import make_call

__all__ = ["TARGETS", "Variant", "refusal", "run", "unavailable"]

#: chips that code can be compiled for without having one; see kernels/offline/compile.py
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


class Sizes(NamedTuple):
    """The sizes of a call that Triton distinguishes only as 1, a multiple of 16, or neither."""

    tokens: int
    heads: int
    sequences: int
    state_grad: bool  # whether the final state gets a gradient


@dataclasses.dataclass(frozen=True)
class Variant:
    """One kind of call: one set of compile-time constants, and the sizes to make it with.

    Attributes:
        decay, differentiate, packed, final_state: whether there are log-decays; a backward; ``cu_seqlens``; a returned state.
        steps: whether a decoder's steps are compiled too.
    """

    key_dim: int
    value_dim: int
    chunk_size: int
    dtype: torch.dtype
    bias: Bias
    batch: int
    tokens: tuple[int, ...]
    heads: tuple[int, ...]
    decay: bool = True
    differentiate: bool = True
    packed: bool = False
    final_state: bool = False
    steps: bool = False

    def __str__(self) -> str:
        parameters = ",".join(f"{x:g}" for x in self.bias.parameters)
        bias = f"{self.bias.name}:{parameters}" if parameters else self.bias.name
        if isinstance(self.bias, CustomBias):
            bias = self.bias.argument()
        return f"k{self.key_dim} v{self.value_dim} chunk {self.chunk_size} {str(self.dtype).removeprefix('torch.')} {bias}"

    def others(self) -> str:
        """The settings that a command's variants share."""
        words = ["forward and backward" if self.differentiate else "forward", "decay" if self.decay else "no decay"]
        words += ["packed"] * self.packed + ["final state"] * self.final_state + ["steps"] * self.steps
        several = lambda numbers: " and ".join(map(str, numbers))
        return f"{', '.join(words)}; B = {self.batch}, T = {several(self.tokens)}, H = {several(self.heads)}"

    def sizes(self) -> list[Sizes]:
        """Sizes of the calls to make; the first one uses everything that this kind of call has.

        The final state may be part of the loss or not, and may lie inside a chunk or at its end.
        """
        grads = (True, False) if self.final_state and self.differentiate else (False,)
        sequences, more = (3, (0,)) if self.packed else (self.batch, (0, 1) if self.final_state else (0,))
        every = itertools.product(self.tokens, more, self.heads, grads)
        return [Sizes(tokens + more, heads, sequences, grad) for tokens, more, heads, grad in every]

    def arguments(self, sizes: Sizes, device: str) -> dict:
        """Arguments of :func:`~miras_kernels.linear_memory` for one of the sizes, all zeros."""
        b, t, h = (self.batch, *sizes[:2])

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device, requires_grad=self.differentiate)

        given: dict[str, Any] = {
            name: zeros(b, t, h, d, dtype=self.dtype) for name, d in (("q", self.key_dim), ("k", self.key_dim), ("v", self.value_dim))
        }
        given |= dict(lr=zeros(b, t, h), log_decay=zeros(b, t, h) if self.decay else None)
        given |= dict(bias=self.bias, delta=1.0 if self.bias.needs_delta else None, chunk_size=self.chunk_size)
        given |= dict(output_final_state=self.final_state, cu_seqlens=None)
        if self.packed:
            n = min(sizes.sequences, t)
            given["cu_seqlens"] = torch.arange(n + 1, dtype=torch.int64, device=device) * t // n
        return given

    def token(self, sizes: Sizes, device: str) -> dict:
        """Arguments of :meth:`~miras_kernels.Decoder.step` for one of the sizes."""
        given = dataclasses.replace(self, differentiate=False, packed=False).arguments(sizes._replace(tokens=1), device)
        return {name: given[name] for name in ("q", "k", "v", "lr", "log_decay", "delta")}

    def step(self, sizes: Sizes) -> Call:
        """The validated call of one token, on tensors without storage; raises as :meth:`call` does."""
        settings = dict[str, Any](bias=self.bias, retention=L2Retention(), momentum=None, chunk_size=self.chunk_size)
        return make_call(LINEAR, **self.token(sizes, "meta"), **settings, initial_state=None, output_final_state=True, cu_seqlens=None)

    def call(self, sizes: Sizes) -> Call:
        """The validated call, on tensors without storage.

        Raises:
            TypeError, ValueError: as the public function does.
        """
        return make_call(LINEAR, **self.arguments(sizes, "meta"), retention=L2Retention(), momentum=None, initial_state=None)


def unavailable(target: str | None) -> str | None:
    """Why nothing can be compiled here, for the GPU of this machine or for a target; or None."""
    reason = dispatch.unavailable("triton")
    if importlib.util.find_spec("triton") is None:
        return reason
    if triton_backend.interpreted():
        return "TRITON_INTERPRET is set: Triton's interpreter compiles nothing; run without it"
    if target is not None:
        return None
    if not torch.cuda.is_available():
        return "no GPU here: the kernels are compiled by running them; --target sm_90, say, compiles for another machine"
    return reason


def refusal(variant: Variant) -> str | None:
    """Why calls of a kind cannot be served, from the public function or the backend; or None."""
    for sizes in variant.sizes():
        try:
            call = variant.call(sizes)
        except (TypeError, ValueError) as error:
            return str(error)
        backend = dispatch.BACKENDS["triton"]
        reason = backend.refuses(call, variant.differentiate) or (backend.refuses_steps(variant.step(sizes)) if variant.steps else None)
        if reason is not None:
            return reason
    return None


# ------------------------------------------------------------------------------------------------ for this machine's GPU


class Counts:
    """How many kernels Triton compiled, and how many it found in its cache."""

    def __init__(self):
        self.compiled = self.found = 0

    def __call__(self, *, cache_hit: bool, **_) -> None:
        self.compiled, self.found = self.compiled + (not cache_hit), self.found + cache_hit


@contextlib.contextmanager
def counting() -> Iterator[Counts]:
    """Count what Triton compiles within the ``with`` block."""
    from triton import knobs

    before, knobs.compilation.listener = knobs.compilation.listener, Counts()
    try:
        yield knobs.compilation.listener
    finally:
        knobs.compilation.listener = before


def forms(variant: Variant, architecture: str) -> list[contextlib.AbstractContextManager[None]]:
    """Contexts for a forward, in which the chain computes the output or not: both where calls of more heads take the other form."""
    from .kernels.common import configs

    taken = (False, True) if configs.Key.of(variant.call(variant.sizes()[0])).fuses(1, 1, architecture) else (False,)
    return [configs.fuse(whether) for whether in taken]


def make_calls(variant: Variant, device: str) -> None:
    """Make every call of a kind, with its backward if it has one, and a decoder's step."""
    from .kernels.common import launch

    architecture = launch.architecture(torch.device(device))
    for sizes in variant.sizes():
        if variant.steps:
            state = MemoryState((torch.zeros(variant.batch, sizes.heads, variant.value_dim, variant.key_dim, device=device),))
            reader = Decoder(state, chunk_size=variant.chunk_size, bias=variant.bias, backend="triton")
            reader.step(**variant.token(sizes, device))
        for form in forms(variant, architecture):
            with form:
                out, final = linear_memory(**variant.arguments(sizes, device), backend="triton")
        if variant.differentiate:
            results = [out, *(final.dual if final is not None and sizes.state_grad else ())]
            torch.autograd.backward(results, [torch.zeros_like(x) for x in results])


def _compile_here(variants: Sequence[Variant]) -> None:
    from triton import knobs

    print(f"{torch.cuda.get_device_name()}: {variants[0].others()}")
    width = max(len(str(variant)) for variant in variants)
    compiled = 0
    for variant in variants:
        start = time.perf_counter()
        with counting() as counts:
            make_calls(variant, "cuda")
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        print(f"{variant!s:{width}s}  {seconds:6.1f} s  {counts.compiled} compiled, {counts.found} found in the cache", flush=True)
        compiled += counts.compiled
    print(f"{compiled} kernels compiled; Triton keeps them in {knobs.cache.dir}")


# --------------------------------------------------------------------------------------------------- for another machine


def launches(variant: Variant, sizes: Sizes, target: str = "") -> list:
    """The launches of a call on a target, for ``kernels.offline`` to compile."""
    from .kernels.common import launch
    from .kernels.offline import compile as offline

    found = []
    call, backend = variant.call(sizes), dispatch.BACKENDS["triton"]
    every = call.checkpoint_interval("triton") if variant.differentiate else 0
    with launch.recording(lambda *what: found.append(offline.Launch(*what)), target):
        for form in forms(variant, target):
            with form:
                out, final, saved = autograd._forward(call, "triton", every)
        if variant.differentiate:
            backend.backward(call, every, saved, torch.empty_like(out), [torch.empty_like(final[0])] if sizes.state_grad else [])
    return found + (offline.recorded_step(variant.step(sizes), target) if variant.steps else [])


def _compile_elsewhere(variants: Sequence[Variant], target: str) -> None:
    """One call of each kind: other sizes may need other code, but nearly the same registers."""
    from .kernels.offline import compile as offline

    variants = [dataclasses.replace(variant, tokens=variant.tokens[:1], heads=variant.heads[:1]) for variant in variants]
    print(f"{target}: {variants[0].others()}")
    for variant in variants:
        print(variant, flush=True)
        seen = set()
        for given in launches(variant, variant.sizes()[0], target):
            code = (offline.source(given).hash(), given.config)
            if code in seen:  # the backward recomputes with some of the forward's kernels
                continue
            seen.add(code)
            start = time.perf_counter()
            needs = offline.compile_launch(given, target)
            print(
                f"  {_name(given):28s}  {given.config!s:18s}  registers {needs.registers:3d}  spills {needs.spills:4d}  "
                f"shared {needs.shared:6d}  tensor cores {needs.tensor or 'no':7s}  {time.perf_counter() - start:5.1f} s",
                flush=True,
            )


def _name(given) -> str:
    """A kernel's name; that of the chain also says which part it walks, since it is launched for several."""
    from .kernels.common import chunks

    parts = {getattr(chunks, part).value: part.lower() for part in ("WHOLE", "HEAD", "BODY", "TAIL", "SEGMENT")}
    return " ".join([given.kernel.__name__, *([parts[given.arguments["PART"]]] if "PART" in given.arguments else [])])


# ------------------------------------------------------------------------------------------------------------------ command


def run(variants: Sequence[Variant], target: str | None) -> int:
    """Compile what calls of these kinds need, for this machine's GPU or for one of TARGETS; returns the command's exit status."""
    reasons = [*((f"{variant}: ", refusal(variant)) for variant in variants), ("", unavailable(target))]
    for what, reason in reasons:
        if reason is not None:
            print(f"warmup: {what}{reason}", file=sys.stderr)
            return 2
    if target is None:
        _compile_here(variants)
    else:
        _compile_elsewhere(variants, target)
    return 0
