"""Fixtures shared by all tests."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
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
    if os.environ["TRITON_INTERPRET"] == "1" and importlib.util.find_spec("triton") is not None:
        hurry_interpreter()


def hurry_interpreter():
    """Spare Triton's interpreter what takes two thirds of its time and changes no number.

    It replaces the functions of its language anew in every call of a device function, although once for each is enough; and it checks
    every sum and product of integers for overflow, of which the sizes of these tests are far (test_addresses.py looks at others).
    """
    from triton.runtime import interpreter

    patch = functools.cache(interpreter._patch_lang)

    def call(self, *args, **kwargs):
        patch(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


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


@pytest.fixture
def instruction_set(request, monkeypatch) -> str:
    """The C++ kernels take the code path that the test's parameter `level` names: they look at the environment in every call."""
    from miras_kernels import _C

    level = request.getfixturevalue("level")
    if level not in _C.cpu_capabilities():
        pytest.skip(f"this machine cannot run {level}")
    monkeypatch.setenv("MIRAS_CPU_CAPABILITY", level)
    assert _C.cpu_capability() == level
    return level
