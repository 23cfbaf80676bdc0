"""Compile the CUDA kernels with nvcc, without torch: `python csrc/cuda/build.py miras_kernels/_cuda.so`, which prints the library's size
and the time. Used by setup.py and the tests.

CUDA_HOME    where nvcc is, if it is not on the PATH
"""

from __future__ import annotations

import concurrent.futures
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = sorted(HERE.glob("*.cu"))
HEADERS = [*HERE.glob("*.h"), *HERE.parent.glob("*.h")]
#: PTX and the chips that it becomes machine code for. Other chips of the same generations run that too; later ones compile the last PTX,
#: which the library keeps, when they first use it. Chips that use the same instructions of a source share its PTX: it takes as long as
#: machine code, or longer.
ALIKE = {"compute_80": ["sm_80", "sm_90"]}
CLUSTERS = {"compute_80": ["sm_80"], "compute_90": ["sm_90"]}
WARPGROUPS = {"compute_90a": ["sm_90a"], "compute_80": ["sm_80"]}
TARGETS = dict.fromkeys(("mlp_chain.cu", "mlp_replay.cu", "mlp_reverse.cu"), CLUSTERS) | {
    "linear_reverse.cu": WARPGROUPS,
    "linear_reverse_largest.cu": {"compute_80": ["sm_80"], "compute_90a": ["sm_90a"], "compute_90": []},
}
COMPILE = ["-std=c++17", "-O3", f"-I{HERE.parent}", "-Xcompiler", "-fPIC", "-Xfatbin", "-compress-all"]


def nvcc() -> str | None:
    """The path of the compiler, or None."""
    for home in filter(None, (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"))):
        found = shutil.which("nvcc", path=str(Path(home) / "bin"))
        if found:
            return found
    return shutil.which("nvcc")


def targets(source: Path) -> list[str]:
    """The options that say for what a source is compiled."""
    chips = TARGETS.get(source.name, ALIKE)
    kept = [*chips][-1]
    return [f"-gencode=arch={x},code=[{','.join([*names, x] if x == kept else names)}]" for x, names in chips.items()]


def run(command: list[str]) -> str:
    """Run a compiler and return what it printed; its first error is a RuntimeError."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    if done.returncode:
        errors = [line for line in said.splitlines() if "error" in line]
        raise RuntimeError(errors[0] if errors else f"nvcc ended with {done.returncode}")
    return said


def compile_source(compiler: str, source: Path, to: Path, *options: str) -> str:
    """Compile a source for all its chips and return what the compiler printed."""
    return run([compiler, *COMPILE, *targets(source), *options, "-c", str(source), "-o", str(to)])


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
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [Path(folder, f"{x.stem}.o") for x in SOURCES]
        list(pool.map(lambda source, to: compile_source(compiler, source, to, "--threads", "0"), SOURCES, objects))
        run([compiler, "-shared", *map(str, objects), "-o", str(library)])


if __name__ == "__main__":
    try:
        library, began = Path(sys.argv[1]), time.perf_counter()
        build(library)
        print(f"{library}: {library.stat().st_size / 1e6:.1f} MB in {time.perf_counter() - began:.0f} s")
    except (IndexError, RuntimeError) as error:
        sys.exit(f"{sys.argv[0]}: {error if isinstance(error, RuntimeError) else 'expected the path of the library'}")
