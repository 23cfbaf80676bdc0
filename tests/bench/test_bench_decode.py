"""bench.cpu.decode itself: what it writes, its verdicts, and that a wrong step gets no time."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.common import timing
from bench.cpu import cases, decode, decode_studies, program, targets
from bench.cpu.decode_model import MODEL_CASE, MODELS
from miras_kernels import Decoder, dispatch
from miras_kernels.layers import block

ROOT = Path(__file__).resolve().parents[2]
BACKEND = "reference" if dispatch.unavailable("cpp") else "cpp"
SETTINGS = cases.Settings(backend=BACKEND, toy=True, min_rounds=2, seconds=0.02, cache_bytes=1 << 26)
CONTEXTS = decode_studies.CONTEXTS


@pytest.mark.slow
def test_document(tmp_path):
    path = tmp_path / "out" / "decode.json"
    command = [sys.executable, "-m", "bench.cpu.decode"]
    arguments = ["--toy", "--quick", "--backend", BACKEND, "--shapes", "B1 H8 D64", "--seconds", "0.02", "--json", str(path)]
    done = subprocess.run([*command, *arguments], check=False, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    document = json.loads(path.read_text())
    linear, mlp, attention, model = document["results"]
    for result, study in ((linear, "linear"), (mlp, "mlp"), (attention, "attention"), (model, "model")):
        case = MODEL_CASE if study == "model" else "B1 H8 D64"
        assert (result["study"], result["case"], result["threads"], result["clock"]) == (study, case, 1, "cpu")
        assert result["parity"]["ok"]
        assert all(0 < x["p10"] <= x["median"] <= x["p90"] for x in [*result["us"].values(), *result["ratios"].values()])
    assert set(linear["us"]) == {"step", "function", "eager", "baddbmm", "touch"}
    assert all(0 < r["closing_us"] <= r["slowest_us"] and 1 <= r["slowest_token"] <= decode_studies.TOY[-1] for r in (linear, mlp))
    assert set(mlp["us"]) == set(linear["us"]) - {"baddbmm"}
    assert set(attention["us"]) == {"linear", "mlp", *CONTEXTS}
    assert set(model["us"]) == set(model["cache_bytes"]) == {f"{m} {c}" for m in MODELS for c in CONTEXTS}
    assert len({model["cache_bytes"][f"mlp {context}"] for context in CONTEXTS}) == 1
    assert model["cache_bytes"]["attention 64k"] == 64 * model["cache_bytes"]["attention 1k"]
    assert document["targets"] == []
    assert all(
        title in done.stdout
        for title in ("## The linear memory", "## The MLP memory", "## Against attention with its cache", "## A whole model")
    )
    shown = subprocess.run([*command, "--show", str(path)], check=True, capture_output=True, text=True, cwd=ROOT)
    assert shown.stdout == done.stdout


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("study", decode.PROGRAM.studies)
def test_no_time_for_a_wrong_step(monkeypatch, study):
    right = Decoder.step
    monkeypatch.setattr(Decoder, "step", lambda self, *x, **named: right(self, *x, **named) * (1 + 1e-4))
    remember = block.linear_memory
    wrong = lambda q, *x, **named: (lambda out, state: (out * (1 + 1e-2 * (q.shape[1] == 1)), state))(*remember(q, *x, **named))
    monkeypatch.setattr(block, "linear_memory", wrong)
    (result,) = decode.PROGRAM.studies[study]("B1 H1 D64", 1, SETTINGS)
    assert not result["parity"]["ok"] and "us" not in result
    assert "parity is red, not timed" in result["notes"]


def test_times_are_of_whole_chunks():
    tokens, now, chunk = [], [0.0], 16

    def read():
        tokens.append(len(tokens) % chunk)
        now[0] += 10.0 if tokens[-1] == chunk - 1 else 1.0  # the token that closes a chunk takes longer

    sample = timing.whole_chunks(read, lambda: now[0], chunk)
    for count in (1, chunk, chunk + 1):
        assert sample(count) == (chunk + 9) / chunk
    assert len(tokens) == 4 * chunk


@pytest.mark.usefixtures("one_thread")
def test_a_cache_that_does_not_fit_is_left_out():
    (result,) = decode_studies.study_attention("B1 H1 D64", 1, dataclasses.replace(SETTINGS, cache_bytes=1 << 16))
    assert "1k" in result["us"] and "64k" not in result["us"]
    assert any(note.startswith("attention over 64k left out") for note in result["notes"])


def judged(results, threads):
    return targets.judged(decode.targets(), results, threads, capability="avx512")


def test_targets_are_judged():
    us = {"step": 10.0, "eager": 70.0, "touch": 8.0}
    result = {"study": "linear", "case": "B8 H8 D64", "threads": 1, "us": {name: {"median": x} for name, x in us.items()}}
    doubtful = {**result, "threads": 2, "watch": {"flags": ["not 2 real cores"]}}
    rows = {(r["name"], r["case"]): r["measured"] for r in judged([result, doubtful], [1, 2])}
    eager = rows["linear memory, eager steps / step", "B8 H8 D64"]
    assert eager == {"1": {"value": 7.0, "verdict": "met"}, "2": {"value": 7.0, "verdict": "not judged: see notes"}}
    assert rows["linear memory, step / W.mul_(1.0)", "B8 H8 D64"]["1"] == {"value": 1.25, "verdict": "met"}
    assert rows["linear memory, eager steps / step", "B1 H1 D64"]["1"] == {"value": None, "verdict": "not measured"}
    slow = {**result, "us": {**result["us"], "step": {"median": 20.0}}}
    assert judged([slow], [1])[1]["measured"]["1"] == {"value": 2.5, "verdict": "NOT met"}


def test_arguments(capsys):
    assert program.main(decode.PROGRAM, ["--list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in (*decode.PROGRAM.studies, *decode_studies.SIZES))
    for arguments, message in (
        (["--only", "speed"], "--only: unknown 'speed': expected some of linear, mlp, attention, model"),
        (["--shapes", "D1"], "--shapes: unknown 'D1': expected some of B1 H1 D64"),
        (["--base", "HEAD"], "--base: it is a study of its own in bench.cpu"),
    ):
        with pytest.raises(SystemExit):
            program.main(decode.PROGRAM, arguments)
        assert message in capsys.readouterr().err
