"""The CUDA C++ kernels as nvcc compiles them, executed on the CPU: decoding steps within the usual budgets, and no fault reported."""

from __future__ import annotations

import dataclasses
import runpy

import pytest
import torch

import miras_kernels as mk
from decoding import PAIRS
from miras_kernels import dispatch
from miras_kernels.testing import Case, check_steps
from ptx import cuda
from ptx.host import Launch, program
from quick import or_slow, slow

NVCC = runpy.run_path(str(cuda.SOURCES / "build.py"))["nvcc"]()
pytestmark = pytest.mark.skipif(NVCC is None, reason="there is no nvcc here")
SIZES = dict(batch=1, heads=2, hidden=40)


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    return cuda.build(NVCC, tmp_path_factory.mktemp("cuda_ptx"))


def assert_right(case: Case, built, dtype: torch.dtype = torch.float32, before=None) -> None:
    """Steps within a chunk, the one that ends it, and one of the next."""
    case = dataclasses.replace(case, tokens=case.chunk_size + 1)
    cuts = [case.chunk_size + i for i in (-2, 0, 1)]
    with cuda.on_machine(built, before=before) as backend, pytest.MonkeyPatch.context() as patch:
        patch.setitem(dispatch.BACKENDS, "cuda", backend)
        report = check_steps(case, "cuda", dtype, cuts)
    assert report.ok, report


@pytest.mark.parametrize("case", or_slow(PAIRS, ()))
def test_steps(case, built):
    assert_right(case, built)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        slow(Case("one", batch=1, heads=1, key_dim=1, value_dim=1), torch.float32),
        slow(Case("odd", key_dim=33, value_dim=70, momentum=True, **SIZES), torch.bfloat16),
        slow(Case("wide", key_dim=256, value_dim=256, retention=mk.KLRetention(), batch=1, heads=1), torch.float16),
        slow(Case("mlp-wide", memory="mlp", key_dim=128, value_dim=128, batch=1, heads=1, hidden=200, chunk_size=64), torch.float32),
        slow(Case("mlp-odd", memory="mlp", key_dim=19, value_dim=19, momentum=True, retention=mk.LqRetention(), **SIZES), torch.bfloat16),
    ],
    ids=str,
)
def test_sizes_and_dtypes(case, dtype, built):
    assert_right(case, built, dtype)


DELETED = [
    Case("linear", key_dim=32, value_dim=32, retention=mk.KLRetention(), bias=mk.Huber("norm"), **SIZES),
    Case("mlp", memory="mlp", key_dim=32, value_dim=32, retention=mk.KLRetention(), bias=mk.Huber("norm"), **SIZES),
]


@pytest.mark.parametrize("case", [slow(x) for x in DELETED], ids=str)
def test_a_deleted_barrier_is_reported(case, built):
    """Of the step that ends a chunk, one barrier at a time that is executed there; a few are followed by another before they are needed."""
    launches: dict[str, Launch] = {}
    assert_right(case, built, before=lambda x: launches.update({x.entry: x.copy()}) if len(launches) < 6 else None)
    deleted = caught = 0
    for launch in launches.values():
        assert launch.copy().run()[0] == []
        lines = launch.ptx.split("\n")
        for x in program(launch.ptx, launch.entry).kernel.instructions:
            if x.opcode == "bar.sync":
                without = [*lines[: x.line - 1], "", *lines[x.line :]]
                deleted += 1
                caught += bool(dataclasses.replace(launch.copy(), ptx="\n".join(without)).run()[0])
    assert deleted > 4 and caught >= 0.3 * deleted, (caught, deleted)
