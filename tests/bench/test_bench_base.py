"""``python -m bench.cpu --base``: it builds, compares and cleans up, and neither invents nor overlooks a difference."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench.common import implementations, processes
from bench.cpu import base, cases, measuring, report
from miras_kernels import dispatch

ROOT = Path(__file__).resolve().parents[2]
BACKEND = "reference" if dispatch.unavailable("cpp") else "cpp"
SETTINGS = cases.Settings(backend=BACKEND, seconds=0.0, min_rounds=3, compile_seconds=0, toy=True)
GREEN = {"ok": True, "worst": {"tensor": "out", "error": 1e-7, "budget": 1e-6}}


@pytest.mark.parametrize(
    ("others", "same", "expected"),
    [
        ([1.2] * 5, [1.01, 0.99, 1.02, 1.0, 1.1], "faster"),
        ([0.8] * 5, [1.01, 0.99, 1.02, 1.0, 0.9], "slower"),
        ([1.2, 1.2, 1.2, 1.2, 0.99], [1.0] * 5, base.NO_DIFFERENCE),  # a launch disagrees
        ([1.2] * 5, [1.0, 1.0, 1.3, 1.0, 1.0], base.NO_DIFFERENCE),  # in a launch the twin was slower still
        ([0.8] * 5, [1.0, 1.0, 0.7, 1.0, 1.0], base.NO_DIFFERENCE),
        ([1.009] * 5, [1.0] * 5, base.NO_DIFFERENCE),  # below the resolution
        ([1.2] * 4, [1.0] * 4, base.NO_DIFFERENCE),  # too few launches
    ],
)
def test_verdict(others, same, expected):
    assert base.verdict(others, same) == expected


@pytest.mark.parametrize("tail", [0.0, 0.3])
def test_verdicts_on_noise(tail):
    """For three equal processes per launch, a difference is reported no more often than docs/benchmarks.md says."""
    chance, runs = random.Random(0), 20000
    noise = lambda: chance.lognormvariate(0, 0.05) * (3 if chance.random() < tail else 1)  # with a tail: some processes are slow

    def verdict(effect: float) -> str:
        launches = [(effect * noise(), noise(), noise()) for _ in range(base.LAUNCHES)]
        return base.verdict([b / t for b, t, _ in launches], [a / t for _, t, a in launches])

    expected = 2 / 3**base.LAUNCHES * runs
    wrong = sum(verdict(1.0) != base.NO_DIFFERENCE for _ in range(runs))
    assert wrong <= expected + 4 * expected**0.5
    assert all(verdict(100.0) == "faster" and verdict(0.01) == "slower" for _ in range(100))


class FakeServer:
    """Answers like a process whose calls take so many milliseconds."""

    def __init__(self, milliseconds: float, gate: dict = GREEN):
        self.seconds, self.gate, self.process = milliseconds / 1e3, gate, subprocess.Popen(["true"])
        self.process.wait()

    def get(self, what: str, count: int = 1):
        return self.gate if what == "parity" else self.seconds

    def sampler(self, direction: str):
        return lambda count: self.get(direction, count)


def compare(monkeypatch, **servers: FakeServer) -> list[dict]:
    monkeypatch.setattr(base, "launched", lambda *_: servers)
    return list(base.study_base("D64 C64", 1, SETTINGS, other="", launches=5))


def test_a_difference_is_reported(monkeypatch):
    results = compare(monkeypatch, base=FakeServer(3.0), this=FakeServer(2.0), again=FakeServer(2.02))
    assert [r["direction"] for r in results] == list(implementations.DIRECTIONS)
    for result in results:
        assert result["verdict"] == "faster" and result["launches"] == 5
        assert result["ratios"]["base"] == pytest.approx({"median": 1.5, "low": 1.5, "high": 1.5})
        assert result["same_code"] == pytest.approx(0.01)
        assert result["ms"] == pytest.approx({"base": 3.0, "this": 2.0, "again": 2.02})
    _, section = report._base_section({"ref": "HEAD~1", "commit": "0" * 40}, results)
    assert section.count("this tree is faster") == 2 and "1.500x [1.500, 1.500]" in section


@pytest.mark.parametrize("side", ["base", "this"])
def test_no_time_for_a_wrong_side(monkeypatch, side):
    servers = {name: FakeServer(1.0, {**GREEN, "ok": name != side}) for name in base.SIDES}
    for result in compare(monkeypatch, **servers):
        assert not {"ms", "ratios", "verdict"} & set(result)
        assert any(note.startswith(f"{side}: parity is red") for note in result["notes"])
        assert not all(gate["ok"] for gate in result["parity"].values())


def test_a_process_that_ends_is_an_error(monkeypatch):
    class Ended(FakeServer):
        def get(self, what, count=1):
            raise processes.Lost("the process ended with status 1", [])

    for result in compare(monkeypatch, base=Ended(1.0), this=FakeServer(1.0), again=FakeServer(1.0)):
        assert result["error"].startswith("launch 1 of 5: the process ended with status 1") and "ms" not in result
        assert "D64 C64" in report._base_section({"ref": "x", "commit": "0" * 40}, [result])[1]


def test_a_process_refuses_to_measure_another_tree(tmp_path):
    with pytest.raises(RuntimeError, match="was asked for, but it was imported from"):
        list(measuring.task(lambda *_: [])("D64 C64", 1, {}, root=str(tmp_path)))


def test_no_such_commit(capsys):
    with pytest.raises(base.Unusable, match="--base: expected a commit, got 'no-such-commit'"), base.prepared("no-such-commit", "cpp"):
        pass


@pytest.mark.slow
def test_a_commit_against_itself(tmp_path):
    """In a repository of its own, with one launch: building, measuring, the report, and cleaning up."""
    tree, out = tmp_path / "tree", tmp_path / "out.json"
    tree.mkdir()
    for name in ("bench", "csrc", "python"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "kernels", "*.egg-info"))
    for name in ("setup.py", ".gitignore"):
        shutil.copy2(ROOT / name, tree / name)

    def git(*arguments: str) -> str:
        who = ["-c", "user.name=bench", "-c", "user.email=bench@example.org"]
        return subprocess.run(["git", "-C", str(tree), *who, *arguments], check=True, capture_output=True, text=True).stdout.strip()

    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message", "all")
    command = [sys.executable, "-m", "bench.cpu", "--base", "HEAD", "--toy", "--backend", BACKEND, "--shapes", "D64 C64"]
    done = subprocess.run(
        [*command, "--threads", "1", "--seconds", "0.05", "--json", str(out)], check=False, capture_output=True, text=True, cwd=tree
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("no difference: not distinguishable") == 2
    assert BACKEND == "reference" or "no need to build them" in done.stderr
    document = json.loads(out.read_text())
    assert document["base"] == {"ref": "HEAD", "commit": git("rev-parse", "HEAD")} and not document["modified"]
    for result in document["results"]:
        assert (result["study"], result["launches"], result["notes"]) == ("base", 1, [])
        assert set(result["parity"]) == {"base", "this"} and all(gate["ok"] for gate in result["parity"].values())
        assert all(0 < x["low"] <= x["median"] <= x["high"] for x in result["ratios"].values())
    assert str(tmp_path) not in out.read_text()
    assert len(git("worktree", "list").splitlines()) == 1
