"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import shutil
import tempfile

import pytest
import torch

# Before anything imports triton: without a GPU its kernels run in its interpreter.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

# What was verified on this machine must not change what the tests do, nor what they do change it.
os.environ["MIRAS_CACHE"] = tempfile.mkdtemp(prefix="miras-kernels-tests-")

from miras_kernels import dispatch


def pytest_configure(config):
    # A test that wants the kernels and finds none must fail, not skip: the test command builds them.
    torch.manual_seed(0)


def pytest_unconfigure(config):
    shutil.rmtree(os.environ["MIRAS_CACHE"], ignore_errors=True)


@pytest.fixture
def poisoned():
    """Fresh memory holds NaN, so that reading before writing shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(8).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def one_thread():
    """Torch computes with one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["reference", "cpp"])
def backend(request) -> str:
    """Each backend that this machine is meant to run."""
    assert dispatch.unavailable(request.param) is None
    return request.param
