"""examples/linearize.py with few steps, and the documentation's numbers against its results file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from examples import linearize

ROOT = Path(__file__).resolve().parents[2]
RESULTS = "bench/results/linearize-2026-11-30.json"


def test_the_documentation_has_the_numbers_of_the_file():
    document = json.loads((ROOT / RESULTS).read_text())
    page = (ROOT / "docs" / "transformers.md").read_text()
    assert RESULTS in page and linearize.page(document) in page


@pytest.mark.slow
def test_it_prints_and_writes_what_it_measured(tmp_path, capsys, monkeypatch):
    for name, value in dict(WIDTH=32, INTERMEDIATE=64, LENGTH=64, STRIDE=64, RANKING=8).items():
        monkeypatch.setattr(linearize, name, value)
    monkeypatch.setattr(linearize, "STEPS", {"teacher": 30, "transfer": 10, "finetune": 10})
    path = tmp_path / "out.json"
    linearize.main(["--presets", "yaad_linear", "--out", str(path)])
    document, printed = json.loads(path.read_text()), capsys.readouterr().out
    (found,) = document["results"]
    assert 2 < document["teacher"] < 6 and all(2 < x < 8.5 for x in found["bits"].values()) and len(found["layers"]) == 2
    assert found["bits"]["finetune"] < found["bits"]["replaced"]
    assert all(after < before for before, after in found["error"].values())
    verdict = "within" if found["bits"]["finetune"] - document["teacher"] <= 0.05 else "NOT within"
    assert f"against the teacher, {verdict} 0.05" in printed
    assert all(f"{x:.3f}" in printed for x in found["bits"].values())
