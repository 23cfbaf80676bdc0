"""The kernels as compiled for sm_80 and sm_90, executed on the CPU: results within the usual budgets, and no fault reported.

Every configuration of every kernel is executed at least once on each architecture.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools

import pytest
import torch

import miras_kernels as mk
from miras_kernels.tables.biases import TABLE as BIASES
from miras_kernels.tables.retention import TABLE as GATES
from miras_kernels.testing import Case, check, check_steps, registry
from ptx.host import on_machine
from quick import sample, slow

ARCHITECTURES = ("sm_80", "sm_90")
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
ONE = dict(batch=1, heads=1)
MLP = dict(memory="mlp", batch=1, heads=1, key_dim=16, value_dim=16, hidden=40, decay="slight")
CHANNELS = dict(decay="channel", batch=1, key_dim=16, value_dim=16)
#: expressions with every operation of a program: two that couple a row, one with a threshold by channel; the first has no kinks
ROBUST = mk.CustomBias("e * (1 + delta / sqrt(norm2 + 1))")
NORM = mk.CustomBias("where(norm2 <= delta**2, e, delta * e / sqrt(norm2))")
SMOOTH = mk.CustomBias("clip(delta * tanh(2 * e), -2, 2) + sign(e) * (log(1 + abs(e)) + exp(-e**2) * abs(e)**1.3) / 2")
#: (case, dtype, where a decoding step begins: none if the case is a forward and a backward, and the architectures of `make test`)
SPECIMENS = [
    (Case("wide", key_dim=64, value_dim=64, chunk_size=64, tokens=130, **ONE), BF16, (), ("sm_90",)),
    (Case("fused", bias=mk.Huber("coordinate"), key_dim=128, value_dim=32, chunk_size=64, tokens=130, **ONE), BF16, (), ("sm_90",)),
    (Case("fused-packed", bias=mk.L1(), key_dim=32, value_dim=32, chunk_size=32, lengths=(50, 30, 0)), F16, (), ()),
    (Case("exact", key_dim=128, value_dim=32, chunk_size=1, tokens=70, **ONE), BF16, (), ("sm_90",)),
    (Case("fused-exact", key_dim=64, value_dim=32, chunk_size=1, tokens=70, **ONE), BF16, (), ()),
    (Case("exact-first", decay_first=True, chunk_size=1, lengths=(70, 0, 13)), F16, (), ()),
    (Case("exact-float32", decay="extreme", keys="zero", chunk_size=1, tokens=40, heads=1), F32, (), ()),
    (Case("exact-erase", erase_k=True, chunk_size=1, lengths=(20, 0, 13), heads=1), BF16, (), ()),
    (Case("keyed", decay_first=True, decay="key", chunk_size=1, key_dim=40, tokens=21, **ONE), BF16, (), ()),
    (Case("keyed-erase", erase_k=True, decay="extreme_key", chunk_size=1, lengths=(20, 0, 13), heads=1), F32, (), ()),
    (Case("narrow", bias=mk.Lp(3.0), lengths=(20, 0, 13)), F16, (), ()),
    (Case("long", bias=mk.DotProduct(), key_dim=32, value_dim=32, chunk_size=128, tokens=150, **ONE), BF16, (), ()),
    (Case("row", bias=mk.Huber("norm"), key_dim=32, value_dim=32, chunk_size=32, lengths=(50, 30, 0)), F16, (), ("sm_80",)),
    (Case("tall-row", bias=mk.Huber("switch"), value_dim=32, chunk_size=64, tokens=70, **ONE), BF16, (), ()),
    (Case("float32", bias=mk.Huber("coordinate"), delta="channel", lr="channel", lengths=(7, 41, 0, 16)), F32, (), ()),
    (Case("float32-momentum", bias=mk.L1(), retention=GATES[3], momentum=True, chunk_size=32), F32, (), ()),
    (
        Case(
            "gated", bias=mk.Lp(1.5, 10.0), retention=mk.SigmoidRetention(), momentum=True, key_dim=64, value_dim=64, chunk_size=64,
            tokens=70, **ONE,
        ),
        BF16, (), (),
    ),
    (Case("channels", bias=mk.RobustL2(), retention=mk.KLRetention(), lr="channel", tokens=35, **CHANNELS), F32, (), ()),
    (Case("channels-momentum", retention=mk.LqRetention(), momentum=True, tokens=35, chunk_size=32, **CHANNELS), F16, (), ()),
    (Case("channels-long", momentum=True, chunk_size=128, tokens=131, heads=1, **CHANNELS), BF16, (), ()),
    (Case("custom", bias=ROBUST, key_dim=32, value_dim=32, lengths=(20, 0, 13)), BF16, (), ("sm_90",)),
    (Case("custom-gated", bias=SMOOTH, retention=GATES[5], delta="channel", tokens=35, **ONE), F32, (), ()),
    (Case("mlp", bias=mk.Huber("switch"), tokens=70, chunk_size=64, **MLP), BF16, (), ()),
    (Case("mlp-lq", retention=mk.LqRetention(), momentum=True, tokens=35, **MLP), BF16, (), ()),
    (Case("mlp-kl", bias=mk.Huber("norm"), retention=mk.KLRetention(), tokens=35, **MLP), F16, (), ()),
    (Case("mlp-elastic", bias=mk.L1(), retention=GATES[3], chunk_size=32, **MLP | dict(batch=1, lengths=(40, 0, 7))), F32, (), ()),
    (Case("mlp-sigmoid", bias=mk.RobustL2(), retention=mk.SigmoidRetention(), momentum=True, tokens=35, **MLP), F32, (), ()),
    (Case("mlp-custom", bias=NORM, retention=GATES[5], tokens=35, **MLP), F32, (), ()),
    (Case("steps", bias=mk.Huber("switch"), key_dim=32, value_dim=32, chunk_size=32, tokens=36, **ONE), BF16, (30, 32, 36), ("sm_90",)),
    (Case("steps-wide", retention=mk.LqRetention(), key_dim=160, value_dim=32, chunk_size=32, tokens=35, **ONE), F16, (31, 35), ()),
    (
        Case("steps-channels", retention=mk.KLRetention(), lr="channel", momentum=True, tokens=20, **CHANNELS), F32, (14, 15, 20), (),
    ),
    (Case("steps-mlp", bias=mk.Huber("switch"), tokens=19, **MLP), F32, (14, 19), ("sm_80",)),
    (Case("steps-custom", bias=SMOOTH, retention=GATES[5], tokens=19, batch=1, heads=1), F32, (14, 19), ()),
    (Case("steps-mlp-custom", bias=NORM, retention=GATES[5], tokens=19, **MLP), F32, (14, 19), ()),
    (Case("steps-mlp-kl", retention=mk.KLRetention(), momentum=True, tokens=19, **MLP), F32, (14, 19), ()),
    (Case("steps-mlp-lq", retention=mk.LqRetention(), tokens=19, **MLP), F32, (14, 19), ()),
]  # fmt: skip


def fusing(case: Case):
    """A context in which the forward's chain computes the output of the specimens that are named so, and of no other."""
    from miras_kernels.kernels.common import configs

    return configs.fuse(case.name.startswith("fused"))


@functools.cache
def fitting(name: str, architecture: str) -> dict[str, tuple]:
    """The kernels that a specimen launches, and the configurations of each that serve it."""
    from miras_kernels.kernels.common import configs
    from miras_kernels.kernels.offline.compile import recorded, recorded_step

    case, dtype, cuts, _ = next(x for x in SPECIMENS if x[0].name == name)
    call = case.draw(dtype).call()
    with fusing(case):
        launches = recorded_step(call) if cuts else recorded(call, 4, architecture)
    return {x: configs.eligible(x, configs.Key.of(call)) for x in dict.fromkeys(x.kernel.__name__ for x in launches)}


@functools.cache
def shares(architecture: str) -> dict[str, list[dict]]:
    """For each specimen, the configurations to force by kernel in each of its runs: those that no specimen before it has.

    Raises:
        AssertionError: no specimen has some configuration.
    """
    from miras_kernels.kernels.common import configs

    left = {(name, x) for name, listed in configs.KERNELS.items() for x in listed if configs.denial(architecture, name, x) is None}
    found = {}
    for case, *_ in SPECIMENS:
        own = {name: [x for x in listed if (name, x) in left] for name, listed in fitting(case.name, architecture).items()}
        left -= {(name, x) for name, listed in own.items() for x in listed}
        runs = max(1, *map(len, own.values()))
        found[case.name] = [{name: listed[i] for name, listed in own.items() if i < len(listed)} for i in range(runs)]
    assert not left, f"no specimen has {', '.join(f'{name} {x}' for name, x in left)}"
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_specimens_have_every_configuration(architecture):
    assert shares(architecture).keys() == {case.name for case, *_ in SPECIMENS}


@pytest.mark.parametrize("memory", ["linear", "mlp"])
def test_the_specimens_have_every_bias_and_gate(memory):
    cases = [case for case, _, cuts, _ in SPECIMENS if case.memory == memory and not cuts]
    assert {case.retention.tag for case in cases} == set(GATES)
    assert memory == "mlp" or {case.bias.tag for case in cases} == set(BIASES)  # biases are the same code in both
    for has in (lambda x: x.momentum, lambda x: x.lengths is not None):
        assert {bool(has(case)) for case in cases} == {False, True}
    steps = [case for case, _, cuts, _ in SPECIMENS if case.memory == memory and cuts]
    assert {case.momentum for case in steps} == {False, True} and len({case.retention.tag for case in steps}) >= 3


RUNS = [(x, architecture) if architecture in x[3] else slow(x, architecture) for x in SPECIMENS for architecture in ARCHITECTURES]


@pytest.mark.parametrize(("specimen", "architecture"), RUNS, ids=lambda x: x if isinstance(x, str) else x[0].name)
def test_parity(specimen, architecture):
    """Results within the usual budgets, no fault reported, and every configuration of this specimen's share executed."""
    from miras_kernels.kernels.common import configs

    case, dtype, cuts, _ = specimen
    for share in shares(architecture)[case.name]:
        executed = set()
        with contextlib.ExitStack() as stack:
            stack.enter_context(fusing(case))
            for name, config in share.items():
                stack.enter_context(configs.force(name, config))
            stack.enter_context(on_machine(architecture, lambda x, seen=executed: seen.add(x.name)))
            report = check_steps(case, "triton", dtype, cuts) if cuts else check(case, "triton", dtype)
        assert report.ok, report
        assert executed >= {f"{name} {config}" for name, config in share.items()}


SERVED = [case for case in registry() if case.chunk_size in ((16, 32, 64) if case.memory == "mlp" else range(129))]


def sampled() -> list:
    """A covering sample of the registry, each case on one architecture, two chunks and a part of one long.

    In all dtypes, unless 16 bits may take another side of a kink, or LayerNorm leaves no digit of them.
    """
    found = []
    for i, case in enumerate(sample(SERVED)):
        wide = (case.bias.needs_delta and case.delta == "float") or case.memory == "mlp"
        changes = dict(tokens=min(case.tokens, 2 * case.chunk_size + 3), hidden=min(case.hidden, 64))
        case = dataclasses.replace(case, batch=1 if case.initial == "dual" else case.batch, **changes)
        found.append(slow(case, F32 if wide else (F32, BF16, F16)[i % 3], ARCHITECTURES[i % 2]))
    return found


@pytest.mark.parametrize(("case", "dtype", "architecture"), sampled(), ids=str)
def test_a_sample_of_the_registry(case, dtype, architecture):
    with on_machine(architecture):
        report = check(case, "triton", dtype)
    assert report.ok, report
