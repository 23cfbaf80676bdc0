"""Context parallelism (docs/parallel.md) on processes of one thread each, against one such process: a training step of a `MemoryBlock`.

    python -m bench.cpu.parallel [--processes 2] [--tokens 32768] [--heads 8] [--rounds 7] [--json FILE]

In every round the first process reads the whole sequence alone, then all read their stretches and add up the gradients of the parameters.
First the outputs and gradients of the stretches must be those of the whole. Each process needs an idle core; wall time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, distributed, multiprocessing

from miras_kernels.layers import MemoryBlock
from miras_kernels.parallel import ContextParallel, parallelize
from miras_kernels.testing.parity import relative_error

from ..common.results import heading, machine, versions, write_json
from .measuring import MALLOC

HEAD_DIM, CHUNK = 64, 64
PRESETS = {"linear memory, Huber": "huber", "MLP memory, Yaad": "yaad"}
#: of two float32 orders of sums over all tokens
ROUNDING = 1e-4


class Step:
    """Forward and backward of one block, by this process alone or by all."""

    def __init__(self, context: ContextParallel, preset: str, tokens: int, heads: int):
        torch.manual_seed(0)
        self.context, self.block = context, MemoryBlock(heads * HEAD_DIM, heads, preset=preset, chunk_size=CHUNK)
        self.whole = torch.randn(2, 1, tokens, heads * HEAD_DIM)
        self.stretch = context.shard(self.whole, 2).contiguous()

    def run(self, together: bool) -> list[Tensor]:
        """The output, and the gradients of the input and of the parameters; ``together``: of this stretch, and of the sum over all."""
        x, grad = self.stretch if together else self.whole
        x = x.clone().requires_grad_()
        parallelize(self.block, self.context if together else None)
        out, _ = self.block(x)
        grads = torch.autograd.grad(out, [x, *self.block.parameters()], grad)
        if together:
            for g in grads[1:]:
                distributed.all_reduce(g)
        return [out.detach(), *grads]

    def error(self) -> float:
        """The largest relative error of this process' results."""
        ours, whole = self.run(True), self.run(False)
        wanted = [*(self.context.shard(x) for x in whole[:2]), *whole[2:]]
        return max(relative_error(x, y) for x, y in zip(ours, wanted, strict=True))

    def seconds(self, together: bool) -> float:
        distributed.barrier()
        began = time.perf_counter()
        if together or self.context.rank == 0:
            self.run(together)
        distributed.barrier()
        return time.perf_counter() - began


def worker(rank: int, args: argparse.Namespace, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=args.processes)
    context = ContextParallel(chunk_size=CHUNK, parts=args.heads)
    results = []
    for name, preset in PRESETS.items():
        step = Step(context, preset, args.tokens, args.heads)
        error = torch.tensor(step.error())
        distributed.all_reduce(error, distributed.ReduceOp.MAX)
        result = {"case": name, "error": error.item()}
        if error <= ROUNDING:
            rounds = [(step.seconds(False), step.seconds(True)) for _ in range(args.rounds)]
            alone, together = map(statistics.median, zip(*rounds, strict=True))
            ratios = sorted(a / b for a, b in rounds)
            result |= {"one_process_s": alone, "all_processes_s": together, "ratio": statistics.median(ratios), "ratios": ratios}
        results.append(result)
    if rank == 0:
        with open(f"{folder}/results", "w") as file:
            json.dump(results, file)
    distributed.destroy_process_group()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in dict(processes=2, tokens=32768, heads=8, rounds=7).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--json", type=Path, help="file for the results")
    args = parser.parse_args()
    os.environ["GLIBC_TUNABLES"] = MALLOC  # of the processes
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(worker, (args, folder), args.processes)
        with open(f"{folder}/results") as file:
            results = json.load(file)
    ideal = args.heads * args.processes / (args.heads + args.processes - 1)
    print(f"{args.processes} processes of one thread, {args.tokens} tokens, {args.heads} heads of {HEAD_DIM} in as many parts")
    for r in results:
        said = "RED: other results"
        if "ratio" in r:
            said = f"{r['one_process_s']:.3f} s alone, {r['all_processes_s']:.3f} s together: "
            said += f"{r['ratio']:.2f}x [{r['ratios'][0]:.2f}, {r['ratios'][-1]:.2f}]"
        print(f"{r['case']}: error {r['error']:.0e}; {said}")
    print(f"{ideal:.2f}x if every part's memory takes the same time and nothing else is done")
    if args.json:
        settings = {k: v for k, v in vars(args).items() if k != "json"}
        about = {"machine": machine(), "versions": versions("torch", "miras-kernels"), "settings": settings, "formula": ideal}
        write_json(heading("bench.cpu.parallel") | about | {"results": results}, args.json)
    return int(any("ratio" not in r for r in results))


if __name__ == "__main__":
    sys.exit(main())
