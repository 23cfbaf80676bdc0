"""A user's own bias and gate are like the others: operators, compilation, copies, cuts, checks."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
import torch

import miras_kernels as mk
from miras_kernels.backends.reference import chunkwise
from miras_kernels.layers import MemoryBlock, Preset
from miras_kernels.tables import biases, retention
from miras_kernels.testing import Case, check
from miras_kernels.testing.parity import compare, expect

ROWS = [
    mk.CustomBias("e / sqrt(1 + (e / s)**2)", s=0.5),
    mk.CustomBias("e * exp(-norm2 / delta**2)"),
    mk.CustomBias(loss="log(cosh(s * e)) / s", s=4.0),
    mk.CustomBias(loss="delta * sqrt(norm2 + delta**2)"),
    mk.CustomRetention("A / (1 + abs(A))"),
    mk.CustomRetention("0.5 + 0.5 * tanh(A / s)", s=1.5),
]


@pytest.mark.parametrize("row", ROWS, ids=repr)
def test_copies_are_equal(row):
    table = biases if isinstance(row, mk.CustomBias) else retention
    for again in (pickle.loads(pickle.dumps(row)), copy.copy(row), copy.deepcopy(row), table.from_code(row.code)):
        assert again == row and hash(again) == hash(row) and again.code == row.code and repr(again) == repr(row)
        assert again.programs == row.programs
    assert eval(repr(row), vars(mk)) == row
    assert table.from_code(row.code) is table.from_code(row.code)  # an operator's call compiles no text


def test_what_differs_is_not_equal():
    e, s = "e / (1 + s * abs(e))", "s * abs(e)"
    rows = [
        mk.CustomBias(e, s=1),
        mk.CustomBias(e, s=2),
        mk.CustomBias(e + " ", s=1),
        mk.CustomBias(loss=s, s=1),
        mk.CustomBias(loss=s, s=2),
    ]
    assert len(set(rows)) == len({row.code for row in rows}) == 5
    assert mk.CustomBias("e / a * b", a=1, b=2) == mk.CustomBias("e / a * b", b=2, a=1)


def test_pickled_in_another_process(tmp_path):
    (tmp_path / "rows").write_bytes(pickle.dumps(ROWS))
    program = "import pickle, sys; print([row.code for row in pickle.load(open(sys.argv[1], 'rb'))])"
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "rows")], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == repr([row.code for row in ROWS])


CASES = [
    Case("elementwise", bias=ROWS[0], retention=ROWS[4], tokens=32),
    Case("of-a-row", bias=ROWS[1], retention=ROWS[5], momentum=True, decay="channel", lr="channel", chunk_size=8),
    Case("loss", bias=ROWS[2], delta="channel", lengths=(3, 20)),
    Case("mlp", memory="mlp", bias=ROWS[3], retention=ROWS[4], key_dim=12, tokens=20),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_checked(case, backend):
    report = check(case, backend)
    assert report.ok, report


@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_compile_fullgraph(case, backend):
    inputs = case.draw(torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(lambda a: mk.linear_memory(**a, backend=backend)[0].sin(), fullgraph=True, backend="aot_eager")
    leaves = inputs.leaves()

    def with_gradients(out, leaves):
        return {"out": out.detach()} | dict(zip(leaves, torch.autograd.grad(out.sum(), tuple(leaves.values())), strict=True))

    found = with_gradients(compiled({**inputs.arguments(), "output_final_state": False}), leaves)
    wanted = expect(inputs, torch.float32, lambda x: with_gradients(chunkwise.run(x.call())[0].sin(), x.leaves()))
    report = compare(case, torch.float32, found, wanted)
    assert report.ok, report


def test_a_second_derivative():
    """Of the reference, by autograd through the programs of the derivatives."""
    inputs = Case("twice", bias=ROWS[0], retention=ROWS[4], batch=1, heads=1, tokens=4, key_dim=2, value_dim=2, chunk_size=2).draw()
    v, arguments = inputs.tensors["v"], {**inputs.arguments(), "output_final_state": False}
    run = lambda v: mk.linear_memory(**{**arguments, "v": v}, backend="reference")[0]
    assert torch.autograd.gradgradcheck(run, (v,))


def test_layers_take_them(backend):
    preset = Preset(ROWS[1], "bounded", "token", 16, "of this test", retention=ROWS[4])
    block = MemoryBlock(16, 2, preset=preset, backend=backend)
    x = torch.randn(2, 20, 16)
    block(x)[0].sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())


def test_explain_and_errors():
    x, lr = torch.randn(1, 4, 2, 8), torch.full((1, 4, 2), 0.1)
    assert mk.explain(x, x, x, lr, None, bias=ROWS[0])["reference"] is None
    with pytest.raises(ValueError, match=r"delta: the bias CustomBias\('e \* exp\(-norm2 / delta\*\*2\)'\) needs one"):
        mk.linear_memory(x, x, x, lr, bias=ROWS[1])
    with pytest.raises(ValueError, match=r"delta: the bias CustomBias\('e / sqrt\(1 \+ \(e / s\)\*\*2\)', s=0.5\) uses none"):
        mk.linear_memory(x, x, x, lr, bias=ROWS[0], delta=1.0)
    with pytest.raises(ValueError, match=r"delta: expected"):  # coupled over the row: none per channel
        mk.linear_memory(x, x, x, lr, bias=ROWS[1], delta=torch.ones(1, 4, 2, 8))


@pytest.mark.parametrize("bias", [mk.L2(), mk.Huber("norm"), ROWS[0], ROWS[1]], ids=repr)
def test_plots(bias, tmp_path):
    pytest.importorskip("matplotlib")
    figure = bias.plot(delta=0.5)
    figure.savefig(tmp_path / "psi.png")
    assert (tmp_path / "psi.png").read_bytes().startswith(b"\x89PNG")
    (psi,), (slope,) = (axes.lines for axes in figure.axes)
    e, y, dy = (torch.tensor(x, dtype=torch.float64) for x in (psi.get_xdata(), psi.get_ydata(), slope.get_ydata()))
    middle = (y[2:] - y[:-2]) / (e[2:] - e[:-2])  # a central difference, of an error of second order; kinks are left out
    assert ((middle - dy[1:-1]).abs() < 1e-2).float().mean() > 0.98


def test_a_missing_matplotlib_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    with pytest.raises(ImportError, match="plot: matplotlib is needed, and not installed"):
        ROWS[0].plot()
