"""bench.cpu itself: what it writes, its arithmetic, and that a wrong kernel gets no time."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench.common import implementations, results, timing
from bench.cpu import __main__ as cpu
from bench.cpu import cases, delta_rule, hybrid, plots, program, report, stages, studies, targets, watch, wrappers
from miras_kernels import dispatch

ROOT = Path(__file__).resolve().parents[2]
YARDSTICKS = {"mm", "copy", "peak"} - ({"peak"} if dispatch.unavailable("cpp") else set())
SETTINGS = cases.Settings(backend="reference", seconds=0.02, min_rounds=2, compile_seconds=0, toy=True)


def run_bench(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "bench.cpu", *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=300, cwd=ROOT)


@pytest.mark.slow
def test_document(tmp_path):
    path = tmp_path / "out" / "bench.json"
    backend = "reference" if dispatch.unavailable("cpp") else "cpp"
    done = run_bench("--toy", "--backend", backend, "--only", "shapes", "--shapes", "D64 C64", "--threads", "1", "--seconds", "0.02",
                     "--compile-seconds", "0", "--json", str(path))  # fmt: skip
    assert done.returncode == 0, done.stderr
    document = json.loads(path.read_text())
    assert {"date", "commit", "modified", "machine", "versions", "capability", "settings", "threads", "results", "targets"} <= set(document)
    assert document["versions"]["torch"] == torch.__version__
    forward, both = document["results"]
    for result, direction in ((forward, implementations.FORWARD), (both, implementations.BOTH)):
        assert (result["study"], result["case"], result["direction"]) == ("shapes", "D64 C64", direction)
        assert (result["threads"], result["clock"]) == (1, "cpu")
        assert result["parity"]["kernel"]["ok"]
        assert set(result["ms"]) == {"kernel", "eager", "derived", *YARDSTICKS}
        assert set(result["ratios"]) == {"eager", "derived"}
        assert all(x["p10"] <= x["median"] <= x["p90"] and x["p10"] > 0 for x in [*result["ms"].values(), *result["ratios"].values()])
        assert result["gflops"] > 0 and result["share_of_mm"]["median"] > 0
        assert result["gbytes"] > 0 and result["share_of_roofline"]["median"] >= result["share_of_mm"]["median"]
        assert "torch.compile left out, as asked" in result["notes"]
    assert "## Against PyTorch" in done.stdout


@pytest.mark.parametrize("who", studies.MEMORY_OF)
def test_memory(who):
    (result,) = studies.study_peak(f"D64 C64|{who}", 1, dataclasses.replace(SETTINGS, toy=False))
    if "peak_mib" not in result:
        pytest.skip(result["notes"][0])
    assert result["peak_mib"] > 2  # at least the gradients of q, k and v, 2 MiB each
    if who == "derived":
        assert result["saved_mib"] is None  # there is no autograd to hold anything
    else:
        assert result["saved_mib"] > 1


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("study", ["shapes", "bias", "decay"])
def test_no_time_for_a_wrong_kernel(monkeypatch, study):
    backend = dispatch.BACKENDS["reference"]
    right = backend.backward

    def wrong(*arguments):
        grads = right(*arguments)
        return {**grads, "k": grads["k"] * (1 + 1e-4)}

    settings = dataclasses.replace(SETTINGS, quick=True)
    assert all("ms" in result for result in studies.STUDIES[study]("D64 C64", 1, settings))
    monkeypatch.setattr(backend, "backward", wrong, raising=False)
    results = list(studies.STUDIES[study]("D64 C64", 1, settings))
    assert results
    for result in results:
        assert not any(gate["ok"] for gate in result["parity"].values())
        assert not {"ms", "ratios", "gflops", "share_of_mm"} & set(result)
        assert any("parity is red" in note for note in result["notes"])


@pytest.mark.usefixtures("one_thread")
def test_baselines_of_the_mlp_memory(monkeypatch):
    settings = dataclasses.replace(SETTINGS, backend="reference" if dispatch.unavailable("cpp") else "cpp")
    monkeypatch.setitem(sys.modules, "titans_pytorch", None)
    for result in studies.study_shapes("MLP D64 C16", 1, settings):
        assert result["parity"]["kernel"]["ok"]
        assert set(result["ms"]) == {"kernel", "eager", *YARDSTICKS}
        assert any(note.startswith("titans-pytorch cannot be imported") for note in result["notes"])
    linear, mlp = (section([result]) for _, _, section in report.SECTIONS[:2])
    assert "MLP D64 C16" in mlp and not linear


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("size", delta_rule.SIZES)
def test_the_delta_rule_against_others(monkeypatch, size):
    """What is not installed is left out; what computes something else gets no time."""
    settings = dataclasses.replace(SETTINGS, backend="reference" if dispatch.unavailable("cpp") else "cpp")
    monkeypatch.setitem(sys.modules, "ggml", None)
    wrong = lambda inputs, direction: lambda: tuple(2 * x for x in delta_rule.kernel(inputs, "reference", direction)())
    monkeypatch.setattr(delta_rule, "transformers", wrong)
    for result in delta_rule.study_delta_rule(size, 1, settings):
        ours = {"public function", "public function, in place", "decoder"} if size.startswith("one token") else {"chunk 1", "chunk 64"}
        assert set(result["ms"]) == ours and all(result["parity"][name]["ok"] for name in ours)
        assert result["direction"] != implementations.FORWARD or any(note.startswith("ggml: left out") for note in result["notes"])
        assert size.startswith("one token") or not result["parity"]["transformers"]["ok"]
    (section,) = (section([result]) for study, _, section in report.SECTIONS if study == "delta rule")
    assert all(name in section for name in ours)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", hybrid.RUNS)
def test_a_hybrid_model(monkeypatch, name):
    """A model that computes something else gets no time."""
    pytest.importorskip("transformers.models.qwen3_5", reason="this version of transformers has no Qwen3.5")
    (result,) = hybrid.study_hybrid(name, 1, SETTINGS)
    assert set(result["ms"]) == {"accelerate", "transformers", "projections"} and result["parity"]["accelerate"]["ok"]
    errors = iter((1.0, 2.1) if "bfloat16" in name else (1.0,))  # of transformers in bfloat16, then ours
    monkeypatch.setattr(hybrid, "agreement", lambda *_: next(errors))
    (result,) = hybrid.study_hybrid(name, 1, SETTINGS)
    assert "ms" not in result


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", [n for n in wrappers.RUNS if "yaad_linear" in n and " 128 " in n])
def test_a_model_and_its_memory_blocks(monkeypatch, name):
    (result,) = wrappers.study_wrappers(name, 1, SETTINGS)
    assert set(result["ms"]) == {"blocks", "model"} and all(gate["ok"] for gate in result["parity"].values())
    monkeypatch.setattr(wrappers.Nothing, "forward", lambda self, x: x)
    (result,) = wrappers.study_wrappers(name, 1, SETTINGS)
    assert "ms" not in result


def refuse_momentum(monkeypatch, backend: str = "reference") -> None:
    """The backend refuses momentum."""
    refuses = lambda call, differentiate: None if call.momentum is None else "it has no momentum, so far"
    monkeypatch.setattr(dispatch.BACKENDS[backend], "refuses", refuses, raising=False)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("shape", cases.ONE_OF_EACH)
def test_gates_and_momentum_against_the_plain_recurrence(monkeypatch, shape):
    """All of them in one run; refusals of the backend are reported as such."""
    refuse_momentum(monkeypatch)
    (result,) = studies.study_recurrence(shape, 1, SETTINGS)
    names = implementations.recurrences("mlp" if shape in cases.MLP_SHAPES else "linear")
    assert result["direction"] == implementations.BOTH and result["refused"] == {"momentum": "it has no momentum, so far"}
    assert set(result["ms"]) == set(result["parity"]) == set(names) - {"momentum"}
    assert set(result["ratios"]) == set(result["ms"]) - {"plain"}
    assert "momentum: refused: it has no momentum, so far" in result["notes"]
    (section,) = (section([result]) for study, _, section in report.SECTIONS if study == "recurrence")
    assert all(name in section for name in names) and section.count("refused") == 1
    rows = {(row["name"], row["case"]): row["measured"]["1"] for row in targets.judged(targets.targets(), [result], [1], capability="avx2")}
    assert rows["forward+backward, momentum / plain", shape] == {"value": None, "verdict": "refused: see notes"}
    assert rows["forward+backward, kl / plain", shape]["value"] == result["ratios"]["kl"]["median"]


@pytest.mark.usefixtures("one_thread")
def test_no_time_for_a_wrong_gate(monkeypatch):
    right = studies.parity
    wrong = lambda case, backend, dtype: {**right(case, backend, dtype), "ok": case.retention.name != "kl"}
    monkeypatch.setattr(studies, "parity", wrong)
    (result,) = studies.study_recurrence("D64 C64", 1, SETTINGS)
    assert set(result["parity"]) - set(result["ms"]) == {"kl"}
    assert any(note.startswith("kl: parity is red") for note in result["notes"])


@pytest.mark.usefixtures("one_thread")
def test_nothing_is_timed_where_the_plain_recurrence_is_refused(monkeypatch):
    monkeypatch.setattr(dispatch.BACKENDS["reference"], "refuses", lambda call, differentiate: "not today", raising=False)
    (result,) = studies.study_recurrence("D64 C64", 1, SETTINGS)
    assert "ms" not in result and result["parity"] == {} and "plain: refused: not today" in result["notes"]


def test_every_recurrence_is_another_case():
    for shape, others in zip(cases.ONE_OF_EACH, (4, 2), strict=True):  # plain, momentum; and two channel-wise gates
        made = [cases.make_case(shape, SETTINGS, **implementations.recurrence(name))
                for name in implementations.recurrences(cases.make_case(shape, SETTINGS).memory)]  # fmt: skip
        assert len({dataclasses.replace(case, name="") for case in made}) == len(made) == len(implementations.retentions()) + others


def test_which_shapes_a_study_has():
    shapes, wanted = tuple(cases.SHAPES), ("recurrence", "bias", "checkpoint")
    found = cpu.jobs(wanted, shapes, [1, 2], SETTINGS)
    assert [shape for study, shape, _ in found if study == "recurrence"] == list(cases.ONE_OF_EACH)
    assert [shape for study, shape, _ in found if study == "bias"] == ["D64 C64"]
    assert cpu.jobs(("recurrence",), ("D128 C64",), [1], SETTINGS) == [("recurrence", "D128 C64", 1)]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_titans_has_our_sizes(dtype):
    """Where it is installed: an output like ours, and gradients of all its parameters, in the dtype of the inputs."""
    pytest.importorskip("titans_pytorch")
    inputs = cases.make_case("MLP D64 C64", SETTINGS).draw(dtype)
    (out,) = implementations.titans(inputs, implementations.FORWARD)()
    assert (out.shape, out.dtype) == (inputs.grad_out.shape, dtype)
    assert all(x.isfinite().all() for x in implementations.titans(inputs, implementations.BOTH)())


@pytest.mark.usefixtures("one_thread")
def test_no_time_for_a_baseline_that_computes_something_else(monkeypatch):
    monkeypatch.setattr(studies.impl, "eager", lambda inputs, direction: lambda: (torch.zeros_like(inputs.grad_out),))
    forward = next(studies.study_shapes("D64 C64", 1, SETTINGS))
    assert "eager" not in forward["ms"] and "kernel" in forward["ms"]
    assert any(note.startswith("eager: computes something else") for note in forward["notes"])


def test_flops():
    case = cases.make_case("D64 C64", cases.Settings())
    c, d, chunks = 64, 64, 2 * 4 * 1024 // 64
    forward, both = chunks * (6 * c * d * d + 2 * c * (c + 1) * d), chunks * (20 * c * d * d + 7 * c * (c + 1) * d)
    assert implementations.flops(case) == {implementations.FORWARD: forward, implementations.BOTH: both}
    tail = dataclasses.replace(case, batch=1, heads=1, tokens=3, key_dim=5, value_dim=7, chunk_size=2)
    assert implementations.flops(tail)[implementations.FORWARD] == 6 * 3 * 35 + (2 * 3 + 1 * 2) * 12
    mlp = cases.make_case("MLP D64 C16", cases.Settings())
    forward = 2 * 4 * 64 * (14 * 16 * 64 * 256 + 2 * 16 * 17 * (64 + 256))
    assert implementations.flops(mlp) == {implementations.FORWARD: forward, implementations.BOTH: 3 * forward}


def test_work_and_shares():
    inputs = cases.make_case("D64 C64", SETTINGS, lengths=(30, 18)).draw(torch.float32)
    work, h, dk, dv = cases.least_work(inputs), 2, 16, 12
    lone = lambda n: dataclasses.replace(inputs.case, batch=1, tokens=n, lengths=None)
    assert work[implementations.FORWARD]["flops"] == sum(implementations.flops(lone(n))[implementations.FORWARD] for n in (30, 18))
    read, out = 48 * h * (2 * dk + dv + 2) * 4, 48 * h * dv * 4  # q, k, v, step sizes, decays
    assert [work[d]["bytes"] for d in implementations.DIRECTIONS] == [read + out, 3 * read + 2 * out]
    times = {"kernel": [1.0] * 3, "mm": [0.5] * 3, "copy": [0.25] * 3}
    mm, copy = watch.YARDSTICKS["mm"], watch.YARDSTICKS["copy"]
    bound = {"arithmetic": {"flops": mm, "bytes": 0}, "memory": {"flops": 0, "bytes": 2 * copy}}
    shares = {name: timing.shares(times, "kernel", work, watch.YARDSTICKS)["share_of_roofline"]["median"] for name, work in bound.items()}
    assert shares == {"arithmetic": 0.5, "memory": 0.5}
    times |= {"kernel": [1.0, 0.8, 1.0], "peak": [0.5, 0.5, 0.4]}
    peak = timing.shares(times, "kernel", {"flops": watch.YARDSTICKS["peak"], "bytes": 0}, watch.YARDSTICKS)["share_of_peak"]
    assert peak["median"] == 0.5 and peak["best"] == pytest.approx(0.4 / 0.8)


@pytest.mark.skipif(dispatch.unavailable("cpp") is not None, reason="no C++ kernels")
def test_the_peak_is_a_time_in_proportion_to_its_operations():
    run, best = dispatch.BACKENDS["cpp"].extension.multiply_adds, {}
    for operations in [1 << 22, 1 << 24] * 20:
        best[operations] = min(best.get(operations, 1.0), timing.timed(lambda n=operations: run(n), time.perf_counter)(1))
    assert 2 < best[1 << 24] / best[1 << 22] < 8


@pytest.mark.usefixtures("one_thread")
def test_a_case_of_the_tests_by_its_name():
    for result in studies.study_shapes("linear-l2-packed-shared", 1, SETTINGS):
        assert result["parity"]["kernel"]["ok"] and set(result["ms"]) == {"kernel", "eager", *YARDSTICKS}
    assert program.parse(cpu.PROGRAM, ["--shapes", "linear-l2-packed-shared,D64 C64"]).shapes == ("linear-l2-packed-shared", "D64 C64")


def test_targets_are_judged():
    by_case = {"study": "shapes", "direction": implementations.FORWARD, "threads": 1, "parity": {}}
    speed = [{**by_case, "case": "D64 C64", "ratios": {"eager": {"median": 5.0}}}, {**by_case, "case": "D64 C16", "ratios": {}}]
    slow = {**by_case, "study": "bias", "case": "D64 C64", "ratios": {"lp 2.5": {"median": 1.5}}}
    doubtful = {**speed[0], "threads": 2, "watch": {"flags": ["not 2 real cores"]}}
    rows = {
        (row["name"], row["case"]): row["measured"]
        for row in targets.judged(targets.targets(), [*speed, slow, doubtful], [1, 2], capability="avx2")
    }
    assert rows["forward against eager", "D64 C64"]["1"] == {"value": 5.0, "verdict": "met"}
    assert rows["forward against eager", "D64 C64"]["2"]["verdict"] == "not judged: see notes"
    assert rows["forward against eager", "D64 C16"]["1"] == {"value": None, "verdict": "not measured"}
    assert rows["forward, generic p / L2", "D64 C64"]["1"]["verdict"] == "NOT met"
    assert {name for name, _ in rows if "plain" in name} == set()  # of studies that ran alone
    without = {(row["name"], row["case"]): row["measured"] for row in targets.judged(targets.targets(), speed, [1], capability="portable")}
    assert without["forward against eager", "D64 C64"]["1"]["verdict"] == "not judged: neither AVX2 nor AVX-512"


def test_interleaving_and_ratios():
    order = []

    def sampler(name, seconds):
        def sample(count):
            order.append((name, count))
            return seconds

        return sample

    times = timing.interleave({"a": sampler("a", 0.001), "b": sampler("b", 0.02)}, 0.0, 4)
    assert times == {"a": [0.001] * 4, "b": [0.02] * 4}
    assert order[4:] == [("a", 10), ("b", 1), ("b", 1), ("a", 10)] * 2  # after two calibrating calls each
    assert timing.ratio(times["b"], times["a"])["median"] == pytest.approx(20)


@pytest.mark.usefixtures("one_thread")
def test_stages(monkeypatch):
    """The least ticks of the rounds, sums of the passes, and shares of the peak of the same rounds."""
    others = [("forward", "update", 2, 50, 0, 64), ("peak", "multiply-adds", 1, 20, 640, 0)]
    rounds = iter([[], *([("forward", "predict", 2, ticks, 800, 64), *others] for ticks in (90.0, 50.0, 70.0))])
    extension = SimpleNamespace(take_stages=lambda: next(rounds), multiply_adds=lambda operations: None)
    monkeypatch.setattr(stages.dispatch.BACKENDS["cpp"], "extension", extension)
    monkeypatch.setattr(stages, "parity", lambda *_: {"ok": True, "worst": {"tensor": "out", "error": 0.0, "budget": 1.0}})
    monkeypatch.setattr(stages, "kernel", lambda *_: lambda: None)
    (result,) = stages.study_stages("D64 C64", 1, dataclasses.replace(SETTINGS, seconds=0.0, min_rounds=3))
    assert result["peak_per_tick"] == 32 and [x["ticks"] for x in result["stages"]] == [50, 50]
    text = stages.section([result])
    assert "| predict   | 50.0%       | 25    | 400  | 32    | 1.3        | 16.0      | 0.50" in text
    assert "| all of it | 100.0%      | 50    | 400  | 64    | 1.3        | 8.0       | 0.25" in text


def test_time_limit():
    with pytest.raises(timing.OverBudget), timing.time_limit(0.05):
        while True:
            pass


def test_watch_flags():
    seen = watch.Watch(2)
    seen.others, seen.speedup = 0.5, (1.95, 1.02)
    load, cores = seen.flags()
    assert load == "other processes used 0.50 cores"
    assert cores.startswith("2 threads were 1.95x (before) and 1.02x (after) one")
    seen.others, seen.speedup = 0.01, (1.95, 1.9)
    assert seen.flags() == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "speed"], "--only: unknown 'speed': expected some of shapes, bias"),
        (["--shapes", "D1"], "--shapes: unknown 'D1': expected some of D64 C64"),
        (["--threads", "two"], "--threads: expected integers >= 1 such as 1,2, got 'two'"),
        (["--threads", "1,0"], "--threads: expected integers >= 1 such as 1,2, got '1,0'"),
        (["--base", "HEAD", "--only", "shapes"], "--base: it is a study of its own in bench.cpu, without --only"),
        (["--stages", "--base", "HEAD"], "--stages: it is a study of its own in bench.cpu, of the C++ kernels, without --only and --base"),
        (["--base", "HEAD", "--launches", "0"], "--launches: expected at least 1, got 0"),
    ],
)
def test_bad_arguments(capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        program.main(cpu.PROGRAM, arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_cpu_seconds_of_a_helper_process():
    burn = [sys.executable, "-c", "import time; print(1, flush=True); [0 for _ in iter(lambda: time.process_time() < 0.5, False)]; input()"]
    with subprocess.Popen(burn, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        while (worked := watch.cpu_seconds(process.pid)) < 0.4:
            time.sleep(0.02)
        process.communicate("\n")
    assert worked < 1
    assert watch.cpu_seconds(process.pid) == 0  # it has ended


def test_results_are_json_without_infinities(tmp_path):
    path = tmp_path / "deep" / "out.json"
    results.write_json({"a": (float("inf"), 1.5), 2: {"b": float("nan")}}, path)
    assert json.loads(path.read_text()) == {"a": [None, 1.5], "2": {"b": None}}
    assert list(path.parent.iterdir()) == [path]


def test_list(capsys):
    assert program.main(cpu.PROGRAM, ["--list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in (*studies.STUDIES, *cases.SHAPES))


def test_the_summary_names_what_missed_its_target():
    file = next((ROOT / "bench" / "results").glob("cpu-*.json"))
    document = json.loads(file.read_text())
    first = document["targets"][0]
    first["measured"] = {"1": {"value": 0.25, "verdict": "NOT met"}, "2": {"value": 9.0, "verdict": "not judged: see notes"}}
    document["targets"] = [first, {**first, "measured": {"1": {"value": 9.0, "verdict": "goal"}}}]
    missed = f"{first['name']}, {first['case']}, 1 thread (0.25, asked {first['least']:g})"
    assert f"1 of 2 figures with a target meet it. Not met: {missed}." in report.summary(document, report.SECTIONS)


def test_the_readme_shows_what_a_result_file_holds():
    text = (ROOT / "README.md").read_text()
    block = re.search(r"<!-- results: (\S+) -->\n(.*?)<!-- /results -->", text, re.DOTALL)
    document = json.loads((ROOT / block[1]).read_text())
    assert block[2].strip() == report.summary(document, report.SECTIONS).strip()
    assert not document["modified"]


def test_picture(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib")
    spans = {"median": 5.0, "p10": 4.0, "p90": 6.0}
    result = {"study": "shapes", "case": "D64 C64", "direction": "forward", "threads": 1, "ratios": {"eager": spans, "compile": spans}}
    run = {"machine": {"cpu": "a CPU"}, "capability": {"used": "avx2"}, "results": [result, {**result, "direction": "forward+backward"}]}
    path = plots.draw(run, tmp_path / "deep")
    assert path.name == "ratios.png" and path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000
    assert plots.draw({"results": [{"study": "bias", "case": "D64 C64"}]}, tmp_path / "none") is None
    monkeypatch.setattr(program.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):  # before anything is measured
        program.main(cpu.PROGRAM, ["--plots", "somewhere"])
    assert "--plots: needs matplotlib" in capsys.readouterr().err
