"""examples/soak.py with few steps: every named memory is there, and a second run keeps what the file has."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from examples import soak

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_five_steps(tmp_path):
    out = tmp_path / "soak.json"
    command = [sys.executable, "-m", "examples.soak", "--steps", "5", "--out", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=300)
    found = json.loads(out.read_text())["results"]
    assert [r["preset"] for r in found] == list(soak.PRESETS)
    for r in found:
        assert [row[0] for row in r["curve"]] == [1, 2, 3, 4, 5] and r["curve"][-1][1] < r["curve"][0][1] < 9.5
        assert all(row[2] > 100 for row in r["curve"])
    subprocess.run(command, cwd=ROOT, check=True, timeout=300)
    assert json.loads(out.read_text())["results"] == found  # times too: nothing was run again


def test_growth_of_memory_is_an_error():
    assert soak.growth("yaad", [100.0, 103.0, 101.0, 104.0])["memory_mb"] == {"earlier_half": 103.0, "later_half": 104.0}
    with pytest.raises(RuntimeError, match=r"yaad: memory has grown from 103 to 150 MB"):
        soak.growth("yaad", [100.0, 103.0, 101.0, 150.0])
