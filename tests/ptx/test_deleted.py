"""Of every kernel as compiled: a barrier, wait, fence or commit that is deleted is reported, or it had nothing to do.

What "nothing to do" means is decided by trace.py from all accesses of a launch, not by what reports faults.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from miras_kernels.testing import evaluate
from miras_kernels.testing.steps import inputs_of, read
from ptx.host import Launch, on_machine, program
from ptx.machine import Hang
from ptx.test_cover import ARCHITECTURES, SPECIMENS, fitting, fusing
from ptx.trace import KINDS, traced
from quick import slow

#: instructions of a kind that are deleted, and CTAs that run: the first ones
MOST, CTAS = 10, 2


def first_launches(specimen, architecture: str) -> dict[str, Launch]:
    """The first launch of every kernel, with its tensors as they were."""
    case, dtype, cuts, _ = specimen
    found: dict[str, Launch] = {}

    def before(launch: Launch) -> None:
        found.setdefault(launch.name.split()[0], launch.copy())

    with fusing(case), on_machine(architecture, before):
        if cuts:
            read(inputs_of(case, "triton", dtype), "triton", cuts)
        else:
            evaluate(case.draw(dtype), "triton")
    return found


def reported(launch: Launch, at: int) -> bool:
    """Whether a run without an instruction reports something; with it none does."""
    try:
        return bool(launch.copy().run(made=program(launch.ptx, launch.entry).without(at), most=CTAS)[0])
    except Hang:
        return True


def places(launch: Launch, kinds: Sequence[str]) -> list[tuple[str, int]]:
    """The instructions to delete: of each kind at most MOST that are executed."""
    reports, counts = launch.copy().run(counting=True, most=CTAS)
    assert not reports
    made, found = program(launch.ptx, launch.entry), []
    executed = [i for x in made.blocks if counts.blocks[x.first] for i in range(x.first, x.last + 1)]
    for kind in kinds:
        of_kind = [i for i in executed if made.kernel.instructions[i].opcode.startswith(kind)]
        found += [(kind, at) for at in of_kind[:: -(-len(of_kind) // MOST) or 1]]
    return found


def assert_reported(launch: Launch, kinds: Sequence[str] = KINDS) -> set[str]:
    """Gives the kinds of which some are reported."""
    deleted = places(launch, kinds)
    left = [(kind, at) for kind, at in deleted if not reported(launch, at)]
    trace = traced(launch, CTAS) if left else None
    missed = [str(trace.program.kernel.instructions[at]) for kind, at in left if trace.needs(at, kind)]
    assert not missed, f"{launch.name}: not reported if deleted: {missed}"
    return {kind for kind, _ in {*deleted} - {*left}}


#: specimens of the cover that have every kernel
DELETED = (
    "wide", "fused", "row", "float32-momentum", "gated", "channels", "channels-momentum", "mlp", "mlp-lq", "mlp-sigmoid", "steps",
    "steps-channels", "steps-mlp-kl", "fused-exact", "keyed",
)  # fmt: skip


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_specimens_have_every_kernel(architecture):
    from miras_kernels.kernels.common import configs

    assert set().union(*(fitting(name, architecture) for name in DELETED)) == set(configs.KERNELS)


@pytest.mark.parametrize(
    ("name", "architecture"),
    [(x, y) if (x, y) == ("wide", "sm_90") else slow(x, y) for x in DELETED for y in ARCHITECTURES],
)
def test_a_deleted_instruction_is_reported_or_had_nothing_to_do(name, architecture):
    launches = first_launches(next(x for x in SPECIMENS if x[0].name == name), architecture).values()
    found = set().union(*map(assert_reported, launches))
    assert "bar.sync" in found
    if name == "wide":
        assert found == {kind for kind in KINDS if any(kind in x.ptx for x in launches)}
