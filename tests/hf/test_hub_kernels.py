"""What the kernels package loads from a local folder (`make test-hub-kernels` installs it beside .venv)."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys

import hub_build
import pytest
import torch
from hf_tiny import VOCAB, assert_close, ids
from test_accelerate import host
from transformers.utils import is_kernels_available

import miras_kernels.layers
from miras_kernels.hf import hub, linear_attention
from quick import slow

kernels = importlib.import_module("kernels") if is_kernels_available() else None
needs_kernels = pytest.mark.skipif(kernels is None, reason="no kernels package that transformers takes: make test-hub-kernels")


@pytest.fixture
def calls(monkeypatch):
    """The functions that were called."""
    found = []
    for name in ("gated_delta_rule", "kimi_delta_attention", "convolution"):
        run = getattr(linear_attention, name)
        monkeypatch.setattr(linear_attention, name, lambda *x, run=run, name=name, **rest: found.append(name) or run(*x, **rest))
    return found


RULES = {"Qwen3_5": "gated_delta_rule", "OlmoHybrid": "gated_delta_rule", "KimiLinear": "kimi_delta_attention"}


@needs_kernels
@pytest.mark.parametrize("name, rule", RULES.items())
def test_a_local_folder_on_a_cpu(name, rule, calls, tmp_path):
    """Logits, gradients and generated tokens are those of transformers' own functions."""
    model = host(name)
    tokens = ids(2, 20)
    wanted, text = model(tokens).logits, model.generate(tokens, max_new_tokens=4, do_sample=False)
    wanted.square().mean().backward()
    grads = [x.grad.clone() for x in model.parameters() if x.grad is not None]
    model.zero_grad()
    assert not calls
    with kernels.use_kernel_mapping(hub.write_kernels(tmp_path), inherit_mapping=False):
        kernels.kernelize(model, mode=kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE, device="cpu")
    try:
        found = model(tokens).logits
        assert {rule, "convolution"} <= set(calls)
        assert_close(found, wanted)
        found.square().mean().backward()
        for x, y in zip([x.grad for x in model.parameters() if x.grad is not None], grads, strict=True):
            assert_close(x, y, terms=65536)
        assert torch.equal(model.generate(tokens, max_new_tokens=4, do_sample=False), text) and text.max() < VOCAB
    finally:  # the functions are shared by all models of the process
        with kernels.use_kernel_mapping({}, inherit_mapping=False):
            kernels.kernelize(model, mode=kernels.Mode.INFERENCE, device="cpu")
    calls.clear()
    model(tokens)
    assert not calls


@pytest.mark.parametrize("backend", ["reference", slow("triton")])
def test_a_build_for_the_hub(backend, tmp_path):
    """It is loaded where the package is not, and computes the same."""
    folder, out = tmp_path / "hub", tmp_path / "found.pt"
    hub.write_build(folder)
    with pytest.raises(FileExistsError, match="expected a new or empty one"):
        hub.write_build(folder)
    env = dict(os.environ, TRITON_INTERPRET="1", PYTHONPATH=os.pathsep.join(x for x in sys.path if x.endswith("hub-kernels")))
    command = [sys.executable, hub_build.__file__, str(folder), backend, str(out)]
    subprocess.run(command, check=True, timeout=300, cwd=tmp_path, env=env)
    found = torch.load(out)
    expected = hub_build.results(miras_kernels, "reference")
    assert found.pop("module").startswith("miras_kernels_0_") and found.pop("with_kernels") == (kernels is not None)
    assert set(found) == set(expected)
    for name, x in expected.items():
        assert_close(found[name], x)
