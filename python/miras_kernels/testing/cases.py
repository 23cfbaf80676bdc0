"""Cases for tests, benchmarks and fuzzing; their registry is in case_list.py.

A :class:`Case` describes a call; :meth:`Case.draw` makes its tensors, deterministically. The data are well conditioned: step sizes keep
the inner loop contracting for the curvature of every bias, and no error is so close to a kink of psi that rounding could decide the side.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..backends.reference import chunkwise
from ..call import Call
from ..memory import FUNCTIONS
from ..state import MemoryState
from ..tables.biases import L2, Bias, CustomBias, Huber
from ..tables.memories import TABLE, Memory
from ..tables.retention import CustomRetention, L2Retention, Retention
from ..validation import make_call
from . import kinks

__all__ = ["Case", "Inputs"]

#: least distance of errors from a kink of psi: many roundings of a float32 error of order 1
KINK_DISTANCE = 2e-6


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The tensors of a case, all leaves; call ``function(**inputs.arguments())``."""

    case: Case
    tensors: dict[str, Tensor]
    duals: tuple[Tensor, ...]
    grad_out: Tensor
    grad_duals: tuple[Tensor, ...]
    momenta: tuple[Tensor, ...] = ()
    grad_momenta: tuple[Tensor, ...] = ()

    def arguments(self) -> dict:
        """Keyword arguments for ``linear_memory`` or ``mlp_memory``, without the backend."""
        case = self.case
        arguments: dict[str, Any] = {name: self.tensors.get(name) for name in Call.PER_TOKEN[:7]}
        arguments |= {name: self.tensors[name] for name in Call.PER_TOKEN[7:] if name in self.tensors}
        if case.delta == "float":
            arguments["delta"] = case.delta_scale
        if case.decay_first:
            arguments["decay_first"] = True
        if case.row.needs_norm:
            arguments |= {"ln_weight": self.tensors["ln_weight"], "ln_bias": self.tensors["ln_bias"], "ln_eps": 1e-6}
        return arguments | {
            "bias": case.bias,
            "retention": case.retention,
            "chunk_size": case.chunk_size,
            "initial_state": self.initial_state(),
            "output_final_state": True,
            "cu_seqlens": case.cu_seqlens(self.tensors["q"].device),
        }

    def initial_state(self) -> MemoryState | tuple[Tensor, ...] | Tensor | None:
        """As an argument of the public functions: matrices, or a state where there is initial momentum."""
        if self.momenta:
            return MemoryState(self.duals, self.momenta)
        if not self.duals:
            return None
        return self.duals if len(self.duals) > 1 else self.duals[0]

    def call(self) -> Call:
        """The validated call, for the reference modules."""
        arguments = self.arguments()
        tokens = [arguments.pop(name) for name in ("q", "k", "v", "lr", "log_decay")]
        return make_call(self.case.row, *tokens, **arguments)

    def leaves(self) -> dict[str, Tensor]:
        """All tensors that have gradients, by name."""
        duals = {f"initial_dual_{i}": x for i, x in enumerate(self.duals)}
        return self.tensors | duals | {f"initial_momentum_{i}": x for i, x in enumerate(self.momenta)}

    def to(self, dtype: torch.dtype, device: str | torch.device = "cpu") -> Inputs:
        """Fresh leaves: q, k and v in ``dtype``; gates, states and gradients of states in float32 or better."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32

        def cast(x: Tensor, to: torch.dtype) -> Tensor:
            moved = x.detach().to(device=device, dtype=to, memory_format=torch.preserve_format)
            return (moved if moved is not x else x.detach()).requires_grad_()

        tensors = {name: cast(x, dtype if name in ("q", "k", "v", "erase_k") else wide) for name, x in self.tensors.items()}
        return Inputs(
            self.case,
            tensors,
            tuple(cast(x, wide) for x in self.duals),
            self.grad_out.to(device=device, dtype=dtype),
            tuple(x.to(device=device, dtype=wide) for x in self.grad_duals),
            tuple(cast(x, wide) for x in self.momenta),
            tuple(x.to(device=device, dtype=wide) for x in self.grad_momenta),
        )


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of a memory, by its properties.

    Attributes:
        decay: "none", "scalar", "channel", "slight" (alpha above 0.998), "strong" (alpha down to 0.05) or "extreme"
            (steps of -1e4 and runs of -50), "extreme_channel", "key" and "extreme_key" (by key channel).
        delta: "float", "token" or "channel" (a token's for biases that take none per channel); ignored by biases without one.
        lr: "scalar" or "channel".
        initial: "none" (zeros), "dual" (one per sequence; with momentum, also initial momentum matrices) or "shared" (one for all).
        lengths: lengths of sequences packed into B = 1, or None.
        keys: "unit" (of norm 1), "zero" (every third one), "repeated" (three of them) or "huge" (of norm 100).
        decay_first: whether errors are taken after the decay; with chunk_size=1 and L2Retention() only, as decays by key channel and
        erase_k: whether there are keys to erase, near those that are written.
        layout: "contiguous", "fused" (q, k, v are slices of one tensor) or "heads_first" (transposed ``[B, H, T, D]``).
    """

    name: str
    memory: str = "linear"
    bias: Bias = L2()  # noqa: RUF009  immutable
    retention: Retention = L2Retention()  # noqa: RUF009  immutable
    batch: int = 2
    tokens: int = 37
    heads: int = 2
    key_dim: int = 16
    value_dim: int = 12
    hidden: int = 24
    chunk_size: int = 16
    decay: str = "scalar"
    delta: str = "token"
    lr: str = "scalar"
    momentum: bool = False
    initial: str = "dual"
    lengths: tuple[int, ...] | None = None
    layout: str = "contiguous"
    keys: str = "unit"
    decay_first: bool = False
    erase_k: bool = False
    seed: int = 0

    def __str__(self) -> str:
        return self.name

    @property
    def row(self) -> Memory:
        return TABLE[self.memory]

    @property
    def function(self) -> Callable:
        """The public function of the memory."""
        return FUNCTIONS[self.memory]

    @property
    def variants(self) -> tuple[str, ...]:
        """Names of the options of the delta rule that it uses."""
        used = {"decay_first": self.decay_first, "erase_k": self.erase_k, "key_log_decay": self.decay.endswith("key")}
        return tuple(name for name, use in used.items() if use)

    @property
    def sequences(self) -> int:
        return self.batch if self.lengths is None else len(self.lengths)

    @property
    def delta_scale(self) -> float:
        """A threshold with errors of order 1 on both sides."""
        return 0.7 * (math.sqrt(self.value_dim) if self.bias.row_coupled else 1.0)

    def cu_seqlens(self, device: torch.device | str = "cpu") -> Tensor | None:
        if self.lengths is None:
            return None
        return torch.tensor([0, *self.lengths], device=device).cumsum(0)

    def draw(self, dtype: torch.dtype = torch.float64, device: str | torch.device = "cpu", margin: float = KINK_DISTANCE) -> Inputs:
        """The case's tensors, rounded to ``dtype``; errors keep a distance of about ``margin`` from a kink of psi.

        Raises:
            RuntimeError: no draw does. The kinks of an expression are not known well enough to move thresholds away from errors, so that
                with operands of 16 bits, which need a wide margin, there is none.
        """
        custom = kinks.has_kinks(self.bias) or kinks.has_kinks(self.retention)
        if custom and margin > KINK_DISTANCE:
            raise RuntimeError(f"{self.name}: an expression has kinks, and operands of 16 bits decide the side on which numbers are")
        for attempt in range(50):
            inputs = self._draw(self.seed + 1000 * attempt).to(dtype).to(torch.float64)
            if not isinstance(self.bias, Huber) and not custom:
                return inputs.to(dtype, device)
            if isinstance(self.bias, Huber) and self.delta != "float":
                inputs = self._with_margin(inputs, margin).to(dtype).to(torch.float64)
            if self._kink_distance(inputs) > KINK_DISTANCE:
                return inputs.to(dtype, device)
        raise RuntimeError(f"{self.name}: no draw keeps a distance from the kinks of {self.bias} and {self.retention}")

    def _draw(self, seed: int) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        b, t, h, dk, dv = self.batch, self.tokens, self.heads, self.key_dim, self.value_dim
        if self.lengths is not None:
            b, t = 1, sum(self.lengths)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        def uniform(low: float, high: float, *shape: int) -> Tensor:
            return low + (high - low) * torch.rand(*shape, generator=generator, dtype=torch.float64)

        def gate(kind: str, low: float, high: float) -> Tensor:
            return uniform(low, high, b, t, h, *{"channel": [dv], "key": [dk]}.get(kind.removeprefix("extreme_"), []))

        keys = torch.nn.functional.normalize(normal(b, t, h, dk), dim=-1)
        if self.keys == "zero":
            keys[:, ::3] = 0
        elif self.keys == "repeated":
            keys = keys[:, torch.arange(t) % min(3, t)]
        tensors = self._arrange(normal(b, t, h, dk), keys * (100 if self.keys == "huge" else 1), 0.6 * normal(b, t, h, dv))
        if self.erase_k:
            tensors["erase_k"] = torch.nn.functional.normalize(keys + 0.5 / math.sqrt(dk) * normal(b, t, h, dk), dim=-1)
        if self.bias.needs_delta and self.delta != "float":
            kind = self.delta if self.bias.delta_per_channel else "token"
            tensors["delta"] = gate(kind, 0.5 * self.delta_scale, 1.5 * self.delta_scale)
        rate = 0.5 * min(1.0, dk / self.chunk_size) / self._curvature()
        rate *= {"repeated": 1 / min(dk, self.chunk_size), "huge": 1e-4}.get(self.keys, 1.0)  # smaller where the keys of a chunk repeat
        if self.row.needs_norm:  # a = gelu(W2 k): a step changes LN(W1 a) by a share of |a|^2 / var(W1 a), about Hd
            rate /= self.hidden
        tensors["lr"] = gate(self.lr, 0.2 * rate, rate)
        log_decay = "key_log_decay" if self.decay.endswith("key") else "log_decay"
        if self.decay == "slight":
            tensors[log_decay] = gate("scalar", -2e-3, -5e-5)
        elif self.decay == "strong":
            tensors[log_decay] = gate("scalar", 0.05, 0.2).log()
        elif self.decay.startswith("extreme"):
            u = gate(self.decay, 0, 1)
            tensors[log_decay] = torch.where(u < 0.1, -1e4, torch.where(u < 0.4, -50.0, -0.05 * u))
        elif self.decay != "none":
            tensors[log_decay] = gate(self.decay, -0.2, -0.005)
        if self.momentum:
            tensors["momentum"] = uniform(0.0, 0.8, b, t, h)
        shapes = self.row.shapes(dk, dv, self.hidden)
        lead = {"dual": (self.sequences, h), "shared": (h,), "none": None}[self.initial]
        duals = () if lead is None else tuple(normal(*lead, *s) / math.sqrt(s[1]) for s in shapes)
        starts = duals or [torch.zeros(shape, dtype=torch.float64) for shape in shapes]
        tensors["lr"] /= max(1.0, *(self.retention.rho(x).max().item() for x in starts))  # rho scales the effect of a step on predictions
        if self.row.needs_norm:
            tensors |= {"ln_weight": uniform(0.5, 1.5, h, dv), "ln_bias": 0.1 * normal(h, dv)}
        grad_duals = tuple(normal(self.sequences, h, *s) for s in shapes)
        grad_out = normal(b, t, h, dv)
        if not self.momentum:
            return Inputs(self, tensors, duals, grad_out, grad_duals)
        carried = tuple(0.1 * normal(*lead, *s) / math.sqrt(s[1]) for s in shapes) if lead and self.initial == "dual" else ()
        grad_momenta = tuple(normal(self.sequences, h, *s) for s in shapes)
        return Inputs(self, tensors, duals, grad_out, grad_duals, carried, grad_momenta)

    def _arrange(self, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
        if self.layout == "fused":
            q, k, v = torch.cat([q, k, v], -1).split([q.shape[-1], k.shape[-1], v.shape[-1]], -1)
        elif self.layout == "heads_first":
            q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
        return {"q": q, "k": k, "v": v}

    def _curvature(self) -> float:
        """An upper estimate of psi' over errors of order 1, from which step sizes are chosen."""
        x = torch.linspace(-3, 3, 601, dtype=torch.float64)
        e = torch.stack([x, torch.full_like(x, 2 * self.delta_scale)], -1)  # a second channel puts the row beyond its threshold
        delta = torch.full_like(e[:, :1], 1.5 * self.delta_scale)
        slope, *_ = self.bias.psi_vjp(e, torch.zeros_like(e), delta, torch.tensor([1.0, 0.0], dtype=torch.float64).expand_as(e))
        return max(1.0, slope.abs().max().item())

    def _with_margin(self, inputs: Inputs, margin: float) -> Inputs:
        """The same inputs with thresholds moved away from the errors that are compared with them."""
        delta = inputs.tensors["delta"]
        thresholds = torch.cat([torch.zeros(1, dtype=delta.dtype), delta.detach().flatten()])
        ids = torch.arange(1, delta.numel() + 1, dtype=delta.dtype).reshape(delta.shape)  # 0 is padding
        with torch.no_grad():
            chunkwise.run(inputs.call().replace(bias=_Probe(self.bias, thresholds, margin), delta=ids))
        moved = thresholds[1:].reshape(delta.shape).requires_grad_()
        return dataclasses.replace(inputs, tensors=inputs.tensors | {"delta": moved})

    def _kink_distance(self, inputs: Inputs) -> float:
        call, probes = inputs.call(), list[Any]()
        if isinstance(self.bias, Huber):
            probes.append(_Probe(self.bias))
            call = call.replace(bias=probes[-1])
        elif isinstance(self.bias, CustomBias):
            probes.append(kinks.Probe(self.bias))
            call = call.replace(bias=probes[-1])
        if isinstance(self.retention, CustomRetention):
            probes.append(kinks.ProbeGate(self.retention))
            call = call.replace(retention=probes[-1])
        with torch.no_grad():
            chunkwise.run(call)
        return min(distance for probe in probes for distance in probe.distances)


class _Probe(Bias):
    """A Huber bias that records how close errors are to its kink, or moves thresholds away from the errors.

    For the latter, ``thresholds`` are given, and delta is the index of a token's thresholds among them.
    """

    bias: Any  # a Huber
    thresholds: Tensor | None
    margin: float
    distances: list[float]

    def __init__(self, bias: Bias, thresholds: Tensor | None = None, margin: float = 0.0):
        for name, value in dict[str, Any](bias=bias, thresholds=thresholds, margin=margin, distances=[]).items():
            object.__setattr__(self, name, value)

    def psi(self, pred, v, delta):
        e = pred - v
        size = e.abs() if self.bias.kind == "coordinate" else e.norm(dim=-1, keepdim=True)
        if self.thresholds is not None:
            places = delta.long()
            delta = torch.where(places > 0, self._away(size, self.thresholds[places]), 0.0)
            self.thresholds[places] = delta
        self.distances.append((size - delta)[delta.expand_as(size) > 0].abs().min().item())  # padding has delta = 0
        return self.bias.psi(pred, v, delta)

    def _away(self, size: Tensor, delta: Tensor) -> Tensor:
        """``delta`` where it is far enough from ``size [..., S]``, else the middle of a wide gap between sizes near it."""
        if delta.shape == size.shape:
            near = (size - delta).abs() < self.margin
            return torch.where(near, size + torch.where(delta < size, -2, 2) * self.margin, delta).clamp_min(self.margin)
        below, above = size.sort(-1).values[..., :-1], size.sort(-1).values[..., 1:]
        middles, halves = (below + above) / 2, (above - below) / 2
        cost = (middles - delta).abs() + 1e3 * (self.margin - halves).clamp_min(0)
        best = middles.gather(-1, cost.argmin(-1, keepdim=True))
        return torch.where((size - delta).abs().min(-1, keepdim=True).values < self.margin, best, delta)
