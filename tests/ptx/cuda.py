"""The CUDA C++ kernels as nvcc compiles them, on the machine.

The library's own host code launches them, with a stub instead of CUDA's runtime.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor

from miras_kernels.backends.cuda import CudaBackend

from .compiling import CACHE
from .host import Faults, Launch, poisoned, program

__all__ = ["build", "on_machine"]

SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
STUB = Path(__file__).with_name("cudart_stub.cpp")
RECEIVE = ctypes.CFUNCTYPE(None, ctypes.c_char_p, *[ctypes.c_uint] * 4, ctypes.POINTER(ctypes.c_void_p))


def build(nvcc: str, architecture: str = "sm_80") -> tuple[Path, dict[str, str]]:
    """The library for CPU tensors, and the PTX of every kernel by its name; kept in ``build/ptx`` until a source changes."""
    given = [*sorted(SOURCES.glob("*.cu")), STUB]
    read = [*given, *SOURCES.glob("*.h"), *SOURCES.parent.glob("*.h"), Path(__file__)]
    name = hashlib.sha256(b"".join(path.read_bytes() for path in read) + os.path.realpath(nvcc).encode()).hexdigest()[:16]
    folder = CACHE / f"cuda-{architecture}-{name}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # processes that run tests compile it once
        if not folder.exists():
            made = Path(tempfile.mkdtemp(dir=CACHE))
            virtual = {"sm_90": "compute_90a"}.get(architecture, architecture.replace("sm", "compute"))  # as build.py
            target = f"-gencode=arch={virtual},code={virtual}"
            flags = ["-std=c++17", "-O3", "-lineinfo", f"-I{SOURCES.parent}", target, "--threads", "0"]
            flags += ["-keep", f"--keep-dir={made}"]
            result = ["-cudart", "none", "-shared", "-Xcompiler", "-fPIC", "-o", str(made / "on_machine.so")]
            subprocess.run([nvcc, *flags, *map(str, given), *result], check=True)
            for path in made.iterdir():
                if path.suffix not in (".ptx", ".so"):
                    path.unlink()
            made.rename(folder)
    texts = [path.read_text() for path in folder.glob("*.ptx")]
    return folder / "on_machine.so", {name: text for text in texts for name in re.findall(r"\.entry\s+(\w+)", text)}


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
