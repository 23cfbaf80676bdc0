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

# Set before triton is imported: without a GPU the Triton kernels run in the interpreter.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

# The tests neither use nor change this machine's verification records.
os.environ["MIRAS_CACHE"] = tempfile.mkdtemp(prefix="miras-kernels-tests-")

from miras_kernels import dispatch
from records import forget


def pytest_configure(config):
    torch.manual_seed(0)
    if os.environ["TRITON_INTERPRET"] == "1" and importlib.util.find_spec("triton") is not None:
        speed_up_interpreter()


def speed_up_interpreter():
    """Skip work of Triton's interpreter that takes two thirds of its time and changes no number.

    It patches the functions of its language again in every call of a device function, although once per function is enough; and it checks
    every integer sum and product for overflow, which cannot happen at the sizes of these tests (test_addresses.py covers large ones).
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


@pytest.fixture(autouse=True, scope="session")
def compiled_kernels():
    """MIRAS_TRITON=ptx:sm_90 (or ptx:sm_80): the Triton kernels run on CPU tensors as compiled for this chip (tests/ptx)."""
    target = os.environ.get("MIRAS_TRITON")
    if target is None:
        yield
        return
    from ptx.host import on_machine

    with on_machine(target.removeprefix("ptx:")):
        yield


@pytest.fixture
def poisoned():
    """New tensors are filled with NaN, so that reads of uninitialised memory show in the results."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(8).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def one_thread():
    """PyTorch uses one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["reference", "cpp"])
def backend(request) -> str:
    """Each backend that runs on every machine."""
    assert dispatch.unavailable(request.param) is None
    return request.param


@pytest.fixture
def instruction_set(request, monkeypatch) -> str:
    """Makes the C++ kernels use the instruction set in the test's parameter `level`: they read the environment in every call."""
    from miras_kernels import _C

    level = request.getfixturevalue("level")
    if level not in _C.cpu_capabilities():
        pytest.skip(f"this CPU does not support {level}")
    monkeypatch.setenv("MIRAS_CPU_CAPABILITY", level)
    assert _C.cpu_capability() == level
    return level


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty folder for verification records, and a process that has read none."""
    monkeypatch.setenv("MIRAS_CACHE", str(tmp_path / "cache"))
    forget(monkeypatch)
    return tmp_path / "cache"
