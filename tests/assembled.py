"""What nvcc's assembler says of the CUDA C++ kernels: registers and spills."""

from __future__ import annotations

import json
import operator
import re
import runpy
import subprocess
from pathlib import Path

from ptx import cuda as machine

SOURCES = Path(__file__).resolve().parents[1] / "csrc" / "cuda"
NVCC = runpy.run_path(str(SOURCES / "build.py"))["nvcc"]()
#: by nvcc's version, architecture and kernel: registers, and bytes of spill stores and loads
TABLE = Path(__file__).with_name("cuda") / "resources.json"


def assembled(source: str, architecture: str, folder: Path) -> str:
    """The assembler's report on the PTX of a file of csrc/cuda; without a warning."""
    command = [NVCC, f"-arch={architecture}", "-Xptxas", "-v", "-cubin", str(machine.text(NVCC, SOURCES / source, architecture))]
    done = subprocess.run([*command, "-o", str(folder / "x.cubin")], capture_output=True, text=True, check=True)
    assert "warning" not in done.stderr, done.stderr
    return done.stderr


def assert_no_worse(found: dict[str, list[int]], architecture: str, prefix: str) -> None:
    """With the table's compiler, its rows whose names begin with ``prefix`` are the limit."""
    version = re.search(r"V([\d.]+)", subprocess.run([NVCC, "--version"], capture_output=True, text=True, check=True).stdout)[1]
    if version in (table := json.loads(TABLE.read_text())):
        limits = {name: x for name, x in table[version][architecture].items() if name.startswith(prefix)}
        assert found.keys() == limits.keys()
        worse = {name: (used, limits[name]) for name, used in found.items() if any(map(operator.gt, used, limits[name]))}
        assert not worse, worse
