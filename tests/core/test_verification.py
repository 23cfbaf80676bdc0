"""Kernels verified on the machine that runs them: wrong ones are found, remembered and skipped."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch

import miras_kernels as mk
from miras_kernels import dispatch, verification
from miras_kernels.__main__ import main
from miras_kernels.cli.explain import Placeholder
from miras_kernels.tables.memories import LINEAR
from miras_kernels.testing import verifying
from miras_kernels.validation import make_call
from records import COMMAND, CPU, FAIL, GPU, KEY, PASS, forget, taken, tokens, verify

pytestmark = pytest.mark.usefixtures("cache")


def test_right_kernels_pass(cache, monkeypatch, capsys):
    found = verify()
    assert found.ok and [x.status for x in found.outcomes] == ["passed"] * 2 and not found.unkept
    assert [x.configuration for x in found.outcomes] == [f"{KEY} sequence", f"{KEY} decode"]
    forget(monkeypatch)
    assert taken() == "cpp"
    main(["info"])
    assert "cpp        can run here; verified " in (printed := capsys.readouterr().out) and ": 2 configurations, none failed" in printed
    main(["explain"])
    assert "can serve it; verified " in capsys.readouterr().out


def test_nothing_has_been_verified(capsys):
    for command in ("info", "explain"):
        main([command])
        assert "; not verified: run python -m miras_kernels verify\n" in capsys.readouterr().out


def off(x):
    return x * 1.01


def wrong_forward(backend, monkeypatch, saving=(True, False)):
    right = backend.forward

    def forward(call, every):
        out, *rest = right(call, every)
        return (off(out) if bool(every) in saving else out), *rest

    monkeypatch.setattr(backend, "forward", forward)


def wrong_backward(backend, monkeypatch):
    right = backend.backward
    monkeypatch.setattr(backend, "backward", lambda *a: (grads := right(*a)) | {"k": off(grads["k"])})


def wrong_state(backend, monkeypatch):
    right = backend.forward
    monkeypatch.setattr(backend, "forward", lambda *a: ((found := right(*a))[0], list(map(off, found[1])), found[2]))


def wrong_step(backend, monkeypatch):
    right = backend.stepper

    def stepper(call):
        def run(buffers, *tokens):
            right(call)(buffers, *tokens)
            tokens[-1].mul_(1.01)

        return run

    monkeypatch.setattr(backend, "stepper", stepper)


@pytest.mark.parametrize(
    ("plant", "mode", "what"),
    [
        (wrong_forward, "sequence", "out error "),
        (lambda *a: wrong_forward(*a, saving=(False,)), "sequence", "out without gradients error "),
        (wrong_backward, "sequence", "grad_k error "),
        (wrong_state, "sequence", "final_dual_0"),
        (wrong_step, "decode", "out error "),
    ],
    ids=["forward", "without-gradients", "backward", "state", "step"],
)
def test_a_wrong_kernel_is_found_and_skipped(monkeypatch, capsys, plant, mode, what):
    backend = dispatch.BACKENDS["cpp"]
    with monkeypatch.context() as planted:
        plant(backend, planted)
        assert main(COMMAND.split()) == 1
    printed = capsys.readouterr().out
    assert f"FAILED: cpp, {KEY} {mode}: {what}" in printed and "budget" in printed
    forget(monkeypatch)
    steps, call = dict(t=1), dict(t=20, requires_grad=True)
    wrong, right = (steps, call) if mode == "decode" else (call, steps)
    assert taken(**wrong) == "reference" and taken(**right) == "cpp"
    assert taken(**wrong, bias=mk.L1()) == "cpp"
    reason = mk.explain(*tokens(**wrong))["cpp"]
    assert reason.startswith("failed verification on 20") and what in reason and reason.endswith("miras_kernels verify after updating")
    x = make_call(LINEAR, *tokens(**wrong), None, **SETTINGS)
    assert dispatch.choose("auto", x, mode == "sequence") == "reference" and dispatch.choose("cpp", x, True) == "cpp"
    main(["info"])
    assert "2 configurations, 1 failed" in capsys.readouterr().out
    assert verify().ok and taken(**wrong) == "cpp"  # the planted fault is gone


SETTINGS = dict(bias=mk.L2(), retention=mk.L2Retention(), delta=None, momentum=None, chunk_size=64, initial_state=None,
                output_final_state=False, cu_seqlens=None)  # fmt: skip


def test_a_decoder_skips_it_too(monkeypatch):
    backend = dispatch.BACKENDS["cpp"]
    verification.add("cpp", CPU, {f"{KEY} decode": FAIL})
    monkeypatch.setattr(backend, "stepper", None)
    reader = mk.Decoder(mk.MemoryState((torch.zeros(1, 1, 8, 8),)), chunk_size=4)
    assert torch.isfinite(reader.step(*tokens(1))).all()
    assert torch.isfinite(reader.step(*tokens(12))).all()  # more than a call without gradients would read token by token


def test_an_exception_is_a_failure_unless_memory_ran_out(monkeypatch):
    def forward(*_):
        raise error("first line\nsecond line")

    monkeypatch.setattr(dispatch.BACKENDS["cpp"], "forward", forward)
    error = torch.OutOfMemoryError
    assert [x.status for x in verify().outcomes] == ["not verified", "passed"]
    error = RuntimeError
    found = verify()
    assert [x.status for x in found.outcomes] == ["failed", "passed"] and "RuntimeError: first line (plain)" in str(found)


def test_a_case_that_cannot_be_drawn_is_not_verified(monkeypatch):
    monkeypatch.setattr(verifying.Case, "_kink_distance", lambda self, inputs: 0.0)
    found = verify(bias=mk.Huber("norm"), key_dim=2, chunk_size=2)
    assert [x.status for x in found.outcomes] == ["not verified"] * 2 and "keeps a distance from the kink" in str(found)


def test_a_device_that_stopped_working_is_not_verified(monkeypatch):
    wrong_forward(dispatch.BACKENDS["cpp"], monkeypatch)
    monkeypatch.setattr(verifying, "_still_works", lambda device: False)
    assert [x.status for x in verify().outcomes] == ["failed", "not verified"]


def test_results_of_own_sizes_apply_to_these_sizes(monkeypatch):
    with monkeypatch.context() as planted:
        wrong_forward(dispatch.BACKENDS["cpp"], planted)
        found = verify(key_dim=8, value_dim=8, chunk_size=16)
    assert [x.configuration for x in found.outcomes] == [f"{KEY} decode 8x8 chunk 16", f"{KEY} sequence 8x8 chunk 16"][::-1]
    assert taken(chunk_size=16) == "reference" and taken() == "cpp"
    assert verify().ok and taken(chunk_size=16) == "reference"
    found = mk.verify(memory="mlp", bias=mk.L2(), retention=mk.L2Retention(), dtype=torch.float32, key_dim=6, hidden=5, device="cpu")
    assert found.ok and found.outcomes[0].configuration == "mlp l2 l2 float32 sequence 6x6 hidden 5 chunk 64"


def test_the_trials_cover_the_tables():
    """Every bias with every gate for both memories, the plainest first; each with packing, momentum and gates by channel if it has them."""
    rows = verifying._rows(None, None, None)
    usual, few = zip(*(verifying._cases(*row, None) for row in rows), strict=True)
    pairs = [needed for needed, _ in usual]
    kinds = [(x.memory, x.bias.name, x.retention.name) for x, _ in pairs]
    assert len(set(kinds)) == len(kinds) == 2 * len(mk.biases.TABLE) * len(mk.retention.TABLE)
    assert kinds[:2] == [("linear", "l2", "l2"), ("mlp", "l2", "l2")] and all("l2" in kind[1:] for kind in kinds[:26])
    assert all(x.lengths is None and not x.momentum and y.lengths and y.momentum for x, y in pairs)
    assert all((y.decay == "channel") == (y.memory == "linear") for _, y in pairs)
    assert all(x.decay == y.decay == "scalar" and not y.momentum and y.lengths and y.initial == "shared" for (x, y), _ in few)
    assert all(many.batch * many.heads == 256 and momentum.momentum for _, (many, momentum, _) in few)


def test_arguments():
    for error, name, changes in (
        (ValueError, "memory", dict(memory="cubic")),
        (TypeError, "bias", dict(bias="l2")),
        (TypeError, "retention", dict(retention=mk.L2())),
        (TypeError, "dtype", dict(dtype="float32")),
        (ValueError, "key_dim", dict(key_dim=0)),
        (ValueError, "chunk_size", dict(chunk_size=True)),
        (ValueError, "hidden", dict(hidden=3)),
        (ValueError, "value_dim", dict(memory="mlp", value_dim=3)),
        (ValueError, "seconds", dict(seconds=0)),
        (ValueError, "device", dict(device="moon")),
    ):
        with pytest.raises(error, match=f"^{name}: .*got "):
            verify(**changes)


@pytest.mark.parametrize(
    ("arguments", "printed"),
    [
        ("--dim 300 --memory linear", "nothing to verify on cpu"),
        ("--dtype float64", "nothing to verify on cpu"),
        ("--memory mlp --value-dim 3", "got 3"),
    ],
)
def test_nothing_to_verify(capsys, arguments, printed):
    assert main(["verify", "--device", "cpu", *arguments.split()]) == 2
    found = capsys.readouterr()
    assert printed in found.out + found.err


def test_the_time_limit(cache, monkeypatch, capsys):
    """Trials not reached are reported, leave no result, and come first the next time; those that failed come last."""
    clock, tried = [0.0], []

    def wrong(self, case, inputs):
        clock[0] += 1
        tried.append(self.key)
        return "wrong" if self.key.startswith("mlp") else None

    monkeypatch.setattr(verifying.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(verifying._Check, "_wrong", wrong)
    monkeypatch.setattr(verifying, "_serves", lambda backend, mode, dtype, case: dtype == torch.float32)
    some = dict(bias=mk.L2(), retention=mk.L2Retention(), device="cpu")
    first = mk.verify(**some, seconds=2.5)  # both cases of one configuration, one of the next
    assert [x.status for x in first.outcomes] == ["passed", "not verified", "not verified", "not verified"]
    assert "not verified: the time was over" in str(first) and set(verification.results("cpp", CPU)) == {f"{KEY} sequence"}
    tried.clear()
    second = mk.verify(**some)
    mlp = "mlp l2 l2 float32"
    assert tried == [f"{KEY} decode"] * 2 + [f"{mlp} sequence", f"{mlp} decode"] + [f"{KEY} sequence"] * 2 and not second.ok
    tried.clear()
    mk.verify(**some)
    assert [x.split()[0] for x in tried] == ["linear"] * 4 + ["mlp"] * 2
    monkeypatch.setattr(verifying.time, "monotonic", itertools.count(0, 100).__next__)
    assert main(COMMAND.split()) == 2 and "1 " not in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------ GPUs


@pytest.fixture
def gpu(monkeypatch):
    """A machine that has one, as far as dispatch can tell; returns a function that makes calls of ``t`` tokens there."""
    for name in ("triton", "cuda"):
        monkeypatch.setattr(dispatch.BACKENDS[name], "unavailable", lambda: None)
        monkeypatch.setattr(dispatch.BACKENDS[name], "stepper", lambda call, name=name: name)
    monkeypatch.setattr(verification, "machine", lambda name, device: {"name": name})

    def call(t: int = 20, dim: int = 64, **settings):
        def make(*shape):
            x = torch.empty(*shape, device="meta").as_subclass(Placeholder)
            x.where = GPU
            return x

        x = make(1, t, 1, dim)
        given = SETTINGS | dict(initial_state=make(1, dim, dim)) | settings
        return make_call(LINEAR, x, x, x, make(1, t, 1), None, **given)

    return call


def test_unverified_triton_kernels_warn_once(gpu):
    command = "run python -m miras_kernels verify --device cuda --memory linear --bias l2 --retention l2 --dtype float32"
    with pytest.warns(UserWarning, match=f"triton kernels have not been verified on this machine for {KEY} sequence: {command}") as seen:
        assert dispatch.choose("auto", gpu(), True) == "triton"
        assert dispatch.choose("auto", gpu(), False) == dispatch.choose("auto", gpu(1), False) == "triton"
        assert dispatch.stepper("auto", gpu(1)) == "triton"
    assert len(seen) == 1


def test_verified_triton_kernels_do_not_warn(gpu):
    verification.add("triton", GPU, {f"{KEY} sequence": PASS, f"{KEY} decode": PASS})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.choose("auto", gpu(), True) == dispatch.choose("auto", gpu(1), False) == "triton"
        with pytest.raises(UserWarning, match="not been verified .* for linear l1 l2"):
            dispatch.choose("auto", gpu(bias=mk.L1()), True)


@pytest.mark.filterwarnings("ignore:miras_kernels. the triton kernels have not been verified")
def test_cuda_is_used_where_it_was_verified(gpu):
    reason = dispatch.explain(gpu(1), False)
    assert 'not verified on this machine, so "auto" skips it: run' in reason["cuda"] and reason["triton"] is None
    assert dispatch.stepper("cuda", gpu(1)) == dispatch.choose("cuda", gpu(1), False) == "cuda"
    verification.add("cuda", GPU, {f"{KEY} decode": PASS})
    assert dispatch.explain(gpu(1), False)["cuda"] is None
    assert dispatch.stepper("auto", gpu(1)) == dispatch.choose("auto", gpu(1), False) == "cuda"
    assert dispatch.stepper("auto", gpu(1, bias=mk.L1())) == "triton"
    assert dispatch.choose("auto", gpu(), False) == "triton"  # a whole sequence
    verification.add("cuda", GPU, {f"{KEY} decode": FAIL})
    assert dispatch.stepper("auto", gpu(1)) == "triton" and dispatch.stepper("cuda", gpu(1)) == "cuda"
    verification.add("triton", GPU, {f"{KEY} decode": FAIL})
    assert dispatch.choose("auto", gpu(1), False) == "reference" and dispatch.choose("auto", gpu(), True) == "triton"
    assert callable(dispatch.stepper("auto", gpu(1)))


def test_a_size_that_failed_is_skipped(gpu):
    verification.add("triton", GPU, {f"{KEY} sequence": PASS, f"{KEY} sequence 128x128 chunk 64": FAIL})
    assert dispatch.choose("auto", gpu(dim=64), True) == "triton" and dispatch.choose("auto", gpu(dim=128), True) == "reference"
    reasons = dispatch.explain(gpu(dim=128), True)
    assert reasons["triton"].startswith("failed verification on 2026-01-02: out error 3e-02, budget 1e-05")
