"""Presets: one table of published memories, and the place to add another.

A row describes the memory and the token gates of a :class:`~miras_kernels.layers.MemoryBlock`.
"""

from __future__ import annotations

import dataclasses
import math

from ..tables.biases import L2, Bias, DotProduct, Huber, Lp
from ..tables.memories import TABLE
from ..tables.retention import KLRetention, L2Retention, LqRetention, Retention

__all__ = ["PRESETS", "Preset", "resolve"]

_CHOICES = {"memory": tuple(TABLE), "lr": ("bounded", "one", "dt"), "decay": (None, "token", "fixed", "dt", "rate", "key_rate"),
            "momentum": (False, True)}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Preset:
    """The memory of a block and its token gates.

    Attributes:
        bias, retention: the attentional bias and the retention gate. For a bias with ``needs_delta``, delta is computed from the token.
        lr: the step size. ``"bounded"``: from the token, in ``(0, rate / chunk_size)``, which keeps the inner loop stable (see
            :class:`~miras_kernels.layers.MemoryBlock`); ``"one"``: 1; ``"dt"``: the token's time step ``dt = softplus(.)``, as in Mamba-2.
        decay: None; ``"token"``: ``log_decay = -softplus(.)`` from the token; ``"fixed"``: RetNet's ``log(1 - 2^(-5-h))`` for
            head h; ``"dt"``: ``-exp(a) dt`` with a parameter a per head, as in Mamba-2; ``"rate"``: ``-exp(a) softplus(.)`` from the
            token, as in Gated DeltaNet; ``"key_rate"``: the same for every key channel, as in Kimi Linear.
        chunk_size: tokens whose gradients are taken at the same state. It changes the model's outputs, except for the dot product,
            whose gradient does not depend on the state.
        source: name and paper.
        memory: ``"linear"``, or ``"mlp"``: ``M(x) = x + LN(W1 gelu(W2 x))``.
        momentum: whether there is a momentum in (0, 1), from the token; the step size is then multiplied by ``1 - momentum``, so that a
            run of equal tokens moves the memory as far as without momentum.
        rate: upper end of ``lr * chunk_size`` for ``lr="bounded"``.
        decay_first: whether errors are taken after the decay; needs a linear memory and ``chunk_size=1``, as ``decay="key_rate"`` does.
        expansion: hidden channels per channel of an MLP memory, ``Hd = expansion * head_dim``; None for a linear memory.
    """

    bias: Bias
    lr: str
    decay: str | None
    chunk_size: int
    source: str
    retention: Retention = L2Retention()  # noqa: RUF009  immutable
    memory: str = "linear"
    momentum: bool = False
    expansion: int | None = None
    rate: float = 1.0
    decay_first: bool = False

    def __post_init__(self):
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {getattr(self, name)!r}")
        if self.decay == "dt" and self.lr != "dt":
            raise ValueError(f"decay: 'dt' needs lr='dt', got lr={self.lr!r}")
        if self.memory == "linear" and self.expansion is not None:
            raise ValueError(f"expansion: a linear memory has none, expected None, got {self.expansion!r}")
        if self.memory == "mlp" and (isinstance(self.expansion, bool) or not isinstance(self.expansion, int) or self.expansion < 1):
            raise ValueError(f"expansion: expected an integer >= 1 for an MLP memory, got {self.expansion!r}")
        if isinstance(self.rate, bool) or not isinstance(self.rate, (int, float)) or not 0 < self.rate < math.inf:
            raise ValueError(f"rate: expected a number > 0, got {self.rate!r}")
        if not isinstance(self.decay_first, bool):
            raise ValueError(f"decay_first: expected True or False, got {self.decay_first!r}")
        if (self.decay_first or self.decay == "key_rate") and (self.memory != "linear" or self.chunk_size != 1):
            name = "decay_first" if self.decay_first else "decay"
            raise ValueError(f"{name}: {getattr(self, name)!r} needs a linear memory and chunk_size=1, got {self.memory!r} and "
                             f"chunk_size={self.chunk_size!r}")  # fmt: skip
        if self.momentum and self.lr != "bounded":
            raise ValueError(f"momentum: True needs lr='bounded', got lr={self.lr!r}")

    @property
    def token_gates(self) -> tuple[str, ...]:
        """Names of the gates that are projected from the token, in the order of the parameters."""
        wanted = {"lr": self.lr == "bounded", "dt": self.lr == "dt", "log_decay": self.decay in ("token", "rate"),
                  "delta": self.bias.needs_delta, "momentum": self.momentum, "key_log_decay": self.decay == "key_rate"}  # fmt: skip
        return tuple(name for name, want in wanted.items() if want)


#: name -> preset
PRESETS: dict[str, Preset] = {
    "moneta": Preset(
        Lp(3.0, sharpness=10.0),
        "bounded",
        "token",
        16,
        "Moneta: Miras, arXiv 2504.13173, section 5.3",
        retention=LqRetention(4.0),
        memory="mlp",
        expansion=4,
        rate=0.125,
    ),
    "yaad": Preset(Huber("switch"), "bounded", "token", 16, "Yaad: Miras, arXiv 2504.13173, section 5.3", memory="mlp", expansion=4),
    "memora": Preset(
        L2(),
        "bounded",
        "token",
        16,
        "Memora: Miras, arXiv 2504.13173, section 5.3",
        retention=KLRetention(),
        memory="mlp",
        expansion=4,
        rate=0.125,
    ),
    "titans": Preset(L2(), "bounded", "token", 16, "Titans (LMM), arXiv 2501.00663, section 3", memory="mlp", momentum=True, expansion=4),
    "ttt_mlp": Preset(L2(), "bounded", None, 16, "TTT-MLP, arXiv 2407.04620", memory="mlp", expansion=4),
    "l2_mlp": Preset(
        L2(), "bounded", "token", 16, "TTT-MLP with decay: Titans without momentum, arXiv 2501.00663", memory="mlp", expansion=4
    ),
    "yaad_linear": Preset(Huber("switch"), "bounded", "token", 16, "Yaad with a linear memory: Miras, arXiv 2504.13173, section 5.3"),
    "huber": Preset(Huber("coordinate"), "bounded", "token", 16, "Huber loss per coordinate: Miras, arXiv 2504.13173, section 5.1"),
    "l2": Preset(L2(), "bounded", "token", 16, "delta rule by chunks with decay: Titans without momentum, arXiv 2501.00663"),
    "ttt_linear": Preset(L2(), "bounded", None, 16, "TTT-Linear, arXiv 2407.04620"),
    "deltanet": Preset(L2(), "bounded", None, 1, "DeltaNet, arXiv 2406.06484"),
    "gated_deltanet": Preset(L2(), "bounded", "rate", 1, "Gated DeltaNet, arXiv 2412.06464", decay_first=True),
    "kda": Preset(L2(), "bounded", "key_rate", 1, "Kimi Delta Attention: Kimi Linear, arXiv 2510.26692", decay_first=True),
    "linear_attention": Preset(DotProduct(), "one", None, 64, "linear attention, arXiv 2006.16236"),
    "retnet": Preset(DotProduct(), "one", "fixed", 64, "RetNet, arXiv 2307.08621"),
    "mamba2": Preset(DotProduct(), "dt", "dt", 64, "the recurrence of Mamba-2, arXiv 2405.21060"),
}


def resolve(choice: str | Preset, chunk_size: int | None = None) -> Preset:
    """The preset of this name (or the given one), with another chunk size unless ``chunk_size`` is None.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    if isinstance(choice, str):
        if choice not in PRESETS:
            raise ValueError(f"preset: expected one of {', '.join(map(repr, PRESETS))}, got {choice!r}")
        choice = PRESETS[choice]
    elif not isinstance(choice, Preset):
        raise TypeError(f"preset: expected a name or a Preset, got {type(choice).__name__}")
    if chunk_size is None:
        return choice
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int):
        raise TypeError(f"chunk_size: expected an integer >= 1, got {type(chunk_size).__name__}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size: expected an integer >= 1, got {chunk_size}")
    return dataclasses.replace(choice, chunk_size=chunk_size)
