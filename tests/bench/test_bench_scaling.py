"""The study of scaling: its figures agree with what was measured, and a wrong kernel gets none."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

import miras_kernels
from bench.common import implementations
from bench.cpu import __main__ as cpu
from bench.cpu import cases, report, scaling, watch
from miras_kernels import dispatch

BACKEND = "reference" if dispatch.unavailable("cpp") else "cpp"
SETTINGS = cases.Settings(backend=BACKEND, seconds=0.0, min_rounds=2, compile_seconds=0, toy=True)


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """One thread, and memory measured in this process."""
    monkeypatch.setattr(scaling, "peak", lambda study, name, *rest: next(scaling.HELPERS[study](name, *rest)))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def scaled(shape: str, axis: str, threads: int = 1, settings=SETTINGS) -> dict:
    (result,) = scaling.study_scaling(f"{shape}, {axis}", threads, settings)
    return result


@pytest.mark.parametrize("shape", cases.ONE_OF_EACH)
def test_tokens(shape):
    result = scaled(shape, "tokens")
    assert (result["case"], result["threads"], result["notes"]) == (f"{shape}, tokens", 1, [])
    assert set(result["ms"]) == set(result["parity"]) == set(result["sizes"]) == set(scaling.TOY_TOKENS)
    assert all(gate["ok"] for gate in result["parity"].values())
    assert set(result["ratios"]) == set(result["sizes"]) - {"48"}
    assert result["saved_mib"] == result["promised_mib"] and result["saved_over_promised"] == 1.0
    assert all(result["peak_mib"][name] >= 0 for name in result["sizes"])
    section = report._scaling([result])
    rows = [line for line in section.splitlines() if line.startswith(f"| {shape}, tokens")]
    assert [row.split("|")[2].strip() for row in rows] == list(scaling.TOY_TOKENS)
    assert f"- {shape}, tokens: time grows as tokens^" in section and "promised MiB" in section


def test_heads_and_threads():
    heads = scaled("D64 C64", "heads")
    assert set(heads["ms"]) == {"1", "2", "4"} and all(gate["ok"] for gate in heads["parity"].values())
    assert scaled("MLP D64 C64", "one head", threads=2)["ratios"].keys() >= {"2"}
    assert scaled("D64 C64", "coupled head", threads=2)["ratios"].keys() >= {"2"}
    threads = scaled("D64 C64", "threads", threads=2)
    assert set(threads["ms"]) == {"1", "2", "mm 1", "mm 2"} and threads["clock"] == "wall"
    section = report._scaling([heads, threads])
    assert "torch.mm" in section and "MiB" not in section and section.count("| D64 C64, heads") == 3


def test_the_section_is_right():
    """Twice the time for four times the tokens is half of linear growth; half the time with four threads is twice the ideal."""
    spread = lambda x: {"median": x, "p10": x, "p90": x}
    common = {"study": "scaling", "threads": 1, "parity": {}}
    tokens = {**common, "case": "A, tokens", "axis": "tokens", "sizes": {"1k": 1024, "4k": 4096}, "ratios": {"4k": spread(2.0)},
              "ms": {"1k": spread(1.0), "4k": spread(2.0)}}  # fmt: skip
    times = {"1": 1.0, "4": 0.5, "mm 1": 8.0, "mm 4": 2.0}
    threads = {**common, "case": "A, threads", "axis": "threads", "sizes": {"1": 1, "4": 4}, "ratios": {"4": spread(0.5)},
               "ms": {name: spread(x) for name, x in times.items()}}  # fmt: skip
    by_tokens, by_threads = report._scaling([tokens]), report._scaling([threads])
    assert "0.50x [0.50, 0.50]" in by_tokens and "torch.mm" not in by_tokens
    assert "2.00x [2.00, 2.00]" in by_threads and "| 1.00x" in by_threads


@pytest.mark.parametrize("power", [0.0, 1.0, 1.5])
def test_exponent(power):
    sizes = {"a": 1000, "b": 3000, "c": 64000}
    assert scaling.exponent(sizes, {name: 7 * n**power for name, n in sizes.items()}) == pytest.approx(power)
    assert scaling.exponent(sizes, {"a": 1.0}) is None


@pytest.mark.skipif(BACKEND != "cpp", reason="what the kernels keep; the C++ kernels are not built here")
@pytest.mark.parametrize("shape", cases.ONE_OF_EACH)
@pytest.mark.parametrize("every", [1, 3])
def test_what_is_saved_is_what_is_promised(shape, every):
    inputs = scaling.draw(shape, SETTINGS, 150, 2)  # ten chunks, the last one short
    with miras_kernels.override(checkpoint_every=every):
        saved = watch.saved_bytes(implementations.kernel(inputs, "cpp", implementations.BOTH), inputs)
        assert saved == scaling.promised_bytes(inputs.case)
    states, chunk = math.ceil(10 / every), 16
    assert saved == 4 * 2 * (states * 2 * 16 * 32 + 150 * (2 * 16 + chunk) if shape.startswith("MLP") else 12 * (states + 1) * 16)


@pytest.mark.parametrize("longest", [0, 96])
def test_no_time_for_a_wrong_kernel(monkeypatch, longest):
    """Wrong for all sequences, or only for those longer than the one that is compared with float64."""
    settings = dataclasses.replace(SETTINGS, backend="reference")
    right = dispatch.BACKENDS["reference"].backward

    def wrong(call, *rest):
        grads = right(call, *rest)
        return {**grads, "k": grads["k"] * (1 + 1e-4)} if call.q.shape[1] > longest else grads

    monkeypatch.setattr(dispatch.BACKENDS["reference"], "backward", wrong, raising=False)
    result = scaled("D64 C64", "tokens", settings=settings)
    assert set(result.get("ms", ())) == {name for name, n in scaling.TOY_TOKENS.items() if n <= longest}
    assert any("parity is red" in note for note in result["notes"])
    if longest:
        assert not result["parity"]["192"]["ok"] and "192" not in result["peak_mib"]


def test_which_jobs_there_are():
    found = cpu.jobs(("scaling",), tuple(cases.SHAPES), [1, 2], SETTINGS)
    axes = (("tokens", 1), ("heads", 1), ("heads", 2), ("threads", 2), ("one head", 2), ("coupled head", 2))
    assert found[:6] == [("scaling", f"D64 C64, {axis}", n) for axis, n in axes]
    assert {job[1].rpartition(", ")[0] for job in found} == set(cases.ONE_OF_EACH)
    assert not [job for job in cpu.jobs(("scaling",), ("D64 C64",), [1], SETTINGS) if job[1].endswith(("threads", "head"))]
