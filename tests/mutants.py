"""Mutation testing: one-line faults (mutants), each with the tests that must fail with it (mutant_table.py). ``make mutants``
lists those that survive.

Each mutant is applied alone to a copy of the source tree, in which only its tests run, up to the first failure. The mutants of the C++
kernels are compiled together, each behind a condition that an environment variable enables. Without a mutant the tests must pass.

    python tests/mutants.py [-k NAME] [-j PROCESSES]
"""

from __future__ import annotations

import argparse
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mutant_table import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parent.parent


def occurrences(mutant: Mutant) -> int:
    return (ROOT / mutant.file).read_text(encoding="utf-8").count(mutant.text)


# ---------------------------------------------------------------------------------------------------------------- running

#: inserted at the top of a C++ source that has mutants
SWITCH = """#ifndef MIRAS_MUTANTS
#define MIRAS_MUTANTS
#include <cstdlib>
inline const int miras_mutant = std::getenv("MIRAS_MUTANT") ? std::atoi(std::getenv("MIRAS_MUTANT")) : 0;
#endif
"""


def copied(folder: Path, tree: Path = ROOT) -> Path:
    """Copy the source tree without build products, except the C++ kernels, so that it can be imported before an installed package."""
    ignored = shutil.ignore_patterns(".git", ".venv", "build", "dist", "__pycache__", ".*_cache", ".hypothesis", "out")
    shutil.copytree(tree, folder, ignore=ignored, symlinks=True)
    link = folder / "python" / "miras_kernels" / "kernels"
    link.unlink(missing_ok=True)
    link.symlink_to(folder / "kernels")
    return folder


def pytest(tree: Path, tests: tuple[str, ...], **environment: str) -> subprocess.CompletedProcess:
    """Run tests in a copy."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow", "-p", "no:cacheprovider", *tests]
    path = os.pathsep.join(filter(None, [str(tree / "python"), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", **environment}
    return subprocess.run(command, cwd=tree / "tests", env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)


def replace(tree: Path, mutant: Mutant, replacement: str) -> None:
    path = tree / mutant.file
    text = path.read_text(encoding="utf-8")
    assert text.count(mutant.text) == 1, mutant.name
    path.write_text(text.replace(mutant.text, replacement), encoding="utf-8")


def build(tree: Path, mutants: list[Mutant]) -> None:
    """Compile the kernels with all these mutants; MIRAS_MUTANT=i enables the i-th."""
    for i, mutant in enumerate(mutants, 1):
        replace(tree, mutant, f"(miras_mutant == {i} ? ({mutant.replacement}) : ({mutant.text}))")
    for file in {mutant.file for mutant in mutants}:
        path = tree / file
        path.write_text(SWITCH + path.read_text(encoding="utf-8"), encoding="utf-8")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # of ninja
    env = {**os.environ, "MIRAS_REQUIRE_CPP": "1", "MIRAS_CUDA": "0", "PATH": path}
    done = subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=tree, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the kernels with mutants do not compile:\n{done.stdout[-5000:]}{done.stderr[-2000:]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-k", default="", metavar="NAME", help="only mutants whose name contains this")
    parser.add_argument("-j", type=int, default=2, metavar="PROCESSES", help="so many at a time")
    args = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if args.k in mutant.name]
    if runpy.run_path(str(ROOT / "csrc" / "cuda" / "build.py"))["nvcc"]() is None:
        print("mutants of csrc/cuda are left out: there is no nvcc here")
        chosen = [mutant for mutant in chosen if not mutant.file.startswith("csrc/cuda/")]
    wrong = [f"{m.name}: its text occurs {occurrences(m)} times in {m.file}" for m in chosen if occurrences(m) != 1]
    if wrong or not chosen:
        print("\n".join(wrong) or f"no mutant's name contains {args.k!r}", file=sys.stderr)
        return 2
    compiled = [mutant for mutant in chosen if mutant.compiled]

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.j) as pool:
        right, switched = copied(Path(folder, "right")), Path(folder, "switched")
        if compiled:
            build(copied(switched, right), compiled)

        def sound() -> subprocess.CompletedProcess:
            tests = tuple(dict.fromkeys(test for mutant in chosen for test in mutant.tests))
            return pytest(switched if compiled else right, tests)

        def run(mutant: Mutant) -> tuple[str, float]:
            began = time.perf_counter()
            if mutant.compiled:
                done = pytest(switched, mutant.tests, MIRAS_MUTANT=str(compiled.index(mutant) + 1))
            else:
                tree = copied(Path(folder, mutant.name), right)
                replace(tree, mutant, mutant.replacement)
                done = pytest(tree, mutant.tests)
                shutil.rmtree(tree)
            broken = f"NOT RUN: pytest ended with {done.returncode}\n{done.stdout[-2000:]}"
            return {0: "SURVIVED", 1: "caught"}.get(done.returncode, broken), time.perf_counter() - began

        first, outcomes = pool.submit(sound), []
        for mutant, (outcome, seconds) in zip(chosen, pool.map(run, chosen), strict=True):
            outcomes.append(outcome)
            print(f"{mutant.name:60s} {mutant.file:45s} {seconds:4.0f} s  {outcome}", flush=True)
        if first.result().returncode != 0:
            print(f"the tests fail without a mutant too:\n{first.result().stdout[-3000:]}", file=sys.stderr)
            return 2
    print(f"{outcomes.count('caught')} of {len(chosen)} mutants caught")
    return 0 if outcomes.count("caught") == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
