"""NaN and infinity in an argument reach the results that depend on it, as in the reference, and no others."""

from __future__ import annotations

import pytest

from miras_kernels import _C
from not_finite import CHUNK, KINDS, TRITON, assert_as_in_the_reference


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("level", _C.cpu_capabilities())
def test_cpp(monkeypatch, kind, level):
    """Tiles of other widths leave NaN in other places, which the next chunk must not read."""
    monkeypatch.setenv("MIRAS_CPU_CAPABILITY", level)
    assert_as_in_the_reference(KINDS[kind], "cpp", 3 * CHUNK, CHUNK + 4, gradients=True)


@pytest.mark.parametrize("kind", TRITON)
def test_triton(kind):
    assert_as_in_the_reference(TRITON[kind], "triton", 2 * CHUNK, CHUNK + 4, gradients=kind == "clip")


@pytest.mark.parametrize("kind", TRITON)
def test_token_by_token(kind):
    assert_as_in_the_reference(TRITON[kind], "triton", 3, 1, gradients=False)


@pytest.mark.parametrize("kind", KINDS | TRITON)
@pytest.mark.parametrize("level", _C.cpu_capabilities())
def test_token_by_token_on_every_instruction_set(monkeypatch, kind, level):
    """Vectors of other widths have other padding, which must not carry NaN from head to head."""
    monkeypatch.setenv("MIRAS_CPU_CAPABILITY", level)
    assert_as_in_the_reference((KINDS | TRITON)[kind], "cpp", 3, 1, gradients=False)
