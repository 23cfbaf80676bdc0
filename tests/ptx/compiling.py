"""Triton's compiler in a process of its own, because this one may have Triton's interpreter. It stops at PTX: no ptxas is needed.

What it compiles is kept in ``build/ptx`` between runs.
"""

from __future__ import annotations

import atexit
import concurrent.futures
import functools
import importlib
import multiprocessing
import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Compiled", "compiled"]

CACHE = Path(__file__).resolve().parents[2] / "build" / "ptx"


class Compiled(NamedTuple):
    """``arguments``: those that the PTX takes, in order: a name, and the place in a tuple or None."""

    ptx: str
    shared: int
    arguments: list[tuple[str, int | None]]


@functools.cache
def worker() -> concurrent.futures.ProcessPoolExecutor:
    before = {name: os.environ.get(name) for name in ("TRITON_INTERPRET", "TRITON_CACHE_DIR")}
    os.environ |= {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(CACHE)}
    try:
        pool = concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        atexit.register(pool.shutdown)
        pool.submit(os.getpid).result()
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            os.environ |= {} if value is None else {name: value}
    return pool


_known: dict[str, Compiled] = {}


def compiled(kernel, arguments: dict, config, architecture: str, fusion: bool = True) -> Compiled:
    """The PTX of a launch, specialised for its arguments as Triton does it."""
    given, unaligned = {}, []
    for name in kernel.arg_names:
        x = arguments[name]
        given[name] = torch.empty(0, dtype=x.dtype, device="meta") if isinstance(x, Tensor) else x
        if isinstance(x, Tensor) and x.data_ptr() % 16:
            unaligned.append(name)
    function = getattr(kernel, "fn", kernel)
    key = repr((function.__module__, function.__name__, sorted(given.items(), key=lambda x: x[0]), config, architecture, unaligned, fusion))
    if key not in _known:
        job = (function.__module__, function.__name__, given, config, architecture, unaligned, fusion)
        _known[key] = worker().submit(_compile, *job).result()
    return _known[key]


def _compile(module: str, name: str, arguments: dict, config, architecture: str, unaligned: list[str], fusion: bool) -> Compiled:
    import triton
    from miras_kernels.kernels.common import launch
    from miras_kernels.kernels.offline import compile as offline
    from triton.backends.nvidia.compiler import CUDABackend

    CUDABackend.make_cubin = lambda self, *_: b""
    kernel = getattr(importlib.import_module(module), name)
    source = offline.source(offline.Launch(kernel, arguments, config))
    for x in unaligned:
        source.attrs.pop((kernel.arg_names.index(x),), None)
    options = launch.options(config, architecture) | dict(enable_fp_fusion=fusion)
    found = triton.compile(source, target=offline.TARGETS[architecture], options=options)
    taken = []
    for x in kernel.arg_names:
        kind = source.signature[x]
        parts = [(i, part) for i, part in enumerate(kind)] if isinstance(kind, tuple) else [(None, kind)]
        taken += [(x, i) for i, part in parts if part != "constexpr"]
    return Compiled(found.asm["ptx"], found.metadata.shared, taken)
