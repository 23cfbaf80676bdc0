"""Memories and readers: one table, and the place to add another.

A contestant reads a stream of pairs once, token by token (``chunk_size`` 1), and then answers. What may be chosen about it lies in a unit
cube with one axis per choice, so that every contestant can be searched in the same way, with the same number of points.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from ..layers.functional import suit
from ..memory import linear_memory, mlp_memory
from ..tables.biases import L1, L2, Bias, DotProduct, Huber, Lp, RobustL2
from ..tables.retention import KLRetention, L2Retention, LqRetention, Retention
from .tasks import DIM, Stream

__all__ = ["TABLE", "Contestant", "read", "score"]

EXPANSION = 4  # hidden channels of an MLP memory per channel, as in the paper
STATE = {"linear": DIM * DIM, "mlp": 2 * EXPANSION * DIM * DIM}  # numbers that a memory remembers
HUGE = 10.0  # relative errors are cut here: a memory that diverged is no worse than another one that did
FLOORS = (0.03, 0.1, 0.3, 1.0)  # of LqRetention, for a linear memory
MASSES = (4.0, 16.0, 64.0, 256.0)  # of KLRetention, for a linear memory
#: a bias' name here; Lp is taken with p = 3
NAMES = {
    "dot": "dot product", "l2": "L2", "l1": "L1", "lp": "L3", "lp_smooth": "L3", "huber_coordinate": "Huber coordinate",
    "huber_norm": "Huber norm", "huber_switch": "Huber switch", "robust_l2": "robust L2",
}  # fmt: skip
GATES = {L2Retention: (), LqRetention: ("Lq",), KLRetention: ("KL",)}


def _log(low: float, high: float) -> Callable[[Tensor], Tensor]:
    """From [0, 1] to [low, high], evenly in the logarithm."""
    return lambda x: low * (high / low) ** x


#: axis of the search: its range
AXES: dict[str, Callable[[Tensor], Tensor]] = {
    "step": _log(1e-4, 4.0),
    "forget": _log(1e-4, 0.5),  # 1 - alpha
    "delta": _log(0.01, 100.0),  # in sizes of a value (of one of its channels for the coordinate-wise Huber loss)
    "temperature": _log(0.01, 10.0),
    "ridge": _log(1e-4, 1e3),
    "size": lambda x: (4 * x).long().clamp(max=3),  # which of FLOORS or MASSES
}


@dataclasses.dataclass(frozen=True)
class Contestant:
    """A row of the table.

    Attributes:
        name: as tables and sentences show it.
        kind: "linear", "mlp", or "reader" for one that keeps every pair.
        axes: what is searched, names in :data:`AXES`.
        bias, retention: of a memory.
    """

    name: str
    kind: str
    axes: tuple[str, ...]
    bias: Bias | None = None
    retention: type[Retention] = L2Retention

    def choices(self, points: Tensor) -> dict[str, Tensor]:
        """What points ``[n, axes]`` of the unit cube stand for, ``[n]`` each."""
        return {axis: AXES[axis](points[:, i]) for i, axis in enumerate(self.axes)}


def _memory(bias: Bias, decay: bool, kind: str = "linear", retention: type[Retention] = L2Retention) -> Contestant:
    name = " + ".join([("MLP " if kind == "mlp" else "") + NAMES[bias.name], *GATES[retention], *(["decay"] if decay else [])])
    axes = ["step"] + ["forget"] * decay + ["delta"] * bias.needs_delta + ["size"] * (kind == "linear" and retention is not L2Retention)
    return Contestant(name, kind, tuple(axes), bias, retention)


def _rows() -> list[Contestant]:
    biases = (DotProduct(), L2(), L1(), Lp(3.0), Huber("coordinate"), Huber("norm"), Huber("switch"), RobustL2())
    return [
        *(_memory(bias, decay) for decay in (False, True) for bias in biases),
        _memory(L2(), True, retention=LqRetention),
        _memory(Lp(3.0), True, retention=LqRetention),
        _memory(L2(), True, retention=KLRetention),
        _memory(DotProduct(), True, "mlp"),
        _memory(L2(), True, "mlp"),
        _memory(Huber("switch"), True, "mlp"),  # Yaad
        _memory(Lp(3.0, sharpness=10.0), True, "mlp", LqRetention),  # Moneta
        _memory(L2(), True, "mlp", KLRetention),  # Memora
        Contestant("softmax attention", "reader", ("temperature",)),
        Contestant("softmax attention + decay", "reader", ("temperature", "forget")),
        Contestant("hard attention", "reader", ()),
        Contestant("ridge regression", "reader", ("ridge",)),
    ]


#: name -> contestant
TABLE: dict[str, Contestant] = {row.name: row for row in _rows()}


# ----------------------------------------------------------------------------------------------------------- reading


@torch.no_grad()
def read(contestant: Contestant, points: Tensor, stream: Stream, seeds: list[int]) -> Tensor:
    """Answers to the queries ``[n, S, Q, DIM]``, for choices ``points [n, axes]`` and streams of S seeds."""
    choices = contestant.choices(points)
    if contestant.kind == "reader":
        answers = _READERS[contestant.name](stream, {name: x[:, None, None, None] for name, x in choices.items()})
        return answers.expand(len(points), -1, -1, -1)
    if "size" not in choices:
        return _remember(contestant, choices, stream, seeds, contestant.retention())
    answers = stream.queries.new_empty(len(points), *stream.queries.shape)
    for i, (floor, mass) in enumerate(zip(FLOORS, MASSES, strict=True)):  # a gate's parameter is one number for a whole call
        mine = choices["size"] == i
        # Steps in units that move the primal of an empty memory as far as without a gate.
        gate, unit = (LqRetention(4.0, floor), floor**2) if contestant.retention is LqRetention else (KLRetention(mass), DIM / mass)
        some = {name: x[mine] for name, x in choices.items()}
        if mine.any():
            answers[mine] = _remember(contestant, {**some, "step": some["step"] * unit}, stream, seeds, gate)
    return answers


def _remember(c: Contestant, choices: dict[str, Tensor], stream: Stream, seeds: list[int], retention: Retention) -> Tensor:
    """A memory reads: settings are the batch, streams the heads. Queries are tokens that write nothing and forget nothing."""
    written, count = stream.keys.shape[1], len(choices["step"])
    lay = lambda pairs, asked: torch.cat([pairs, asked], 1).transpose(0, 1).expand(count, -1, -1, -1)
    q = lay(torch.zeros_like(stream.keys), stream.queries)
    k, v = lay(stream.keys, stream.queries), lay(stream.values, torch.zeros_like(stream.queries))
    writes = (torch.arange(q.shape[1]) < written).float()[None, :, None].expand(*q.shape[:3])
    gate = lambda x: x[:, None, None] * writes
    arguments = dict(lr=gate(choices["step"]), bias=c.bias, retention=retention, chunk_size=1)
    if "forget" in choices:
        arguments["log_decay"] = gate(torch.log1p(-choices["forget"]))
    if "delta" in choices:
        arguments["delta"] = choices["delta"][:, None, None].expand(*q.shape[:3]) * (DIM**0.5 if c.bias.row_coupled else 1)
    if c.kind == "mlp":
        arguments |= _start(retention, seeds)
    out, _ = (linear_memory if c.kind == "linear" else mlp_memory)(q, k, v, **arguments)
    return out[:, written:].transpose(1, 2)


def _start(retention: Retention, seeds: list[int]) -> dict:
    """An MLP memory's start for each stream: random, with the sizes that ``layers.MemoryBlock`` gives it, not learned."""
    weight = (1 + 1 / DIM) ** 0.5  # the root mean square of v - k
    draws = [torch.Generator().manual_seed(seed) for seed in seeds]
    w1 = torch.stack([torch.randn(DIM, EXPANSION * DIM, generator=g) for g in draws]) * (2**0.5 * weight)
    w2 = torch.stack([torch.randn(EXPANSION * DIM, DIM, generator=g) for g in draws]) * (2**0.5 * weight * (1 + EXPANSION**-0.5))
    for dual in (w1, w2):
        suit(retention, dual)
    norm = torch.full((len(seeds), DIM), weight)
    return dict(initial_state=(w1, w2), ln_weight=norm, ln_bias=torch.zeros_like(norm))


def _similarity(stream: Stream) -> Tensor:
    return stream.queries @ stream.keys.transpose(-1, -2)  # [S, Q, T]


def _softmax(stream: Stream, choices: dict[str, Tensor]) -> Tensor:
    logits = _similarity(stream) / choices["temperature"]
    if "forget" in choices:
        age = torch.arange(logits.shape[-1] - 1, -1, -1)
        logits = logits + torch.log1p(-choices["forget"]) * age
    return logits.softmax(-1) @ stream.values


def _hard(stream: Stream, choices: dict[str, Tensor]) -> Tensor:
    """The value of the nearest key; of the last one read, where several are as near but for rounding."""
    similarity = _similarity(stream)
    nearest = (similarity + 1e-5 * torch.arange(similarity.shape[-1])).argmax(-1)
    return stream.values.gather(1, nearest[..., None].expand(-1, -1, DIM)).unsqueeze(0)


def _ridge(stream: Stream, choices: dict[str, Tensor]) -> Tensor:
    """The matrix that is best for all pairs at once, with a penalty on its size."""
    keys = stream.keys.double()
    gram = keys.transpose(-1, -2) @ keys + choices["ridge"].double() * torch.eye(DIM, dtype=torch.float64)
    matrix = torch.linalg.solve(gram, keys.transpose(-1, -2) @ stream.values.double())
    return (stream.queries.double() @ matrix).float()


_READERS = {
    "softmax attention": _softmax,
    "softmax attention + decay": _softmax,
    "hard attention": _hard,
    "ridge regression": _ridge,
}


def score(answers: Tensor, stream: Stream) -> dict[str, Tensor]:
    """Relative error, and the share of answers that lie nearest to the right candidate, ``[n, S]`` each."""
    error = (answers - stream.answers).flatten(-2).norm(dim=-1) / stream.answers.flatten(-2).norm(dim=-1)
    likeness = answers @ stream.candidates.transpose(-1, -2)  # candidates have equal norms: the nearest is the most alike
    found = (likeness.argmax(-1) == stream.right) & answers.isfinite().all(-1)
    return {"error": error.nan_to_num(nan=HUGE, posinf=HUGE).clamp(max=HUGE), "accuracy": found.float().mean(-1)}
