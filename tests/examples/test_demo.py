"""examples/demo.py with few steps: its tables and its plot, and that training has no validation text."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "examples" / "demo.py"


def run(*arguments: str) -> subprocess.CompletedProcess:
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, [str(ROOT / "python"), os.environ.get("PYTHONPATH")])))
    return subprocess.run([sys.executable, str(DEMO), *arguments], capture_output=True, text=True, timeout=300, env=env, check=False)


@pytest.mark.parametrize("preset", [pytest.param("yaad", marks=pytest.mark.slow), "yaad_linear"])
def test_it_prints_the_tables_and_writes_the_plot(tmp_path, preset):
    result = run("--preset", preset, "--steps", "3", "--seconds", "1", "--out", str(tmp_path))
    assert result.returncode == 0, result.stderr[-2000:]
    text = result.stdout
    assert "\r" not in text + result.stderr  # no progress bar without a terminal
    bits = re.search(r"validation, bits per byte +(\d\.\d+) +(\d\.\d+)", text)
    assert all(3 < float(x) < 9.5 for x in bits.groups())
    assert all(float(x.replace(",", "")) > 0 for x in re.search(r"tokens per second +([\d,]+) +([\d,]+)", text).groups())
    unigram = float(re.search(r"Byte frequencies alone would give (\d\.\d+)", text)[1])
    assert 4 < unigram < 5.5
    assert re.search(rf"(attention|{preset}) was the better one|neither was better", text)
    better = "attention" if float(bits[1]) < float(bits[2]) else preset
    assert bits[1] == bits[2] or f"In this run {better} was the better one" in text
    attention, memory = (int(x.replace(",", "")) for x in re.search(r"parameters +([\d,]+) +([\d,]+)", text).groups())
    # Per layer: 4 + 1 projections against 4; convolution, norm, gates; W1, W2 (Hd = 4 D) and LN's two vectors.
    extra = 96 * 96 + 3 * 96 * 4 + 32 + 16 * 96 + 9 * 16 + 9 + (3 * (2 * 32 * 128 + 2 * 32) if preset == "yaad" else 0)
    assert memory - attention == 3 * extra
    assert ("a learned initial memory" in text) == (preset == "yaad")
    assert re.search(rf"{preset}, B4.*\n-+\nforward \+ backward, seconds", text)
    assert all(float(x) < 1e-4 for x in re.findall(r"(?:float64|worst gradient) +(\S+e-\d+)", text))
    assert "within the error budget of float32" in text
    rows = re.search(r"bytes per second +([\d,]+) +([\d,]+)\n.* prompt, bytes +([\d,]+) +([\d,]+)\n.* end, bytes +([\d,]+) +([\d,]+)", text)
    *rates, attention, memory, later, still = (int(x.replace(",", "")) for x in rows.groups())
    assert all(rates) and later > 2 * attention and still == memory  # keys and values of every byte; a state that does not grow
    assert f"{preset} continues: " in text and "attention continues: " in text
    assert (tmp_path / "learning_curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_it_trains_with_a_bias_of_one_s_own(tmp_path):
    result = run("--preset", "yaad_linear", "--bias", "custom:e/(1+(e/s)**2),s=1", "--steps", "2", "--seconds", "1", "--out", str(tmp_path))
    assert result.returncode == 0, result.stderr[-2000:]
    assert "yaad_linear with custom continues: " in result.stdout and "within the error budget of float32" in result.stdout


@pytest.mark.parametrize(("preset", "expected"), [("yaad", "--preset yaad"), ("", None), ("ttt_mlp", "--preset ttt_mlp")])
def test_make_passes_the_preset(preset, expected):
    result = subprocess.run(["make", "-n", "demo", f"PRESET={preset}"], capture_output=True, text=True, cwd=ROOT, check=True)
    command = next(line for line in result.stdout.splitlines() if "examples/demo.py" in line)
    assert (expected in command) if expected else "--preset" not in command


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("demo", DEMO)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Quick:
    """A replacement for a model, which takes no time."""

    def __init__(self):
        self.name, self.curve, self.steps = "quick", [], 0

    def step(self, ids, rate):
        self.steps += 1
        return 5.0

    def bits_per_byte(self, text):
        return 5.0


@pytest.mark.parametrize(("every", "lines"), [(0.0, 7), (60.0, 0)])
def test_progress_lines_without_a_terminal(demo, monkeypatch, capsys, every, lines):
    monkeypatch.setattr(demo, "REPORT_EVERY", every)
    trained = Quick()
    demo.train([trained], torch.zeros(7, 1, 4, dtype=torch.int64), torch.zeros(99, dtype=torch.int64), 30.0)
    printed = capsys.readouterr()
    assert trained.steps == 7 and printed.err == ""
    assert printed.out.splitlines() == [f"training: step {i} of 7, quick 5.00 bits/byte" for i in range(1, 1 + lines)]


def test_training_has_no_validation_text(demo, capsys):
    train, valid = (bytes(x.tolist()).decode() for x in demo.load_text())
    assert len(train) > 300_000
    assert len(valid) > 30_000
    known = " ".join(train.split())
    paragraphs = [" ".join(p.split()) for p in valid.split("\n\n")]
    assert not [p for p in paragraphs if p and p in known]
    assert str(len(train.encode())) in capsys.readouterr().out.replace(",", "")
