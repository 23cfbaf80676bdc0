"""The MLP memory's forward in CUDA C++, csrc/cuda/mlp_chain.cu: executed on the CPU as compiled (tests/ptx), where any fault that is
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
from assembled import NVCC, assembled, assert_no_worse
from miras_kernels import dispatch
from miras_kernels.backends import cuda_mlp
from miras_kernels.backends.cuda import CudaBackend
from miras_kernels.backends.reference import chunkwise
from miras_kernels.tables.biases import TABLE as BIASES
from miras_kernels.tables.retention import TABLE as GATES
from miras_kernels.testing import Case, check, verifying
from miras_kernels.testing.parity import compare, expect, margin
from miras_kernels.testing.steps import results
from ptx import cuda as machine
from ptx.host import Launch
from ptx.test_deleted import assert_reported
from quick import slow
from records import forget

pytestmark = pytest.mark.skipif(NVCC is None, reason="there is no nvcc here")

BF16, F16 = torch.bfloat16, torch.float16
SHAPE = dict(memory="mlp", key_dim=64, value_dim=64, batch=1, heads=1)


def sized(name: str, c: int, hidden: int, **changes) -> Case:
    return Case(name, **SHAPE | dict(chunk_size=c, hidden=hidden, tokens=2 * c + 7) | changes)


#: (architecture, dtype, case)
SPECIMENS = [
    ("sm_80", BF16, sized("small", 16, 64, bias=mk.Huber("switch"), heads=2, batch=2, tokens=37)),
    ("sm_80", F16, sized("packed", 32, 64, bias=mk.Huber("norm"), lengths=(40, 0, 32, 7))),
    ("sm_80", BF16, sized("tall", 64, 64, bias=mk.Lp(3.0))),
    ("sm_80", F16, sized("no-decay", 16, 128, bias=mk.L1(), decay="none", tokens=32)),
    ("sm_80", BF16, sized("extreme", 32, 128, bias=mk.Lp(1.5, 10.0), decay="extreme", layout="fused")),
    ("sm_80", BF16, sized("dot", 16, 256, bias=mk.DotProduct(), decay="strong")),
    ("sm_80", F16, sized("wide", 32, 256, bias=mk.RobustL2(), initial="shared", batch=2)),
    ("sm_90", F16, sized("small", 16, 64, bias=mk.Huber("coordinate"), lengths=(20, 16))),
    ("sm_90", BF16, sized("square", 32, 64, layout="heads_first")),
    ("sm_90", F16, sized("tall", 64, 64, bias=mk.L1())),
    ("sm_90", BF16, sized("half", 16, 128, bias=mk.Huber("coordinate"), delta="float")),
    ("sm_90", F16, sized("half-square", 32, 128, bias=mk.Huber("switch"))),
    ("sm_90", BF16, sized("half-tall", 64, 128, bias=mk.Huber("norm"), lengths=(70, 64))),
    ("sm_90", F16, sized("shallow", 16, 256, bias=mk.DotProduct())),
    ("sm_90", BF16, sized("wide", 32, 256, bias=mk.Lp(3.0), decay="extreme")),
    ("sm_90", BF16, sized("largest", 64, 256, bias=mk.Huber("coordinate"), heads=2)),
    ("sm_90", F16, sized("largest-packed", 64, 256, bias=mk.Huber("switch"), lengths=(64, 0, 67))),
    ("sm_90", BF16, sized("cluster", 64, 256, bias=mk.Huber("coordinate"), heads=2, decay="strong")),
    ("sm_90", F16, sized("cluster-packed", 64, 256, bias=mk.Huber("norm"), lengths=(64, 0, 67), delta="float")),
    ("sm_90", BF16, sized("momentum", 64, 256, bias=mk.Huber("coordinate"), heads=2, momentum=True, decay="extreme")),
    ("sm_90", F16, sized("momentum-packed", 64, 256, lengths=(64, 0, 67), momentum=True, initial="shared")),
]
QUICK = {("sm_80", "small")}
#: likewise, with retention gates
GATED = [
    ("sm_80", BF16, sized("elastic", 16, 64, retention=mk.ElasticNetRetention(0.05), bias=mk.Huber("switch"), tokens=37)),
    ("sm_80", F16, sized("sigmoid", 32, 256, retention=mk.SigmoidRetention(), lengths=(40, 0, 7))),
    ("sm_90", BF16, sized("sigmoid-tall", 64, 256, retention=mk.SigmoidRetention(), tokens=70)),
    ("sm_90", F16, sized("elastic-half", 64, 128, retention=mk.ElasticNetRetention(0.05), lengths=(64, 70))),
    ("sm_80", F16, sized("lq-packed", 16, 64, retention=mk.LqRetention(3.0, 0.5), lengths=(20, 0, 16), heads=2)),
    ("sm_90", BF16, sized("lq", 32, 256, retention=mk.LqRetention(4.0), bias=mk.Lp(3.0, 10.0), decay="strong")),
    ("sm_90", F16, sized("lq-tall", 64, 256, retention=mk.LqRetention(1.5), tokens=70)),
    ("sm_80", BF16, sized("kl", 32, 256, retention=mk.KLRetention(), tokens=64)),
    ("sm_90", F16, sized("kl-packed", 16, 128, retention=mk.KLRetention(2.0), lengths=(20, 16))),
    ("sm_90", BF16, sized("kl-tall", 64, 256, retention=mk.KLRetention(), tokens=70)),
]


@functools.cache
def built(architecture: str) -> tuple[Path, dict[str, str]]:
    return machine.build(NVCC, architecture)


@pytest.fixture
def cuda(monkeypatch) -> Iterator[CudaBackend]:
    """The "cuda" backend, for CPU tensors, on the machine."""
    with machine.on_machine(built("sm_80")) as backend:
        monkeypatch.setitem(dispatch.BACKENDS, "cuda", backend)
        yield backend


def forward(case: Case, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Outputs and the final state, also of the chunk that the sequences end in."""
    with torch.no_grad():
        return results(*mk.mlp_memory(**case.draw(dtype, margin=margin(case, dtype)).arguments(), backend="cuda"))


def assert_right(case: Case, dtype: torch.dtype) -> None:
    found = forward(case, dtype)
    inputs = case.draw(dtype, margin=margin(case, dtype))
    wanted = expect(inputs, dtype, lambda x: results(*chunkwise.run(x.call())))
    assert len(found) == (8 if case.momentum else 6) or (case.lengths is None and case.tokens % case.chunk_size == 0)
    report = compare(case, dtype, found, wanted)
    assert report.ok, report


@pytest.mark.parametrize(
    ("architecture", "dtype", "case"),
    [x if (x[0], x[2].name) in QUICK else slow(*x) for x in [*SPECIMENS, *GATED]],
    ids=lambda x: x.name if isinstance(x, Case) else str(x),
)
def test_forward(architecture, dtype, case, monkeypatch):
    """On a chip that has room for so many blocks of each head. With momentum there are always two, with a retention gate one."""
    gated, heads = not case.retention.is_identity, len(case.lengths or range(case.batch)) * case.heads
    room = 2 if gated or "cluster" in case.name else 1
    monkeypatch.setattr(cuda_mlp, "multiprocessors", lambda _: room * heads)
    blocks = 1 if gated else 2 if case.momentum else room
    launched = []
    with machine.on_machine(built(architecture), before=lambda x: launched.append((x.cluster, x.grid))) as backend:
        monkeypatch.setitem(dispatch.BACKENDS, "cuda", backend)
        assert_right(case, dtype)
    assert launched == [(blocks, (blocks * heads,))]


def test_the_specimens_have_every_size_bias_and_type():
    sizes = {(a, case.hidden, case.chunk_size) for a, _, case in SPECIMENS}
    shared, most = CudaBackend(built("sm_80")[0], "cpu")._loaded[0].miras_mlp_chain_shared, {"sm_80": 163 * 1024, "sm_90": 227 * 1024}
    every = itertools.product(most, (64, 128, 256), (16, 32, 64))
    assert sizes == {(a, hidden, c) for a, hidden, c in every if shared(hidden, c) <= most[a]}
    assert {case.bias.tag for _, _, case in SPECIMENS} == set(BIASES) - {mk.CustomBias.tag}
    assert {case.retention.tag for _, _, case in GATED} == set(GATES) - {mk.L2Retention.tag, mk.CustomRetention.tag}
    assert {(a, dtype) for a, dtype, _ in SPECIMENS} == set(itertools.product(("sm_80", "sm_90"), (BF16, F16)))
    assert {case.lengths is None for _, _, case in SPECIMENS} == {True, False}


TRAINED = [
    sized("trained", 64, 64, bias=mk.Huber("switch"), tokens=67),
    sized("trained-packed", 64, 64, bias=mk.RobustL2(), lengths=(70, 0, 40), heads=2),
    sized("trained-lq", 16, 64, retention=mk.LqRetention(), tokens=37),
]


@pytest.mark.parametrize("case", [TRAINED[0], *map(slow, TRAINED[1:])], ids=lambda x: x.name)
def test_gradients_by_the_triton_kernels(case, cuda):
    """From the checkpoints that the CUDA forward saved, where there are no CUDA kernels for it."""
    assert cuda.refuses_backward(case.draw(BF16).call())
    report = check(case, "cuda", BF16)
    assert report.ok, report


@pytest.mark.slow
def test_gradients_with_momentum_by_the_triton_kernels(monkeypatch):
    case = sized("trained-momentum", 64, 256, bias=mk.Huber("switch"), tokens=67, momentum=True)
    with machine.on_machine(built("sm_90")) as backend:
        monkeypatch.setitem(dispatch.BACKENDS, "cuda", backend)
        assert backend.refuses_backward(case.draw(BF16).call()) == "it computes no gradients with momentum"
        report = check(case, "cuda", BF16)
    assert report.ok, report


def test_rows_that_are_not_aligned(cuda):
    case = sized("aligned", 16, 64, tokens=20)
    arguments = case.draw(BF16).arguments()
    with torch.no_grad():
        wanted, _ = mk.mlp_memory(**arguments, backend="cuda")
        for name in ("q", "k", "v"):
            wide = torch.zeros(*arguments[name].shape[:-1], 65, dtype=BF16)
            wide[..., 1:] = arguments[name]
            found, _ = mk.mlp_memory(**arguments | {name: wide[..., 1:]}, backend="cuda")
            assert torch.equal(found, wanted)


def test_a_sequence_is_as_alone(cuda):
    """Bit for bit, whatever lies beside it."""
    case = sized("packed", 16, 64, lengths=(20, 0, 25), bias=mk.Huber("coordinate"))
    arguments = case.draw(BF16).arguments()
    with torch.no_grad():
        packed, state = mk.mlp_memory(**arguments, backend="cuda")
        first = {name: x[:, :20] for name, x in arguments.items() if isinstance(x, torch.Tensor) and x.shape[:2] == (1, 45)}
        initial = tuple(x[:1] for x in arguments["initial_state"])
        alone, end = mk.mlp_memory(**arguments | first | dict(cu_seqlens=None, initial_state=initial), backend="cuda")
        assert torch.equal(packed[:, :20], alone)
        assert all(torch.equal(x[:1], y) for x, y in zip(state.dual, end.dual, strict=True))


def test_refusals_name_the_reason(cuda):
    case = sized("refused", 16, 64)

    def refusal(changes: dict | None = None, dtype: torch.dtype = BF16, differentiate: bool = False, **of_call) -> str:
        call = Case(**vars(case) | (changes or {})).draw(dtype).call()
        return cuda.refuses(call.replace(**of_call), differentiate) or ""

    assert refusal() == refusal(differentiate=True) == ""
    assert "chunks of bfloat16 or float16 inputs, got torch.float32" in refusal(dtype=torch.float32)
    assert "head dimensions must be 64 for an MLP memory, got 32" in refusal(dict(key_dim=32, value_dim=32))
    assert "hidden sizes must be one of 64, 128, 256 for an MLP memory, got 96" in refusal(dict(hidden=96))
    assert "chunk_size must be one of 16, 32, 64 for an MLP memory, got 8" in refusal(dict(chunk_size=8))
    assert refusal(dict(retention=mk.LqRetention())) == refusal(dict(retention=mk.LqRetention()), differentiate=True) == ""
    assert "with the built-in retention gates only, got custom" in refusal(dict(retention=mk.CustomRetention("tanh(A)")))
    assert refusal(dict(momentum=True)) == "it reads chunks with momentum of 64 tokens at hidden 256, got 16 at hidden 64"
    inputs = case.draw(BF16)
    with torch.no_grad():
        _, state = mk.mlp_memory(**inputs.arguments(), backend="reference")
    assert "it does not continue inside a chunk" in refusal(state=state)
    with pytest.raises(ValueError, match="'cuda' cannot serve this call: it reads chunks with momentum of 64 tokens"):
        mk.mlp_memory(**Case(**vars(case) | dict(momentum=True)).draw(BF16).arguments(), backend="cuda")


def test_without_triton_it_has_no_gradients(cuda, monkeypatch):
    monkeypatch.setattr(dispatch.BACKENDS["triton"], "unavailable", lambda: "triton is not installed")
    call = sized("refused", 64, 64).draw(BF16).call()
    assert cuda.refuses(call, False) is None
    assert cuda.refuses(call, True).startswith("the Triton kernels do its backward, since it ")
    assert cuda.refuses(call, True).endswith(": triton is not installed")


def test_auto_takes_it_where_it_was_verified(cuda, monkeypatch, tmp_path):
    """`verify` checks it with sizes and options that it has; until then "auto" takes the Triton kernels."""
    monkeypatch.setattr(dispatch, "_BY_DEVICE", {"cpu": ("cuda", "triton", "reference")})
    forget(monkeypatch)
    call, checked = sized("auto", 16, 64).draw(BF16).call(), []
    assert dispatch.choose("auto", call, True) == "triton"
    assert "not verified on this machine" in dispatch.explain(call, True)["cuda"]

    def right(self, case, inputs):
        checked.append((self.backend, case.hidden, case.chunk_size, case.name))

    monkeypatch.setattr(verifying._Check, "_wrong", right)
    monkeypatch.setenv("MIRAS_CACHE", str(tmp_path))
    assert mk.verify(memory="mlp", bias=mk.L2(), retention=mk.L2Retention(), dtype=BF16, device="cpu").ok
    assert checked[:2] == [("cuda", 256, 32, "plain"), ("cuda", 64, 16, "packed")]
    assert checked[2:5] == [("cuda", 256, 64, name) for name in ("many heads", "with momentum", "large")]
    assert dispatch.choose("auto", call, True) == "cuda"
    other = sized("auto", 16, 64, retention=mk.LqRetention()).draw(BF16).call()
    assert dispatch.choose("auto", other, True) == "triton"


def test_a_library_of_other_sources_is_refused(monkeypatch):
    monkeypatch.setattr(cuda_mlp.Chain, "layout", lambda: [1])
    assert "built from other sources" in CudaBackend(built("sm_80")[0], "cpu").unavailable()


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [sized("barriers", 32, 256, bias=mk.Huber("switch")), sized("barriers-kl", 16, 64, retention=mk.KLRetention())],
    ids=lambda x: x.name,
)
def test_a_deleted_barrier_or_wait_is_reported_or_had_nothing_to_do(case, monkeypatch):
    launches: dict[str, Launch] = {}
    with machine.on_machine(built("sm_80"), before=lambda x: launches.setdefault(x.entry, x.copy())) as backend:
        monkeypatch.setitem(dispatch.BACKENDS, "cuda", backend)
        forward(case, BF16)
    (launch,) = launches.values()
    assert assert_reported(launch) == {"bar.sync", "cp.async.wait_group", "cp.async.commit_group"}


# ---------------------------------------------------------------------------------------------------------------- compiled

KERNEL = re.compile(
    r"Compiling entry function '\w*?mlp_chain(_cluster|_momentum)?ILi(\d+)ELi(\d+)E\d+_*(\w+?)EE\w*' for '(sm_\w+)'.*?"
    r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
    re.S,
)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_registers_and_spills(architecture):
    """At most 128 bytes are spilled at C = 64, and nothing at C = 16 and 32. With the table's compiler, the table is the limit."""
    found = {
        f"C{c}-Hd{hidden}-{dtype}{cluster.replace('_', '-')}": [int(used), int(stores), int(loads)]
        for cluster, c, hidden, dtype, _, stores, loads, used in KERNEL.findall(assembled("mlp_chain.cu", architecture))
    }
    assert len(found) == 22
    for name, (registers, stores, loads) in found.items():
        assert registers <= 255 and max(stores, loads) <= (128 if name.startswith("C64-Hd256") else 0), name
    assert_no_worse(found, architecture, "C")
