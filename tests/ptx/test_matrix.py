"""Products of matrices as Triton compiles them, on the machine that executes PTX: against float64."""

from __future__ import annotations

import re

import pytest
import torch
from miras_kernels.kernels.common.configs import Config

from ptx import matmuls, matrix
from ptx.compiling import compiled
from ptx.host import Launch
from quick import slow


def drawn(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def run(kernel, arguments: dict, architecture: str, warps: int = 4, stages: int = 1) -> str:
    """Its PTX."""
    made = compiled(kernel, arguments, Config(0, 0, warps, stages), architecture)
    reports, _ = Launch(made.ptx, made.taken(arguments), (1,), made.shared).run()
    assert reports == [], "\n".join(map(str, reports))
    return made.ptx


def near(found: torch.Tensor, wanted: torch.Tensor, terms: int) -> None:
    assert ((found.double() - wanted).norm() / wanted.norm()).item() < terms**0.5 * 2.0**-24


def multiply(architecture: str, dtype: torch.dtype, m: int, n: int, k: int, a_rows: bool, b_rows: bool, warps: int = 4) -> str:
    a, b, c = drawn(m, k, dtype=dtype, seed=0), drawn(k, n, dtype=dtype, seed=1), torch.empty(m, n)
    given = dict(a=a if a_rows else a.T.contiguous(), b=b if b_rows else b.T.contiguous(), c=c)
    ptx = run(matmuls.product, given | dict(M=m, N=n, K=k, A_ROWS=a_rows, B_ROWS=b_rows), architecture, warps)
    near(c, a.double() @ b.double(), k)
    return ptx


ROWS = [(True, True), (True, False), (False, True), (False, False)]


@pytest.mark.parametrize(("a_rows", "b_rows"), ROWS)
@pytest.mark.parametrize("architecture", ["sm_80", slow("sm_90")])
def test_products_of_warps(architecture, a_rows, b_rows):
    """mma.sync and ldmatrix, plain and transposed; 32 rows are too few for wgmma."""
    ptx = multiply(architecture, torch.bfloat16, 32, 32, 64, a_rows, b_rows)
    assert "mma.sync.aligned.m16n8k16" in ptx and "wgmma.mma" not in ptx
    if architecture == "sm_80":
        assert "ldmatrix" in ptx
        multiply(architecture, torch.float16, 16, 64, 16, a_rows, b_rows, warps=1)


@pytest.mark.parametrize("every", [pytest.param(False, id="few"), slow(True)])
def test_products_of_warpgroups(every, monkeypatch):
    """wgmma with operands of every swizzle, by rows and by columns, and for several n."""
    forms, addresses = set(), matrix.addresses

    def noted(descriptors, rows, transposed, x):
        forms.add((int(descriptors[0]) >> 62, transposed))
        return addresses(descriptors, rows, transposed, x)

    monkeypatch.setattr(matrix, "addresses", noted)
    sizes = [(16, 16), (32, 32), (64, 64)]  # (keys, columns)
    if every:
        sizes += [(16, 64), (32, 128), (64, 16), (128, 32), (128, 256)]
    for i, (k, n) in enumerate(sizes):
        for a_rows, b_rows in ROWS if every else (ROWS[0], ROWS[3]):
            rows, warps = (64, 4) if k < 128 else (128, 8)
            ptx = multiply("sm_90", (torch.bfloat16, torch.float16)[i % 2], rows, n, k, a_rows, b_rows, warps)
            assert f"wgmma.mma_async.sync.aligned.m64n{n}k16" in ptx or n > 64
    assert {swizzle for swizzle, _ in forms} == {1, 2, 3} and {transposed for _, transposed in forms} == {False, True}
    if every:
        assert forms == {(swizzle, transposed) for swizzle in (1, 2, 3) for transposed in (False, True)}


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_a_product_in_registers(architecture):
    a, b, c = drawn(64, 32, dtype=torch.bfloat16, seed=0), drawn(32, 64, dtype=torch.bfloat16, seed=1), torch.empty(64, 64)
    ptx = run(matmuls.two_products, dict(a=a, b=b, c=c, M=64, N=64, K=32), architecture)
    left, right = (a.float() @ b.float()).bfloat16(), (b.float().T @ b.float()).bfloat16()
    assert ((c.double() - left.double() @ right.double()).norm() / c.norm()).item() < 2.0**-10  # a rounding to bfloat16 may fall otherwise
    if architecture == "sm_90":
        assert re.search(r"wgmma.mma_async.*\}, *\{%r", ptx)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_asynchronous_loads_of_a_loop(architecture):
    m, n, k, length = 64, 64, 32, 192
    a, b, c = drawn(m, length, dtype=torch.float16, seed=0), drawn(length, n, dtype=torch.float16, seed=1), torch.empty(m, n)
    given = dict(a=a, b=b, c=c, L=length, M=m, N=n, K=k)
    made = compiled(matmuls.long_product, given, Config(0, 0, 4, 3), architecture)
    reports, counts = Launch(made.ptx, made.taken(given), (1,), made.shared).run(counting=True)
    near(c, a.double() @ b.double(), length)
    assert "cp.async.cg" in made.ptx
    # Triton before 3.7 puts no fence.proxy.async between a cp.async and a wgmma that reads its data
    assert {x.kind for x in reports} <= ({"a wgmma reads what no fence.proxy.async followed"} if triton_version() < (3, 7) else set())
    assert counts.flop == 2 * m * n * length
    loads = 2 * (m + n) * length // 32
    assert counts.sectors == loads + 4 * m * n // 32


def triton_version() -> tuple[int, ...]:
    import triton

    return tuple(map(int, triton.__version__.split(".")[:2]))
