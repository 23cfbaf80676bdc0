"""bench.gpu itself: its plans are executed without a GPU; an item that fails, hangs or crashes is reported, and the others are done."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode

from bench.common import results
from bench.common.implementations import BOTH, FORWARD, recurrences
from bench.gpu import __main__ as gpu
from bench.gpu import correctness, decode, device, inputs, plan, report, runner, times
from miras_kernels import dispatch
from miras_kernels.testing import parity

ROOT = Path(__file__).resolve().parents[2]
SMOKE = plan.Settings(backend="reference", device="cpu", smoke=True, seconds=0.0, min_rounds=2)


def run_bench(path: Path, command: str, *arguments: str) -> tuple[subprocess.CompletedProcess, dict]:
    """The program in the smoke test."""
    whole = [sys.executable, "-m", "bench.gpu", command, "--smoke", "--json", str(path), *arguments]
    done = subprocess.run(whole, check=False, capture_output=True, text=True, timeout=900, cwd=ROOT)
    return done, json.loads(path.read_text())


def timed(direction: str = FORWARD, names=("l2", "eager"), shape: str = plan.SMALLEST, settings=SMOKE, exclude=()) -> dict:
    (result,) = (r for r in times.times(settings, shape, direction, names, exclude) if "doing" not in r)
    return {"study": "times", "case": shape, **result}


@pytest.fixture(autouse=True)
def fresh(one_thread):
    """One thread, and nothing remembered from other tests."""
    times.gate.cache_clear()
    inputs.draw.cache_clear()


# ------------------------------------------------------------------------------------------------------------- programs


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_correctness(tmp_path, backend):
    done, document = run_bench(tmp_path / "out" / "gpu.json", "correctness", "--backend", backend, "--jobs", "1", "--minutes", "10")
    if "cannot run here" in document.get("error", ""):
        pytest.skip(document["error"])
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("plan: repeat: 4 items") and document["left_out"] == []
    states = {(r["study"], r["status"]) for r in document["results"]}
    assert {("repeat", "ok"), ("parity", "ok"), ("sanitizer", "not run")} <= states
    assert states <= {("repeat", "ok"), ("parity", "ok"), ("parity", "not launched"), ("sanitizer", "not run")}
    configurations = document["environment"]["configurations"]
    asked = {r["case"] for r in document["results"] if r["study"] == "parity"}
    assert {f"{kernel} {label}" for kernel, labels in configurations.items() for label in labels} <= asked
    assert bool(configurations) == (backend == "triton")
    assert "## Checks" in done.stdout and document["took_s"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_times(tmp_path, backend):
    done, document = run_bench(tmp_path / "gpu.json", "times", "--backend", backend, "--jobs", "1", "--minutes", "14")
    if "cannot run here" in document.get("error", ""):
        pytest.skip(document["error"])
    assert done.returncode == 0, done.stderr
    assert document["left_out"] == [] and {"date", "commit", "modified", "settings"} <= set(document)
    found = {(r["study"], r["case"], r["direction"]): r for r in document["results"] if r["study"] in ("times", "recurrence")}
    assert len(found) == 8
    for (study, shape, _), r in found.items():
        names = recurrences(plan.SHAPES[shape].memory) if study == "recurrence" else plan.SHAPES[shape].biases[:1]
        assert {*names, "mm", "copy"} <= set(r["ms"]) and r["base"] == names[0] and r["share_of_roofline"]["median"] > 0
        assert all(r["parity"][name]["ok"] for name in names) and all(x["median"] > 0 for x in r["ms"].values())
    assert all({backend, "eager"} <= set(r["ms"]) for r in document["results"] if r["study"] == "decoding")
    tuned = [r for r in document["results"] if r["study"] == "tuning"]
    assert len(tuned) == (backend == "triton")
    assert all(r["chosen"] and r["chosen_over_fastest"] >= 1 for r in tuned)
    shown = subprocess.run([sys.executable, "-m", "bench.gpu", "--show", tmp_path / "gpu.json"], capture_output=True, text=True, cwd=ROOT)
    assert shown.stdout == done.stdout and "fla delta rule: did not run" in shown.stdout


@pytest.mark.slow
def test_launches():
    """Host times without a device; every case launches something both ways."""
    pytest.importorskip("triton")
    command, environment = [sys.executable, "-m", "bench.gpu", "launches"], {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=900, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines()[2:]]
    assert len(rows) == 6 and all(float(cell) > 0 for row in rows for cell in row[1:])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    command = [sys.executable, "-m", "bench.gpu", "times", "--backend", "reference", "--json", str(tmp_path / "a.json")]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 1 and "reference on cuda cannot run here: there is no GPU here" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected one of correctness, times"),
        (["times", "--jobs", "0"], "--jobs and --minutes must be positive, got 0 and 6"),
        (["speed"], "invalid choice: 'speed'"),
    ],
)
def test_bad_arguments(capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        gpu.main(arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------ correctness


@pytest.fixture
def wrong_gradients(monkeypatch):
    """The gradients of k of the backend are ten per cent too large."""
    right = parity.evaluate
    wrong = lambda inputs, run="auto": (lambda found: found | ({"grad_k": 1.1 * found["grad_k"]} if run == "reference" else {}))(
        right(inputs, run)
    )
    monkeypatch.setattr(parity, "evaluate", wrong)


@pytest.mark.parametrize("broken", [0, 1])
def test_a_race_is_found(monkeypatch, broken):
    """A call whose results differ in the last bit of one number."""
    right, calls = correctness._everything, []

    def racy(*arguments):
        found = right(*arguments)
        calls.append(1)
        if broken and len(calls) == 2:
            found[0].view(torch.int16).view(-1)[7] ^= 1
        return found

    monkeypatch.setattr(correctness, "_everything", racy)
    (result,) = correctness.repeat(SMOKE, "linear", "plain")
    assert (result["status"], result["differing"], result["calls"]) == (("wrong", 1, 3) if broken else ("ok", 0, 3))


def test_bits():
    same = lambda x, y: torch.equal(correctness._bits(torch.tensor(x)), correctness._bits(torch.tensor(y)))
    assert same(math.nan, math.nan) and same(1.5, 1.5) and not same(0.0, -0.0) and not same(1.0, 1.0000001)


def test_repeated_calls_fill_a_gpu():
    """More programs than multiprocessors: sequences x heads alone are 256, an H200 has 132."""
    assert all(shape.batch * shape.heads == 256 for shape in plan.MANY.values()) and correctness.CALLS == 50


@pytest.mark.usefixtures("wrong_gradients")
def test_a_wrong_kernel_is_found(monkeypatch):
    wrong, steps = correctness.parity(SMOKE, 0)
    assert wrong["status"] == "wrong" and "grad_k error" in wrong["detail"] and steps["status"] == "ok"
    monkeypatch.setattr(parity, "evaluate", lambda *_: 1 / 0)
    assert next(correctness.parity(SMOKE, 0))["detail"].endswith("ZeroDivisionError: division by zero")
    assert report.is_red({"results": [{**wrong, "study": "parity"}]})


def test_every_case_can_be_drawn():
    """Where psi jumps, a draw in 16 bits has to keep its distance."""
    cases = correctness.parity_cases(dataclasses.replace(SMOKE, smoke=False))
    assert len({case.name for case, _ in cases}) == len(cases) and {case.memory for case, _ in cases} == {"linear", "mlp"}
    for case, dtype in cases:
        drawn = case.draw(dtype, margin=4 * torch.finfo(dtype).eps * case.delta_scale)
        assert drawn.call().bias == case.bias and drawn.tensors["q"].dtype == dtype


@pytest.mark.parametrize(
    ("log", "error", "status"),
    [
        ("========= ERROR SUMMARY: 0 errors\n", None, "ok"),
        ("========= Invalid __global__ read of size 4\n========= ERROR SUMMARY: 3 errors\n", "the process ended", "wrong"),
        ("========= ERROR SUMMARY: 0 errors\n", "no answer within 150 s", "lost"),
        ("========= Error: Device not supported\n", None, "not run"),
        ("", "no answer within 150 s", "not run"),
    ],
)
def test_sanitizer_output(log, error, status):
    found = runner.read_sanitizer(log, error)
    assert found["status"] == status and found["detail"]


# ----------------------------------------------------------------------------------------------------------------- times


@pytest.mark.usefixtures("wrong_gradients")
@pytest.mark.parametrize("direction", [FORWARD, BOTH])
def test_no_time_for_a_wrong_kernel(direction):
    result = timed(direction)
    assert not result["parity"]["l2"]["ok"] and result["base"] is None and set(result["ms"]) == {"eager", "mm", "copy"}
    assert any(text.startswith("l2: parity is red, not timed (grad_k: error") for text in result["notes"])
    assert report.is_red({"results": [result]}) and "l2" not in report._times(result)


def test_no_time_where_a_result_is_not_finite(monkeypatch):
    monkeypatch.setattr(times, "kernel_of", lambda inputs, *_: lambda: (torch.full_like(inputs.grad_out, math.inf),))
    result = timed()
    assert set(result["ms"]) == {"eager", "mm", "copy"} and report.is_red({"results": [result]})
    assert "l2: parity is red, not timed (not all results are finite)" in result["notes"]


def test_baselines_that_fail_or_compute_something_else_are_left_out(monkeypatch):
    monkeypatch.setitem(times.baselines.MAKE, "eager", lambda inputs, direction: lambda: (torch.zeros_like(inputs.grad_out),))
    monkeypatch.setitem(times.baselines.MAKE, "compile", lambda inputs, direction: lambda: 1 / 0)
    result = timed(names=["l2", "eager", "compile", "huber_coordinate"], exclude=["huber_coordinate"])
    assert set(result["ms"]) == {"l2", "mm", "copy"}
    assert any(text.startswith("eager: computes something else than l2") for text in result["notes"])
    assert "compile: did not run: ZeroDivisionError: division by zero" in result["notes"]
    assert "huber_coordinate: left out, the process was lost with it" in result["notes"]


def test_a_slow_baseline_is_timed_once(monkeypatch):
    monkeypatch.setitem(times.baselines.MAKE, "eager", lambda inputs, direction: lambda: (time.sleep(0.3), inputs.grad_out)[1:])
    monkeypatch.setattr(times, "SAME", math.inf)
    result = timed(settings=dataclasses.replace(SMOKE, call_seconds=0.2))
    assert 300 <= result["ms"]["eager"]["median"] < 2000 and "eager" not in result["ratios"]
    assert "eager: too slow for the rounds, timed once" in result["notes"] and "| eager" in report._times(result)
    slow = timed(settings=dataclasses.replace(SMOKE, first_seconds=0.2))
    assert "eager: did not run: its first call took longer than 0 s" in slow["notes"]


def test_refusals_are_reported(monkeypatch):
    refuses = lambda call, differentiate: "it has no momentum, so far" if call.momentum is not None else None
    monkeypatch.setattr(dispatch.BACKENDS["reference"], "refuses", refuses, raising=False)
    for shape in plan.RECURRENCE_SHAPES:
        names = recurrences(plan.SHAPES[shape].memory)
        result = timed(BOTH, names, shape) | {"study": "recurrence"}
        assert result["base"] == "plain" and set(result["ms"]) == {*names, "mm", "copy"} - {"momentum"}
        assert result["refused"] == {"momentum": "it has no momentum, so far"} and "| **momentum** " in report._times(result)
        verdicts = {t["name"]: t["measured"]["device"]["verdict"] for t in results.judge(report.targets(), [result], {"device": {}})
                    if t["case"] == shape}  # fmt: skip
        assert [v for name, v in verdicts.items() if "momentum" in name] == ["refused: see notes"]


def test_no_time_for_wrong_steps(monkeypatch):
    backend = dispatch.BACKENDS["reference"]
    right = backend.stepper

    def wrong(call):
        run = right(call)
        return lambda buffers, q, k, v, lr, *others: run(buffers, q, k, v, 1.1 * lr, *others)

    name = next(iter(plan.DECODING))
    (result,) = (r for r in decode.decode(SMOKE, name) if "doing" not in r)
    assert set(result["ms"]) == {"reference", "eager"}
    monkeypatch.setattr(backend, "stepper", wrong, raising=False)
    (result,) = (r for r in decode.decode(SMOKE, name) if "doing" not in r)
    assert set(result["ms"]) == {"eager"} and result["notes"][0].startswith("reference: parity is red, not timed (")
    assert report.is_red({"results": [result]})


def test_targets_are_judged():
    ms = {name: {"median": t} for name, t in {"l2": 10.0, "huber_coordinate": 11.0, "fla delta rule": 11.0}.items()}
    gate = {"ok": True, "output_error": 0.004, "output_error_eager": 0.002, "gradient_error": 0.009, "gradient_error_eager": 0.009}
    row = {"study": "times", "case": plan.TARGET, "direction": BOTH, "ms": ms, "ratios": {"dot": {"median": 1.4}}, "parity": {"l2": gate}}
    judged = {t["name"]: t["measured"]["device"] for t in results.judge(report.targets(), [row], {"device": {}})}
    verdict = lambda name: tuple(judged[name].values())
    assert verdict("huber_coordinate: time of fla delta rule / ours") == (1.0, "met")
    assert verdict("lp 3: time of fla delta rule / ours") == (None, "not measured")
    assert verdict("forward+backward, dot / l2") == (1.4, "NOT met")
    assert verdict("relative RMS output error, l2 / PyTorch's") == (2.0, "NOT met")
    assert verdict("relative RMS gradient error, l2") == (0.009, "NOT met")


def test_least_work():
    """A token of a head in bytes, by hand."""
    shape, mlp = plan.Shape(1, 64, 1, 64), plan.Shape(1, 64, 1, 64, 64, 256)
    assert plan.least_work(shape, FORWARD, "l2") == {"flops": 6 * 64**3 + 64 * 65 * 128, "bytes": 64 * (8 * 64 + 8)}
    assert plan.least_work(shape, BOTH, "huber_switch")["bytes"] == 64 * (8 * 64 + 12 + 14 * 64 + 24)
    assert plan.least_work(mlp, BOTH, "huber_coordinate")["bytes"] == 64 * (22 * 64 + 36) + 3 * 131072


# ---------------------------------------------------------------------------------------------------------------- device


class FakeEvent:
    """Every event is a millisecond after the one before."""

    clock = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        FakeEvent.clock += 1.0
        self.at = FakeEvent.clock

    def synchronize(self):
        pass

    def elapsed_time(self, other):
        return other.at - self.at


class OnTheCpu(TorchFunctionMode):
    """Replaces the device "cuda" by the CPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = {name: "cpu" if name == "device" and x == "cuda" else x for name, x in (kwargs or {}).items()}
        return function(*args, **kwargs)


def test_times_on_a_device(monkeypatch):
    """The code that needs a GPU runs on CPU tensors, with fake clocks and counters."""
    fakes = {"Event": FakeEvent, "memory_allocated": lambda: 2**20, "max_memory_allocated": lambda: 4 * 2**20,
             "reset_peak_memory_stats": lambda: None,
             "get_device_properties": lambda _: type("Properties", (), {"total_memory": 2**30})}  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(device, "FLUSH", 8)
    device._buffer.cache_clear()
    monkeypatch.setattr(times, "kernel_us", lambda _: {"linear_output": 9.0})
    settings = dataclasses.replace(SMOKE, device="cuda")
    monkeypatch.setattr(times, "gate", lambda *_: {"ok": True, "output_error": 0.0, "gradient_error": 0.0})
    monkeypatch.setattr(inputs.Inputs, "to", lambda self, dtype, device="cpu", to=inputs.Inputs.to: to(self, dtype, "cpu"))
    with OnTheCpu():
        result = timed(BOTH, ("l2", "huber_switch", "eager"), settings=settings)
    device._buffer.cache_clear()
    assert all(ms["median"] == 1.0 for ms in result["ms"].values()) and result["ratios"]["eager"]["median"] == 1.0
    assert set(result["peak_mib"]) == {"l2", "huber_switch", "eager"} and result["peak_mib"]["l2"] == 3.0
    assert result["peak_share"]["l2"] == 3 / 1024
    assert "| **l2** " in report._times(result) and result["kernel_us"] == {"linear_output": 9.0}
