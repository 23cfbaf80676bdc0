"""The MLP memory's backward in CUDA C++, csrc/cuda/mlp_replay.h and mlp_reverse.h: executed on the CPU as compiled (tests/ptx), where any
fault that is reported fails a test; every gradient against float64; and its registers.
"""

from __future__ import annotations

import functools
import itertools
import re
from pathlib import Path

import pytest
import torch

import miras_kernels as mk
from assembled import NVCC, assembled, assert_no_worse
from miras_kernels import dispatch
from miras_kernels.backends import groups
from miras_kernels.backends.cuda import CudaBackend
from miras_kernels.tables.biases import TABLE as BIASES
from miras_kernels.testing import Case, check, evaluate
from ptx import cuda as machine
from ptx.host import Launch
from ptx.test_deleted import assert_reported
from quick import slow

pytestmark = pytest.mark.skipif(NVCC is None, reason="there is no nvcc here")

BF16, F16 = torch.bfloat16, torch.float16
SHAPE = dict(memory="mlp", key_dim=64, value_dim=64, batch=1, heads=1)


def sized(name: str, c: int, hidden: int, **changes) -> Case:
    return Case(name, **SHAPE | dict(chunk_size=c, hidden=hidden, tokens=c + 5) | changes)


#: (architecture, dtype, case)
SPECIMENS = [
    ("sm_80", F16, sized("small", 16, 64, bias=mk.Huber("coordinate"))),
    ("sm_80", BF16, sized("packed", 16, 64, bias=mk.Huber("norm"), lengths=(20, 0, 16, 7), heads=2)),
    ("sm_80", F16, sized("no-decay", 32, 64, bias=mk.DotProduct(), decay="none", initial="shared", batch=2)),
    ("sm_80", BF16, sized("extreme", 16, 128, bias=mk.Lp(1.5, 10.0), decay="extreme", layout="fused")),
    ("sm_80", F16, sized("half", 32, 128, bias=mk.Huber("switch"), tokens=64)),
    ("sm_80", BF16, sized("wide", 16, 256, bias=mk.RobustL2())),
    ("sm_90", BF16, sized("small", 16, 64, bias=mk.L1(), layout="heads_first")),
    ("sm_90", F16, sized("square", 32, 64)),
    ("sm_90", F16, sized("half-small", 16, 128, bias=mk.Huber("switch"), delta="float")),
    ("sm_90", BF16, sized("half", 32, 128, bias=mk.Lp(3.0), decay="strong")),
    ("sm_90", BF16, sized("tall", 64, 128, bias=mk.Huber("coordinate"))),
    ("sm_90", F16, sized("wide", 16, 256, bias=mk.RobustL2())),
    ("sm_90", F16, sized("largest", 32, 256, bias=mk.Huber("norm"))),
    ("sm_90", BF16, sized("cluster", 64, 256, bias=mk.Huber("norm"), lengths=(70, 0, 7), heads=2)),
    ("sm_90", F16, sized("cluster-whole", 64, 256, tokens=64, initial="shared")),
]
QUICK = {("sm_80", "small")}
#: segments of one chunk, in groups of few
SEGMENTS = sized("segments", 16, 64, bias=mk.Huber("switch"), lengths=(37, 0, 20, 64))


@functools.cache
def built(architecture: str) -> tuple[Path, dict[str, str]]:
    return machine.build(NVCC, architecture)


@pytest.fixture
def cuda(monkeypatch):
    """The "cuda" backend, for CPU tensors, on the machine; without the Triton kernels."""
    with machine.on_machine(built("sm_80")) as backend:
        monkeypatch.setitem(dispatch.BACKENDS, "cuda", backend)
        monkeypatch.setattr(dispatch.BACKENDS["triton"], "unavailable", lambda: "it is not installed")
        yield backend


@pytest.mark.parametrize(
    ("architecture", "dtype", "case"),
    [x if (x[0], x[2].name) in QUICK else slow(*x) for x in SPECIMENS],
    ids=lambda x: x.name if isinstance(x, Case) else str(x),
)
def test_gradients(architecture, dtype, case, monkeypatch):
    with machine.on_machine(built(architecture)) as backend:
        monkeypatch.setitem(dispatch.BACKENDS, "cuda", backend)
        report = check(case, "cuda", dtype)
    assert report.ok, report


def test_the_specimens_have_every_size_bias_and_type():
    sizes = {(a, case.hidden, case.chunk_size) for a, _, case in SPECIMENS}
    shared = CudaBackend(built("sm_80")[0], "cpu")._loaded[0].miras_mlp_backward_shared
    most = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}
    every = itertools.product(most, (64, 128, 256), (16, 32, 64))
    assert sizes == {(a, hidden, c) for a, hidden, c in every if 0 < shared(hidden, c) <= most[a]}
    assert {case.bias.tag for _, _, case in SPECIMENS} == set(BIASES) - {mk.CustomBias.tag}
    assert {(a, dtype) for a, dtype, _ in SPECIMENS} == set(itertools.product(("sm_80", "sm_90"), (BF16, F16)))


@pytest.mark.slow
def test_segments_in_groups(cuda, monkeypatch):
    """The gradients do not depend on how many segments are rerun at once; and the same bits when repeated."""
    inputs = SEGMENTS.draw(F16)
    with mk.override(checkpoint_every=1):
        together = evaluate(inputs, "cuda")
        again = evaluate(inputs, "cuda")
        monkeypatch.setattr(groups, "MIN_GROUP", 2)
        assert len(groups.Groups.of(inputs.call(), 1).slots) > 2
        apart = evaluate(inputs, "cuda")
        report = check(SEGMENTS, "cuda", F16)
    assert report.ok, report
    assert all(torch.equal(x, again[name]) for name, x in together.items())
    norm = ("grad_ln_weight", "grad_ln_bias")  # sums over all tokens, in another order
    assert all(torch.equal(x, apart[name]) for name, x in together.items() if name not in norm)


@pytest.mark.slow
def test_a_deleted_barrier_or_wait_is_reported_or_had_nothing_to_do(monkeypatch):
    _, dtype, case = SPECIMENS[0]
    launches: dict[str, Launch] = {}
    with machine.on_machine(built("sm_80"), before=lambda x: launches.setdefault(x.entry, x.copy())) as backend:
        monkeypatch.setitem(dispatch.BACKENDS, "cuda", backend)
        evaluate(case.draw(dtype), "cuda")
    replay, reverse = (x for kernel in ("mlp_replay", "mlp_reverse") for entry, x in launches.items() if kernel in entry)
    assert {"bar.sync", "cp.async.wait_group"} <= assert_reported(replay)
    assert {"bar.sync", "cp.async.wait_group"} <= assert_reported(reverse)


@pytest.mark.slow
def test_a_deleted_barrier_of_a_cluster_is_reported(monkeypatch):
    """Of the forward too."""
    case = sized("cluster", 64, 256, bias=mk.Huber("coordinate"))
    launches: dict[str, Launch] = {}
    with machine.on_machine(built("sm_90"), before=lambda x: launches.setdefault(x.entry, x.copy())) as backend:
        monkeypatch.setitem(dispatch.BACKENDS, "cuda", backend)
        evaluate(case.draw(BF16), "cuda")
    kinds = {"barrier.cluster.arrive", "barrier.cluster.wait"}
    found = {kernel: assert_reported(x, sorted(kinds)) for kernel, x in launches.items() if x.cluster == 2}
    assert len(found) == 3 and set(map(frozenset, found.values())) == {frozenset(kinds)}


def test_what_it_refuses_is_left_to_triton(cuda):
    call = sized("refused", 64, 64).draw(BF16).call()
    assert cuda.refuses(call, False) is None
    reason = "it computes gradients in chunks of 16 or 32 tokens, or of 64 at hidden 128 or 256, got chunks of 64 at hidden 64"
    assert cuda.refuses_backward(call) == reason
    assert cuda.refuses(call, True) == f"the Triton kernels do its backward, since {reason}: it is not installed"
    assert dispatch.explain(sized("served", 32, 64).draw(BF16).call(), True).algorithms["cuda"] == "chunks of 32 tokens"


# ---------------------------------------------------------------------------------------------------------------- compiled

KERNEL = re.compile(
    r"Compiling entry function '\w*?mlp_(replay|reverse)ILi(\d+)ELi(\d+)E\d+_*(\w+?)EE\w*' for '(sm_\w+)'.*?"
    r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
    re.S,
)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_registers_and_spills(architecture):
    """At most 300 bytes are spilled. With the table's compiler, the table is the limit."""
    said = "".join(assembled(source, architecture) for source in ("mlp_replay.cu", "mlp_reverse.cu"))
    found = {
        f"{kernel}-C{c}-Hd{hidden}-{dtype}": [int(used), int(stores), int(loads)]
        for kernel, c, hidden, dtype, _, stores, loads, used in KERNEL.findall(said)
    }
    assert len(found) == 32
    for name, (registers, stores, loads) in found.items():
        assert registers <= 255 and max(stores, loads) <= 300, name
    assert_no_worse(found, architecture, "re")
