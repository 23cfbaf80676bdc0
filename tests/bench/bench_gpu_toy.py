"""The modules of bench/gpu.py, and settings under which their plan can be walked without a GPU."""

from __future__ import annotations

import importlib
import sys
import time
from pathlib import Path

BENCH = Path(__file__).resolve().parents[2] / "bench"
sys.path.insert(0, str(BENCH))
modules = ("bench", "configs", "gate", "measure", "parts", "peers", "plan", "process", "report", "tensors", "verdicts", "worker")
gpu, contenders = map(importlib.import_module, ("gpu", "contenders"))
(
    gpu_bench, gpu_configs, gpu_gate, gpu_measure, gpu_parts, gpu_peers, gpu_plan, gpu_process, gpu_report, gpu_tensors, gpu_verdicts,
    gpu_worker,
) = (importlib.import_module(f"gpu_{name}") for name in modules)  # fmt: skip

TOY = gpu_plan.Settings(backend="reference", device="cpu", toy=True, seconds=0.0, min_rounds=2, compile_seconds=0.0)
TARGET, SMALLEST, FORWARD, BOTH = gpu_plan.TARGET, gpu_plan.SMALLEST, gpu_plan.FORWARD, gpu_plan.BOTH
MLP_TARGET, MLP_SMALLEST = gpu_plan.MLP_TARGET, gpu_plan.MLP_SMALLEST
ONE = {"copy_bytes_per_s": 1e12, "matmul_flops_per_s": 1e14}


def item(direction: str = FORWARD, contenders=("l2", "eager"), shape: str = SMALLEST, **more) -> dict:
    return {"shape": shape, "direction": direction, "contenders": list(contenders), "until": time.time() + 100, **more}
