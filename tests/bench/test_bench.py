"""bench/cpu.py itself: what it writes, its arithmetic, and that a wrong kernel gets no time."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from miras_kernels import dispatch
from miras_kernels.tables import retention

BENCH = Path(__file__).resolve().parents[2] / "bench"
sys.path.insert(0, str(BENCH))
contenders, cpu, harness, program, report, studies = map(
    importlib.import_module, ("contenders", "cpu", "harness", "program", "report", "studies")
)

SETTINGS = contenders.Settings(backend="reference", seconds=0.02, min_rounds=2, compile_seconds=0, toy=True)


def run_bench(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(BENCH / "cpu.py"), *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)


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
    for result, direction in ((forward, contenders.FORWARD), (both, contenders.BOTH)):
        assert (result["study"], result["case"], result["direction"]) == ("shapes", "D64 C64", direction)
        assert (result["threads"], result["clock"]) == (1, "cpu")
        assert result["parity"]["kernel"]["ok"]
        assert set(result["ms"]) == {"kernel", "eager", "derived", "mm", "copy"}
        assert set(result["ratios"]) == {"eager", "derived"}
        assert all(x["p10"] <= x["median"] <= x["p90"] and x["p10"] > 0 for x in [*result["ms"].values(), *result["ratios"].values()])
        assert result["gflops"] > 0 and result["share_of_mm"]["median"] > 0
        assert result["gbytes"] > 0 and result["share_of_roofline"]["median"] >= result["share_of_mm"]["median"]
        assert "torch.compile left out, as asked" in result["notes"]
    assert "## Against PyTorch" in done.stdout


@pytest.mark.parametrize("contender", studies.MEMORY_CONTENDERS)
def test_memory(contender):
    (result,) = studies.study_peak(f"D64 C64|{contender}", 1, dataclasses.replace(SETTINGS, toy=False))
    if "peak_mib" not in result:
        pytest.skip(result["notes"][0])
    assert result["peak_mib"] > 2  # at least the gradients of q, k and v, 2 MiB each
    if contender == "derived":
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
def test_the_mlp_memory_is_compared_too(monkeypatch):
    settings = dataclasses.replace(SETTINGS, backend="reference" if dispatch.unavailable("cpp") else "cpp")
    monkeypatch.setitem(sys.modules, "titans_pytorch", None)
    for result in studies.study_shapes("MLP D64 C16", 1, settings):
        assert result["parity"]["kernel"]["ok"]
        assert set(result["ms"]) == {"kernel", "eager", "mm", "copy"}
        assert any(note.startswith("titans-pytorch cannot be imported") for note in result["notes"])
    assert "MLP D64 C16" in report._mlp_section([result]) and not report._shapes_section([result])


def refuse_momentum(monkeypatch, backend: str = "reference") -> None:
    """The backend is told not to serve momentum."""
    refuses = lambda call, differentiate: None if call.momentum is None else "it has no momentum, so far"
    monkeypatch.setattr(dispatch.BACKENDS[backend], "refuses", refuses, raising=False)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("shape", contenders.RECURRENCE_SHAPES)
def test_gates_and_momentum_against_the_plain_recurrence(monkeypatch, shape):
    """All of them in one run; what the backend refuses is said and judged as that."""
    refuse_momentum(monkeypatch)
    (result,) = studies.study_recurrence(shape, 1, SETTINGS)
    names = contenders.recurrences("mlp" if shape in contenders.MLP_SHAPES else "linear")
    assert result["direction"] == contenders.BOTH and result["refused"] == {"momentum": "it has no momentum, so far"}
    assert set(result["ms"]) == set(result["parity"]) == set(names) - {"momentum"}
    assert set(result["ratios"]) == set(result["ms"]) - {"plain"}
    assert "momentum: refused: it has no momentum, so far" in result["notes"]
    section = dict(report._SECTIONS)["recurrence"]([result])
    assert all(name in section for name in names) and section.count("refused") == 1
    rows = {(row["name"], row["case"]): row["measured"]["1"] for row in report.judge([result], [1], avx512=True)}
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


def test_recurrences_are_those_of_the_table():
    assert tuple(row.name for row in retention.TABLE.values() if row.name != "l2") == contenders.RETENTIONS
    for shape in contenders.RECURRENCE_SHAPES:
        memory = contenders.make_case(shape, SETTINGS).memory
        cases = [contenders.make_case(shape, SETTINGS, **contenders.recurrence(name)) for name in contenders.recurrences(memory)]
        assert len({dataclasses.replace(case, name="") for case in cases}) == len(cases) == (8 if memory == "linear" else 6)


def test_which_shapes_a_study_has():
    shapes, wanted = tuple(contenders.SHAPES), ("recurrence", "bias", "checkpoint")
    found = cpu.jobs(wanted, shapes, [1, 2], SETTINGS)
    assert [shape for study, shape, _ in found if study == "recurrence"] == list(contenders.RECURRENCE_SHAPES)
    assert [shape for study, shape, _ in found if study == "bias"] == ["D64 C64"]
    assert cpu.jobs(("recurrence",), ("D128 C64",), [1], SETTINGS) == [("recurrence", "D128 C64", 1)]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_titans_has_our_sizes(dtype):
    """Where it is installed: an output like ours, gradients of all that it has, in the dtype of the inputs."""
    pytest.importorskip("titans_pytorch")
    inputs = contenders.make_case("MLP D64 C64", SETTINGS).draw(dtype)
    run, leaves = contenders.titans_layer(inputs)
    out = run()
    assert (out.shape, out.dtype) == (inputs.grad_out.shape, dtype)
    assert all(x is not None and x.isfinite().all() for x in torch.autograd.grad(out, leaves, inputs.grad_out))
    assert contenders.titans(inputs, contenders.FORWARD)()[0].shape == out.shape


@pytest.mark.usefixtures("one_thread")
def test_no_time_for_a_baseline_that_computes_something_else(monkeypatch):
    monkeypatch.setattr(studies, "eager", lambda inputs, direction: lambda: (torch.zeros_like(inputs.grad_out),))
    forward = next(studies.study_shapes("D64 C64", 1, SETTINGS))
    assert "eager" not in forward["ms"] and "kernel" in forward["ms"]
    assert any(note.startswith("eager: computes something else") for note in forward["notes"])


def test_flops():
    case = contenders.make_case("D64 C64", contenders.Settings())
    c, d, chunks = 64, 64, 2 * 4 * 1024 // 64
    forward, both = chunks * (6 * c * d * d + 2 * c * (c + 1) * d), chunks * (20 * c * d * d + 7 * c * (c + 1) * d)
    assert contenders.flops(case) == {contenders.FORWARD: forward, contenders.BOTH: both}
    tail = dataclasses.replace(case, batch=1, heads=1, tokens=3, key_dim=5, value_dim=7, chunk_size=2)
    assert contenders.flops(tail)[contenders.FORWARD] == 6 * 3 * 35 + (2 * 3 + 1 * 2) * 12
    mlp = contenders.make_case("MLP D64 C16", contenders.Settings())
    forward = 2 * 4 * 64 * (14 * 16 * 64 * 256 + 2 * 16 * 17 * (64 + 256))
    assert contenders.flops(mlp) == {contenders.FORWARD: forward, contenders.BOTH: 3 * forward}


def test_work_and_shares():
    inputs = contenders.make_case("D64 C64", SETTINGS, lengths=(30, 18)).draw(torch.float32)
    work, h, dk, dv = contenders.least_work(inputs), 2, 16, 12
    lone = lambda n: dataclasses.replace(inputs.case, batch=1, tokens=n, lengths=None)
    assert work[contenders.FORWARD]["flops"] == sum(contenders.flops(lone(n))[contenders.FORWARD] for n in (30, 18))
    read, out = 48 * h * (2 * dk + dv + 2) * 4, 48 * h * dv * 4  # q, k, v, step sizes, decays
    assert [work[d]["bytes"] for d in contenders.DIRECTIONS] == [read + out, 3 * read + 2 * out]
    times = {"kernel": [1.0] * 3, "mm": [0.5] * 3, "copy": [0.25] * 3}
    bound = {"arithmetic": {"flops": harness.MM_FLOPS, "bytes": 0}, "memory": {"flops": 0, "bytes": 4 * harness.COPY_BYTES}}
    shares = {name: studies._shares(work, times, "kernel")["share_of_roofline"]["median"] for name, work in bound.items()}
    assert shares == {"arithmetic": 0.5, "memory": 0.5}


@pytest.mark.usefixtures("one_thread")
def test_a_case_of_the_tests_by_its_name():
    for result in studies.study_shapes("linear-l2-packed-shared", 1, SETTINGS):
        assert result["parity"]["kernel"]["ok"] and set(result["ms"]) == {"kernel", "eager", "mm", "copy"}
    assert cpu.parse(["--shapes", "linear-l2-packed-shared,D64 C64"]).shapes == ("linear-l2-packed-shared", "D64 C64")


def test_targets_are_judged():
    by_case = {"study": "shapes", "direction": contenders.FORWARD, "threads": 1, "parity": {}}
    speed = [{**by_case, "case": "D64 C64", "ratios": {"eager": {"median": 5.0}}}, {**by_case, "case": "D64 C16", "ratios": {}}]
    slow = {**by_case, "study": "bias", "case": "D64 C64", "ratios": {"lp 2.5": {"median": 1.5}}}
    doubtful = {**speed[0], "threads": 2, "watch": {"flags": ["not 2 real cores"]}}
    rows = {(row["name"], row["case"]): row["measured"] for row in report.judge([*speed, slow, doubtful], [1, 2], avx512=True)}
    assert rows["forward against eager", "D64 C64"]["1"] == {"value": 5.0, "verdict": "met"}
    assert rows["forward against eager", "D64 C64"]["2"]["verdict"] == "not judged: see notes"
    assert rows["forward against eager", "D64 C16"]["1"] == {"value": None, "verdict": "not measured"}
    assert rows["forward, generic p / L2", "D64 C64"]["1"]["verdict"] == "NOT met"
    assert {name for name, _ in rows if "plain" in name} == set()  # of studies that ran alone
    without = {(row["name"], row["case"]): row["measured"] for row in report.judge(speed, [1], avx512=False)}
    assert without["forward against eager", "D64 C64"]["1"]["verdict"] == "not judged: no AVX-512 here"


def test_interleaving_and_ratios():
    order = []

    def sampler(name, seconds):
        def sample(count):
            order.append((name, count))
            return seconds

        return sample

    times = harness.interleave({"a": sampler("a", 0.001), "b": sampler("b", 0.02)}, 0.0, 4)
    assert times == {"a": [0.001] * 4, "b": [0.02] * 4}
    assert order[4:] == [("a", 10), ("b", 1), ("b", 1), ("a", 10)] * 2  # after two calibrating calls each
    assert harness.ratio(times["b"], times["a"])["median"] == pytest.approx(20)


def test_time_limit():
    with pytest.raises(harness.OverBudget), harness.time_limit(0.05):
        while True:
            pass


def test_watch_flags():
    watch = harness.Watch(2)
    watch.others, watch.speedup = 0.5, (1.95, 1.02)
    load, cores = watch.flags()
    assert load == "other processes used 0.50 cores"
    assert cores.startswith("2 threads were 1.95x (before) and 1.02x (after) one")
    watch.others, watch.speedup = 0.01, (1.95, 1.9)
    assert watch.flags() == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "speed"], "--only: unknown 'speed': expected some of shapes, bias"),
        (["--shapes", "D1"], "--shapes: unknown 'D1': expected some of D64 C64"),
        (["--threads", "two"], "--threads: expected integers such as 1,2, got 'two'"),
        (["--threads", "0"], "--threads: expected integers >= 1"),
    ],
)
def test_bad_arguments(capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        cpu.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_helpers_are_no_others():
    burn = [sys.executable, "-c", "import time; print(1, flush=True); [0 for _ in iter(lambda: time.process_time() < 0.5, False)]; input()"]
    with subprocess.Popen(burn, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        while (worked := harness._worked(process.pid)) < 0.4:
            time.sleep(0.02)
        process.communicate("\n")
    assert worked < 1
    assert harness._worked(process.pid) == 0  # it has ended


def test_results_are_json_without_infinities(tmp_path):
    path = tmp_path / "deep" / "out.json"
    program.write_json({"a": (float("inf"), 1.5), 2: {"b": float("nan")}}, path)
    assert json.loads(path.read_text()) == {"a": [None, 1.5], "2": {"b": None}}
    assert list(path.parent.iterdir()) == [path]


def test_list(capsys):
    assert cpu.main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in (*studies.STUDIES, *contenders.SHAPES))


def test_the_summary_names_what_missed_its_target():
    file = next((BENCH / "results").glob("cpu-*.json"))
    document = json.loads(file.read_text())
    first = document["targets"][0]
    first["measured"] = {"1": {"value": 0.25, "verdict": "NOT met"}, "2": {"value": 9.0, "verdict": "not judged: see notes"}}
    document["targets"] = [first, {**first, "measured": {"1": {"value": 9.0, "verdict": "goal"}}}]
    missed = f"{first['name']}, {first['case']}, 1 thread (0.25, asked {first['least']:g})"
    assert f"1 of 2 figures that have a target meet it. Not met: {missed}." in report.summary(document)


def test_the_readme_shows_what_a_result_file_holds():
    text = (BENCH.parent / "README.md").read_text()
    block = re.search(r"<!-- results: (\S+) -->\n(.*?)<!-- /results -->", text, re.DOTALL)
    document = json.loads((BENCH.parent / block[1]).read_text())
    assert block[2].strip() == report.summary(document).strip()
    assert not document["modified"]
