"""A measuring process of bench/gpu.py: reads items, prints what it is doing and what came out (:class:`gpu_process.Worker`)."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator

import torch

import gpu_bench
import gpu_configs
import gpu_decode
from contenders import BOTH, kernel
from gpu_measure import first_line, release, usable
from gpu_plan import Settings, Shape
from gpu_process import MARK
from gpu_tensors import Tensors, short
from harness import OverBudget, machine, versions

Doing = Callable[[str], None]

PEERS = ("fla-core", "mlstm-kernels", "attn-gym", "titans-pytorch", "einops")


def environment(item: dict, settings: Settings, doing: Doing) -> Iterator[dict]:
    """What is here: nothing is changed, only asked."""
    import miras_kernels
    from miras_kernels import dispatch

    yield {
        "host": machine(),
        "versions": {**versions("numpy", "triton", *PEERS), "torch": torch.__version__, "miras-kernels": miras_kernels.__version__},
        "device": _device(settings), "triton": _triton(settings), "unavailable": dispatch.unavailable(settings.backend),
        "configs": {name: list(labels) for name, labels in _table(settings).items()}, "denied": _denied(settings),
    }  # fmt: skip


def _table(settings: Settings) -> dict:
    try:
        return gpu_configs.table(settings)
    except Exception:  # said by "unavailable"
        return {}


def _denied(settings: Settings) -> list:
    return gpu_configs.denied(settings) if _table(settings) else []


def _device(settings: Settings) -> dict:
    if settings.device == "cpu":
        return {"name": "cpu (dry run)", "architecture": "cpu"}
    p = torch.cuda.get_device_properties(0)
    return {
        "name": p.name, "architecture": f"sm_{p.major}{p.minor}", "multiprocessors": p.multi_processor_count,
        "memory_gib": p.total_memory / 2**30, "l2_mib": getattr(p, "L2_cache_size", 0) / 2**20, "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }  # fmt: skip


def _triton(settings: Settings) -> dict:
    """Triton's version, and the assembler that it will use."""
    try:
        import triton
    except ImportError as error:
        return {"version": None, "missing": first_line(error)}
    found = {"version": triton.__version__, "ptxas": None, "ptxas_version": None}
    try:
        from triton.backends.nvidia.compiler import get_ptxas

        capability = torch.cuda.get_device_capability() if settings.device == "cuda" else (9, 0)
        tool = get_ptxas(10 * capability[0] + capability[1])
        found.update(ptxas=tool.path, ptxas_version=tool.version)
    except Exception as error:
        found["ptxas_unknown"] = first_line(error)
    return found


def toy(item: dict, settings: Settings, doing: Doing) -> Iterator[dict]:
    """A few chunks of a memory forward and backward, for compute-sanitizer to watch: with every configuration of the kernels that are
    named, or with every bias if none is."""
    table, shape = gpu_configs.table(settings), _small(item["memory"], settings)
    for bias in shape.ours if not item["kernels"] else (shape.base,):
        call = kernel(Tensors(short(shape), settings).inputs(bias), settings.backend, BOTH)
        call()
        for name in item["kernels"]:
            if name in gpu_decode.step_kernels(settings):
                call = lambda: gpu_decode.one_by_one(shape, settings.backend, settings)()
            for label in table[name]:
                try:
                    with gpu_configs.forced(name, label, settings):
                        call()
                except ValueError:  # not for this shape
                    continue
    if settings.device == "cuda":
        torch.cuda.synchronize()
    yield {"memory": item["memory"], "kernels": item["kernels"]}


def _small(memory: str, settings: Settings) -> Shape:
    if settings.toy:
        return Shape(1, 64, 1, 16, 16) if memory == "linear" else Shape(1, 32, 1, 16, 16, 32)
    return Shape(1, 256, 2, 64, 64, 0 if memory == "linear" else 256)


TASKS = {
    "environment": environment, "ceilings": gpu_bench.ceilings, "first": gpu_bench.first, "warm": gpu_bench.warm,
    "bench": gpu_bench.bench, "memory": gpu_bench.memory, "parity": gpu_configs.parity, "tuning": gpu_configs.tuning, "toy": toy,
    "decode": gpu_decode.decode,
}  # fmt: skip


def serve(settings: Settings) -> None:
    """Do the items that come on stdin until there are no more."""
    messages = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints must not look like a message

    def say(name: str, value: object = None) -> None:
        print(f"{MARK}{name} {json.dumps(value)}", file=messages, flush=True)

    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    say("ready")
    for line in sys.stdin:
        item = json.loads(line)
        item.setdefault("until", time.time() + 0.85 * item["limit"])
        try:
            for result in TASKS[item["task"]](item, settings, lambda what: say("doing", what)):
                say("result", result)
        except (Exception, OverBudget) as error:
            if isinstance(error, gpu_bench.Poisoned) or not usable():
                say("poisoned", first_line(error))
                os._exit(3)
            say("failed", first_line(error))
        release()
        say("done")


def _end_with(parent: int) -> None:
    """Do not outlive the program that started us, not even in a call that never returns."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(4)


def once(settings: Settings, item: dict) -> None:
    """Do one item in this process, for a program that watches it."""
    for result in TASKS[item["task"]](item, settings, lambda what: print(f"doing {what}", flush=True)):
        print(json.dumps(result), flush=True)
