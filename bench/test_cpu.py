"""The benchmark's shapes as pytest-benchmark cases: ``pytest bench``, e.g. with ``--benchmark-compare``.

For quick comparisons between two states of the code. The report with parity gates, ratios and targets is bench/cpu.py.
"""

from __future__ import annotations

import time

import pytest
import torch

import contenders
from miras_kernels import dispatch
from miras_kernels.tables.biases import L2, Huber, Lp
from miras_kernels.testing import check

pytestmark = pytest.mark.benchmark(timer=time.process_time)  # one thread: see docs/benchmarks.md

BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(dispatch.unavailable(name) is not None, reason=str(dispatch.unavailable(name))))
    for name in ("cpp", "reference")
]
BIASES = {"l2": L2(), "huber_switch": Huber("switch"), "lp 2.5": Lp(2.5)}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _time(benchmark, backend: str, direction: str, case) -> None:
    report = check(case, backend)
    assert report.ok, report
    run = contenders.kernel(case.draw(torch.float32), backend, direction)
    benchmark.group = f"{case.name} {direction}"
    benchmark.extra_info["gflop"] = contenders.flops(case)[direction] / 1e9
    benchmark.pedantic(run, rounds=15, warmup_rounds=2)


@pytest.mark.parametrize("direction", contenders.DIRECTIONS)
@pytest.mark.parametrize("shape", contenders.SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_shape(benchmark, backend, shape, direction):
    _time(benchmark, backend, direction, contenders.make_case(shape, contenders.Settings()))


@pytest.mark.parametrize("direction", contenders.DIRECTIONS)
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("backend", BACKENDS[:1])
def test_bias(benchmark, backend, bias, direction):
    _time(benchmark, backend, direction, contenders.make_case("D64 C64", contenders.Settings(), bias=BIASES[bias]))
