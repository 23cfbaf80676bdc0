"""The CUDA C++ kernels as nvcc compiles them, on the machine.

The library's own host code launches them, with a stub instead of CUDA's runtime.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import fcntl
import hashlib
import os
import re
import runpy
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor

from miras_kernels.backends.cuda import CudaBackend

from .compiling import CACHE
from .host import Faults, Launch, poisoned, program

__all__ = ["build", "kept", "on_machine", "with_includes"]

SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
STUB = Path(__file__).with_name("cudart_stub.cpp")
RECEIVE = ctypes.CFUNCTYPE(None, ctypes.c_char_p, *[ctypes.c_uint] * 4, ctypes.POINTER(ctypes.c_void_p))


def build(nvcc: str, architecture: str = "sm_80") -> tuple[Path, dict[str, str]]:
    """The library for CPU tensors, and the PTX of every kernel by its name; kept in ``build/ptx`` until a source changes."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        folders = list(pool.map(lambda source: _compiled(nvcc, source, architecture), sorted(SOURCES.glob("*.cu"))))
    objects = [str(folder / "x.o") for folder in folders]
    library = kept("cuda", [*objects, STUB.read_text()], lambda to: _link(nvcc, objects, to)) / "on_machine.so"
    texts = [path.read_text() for folder in folders for path in folder.glob("*.ptx")]
    return library, {name: text for text in texts for name in re.findall(r"\.entry\s+(\w+)", text)}


def _compiled(nvcc: str, source: Path, architecture: str) -> Path:
    """The folder of a source's object and PTX: that which the library has for this chip."""
    options = runpy.run_path(str(SOURCES / "build.py"))
    chips = options["TARGETS"].get(source.name, options["ALIKE"])
    virtual = next(virtual for virtual, names in chips.items() if {architecture, f"{architecture}a"} & {*names})
    command = [nvcc, "-std=c++17", "-O3", "-lineinfo", f"-I{SOURCES.parent}", f"-gencode=arch={virtual},code={virtual}"]
    command += ["-Xcompiler", "-fPIC", "-c", str(source)]

    def make(folder: Path) -> None:
        subprocess.run([*command, "-keep", f"--keep-dir={folder}", "-o", str(folder / "x.o")], check=True)
        for path in folder.iterdir():
            if path.suffix not in (".ptx", ".o"):
                path.unlink()

    return kept(f"cuda-{source.stem}-{virtual}", [*(x.read_text() for x in with_includes(source)), *command, os.path.realpath(nvcc)], make)


def _link(nvcc: str, objects: list[str], folder: Path) -> None:
    command = [nvcc, "-cudart", "none", "-shared", "-Xcompiler", "-fPIC", *objects, str(STUB)]
    subprocess.run([*command, "-o", str(folder / "on_machine.so")], check=True)


def with_includes(source: Path) -> list[Path]:
    """A source and the files of csrc that it includes, in a fixed order."""
    found, left = [], [source]
    while left:
        path = left.pop()
        if path not in found:
            found.append(path)
            left += [(path.parent / name).resolve() for name in re.findall(r'#include "(.*)"', path.read_text())]
    return found


def kept(name: str, made_from: list[str], make: Callable[[Path], None]) -> Path:
    """A folder in ``build/ptx``, which processes that run tests make once."""
    folder = CACHE / f"{name}-{hashlib.sha256(''.join(made_from).encode()).hexdigest()[:16]}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            made = Path(tempfile.mkdtemp(dir=CACHE))
            make(made)
            made.rename(folder)
    return folder


@contextlib.contextmanager
def on_machine(
    built: tuple[Path, dict[str, str]], before: Callable[[Launch], None] | None = None, instead: Callable[[Launch], None] | None = None
) -> Iterator[CudaBackend]:
    """Within it the backend that this gives runs on CPU tensors. It knows those whose address was asked for. Arguments as in host.py."""
    path, entries = built
    backend, tensors, faults = CudaBackend(path, "cpu"), {}, []
    address = Tensor.data_ptr

    def noted(x: Tensor) -> int:
        tensors[address(x)] = x.detach()
        return address(x)

    def receive(name: bytes, blocks: int, cluster: int, threads: int, shared: int, arguments) -> None:
        try:
            entry = name.decode()
            given = [_argument(kind, arguments[i]) for i, kind in enumerate(_sizes(entries[entry], entry))]
            words = {int.from_bytes(x[i : i + 8], "little") for x in given if isinstance(x, bytes) for i in range(0, len(x) - 7, 8)}
            pointers = {at: x for at, x in tensors.items() if at in words}
            launch = Launch(entries[entry], given, (blocks,), shared, re.escape(entry), pointers, cluster=cluster)
            assert program(launch.ptx, launch.entry).kernel.threads == threads
            if before is not None:
                before(launch)
            if instead is not None:
                instead(launch)
            elif reports := launch.run()[0]:
                raise Faults(reports)
        except BaseException as error:  # C code is in between
            faults.append(error)

    callback = RECEIVE(receive)
    library, _ = backend._loaded
    library.miras_receive(callback)
    Tensor.data_ptr = noted
    try:
        with poisoned():
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
