"""Kernels written by hand, for tests of the machine."""

from __future__ import annotations

import textwrap

import torch

from .host import Launch

REGISTERS = ".reg .pred %p<9>; .reg .b16 %h<9>; .reg .b32 %r<40>; .reg .b64 %d<20>;"
#: every thread's element of the 32-bit tensors a and b: addresses %d1, %d2; %r1 is the thread, %r2 the CTA
PROLOGUE = """
    ld.param.b64 %d1, [k_param_0];
    ld.param.b64 %d2, [k_param_1];
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, %ctaid.x;
    mov.u32 %r3, %ntid.x;
    mad.lo.s32 %r3, %r2, %r3, %r1;
    mad.wide.u32 %d3, %r3, 4, %d1;
    mad.wide.u32 %d4, %r3, 4, %d2;
    shl.b32 %r4, %r1, 2;
    mov.b32 %r5, smem;
    add.s32 %r6, %r5, %r4;
"""


def kernel(body: str, threads: int = 64, prologue: str = PROLOGUE) -> str:
    return textwrap.dedent(f"""
        .version 8.0
        .target sm_90a
        .extern .shared .align 16 .b8 smem[];
        .visible .entry k(.param .u64 k_param_0, .param .u64 k_param_1)
        .reqntid {threads}
        {{
            {REGISTERS}
            {prologue}
            {body}
            ret;
        }}
        """)


def run(
    body: str, *tensors: torch.Tensor, threads: int = 64, ctas: int = 1, shared: int = 4096, prologue: str = PROLOGUE, cluster: int = 1
) -> list[str]:
    """The kinds of fault that are reported."""
    reports, _ = Launch(kernel(body, threads, prologue), list(tensors), (ctas,), shared, cluster=cluster).run()
    return [x.kind for x in reports]


def ints(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31, (count,), dtype=torch.int32, generator=torch.Generator().manual_seed(seed))
