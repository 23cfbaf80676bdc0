"""The benchmark's shapes as pytest-benchmark cases: ``pytest bench``, e.g. with ``--benchmark-compare``.

For quick comparisons between two states of the code. ``python -m bench.cpu`` makes the report with ratios and targets.
"""

from __future__ import annotations

import time

import pytest
import torch

from bench.common.implementations import DIRECTIONS, flops, kernel
from bench.cpu.cases import SHAPES, Settings, make_case
from miras_kernels import L2, Huber, Lp, dispatch
from miras_kernels.testing import check

pytestmark = pytest.mark.benchmark(timer=time.process_time)  # one thread: see docs/benchmarks.md

CASES = {shape: make_case(shape, Settings()) for shape in SHAPES}
CASES |= {bias.name: make_case("D64 C64", Settings(), bias=bias) for bias in (L2(), Huber("switch"), Lp(2.5))}


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_time(benchmark, backend, case, direction):
    if reason := dispatch.unavailable(backend):
        pytest.skip(reason)
    torch.set_num_threads(1)
    report = check(case, backend)
    assert report.ok, report
    benchmark.group = f"{case.name} {direction}"
    benchmark.extra_info["gflop"] = flops(case)[direction] / 1e9
    benchmark.pedantic(kernel(case.draw(torch.float32), backend, direction), rounds=15, warmup_rounds=2)
