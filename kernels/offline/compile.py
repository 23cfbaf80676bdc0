"""Compile the kernels without the chip they are for, and read registers, spills and shared memory from the machine code.

The launchers themselves run, on meta tensors, and what they would launch is compiled instead.
"""

from __future__ import annotations

import dataclasses
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ...decode.buffers import Buffers
from ..common import configs, launch
from ..decode.stepper import stepper
from ..linear import sequence as linear
from ..mlp import sequence as mlp

__all__ = ["TARGETS", "Resources", "compile_launch", "recorded", "recorded_step"]

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
POINTERS = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64", torch.int32: "*i32",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Launch:
    """One recorded launch."""

    kernel: object
    arguments: dict
    config: configs.Config


@dataclasses.dataclass(frozen=True)
class Resources:
    """What the compiled code needs.

    Attributes:
        registers: per thread. spills: bytes of local memory per thread (AMD: spilled vector registers).
        shared: bytes per program. tensor: the kind of matrix instructions, "" if there are none.
    """

    registers: int
    spills: int
    shared: int
    tensor: str


def recorded(call, every: int, architecture: str = "") -> list[Launch]:
    """The launches of a call's forward and backward on an architecture. Tensors may be on the meta device."""
    found = []
    with launch.recording(lambda *what: found.append(Launch(*what)), architecture):
        p, matrices = launch.Problem(call), [torch.empty_like(x) for x in call.state.matrices()]
        memory = linear if call.memory.name == "linear" else mlp
        _, _, checkpoints = memory.forward(p, every, call.output_final_state, call.output_final_state)
        memory.backward(p, checkpoints, every, torch.empty_like(call.v), matrices)
    return found


def recorded_step(call, architecture: str = "") -> list[Launch]:
    """The same for a decoding step with the tokens of a call."""
    channels = call.log_decay is not None and call.log_decay.dim() == 4
    found, x = [], Buffers.empty(call.state, call.chunk_size, call.retention, channels)
    with launch.recording(lambda *what: found.append(Launch(*what)), architecture):
        run = stepper(call)
        run(x, call.q, call.k, call.v, call.lr, call.log_decay, call.delta, call.momentum, torch.empty_like(call.v))
    return found


def source(given: Launch) -> ASTSource:
    """The launch specialised as Triton's launcher does it: None and 1 are constants, multiples of 16 are marked."""
    constexprs, signature, attributes = {}, {}, {}

    def kind(x, place: tuple[int, ...], constant: bool, general: bool):
        """The type of an argument, or of one of a tuple's members."""
        if isinstance(x, tuple) and not constant:
            return type(x)(*(kind(member, (*place, i), constant, general) for i, member in enumerate(x)))
        if constant or x is None or (isinstance(x, int) and x == 1 and not general):
            constexprs[place] = x
            return "constexpr"
        if isinstance(x, Tensor) or (x % 16 == 0 and not general):
            attributes[place] = [["tt.divisibility", 16]]
        return POINTERS[x.dtype] if isinstance(x, Tensor) else "i32" if -(2**31) <= x < 2**31 else "i64"

    for i, parameter in enumerate(given.kernel.params):
        signature[parameter.name] = kind(given.arguments[parameter.name], (i,), parameter.is_constexpr, parameter.do_not_specialize)
    return ASTSource(fn=given.kernel, signature=signature, constexprs=constexprs, attrs=attributes)


def compile_launch(given: Launch, target: str) -> Resources:
    """Compile one launch for a target of TARGETS."""
    compiled = triton.compile(source(given), target=TARGETS[target], options=launch.options(given.config, target))
    return (_amd if target.startswith("gfx") else _nvidia)(compiled)


def _nvidia(compiled) -> Resources:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

    def run(tool: str, *arguments: str) -> str:
        return subprocess.run([str(tools / tool), *arguments], capture_output=True, text=True, check=True).stdout

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = run("cuobjdump", "-res-usage", file.name), run("nvdisasm", "-c", file.name)
    tensor = next((kind for kind, name in (("tcgen05", "UTCHMMA"), ("wgmma", "HGMMA"), ("mma", "HMMA")) if name in code), "")
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    return Resources(registers, stack, compiled.metadata.shared, tensor)


def _amd(compiled) -> Resources:
    code = compiled.asm["amdgcn"]
    registers, spills = (int(re.search(rf"\.{name}:\s+(\d+)", code)[1]) for name in ("vgpr_count", "vgpr_spill_count"))
    return Resources(registers, spills, compiled.metadata.shared, "mfma" if "v_mfma" in code else "")
