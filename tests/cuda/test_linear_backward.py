"""The linear memory's backward in CUDA C++, csrc/cuda/linear_reverse*: executed on the CPU as compiled (tests/ptx), where any fault that is
reported fails a test; every gradient against float64; and its registers.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import miras_kernels as mk
from assembled import NVCC, assembled
from miras_kernels import dispatch
from miras_kernels.backends import cuda_linear_backward
from miras_kernels.backends.cuda import CudaBackend
from miras_kernels.tables.biases import TABLE as BIASES
from miras_kernels.testing import Case, check, evaluate
from ptx import cuda as machine
from ptx.host import Launch
from ptx.test_deleted import assert_reported
from quick import slow

pytestmark = pytest.mark.skipif(NVCC is None, reason="there is no nvcc here")

BF16 = torch.bfloat16


def sized(name: str, c: int, dim: int, **changes) -> Case:
    return Case(name, **dict(batch=1, heads=1, chunk_size=c, key_dim=dim, value_dim=dim, tokens=2 * c + 7) | changes)


#: (architecture, case); in checkpoints of 256 tokens: "segments" has two. sm_90: with the products of warpgroups
SPECIMENS = [
    ("sm_90", sized("small", 16, 64, tokens=40)),
    ("sm_80", sized("packed", 16, 64, lengths=(40, 0, 19), heads=2, bias=mk.Huber("coordinate"), layout="fused")),
    ("sm_90", sized("norm", 16, 64, bias=mk.Huber("norm"), decay="extreme", initial="shared", batch=2)),
    ("sm_90", sized("segments", 32, 64, tokens=300, bias=mk.L1())),
    ("sm_80", sized("by-channel", 32, 64, bias=mk.Huber("coordinate"), delta="channel", batch=2, layout="heads_first")),
    ("sm_80", sized("switch", 64, 64, tokens=100, bias=mk.Huber("switch"))),
    ("sm_90", sized("tall", 64, 64, lengths=(64, 3))),
    ("sm_80", sized("dot", 16, 128, bias=mk.DotProduct(), decay="none")),
    ("sm_90", sized("wide", 16, 128, tokens=48)),
    ("sm_80", sized("power", 32, 128, tokens=64, bias=mk.Lp(3.0))),
    ("sm_90", sized("wide-packed", 32, 128, lengths=(33, 32))),
    ("sm_90", sized("largest", 64, 128, tokens=200)),
    ("sm_90", sized("coupled", 64, 64, lengths=(70, 0, 70), bias=mk.RobustL2())),
    ("sm_90", sized("smooth", 16, 64, tokens=32, bias=mk.Lp(1.5, 10.0), decay="strong")),
]
QUICK = ("packed",)


@functools.cache
def built(architecture: str = "sm_90") -> tuple[Path, dict[str, str]]:
    return machine.build(NVCC, architecture)


@pytest.fixture
def cuda(request, monkeypatch) -> Iterator[CudaBackend]:
    """The "cuda" backend, for CPU tensors, on the machine; without the Triton kernels."""
    with machine.on_machine(built(getattr(request, "param", "sm_80"))) as backend:
        monkeypatch.setitem(dispatch.BACKENDS, "cuda", backend)
        yield backend


def specimen(name: str) -> Case:
    return next(case for _, case in SPECIMENS if case.name == name)


@pytest.mark.parametrize(
    ("cuda", "case"), [x if x[1].name in QUICK else slow(*x) for x in SPECIMENS], ids=lambda x: getattr(x, "name", x), indirect=["cuda"]
)
def test_gradients(case, cuda):
    report = check(case, "cuda", BF16)
    assert report.ok, report


def test_the_specimens_have_every_size_and_bias():
    sizes = {(architecture, case.key_dim, case.chunk_size) for architecture, case in SPECIMENS}
    # sm_80 has not enough shared memory for the largest
    every = set(itertools.product(("sm_80", "sm_90"), cuda_linear_backward.KEYS, (16, 32, 64))) - {("sm_80", 128, 64)}
    assert sizes == every
    assert {case.bias.tag for _, case in SPECIMENS} == set(BIASES) - {mk.CustomBias.tag}


@pytest.mark.slow
def test_equal_bits_when_repeated(cuda):
    inputs = specimen("packed").draw(BF16)
    first, second = (evaluate(inputs, "cuda") for _ in range(2))
    assert all(torch.equal(x, second[name]) for name, x in first.items())


def test_what_it_refuses_is_left_to_triton(cuda, monkeypatch):
    def refusal(dtype: torch.dtype = BF16, **changes) -> str:
        return cuda.refuses_backward(Case(**vars(sized("refused", 16, 64)) | changes).draw(dtype).call()) or ""

    assert refusal() == ""
    assert refusal(torch.float16) == "its backward takes bfloat16 inputs, got torch.float16"
    assert "as many values as keys, 64 or 128, got 64 and 128" in refusal(value_dim=128)
    call = sized("refused", 16, 64).draw(torch.float16).call()
    monkeypatch.setattr(dispatch.BACKENDS["triton"], "unavailable", lambda: "no GPU")
    assert cuda.refuses(call, True) == (
        "the Triton kernels do its backward, since its backward takes bfloat16 inputs, got torch.float16: no GPU"
    )
    assert cuda.refuses(call, False) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["small", "norm"])
def test_a_deleted_barrier_or_wait_is_reported_or_had_nothing_to_do(name, monkeypatch):
    launches: dict[str, Launch] = {}
    with machine.on_machine(built(), before=lambda x: launches.setdefault(x.entry, x.copy())) as backend:
        monkeypatch.setitem(dispatch.BACKENDS, "cuda", backend)
        evaluate(specimen(name).draw(BF16), "cuda")
    (launch,) = (x for entry, x in launches.items() if "linear_reverse" in entry)
    assert {"bar.sync", "cp.async.wait_group"} <= assert_reported(launch)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
def test_little_spills(architecture):
    """At most 300 bytes a thread."""
    said = "".join(assembled(source, architecture) for source in ("linear_reverse.cu", "linear_reverse_largest.cu"))
    spilled = [int(x) for x in re.findall(r"(\d+) bytes spill stores", said)]
    assert len(spilled) == 6 and max(spilled) <= 300, spilled
    assert max(map(int, re.findall(r"Used (\d+) registers", said))) <= 255
