"""The C++ kernels on this CPU: parity first, then times against PyTorch, all in one run.

    python -m bench.cpu                        everything, markdown on stdout
    python -m bench.cpu --json out.json        and JSON; --plots FOLDER draws it
    python -m bench.cpu --quick                about a minute: one thread, no torch.compile, fewer cases
    python -m bench.cpu --only shapes,bias     some studies; --list names them
    python -m bench.cpu --base HEAD            this tree against another commit of it
    python -m bench.cpu --stages               the time of every stage of a chunk

Every study has a fresh process, with the same malloc settings for all implementations. docs/benchmarks.md explains the numbers.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from . import base, delta_rule, hybrid, program, report, scaling, stages, studies, targets, wrappers
from .cases import LINEAR_SHAPES, ONE_OF_EACH, SHAPES, Settings


def jobs(only: Sequence[str], shapes: Sequence[str], threads: Sequence[int], settings: Settings) -> list[tuple[str, str, int]]:
    """``(study, case, threads)`` in order. The comparison with PyTorch runs at every thread count, the rest at the first."""
    found = []
    pair = [shape for shape in shapes if shape in ONE_OF_EACH] or [shapes[0]]
    for study in only:
        if study == "shapes":
            found += [(study, shape, n) for n in threads for shape in shapes]
        elif study in ("checkpoint", "memory", "recurrence"):
            found += [(study, shape, threads[0]) for shape in (pair if study == "recurrence" else shapes)]
        elif study == "scaling":
            several = [max(threads)] if max(threads) > 1 else []
            axes = {"tokens": threads[:1], "heads": threads, "threads": several, "one head": several}
            for shape in pair:
                own = axes | ({"coupled head": several} if shape in LINEAR_SHAPES else {})
                found += [(study, f"{shape}, {axis}", n) for axis, counts in own.items() for n in counts]
        elif study == "delta rule":
            found += [(study, size, threads[0]) for size in delta_rule.SIZES]
        elif study == "hybrid":
            found += [(study, name, threads[0]) for name in hybrid.RUNS]
        elif study == "wrappers":
            found += [(study, name, threads[0]) for name in wrappers.RUNS]
        elif study != "capability" or settings.backend == "cpp":
            found.append((study, shapes[0], threads[0]))
    return found


PROGRAM = program.Program(
    module="bench.cpu", title="miras-kernels on the CPU",
    studies={**studies.STUDIES, **delta_rule.STUDIES, **hybrid.STUDIES, **scaling.STUDIES, **wrappers.STUDIES},
    helpers={**studies.HELPERS, **scaling.HELPERS, **base.STUDIES, **stages.STUDIES}, quick=("shapes", "bias", "decay"),
    shapes=tuple(SHAPES), jobs=jobs,
    targets=targets.targets, sections=report.SECTIONS, seconds=(8.0, 1.0), min_rounds=(7, 3),
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(program.main(PROGRAM))
