"""The tensors of a benchmark at one shape, drawn on the device, and the calls that use them.

Everyone gets the same q, k (normalised) and v, in the layout that is theirs. The distributions are those of
``miras_kernels.testing.Case``; its own draw works in float64 on the CPU, which takes minutes at these sizes.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from contenders import recurrence, with_leaves
from gpu_plan import FORWARD, Settings, Shape
from miras_kernels import L2, DotProduct, Huber, Lp
from miras_kernels.backends.reference import chunkwise
from miras_kernels.testing import Case
from miras_kernels.testing.cases import Inputs

BIASES = {"l2": L2(), "huber_coordinate": Huber("coordinate"), "lp 3": Lp(3.0), "huber_switch": Huber("switch"), "dot": DotProduct()}

#: every contender's operands
DTYPE = torch.bfloat16


def case_of(shape: Shape, name: str, **changes) -> Case:
    """A test case of the registry's kind in a benchmark's shape, for one of our contenders: a bias, or a recurrence with the usual one."""
    kind = {"bias": BIASES[name]} if name in BIASES else {"bias": BIASES[shape.base], **recurrence(name)}
    sizes = dict(batch=shape.batch, tokens=shape.tokens, heads=shape.heads, key_dim=shape.key_dim, value_dim=shape.value_dim,
                 chunk_size=shape.chunk_size, initial="none")  # fmt: skip
    if shape.hidden:
        sizes |= dict(memory="mlp", hidden=shape.hidden, initial="dual", decay="slight")
    return Case(f"gpu {shape} {name}", **(sizes | kind | changes))


class Tensors:
    """The inputs at one shape; those that only some contenders need are made when they are first asked for."""

    def __init__(self, shape: Shape, settings: Settings):
        self.shape, self.settings = shape, settings
        self._inputs: dict[str, Inputs] = {}
        self._generator = torch.Generator(settings.device).manual_seed(0)
        b, t, h, d = self._sizes = (self.shape.batch, self.shape.tokens, self.shape.heads, self.shape.key_dim)
        normal = functools.partial(torch.randn, b, t, h, d, generator=self._generator, device=settings.device, dtype=DTYPE)
        self.q, self.v = normal().requires_grad_(), normal().mul_(0.6).requires_grad_()
        self.k = torch.nn.functional.normalize(normal(), dim=-1).requires_grad_()
        self.grad_out = normal()
        self.log_decay = self._log_decay().requires_grad_()

    def _uniform(self, low: float, high: float, *channels: int) -> Tensor:
        """A gate ``[B, T, H, *channels]`` in float32."""
        gate = torch.rand(*self._sizes[:3], *channels, generator=self._generator, device=self.settings.device)
        return gate.mul_(high - low).add_(low)

    def _log_decay(self, *channels: int) -> Tensor:
        """An MLP memory's decays are slight, and the slighter the longer it lives: all of them together leave a third of it. What LayerNorm
        makes of a memory that decays to nothing is chaotic, and has gradients beyond every number."""
        if not self.shape.hidden:
            return self._uniform(-0.2, -0.005, *channels)
        slight = min(1.0, 1024 / self.shape.tokens)
        return self._uniform(-2e-3 * slight, -5e-5 * slight)

    @functools.cached_property
    def beta(self) -> Tensor:
        """A delta rule's step sizes, in (0, 1)."""
        return self._uniform(0.01, 0.99).to(DTYPE).requires_grad_()

    @functools.cached_property
    def heads_first(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v as ``[B, H, T, D]``."""
        return tuple(x.detach().transpose(1, 2).contiguous().requires_grad_() for x in (self.q, self.k, self.v))

    @functools.cached_property
    def _grad_heads_first(self) -> Tensor:
        return self.grad_out.transpose(1, 2).contiguous()

    @functools.cached_property
    def mlstm_gates(self) -> tuple[Tensor, Tensor]:
        """Input and forget gates ``[B, H, T]`` before their sigmoids: forgetting little, as an mLSTM is initialised."""
        make = lambda low, high: self._uniform(low, high).transpose(1, 2).contiguous().requires_grad_()
        return make(-1.0, 1.0), make(3.0, 6.0)

    @functools.cached_property
    def layer_norm(self) -> tuple[Tensor, Tensor, Tensor]:
        """TTT-linear's weight and bias ``[H, D]`` and its step sizes ``[B, T, H, 1]``."""
        _, _, h, d = self._sizes
        weight = torch.ones(h, d, device=self.settings.device, dtype=DTYPE).requires_grad_()
        eta = self._uniform(0.001, 0.005).unsqueeze(-1).to(DTYPE).requires_grad_()
        return weight, torch.zeros_like(weight).requires_grad_(), eta

    def grad_like(self, out: Tensor) -> Tensor:
        """The gradient of an output, in its layout."""
        return self.grad_out if out.shape == self.grad_out.shape else self._grad_heads_first

    @functools.cached_property
    def duals(self) -> tuple[Tensor, ...]:
        """An MLP memory's initial matrices ``[B, H, ...]``; a linear memory starts from zeros."""
        b, _, h, _ = self._sizes
        shapes = self.shape.matrices if self.shape.hidden else ()
        normal = functools.partial(torch.randn, generator=self._generator, device=self.settings.device)
        return tuple(normal(b, h, *s).div_(math.sqrt(s[1])).requires_grad_() for s in shapes)

    @functools.cached_property
    def mlp_layer_norm(self) -> dict[str, Tensor]:
        """An MLP memory's LayerNorm, ``[H, D]``."""
        _, _, h, d = self._sizes
        weight = torch.rand(h, d, generator=self._generator, device=self.settings.device).add_(0.5)
        bias = torch.randn(h, d, generator=self._generator, device=self.settings.device).mul_(0.1)
        return {"ln_weight": weight.requires_grad_(), "ln_bias": bias.requires_grad_()}

    def inputs(self, name: str) -> Inputs:
        """Our call's inputs, with step sizes that suit the bias; the same ones whenever they are asked for."""
        if name not in self._inputs:
            self._inputs[name] = self._draw(name)
        return self._inputs[name]

    def _draw(self, name: str) -> Inputs:
        case = case_of(self.shape, name)
        few = case_of(self.shape, name, batch=1, tokens=4 * self.shape.chunk_size, heads=1).draw().tensors  # tells the step sizes
        rate, channels = few["lr"].max().item(), lambda kind: (self.shape.value_dim,) if kind == "channel" else ()
        log_decay = self._log_decay(*channels(case.decay)).requires_grad_() if case.decay == "channel" else self.log_decay
        tensors = {"q": self.q, "k": self.k, "v": self.v, "log_decay": log_decay}
        tensors["lr"] = self._uniform(0.2 * rate, rate, *channels(case.lr)).requires_grad_()
        if case.bias.needs_delta:
            tensors["delta"] = self._uniform(0.5 * case.delta_scale, 1.5 * case.delta_scale).requires_grad_()
        if case.momentum:
            tensors["momentum"] = self._uniform(0.0, 0.8).requires_grad_()
        if self.shape.hidden:
            tensors |= self.mlp_layer_norm
        return Inputs(case, tensors, self.duals, self.grad_out, ())


def short(shape: Shape) -> Shape:
    """A few chunks of one sequence with the same heads and sizes, which are what kernels are compiled for."""
    return dataclasses.replace(shape, batch=1, tokens=min(shape.tokens, 4 * shape.chunk_size))


# ------------------------------------------------------------------------------------------------------------- calls


def eager_run(call):
    """The chunkwise matrix form in PyTorch as its user would run it: matrix products in bfloat16, the rest in float32."""
    wide = call.state.dual[0].dtype
    with torch.autocast(call.q.device.type, dtype=torch.bfloat16):
        return chunkwise.run(call.replace(q=call.q.to(wide), k=call.k.to(wide), v=call.v.to(wide)))


def eager(inputs: Inputs, direction: str) -> Callable[[], tuple]:
    """:func:`eager_run`; for the backward, autograd through it."""
    call = inputs.call()
    return differentiated(lambda: eager_run(call)[0], inputs, direction)


def compiled(inputs: Inputs, direction: str) -> Callable[[], tuple]:
    """torch.compile of the whole of :func:`eager_run`."""
    call, names, leaves = inputs.call(), tuple(inputs.leaves()), tuple(inputs.leaves().values())

    def function(*tensors):
        return eager_run(with_leaves(call, names, tensors))[0]

    torch.compiler.reset()
    run = torch.compile(function, dynamic=False, fullgraph=True)
    return differentiated(lambda: run(*leaves), inputs, direction)


def differentiated(run: Callable[[], Tensor], inputs: Inputs, direction: str) -> Callable[[], tuple]:
    """The output of a function, or the gradients of everything that it took."""
    leaves = tuple(inputs.leaves().values())

    def forward() -> tuple:
        with torch.no_grad():
            return (run(),)

    def both() -> tuple:
        out = run()
        return torch.autograd.grad(out, leaves, inputs.grad_out.to(out.dtype))

    return forward if direction == FORWARD else both


def difference(ours: tuple, theirs: tuple) -> float:
    """The largest relative difference between two contenders' results, computed where they are."""
    worst = 0.0
    for x, y in zip(ours, theirs, strict=True):
        x, y = x.detach().float(), y.detach().float()
        worst = max(worst, ((x - y).norm() / y.norm().clamp_min(1e-30)).item())
    return worst


def all_finite(tensors: tuple) -> bool:
    return all(bool(torch.isfinite(x).all()) for x in tensors)
