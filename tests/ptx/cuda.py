"""The CUDA C++ kernels as nvcc compiles them, on the machine.

The library's own host code launches them, with a stub instead of CUDA's runtime.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor

from miras_kernels.backends.cuda import CudaBackend

from .host import Faults, Launch, program
from .shadow import Report

__all__ = ["build", "on_machine"]

SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
STUB = Path(__file__).with_name("cudart_stub.cpp")
RECEIVE = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint, ctypes.c_uint, ctypes.POINTER(ctypes.c_void_p))


def build(nvcc: str, folder: Path, architecture: str = "sm_80") -> tuple[Path, dict[str, str]]:
    """The library for CPU tensors, and the PTX of every kernel by its name without what nvcc says of the file."""
    flags = [nvcc, "-std=c++17", "-O3", "-lineinfo", f"-I{SOURCES.parent}", f"-arch={architecture.replace('sm', 'compute')}"]
    entries = {}
    for source in sorted(SOURCES.glob("*.cu")):
        target = folder / f"{source.stem}.ptx"
        subprocess.run([*flags, "-ptx", str(source), "-o", str(target)], check=True)
        text = target.read_text()
        entries |= {plain(name): text for name in re.findall(r"\.entry\s+(\w+)", text)}
    library = folder / "on_machine.so"
    sources = [*map(str, sorted(SOURCES.glob("*.cu"))), str(STUB)]
    command = [*flags, "-cudart", "none", "-shared", "-Xcompiler", "-fPIC", *sources, "-o", str(library)]
    subprocess.run(command, check=True)
    return library, entries


def plain(name: str) -> str:
    """A mangled name without the hash of an anonymous namespace."""
    return re.sub(r"\d+_GLOBAL__N__[0-9a-f]+_\d+_\w+?_cu_[0-9a-f]{8}", "", name)


@contextlib.contextmanager
def on_machine(
    built: tuple[Path, dict[str, str]], allowed: Callable[[Report], bool] | None = None, before: Callable[[Launch], None] | None = None
) -> Iterator[CudaBackend]:
    """Within it the backend that this gives runs on CPU tensors. It knows those whose address was asked for."""
    path, entries = built
    backend, tensors, faults = CudaBackend(path, "cpu"), {}, []
    address = Tensor.data_ptr

    def noted(x: Tensor) -> int:
        tensors[address(x)] = x.detach()
        return address(x)

    def receive(name: bytes, blocks: int, threads: int, shared: int, arguments) -> None:
        try:
            key = plain(name.decode())
            found = re.search(rf"\.entry\s+(\w+{re.escape(key[key.index('cuda') + 4 :])})\(", entries[key])[1]
            given = [_argument(kind, arguments[i]) for i, kind in enumerate(_sizes(entries[key], found))]
            words = {int.from_bytes(x[i : i + 8], "little") for x in given if isinstance(x, bytes) for i in range(0, len(x) - 7, 8)}
            pointers = {at: x for at, x in tensors.items() if at in words}
            launch = Launch(entries[key], given, (blocks,), shared, re.escape(found), pointers)
            assert program(launch.ptx, launch.entry).kernel.threads == threads
            if before is not None:
                before(launch)
            reports = [x for x in launch.run()[0] if allowed is None or not allowed(x)]
            if reports:
                raise Faults(reports)
        except BaseException as error:  # C code is in between
            faults.append(error)

    callback = RECEIVE(receive)
    library, _ = backend._loaded
    library.miras_receive(callback)
    Tensor.data_ptr = noted
    try:
        yield backend
    finally:
        Tensor.data_ptr = address
        if faults:
            raise faults[0]


def _sizes(ptx: str, entry: str) -> list[int]:
    """Bytes of each parameter; a struct's are negative."""
    header = re.search(rf"\.entry\s+{re.escape(entry)}\((.*?)\)\s", ptx, re.S)[1]
    kinds = re.findall(r"\.param\s+(?:\.align\s+\d+\s+)?\.[bus](\d+)\s+\w+(?:\[(\d+)\])?", header)
    return [-int(length) if length else int(bits) // 8 for bits, length in kinds]


def _argument(size: int, address: int):
    data = ctypes.string_at(address, abs(size))
    return data if size < 0 else int.from_bytes(data, "little", signed=True)
