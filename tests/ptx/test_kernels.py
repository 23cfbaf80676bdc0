"""The kernels as compiled for sm_80 and sm_90, executed on the CPU: results within the usual budgets, and no fault reported."""

from __future__ import annotations

import collections
import dataclasses
import re

import pytest
import torch
from miras_kernels.kernels.common import configs

import miras_kernels as mk
from miras_kernels.testing import Case, check, check_steps, evaluate, registry
from ptx.host import Launch, known, on_machine, program
from ptx.machine import Hang
from quick import sample, slow

SERVED = [case for case in registry() if case.chunk_size in ((16, 32, 64) if case.memory == "mlp" else range(129))]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def smaller(case: Case) -> Case:
    """Two chunks and a part of one."""
    return dataclasses.replace(case, tokens=min(case.tokens, 2 * case.chunk_size + 3), batch=1 if case.initial == "dual" else case.batch)


def cover(architecture: str, start: int) -> list:
    """A sample of the registry, in all dtypes unless 16 bits may take another side of a kink, or LayerNorm leaves no digit of them."""
    found = []
    for i, case in enumerate(sample(SERVED, start)):
        wide = (case.bias.needs_delta and case.delta == "float") or case.memory == "mlp"
        dtype = torch.float32 if wide else DTYPES[i % 3]
        found.append(slow(smaller(case), dtype, architecture))
    return found


LINEAR = Case("linear", batch=1, tokens=70, key_dim=32, value_dim=32, chunk_size=32)
WIDE = Case("wide", batch=1, heads=1, tokens=130, key_dim=64, value_dim=64, chunk_size=64)
CHANNELS = Case("channels", batch=1, tokens=35, decay="channel", momentum=True)
PACKED = dataclasses.replace(LINEAR, name="packed", bias=mk.Huber("norm"), lengths=(50, 30, 0))
MLP = Case("mlp", memory="mlp", bias=mk.Huber("switch"), batch=1, heads=1, tokens=27, key_dim=16, value_dim=16, hidden=40, decay="slight")
MORE = [
    (WIDE, torch.bfloat16, "sm_90"),
    (PACKED, torch.float16, "sm_80"),
    slow(dataclasses.replace(WIDE, retention=mk.KLRetention(), momentum=True, tokens=70), torch.bfloat16, "sm_90"),
    slow(MLP, torch.bfloat16, "sm_80"),
]


@pytest.mark.parametrize(("case", "dtype", "architecture"), [*MORE, *cover("sm_80", 0), *cover("sm_90", 40)], ids=str)
def test_parity(case, dtype, architecture):
    with on_machine(architecture, known):
        report = check(case, "triton", dtype)
    assert report.ok, report


FUSED = [
    (dataclasses.replace(WIDE, key_dim=128, value_dim=32), torch.bfloat16, "sm_90"),
    (dataclasses.replace(LINEAR, lengths=(50, 30, 0), bias=mk.L1()), torch.float16, "sm_80"),
]


@pytest.mark.parametrize(("case", "dtype", "architecture"), FUSED, ids=str)
def test_the_output_in_the_chain(case, dtype, architecture):
    with configs.fuse(True):
        test_parity(case, dtype, architecture)


SIXTEEN = [
    slow(dataclasses.replace(MLP, retention=gate, momentum=momentum, chunk_size=size), dtype, architecture)
    for gate, momentum, size, dtype, architecture in (
        (mk.L2Retention(), False, 64, torch.bfloat16, "sm_90"),
        (mk.LqRetention(), True, 16, torch.bfloat16, "sm_90"),
        (mk.KLRetention(), False, 16, torch.float16, "sm_80"),
        (mk.SigmoidRetention(), True, 32, torch.bfloat16, "sm_80"),
    )
]


@pytest.mark.parametrize(("case", "dtype", "architecture"), SIXTEEN, ids=lambda x: getattr(x, "name", str(x)))
def test_an_mlp_at_sixteen_bits(case, dtype, architecture):
    test_parity(dataclasses.replace(case, tokens=min(2 * case.chunk_size, 90)), dtype, architecture)


STEPS = [
    (dataclasses.replace(LINEAR, bias=mk.Huber("switch"), tokens=36), torch.bfloat16, "sm_90", (30, 32, 36)),
    slow(dataclasses.replace(LINEAR, retention=mk.KLRetention(), momentum=True, tokens=36), torch.float32, "sm_80", (30, 31, 34, 36)),
    slow(dataclasses.replace(LINEAR, decay="channel", lr="channel", momentum=True, tokens=36), torch.float32, "sm_90", (31, 36)),
    slow(dataclasses.replace(LINEAR, retention=mk.LqRetention(), key_dim=160, tokens=35), torch.float16, "sm_80", (31, 35)),
    (dataclasses.replace(MLP, tokens=19), torch.float32, "sm_80", (14, 19)),
    slow(dataclasses.replace(MLP, retention=mk.KLRetention(), momentum=True, tokens=19), torch.float32, "sm_90", (14, 19)),
    slow(dataclasses.replace(MLP, retention=mk.LqRetention(), tokens=19), torch.float32, "sm_80", (14, 19)),
]


@pytest.mark.parametrize(("case", "dtype", "architecture", "cuts"), STEPS, ids=str)
def test_decoding(case, dtype, architecture, cuts):
    with on_machine(architecture, known):
        report = check_steps(case, "triton", dtype, cuts)
    assert report.ok, report


# ------------------------------------------------------------------------------------------------------------------ mutants

#: the least share of deleted instructions that must be reported, from a first run. Some of the rest are redundant: a barrier, wait or fence
#: that another one follows before the data are used; a wgmma.fence before a product whose registers were not touched since the last one. A
#: cp.async.commit_group is not deleted here: the next group takes its copies.
LEAST = {
    r"bar\.sync": 0.8, r"cp\.async\.wait_group": 0.9, r"fence\.proxy\.async": 0.6, r"wgmma\.commit_group": 0.6, r"wgmma\.wait_group": 0.6,
    r"wgmma\.fence": 0.05,
}  # fmt: skip


def first_launches(case: Case, dtype: torch.dtype, architecture: str) -> dict[str, Launch]:
    """The first launch of every kernel, with its tensors as they were."""
    found: dict[str, Launch] = {}

    def before(launch: Launch) -> None:
        found.setdefault(program(launch.ptx).kernel.name, launch.copy())

    with on_machine(architecture, known, before), configs.fuse("fused" in case.name):
        evaluate(case.draw(dtype), "triton")
    return found


def reported(launch: Launch, without: int) -> set:
    """What a run of a copy reports, without a line of the PTX."""
    lines = launch.ptx.split("\n")
    lines[without - 1] = ""
    try:
        reports, _ = dataclasses.replace(launch.copy(), ptx="\n".join(lines)).run()
    except Hang as fault:
        return {str(fault)}
    return {(x.kind, x.instruction, x.other) for x in reports}


def executed(launch: Launch) -> tuple[set, list]:
    """What a run of a copy reports, and the instructions that it executes."""
    reports, counts = launch.copy().run(counting=True)
    made = program(launch.ptx)
    instructions = made.kernel.instructions
    return {(x.kind, x.instruction, x.other) for x in reports}, [
        x for block in made.blocks if counts.blocks[block.first] for x in instructions[block.first : block.last + 1]
    ]


MUTATED = [
    (WIDE, torch.bfloat16, "sm_90", 2, ("linear_chain_fwd", "linear_output")),
    slow(WIDE, torch.bfloat16, "sm_90", 4, ()),
    slow(dataclasses.replace(WIDE, name="fused"), torch.bfloat16, "sm_90", 10, ("linear_chain_fwd_fused",)),
    slow(WIDE, torch.float16, "sm_80", 4, ()),
    slow(dataclasses.replace(LINEAR, retention=mk.LqRetention(), momentum=True), torch.float32, "sm_80", 4, ()),
    slow(CHANNELS, torch.bfloat16, "sm_90", 4, ()),
    slow(dataclasses.replace(MLP, chunk_size=64, tokens=130), torch.bfloat16, "sm_90", 4, ()),
    slow(dataclasses.replace(MLP, retention=mk.KLRetention(), momentum=True), torch.float32, "sm_80", 4, ()),
]


@pytest.mark.parametrize(("case", "dtype", "architecture", "most", "kernels"), MUTATED, ids=str)
def test_a_deleted_barrier_wait_or_fence_is_reported(case, dtype, architecture, most, kernels):
    """One line of the compiled code at a time; of each kernel ``most`` of a kind."""
    deleted, caught = collections.Counter(), collections.Counter()
    for name, launch in first_launches(case, dtype, architecture).items():
        if kernels and name not in kernels:
            continue
        usual, instructions = executed(launch)
        for kind in LEAST:
            lines = [x.line for x in instructions if re.match(kind, x.opcode)]
            for line in lines[:: -(-len(lines) // most) or 1]:
                deleted[kind] += 1
                caught[kind] += bool(reported(launch, line) - usual)
    assert deleted[r"bar\.sync"]
    assert bool(deleted[r"wgmma\.wait_group"]) == (architecture == "sm_90" and case.chunk_size >= 64)
    assert all(caught[kind] >= LEAST[kind] * count for kind, count in deleted.items()), (deleted, caught)
