"""``python -m miras_kernels``: what it prints, and its errors; `warmup` is in test_warmup.py."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import sys

import pytest
import torch

import miras_kernels
from miras_kernels import dispatch, verification
from miras_kernels.__main__ import main
from miras_kernels.backends import triton as triton_backend
from miras_kernels.versions import TRANSFORMERS
from quick import slow

#: end of the row of a backend that can run, when the tests use Triton's interpreter
SLOWLY = ", but in Triton's interpreter, slowly: TRITON_INTERPRET is set"
#: and of one that "auto" considers
UNVERIFIED = "; not verified: run python -m miras_kernels verify"


def lines(capsys) -> dict[str, str]:
    """Printed rows by their first word."""
    return dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines() if line.startswith("  "))


def test_info_names_versions_and_backends(capsys):
    assert main([]) == 0
    rows = lines(capsys)
    assert rows["miras-kernels"] == miras_kernels.__version__
    assert rows["python"] == platform.python_version()
    assert rows["torch"] == torch.__version__
    assert "triton" in rows and "transformers" in rows
    assert f"{torch.get_num_threads()} threads" in rows["cpu"]
    assert rows["reference"] == "can run here"
    assert rows["cpp"] == "can run here" + UNVERIFIED or rows["cpp"].startswith("cannot run: the extension")
    assert rows["checkpoint_every"] == "None" and rows["check_values"] == "None"


def test_info_says_why_a_backend_is_missing(capsys, monkeypatch):
    backend = dispatch.BACKENDS["cpp"]
    monkeypatch.setattr(backend, "extension", None)
    monkeypatch.setattr(backend, "missing", "the extension is not built: there was no C++ compiler")
    assert main(["info"]) == 0
    rows = lines(capsys)
    assert rows["cpp"] == "cannot run: the extension is not built: there was no C++ compiler"
    assert "kernels" not in rows["cpu"]


@pytest.mark.skipif(dispatch.unavailable("cpp") is not None, reason="needs the extension")
def test_info_names_the_instruction_set(capsys):
    main([])
    extension = dispatch.BACKENDS["cpp"].extension
    assert f"kernels use {extension.cpu_capability()}" in lines(capsys)["cpu"]
    assert "portable" in extension.cpu_capabilities()


def test_info_finds_a_version_under_another_name(capsys, monkeypatch):
    """As for PyTorch builds that come with their own triton."""

    def version(name: str) -> str:
        if name == "rocm-triton":
            return "3.7.0"
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: {"triton": ["rocm-triton"]})
    main(["info"])
    printed = capsys.readouterr().out
    assert "  triton         3.7.0 (rocm-triton)\n" in printed and "  transformers   not installed\n" in printed


@pytest.mark.parametrize(("version", "where"), [("5.4.0", "within"), ("5.24.3", "within"), ("5.3.0", "OUTSIDE"), ("5.99.0", "OUTSIDE")])
def test_info_says_whether_transformers_is_tested(capsys, monkeypatch, version, where):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    main(["info"])
    assert lines(capsys)["transformers"] == f"{version} ({where} the tested range, {' to '.join(TRANSFORMERS)})"


def without_triton(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "triton" else find(name, *rest))


def with_triton(monkeypatch, *, interpreted: bool, gpu: bool = False):
    monkeypatch.setattr(triton_backend, "interpreted", lambda: interpreted)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)


def test_triton_is_not_installed(capsys, monkeypatch):
    without_triton(monkeypatch)
    monkeypatch.setattr(triton_backend, "interpreted", lambda: False)
    main(["info"])
    assert lines(capsys)["triton"] == "cannot run: triton is not installed"
    for device in ("cpu", "cuda"):
        main(["explain", "--device", device])
        assert lines(capsys)["triton"] == "cannot: triton is not installed"


def test_triton_has_no_gpu(capsys, monkeypatch):
    with_triton(monkeypatch, interpreted=False)
    main(["info"])
    rows = lines(capsys)
    assert rows["triton"].startswith("cannot run: there is no GPU here") and "TRITON_INTERPRET=1" in rows["triton"]
    assert rows["cuda"].startswith("cannot run")
    main(["explain", "--device", "cuda"])
    printed = capsys.readouterr().out
    assert "triton     cannot: there is no GPU here" in printed and '"auto" takes reference' in printed


def test_triton_is_interpreted(capsys, monkeypatch):
    """It can run, at a speed that says nothing about the kernels; "auto" skips it on the CPU."""
    with_triton(monkeypatch, interpreted=True)
    main(["info"])
    assert lines(capsys)["triton"] == "can run here" + SLOWLY
    main(["explain"])
    printed = capsys.readouterr().out
    assert "triton     can serve it" + SLOWLY in printed and '"auto" takes triton' not in printed
    main(["explain", "--chunk", "200"])
    assert lines(capsys)["triton"] == "cannot: chunk_size is limited to 128, got 200"
    main(["explain", "--chunk", "200", "--no-grad", "--tokens", "1"])
    assert lines(capsys)["triton"] == "can serve it" + SLOWLY


def test_triton_has_a_gpu(capsys, monkeypatch):
    with_triton(monkeypatch, interpreted=False, gpu=True)
    main(["explain", "--device", "cuda", "--dtype", "bfloat16"])
    printed = capsys.readouterr().out.splitlines()
    assert "  triton     can serve it" + UNVERIFIED in printed and printed[-1] == '"auto" takes triton'
    main(["explain", "--device", "cpu"])
    assert lines(capsys)["triton"] == "cannot: it does not run on cpu tensors"


def test_cuda_is_explained(capsys, monkeypatch, tmp_path):
    """It says which calls it does not serve; where it is missing it says why."""
    backend = dispatch.BACKENDS["cuda"]
    monkeypatch.setattr(backend, "path", tmp_path / "_cuda.so")
    main(["info"])
    assert lines(capsys)["cuda"].startswith("cannot run: the kernels are not built: ")
    monkeypatch.setattr(type(backend), "unavailable", lambda self: None)
    main(["explain", "--device", "cuda", "--no-grad"])
    assert lines(capsys)["cuda"] == "cannot: it reads chunks of bfloat16 or float16 inputs, got torch.float32"
    main(["explain", "--device", "cuda", "--no-grad", "--tokens", "1"])
    assert lines(capsys)["cuda"].startswith('cannot: not verified on this machine, so "auto" skips it: run python -m miras_kernels verify')
    record = {"linear l2 l2 float32 decode": {"when": "2026-01-01", "failure": None}}
    monkeypatch.setitem(verification._known, ("cuda", torch.device("cuda")), record)
    main(["explain", "--device", "cuda", "--no-grad", "--tokens", "1"])
    printed = capsys.readouterr().out.splitlines()
    assert "forward, T = 1" in printed[0] and printed[-1] == '"auto" takes cuda'
    assert "  cuda       can serve it; verified 2026-01-01: 1 configurations, none failed" in printed


@pytest.mark.parametrize("interpret", [slow("0"), "1"])
def test_commands_do_not_import_triton(interpret):
    """Nor does `warmup` without a GPU, which checks for one first."""
    code = """
import sys, torch, miras_kernels
from miras_kernels.__main__ import main
from miras_kernels.versions import TRANSFORMERS
for command in ("info", "explain", "explain --device cuda --bias huber_switch", "explain --memory mlp", "warmup --chunk-size 48"):
    main(command.split())
assert "triton" not in sys.modules, "triton was imported"
assert "torch._dynamo" not in sys.modules, "PyTorch's compiler was imported"
"""
    environment = {**os.environ, "TRITON_INTERPRET": interpret}
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr


def test_options_in_force_are_printed(capsys):
    with miras_kernels.override(checkpoint_every=3, check_values=False):
        main(["info"])
    rows = lines(capsys)
    assert rows["checkpoint_every"] == "3" and rows["check_values"] == "False"


def test_explain_agrees_with_dispatch(capsys):
    command = "explain --memory linear --bias huber_switch --dim 64 --chunk 64 --dtype bfloat16 --device cpu"
    assert main(command.split()) == 0
    printed = capsys.readouterr().out
    x = torch.zeros(1, 2, 1, 64, dtype=torch.bfloat16, requires_grad=True)
    g = torch.zeros(1, 2, 1)
    reasons = miras_kernels.explain(x, x, x, g, g, bias=miras_kernels.Huber("switch"), delta=1.0)
    assert printed.splitlines()[-1] == f'"auto" takes {next(name for name, reason in reasons.items() if reason is None)}'
    for name, reason in reasons.items():
        row = next(line for line in printed.splitlines() if line.split()[0] == name)
        row = row.removesuffix(UNVERIFIED).removesuffix(SLOWLY)
        assert row.endswith("can serve it" if reason is None else f"cannot: {reason}")


@pytest.mark.parametrize(
    ("arguments", "auto"),
    [
        ("--memory mlp --bias lp:3 --retention lq", None),
        ("--memory mlp --momentum --retention kl:2.5", "cpp"),
        ("--dtype float64", "reference"),
        ("--device cuda --no-grad", None),
        ("--device mps", "reference"),
        ("--bias lp_smooth:1.5,10 --decay channel --lr channel --value-dim 3 --no-grad", None),
    ],
)
def test_explain_variants(capsys, arguments, auto):
    assert main(["explain", *arguments.split()]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in printed[1:-1]} == set(dispatch.NAMES[1:])
    assert ("forward and backward" in printed[0]) == ("--no-grad" not in arguments)
    assert auto is None or printed[-1] == f'"auto" takes {auto}'


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("explode", "invalid choice: 'explode'"),
        ("explain --bias foo", "unknown bias 'foo': expected one of dot, l2, l1, lp, lp_smooth, huber_coordinate"),
        ("explain --bias lp:1.5", "p < 2 needs a sharpness"),
        ("explain --bias l2:3", "l2 takes no parameters"),
        ("explain --bias huber_norm:1,2", "huber_norm takes sharpness"),
        ("explain --retention lq:0.5", "q must be a finite number > 1, got 0.5"),
        ("explain --bias custom:e+q", "CustomBias: unknown name 'q'"),
        ("explain --bias custom:e*s,s=x", "custom: s: expected a number, got 'x'"),
        ("explain --bias custom:loss=e", "CustomBias: psi does not depend on the error: 'e'"),
        ("explain --retention custom:A*norm2", "CustomRetention: unknown name 'norm2'"),
        ("explain --retention custom:loss=A", "CustomRetention"),
        ("explain --bias lp:x", "could not convert string to float: 'x'"),
        ("explain --retention foo", "unknown retention gate 'foo': expected one of l2, lq, kl, elastic, sigmoid"),
        ("explain --device moon", "invalid choice: 'moon'"),
        ("explain --dtype int8", "invalid choice: 'int8'"),
        ("explain --memory cubic", "invalid choice: 'cubic'"),
        ("explain --dim 0", "expected an integer >= 1, got '0'"),
        ("explain --chunk many", "expected an integer >= 1, got 'many'"),
    ],
)
def test_unknown_names_are_errors(capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        main(arguments.split())
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_explain_refuses_a_wrong_call(capsys):
    assert main(["explain", "--memory", "mlp", "--value-dim", "3"]) == 2
    assert "an MLP memory needs Dv = Dk" in capsys.readouterr().err


def test_explain_takes_parameters(capsys):
    main(["explain", "--bias", "lp:2.5", "--retention", "lq:3,2"])
    assert "Lp(p=2.5, sharpness=None, eps=1e-06), LqRetention(q=3.0, floor=2.0)" in capsys.readouterr().out
    main(["explain", "--bias", "custom:min(max(e, -c), c), c=2", "--retention", "custom:A / (1 + abs(A))"])
    assert "CustomBias('min(max(e, -c), c)', c=2.0), CustomRetention('A / (1 + abs(A))')" in capsys.readouterr().out


def test_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "miras_kernels", "explain"], check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert '"auto" takes' in done.stdout
