"""Counts of the compiled Triton and CUDA C++ kernels, executed on the CPU, and modelled times. No GPU is needed.

    python -m bench.gpu.counts                     the table's counts and the times modelled from them
    python -m bench.gpu.counts --chip H100         for another chip of chips.py: its architecture's specimens
    python -m bench.gpu.counts --check             execute the kernels; red if one is more than 3 % worse than in the table
    python -m bench.gpu.counts --renew "REASON"    execute the kernels, write the table; counts.json keeps the reason
    python -m bench.gpu.counts --only D64          the specimens with this text in their names
    python -m bench.gpu.counts --backend cuda      likewise the CUDA C++ kernels, which have an entry of their own

The machine of tests/ptx executes two short sequences, and what is linear in the tokens is extrapolated: counts of programs, latencies of
chains. bench/README.md explains the report.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from ..common.implementations import BOTH, DIRECTIONS, FORWARD
from ..common.processes import ROOT
from . import model
from .chips import CHIPS
from .plan import Shape, least_work

TABLE = Path(__file__).with_name("counts.json")
#: what a count may be worse by
TOLERANCE = 0.03
#: heads of the sequences that are executed, whose gates then lie as in a real call; and where the programs of a head are separate, those
#: that are executed
HEADS, EXECUTED = 16, 1


@dataclasses.dataclass(frozen=True)
class Specimen:
    """A call, in bfloat16, with log-decays. ``shapes``: those that times are modelled for."""

    shape: Shape
    name: str  # of a bias or of a variant of the recurrence
    shapes: tuple[Shape, ...]
    architecture: str = "sm_90"
    values: int = 0  # of a block of the CUDA C++ chain of the linear memory
    blocks: int = 0  # of a head of the CUDA C++ chain of the MLP memory, where there may be two

    def __str__(self) -> str:
        hidden = f"-Hd{self.shape.hidden}" if self.shape.hidden else ""
        return f"{self.architecture}:D{self.shape.key_dim}-C{self.shape.chunk_size}{hidden}-{self.name}" + (
            f"-v{self.values}" if self.values else f"-b{self.blocks}" if self.blocks else ""
        )

    @property
    def plain(self) -> Specimen:
        """As the Triton kernels have it, which choose no blocks."""
        return dataclasses.replace(self, values=0, blocks=0)

    @property
    def between(self) -> tuple[int, int]:
        """The tokens of the sequences that are executed: one and two checkpoints."""
        return (256, 512)


def _linear(d: int, chunk_size: int = 64) -> Shape:
    return Shape(1, 512, HEADS, d, chunk_size)


def _mlp(chunk_size: int, architecture: str = "sm_90") -> Specimen:
    shapes = tuple(Shape(n, 16384, 16, 64, chunk_size, 256) for n in ((4, 8) if chunk_size == 64 else (4,)))
    return Specimen(Shape(1, 512, HEADS, 64, chunk_size, 256), "huber_coordinate", shapes, architecture)


LONG = (Shape(1, 8192, 64, 128), Shape(1, 32768, 32, 128), Shape(8, 8192, 32, 128))
SPECIMENS = {
    str(x): x
    for x in (
        Specimen(_linear(64), "l2", (Shape(8, 8192, 32, 64), Shape(1, 8192, 64, 64))),
        Specimen(_linear(128), "l2", LONG),
        Specimen(_linear(128), "huber_coordinate", LONG),
        Specimen(_linear(64, 1), "l2", (Shape(8, 8192, 32, 64, 1), Shape(1, 8192, 64, 64, 1))),
        Specimen(_linear(128, 1), "l2", (Shape(1, 8192, 64, 128, 1), Shape(8, 8192, 32, 128, 1))),
        Specimen(_linear(128), "lq", (Shape(8, 8192, 32, 128),)),
        Specimen(_linear(128), "momentum", (Shape(8, 8192, 32, 128),)),
        *map(_mlp, (64, 32, 16)),
        *(_mlp(chunk_size, "sm_80") for chunk_size in (32, 16)),
    )
}


#: those that the CUDA C++ kernels serve in chunks
CUDA = (
    *(f"sm_90:{name}" for name in ("D64-C64-l2", "D128-C64-l2", "D128-C64-huber_coordinate")),
    *(name for name, x in SPECIMENS.items() if x.shape.hidden),
)


def specimens(backend: str) -> dict[str, Specimen]:
    """By name. Those of the CUDA C++ chains that choose their blocks have the shapes for which they choose so."""
    if backend == "triton":
        return SPECIMENS
    import torch

    from miras_kernels.backends.cuda_linear import block_values
    from miras_kernels.backends.cuda_mlp import blocks

    chip, found = CHIPS["H200"], []
    for given in map(SPECIMENS.get, CUDA):
        of: dict[tuple, list[Shape]] = {}
        for shape in given.shapes:
            heads = shape.batch * shape.heads
            if not shape.hidden:
                chosen = ("values", block_values(torch.bfloat16, shape.key_dim, heads, False, chip.multiprocessors))
            else:
                chosen = ("blocks", blocks(heads, chip.multiprocessors) if shape.chunk_size == 64 else 0)
            of.setdefault(chosen, []).append(shape)
        found += [dataclasses.replace(given, shapes=tuple(shapes), **{name: n}) for (name, n), shapes in of.items()]
    return {str(x): x for x in found}


# ------------------------------------------------------------------------------------------------------------- executing

#: of a CUDA C++ kernel, the template's numbers
TEMPLATES = {"linear_chain": ("Dk", "C", "values"), "linear_reverse": ("Dk", "C"), "mlp_chain": ("C", "Hd"),
             "mlp_chain_cluster": ("C", "Hd"), "mlp_replay": ("C", "Hd"), "mlp_reverse": ("C", "Hd")}  # fmt: skip


def readable(name: str) -> str:
    """The name of a CUDA C++ kernel and its template's types and numbers, from the compiler's name; that of a Triton kernel as it is."""
    found = re.match(r"_ZN.*?\d(" + "|".join(TEMPLATES) + r")I(.*?)E+v\d", name)
    if found is None:
        return name
    types = {"13__nv_bfloat16": "bf16", "6__half": "f16"}
    numbers = zip(TEMPLATES[found[1]], re.findall(r"Li(\d+)E", found[2] + "E"), strict=True)
    return " ".join([found[1], *(short for long, short in types.items() if long in found[2]), *(f"{x}{n}" for x, n in numbers)])


def executed(specimen: Specimen, direction: str, tokens: int, backend: str) -> list[dict]:
    """The launches of a call, in order, with what is counted of each; of "cuda" only the names of those that Triton's kernels do."""
    import torch
    from miras_kernels.kernels.common import configs

    from miras_kernels import dispatch
    from miras_kernels.backends import cuda_linear, cuda_mlp
    from ptx import compiling, cuda, host

    from ..common.implementations import kernel
    from .inputs import DTYPE, case_of

    chip = next(chip for chip in CHIPS.values() if chip.architecture == specimen.architecture)
    torch.manual_seed(0)
    inputs = case_of(specimen.shape, specimen.name, tokens=tokens).draw(torch.float32).to(DTYPE)
    found = []

    def count(launch) -> None:
        grid = (*launch.grid, 1)
        own = not launch.name  # of CUDA C++: blocks of all heads in one row, those of the first heads first
        if backend == "cuda" and not own:
            found.append(dict(kernel=launch.name.split()[0]))
            return
        programs = grid[0] * EXECUTED // HEADS if own else grid[0]
        heads = EXECUTED if own or grid[1] > 1 else HEADS
        _, counts = launch.run(chip=chip, heads=heads, most=programs if own else 2**31)
        registers, shared = compiling.registers(launch.ptx, launch.entry), launch.shared
        issued = counts.issued
        values = dict(
            programs=programs * min(grid[1], heads), issued=sum(issued.values()), special=issued.get("special", 0), flop=counts.flop,
            wavefronts=counts.wavefronts + counts.operands, sectors=counts.sectors, bytes=counts.bytes, barriers=counts.barriers,
            latency=round(counts.clock.now),
        )  # fmt: skip
        kernel = counts.program.kernel
        found.append(
            dict(kernel=readable(kernel.name), heads=heads, threads=kernel.threads, registers=registers, shared=shared, counts=values)
        )

    with contextlib.ExitStack() as stack:
        stack.enter_context(configs.fuse(True))  # as the shapes, which fill a chip, do
        stack.enter_context(host.on_machine(specimen.architecture, instead=count))
        if backend == "cuda":
            built = cuda.build(shutil.which("nvcc") or "nvcc", specimen.architecture)
            own = stack.enter_context(cuda.on_machine(built, instead=count))
            needed = own._loaded[0].miras_mlp_backward_shared(specimen.shape.hidden, specimen.shape.chunk_size)
            if needed > chip.shared_bytes:  # as on a device, which is asked there
                stack.enter_context(mock.patch.object(own, "refuses_backward", lambda _: f"it needs {needed} bytes of shared memory"))
            stack.enter_context(mock.patch.dict(dispatch.BACKENDS, cuda=own))
            stack.enter_context(mock.patch.object(cuda_linear, "block_values", lambda *_: specimen.values))
            stack.enter_context(mock.patch.object(cuda_mlp, "blocks", lambda *_: specimen.blocks))
        kernel(inputs, backend, direction)()
    return found


def rows(specimen: Specimen, backend: str = "triton") -> dict[str, list[dict]]:
    """The launches of a forward, and those that a backward adds, with counts at two lengths."""
    found = {}
    for direction in DIRECTIONS:
        short, long = (executed(specimen, direction, tokens, backend) for tokens in specimen.between)
        both = []
        for a, b in zip(short, long, strict=True):
            assert a["kernel"] == b["kernel"]
            if "counts" in b:
                b |= {"counts": {field: [a["counts"][field], b["counts"][field]] for field in model.FIELDS}}
            both.append(b)
        rest = [row["kernel"] for row in both if "counts" not in row]  # the last ones, a backward's
        if rest:
            known = (read()[version("triton")]["rows"].get(str(specimen.plain)) or rows(specimen.plain))[direction][-len(rest) :]
            assert rest == [row["kernel"] for row in known]
            both[-len(rest) :] = known
        found[direction] = both
    return found


# ----------------------------------------------------------------------------------------------------------------- table


def read() -> dict:
    return json.loads(TABLE.read_text()) if TABLE.exists() else {}


def write(label: str, found: dict, reason: str) -> None:
    table = read()
    entry = table.get(label, {"reasons": [], "rows": {}})
    table[label] = {"reasons": [*entry["reasons"], reason], "rows": entry["rows"] | found}
    parts = []
    for name, entry in sorted(table.items()):  # a launch in each line
        launches = {
            specimen: {direction: [json.dumps(row) for row in rows_] for direction, rows_ in directions.items()}
            for specimen, directions in sorted(entry["rows"].items())
        }
        text = json.dumps({"reasons": entry["reasons"], "rows": launches}, indent=1)
        parts.append(f"{json.dumps(name)}: " + re.sub(r'"(\{.*\})"', lambda m: m[1].replace('\\"', '"'), text))
    TABLE.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def worse(before: dict, now: dict) -> Iterator[str]:
    """What is worse in the rows of a specimen than in the table's."""
    for direction in DIRECTIONS:
        names = [[row["kernel"] for row in side[direction]] for side in (before, now)]
        if names[0] != names[1]:
            yield f"{direction}: launches {', '.join(names[1])}, the table has {', '.join(names[0])}"
            continue
        for old, new in zip(before[direction], now[direction], strict=True):
            pairs = {field: (old["counts"][field][1], new["counts"][field][1]) for field in model.FIELDS}
            pairs |= {name: (old[name], new[name]) for name in ("registers", "shared")}
            for name, (was, is_) in pairs.items():
                if is_ > was * (1 + TOLERANCE):
                    yield f"{direction}: {new['kernel']}: {name} {is_:g}, the table has {was:g} ({is_ / was - 1 if was else 1:+.1%})"


def version(backend: str) -> str:
    """The label of what compiles a backend's kernels here."""
    if backend == "triton":
        import triton

        return triton.__version__.split("+")[0]
    text = subprocess.run([shutil.which("nvcc") or "nvcc", "--version"], check=True, capture_output=True, text=True).stdout
    return "nvcc " + re.search(r"release ([\d.]+)", text)[1]


# ---------------------------------------------------------------------------------------------------------------- report


def report(specimen: Specimen, found: dict, chip_name: str, base: dict | None) -> Iterator[str]:
    chip = CHIPS[chip_name]
    for shape in specimen.shapes:
        total = {}
        for direction in DIRECTIONS:
            total[direction] = _direction(specimen, found[direction], shape, chip)
            yield f"\n{specimen} at {shape}, {direction}, modelled for {chip.name}:"
            header = ("kernel", "us", "bound", "programs", "per SM", "issue", "tensor", "shared", "L2", "DRAM", "latency")
            yield _line(header)
            for row, times in zip(found[direction], total[direction]["launches"], strict=True):
                bound = max(times, key=times.get)
                given = model.Row(**row)
                programs = given.at("programs", specimen.between, shape.tokens) * shape.batch * shape.heads / given.heads
                us = [f"{1e6 * times[name]:.0f}" for name in ("issue", "tensor", "shared", "L2", "DRAM", "latency")]
                yield _line((row["kernel"], f"{1e6 * times[bound]:.0f}", bound, f"{programs:.0f}", model.resident(given, chip), *us))
        for direction, sums in (*total.items(), ("backward", _difference(total))):
            ratio = ""
            if base is not None:
                before = {d: _direction(specimen, base[d], shape, chip) for d in DIRECTIONS}
                then = before[direction] if direction in before else _difference(before)
                ratio = f"; {then['seconds'] / sums['seconds']:.2f}x faster than the baseline's {1e3 * then['seconds']:.3f} ms"
            least = _least(shape, direction, specimen.name)
            yield (
                f"{direction}: {1e3 * sums['seconds']:.3f} ms{ratio}; tensor FLOP {sums['flop'] / least['flops']:.2f}x the formula, "
                f"DRAM {sums['bytes'] / least['bytes']:.2f}x and L2 {sums['sectors'] * 32 / least['bytes']:.2f}x of the compulsory bytes"
            )


def modelled(shape: Shape, name: str, direction: str, chip: str, triton: str | None) -> dict[str, float]:
    """Modelled microseconds of each kernel of a call, all its launches together; empty where the table does not have the call."""
    rows_ = read().get((triton or "").split("+")[0], {"rows": {}})["rows"]
    of = (x for x in SPECIMENS.values() if x.architecture == CHIPS[chip].architecture)
    specimen = next((x for x in of if x.name == name and shape in x.shapes and str(x) in rows_), None)
    found: dict[str, float] = {}
    if specimen is not None:
        launches = rows_[str(specimen)][direction]
        for row, times in zip(launches, _direction(specimen, launches, shape, CHIPS[chip])["launches"], strict=True):
            found[row["kernel"]] = found.get(row["kernel"], 0.0) + 1e6 * max(times.values())
    return found


def _least(shape: Shape, direction: str, bias: str) -> dict[str, float]:
    if direction in DIRECTIONS:
        return least_work(shape, direction, bias)
    both, forward = (least_work(shape, d, bias) for d in (BOTH, FORWARD))
    return {name: both[name] - forward[name] for name in both}


def _difference(total: dict) -> dict:
    return {name: total[BOTH][name] - total[FORWARD][name] for name in ("seconds", "flop", "bytes", "sectors")}


def _direction(specimen: Specimen, launches: list[dict], shape: Shape, chip) -> dict:
    """Modelled seconds of each launch by resource, and sums over them."""
    given = [model.Row(**row) for row in launches]
    times = [model.time(row, chip, specimen.between, shape.batch, shape.tokens, shape.heads) for row in given]
    sums = {
        field: sum(row.at(field, specimen.between, shape.tokens) * shape.batch * shape.heads / row.heads for row in given)
        for field in ("flop", "bytes", "sectors")
    }
    return {"launches": times, "seconds": sum(max(x.values()) + chip.launch for x in times), **sums}


def _line(cells) -> str:
    return f"{cells[0]:28}" + "".join(f"{cell!s:>9}" for cell in cells[1:])


# --------------------------------------------------------------------------------------------------------------- program


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.counts", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--chip", choices=CHIPS, help="default: H200 and A100, each with the specimens of its architecture")
    parser.add_argument("--only", default="", metavar="TEXT")
    parser.add_argument("--backend", default="triton", choices=("triton", "cuda"))
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--renew", metavar="REASON")
    parser.add_argument("--label", metavar="LABEL", help="of the table's entry (default: the version of Triton, or of nvcc)")
    parser.add_argument("--base", default="7c81e26", metavar="LABEL", help="the entry to compare with")
    args = parser.parse_args(arguments)
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported: kernels are compiled in a process of their own
    sys.path.insert(0, str(ROOT / "tests"))
    label, red = args.label or version(args.backend), []
    chips = {CHIPS[name].architecture: name for name in ([args.chip] if args.chip else ("H200", "A100"))}
    wanted = {name: x for name, x in specimens(args.backend).items() if args.only in name and x.architecture in chips}
    for name, specimen in wanted.items():
        table = read()
        known = table.get(label, {"rows": {}})["rows"].get(name)
        found = rows(specimen, args.backend) if args.check or args.renew or known is None else known
        if args.renew:
            write(label, {name: found}, f"{name}: {args.renew}")
        elif args.check:
            red += [f"{name}: not in the table for {label}"] if known is None else [f"{name}: {text}" for text in worse(known, found)]
        base = table.get(args.base, {"rows": {}})["rows"].get(str(specimen.plain))
        print("\n".join(report(specimen, found, chips[specimen.architecture], base)), flush=True)
    print("\n".join(red))
    return bool(red)


if __name__ == "__main__":
    sys.exit(main())
