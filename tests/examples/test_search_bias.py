"""The search for an attentional bias (examples/search_bias.py), with few candidates."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from examples import search_bias

ROOT = Path(__file__).resolve().parents[2]


def test_expressions_are_biases_of_bounded_slope():
    draw = random.Random(3)
    e = torch.tensor([[1e6], [1e3], [1.0], [1e-6]], dtype=torch.float64).requires_grad_()
    found = [search_bias.expression(draw) for _ in range(40)]
    assert len(set(found)) > 30
    for bias in found:
        delta = torch.ones(4, 1, dtype=torch.float64) if bias.needs_delta else None
        (slope,) = torch.autograd.grad(bias.psi(e, torch.zeros_like(e), delta).sum(), e)
        assert slope.abs().max() <= 100, bias


@pytest.mark.slow
def test_the_table(tmp_path):
    """Three tasks, each with its finalists beside the best built-in bias."""
    out = tmp_path / "table.md"
    command = [sys.executable, "-m", "examples.search_bias", "--candidates", "6", "--workers", "1", "--out", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=600)
    text = out.read_text()
    for task in search_bias.TASKS:
        assert re.search(rf"\b{task}\b", text), task
