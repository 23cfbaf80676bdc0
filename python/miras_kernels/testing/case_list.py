"""One registry of cases for tests, benchmarks and fuzzing."""

from __future__ import annotations

import itertools
from typing import Any

from ..tables.biases import L2, Bias, Huber, Lp
from ..tables.biases import TABLE as BIASES
from ..tables.retention import TABLE as GATES
from ..tables.retention import LqRetention
from .cases import Case

__all__ = ["registry"]


def registry(memory: str | None = None, variants: tuple[str, ...] = ()) -> list[Case]:
    """All cases, or those of one memory, with options of the delta rule where all are among ``variants``. Names are unique and stable."""
    cases = [*_linear(), *_mlp(), *_variants()]
    return [case for case in cases if memory in (None, case.memory) and set(case.variants) <= set(variants)]


def _linear() -> list[Case]:
    huber, norm, switch = Huber("coordinate"), Huber("norm"), Huber("switch")
    biases = [*BIASES.values(), Lp(2.0), Lp(2.5), Lp(4.0), Lp(3.0, sharpness=10.0)]
    cases = [Case(f"linear-{_word(bias)}", bias=bias, seed=i) for i, bias in enumerate(biases)]
    # every bias with several chunks, odd head sizes and no decay
    cases += [
        Case(f"linear-{_word(bias)}-odd", bias=bias, tokens=71, heads=3, key_dim=19, value_dim=33, chunk_size=7, decay="none", seed=i)
        for i, bias in enumerate(BIASES.values(), 20)
    ]
    sizes = {  # name: (batch, tokens, heads, key_dim, value_dim, chunk_size)
        "one-token": (1, 1, 1, 8, 8, 16),
        "short": (2, 5, 2, 16, 16, 64),
        "exact": (2, 64, 2, 32, 32, 32),
        "chunk-1": (2, 19, 2, 16, 8, 1),
        "chunk-3": (1, 25, 2, 8, 40, 3),
        "tiny-heads": (1, 21, 2, 1, 1, 8),
        "wide": (1, 70, 1, 128, 64, 64),
        "tall": (1, 40, 1, 48, 136, 16),
        "largest": (1, 260, 1, 256, 256, 256),
        "common": (1, 130, 2, 64, 64, 64),
        "many-heads": (3, 33, 5, 16, 16, 16),
    }
    for i, (name, (b, t, h, dk, dv, c)) in enumerate(sizes.items(), 40):
        shape = dict[str, Any](batch=b, tokens=t, heads=h, key_dim=dk, value_dim=dv, chunk_size=c)
        cases += [Case(f"linear-{name}-{_word(bias)}", bias=bias, seed=i, **shape) for bias in (L2(), huber, switch)]
    for i, bias in enumerate((L2(), huber, norm, Lp(3.0)), 60):
        word = _word(bias)
        cases += [
            Case(f"linear-{word}-strong-decay", bias=bias, decay="strong", tokens=80, chunk_size=32, seed=i),
            Case(f"linear-{word}-extreme-decay", bias=bias, decay="extreme", tokens=80, chunk_size=32, seed=i),
            Case(f"linear-{word}-packed", bias=bias, lengths=(1, 16, 0, 30, 5, 33, 0), seed=i),
            Case(f"linear-{word}-shared-state", bias=bias, initial="shared", seed=i),
            Case(f"linear-{word}-no-state", bias=bias, initial="none", seed=i),
            Case(f"linear-{word}-fused", bias=bias, layout="fused", seed=i),
            Case(f"linear-{word}-heads-first", bias=bias, layout="heads_first", seed=i),
        ]
    cases += [
        Case("linear-huber_coordinate-float-delta", bias=huber, delta="float", seed=70),
        Case("linear-huber_norm-float-delta", bias=norm, delta="float", seed=71),
        Case("linear-huber_coordinate-channel-delta", bias=huber, delta="channel", seed=72),
        Case("linear-l2-long", tokens=1000, batch=1, chunk_size=32, seed=73),
        Case("linear-l2-packed-shared", lengths=(7, 41, 16), initial="shared", seed=74),
    ]
    cases += [  # exact steps in blocks: docs/mathematics.md, section 13
        Case("linear-l2-chunk-4-strong-decay", chunk_size=4, decay="strong", tokens=41, layout="fused", seed=75),
        Case("linear-l2-chunk-8-packed", chunk_size=8, lengths=(0, 1, 8, 41, 5), seed=76),
    ]
    channel = dict[str, Any](decay="channel", lr="channel", delta="channel")
    cases += [
        Case("linear-huber_coordinate-channel-wise", bias=huber, **channel, seed=90),
        Case("linear-l2-channel-wise-momentum", **channel, momentum=True, seed=91),
        Case("linear-l2-extreme-channel-decay", decay="extreme_channel", tokens=80, chunk_size=32, seed=92),
        Case("linear-l2-extreme-channel-decay-momentum", decay="extreme_channel", momentum=True, tokens=40, seed=93),
        Case("linear-l2-lq-p1.5", retention=LqRetention(1.5, 0.5), seed=94),
        Case("linear-l2-lq-momentum-split", retention=GATES[1], momentum=True, batch=1, heads=1, value_dim=70, seed=95),
    ]
    return cases + _pairs(
        "linear", 200,
        bias=list(BIASES.values()), retention=list(GATES.values()), momentum=[False, True], decay=["scalar", "none", "channel", "strong"],
        lr=["scalar", "channel"], delta=["token", "channel"], initial=["dual", "none", "shared"], lengths=[None, (20, 1, 16, 7)],
    )  # fmt: skip


def _variants() -> list[Case]:
    """The options of the delta rule: docs/mathematics.md, section 14."""
    odd = dict[str, Any](tokens=71, key_dim=19, value_dim=33)
    given: dict[str, dict[str, Any]] = {
        "gated": dict(decay_first=True, tokens=71),
        "gated-extreme": dict(decay_first=True, decay="extreme", lengths=(1, 40, 0, 33), keys="repeated"),
        "kda": dict(decay_first=True, decay="key", tokens=71),
        "kda-extreme": dict(decay_first=True, decay="extreme_key", layout="fused", **odd),
        "kda-packed": dict(decay_first=True, decay="key", lengths=(1, 16, 0, 41, 5, 0), initial="shared"),
        "kda-one-head": dict(decay_first=True, decay="key", batch=1, heads=1, tokens=40, key_dim=48, value_dim=136),
        "key-decay": dict(decay="key", keys="zero", initial="none", layout="heads_first", **odd),
        "key-decay-extreme": dict(decay="extreme_key", tokens=70, keys="repeated"),
        "erase": dict(erase_k=True, decay="none", tokens=33),
        "erase-decay": dict(erase_k=True, decay="strong", lengths=(20, 1, 16, 7), keys="huge"),
        "erase-first": dict(erase_k=True, decay_first=True, layout="fused", **odd),
        "erase-key-decay": dict(erase_k=True, decay="extreme_key", tokens=41, keys="zero"),
        "erase-kda": dict(erase_k=True, decay_first=True, decay="key", tokens=50, value_dim=70),
    }
    return [Case(f"variant-{name}", chunk_size=1, seed=400 + i, **x) for i, (name, x) in enumerate(given.items())]


def _mlp() -> list[Case]:
    shape = dict[str, Any](memory="mlp", key_dim=16, value_dim=16, hidden=24)
    cases = [Case(f"mlp-{_word(bias)}", bias=bias, seed=i, **shape) for i, bias in enumerate(BIASES.values(), 100)]
    cases += _pairs(
        "mlp", 300,
        bias=list(BIASES.values()), retention=list(GATES.values()), momentum=[False, True], decay=["scalar", "none"],
        initial=["dual", "shared"], lengths=[None, (20, 1, 16)], **{name: [x] for name, x in shape.items() if name != "memory"},
    )  # fmt: skip
    cases += [
        Case("mlp-l2-no-decay", decay="none", seed=140, **shape),
        Case("mlp-l2-packed", lengths=(0, 1, 16, 0, 30, 5), seed=141, **shape),
        Case("mlp-l2-shared-state", initial="shared", seed=142, **shape),
        Case("mlp-huber_norm-chunk-1", bias=Huber("norm"), chunk_size=1, tokens=9, seed=143, **shape),
        Case("mlp-l2-extreme-decay", decay="extreme", seed=144, **shape),
        Case("mlp-huber_coordinate-strong-decay", bias=Huber("coordinate"), decay="strong", tokens=80, chunk_size=32, seed=145, **shape),
        Case("mlp-huber_switch-packed", bias=Huber("switch"), lengths=(7, 33, 1), seed=146, **shape),
        Case("mlp-huber_coordinate-float-delta", bias=Huber("coordinate"), delta="float", layout="fused", seed=147, **shape),
        Case("mlp-robust_l2-heads-first", bias=BIASES[8], layout="heads_first", initial="shared", seed=148, **shape),
        Case("mlp-dot-no-decay", bias=BIASES[0], decay="none", seed=149, **shape),
    ]
    sizes = {  # name: (batch, tokens, heads, dim, hidden, chunk_size)
        "one-token": (1, 1, 1, 16, 24, 16),
        "odd": (1, 45, 2, 19, 37, 7),
        "common": (1, 100, 1, 64, 256, 64),
        "wide": (1, 40, 1, 128, 64, 32),
        "tiny": (1, 11, 1, 1, 3, 4),
    }
    for i, (name, (b, t, h, d, hidden, c)) in enumerate(sizes.items(), 160):
        shape = dict[str, Any](memory="mlp", batch=b, tokens=t, heads=h, key_dim=d, value_dim=d, hidden=hidden, chunk_size=c)
        cases.append(Case(f"mlp-huber_coordinate-{name}", bias=Huber("coordinate"), seed=i, **shape))
    return cases


def _pairs(memory: str, seed: int, **factors: list) -> list[Case]:
    """Cases that cover every pair of values of two properties (pairwise testing), chosen greedily."""
    names = list(factors)
    pairs = itertools.combinations(range(len(names)), 2)
    open_pairs = {(i, a, j, b) for i, j in pairs for a in range(len(factors[names[i]])) for b in range(len(factors[names[j]]))}
    cases: list[Case] = []
    while open_pairs:
        chosen: dict[int, int] = dict(zip(*[iter(min(open_pairs))] * 2, strict=True))
        for i in range(len(names)):
            if i in chosen:
                continue
            count = len(factors[names[i]])
            news = [sum((*min((i, a), y), *max((i, a), y)) in open_pairs for y in chosen.items()) for a in range(count)]
            chosen[i] = max((news[a], (a + len(cases)) % count, a) for a in range(count))[-1]
        row = sorted(chosen.items())
        open_pairs -= {(*x, *y) for x, y in itertools.combinations(row, 2)}
        properties = {names[i]: factors[names[i]][a] for i, a in row}
        name = f"{memory}-{_word(properties['bias'])}-{properties['retention'].name}-pairs-{len(cases)}"
        cases.append(Case(name, memory=memory, seed=seed + len(cases), **properties))
    return cases


def _word(bias: Bias) -> str:
    return bias.name + (f"-p{bias.p:g}" if isinstance(bias, Lp) else "")
