"""Check an installed package: `python tests/installed.py` runs the C++ kernels of both memories, forward, backward and decoding.

cibuildwheel runs it for every wheel (pyproject.toml), tests/core/test_packaging.py in new environments. It needs no pytest.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import miras_kernels as mk
from miras_kernels import _C
from miras_kernels.testing import Case, check, check_steps

CASES = [
    Case("linear", bias=mk.Huber(), tokens=80, chunk_size=32),
    Case("linear-packed", decay="channel", momentum=True, lengths=(40, 17), seed=1),
    Case("mlp", memory="mlp", retention=mk.LqRetention(), key_dim=16, value_dim=16, hidden=32, tokens=40, chunk_size=16, seed=2),
]


def main() -> int:
    where = Path(mk.__file__).resolve().parent
    print(f"miras-kernels {mk.__version__} in {where}, torch {torch.__version__}, {_C.cpu_capability()}")
    if Path(__file__).resolve().parent.parent in where.parents and "site-packages" not in where.parts:
        sys.exit("expected an installed package, but miras_kernels was imported from the source tree")
    for threads in (1, 2):
        torch.set_num_threads(threads)
        reports = [check(case, "cpp") for case in CASES] + [check(CASES[0], "cpp", torch.bfloat16)]
        reports += [check_steps(case, "cpp", cuts=range(case.tokens - 8, case.tokens + 1)) for case in CASES if case.lengths is None]
        for report in reports:
            if not report.ok:
                sys.exit(str(report))
    print("right")
    return 0


if __name__ == "__main__":
    sys.exit(main())
