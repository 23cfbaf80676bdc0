"""examples/soak.py with few steps: every named memory is trained, and memory that grows is an error."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from examples import soak
from examples.demo import load_text

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_five_steps(tmp_path):
    out = tmp_path / "soak.json"
    command = [sys.executable, "-m", "examples.soak", "--steps", "5", "--out", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=300)
    found = json.loads(out.read_text())
    assert [r["preset"] for r in found["results"]] == list(soak.PRESETS)
    for r in found["results"]:
        assert r["steps"] == 5 and [step for step, _ in r["bits_per_byte"]] == [1, 2, 3, 4, 5]
        assert all(7 < bits < 9.5 for _, bits in r["bits_per_byte"])  # a byte has 8; five steps of the warm-up learn nothing yet
    assert all(mb > 100 for _, mb in found["memory"]["mb"])


def test_gradients_at_the_start_are_of_one_size():
    """On text, in which tokens repeat. With the step sizes of Titans, Memora's were 1e17."""
    text, _ = load_text()
    starts = torch.randint(len(text) - 2047, (2,), generator=torch.Generator().manual_seed(0)).tolist()
    for preset in soak.PRESETS:
        training, ids = soak.Training(preset, 2048, seed=0), text[starts[1] : starts[1] + 2048].unsqueeze(0)
        training.model(input_ids=ids, labels=ids).loss.backward()
        assert 1 < torch.nn.utils.get_total_norm([p.grad for p in training.model.parameters()]) < 10, preset


def test_curves_are_short():
    assert soak.thinned(list(range(250)), max)[:3] == [[2, 1], [5, 4], [7, 6]] and len(soak.thinned(list(range(250)), max)) == 100


def test_growth_of_memory_is_an_error():
    assert soak.growth([100.0, 103.0, 101.0, 104.0]) == {"earlier_half_mb": 103.0, "later_half_mb": 104.0}
    with pytest.raises(RuntimeError, match="memory has grown from 103 to 150 MB"):
        soak.growth([100.0, 103.0, 101.0, 150.0])
