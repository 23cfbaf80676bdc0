"""A state as a value: moved, cast, indexed."""

from __future__ import annotations

import pytest
import torch

import miras_kernels as mk
from miras_kernels.testing import Case


@pytest.fixture(scope="module")
def cut_open() -> mk.MemoryState:
    """The state of two sequences cut inside a chunk of more tokens than bfloat16 can represent."""
    case = Case("cut", tokens=301, chunk_size=302, heads=1, key_dim=2, value_dim=2, momentum=True)
    _, state = mk.linear_memory(**case.draw(torch.float32).arguments(), backend="reference")
    return state.detach()


CALLS = {
    "dtype": ((torch.bfloat16,), {}),
    "device and dtype": (("cpu", torch.bfloat16), {}),
    "keywords": ((), {"device": "cpu", "dtype": torch.bfloat16, "non_blocking": True}),
    "like a tensor": ((torch.zeros((), dtype=torch.bfloat16),), {}),
    "device, dtype, non_blocking, copy": (("cpu", torch.bfloat16, False, True), {}),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_dtype_applies_to_floating_point_tensors_only(cut_open, call):
    args, kwargs = CALLS[call]
    moved = cut_open.to(*args, **kwargs)
    assert all(torch.equal(x, y.to(torch.bfloat16)) for x, y in zip(moved.tensors(), cut_open.tensors(), strict=True))
    assert all(x.dtype == torch.bfloat16 for x in moved.tensors())
    assert moved.open_chunk.position.dtype == torch.int64
    assert moved.open_chunk.position.tolist() == [301, 301]


def test_a_device_applies_to_every_tensor(cut_open):
    moved = cut_open.to("meta")
    assert all(x.device.type == "meta" for x in [*moved.tensors(), moved.open_chunk.position])
    closed = mk.MemoryState(cut_open.dual).to("meta", torch.float64)
    assert closed.open_chunk is None and closed.momentum is None and closed.dual[0].device.type == "meta"


def test_copies_share_no_storage(cut_open):
    copied = cut_open.to("cpu", copy=True)
    theirs = [*copied.tensors(), copied.open_chunk.position]
    for x, y in zip([*cut_open.tensors(), cut_open.open_chunk.position], theirs, strict=True):
        assert torch.equal(x, y) and x.data_ptr() != y.data_ptr()


def test_map_reaches_positions(cut_open):
    second = cut_open.map(lambda x: x[1:])
    assert torch.equal(second.dual[0], cut_open.dual[0][1:])
    assert torch.equal(second.momentum[0], cut_open.momentum[0][1:])
    assert second.open_chunk.position.tolist() == [301]
