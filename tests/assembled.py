"""The CUDA C++ kernels' objects, as the library has them, and what nvcc's assembler says of them: registers and spills."""

from __future__ import annotations

import importlib.util
import json
import operator
import os
import re
import subprocess
from pathlib import Path

from ptx import cuda as machine

SOURCES = Path(__file__).resolve().parents[1] / "csrc" / "cuda"
_spec = importlib.util.spec_from_file_location("build_cuda", SOURCES / "build.py")
build = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(build)
NVCC, compile_source = build.nvcc(), build.compile_source
#: by nvcc's version, architecture and kernel: registers, and bytes of spill stores and loads
TABLE = Path(__file__).with_name("cuda") / "resources.json"


def compiled(source: Path) -> Path:
    """The folder of a source's object, ``x.o``, and the assembler's report, ``said.txt``; kept in ``build/ptx`` until a source changes."""

    def make(folder: Path) -> None:
        (folder / "said.txt").write_text(compile_source(NVCC, source, folder / "x.o", "-Xptxas", "-v"))

    made_from = [*(x.read_text() for x in machine.with_includes(source)), *build.COMPILE, *build.targets(source), os.path.realpath(NVCC)]
    return machine.kept(f"library-{source.stem}", made_from, make)


def assembled(source: str, architecture: str) -> str:
    """The assembler's report on the kernels of a file of csrc/cuda, for one of the chips that the library has machine code for."""
    said = (compiled(SOURCES / source) / "said.txt").read_text()
    assert "warning" not in said, said
    assert "serialized" not in said, said  # what it says if it waits for each product of a warpgroup
    found = re.findall(rf"Compiling entry function '\w+' for '{architecture}'.*?(?=Compiling entry function|\Z)", said, re.S)
    return "".join(found)


def assert_no_worse(found: dict[str, list[int]], architecture: str, prefix: str) -> None:
    """With the table's compiler, its rows whose names begin with ``prefix`` are the limit."""
    version = re.search(r"V([\d.]+)", subprocess.run([NVCC, "--version"], capture_output=True, text=True, check=True).stdout)[1]
    if version in (table := json.loads(TABLE.read_text())):
        limits = {name: x for name, x in table[version][architecture].items() if name.startswith(prefix)}
        assert found.keys() == limits.keys()
        worse = {name: (used, limits[name]) for name, used in found.items() if any(map(operator.gt, used, limits[name]))}
        assert not worse, worse
