"""NaN and infinity planted in the arguments of a call, and the comparison of where they arrive."""

from __future__ import annotations

import math

import torch

import miras_kernels as mk
from miras_kernels.testing import Case, evaluate
from miras_kernels.testing.cases import Inputs

ARGUMENTS = ("q", "k", "v", "lr", "delta", "log_decay", "momentum")
BIASES = [*mk.biases.TABLE.values(), mk.Lp(2.0), mk.Lp(2.5)]
GATES = [*mk.retention.TABLE.values(), mk.LqRetention(2.5)]
KINDS = {f"{bias.name}-{bias.parameters}": dict(bias=bias) for bias in BIASES}
KINDS |= {f"{gate.name}-{gate.parameters}": dict(retention=gate) for gate in GATES[1:]}
KINDS |= {"momentum": dict(momentum=True), "channel": dict(decay="channel")}
KINDS |= {f"mlp-{name}": dict(memory="mlp", **kind) for name, kind in KINDS.items() if name != "channel"}
#: few kinds, since the interpreter is slow, that together take every comparison in the kernels
TRITON = {
    "clip": dict(bias=mk.Huber("coordinate")),
    "power-elastic": dict(bias=mk.Lp(2.5), retention=mk.ElasticNetRetention(0.05)),
    "norm-power": dict(bias=mk.Huber("norm"), retention=mk.LqRetention(2.5), momentum=True),
    "expressions": dict(
        bias=mk.CustomBias("where(norm2 <= delta**2, clip(e, -1, 1), sign(e) * min(abs(e), delta))"),
        retention=mk.CustomRetention("where(A < 0, max(A, -1), A / (1 + abs(A)))"),
    ),
    "mlp-switch-kl": dict(memory="mlp", bias=mk.Huber("switch"), retention=mk.KLRetention()),
}
HEADS, CHUNK = 2, 16


def poisoned(case: Case, at: int) -> tuple[list[tuple[str, float]], Inputs]:
    """A sample for every argument and value, planted at token ``at`` of head 0, in one channel if there are several."""
    inputs = case.draw(torch.float32)
    planted = [(name, x) for name in ARGUMENTS if name in inputs.tensors for x in (math.nan, math.inf)]
    planted = [(name, x) for name, x in planted if math.isnan(x) or name not in ("log_decay", "momentum")]
    copies = lambda x: x.detach().repeat_interleave(len(planted), 0)
    tensors = {name: x.detach() if name.startswith("ln_") else copies(x) for name, x in inputs.tensors.items()}
    for i, (name, x) in enumerate(planted):
        place = tensors[name][i, at, 0]
        (place[0] if place.dim() else place).fill_(x)
    leaves = lambda xs: tuple(copies(x).requires_grad_() for x in xs)
    return planted, Inputs(
        case, {name: x.requires_grad_() for name, x in tensors.items()}, leaves(inputs.duals), copies(inputs.grad_out),
        tuple(map(copies, inputs.grad_duals)), leaves(inputs.momenta), tuple(map(copies, inputs.grad_momenta)),
    )  # fmt: skip


def results(inputs: Inputs, backend: str, gradients: bool) -> dict[str, torch.Tensor]:
    if gradients:
        return evaluate(inputs, backend)
    with torch.no_grad():
        out, state = inputs.case.function(**inputs.arguments(), backend=backend)
    return {"out": out} | {f"final_{i}": x for i, x in enumerate(state.matrices())}


def assert_as_in_the_reference(kind: dict, backend: str, tokens: int, at: int, gradients: bool) -> None:
    case = Case("poisoned", batch=1, heads=HEADS, tokens=tokens, chunk_size=CHUNK, key_dim=8, value_dim=8, hidden=8, **kind)
    planted, inputs = poisoned(case, at)
    wanted, found = results(inputs.to(torch.float64), "reference", gradients), results(inputs, backend, gradients)
    for name, x in found.items():
        if name.startswith("grad_ln"):  # of all heads and samples
            continue
        per_token = x.shape[1] == tokens
        assert x.select(2 if per_token else 1, 1).isfinite().all(), f"{name}: another head"
        if name.startswith("grad_") and "initial" not in name:  # inside a chunk a NaN may be multiplied by a weight of 0
            continue
        for i, (argument, value) in enumerate(planted):
            y, wanted_y = (z[i, at:] if per_token else z[i] for z in (x, wanted[name]))
            same = torch.isnan if math.isnan(value) else lambda z: ~z.isfinite()
            y, wanted_y = same(y), same(wanted_y)
            if name.startswith("grad_"):  # torch.where stops a NaN that a product with 0 passes on, and turns infinity into one
                y, wanted_y = (y & wanted_y, wanted_y) if math.isnan(value) else (y, y)
            assert torch.equal(y, wanted_y), f"{name}: {argument} has a {value}"
    assert found["out"][:, : at // CHUNK * CHUNK].isfinite().all()
