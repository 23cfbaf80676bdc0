"""The elementary functions of the C++ kernels against float64, within the bounds that docs/backends.md states."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from miras_kernels import _C
from quick import slow

ROOT = Path(__file__).resolve().parents[2]
LANES = {"avx512": 16, "avx2": 8, "portable": 4}


def stated() -> dict[str, float]:
    """Bounds by function, of the table in the docs."""
    section = (ROOT / "docs/backends.md").read_text(encoding="utf-8").partition("## Elementary functions")[2].partition("\n## ")[0]
    return {name: float(bound) for name, bound in re.findall(r"^\| `([^`]+)` \|[^|]*\| ([\d.]+) ulp", section, re.MULTILINE)}


@pytest.mark.parametrize(("level", "stride"), [("portable", 150001), *(slow(level, 97) for level in LANES)])
def test_within_the_stated_bounds(level, stride, tmp_path):
    if level not in _C.cpu_capabilities():
        pytest.skip(f"this machine has no {level}")
    source = (ROOT / f"csrc/cpu/level_{level}.cpp").read_text(encoding="utf-8")
    target = re.search(r'#pragma GCC target\("([^"]+)"\)', source)
    flags = [f"-m{name}" for name in target.group(1).split(",")] if target else []
    flags += ["-O2", "-std=c++20", f"-I{ROOT / 'csrc'}", f"-DMIRAS_LEVEL={level}", f"-DMIRAS_LANES={LANES[level]}"]
    command = [*os.environ.get("CXX", "c++").split(), *flags, str(ROOT / "tests/cpp/accuracy.cpp"), "-o", str(tmp_path / "accuracy")]
    subprocess.run(command, check=True)
    done = subprocess.run([str(tmp_path / "accuracy"), str(stride)], capture_output=True, text=True, check=True)
    found = {name: (float(error), where) for name, error, where in map(str.split, done.stdout.splitlines())}
    bounds = stated()
    assert {name.partition("(")[0] for name in found} == set(bounds)
    for name, (error, where) in found.items():
        assert error <= bounds[name.partition("(")[0]], f"{name}({where}) is wrong by {error}"
