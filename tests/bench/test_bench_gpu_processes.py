"""The GPU benchmark's processes: a worker that may die, the runner that plans around it."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path

import pytest

from bench.common import processes
from bench.common.implementations import BOTH, FORWARD
from bench.gpu import plan, report, runner

ROOT = Path(__file__).resolve().parents[2]
SMOKE = plan.Settings(backend="reference", device="cpu", smoke=True, seconds=0.0, min_rounds=2)


def worker() -> processes.Worker:
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(Path(__file__).parent), str(ROOT)]))
    return processes.Worker("worker_for_tests", env)


def test_worker_answers_dies_and_comes_back():
    with worker() as made:
        assert made.ask({"task": "echo", "value": 1})[0] == 1
        first = made.process
        for request, seconds, reason in (
            ({"task": "fail", "value": 0}, 60.0, "ZeroDivisionError: division by zero"),
            ({"task": "die", "value": "x"}, 60.0, "the process ended with status 7"),
            ({"task": "hang", "value": "x"}, 4.0, "no answer within 4 s"),
        ):
            with pytest.raises(processes.Lost, match=reason) as lost:
                made.ask(request, seconds)
            assert lost.value.results == ([{"doing": "x"}] if request["value"] else []) and made.process is None
        assert made.ask({"task": "echo", "value": 2})[0] == 2 and made.process is not first
        last = made.process
    assert last.poll() is not None


def made_runner(seconds: float = 60.0) -> runner.Runner:
    return runner.Runner(SMOKE, {}, 1, time.time() + seconds)


def test_an_item_is_done_again_without_what_lost_its_process(monkeypatch):
    asked = []

    def ask(self, request, seconds=None):
        asked.append(request.get("exclude", []))
        if "b" in asked[-1]:
            return [{"doing": "a"}, {"ms": {}}]
        raise processes.Lost("no answer within 120 s", [{"doing": "a"}, {"doing": "b"}])

    monkeypatch.setattr(processes.Worker, "ask", ask)
    item = plan.Item("times", "s", "times", {"names": ["a", "b"]}, 120)
    assert made_runner().do(item) == [{"study": "times", "case": "s", "ms": {}}] and asked == [[], ["b"]]
    lost = made_runner().do(dataclasses.replace(item, task="parity"))
    assert lost == [{"study": "times", "case": "s", "status": "lost", "detail": "b: no answer within 120 s"}]
    assert report.is_red({"results": lost})


def test_no_time_left_is_reported(monkeypatch):
    monkeypatch.setattr(processes.Worker, "ask", lambda self, request, seconds=None: [{"status": "ok"}])
    items, said = [plan.Item("parity", str(i), "parity", {}, 9, alone=i > 1) for i in range(4)], []
    made_runner().run(items, lambda item, found: said.append((item.case, len(found))))
    made_runner(seconds=0).run(items, lambda item, found: said.append((item.case, len(found))))
    assert sorted(said[:4]) == [(str(i), 1) for i in range(4)] and sorted(said[4:]) == [(str(i), 0) for i in range(4)]


def test_plans():
    real = dataclasses.replace(SMOKE, smoke=False)
    kernels = {"linear_output": ["a", "b"], "linear_decay": ["a"], "mlp_dq_bwd": ["a", "b"], "mlp_step_write": ["a", "b"]}
    items = list(plan.correctness(kernels, 3, real))
    assert [item.study for item in items][:16].count("repeat") == 16  # 8 recurrences and steps of one memory, 6 and steps of the other
    assert [item.arguments for item in items if item.task == "parity_of"][:2] == [{"kernel": k, "label": "a"} for k in list(kernels)[:2]]
    assert sum(item.task == "parity_of" for item in items) == 7 and sum(bool(item.tool) for item in items) == 4
    items = list(plan.times(kernels, real))
    assert all(item.alone == (item.study != "compilation") for item in items)
    rows = [(item.case, item.arguments["direction"]) for item in items if item.study == "times"]
    assert rows[:4] == [(shape, direction) for shape in (plan.TARGET, plan.MLP_TARGET) for direction in (BOTH, FORWARD)]
    tuned = [(item.case, item.arguments["kernel"]) for item in items if item.study == "tuning"]
    assert tuned == [(plan.TARGET, "linear_output"), (plan.MLP_TARGET, "mlp_dq_bwd")]
    first, *_ = (item for item in items if item.study == "times")
    assert first.arguments["names"] == [*plan.SHAPES[plan.TARGET].biases, "eager", *plan.FLA]
    sizes = lambda name: (lambda s: (s.batch * s.tokens, s.heads, s.key_dim, s.hidden, s.chunk_size))(plan.SHAPES[name])
    assert sizes(plan.TARGET) == (65536, 32, 128, 0, 64) and sizes(plan.MLP_TARGET) == (65536, 16, 64, 256, 64)
