"""Multi-query associative recall (Arora et al., *Zoology*, arXiv 2312.04927): small models of two memory layers, trained with each bias.

A sequence is ``k1 v1 k2 v2 ...``, with new random pairs each time, then every key once more in another order; the model predicts the value
of each. Learning rates are chosen on a seed that is not reported, by the accuracy at the number of pairs of training.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from miras_kernels.layers import PRESETS, MemoryBlock, Preset
from miras_kernels.tables.biases import L1, L2, DotProduct, Huber, Lp, RobustL2

from .results import Run

__all__ = ["MEMORIES", "Training", "run"]

SYMBOLS = 32  # different keys, and as many different values
WIDTH, HEAD = 64, 16  # channels of the model, and of the one memory head of each layer
PAIRS = 8  # in training: half of what a HEAD x HEAD matrix can store exactly
ASKED = (4, 8, 16, 24)  # pairs in evaluation
RATES = (5e-3, 1e-2, 2e-2)  # learning rates of the optimiser, the same for every memory
BATCH, WARMUP, FINAL = 32, 20, 0.3  # sequences per step; steps of warmup; share of the steps in which the learning rate decays
CHUNK = 16  # chunk_size, as in the presets


def _linear(bias) -> Preset:
    """A linear memory with decay; all biases have the same token gates."""
    return Preset(bias, "bounded", "token", CHUNK, "this study")


#: name -> preset of the model's layers
MEMORIES: dict[str, Preset] = {
    "dot product": _linear(DotProduct()),
    "L2": _linear(L2()),
    "L1": _linear(L1()),
    "L3": _linear(Lp(3.0)),
    "Huber coordinate": _linear(Huber("coordinate")),
    "Huber norm": _linear(Huber("norm")),
    "Huber switch": _linear(Huber("switch")),
    "robust L2": _linear(RobustL2()),
    "MLP L2": PRESETS["l2_mlp"],
    "MLP Huber switch (Yaad)": PRESETS["yaad"],
    "MLP L3 + Lq (Moneta)": PRESETS["moneta"],
    # the preset takes an eighth of these step sizes, which texts of thousands of tokens need
    "MLP L2 + KL (Memora)": dataclasses.replace(PRESETS["memora"], rate=1.0),
}


@dataclasses.dataclass(frozen=True)
class Training:
    """Steps of a run, and number of reported seeds, the same for every memory."""

    steps: int
    repeats: int


class _Layer(nn.Module):
    def __init__(self, preset: Preset):
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.memory = MemoryBlock(WIDTH, 1, HEAD, preset=preset, init_std=WIDTH**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.memory(self.norm(x))[0]


def _model(preset: Preset) -> nn.Sequential:
    head = nn.Linear(WIDTH, SYMBOLS, bias=False)
    return nn.Sequential(nn.Embedding(2 * SYMBOLS, WIDTH), _Layer(preset), _Layer(preset), nn.RMSNorm(WIDTH), head)


def _draw(count: int, pairs: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sequences ``[count, 3 * pairs]``, and the values to predict at the last ``pairs`` positions."""
    keys = torch.rand(count, SYMBOLS, generator=g).argsort(-1)[:, :pairs]
    values = torch.randint(SYMBOLS, (count, pairs), generator=g)
    order = torch.rand(count, pairs, generator=g).argsort(-1)
    told = torch.stack([keys, values + SYMBOLS], -1).flatten(1)
    return torch.cat([told, keys.gather(1, order)], 1), values.gather(1, order)


def _train(preset: Preset, rate: float, steps: int, seed: int) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = _model(preset)
    optimizer = torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.95))
    g = torch.Generator().manual_seed(seed)
    for i in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (i + 1) / WARMUP, (steps - i) / (FINAL * steps))
        ids, asked = _draw(BATCH, PAIRS, g)
        F.cross_entropy(model(ids)[:, -PAIRS:].flatten(0, 1), asked.flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model


@torch.no_grad()
def _accuracy(model: nn.Module, pairs: int, seed: int) -> float:
    ids, asked = _draw(4 * BATCH, pairs, torch.Generator().manual_seed(seed))
    return (model(ids)[:, -pairs:].argmax(-1) == asked).float().mean().item()


def seeds(seed: int, training: Training) -> tuple[int, list[int]]:
    """The seed on which the learning rate is chosen, and those that are reported; it is none of them."""
    first = 2_000_000 * seed
    return first, list(range(first + 1_000_000, first + 1_000_000 + training.repeats))


def run(memory: str, training: Training, seed: int, train: Callable = _train) -> list[Run]:
    """Choose a memory's learning rate, then train it once for every reported seed."""
    preset, (tuning, reporting) = MEMORIES[memory], seeds(seed, training)
    fresh = 500_000  # seeds of evaluation are no seeds of training
    found = [_accuracy(train(preset, rate, training.steps, tuning), PAIRS, tuning + fresh) for rate in RATES]
    rate = RATES[found.index(max(found))]
    runs = []
    for one in reporting:
        model = train(preset, rate, training.steps, one)
        runs.append(Run(memory, one, rate, {pairs: _accuracy(model, pairs, one + fresh) for pairs in ASKED}))
    return runs
