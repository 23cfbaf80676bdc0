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
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Compiled", "compiled", "registers"]

CACHE = Path(__file__).resolve().parents[2] / "build" / "ptx"


class Compiled(NamedTuple):
    """``arguments``: those that the PTX takes, in order: a name, and the place in a tuple or None."""

    ptx: str
    shared: int
    arguments: list[tuple[str, int | None]]

    def taken(self, arguments: dict) -> list:
        return [arguments[name] if i is None else arguments[name][i] for name, i in self.arguments]


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


def compiled(kernel, arguments: dict, config, architecture: str) -> Compiled:
    """The PTX of a launch, specialised for its arguments as Triton does it."""
    unaligned: list[tuple[int, ...]] = []

    def described(x, *place: int):
        """A tensor's type, in its place and alignment."""
        if isinstance(x, tuple):
            members = [described(member, *place, i) for i, member in enumerate(x)]
            return type(x)(*members) if hasattr(x, "_fields") else tuple(members)
        if not isinstance(x, Tensor):
            return x
        if x.data_ptr() % 16:
            unaligned.append(place)
        return torch.empty(0, dtype=x.dtype, device="meta")

    given = {name: described(arguments[name], i) for i, name in enumerate(kernel.arg_names)}
    function = getattr(kernel, "fn", kernel)
    job = (function.__module__, function.__name__, given, config, architecture, unaligned)
    if repr(job) not in _known:
        _known[repr(job)] = worker().submit(_compile, *job).result()
    return _known[repr(job)]


def _compile(module: str, name: str, arguments: dict, config, architecture: str, unaligned: list[tuple]) -> Compiled:
    import triton
    from miras_kernels.kernels.common import launch
    from miras_kernels.kernels.offline import compile as offline
    from triton.backends.nvidia.compiler import CUDABackend

    CUDABackend.make_cubin = lambda self, *_: b""
    kernel = getattr(importlib.import_module(module), name)
    source = offline.source(offline.Launch(kernel, arguments, config))
    for place in unaligned:
        source.attrs.pop(place, None)
    found = triton.compile(source, target=offline.TARGETS[architecture], options=launch.options(config, architecture))
    taken = []
    for x in kernel.arg_names:
        kind = source.signature[x]
        parts = [(i, part) for i, part in enumerate(kind)] if isinstance(kind, tuple) else [(None, kind)]
        taken += [(x, i) for i, part in parts if part != "constexpr"]
    return Compiled(found.asm["ptx"], found.metadata.shared, taken)


@functools.lru_cache
def registers(ptx: str, entry: str = r"[\w$]+") -> int:
    """Registers of a thread, by ptxas, which compiles this entry only."""
    from triton.backends.nvidia.compiler import get_ptxas

    target, name = re.search(r"\.target\s+(\w+)", ptx)[1], re.search(rf"\.entry\s+({entry})\W", ptx)[1]
    newer = int(re.search(r"\.version\s+(\d+)", ptx)[1]) >= 9  # nvcc's: Triton's assembler for the older chips lacks it
    ptxas = get_ptxas(100 if newer else int(target[3:].rstrip("a"))).path
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [ptxas, "-v", "--fmad=false", f"--gpu-name={target}", f"--entry={name}", "-o", "/dev/null", file.name]
        found = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(re.search(rf"entry function '{re.escape(name)}'.*?Used (\d+) registers", found.stderr, re.S)[1])
