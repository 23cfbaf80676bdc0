"""Registers, spills and shared memory of every configuration on every chip, from compiling alone.

    python -m miras_kernels.kernels.offline.resources                    compile everything, write resources.json beside this file
    python -m miras_kernels.kernels.offline.resources --cover            every configuration once for every chip, write that
    python -m miras_kernels.kernels.offline.resources --check            compile everything, compare with resources.json
    python -m miras_kernels.kernels.offline.resources --check --quick    the most common calls only
    python -m miras_kernels.kernels.offline.resources --check --cover    every configuration once for every chip
    python -m miras_kernels.kernels.offline.resources --only sm_90:D64   only jobs with this text in their name; prints

A specimen is a call whose launches are recorded and compiled, each with every configuration that serves it. resources.json has
registers, spilled bytes, shared memory and the kind of tensor-core instruction of each, per version of Triton.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
import triton

from ...call import Call
from ...tables import memories
from ...tables.biases import L2, Bias, DotProduct, Huber, Lp
from ...tables.retention import KLRetention, L2Retention, LqRetention, Retention
from ...validation import make_call
from ..common import configs
from . import compile as offline

__all__ = [
    "LIMITS", "SPECIMENS", "Job", "Specimen", "jobs", "measure", "problems", "read", "spills_allowed", "table_key",
]  # fmt: skip

TABLE = Path(__file__).with_name("resources.json")

#: kernels without products for tensor cores: those of the gates and of decoding
NO_PRODUCTS = (
    "linear_decay", "linear_decay_bwd", "momentum_weights", "momentum_weights_bwd", "channel_decay", "channel_momentum", "channel_du_bwd",
    "keyed_system", *configs.STEPS,
)  # fmt: skip

#: bytes of shared memory that a program may have
LIMITS = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}


@dataclasses.dataclass(frozen=True)
class Specimen:
    """A call to compile. ``final``: packed, with a final state inside a chunk; otherwise training without either."""

    key_dim: int
    value_dim: int
    chunk_size: int
    bias: Bias = Huber("coordinate")  # noqa: RUF009  immutable
    dtype: torch.dtype = torch.bfloat16
    channel_delta: bool = False
    final: bool = False
    decays: bool = True
    hidden: int = 0  # of an MLP memory
    retention: Retention = L2Retention()  # noqa: RUF009  immutable
    momentum: bool = False
    channel_lr: bool = False
    channel_decay: bool = False
    key_decay: bool = False  # by key channel, and before the error
    erase: bool = False  # with keys that are erased
    fused: bool = False  # the output in the forward's chain
    steps: bool = False  # a decoding step instead

    def __str__(self) -> str:
        sizes = f"D{self.key_dim}" + (f"x{self.value_dim}" if self.value_dim != self.key_dim else "") + f"-C{self.chunk_size}"
        sizes += f"-H{self.hidden}" if self.hidden else ""
        flags = ("channel_delta", "channel_lr", "channel_decay", "key_decay", "erase", "momentum", "final", "fused", "steps")
        marks = [name for name in flags if getattr(self, name)]
        marks += ([] if self.retention.is_identity else [self.retention.name]) + ([] if self.decays else ["no_decay"])
        return "-".join([sizes, self.bias.name, str(self.dtype).removeprefix("torch."), *marks])

    def launches(self) -> list[offline.Launch]:
        """What its forward and backward launch, or its decoding step."""
        if self.steps:
            return offline.recorded_step(self.call())
        with configs.fuse(self.fused):
            return offline.recorded(self.call(), 4)

    def call(self) -> Call:
        b, t, h = (4, 1, 16) if self.steps else (1 if self.final else 2, 4096, 16)

        def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        k, v = meta(b, t, h, self.key_dim, dtype=self.dtype), meta(b, t, h, self.value_dim, dtype=self.dtype)
        gate = meta(b, t, h)
        delta = None
        if self.bias.needs_delta:
            delta = meta(b, t, h, self.value_dim) if self.channel_delta else gate
        n, d = (4 if self.final else b), self.key_dim
        arguments = dict(
            bias=self.bias, retention=self.retention, delta=delta, momentum=gate if self.momentum else None, chunk_size=self.chunk_size,
            output_final_state=self.final or self.steps, cu_seqlens=meta(5, dtype=torch.int64) if self.final else None,
        )  # fmt: skip
        if self.hidden:
            initial, norm = (meta(n, h, d, self.hidden), meta(n, h, self.hidden, d)), dict(ln_weight=meta(h, d), ln_bias=meta(h, d))
            memory, arguments = memories.MLP, arguments | norm | dict(ln_eps=1e-6, initial_state=initial)
        else:
            memory, arguments = memories.LINEAR, arguments | dict(initial_state=meta(n, h, self.value_dim, d))
        lr, log_decay = (meta(b, t, h, self.value_dim) if x else gate for x in (self.channel_lr, self.channel_decay))
        if self.key_decay:
            arguments |= dict(key_log_decay=meta(b, t, h, d), decay_first=True)
        if self.erase:
            arguments |= dict(erase_k=k)
        return make_call(memory, k, k, v, lr, log_decay if self.decays and not self.key_decay else None, **arguments)


def _specimens() -> Iterator[Specimen]:
    switch, smooth, float32 = Huber("switch"), Lp(3.0, sharpness=10.0), torch.float32
    for d, c in ((64, 16), (64, 64), (64, 128), (128, 32), (128, 64), (128, 128)):
        yield Specimen(d, d, c)
    yield Specimen(128, 128, 64, DotProduct())
    yield Specimen(128, 128, 64, smooth)
    yield Specimen(64, 64, 64, switch)
    yield Specimen(128, 128, 64, switch)
    yield Specimen(128, 64, 128, switch)
    yield Specimen(128, 32, 64, switch)
    yield Specimen(16, 16, 16, switch)
    yield Specimen(64, 64, 64, channel_delta=True)
    yield Specimen(64, 64, 64, L2(), decays=False, dtype=torch.float16)
    yield Specimen(64, 64, 64, final=True)
    yield Specimen(16, 16, 16)
    yield Specimen(32, 32, 128)
    yield Specimen(96, 80, 64)
    yield Specimen(256, 256, 64)
    yield Specimen(256, 256, 128, switch)
    yield Specimen(64, 64, 64, dtype=float32)
    yield Specimen(96, 80, 64, switch, dtype=float32)
    yield Specimen(256, 256, 128, dtype=float32)
    yield Specimen(64, 64, 64, channel_lr=True)
    yield Specimen(64, 64, 64, switch, retention=KLRetention(), momentum=True)
    yield Specimen(128, 128, 64, retention=LqRetention(), momentum=True)
    yield Specimen(128, 128, 128, retention=KLRetention(), momentum=True, final=True)
    yield Specimen(64, 64, 128, retention=LqRetention(), momentum=True, dtype=float32)
    yield Specimen(128, 128, 128, retention=KLRetention(), channel_lr=True, channel_decay=True)
    yield Specimen(64, 64, 64, channel_decay=True)
    yield Specimen(64, 64, 64, momentum=True, channel_decay=True)
    yield Specimen(128, 128, 128, momentum=True, channel_decay=True, dtype=float32)
    yield Specimen(64, 64, 64, fused=True)
    yield Specimen(128, 128, 64, fused=True)
    yield Specimen(128, 128, 16, fused=True, dtype=torch.float16)
    yield Specimen(64, 64, 32, L2(), fused=True, decays=False)
    yield Specimen(128, 128, 64, fused=True, final=True)
    yield Specimen(128, 128, 64, smooth, fused=True)
    yield Specimen(64, 64, 1, L2())  # exact steps in blocks
    yield Specimen(64, 64, 1, L2(), fused=True)
    yield Specimen(128, 128, 1, L2())
    yield Specimen(64, 64, 1, L2(), dtype=float32)
    yield Specimen(64, 64, 1, L2(), erase=True)
    yield Specimen(128, 128, 1, L2(), key_decay=True)
    yield Specimen(128, 128, 1, L2(), key_decay=True, erase=True, final=True, dtype=float32)
    for d, c, hidden in ((64, 16, 64), (64, 32, 128), (64, 64, 256), (128, 64, 512)):
        yield Specimen(d, d, c, switch, hidden=hidden)
    yield Specimen(64, 64, 64, smooth, final=True, decays=False, hidden=256)
    yield Specimen(64, 64, 64, retention=KLRetention(), momentum=True, hidden=256)
    yield Specimen(128, 128, 32, retention=LqRetention(), momentum=True, final=True, hidden=256, dtype=torch.float16)
    yield Specimen(32, 32, 16, hidden=48, dtype=float32)
    # decoding steps; those with the largest tiles first
    for d, hidden in ((128, 0), (64, 256), (128, 1024)):
        yield Specimen(d, d, 64, switch, hidden=hidden, retention=KLRetention(), momentum=True, steps=True)
    yield Specimen(256, 256, 64, channel_lr=True, channel_decay=True, retention=KLRetention(), momentum=True, steps=True)
    for d, hidden in ((128, 0), (128, 256)):
        yield Specimen(d, d, 64, smooth, hidden=hidden, retention=LqRetention(), momentum=True, steps=True)
    for d, hidden in ((64, 0), (256, 0), (64, 256)):
        yield Specimen(d, d, 64, L2(), hidden=hidden, steps=True)
    yield Specimen(64, 64, 1, L2(), decays=False, steps=True)


SPECIMENS: dict[str, Specimen] = {str(x): x for x in _specimens()}
#: the most common calls
QUICK = (
    "D64-C64-huber_coordinate-bfloat16", "D128-C64-huber_coordinate-bfloat16", "D128-C64-huber_switch-bfloat16",
    "D64-C64-l2-bfloat16-steps", "D64-C64-H256-huber_switch-bfloat16-momentum-steps-kl",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Job:
    """One compilation: a launch of a specimen, by its place among its kernel's launches, with a configuration, for a target."""

    specimen: str
    kernel: str
    place: int
    config: configs.Config
    target: str

    def __str__(self) -> str:
        return f"{self.target}:{self.specimen}:{self.kernel}.{self.place}:{self.config}"

    @property
    def multiplies(self) -> bool:
        """Whether its matrix products can use tensor cores."""
        return self.kernel not in NO_PRODUCTS and SPECIMENS[self.specimen].dtype != torch.float32


def jobs(targets: Iterable[str], specimens: Iterable[str] = tuple(SPECIMENS)) -> list[Job]:
    """All compilations: every configuration that serves a specimen and is not denied on a target, without duplicates."""
    found, seen = [], set()
    for name in specimens:
        recorded = SPECIMENS[name].launches()
        for kernel in dict.fromkeys(given.kernel.__name__ for given in recorded):
            for config in configs.eligible(kernel, configs.Key.of(SPECIMENS[name].call())):
                with configs.force(kernel, config):
                    launches = [given for given in SPECIMENS[name].launches() if given.kernel.__name__ == kernel]
                for place, given in enumerate(launches):
                    identity = (offline.source(given).hash(), config)
                    if identity not in seen:
                        seen.add(identity)
                        allowed = [target for target in targets if configs.denial(target, kernel, config) is None]
                        found += [Job(name, kernel, place, config, target) for target in allowed]
    return found


def compile_job(job: Job) -> offline.Resources:
    with configs.force(job.kernel, job.config):
        launches = [given for given in SPECIMENS[job.specimen].launches() if given.kernel.__name__ == job.kernel]
    return offline.compile_launch(launches[job.place], job.target)


def measure(wanted: list[Job], processes: int = 2) -> Iterator[tuple[Job, offline.Resources]]:
    """Compile in fresh processes: Triton decides about its interpreter once, when it is imported."""
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        yield from zip(wanted, pool.map(compile_job, wanted, chunksize=4), strict=True)


def spills_allowed(job: Job) -> float:
    """The largest number of spilled bytes per thread that is accepted.

    0, except: any number for the gradient of log-decays by channel with momentum, which holds Theta and its gradient (it spills none in
    chunks of 64 on sm_90); 128 for the float32 backward chain of two matrices on sm_80; 16 for the backward chain of more than 64 keys
    under a smoothed bias, of whose four warps two programs fit on a multiprocessor, and of narrow heads in chunks of 128; 64 for the
    chain with the output in it on sm_80, where it is not used, and for the backward of the MLP memory; and 1536 for the MLP memory in
    float32, on sm_80, and for heads wider than 64 in chunks of fewer than 64 tokens, where products take their operands from registers.
    """
    if not job.target.startswith("sm_"):
        return math.inf
    specimen = SPECIMENS[job.specimen]
    if job.kernel == "channel_decay_bwd" and specimen.momentum:
        return math.inf
    if job.kernel == "linear_chain_bwd_streamed" and specimen.momentum and (job.target, specimen.dtype) == ("sm_80", torch.float32):
        return 128
    if (job.kernel, job.target) == ("linear_chain_fwd_fused", "sm_80"):
        return 64
    if job.kernel == "linear_chain_bwd":
        smooth = specimen.bias.name == "lp_smooth" and job.config.warps == 4 and specimen.key_dim > 64
        return 16 if smooth or (specimen.chunk_size == 128 and specimen.key_dim < 64) else 0
    if not job.kernel.startswith("mlp_") or job.kernel in configs.STEPS:
        return 0
    if job.target == "sm_80" or specimen.dtype == torch.float32 or (specimen.key_dim > 64 and specimen.chunk_size < 64):
        return 1536
    return 0 if job.kernel == "mlp_chain_fwd" else 64


def problems(job: Job, found: offline.Resources) -> list[str]:
    """Limits that a compiled configuration exceeds."""
    wrong = []
    if found.spills > spills_allowed(job):
        wrong.append(f"spills {found.spills} bytes")
    if found.shared > LIMITS[job.target]:
        wrong.append(f"{found.shared} bytes of shared memory of {LIMITS[job.target]}")
    if job.multiplies and not found.tensor:
        wrong.append("no tensor-core instruction")
    return [f"{job}: {text}" for text in wrong]


def table_key() -> str:
    """The version of Triton, the key of its figures in the table."""
    return triton.__version__.split("+")[0]


def read() -> dict[str, dict[str, list]]:
    """The table: version of Triton -> job -> ``[registers, spills, shared, tensor]``."""
    return json.loads(TABLE.read_text()) if TABLE.exists() else {}


def write(figures: dict[str, list]) -> None:
    lines = []
    for version, rows in sorted((read() | {table_key(): figures}).items()):
        body = ",\n".join(f"    {json.dumps(job)}: {json.dumps(row)}" for job, row in sorted(rows.items()))
        lines.append(f"  {json.dumps(version)}: {{\n{body}\n  }}")
    TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--check", action="store_true", help="compare with the table instead of writing it")
    parser.add_argument("--quick", action="store_true", help="the most common calls only; writes nothing")
    parser.add_argument("--cover", action="store_true", help="every configuration once for every target")
    parser.add_argument("--only", metavar="TEXT", help="jobs whose name contains this; prints, writes nothing")
    parser.add_argument("--targets", default=",".join(offline.TARGETS), metavar="TARGET,...")
    args = parser.parse_args(arguments)
    wanted = jobs(args.targets.split(","), QUICK if args.quick else tuple(SPECIMENS))
    wanted = [job for job in wanted if not args.only or args.only in str(job)]
    if args.cover:
        wanted = list({(job.target, job.kernel, job.config): job for job in reversed(wanted)}.values())
    figures, wrong, known = {}, [], read().get(table_key())
    if args.check and known is None:
        print(f"the table has no Triton {table_key()}: only spills, shared memory and tensor cores are checked")
    for job, found in measure(wanted):
        figures[str(job)] = list(dataclasses.astuple(found))
        wrong += problems(job, found)
        if args.check and known is not None and known.get(str(job), figures[str(job)]) != figures[str(job)]:
            wrong.append(f"{job}: {figures[str(job)]}, the table has {known.get(str(job))}")
        print(f"{len(figures)}/{len(wanted)} {job} {figures[str(job)]}", flush=True)
    if not (args.check or args.only or args.quick):
        write(figures)
    print("\n".join(wrong) or "all within limits")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
