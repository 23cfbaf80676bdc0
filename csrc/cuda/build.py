"""Compile the CUDA kernels with nvcc, without torch: `python csrc/cuda/build.py miras_kernels/_cuda.so`, which prints the library's size
and the time. Used by setup.py and the tests.

CUDA_HOME    where nvcc is, if it is not on the PATH
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = sorted(HERE.glob("*.cu"))
HEADERS = [*HERE.glob("*.h"), *HERE.parent.glob("*.h")]
#: the library has machine code for these; other chips of the same generations run it too, and later ones compile the PTX of the last.
#: sm_90a: with the products of warpgroups
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")
COMPILE = ["-std=c++17", "-O3", f"-I{HERE.parent}", "-Xcompiler", "-fPIC"]


def nvcc() -> str | None:
    """The path of the compiler, or None."""
    for home in filter(None, (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"))):
        found = shutil.which("nvcc", path=str(Path(home) / "bin"))
        if found:
            return found
    return shutil.which("nvcc")


def known(compiler: str) -> list[str]:
    """The architectures that this nvcc can compile for: versions before 12.8 lack sm_100."""
    listed = subprocess.run([compiler, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    return [name for name in ARCHITECTURES if name in listed]


def build(library: Path) -> None:
    """Compile all sources into one shared library, unless it is newer than they are.

    Raises:
        RuntimeError: with nvcc's message.
    """
    if library.exists() and library.stat().st_mtime > max(x.stat().st_mtime for x in [*SOURCES, *HEADERS]):
        return
    compiler = nvcc()
    if compiler is None:
        raise RuntimeError("there is no nvcc, neither in CUDA_HOME nor on the PATH")
    *others, last = known(compiler)
    targets = [f"-gencode=arch={x.replace('sm', 'compute')},code={x}" for x in others]
    virtual = last.replace("sm", "compute")
    targets.append(f"-gencode=arch={virtual},code=[{last},{virtual}]")
    command = [compiler, *COMPILE, "-shared", "--threads", "0", *targets, *map(str, SOURCES), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in (done.stdout + done.stderr).splitlines() if "error" in line]
        raise RuntimeError(said[0] if said else f"nvcc ended with {done.returncode}")


if __name__ == "__main__":
    try:
        library, began = Path(sys.argv[1]), time.perf_counter()
        build(library)
        print(f"{library}: {library.stat().st_size / 1e6:.1f} MB in {time.perf_counter() - began:.0f} s")
    except (IndexError, RuntimeError) as error:
        sys.exit(f"{sys.argv[0]}: {error if isinstance(error, RuntimeError) else 'expected the path of the library'}")
