"""Memories and baselines: one table, and the place to add another.

A method reads a stream of pairs once, token by token (``chunk_size`` 1), and then answers queries. Its hyperparameters are a point of the
unit cube, one axis each, so that every method is searched in the same way, with the same number of points.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from miras_kernels import linear_memory, mlp_memory
from miras_kernels.layers.functional import suit
from miras_kernels.tables.biases import L1, L2, Bias, DotProduct, Huber, Lp, RobustL2
from miras_kernels.tables.retention import KLRetention, L2Retention, LqRetention, Retention

from .tasks import DIM, Stream

__all__ = ["TABLE", "Method", "read", "score", "written"]

EXPANSION = 4  # hidden channels of an MLP memory per channel, as in the paper
STATE = {"linear": DIM * DIM, "mlp": 2 * EXPANSION * DIM * DIM}  # numbers in a memory's state
HUGE = 10.0  # relative errors are clipped here: that of a memory that diverged is arbitrary
FLOORS = (0.03, 0.1, 0.3, 1.0)  # of LqRetention, for a linear memory
MASSES = (4.0, 16.0, 64.0, 256.0)  # of KLRetention, for a linear memory
#: names of the biases in tables; Lp has p = 3 here
NAMES = {
    "dot": "dot product", "l2": "L2", "l1": "L1", "lp": "L3", "lp_smooth": "L3", "huber_coordinate": "Huber coordinate",
    "huber_norm": "Huber norm", "huber_switch": "Huber switch", "robust_l2": "robust L2",
}  # fmt: skip
GATES = {L2Retention: (), LqRetention: ("Lq",), KLRetention: ("KL",)}


def _log(low: float, high: float) -> Callable[[Tensor], Tensor]:
    """Map [0, 1] to [low, high], evenly in the logarithm."""
    return lambda x: low * (high / low) ** x


#: axis of the search -> from [0, 1] to the hyperparameter
AXES: dict[str, Callable[[Tensor], Tensor]] = {
    "step": _log(1e-4, 4.0),
    "forget": _log(1e-4, 0.5),  # 1 - alpha
    "delta": _log(0.01, 100.0),  # relative to the norm of a value (to the size of a channel for the coordinate-wise Huber loss)
    "temperature": _log(0.01, 10.0),
    "ridge": _log(1e-4, 1e3),
    "size": lambda x: (4 * x).long().clamp(max=3),  # which of FLOORS or MASSES
}


@dataclasses.dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        kind: "linear", "mlp", or "baseline" for one that stores every pair.
        axes: the hyperparameters that are searched, names in :data:`AXES`.
        bias, retention: of a memory.
    """

    name: str
    kind: str
    axes: tuple[str, ...]
    bias: Bias | None = None
    retention: type[Retention] = L2Retention

    def choices(self, points: Tensor) -> dict[str, Tensor]:
        """The hyperparameters at points ``[n, axes]`` of the unit cube, ``[n]`` each."""
        return {axis: AXES[axis](points[:, i]) for i, axis in enumerate(self.axes)}


def _memory(bias: Bias, decay: bool, kind: str = "linear", retention: type[Retention] = L2Retention, name: str | None = None) -> Method:
    name = " + ".join([("MLP " if kind == "mlp" else "") + (name or NAMES[bias.name]), *GATES[retention], *(["decay"] if decay else [])])
    axes = ["step"] + ["forget"] * decay + ["delta"] * bias.needs_delta + ["size"] * (kind == "linear" and retention is not L2Retention)
    return Method(name, kind, tuple(axes), bias, retention)


def _rows() -> list[Method]:
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
        Method("softmax attention", "baseline", ("temperature",)),
        Method("softmax attention + decay", "baseline", ("temperature", "forget")),
        Method("hard attention", "baseline", ()),
        Method("ridge regression", "baseline", ("ridge",)),
    ]


def written(name: str, bias: Bias) -> list[Method]:
    """A linear memory with a bias of one's own, without decay and with it."""
    return [_memory(bias, decay, name=name) for decay in (False, True)]


#: name -> method
TABLE: dict[str, Method] = {row.name: row for row in _rows()}


# -------------------------------------------------------------------------------------------------- reading a stream


@torch.no_grad()
def read(method: Method, points: Tensor, stream: Stream, seeds: list[int]) -> Tensor:
    """Answers to the queries ``[n, S, Q, DIM]``, for hyperparameters ``points [n, axes]`` and streams of S seeds."""
    choices = method.choices(points)
    if method.kind == "baseline":
        answers = _BASELINES[method.name](stream, {name: x[:, None, None, None] for name, x in choices.items()})
        return answers.expand(len(points), -1, -1, -1)
    if "size" not in choices:
        return _remember(method, choices, stream, seeds, method.retention())
    answers = stream.queries.new_empty(len(points), *stream.queries.shape)
    for i, (floor, mass) in enumerate(zip(FLOORS, MASSES, strict=True)):  # a retention gate's parameter is one number for the whole call
        mine = choices["size"] == i
        # Scale the step size such that a step moves the primal of an empty memory as far as with the L2 gate.
        retention, unit = (LqRetention(4.0, floor), floor**2) if method.retention is LqRetention else (KLRetention(mass), DIM / mass)
        some = {name: x[mine] for name, x in choices.items()}
        if mine.any():
            answers[mine] = _remember(method, {**some, "step": some["step"] * unit}, stream, seeds, retention)
    return answers


def _remember(method: Method, choices: dict[str, Tensor], stream: Stream, seeds: list[int], retention: Retention) -> Tensor:
    """Answers of a memory. Settings are the batch, streams the heads; queries are tokens with a step size of 0 and no decay."""
    written, count = stream.keys.shape[1], len(choices["step"])
    join = lambda pairs, asked: torch.cat([pairs, asked], 1).transpose(0, 1).expand(count, -1, -1, -1)
    q = join(torch.zeros_like(stream.keys), stream.queries)
    k, v = join(stream.keys, stream.queries), join(stream.values, torch.zeros_like(stream.queries))
    writes = (torch.arange(q.shape[1]) < written).float()[None, :, None].expand(*q.shape[:3])
    per_token = lambda x: x[:, None, None] * writes
    arguments = dict(lr=per_token(choices["step"]), bias=method.bias, retention=retention, chunk_size=1)
    if "forget" in choices:
        arguments["log_decay"] = per_token(torch.log1p(-choices["forget"]))
    if "delta" in choices:
        arguments["delta"] = choices["delta"][:, None, None].expand(*q.shape[:3]) * (DIM**0.5 if method.bias.row_coupled else 1)
    if method.kind == "mlp":
        arguments |= _start(retention, seeds)
    out, _ = (linear_memory if method.kind == "linear" else mlp_memory)(q, k, v, **arguments)
    return out[:, written:].transpose(1, 2)


def _start(retention: Retention, seeds: list[int]) -> dict:
    """An MLP memory's initial state for each stream: random, scaled as in ``layers.MemoryBlock``, not learned."""
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
    """The value of the nearest key; of the last one read where several are equally near up to rounding."""
    similarity = _similarity(stream)
    nearest = (similarity + 1e-5 * torch.arange(similarity.shape[-1])).argmax(-1)
    return stream.values.gather(1, nearest[..., None].expand(-1, -1, DIM)).unsqueeze(0)


def _ridge(stream: Stream, choices: dict[str, Tensor]) -> Tensor:
    """The matrix with the least squared error over all pairs, with a penalty on its norm."""
    keys = stream.keys.double()
    gram = keys.transpose(-1, -2) @ keys + choices["ridge"].double() * torch.eye(DIM, dtype=torch.float64)
    matrix = torch.linalg.solve(gram, keys.transpose(-1, -2) @ stream.values.double())
    return (stream.queries.double() @ matrix).float()


_BASELINES = {
    "softmax attention": _softmax,
    "softmax attention + decay": _softmax,
    "hard attention": _hard,
    "ridge regression": _ridge,
}


def score(answers: Tensor, stream: Stream) -> dict[str, Tensor]:
    """Relative error, and the share of answers whose nearest candidate is the right one, ``[n, S]`` each."""
    error = (answers - stream.answers).flatten(-2).norm(dim=-1) / stream.answers.flatten(-2).norm(dim=-1)
    likeness = answers @ stream.candidates.transpose(-1, -2)  # candidates have equal norms: the nearest one has the largest product
    found = (likeness.argmax(-1) == stream.right) & answers.isfinite().all(-1)
    return {"error": error.nan_to_num(nan=HUGE, posinf=HUGE).clamp(max=HUGE), "accuracy": found.float().mean(-1)}
