"""What bench/gpu.py times: nothing that is not right, and on a pretended device all that a real one would be asked."""

from __future__ import annotations

import dataclasses
import math
import time
import types

import pytest
import torch
from bench_gpu_toy import (
    BOTH,
    FORWARD,
    MLP_SMALLEST,
    MLP_TARGET,
    ONE,
    TARGET,
    TOY,
    contenders,
    gpu_bench,
    gpu_configs,
    gpu_gate,
    gpu_measure,
    gpu_parts,
    gpu_peers,
    gpu_plan,
    gpu_process,
    gpu_report,
    gpu_tensors,
    gpu_worker,
    item,
)
from torch.overrides import TorchFunctionMode

from miras_kernels import dispatch


@pytest.fixture
def no_verdicts(monkeypatch):
    """Gates are asked anew."""
    monkeypatch.setattr(gpu_bench, "_verdicts", {})
    gpu_gate._short.cache_clear()


# -------------------------------------------------------------------------------------------------------------- gates


@pytest.mark.usefixtures("one_thread", "no_verdicts")
@pytest.mark.parametrize("direction", [FORWARD, BOTH])
def test_no_time_for_a_wrong_kernel(monkeypatch, direction):
    backend = dispatch.BACKENDS["reference"]
    right = backend.backward
    monkeypatch.setattr(backend, "backward", lambda *a: {**(g := right(*a)), "k": 1.1 * g["k"]}, raising=False)
    (result,) = gpu_bench.bench(item(direction), TOY, print)
    assert not result["gates"]["l2"]["ok"] and result["base"] is None
    assert set(result["ms"]) == {"eager"} and "ratios" not in result
    assert any(text.startswith("l2: parity is red, not timed (grad_k: error") for text in result["notes"])
    assert gpu_report.is_red({"bench": {"results": [result]}})


@pytest.mark.usefixtures("one_thread", "no_verdicts")
@pytest.mark.parametrize("leaf", ["q", "log_decay", "ln_weight", "initial_dual_1"])
def test_no_time_for_a_wrong_mlp_kernel(monkeypatch, leaf):
    """Whatever the gradient that is wrong: LayerNorm's and the initial matrices' are compared too."""
    both = gpu_gate.kernel

    def wrong(inputs, backend, direction):
        run, names = both(inputs, backend, direction), list(inputs.leaves())
        return run if direction == FORWARD else lambda: tuple(g * (3 if n == leaf else 1) for n, g in zip(names, run(), strict=True))

    monkeypatch.setattr(gpu_gate, "kernel", wrong)
    (result,) = gpu_bench.bench(item(BOTH, ("huber_coordinate",), MLP_TARGET), TOY, print)
    assert result["ms"] == {}
    assert any(text.startswith(f"huber_coordinate: parity is red, not timed (grad_{leaf}: error") for text in result["notes"])


@pytest.mark.usefixtures("one_thread", "no_verdicts")
def test_the_full_call_of_several_sequences_is_compared():
    """Gradients that sum over sequences are of the compared ones alone."""
    for shape in (gpu_plan.Shape(4, 70, 3, 16, 16, 32), gpu_plan.Shape(3, 70, 3, 16, 16)):
        inputs = gpu_tensors.Tensors(shape, TOY).inputs("huber_coordinate")
        verdict = gpu_gate.gate(inputs, shape, TOY, "huber_coordinate")
        assert verdict["ok"] and verdict["gradient_error"] < 0.02


@pytest.mark.usefixtures("one_thread", "no_verdicts")
def test_who_is_refused_is_said(monkeypatch):
    refuses = lambda call, differentiate: "it has no momentum, so far" if call.momentum is not None else None
    monkeypatch.setattr(dispatch.BACKENDS["reference"], "refuses", refuses, raising=False)
    for shape in gpu_plan.RECURRENCE_SHAPES:
        everyone = contenders.recurrences(gpu_plan.SHAPES[shape].memory)
        (result,) = gpu_bench.bench(item(BOTH, everyone, shape), TOY, lambda what: None)
        assert result["base"] == "plain" and set(result["ms"]) == set(everyone) - {"momentum"}
        assert result["refused"] == {"momentum": "it has no momentum, so far"}
        assert "momentum: refused: it has no momentum, so far" in result["notes"] and not result["failed"]
        document = {"settings": {"toy": True}, "recurrence": {"results": [result]}}
        verdicts = {t["name"]: t["verdict"] for t in gpu_report.judge(document) if f"({shape})" in t["name"] and "plain" in t["name"]}
        assert len(verdicts) == len(everyone) - 1
        assert {name: v for name, v in verdicts.items() if v == "refused: see notes"}.keys() == {n for n in verdicts if "momentum" in n}
        assert "| **momentum** " in gpu_report._bench(document) and "refused" in gpu_report._bench(document)


@pytest.mark.usefixtures("one_thread", "no_verdicts")
def test_no_time_where_a_number_is_not_finite(monkeypatch):
    monkeypatch.setattr(gpu_gate, "all_finite", lambda tensors: False)
    (result,) = gpu_bench.bench(item(), TOY, print)
    assert set(result["ms"]) == {"eager"}
    assert "l2: parity is red, not timed (not every number is finite)" in result["notes"]


@pytest.mark.usefixtures("one_thread", "no_verdicts")
def test_who_fails_or_computes_something_else_is_left_out(monkeypatch):
    monkeypatch.setattr(gpu_bench, "eager", lambda inputs, direction: lambda: (torch.zeros_like(inputs.grad_out),))
    monkeypatch.setattr(gpu_bench, "compiled", lambda inputs, direction: lambda: 1 / 0)
    (result,) = gpu_bench.bench(item(contenders=["l2", "eager", "compile", "huber_coordinate"], exclude=["huber_coordinate"]), TOY, print)
    assert set(result["ms"]) == {"l2"}
    eager, failed = (next(t for t in result["notes"] if t.startswith(name)) for name in ("eager", "compile"))
    assert eager.startswith("eager: computes something else")
    assert failed == "compile: did not run: ZeroDivisionError: division by zero"
    assert "huber_coordinate: left out, it made the device unusable" in result["notes"]


@pytest.mark.usefixtures("one_thread", "no_verdicts")
def test_who_is_slow_is_timed_once(monkeypatch):
    """Ours never; the ratio to ours is told nevertheless."""
    monkeypatch.setattr(gpu_bench, "eager", lambda inputs, direction: lambda: (time.sleep(0.3), inputs.grad_out)[1:])
    monkeypatch.setattr(gpu_bench, "SAME", math.inf)
    settings = dataclasses.replace(TOY, call_seconds=0.2)
    (result,) = gpu_bench.bench(item(FORWARD, ("huber_coordinate", "eager"), MLP_TARGET), settings, print)
    assert set(result["ms"]) == {"huber_coordinate"} and 300 <= result["once_ms"]["eager"] < 2000
    assert any(text.startswith("eager: too slow for the rounds, timed once: 0.") for text in result["notes"])
    document = {"settings": {"toy": True}, "mlp": {"results": [{**result, "direction": BOTH}]}}
    assert "(once)" in gpu_report._bench(document)
    (value,) = (t["value"] for t in gpu_report.judge(document) if "time of eager / ours" in t["name"])
    assert value == result["once_ms"]["eager"] / result["ms"]["huber_coordinate"]["median"]


@pytest.mark.usefixtures("one_thread", "no_verdicts")
def test_a_first_call_has_a_limit(monkeypatch):
    monkeypatch.setattr(gpu_bench, "eager", lambda inputs, direction: lambda: time.sleep(30))
    (result,) = gpu_bench.bench(item(), dataclasses.replace(TOY, eager_seconds=1.0), print)
    assert "eager: did not run: its first call took longer than 1 s" in result["notes"]


def test_who_poisons_the_device_is_named(monkeypatch):
    monkeypatch.setattr(gpu_bench, "usable", lambda: False)
    monkeypatch.setattr(gpu_bench, "eager", lambda inputs, direction: lambda: 1 / 0)
    said = []
    with pytest.raises(gpu_bench.Poisoned, match="eager: ZeroDivisionError"):
        list(gpu_bench.bench(item(contenders=["eager"]), TOY, said.append))
    assert said == ["eager"]


def test_the_item_is_done_again_without_who_poisoned_it():
    asked = []

    def ask(item, end, most=300.0):
        asked.append(item["exclude"])
        if "b" in item["exclude"]:
            return gpu_process.Answer([{"shape": "s"}])
        return gpu_process.Answer(error="illegal access", doing="b", fate="crashed")

    found = {"results": [], "left_out": []}
    run = types.SimpleNamespace(ask=ask)
    gpu_parts._measure(run, {"shape": "s", "direction": "d", "contenders": ["a", "b"]}, math.inf, found)
    assert asked == [[], ["b"]]
    assert found == {"results": [{"shape": "s"}], "left_out": []}


@pytest.mark.usefixtures("one_thread")
def test_a_green_gate_that_says_little_is_told():
    rows = {"name": "grad_k", "error": 0.9, "budget": 1.2}, {"name": "out", "error": 0.1, "budget": 0.2}
    gates = [{"ok": True, "loosest": rows[i], "short": {"loosest": rows[1]}} for i in range(2)]
    field = gpu_bench.Field(item(), TOY, print)
    field.settings = dataclasses.replace(TOY, toy=False)
    for field.gates["l2"] in gates:
        field._doubt("l2")
    assert field.notes == ["l2: parity says little, in bfloat16 grad_k may be off by 1.2e+00 here"]


def test_what_is_planned():
    """Who is timed where; what is not even tried is said."""
    asked = []
    settings = dataclasses.replace(TOY, device="cpu", compile_seconds=60.0)
    ask = lambda item, end, most=300.0: asked.append(item) or gpu_process.Answer([{}])
    run = types.SimpleNamespace(ask=ask, settings=settings, shapes=tuple(gpu_plan.SHAPES), env={})
    found = gpu_parts.mlp(run, math.inf)
    shapes = [name for name, shape in gpu_plan.SHAPES.items() if shape.hidden]
    times = [(i["shape"], i["direction"]) for i in asked if "compile" not in i["contenders"]]
    assert times == [(shape, direction) for shape in shapes for direction in (BOTH, FORWARD)]
    assert all(i["contenders"][0] == "huber_coordinate" and "titans-pytorch" in i["contenders"] for i in asked[: len(times)])
    assert [i["shape"] for i in asked[len(times) :]] == [MLP_SMALLEST] * 2
    assert found["left_out"][0] == f"{MLP_TARGET}, compile: it unrolls 256 chunks, which takes minutes" and len(found["left_out"]) == 3
    asked.clear()
    gpu_parts.recurrence(run, math.inf)
    assert [(i["shape"], i["direction"]) for i in asked] == [(TARGET, BOTH), (MLP_SMALLEST, BOTH)]
    assert [i["contenders"] for i in asked] == [list(contenders.recurrences(memory)) for memory in ("linear", "mlp")]
    asked.clear()
    gpu_parts.memory(run, math.inf)
    assert [i["shape"] for i in asked[::2]][:2] == [TARGET, MLP_TARGET] and asked[2]["contenders"][0] == "huber_coordinate"


# ------------------------------------------------------------------------------------------------------------ device


class FakeEvent:
    """Every event is a millisecond after the one before."""

    clock = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        FakeEvent.clock += 1.0
        self.at = FakeEvent.clock

    def elapsed_time(self, other):
        return other.at - self.at


class OnTheCpu(TorchFunctionMode):
    """Whoever asks for the GPU gets the CPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)


@pytest.fixture
def pretended_gpu(monkeypatch, no_verdicts, one_thread):
    """The code that needs a GPU runs on CPU tensors, with clocks and counters that mean nothing."""
    generator = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": generator())
    monkeypatch.setattr(gpu_measure, "FLUSH", 8)
    counters = {"memory_allocated": 2**20, "max_memory_allocated": 4 * 2**20}
    fakes = {"Event": FakeEvent, **{name: lambda value=value: value for name, value in counters.items()}}
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        fakes[name] = lambda: None
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    with OnTheCpu():
        yield dataclasses.replace(TOY, device="cuda")


def fake_peers(monkeypatch):
    """Peers of every kind: one that runs, one in heads-first layout, one that is not there, one that needs another device."""

    def missing(x):
        raise ModuleNotFoundError("No module named 'fla'")

    def broken(x):
        return lambda: (_ for _ in ()).throw(RuntimeError("needs Triton >= 3.7.1\nor another GPU")), (x.q,)

    peers = {
        "runs": gpu_peers.Peer("a", lambda x: (lambda: x.q * x.beta.unsqueeze(-1) * x.log_decay.unsqueeze(-1), (x.q, x.beta, x.log_decay))),
        "heads first": gpu_peers.Peer("b", lambda x: (lambda: x.heads_first[2] * x.mlstm_gates[1].unsqueeze(-1), (x.heads_first[2],))),
        "missing": gpu_peers.Peer("c", missing, delta_rule=True),
        "broken": gpu_peers.Peer("d", broken),
    }
    monkeypatch.setattr(gpu_peers, "PEERS", peers)
    return tuple(peers)


@pytest.mark.parametrize("direction", [FORWARD, BOTH])
def test_bench_on_a_device(monkeypatch, pretended_gpu, direction):
    everyone = ("l2", "huber_switch", "eager", *fake_peers(monkeypatch))
    (result,) = gpu_bench.bench(item(direction, everyone), pretended_gpu, lambda what: None)
    assert set(result["ms"]) == {"l2", "huber_switch", "eager", "runs", "heads first"}
    assert all(ms["median"] == 1.0 for ms in result["ms"].values()) and result["ratios"]["runs"]["median"] == 1.0
    assert "missing: did not run: ModuleNotFoundError: No module named 'fla'" in result["notes"]
    assert "broken: did not run: RuntimeError: needs Triton >= 3.7.1" in result["notes"]
    assert set(result["host_ms"]) == set(result["first_s"]) == set(result["ms"])
    document = {
        "environment": {"error": "-"},
        "settings": {"toy": False},
        "bench": {"results": [result]},
        "ceilings": {**ONE, "copy_bytes": 1},
    }
    assert "| **l2**" in gpu_report._bench(document)


def test_the_mlp_memory_on_a_device(monkeypatch, pretended_gpu):
    """Times, peak memory, and who has none: against its targets."""
    _, _, missing, _ = fake_peers(monkeypatch)
    gpu_peers.PEERS[gpu_peers.TITANS] = gpu_peers.Peer("t", lambda x: (lambda: 2 * x.q, (x.q,)), memory="mlp", compiles=False)
    wanted = item(BOTH, ("huber_coordinate", "eager", gpu_peers.TITANS, missing), MLP_TARGET)
    (times,) = gpu_bench.bench(wanted, pretended_gpu, lambda what: None)
    assert set(times["ms"]) == {"huber_coordinate", "eager", gpu_peers.TITANS} and times["failed"].keys() == {missing}
    (weighed,) = gpu_bench.memory(wanted, pretended_gpu, lambda what: None)
    assert weighed["peak_mib"]["huber_coordinate"] == 3.0

    def out_of_memory(run):
        raise torch.OutOfMemoryError("Tried to allocate 80 GiB")

    monkeypatch.setattr(gpu_bench, "peak_mib", out_of_memory)
    (too_large,) = gpu_bench.memory(wanted, pretended_gpu, lambda what: None)
    assert too_large["failed"]["huber_coordinate"] == "OutOfMemoryError: Tried to allocate 80 GiB"
    document = {"environment": {"device": {"memory_gib": 80.0}}, "settings": {"toy": False}, "mlp": {"results": [times]}, "ceilings": ONE}
    for memory, verdict in ((weighed, "met"), (too_large, "NOT met"), ({**weighed, "peak_mib": {}}, "not measured")):
        found = {t["name"]: t for t in gpu_report.judge({**document, "memory": {"results": [memory]}})}
        (peak,) = (t for name, t in found.items() if "peak memory" in name)
        assert (peak["limit"], peak["verdict"]) == (80.0, verdict)
    (share,) = (t for name, t in found.items() if "matrix product's rate" in name)
    assert share["limit"] == 0.25 and share["value"] == pytest.approx(gpu_plan.flops(gpu_plan.SHAPES[MLP_TARGET])[BOTH] / 1e14 * 1e3)
    (titans,) = (t for name, t in found.items() if gpu_peers.TITANS in name)
    assert (titans["value"], titans["limit"], titans["verdict"]) == (1.0, 10.0, "NOT met") and MLP_TARGET in titans["name"]
    assert "| **huber_coordinate**" in gpu_report._bench(document)
    assert "huber_coordinate" in gpu_report._memory({"memory": {"results": [weighed]}})


def test_memory_on_a_device(monkeypatch, pretended_gpu):
    everyone = ("l2", *fake_peers(monkeypatch))
    (result,) = gpu_bench.memory(item(BOTH, everyone), pretended_gpu, lambda what: None)
    assert result["peak_mib"] == {"l2": 3.0, "runs": 3.0, "heads first": 3.0}


def test_other_tasks_on_a_device(monkeypatch, pretended_gpu):
    fake_peers(monkeypatch)
    monkeypatch.setattr(gpu_peers, "compile_share", lambda index, count: None)
    quiet = lambda what: None
    for name in ("l2", "momentum", "runs"):
        assert list(gpu_bench.warm(item(contender=name, index=0, count=1), pretended_gpu, quiet)) == [{"contender": name}]
    (ceilings,) = gpu_bench.ceilings({}, pretended_gpu, quiet)
    assert ceilings["copy_bytes_per_s"] == pytest.approx(2 * 2**20 * 1e3) and ceilings["matmul_flops_per_s"] == pytest.approx(
        2 * 64**3 * 1e3
    )
    (first,) = gpu_bench.first(item(biases=["l2"]), pretended_gpu, quiet)
    assert first["first_s"]["l2"] > 0
    (tuned,) = gpu_configs.tuning(item(kernel="reference_forward", skip=[]), pretended_gpu, quiet)
    assert tuned["fastest"] == tuned["chosen"] == "a" and tuned["chosen_over_fastest"] == 1.0
    for memory in ("linear", "mlp"):
        watched = {"memory": memory, "kernels": ["reference_backward"]}
        assert list(gpu_worker.toy(watched, pretended_gpu, quiet)) == [watched]
    rows = list(gpu_configs.parity(item(kernel="reference_forward", label="a"), pretended_gpu, quiet))
    assert [r["status"] for r in rows] == ["ok"]


def test_times_on_a_device(monkeypatch):
    """Every contender in every round between two events; who runs out of memory is dropped and told."""
    empty = torch.empty
    monkeypatch.setattr(gpu_measure.torch, "empty", lambda *size, dtype, device: empty(8, dtype=dtype))
    for name, fake in {"Event": FakeEvent, "synchronize": lambda: None, "empty_cache": lambda: None}.items():
        monkeypatch.setattr(gpu_measure.torch.cuda, name, fake)
    calls = []

    def greedy():
        calls.append("greedy")
        if calls.count("greedy") == 3:
            raise torch.OutOfMemoryError("Tried to allocate 80 GiB\nmore")

    runs = {"a": lambda: calls.append("a"), "greedy": greedy}
    times, host, failed = gpu_measure.interleave(runs, 0.0, dataclasses.replace(TOY, device="cuda", min_rounds=4))
    assert times == {"a": [1.0] * 4} and set(host) == {"a"}
    assert failed == {"greedy": "ran out of memory: OutOfMemoryError: Tried to allocate 80 GiB"}
    assert calls == ["a", "greedy", "greedy", "a", "a", "greedy", "a"]


def test_warming_compiles_a_share(monkeypatch):
    autotuner = pytest.importorskip("triton.runtime.autotuner").Autotuner
    tried = []
    monkeypatch.setattr(autotuner, "_bench", lambda self, *args, config, **meta: tried.append(config) or [1.0] * 3)
    monkeypatch.setattr(autotuner, "check_disk_cache", lambda self, key, configs, run: pytest.fail("a choice was kept"))
    gpu_peers.compile_share(1, 3)
    mine = types.SimpleNamespace(configs=list("abcdefg"))
    times = {config: autotuner._bench(mine, config=config) for config in mine.configs}
    assert tried == ["b", "e"] and times["a"] == [math.inf] * 3
    ran = []
    assert autotuner.check_disk_cache(mine, "key", mine.configs, lambda: ran.append(1)) is False and ran == [1]
