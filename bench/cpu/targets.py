"""What the kernels must reach on a CPU with AVX2 or AVX-512, and what is said of a run that did or did not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from ..common.implementations import BOTH, DIRECTIONS, FORWARD, MOMENTUM, PLAIN, retentions
from ..common.results import Target, judge
from . import hybrid, wrappers
from .cases import LINEAR_SHAPES, MLP_SHAPES, ONE_OF_EACH


def targets() -> Iterator[Target]:
    yield from _against_pytorch()
    for direction in DIRECTIONS:
        for name, case, study, who, least, goal in (
            ("generic p / L2", "D64 C64", "bias", "lp 2.5", 1.3, 1.15),
            ("AVX2 / AVX-512", "D64 C64", "capability", "avx2", 1.9, 1.6),
            ("small decays / mild", "D64 C64", "decay", "strong (alpha 0.05..0.2)", 1.1, 1.02),
        ):
            yield Target(f"{direction}, {name}", study, case, direction, ("ratios", who, "median"), least, goal, at_most=True)
    for shape in ONE_OF_EACH:
        for name, limit in [*((name, 1.5) for name in retentions()), (MOMENTUM, 1.6)]:
            path = ("ratios", name, "median")
            yield Target(f"{BOTH}, {name} / {PLAIN}", "recurrence", shape, BOTH, path, limit, at_most=True)
        case = f"{shape}, tokens"
        yield Target("time as a power of the tokens", "scaling", case, BOTH, ("fit", "time"), 1.05, at_most=True)
        yield Target("saved for the backward / promised", "scaling", case, BOTH, ("saved_over_promised",), 1.0, at_most=True)
    for name, (_, direction, _) in wrappers.RUNS.items():
        yield Target("model / its memory blocks", "wrappers", name, direction, ("ratios", "model", "median"), 1.1, at_most=True)
    for name, least in (("prefill", 2), ("training step", 1.5)):
        case, path = f"{name}, bfloat16", ("ratios", "transformers", "median")  # the dtype of the published models
        yield Target("a model in Qwen3.5's shape against transformers", "hybrid", case, hybrid.RUNS[case][0], path, least, 3)
    yield Target("one head, 2 threads / 1", "scaling", "MLP D64 C64, one head", BOTH, ("ratios", "2", "median"), 0.667, 0.556, at_most=True)
    for shape in MLP_SHAPES:
        yield Target("peak memory / eager", "memory", shape, BOTH, ("peak_share",), 0.5, at_most=True)


def _against_pytorch() -> Iterator[Target]:
    share, peak = ("share_of_mm", "median"), ("share_of_peak", "best")
    ratio = lambda who: ("ratios", who, "median")
    linear, mlp = LINEAR_SHAPES, MLP_SHAPES
    for name, direction, path, shapes, least, goals in (
        ("against eager", FORWARD, ratio("eager"), linear, (4, 6, 2.5), (6, 10, 3.5)),
        ("against torch.compile", FORWARD, ratio("compile"), linear, (2.5, 4, 1.7), (3.5, 6, 2.2)),
        ("against eager autograd", BOTH, ratio("eager"), linear, (5, 10, 6), (8, 16, 9)),
        ("against the hand-derived backward", BOTH, ratio("derived"), linear, (2.5, 3.5, 1.8), (3.5, 5, 2.5)),
        ("share of torch.mm", FORWARD, share, linear, (0.55, 0.50, 0.55), (0.70,) * 3),
        ("share of torch.mm", BOTH, share, linear, (0.45, 0.35, 0.45), (0.60,) * 3),
        ("share of the peak, best round", FORWARD, peak, linear, (0.72, 0.60, 0.72), (0.80, 0.70, 0.80)),
        ("share of the peak, best round", BOTH, peak, linear, (0.62, 0.52, 0.62), (0.70, 0.60, 0.70)),
        ("share of the peak, best round", FORWARD, peak, mlp, (0.72, 0.68), (0.80, 0.76)),
        ("share of the peak, best round", BOTH, peak, mlp, (0.58, 0.54), (0.66, 0.62)),
        ("against eager autograd", BOTH, ratio("eager"), mlp, (3.3, 5), (3.8, 6)),
        ("against titans-pytorch", BOTH, ratio("titans"), mlp, (4, 15), (None, None)),
        ("share of torch.mm", BOTH, share, mlp, (0.45, 0.45), (None, None)),
    ):
        for shape, a, b in zip(shapes, least, goals, strict=True):
            yield Target(f"{direction} {name}", "shapes", shape, direction, path, a, b)
    for shapes, forward, gradient in ((linear, 1e-5, 1e-4), (mlp, 2e-5, 5e-4)):
        for name, key, limit in (("outputs and states", "forward_error", forward), ("gradients", "gradient_error", gradient)):
            path = ("parity", "kernel", key)
            yield from (Target(f"relative error, {name}", "shapes", s, BOTH, path, limit, at_most=True) for s in shapes)


#: the instruction sets that targets are for
JUDGED = ("avx512", "avx2")


def judged(asked: Iterable[Target], results: Sequence[dict], threads: Sequence[int], capability: str | None) -> list[dict]:
    """Every target of the studies that ran. Times are not judged with instruction sets other than :data:`JUDGED`, or where one with
    several threads is flagged."""

    def doubt(target: Target, result: dict) -> str | None:
        if target.path[0] == "parity":
            return None
        flagged = result.get("watch", {}).get("flags") if result["threads"] > 1 else target.study == "hybrid" and result["notes"]
        return "neither AVX2 nor AVX-512" if capability not in JUDGED else "see notes" if flagged else None

    return judge(asked, results, {str(n): {"threads": n} for n in threads}, doubt)


def summary_line(document: dict) -> str:
    """How many figures meet their target, and which miss it; what was not measured or is doubtful does not count."""
    judged = [(t, n, m) for t in document["targets"] for n, m in t["measured"].items() if m["verdict"] in ("goal", "met", "NOT met")]
    missed = [
        f"{t['name']}, {t['case']}, {n} thread{'s' if n != '1' else ''} ({m['value']:.3g}, asked {t['least']:g})"
        for t, n, m in judged
        if m["verdict"] == "NOT met"
    ]
    rest = f" Not met: {'; '.join(missed)}." if missed else ""
    return f"{len(judged) - len(missed)} of {len(judged)} figures with a target meet it.{rest} `python -m bench.cpu --show` lists them all."
