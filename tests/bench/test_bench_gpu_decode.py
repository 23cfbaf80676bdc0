"""The decoding part of bench/gpu.py: steps are checked before they are timed."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from miras_kernels import dispatch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
import gpu_decode
import gpu_plan
import gpu_report

TOY = gpu_plan.Settings(backend="reference", device="cpu", toy=True, seconds=0.0, min_rounds=1, compile_seconds=0.0)


def measured(shape: str) -> dict:
    (result,) = gpu_decode.decode({"shape": shape, "until": time.time() + 100}, TOY, lambda what: None)
    return result


@pytest.mark.parametrize("shape", list(gpu_plan.DECODING)[:2])
def test_tokens_are_timed(shape):
    result = measured(shape)
    assert result["gates"]["reference"]["ok"] and not result["notes"] and set(result["ms"]) == {"reference", "eager"}
    document = {"settings": {"toy": True}, "decode": {"results": [result]}}
    assert not gpu_report.is_red(document)
    assert f"| {shape}" in gpu_report._decode(document)


def test_no_time_for_wrong_steps(monkeypatch):
    backend = dispatch.BACKENDS["reference"]
    right = backend.stepper

    def wrong(call):
        run = right(call)
        return lambda buffers, q, k, v, lr, *others: run(buffers, q, k, v, 1.1 * lr, *others)

    monkeypatch.setattr(backend, "stepper", wrong, raising=False)
    result = measured(next(iter(gpu_plan.DECODING)))
    assert set(result["ms"]) == {"eager"} and result["notes"][0].startswith("reference: parity is red, not timed (")
    assert gpu_report.is_red({"decode": {"results": [result]}})
