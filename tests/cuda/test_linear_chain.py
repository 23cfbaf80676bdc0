"""The linear memory's forward in CUDA C++, csrc/cuda/linear_chain*: executed on the CPU as compiled (tests/ptx), where any fault that is
reported fails a test, against float64; with the Triton kernels' backward; and its registers.
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
from miras_kernels.backends import cuda_linear
from miras_kernels.backends.cuda import CudaBackend
from miras_kernels.backends.reference import chunkwise
from miras_kernels.tables.biases import TABLE as BIASES
from miras_kernels.testing import Case, check
from miras_kernels.testing.parity import compare, expect, margin
from miras_kernels.testing.steps import results
from ptx import cuda as machine
from ptx.host import Launch
from ptx.host import on_machine as triton_on_machine
from ptx.test_deleted import assert_reported
from quick import slow

pytestmark = pytest.mark.skipif(NVCC is None, reason="there is no nvcc here")

BF16, F16 = torch.bfloat16, torch.float16


def sized(name: str, c: int, keys: int, values: int, **changes) -> Case:
    return Case(name, **dict(batch=1, heads=1, chunk_size=c, key_dim=keys, value_dim=values, tokens=2 * c + 7) | changes)


#: (values of a block, dtype, case)
SPECIMENS = [
    (64, F16, sized("small", 16, 64, 16, tokens=50)),
    (64, F16, sized("fused", 32, 128, 112, lengths=(70, 0, 32), heads=2, bias=mk.L1(), layout="fused")),
    (32, BF16, sized("by-channel", 64, 64, 128, tokens=70, batch=2, bias=mk.Huber("coordinate"), delta="channel")),
    (64, BF16, sized("largest", 64, 128, 64, tokens=200)),
    (32, BF16, sized("packed", 64, 128, 64, lengths=(70, 0, 130), bias=mk.Huber("coordinate"))),
    (64, BF16, sized("coupled", 64, 128, 48, lengths=(70, 0, 130), bias=mk.RobustL2())),
    (64, F16, sized("norm", 16, 128, 64, bias=mk.Huber("norm"), decay="extreme")),
    (64, BF16, sized("switch", 32, 64, 64, bias=mk.Huber("switch"), initial="shared", batch=2)),
    (32, BF16, sized("dot", 16, 128, 128, bias=mk.DotProduct(), decay="none", tokens=64)),
    (64, F16, sized("power", 32, 64, 48, bias=mk.Lp(3.0), layout="heads_first")),
    (64, BF16, sized("smooth", 16, 64, 80, bias=mk.Lp(1.5, 10.0), decay="strong")),
    (32, BF16, sized("pair", 32, 128, 32, heads=2)),
    (64, F16, sized("tall", 64, 64, 64)),
    (64, F16, sized("tall-packed", 64, 128, 80, lengths=(64, 3))),
]
QUICK = ("small", "packed")


@functools.cache
def built() -> tuple[Path, dict[str, str]]:
    return machine.build(NVCC)


@pytest.fixture
def cuda(monkeypatch) -> Iterator[CudaBackend]:
    """The "cuda" backend, for CPU tensors, on the machine, and the Triton kernels."""
    with machine.on_machine(built()) as backend, triton_on_machine("sm_90"):
        monkeypatch.setitem(dispatch.BACKENDS, "cuda", backend)
        yield backend


@pytest.mark.parametrize(
    ("values", "dtype", "case"), [x if x[2].name in QUICK else slow(*x) for x in SPECIMENS], ids=lambda x: getattr(x, "name", str(x))
)
def test_forward(values, dtype, case, cuda, monkeypatch):
    """Outputs and final states, also of a chunk that the sequences end in."""
    monkeypatch.setattr(cuda_linear, "block_values", lambda *call: values)
    inputs = case.draw(dtype, margin=margin(case, dtype))
    with torch.no_grad():
        found = results(*mk.linear_memory(**inputs.arguments(), backend="cuda"))
    report = compare(case, dtype, found, expect(inputs, dtype, lambda x: results(*chunkwise.run(x.call()))))
    assert report.ok, report


def test_the_specimens_have_every_size_bias_and_type():
    """A kernel for each type, keys, chunk and block: all of them together have each of these, and each pair of keys and chunk."""
    assert {(case.key_dim, case.chunk_size) for *_, case in SPECIMENS} == set(itertools.product(cuda_linear.KEYS, (16, 32, 64)))
    kinds = {(cuda_linear.block_values(dtype, values, 8, False, 132), dtype) for dtype in (BF16, F16) for values in (32, 64)}
    kinds |= {(cuda_linear.block_values(BF16, 64, 132, False, 132), BF16)}
    assert {(values, dtype) for values, dtype, _ in SPECIMENS} == kinds == {(32, BF16), (64, BF16), (64, F16)}
    assert {case.bias.tag for *_, case in SPECIMENS} == set(BIASES) - {mk.CustomBias.tag}


@pytest.mark.parametrize("name", [slow("largest"), slow("packed"), "small"])
def test_gradients_by_the_triton_kernels(name, cuda, monkeypatch):
    """From the checkpoints that the CUDA forward saved."""
    values, dtype, case = next(x for x in SPECIMENS if x[2].name == name)
    monkeypatch.setattr(cuda_linear, "block_values", lambda *call: values)
    report = check(case, "cuda", dtype)
    assert report.ok, report


def test_refusals_name_the_reason(cuda):
    case = sized("refused", 16, 64, 64)

    def refusal(changes: dict | None = None, dtype: torch.dtype = BF16, differentiate: bool = False, **of_call) -> str:
        call = Case(**vars(case) | (changes or {})).draw(dtype).call()
        return cuda.refuses(call.replace(**of_call), differentiate) or ""

    assert refusal() == refusal(differentiate=True) == ""
    assert "chunks of bfloat16 or float16 inputs, got torch.float32" in refusal(dtype=torch.float32)
    assert "64 or 128 keys and a multiple of 16 values, got 96 and 64" in refusal(dict(key_dim=96))
    assert "64 or 128 keys and a multiple of 16 values, got 64 and 24" in refusal(dict(value_dim=24))
    assert "head dimensions are limited to 128, got 144" in refusal(dict(value_dim=144))
    assert "chunk_size must be one of 16, 32, 64 for a linear memory, got 8" in refusal(dict(chunk_size=8))
    assert "without a retention gate, got lq" in refusal(dict(retention=mk.LqRetention()))
    assert "without momentum" in refusal(dict(momentum=True))
    assert "gates per token, got lr per channel" in refusal(dict(lr="channel"))
    assert "gates per token, got log_decay per channel" in refusal(dict(decay="channel"))
    assert "at most 64 values, got 80" in refusal(dict(bias=mk.RobustL2(), value_dim=80))
    with torch.no_grad():
        _, state = mk.linear_memory(**case.draw(BF16).arguments(), backend="reference")
    assert "it does not continue inside a chunk" in refusal(state=state)
    with pytest.raises(ValueError, match="'cuda' cannot serve this call: it reads chunks without momentum"):
        mk.linear_memory(**Case(**vars(case) | dict(momentum=True)).draw(BF16).arguments(), backend="cuda")


def test_a_library_of_other_limits_is_refused(monkeypatch):
    monkeypatch.setattr(cuda_linear, "COUPLED", 128)
    assert "built from other sources" in CudaBackend(built()[0], "cpu").unavailable()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["coupled", "packed"])
def test_a_deleted_barrier_or_wait_is_reported_or_had_nothing_to_do(name, monkeypatch):
    values, dtype, case = next(x for x in SPECIMENS if x[2].name == name)
    monkeypatch.setattr(cuda_linear, "block_values", lambda *call: values)
    launches: dict[str, Launch] = {}
    with machine.on_machine(built(), before=lambda x: launches.setdefault(x.entry, x.copy())) as backend, torch.no_grad():
        monkeypatch.setitem(dispatch.BACKENDS, "cuda", backend)
        mk.linear_memory(**case.draw(dtype).arguments(), backend="cuda")
    (launch,) = launches.values()
    assert {"bar.sync", "cp.async.wait_group"} <= assert_reported(launch)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize(("source", "kernels"), [("linear_chain_bf16.cu", 12), ("linear_chain_f16.cu", 6)])
def test_little_spills(source, kernels, architecture):
    """At most 128 bytes a thread, as in the MLP memory's chain."""
    said = assembled(source, architecture)
    spilled = [max(map(int, x)) for x in re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)]
    assert len(spilled) == kernels and max(spilled) <= 128, spilled
    assert max(map(int, re.findall(r"Used (\d+) registers", said))) <= 255
