"""The C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer: forward, backward, pieces and steps of the test cases.

    make sanitize

Every case runs at every instruction set level of this machine, in float32 or bfloat16, with one thread or three. Any report ends the run
with an error. A thread's scratch is one allocation for all calls; in this build each array in it has its own guards and is initialised
with NaN (csrc/cpu/scratch.h), so results must be finite. First, planted errors must be reported.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILT = ROOT / "build" / "sanitize" / "miras_kernels"
COMPILER = os.environ.get("CXX", "c++").split()
FLAGS = ["-O1", "-g1", "-std=c++20", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]

SCRATCH = """
#define MIRAS_LEVEL portable
#define MIRAS_LANES 4
#include "cpu/pack.h"

int main(int count, char** words) {
  using namespace miras::cpu;
  const auto layout = [](portable::Arena& arena) { return arena.take(1, 24), arena.take(1, 16); };
  portable::Arena measure(nullptr);
  layout(measure);
  portable::Arena arena(thread_scratch(measure.used()));
  float* piece = layout(arena);
  const int at = count > 1 ? words[1][0] - '0' : 0;  // 0 to 9
  volatile int large = 0x7fffffff - 4;
  if (count > 2) return large + at > 0 ? 0 : 1;
  for (int i = 0; i < 16; ++i) piece[i] = 0.0f;
  return piece[10 + at] > 1.0f;
}
"""


def environment(**changes: str) -> dict[str, str]:
    """Python is not instrumented, so the sanitizer's library is preloaded, with libstdc++, whose exceptions it must find.

    Leaks are not reported: the interpreter and torch keep memory until the process ends.
    """
    libraries = []
    for name in ("libasan.so", "libstdc++.so.6"):
        found = subprocess.run([*COMPILER, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        if not Path(found).is_absolute():
            sys.exit(f"sanitize: expected {' '.join(COMPILER)} to have {name}, it has none")
        libraries.append(found)
    options = "detect_leaks=0:halt_on_error=1:abort_on_error=0:exitcode=99"
    return {
        **os.environ, "LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": options, "UBSAN_OPTIONS": "print_stacktrace=1:exitcode=99",
        "OMP_NUM_THREADS": "1", **changes,
    }  # fmt: skip


# ------------------------------------------------------------------------------------------- within the instrumented process


def load() -> None:
    """Import the instrumented extension instead of the one that ``miras_kernels`` would import."""
    import torch  # noqa: F401  its libraries

    [path] = BUILT.glob("_C.*.so")
    spec = importlib.util.spec_from_file_location("miras_kernels._C", path)
    sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[spec.name])


def run(first: int, every: int) -> None:
    """The cases ``first``, ``first + every``, ..."""
    load()
    sys.path.insert(0, str(ROOT / "tests"))
    import torch

    from miras_kernels.testing import evaluate
    from miras_kernels.testing.fuzzing import ROUTES
    from miras_kernels.testing.steps import read
    from served import SERVED

    cases = SERVED[first::every]
    for i, case in enumerate(cases):
        torch.set_num_threads(3 if i % 4 < 2 else 1)
        inputs = case.draw(torch.bfloat16 if i % 2 else torch.float32)
        results = [evaluate(inputs, "cpp")]
        if case.lengths is None:
            results.append(ROUTES["in pieces"](inputs, "cpp", 4))
        if case.lengths is None and case.initial == "dual" and not case.variants:
            results.append(read(inputs, "cpp", sorted({0, 1, min(3, case.tokens), case.tokens})))
        for name, x in (pair for result in results for pair in result.items()):
            assert x.isfinite().all(), f"{case}: {name} is not finite"
    print(f"{len(cases)} cases", flush=True)


def overrun() -> None:
    """A tensor that claims more tokens than its memory has."""
    load()
    import numpy as np
    import torch

    import miras_kernels as mk

    q = torch.zeros(1, 40, 1, 16)
    short = np.zeros((1, 32, 1, 16), np.float32)
    k = torch.from_numpy(np.lib.stride_tricks.as_strided(short, (1, 40, 1, 16)))
    mk.linear_memory(q, k, q, torch.zeros(1, 40, 1), chunk_size=16, backend="cpp")


# ----------------------------------------------------------------------------------------------------------- the whole run


def planted() -> None:
    """A read beyond a tensor, a read beyond an array in scratch, and an overflow are reported; the same programs without them are not."""
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder) / "scratch.cpp", Path(folder) / "scratch"
        source.write_text(SCRATCH, encoding="utf-8")
        command = [*COMPILER, *FLAGS, f"-I{ROOT / 'csrc'}", str(source), str(ROOT / "csrc/cpu/scratch.cpp"), "-o", str(program)]
        subprocess.run(command, check=True)
        plants = {
            (str(program), "5"): None,
            (str(program), "6"): "use-after-poison",
            (str(program), "3", "sum"): None,
            (str(program), "5", "sum"): "signed integer overflow",
            (sys.executable, __file__, "overrun"): "heap-buffer-overflow",
        }
        for words, report in plants.items():
            done = subprocess.run(words, capture_output=True, text=True, env=environment())
            caught = done.returncode != 0 and report in done.stderr if report else done.returncode == 0
            if not caught:
                sys.exit(f"sanitize: expected {report or 'no report'} of {' '.join(words)}, got {done.returncode}:\n{done.stderr[-3000:]}")


def checked(level: str, first: int, every: int) -> bool:
    began = time.monotonic()
    words = [sys.executable, __file__, "run", str(first), str(every)]
    done = subprocess.run(words, capture_output=True, text=True, env=environment(MIRAS_CPU_CAPABILITY=level))
    print(f"{level}, {first} of {every}: {done.stdout.strip()}, {time.monotonic() - began:.0f} s", flush=True)
    if done.returncode:
        print(done.stderr[-10000:], file=sys.stderr, flush=True)
    return done.returncode == 0


def main() -> int:
    began = time.monotonic()
    planted()
    program = "import torch; from miras_kernels import _C; print(*_C.cpu_capabilities()); print(*_C.cpu_capabilities_by_name())"
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    levels, by_name = map(str.split, said.splitlines())
    jobs = [(level, half, 2) for level in levels for half in range(2)]
    jobs += [(level, 0, 5) for level in by_name]
    with ThreadPoolExecutor(2) as pool:
        right = list(pool.map(lambda job: checked(*job), jobs))
    print(f"sanitize: {'no report' if all(right) else 'WRONG'}, {time.monotonic() - began:.0f} s")
    return 0 if all(right) else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["run"]:
        run(*map(int, sys.argv[2:]))
    elif sys.argv[1:] == ["overrun"]:
        overrun()
    else:
        sys.exit(main())
