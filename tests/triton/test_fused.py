"""The forward whose chain computes the output (kernels/linear/fused.py), in Triton's interpreter or on a GPU, and when it is taken."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import miras_kernels as mk
from miras_kernels.testing import Case, check, evaluate
from quick import slow

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = Case("fused", batch=1, heads=2, tokens=37, key_dim=24, value_dim=40)
WIDE = dataclasses.replace(SMALL, heads=1, key_dim=128, value_dim=64, chunk_size=64, tokens=130, decay="strong")
CASES = {
    "huber": dataclasses.replace(SMALL, bias=mk.Huber("coordinate")),
    "dot": dataclasses.replace(SMALL, bias=mk.DotProduct()),
    "l1": dataclasses.replace(SMALL, bias=mk.L1()),
    "lp": dataclasses.replace(SMALL, bias=mk.Lp(3.0)),
    "packed": dataclasses.replace(SMALL, lengths=(20, 0, 16, 9)),
    "batch-no-decay": dataclasses.replace(SMALL, batch=2, decay="none", chunk_size=32),
    "layout": dataclasses.replace(SMALL, batch=2, layout="heads_first", initial="shared"),
    "extreme": dataclasses.replace(SMALL, decay="extreme", chunk_size=29, tokens=70),
    "wide": WIDE,
    "one-token": dataclasses.replace(SMALL, tokens=1, chunk_size=10),
}


@pytest.fixture(autouse=True)
def fused():
    """In float32 too, where rounding errors cannot hide an error of logic."""
    from miras_kernels.kernels.common import configs

    with configs.fuse(True):
        yield


@pytest.fixture
def launched(monkeypatch) -> list[str]:
    """The names of the kernels, as they are launched."""
    from miras_kernels.kernels.common import launch

    names, start = [], launch.start
    monkeypatch.setattr(launch, "start", lambda kernel, *rest: names.append(kernel.__name__) or start(kernel, *rest))
    return names


@pytest.mark.parametrize("name", CASES)
def test_float32(name, poisoned, launched):
    report = check(CASES[name], "triton", device=DEVICE)
    assert report.ok, report
    assert "linear_chain_fwd_fused" in launched and "linear_output" not in launched


SIXTEEN_BITS = [("huber", torch.float16), ("wide", torch.bfloat16), ("packed", torch.bfloat16)]
SIXTEEN_BITS += [slow("wide", torch.float16), slow("dot", torch.float16)]


@pytest.mark.parametrize(("name", "dtype"), SIXTEEN_BITS, ids=str)
def test_sixteen_bits(name, dtype, poisoned):
    report = check(CASES[name], "triton", dtype, DEVICE)
    assert report.ok, report


def test_the_checkpoint_interval_does_not_change_a_bit():
    inputs = dataclasses.replace(SMALL, tokens=90).draw(torch.float32, DEVICE)
    found = []
    for every in (1, 2, 100):
        with mk.override(checkpoint_every=every):
            found.append(evaluate(inputs, "triton"))
    for name, x in found[0].items():
        assert torch.equal(found[1][name], x) and torch.equal(found[2][name], x), name


@pytest.mark.parametrize(
    "changes",
    [
        dict(bias=mk.Huber("norm")), dict(retention=mk.KLRetention()), dict(momentum=True), dict(decay="channel"), dict(lr="channel"),
        dict(bias=mk.Huber("coordinate"), delta="channel"), dict(chunk_size=100),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_never_fused(changes):
    """Recorded: no kernel runs."""
    from miras_kernels.kernels.common import launch

    names, call = [], dataclasses.replace(SMALL, **changes).draw(torch.float32, DEVICE).call()
    with launch.recording(lambda kernel, *_: names.append(kernel.__name__)):
        mk.dispatch.BACKENDS["triton"].forward(call, 1)
    assert names and "linear_chain_fwd_fused" not in names


def test_when_it_is_taken(monkeypatch):
    """Where programs of 32 values occupy 7 of 8 multiprocessors, by the shape of 16-bit calls alone."""
    from miras_kernels.kernels.common import configs

    monkeypatch.setattr(configs, "_fusing", None)
    key = configs.Key(128, 128, 64, 2, False)
    assert [key.fuses(heads, 132, "sm_90") for heads in (1, 28, 29, 1000)] == [False, False, True, True]
    assert not any(key.fuses(1000, 132, chip) for chip in ("", "sm_80", "gfx942"))
    for changes in (dict(itemsize=4), dict(key_dim=96), dict(value_dim=80), dict(key_dim=256), dict(chunk_size=128), dict(coupled=True)):
        assert not dataclasses.replace(key, **changes).fuses(1000, 132, "sm_90"), changes
    with configs.fuse(False):
        assert not key.fuses(1000, 132, "sm_90")
