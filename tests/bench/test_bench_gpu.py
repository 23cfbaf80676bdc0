"""bench/gpu.py itself: its plan walked without a GPU, and that what is wrong, hangs or dies is told and costs nothing else."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from bench_gpu_toy import (
    BENCH,
    BOTH,
    FORWARD,
    MLP_SMALLEST,
    MLP_TARGET,
    ONE,
    SMALLEST,
    TARGET,
    TOY,
    gpu,
    gpu_configs,
    gpu_gate,
    gpu_parts,
    gpu_peers,
    gpu_plan,
    gpu_process,
    gpu_report,
    gpu_verdicts,
)


def dry_run(path: Path, *arguments: str, backend: str = "reference") -> tuple[subprocess.CompletedProcess, dict]:
    command = [sys.executable, str(BENCH / "gpu.py"), "--dry-run", "--backend", backend, "--jobs", "1", "--json", str(path), *arguments]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300, env={**os.environ, "TRITON_INTERPRET": "1"})
    return done, json.loads(path.read_text())


# --------------------------------------------------------------------------------------------------------- the whole


@pytest.mark.slow
def test_dry_run(tmp_path):
    """Every part, with a configuration that is wrong: it is told, and everything else is done."""
    shapes = (TARGET, SMALLEST, MLP_TARGET, MLP_SMALLEST)
    done, document = dry_run(tmp_path / "out" / "gpu.json", "--shapes", ",".join(shapes), "--plant", "wrong=reference_forward b")
    assert done.returncode == 1, done.stderr
    assert {"date", "commit", "modified", "settings", "took_s", *gpu_plan.PARTS} <= set(document)
    assert not any("error" in document[part] for part in gpu_plan.PARTS)
    assert document["environment"]["versions"]["torch"] == torch.__version__

    verdicts = {(r["kernel"], r["label"]): r["status"] for r in document["parity"]["results"]}
    assert verdicts.pop(("reference_forward", "b")) == "wrong"
    assert set(verdicts.values()) == {"ok"} and (None, None) in verdicts
    ((*_, kernel, label, reason),) = document["parity"]["deny"]
    assert (kernel, label) == ("reference_forward", "b") and "error 1.0e+00, budget" in reason
    assert "'reference_forward', 'b', 'huber_coordinate D16 C16 bfloat16: " in done.stdout  # ready to be pasted

    assert document["sanitizer"]["notes"] == ["needs a GPU"]
    assert document["ceilings"]["copy_bytes_per_s"] > 0 and document["ceilings"]["matmul_flops_per_s"] > 0
    results = {(r["shape"], r["direction"]): r for part in ("bench", "mlp") for r in document[part]["results"]}
    assert set(results) == {(shape, direction) for shape in shapes for direction in (FORWARD, BOTH)}
    for (shape, _), result in results.items():
        mlp = shape in (MLP_TARGET, MLP_SMALLEST)
        base, peer = ("huber_coordinate", "titans-pytorch") if mlp else ("l2", "fla delta rule")
        ours = {TARGET: gpu_plan.OURS, SMALLEST: gpu_plan.OURS[:2], MLP_TARGET: gpu_plan.MLP_OURS, MLP_SMALLEST: (base,)}[shape]
        assert set(result["ms"]) == {*ours, "eager"}
        assert all(x["p10"] <= x["median"] <= x["p90"] and x["p10"] > 0 for x in result["ms"].values())
        assert result["base"] == base and base not in result["ratios"]
        assert all(g["ok"] and 0 < g["output_error"] < g["worst"]["budget"] for g in result["gates"].values())
        assert f"{peer}: needs a GPU" in result["notes"] and result["once_ms"] == result["refused"] == result["failed"] == {}
    assert document["bench"]["first"]["first_s"]["l2"] > 0
    for result, (shape, count) in zip(document["recurrence"]["results"], [(TARGET, 8), (MLP_SMALLEST, 6)], strict=True):
        assert (result["shape"], result["direction"], result["base"], result["refused"]) == (shape, BOTH, "plain", {})
        assert len(result["ms"]) == len(result["gates"]) == count and all(g["ok"] for g in result["gates"].values())
    assert all(r["notes"] == ["needs a GPU"] for r in document["memory"]["results"])
    timed = {(r["shape"], r["kernel"]): r for r in document["tuning"]["results"]}
    assert timed[TARGET, "reference_forward"]["notes"] == ["b: wrong, not timed"]
    assert timed[TARGET, "reference_forward"]["chosen"] == timed[TARGET, "reference_forward"]["fastest"] == "a"


@pytest.mark.slow
def test_dry_run_of_the_kernels(tmp_path):
    """The Triton kernels in the interpreter, for as much as one shape takes."""
    pytest.importorskip("triton")
    shapes, parts = f"{SMALLEST},{MLP_SMALLEST}", ("parity", "bench", "mlp")
    done, document = dry_run(tmp_path / "gpu.json", "--shapes", shapes, "--only", ",".join(parts), backend="triton")
    missing = document["environment"].get("unavailable")
    if missing:
        pytest.skip(missing)
    assert document["environment"]["triton"]["version"]
    assert not any("error" in document[part] for part in ("environment", *parts)), done.stderr
    kernels = {r["kernel"] for r in document["parity"]["results"]} - {None}
    assert {
        "linear_chain_fwd",
        "linear_output",
        "linear_du_bwd",
        "linear_chain_bwd",
        "linear_dqk_bwd",
        "mlp_chain_fwd",
        "mlp_chain_bwd",
    } <= kernels
    assert {r["status"] for r in document["parity"]["results"]} <= {"ok", "unused"}, done.stdout
    assert all("l2" in r["ms"] for r in document["bench"]["results"]), done.stdout
    assert all("huber_coordinate" in r["ms"] for r in document["mlp"]["results"]), done.stdout
    assert done.returncode == 0


@pytest.mark.slow
def test_a_crash_costs_its_configuration_alone(tmp_path):
    done, document = dry_run(tmp_path / "gpu.json", "--only", "parity,ceilings", "--plant", "crash=reference_forward a")
    assert done.returncode == 1
    verdicts = {(r["kernel"], r["label"]): r["status"] for r in document["parity"]["results"]}
    assert verdicts.pop(("reference_forward", "a")) == "crashed"
    assert set(verdicts.values()) == {"ok"}
    ((*_, kernel, label, reason),) = document["parity"]["deny"]
    assert (kernel, label) == ("reference_forward", "a") and "the process ended with status 7" in reason
    assert "copy_bytes_per_s" in document["ceilings"]


def test_no_time_is_left_out_and_said(tmp_path):
    done, document = dry_run(tmp_path / "gpu.json", "--minutes", "0.02", "--shapes", SMALLEST)
    assert done.returncode == 0, done.stderr
    late = "left out: time"
    assert document["tests"]["status"] in ("left out", "missing") and document["ceilings"]["notes"] == [late]
    assert {r["status"] for r in document["parity"]["results"]} == {"left out"} and document["parity"]["deny"] == []
    for part in ("bench", "mlp", "recurrence", "memory", "tuning"):
        assert document[part]["results"] == [] and all(text.endswith(late) for text in document[part]["left_out"])
    assert done.stdout.count(late) > 3


@pytest.mark.slow
def test_merge_show_and_summary(tmp_path, capsys):
    """Parts of two runs in one document, which can be shown again."""
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    dry_run(first, "--only", "ceilings")
    _, document = dry_run(second, "--only", "parity", "--merge", str(first))
    assert document["ceilings"] == json.loads(first.read_text())["ceilings"]
    assert document["merged"] == "a.json" and "parity" in document
    assert gpu.main(["--show", str(second)]) == 0
    assert "## Ceilings" in capsys.readouterr().out
    assert gpu.main(["--show", str(second), "--summary"]) == 0


# ------------------------------------------------------------------------------------------------------------ verdicts


def row(status: str, case: str = "x") -> dict:
    return {
        "case": case,
        "status": status,
        "launches": {"k1": "a", "k2": "a"},
        "worst": {"name": "out", "error": 0.5, "budget": 0.01},
        "note": "n",
    }


def verdict(kernel, label, *rows, status=None) -> dict:
    return {"kernel": kernel, "label": label, "cases": list(rows), "status": status or rows[0]["status"], "error": None, "at": ""}


def test_a_configuration_is_not_blamed_for_another_kernel():
    """The chosen configuration of k1 is wrong: the rows of k2 fail with it and stay undecided; k1's other one is right."""
    results = [
        verdict(None, None, row("wrong")),
        verdict("k1", "a", row("wrong")),
        verdict("k1", "b", row("ok")),
        verdict("k2", "a", row("wrong")),
        verdict("k2", "b", row("wrong"), row("wrong", case="y")),
    ]
    gpu_verdicts.settle(results)
    assert [r["status"] for r in results[1:]] == ["wrong", "ok", "undecided", "wrong"]
    device = {"device": {"architecture": "sm_90"}, "triton": {"version": "3.6.0", "ptxas_version": "12.8"}}
    assert gpu_verdicts.deny(results, device) == [
        ["sm_90", "3.6.0", "12.8", "k1", "a", "x: out error 5.0e-01, budget 1.0e-02"],
        ["sm_90", "3.6.0", "12.8", "k2", "b", "y: out error 5.0e-01, budget 1.0e-02"],
    ]


def test_what_an_answer_says():
    say = lambda answer: gpu_verdicts.verdict(answer)["status"]
    assert say(None) == "left out"
    assert say(gpu_process.Answer([row("ok")], error="illegal access", fate="crashed")) == "crashed"
    assert say(gpu_process.Answer([row("ok"), row("wrong")])) == "wrong"
    assert say(gpu_process.Answer([row("ok"), row("not for this case")])) == "ok"
    assert say(gpu_process.Answer([row("not for this case")])) == "unused"


def test_sanitizer_output():
    read = gpu_verdicts.read_sanitizer
    assert read(0, "========= ERROR SUMMARY: 0 errors\n") == {"status": "ok", "found": 0, "lines": []}
    wrong = read(99, "========= Invalid __global__ read of size 4\n========= ERROR SUMMARY: 3 errors\n")
    assert (wrong["status"], wrong["found"], len(wrong["lines"])) == ("wrong", 3, 2)
    races = read(0, "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n")
    assert races["status"] == "ok"
    assert read(1, "========= Error: Device not supported\n")["status"] == "did not run"
    assert read(None, "") == {"status": "late", "error": "took too long"}


def test_targets_are_judged():
    ms = lambda **times: {name: {"median": t} for name, t in times.items()}
    both = {"shape": TARGET, "direction": BOTH, "ms": ms(l2=10.0, huber_coordinate=11.0, dot=14.0) | {"fla delta rule": {"median": 11.0}}}
    gate = {"output_error": 0.004, "output_error_eager": 0.002, "gradient_error": 0.009, "gradient_error_eager": 0.009}
    document = {"bench": {"results": [{**both, "gates": {"l2": gate}}], "first": {"first_s": {"l2": 12.0}}}, "ceilings": ONE}
    verdicts = {t["name"]: (t["value"], t["verdict"]) for t in gpu_report.judge(document)}
    find = lambda *words: next(v for name, v in verdicts.items() if all(w in name for w in words))
    assert find("huber_coordinate", "fastest delta rule") == (1.0, "met")
    assert find("lp 3", "fastest delta rule") == (None, "not measured")
    assert find(BOTH, "dot / l2") == (1.4, "NOT met")
    assert find("nothing compiled") == (12.0, "met")
    assert find("output error, smooth", "PyTorch") == (2.0, "NOT met")
    assert find("gradient error, smooth") == (0.009, "NOT met")
    assert find("gradient error, Huber") == (None, "not measured")


def test_every_case_can_be_drawn():
    """Of the checks on a device: where psi jumps, a draw in 16 bits has to keep its distance."""
    real = dataclasses.replace(TOY, toy=False)
    cases = [*gpu_configs.parity_cases(real), *gpu_configs.parity_cases(TOY)]
    for shape in (gpu_plan.SHAPES[TARGET], gpu_plan.SHAPES[SMALLEST], gpu_plan.SHAPES[MLP_TARGET]):
        cases += [(gpu_gate.short_case(gpu_gate.few_chunks(shape, real), bias), torch.bfloat16) for bias in shape.ours]
    assert len({case.name for case, _ in cases[:9]}) == 9
    for case, dtype in cases:
        inputs = case.draw(dtype, margin=4 * torch.finfo(dtype).eps * case.delta_scale)
        assert inputs.call().bias == case.bias and inputs.tensors["q"].dtype == dtype


# ---------------------------------------------------------------------------------------------------- floors and time


def test_floors():
    """A token of a head in bytes and operations, by hand; the traffic is that of the design."""
    for dim, forward, backward in ((64, 1176, 3368), (128, 2840, 7976)):
        shape = gpu_plan.Shape(1, 64, 1, dim)
        assert gpu_plan.traffic_bytes(shape, FORWARD) == 64 * forward
        assert gpu_plan.traffic_bytes(shape, BOTH) == 64 * (forward + backward)
        assert gpu_plan.io_bytes(shape, FORWARD) == 64 * (8 * dim + 8)
        assert gpu_plan.io_bytes(shape, BOTH, "huber_switch") == 64 * (8 * dim + 12 + 14 * dim + 24)
    mlp = gpu_plan.Shape(1, 64, 1, 64, 64, 256)
    assert gpu_plan.io_bytes(mlp, FORWARD, "huber_coordinate") == 64 * (8 * 64 + 12) + 131072
    assert gpu_plan.io_bytes(mlp, BOTH, "huber_coordinate") == 64 * (22 * 64 + 36) + 3 * 131072
    assert gpu_plan.traffic_bytes(mlp, FORWARD) == 64 * (512 + 24)
    backward = 2 * 512 + 4 * 1024 + 2 * (18 * 256 + 27 * 64 + 6 * 64) + 40
    assert gpu_plan.traffic_bytes(mlp, BOTH) == 64 * (512 + 24 + backward)
    floors = gpu_plan.floors_ms(mlp, BOTH, "huber_coordinate", ONE)
    assert floors["arithmetic"] == pytest.approx(1e3 * 3 * (14 * 64 * 64 * 256 + 2 * 64 * 65 * (64 + 256)) / 1e14)
    floors = gpu_plan.floors_ms(gpu_plan.Shape(1, 64, 1, 64), FORWARD, "l2", ONE)
    flops = 6 * 64**3 + 64 * 65 * 128
    assert floors["arithmetic"] == pytest.approx(1e3 * flops / 1e14) and floors["memory"] == pytest.approx(1e3 * 64 * 520 / 1e12)
    assert floors["roofline"] == max(floors["arithmetic"], floors["memory"])


def test_the_target_rows_are_what_they_are_meant_to_be():
    shape = gpu_plan.SHAPES[MLP_TARGET]
    assert (shape.batch * shape.tokens, shape.heads, shape.key_dim, shape.hidden, shape.chunk_size) == (65536, 16, 64, 256, 64)
    shape = gpu_plan.SHAPES[TARGET]
    assert (shape.batch * shape.tokens, shape.heads, shape.key_dim, shape.chunk_size) == (65536, 32, 128, 64)
    assert list(gpu_plan.SHAPES)[:2] == [TARGET, MLP_TARGET] and {SMALLEST, MLP_SMALLEST} <= set(gpu_plan.SHAPES)
    wanted = {*gpu_plan.WARMED, *gpu_plan.RECURRENCE_SHAPES, *gpu_plan.COMPILED_AT["linear"], *gpu_plan.COMPILED_AT["mlp"]}
    assert wanted <= set(gpu_plan.SHAPES) and {shape.chunk_size for shape in gpu_plan.SHAPES.values() if shape.hidden} == {16, 64}
    assert set(gpu_plan.SHARES) == set(gpu_plan.PARTS) == set(gpu_parts.DO)


def test_budget():
    budget = gpu_plan.Budget(10)
    share, shares = budget.part_end("bench", ["mlp", "tuning"]) - time.time(), gpu_plan.SHARES
    assert share == pytest.approx(600 * shares["bench"] / (shares["bench"] + shares["mlp"] + shares["tuning"]), abs=2)
    assert budget.part_end("tuning", []) == pytest.approx(budget.end, abs=1)
    assert gpu_plan.Budget(0).part_end("tests", []) <= time.time()


def test_worker_answers_dies_and_comes_back():
    """One that takes too long is ended; the next item has a fresh process."""
    worker = gpu_process.Worker(TOY, gpu_process.environment(TOY, [BENCH.parent / "python"], None))
    try:
        late = worker.ask({"task": "ceilings"}, 0.0)
        assert (late.fate, late.results, worker.process) == ("late", [], None)
        done = worker.ask({"task": "ceilings"}, 60.0)
        assert done.fate == "done" and done.results[0]["matmul_size"] == 64
        failed = worker.ask({"task": "unknown"}, 60.0)
        assert (failed.fate, failed.error) == ("failed", "KeyError: 'unknown'")
        process = worker.process
        assert worker.ask({"task": "ceilings"}, 60.0).fate == "done" and worker.process is process
    finally:
        worker.close()
    assert process.poll() is not None


def test_spread_asks_everyone_and_stops_in_time():
    class Fake:
        def ask(self, item, seconds):
            if item["n"] == 2:
                raise RuntimeError("broken")
            return gpu_process.Answer([item])

    items, end = [{"n": n} for n in range(5)], time.time() + 60
    answers = {item["n"]: answer for item, answer in gpu_process.spread(items, [Fake(), Fake()], 9, end)}
    assert len(answers) == 5
    assert answers[2].error == "RuntimeError: broken" and answers[4].results == [{"n": 4}]
    assert [answer for _, answer in gpu_process.spread([{"n": 0}], [Fake()], 9, time.time())] == [None]


def test_limited_ends_what_takes_too_long():
    began = time.time()
    assert gpu_process.limited([sys.executable, "-c", "import time; time.sleep(60)"], dict(os.environ), 1.0)[0] is None
    assert time.time() - began < 20
    assert gpu_process.limited([sys.executable, "-c", "print('hi')"], dict(os.environ), 30.0) == (0, "hi\n")


# ------------------------------------------------------------------------------------------------------- environment


def test_site_has_the_kernels(tmp_path):
    site = gpu_process.site(tmp_path)
    code = "import importlib.util as u, miras_kernels; print(miras_kernels.__file__); print(u.find_spec('miras_kernels.kernels').origin)"
    status, output = gpu_process.limited([sys.executable, "-c", code], {**os.environ, "PYTHONPATH": str(site)}, 60.0, cwd=tmp_path)
    assert status == 0, output
    assert all(line.startswith(str(site)) for line in output.split())


def test_wheels_are_unpacked(tmp_path):
    info = "peer-1.0.dist-info"
    with zipfile.ZipFile(tmp_path / "peer-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("peer/__init__.py", "")
        wheel.writestr("peer/bin/ptxas", "")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: peer\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    target, trouble = gpu_process.install(tmp_path, tmp_path / "to")
    assert trouble is None and (target / "peer" / "__init__.py").exists()
    assert gpu_process.find_ptxas("wheels", target) == str(target / "peer" / "bin" / "ptxas")
    assert gpu_process.find_ptxas("/a/ptxas", None) == "/a/ptxas" and gpu_process.find_ptxas("wheels", None) is None
    assert gpu_process.install(tmp_path / "to", tmp_path / "to2")[1].startswith("no wheels in ")


def test_worker_environment(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/last")
    env = gpu_process.environment(dataclasses.replace(TOY, device="cuda"), [Path("/a"), Path("/b")], "/p/ptxas")
    assert env["PYTHONPATH"] == os.pathsep.join(["/a", "/b", "/last"])
    assert env["TRITON_PTXAS_PATH"] == env["TRITON_PTXAS_BLACKWELL_PATH"] == "/p/ptxas"
    assert gpu_process.environment(TOY, [], None)["TRITON_INTERPRET"] == "1"


# ------------------------------------------------------------------------------------------------------ command line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "speed"], "--only: unknown 'speed': expected some of environment, tests"),
        (["--shapes", "1x1"], "--shapes: unknown '1x1': expected some of 8x8192x32x128"),
        (["--jobs", "0"], "--jobs and --minutes must be positive, got 0 and 9"),
    ],
)
def test_bad_arguments(capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        gpu.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_list(capsys):
    assert gpu.main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in (*gpu_plan.PARTS, *gpu_plan.SHAPES, *gpu_peers.PEERS))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    command = [sys.executable, str(BENCH / "gpu.py"), "--backend", "reference", "--json", str(tmp_path / "a.json")]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "reference on cuda cannot run here" in done.stdout
