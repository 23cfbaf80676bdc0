"""Constants of GPUs for the modelled times of `python -m bench.gpu counts`. They are published figures, not measurements of this project.

Sources: [W] NVIDIA's architecture white papers and data sheets (A100, H100, H200); [G] the CUDA C++ programming guide, tables of compute
capabilities and of arithmetic throughput; [M] microbenchmarks: arXiv 2402.13499 (memory latencies of A100 and H100, wgmma), arXiv
2206.02874 (mma on A100); [E] estimated here, for want of a published figure. Latencies are rounded: the model is not more exact than that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

__all__ = ["CHIPS", "Chip"]


@dataclasses.dataclass(frozen=True)
class Chip:
    """Rates are per multiprocessor and clock cycle; latencies are in clock cycles, from issue until a dependent instruction may issue."""

    name: str
    architecture: str
    multiprocessors: int  # [W]
    clock: float  # Hz, that of the data sheet's matrix rate [W]
    dram: float  # bytes/s [W]
    l2: float  # bytes from L2: 5,120 a cycle for all multiprocessors of an A100 [W]; taken for Hopper too [E]
    tensor: float  # FLOP of 16-bit matrix products [W]
    latencies: Mapping[str, float]  # by kind of instruction (tests/ptx/counts.py)
    issue: float = 4.0  # instructions of warps: four schedulers [G]
    shared: float = 1.0  # wavefronts of 128 bytes [G]
    float32: float = 4.0  # instructions of warps: 128 lanes [G]
    special: float = 0.5  # 16 lanes [G]
    registers: int = 65536  # [G]
    shared_bytes: int = 227 * 1024  # for one program; all of them together have 1 KiB more, of which each takes 1 KiB more [G]
    threads: int = 2048  # [G]
    programs: int = 32  # [G]
    launch: float = 3e-6  # s from the end of a kernel to the start of the next in one stream [E]


#: "global": a hit in L2; "dram": a miss; "tensor": after the product's own cycles; "cluster": another multiprocessor's shared memory [M],
#: and from a block's arrival at a cluster's barrier until the others know of it [E]
_AMPERE = {
    "integer": 4, "fma": 4, "float": 4, "move": 4, "convert": 6, "control": 8, "special": 18, "shuffle": 23, "shared": 29, "barrier": 20,
    "tensor": 18, "global": 262, "dram": 466,
}  # fmt: skip
_HOPPER = _AMPERE | {"dram": 479, "cluster": 180}

CHIPS = {
    chip.name: chip
    for chip in (
        Chip("A100", "sm_80", 108, 1.41e9, 2.039e12, 47.0, 2048.0, _AMPERE, shared_bytes=163 * 1024),
        Chip("H100", "sm_90", 132, 1.83e9, 3.35e12, 47.0, 4096.0, _HOPPER),
        Chip("H200", "sm_90", 132, 1.83e9, 4.8e12, 47.0, 4096.0, _HOPPER),
    )
}
