"""``python -m miras_kernels``: what is installed here, what can run and does so rightly, which backend would serve a call; and more.

A subcommand is a function that adds its arguments to a parser and one that runs them, in :data:`COMMANDS`.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import itertools
import os
import platform
import sys
from collections.abc import Callable, Sequence

import torch

from . import __version__, dispatch, explain, options, verification, warmup
from .backends import triton as triton_backend
from .tables import biases, retention
from .versions import TRANSFORMERS, in_tested_range

DTYPES = ("float32", "bfloat16", "float16", "float64")
DEVICES = ("cpu", "cuda", "mps", "xpu")


# -------------------------------------------------------------------------------------------------------------- info


def _version(package: str) -> str:
    """An installed version, without importing the package; some builds of PyTorch bring triton under another distribution's name."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        others = importlib.metadata.packages_distributions().get(package)
        return f"{importlib.metadata.version(others[0])} ({others[0]})" if others else "not installed"


def _transformers() -> str:
    """Its version, and whether it is one that the tests run with."""
    version, tested = _version("transformers"), " to ".join(TRANSFORMERS)
    if version == "not installed":
        return version
    return f"{version} ({'within' if in_tested_range(version) else 'OUTSIDE'} the tested range, {tested})"


def _can(what: str, backend: str, device: str) -> str:
    """That a backend can do something, and what one should know about it."""
    interpreted = backend == "triton" and triton_backend.interpreted()
    what += ", but in Triton's interpreter, slowly: TRITON_INTERPRET is set" if interpreted else ""
    place = torch.device(device)
    return what if backend == "reference" or backend not in dispatch.candidates(place) else f"{what}; {verification.state(backend, place)}"


def _cpu() -> str:
    threads = f"{torch.get_num_threads()} threads"
    extension = dispatch.BACKENDS["cpp"].extension
    if extension is None:
        return f"{platform.machine()}, {threads}"
    asked = os.environ.get("MIRAS_CPU_CAPABILITY")
    try:
        level = f"kernels use {extension.cpu_capability()}"
    except (RuntimeError, ValueError) as error:
        level = f"kernels cannot run: {error}"
    because = f", as MIRAS_CPU_CAPABILITY={asked} asks" if asked else ""
    return f"{platform.machine()}, {threads}, {level}{because} (can run here: {', '.join(extension.cpu_capabilities())})"


def _accelerators() -> list[tuple[str, str]]:
    if not torch.cuda.is_available():
        return [("cuda", "none")]
    found = []
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        found.append((f"cuda:{i}", f"{p.name}, compute capability {p.major}.{p.minor}, {p.total_memory / 2**30:.0f} GiB"))
    return found


def _print_rows(title: str, rows: Sequence[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in rows)
    print(title)
    for name, text in rows:
        print(f"  {name:{width}s}  {text}")


def info(_: argparse.Namespace) -> int:
    """Print versions, devices, backends and options."""
    versions = [("miras-kernels", __version__), ("python", platform.python_version()), ("torch", torch.__version__)]
    _print_rows("versions", [*versions, ("triton", _version("triton")), ("transformers", _transformers())])
    _print_rows("devices", [("cpu", _cpu()), *_accelerators()])
    missing = {name: dispatch.unavailable(name) for name in dispatch.NAMES[1:]}
    device = {name: "cpu" if name == "cpp" or not torch.cuda.is_available() else "cuda" for name in missing}
    rows = [(name, f"cannot run: {reason}" if reason else _can("can run here", name, device[name])) for name, reason in missing.items()]
    _print_rows("backends", rows)
    _print_rows("options", [(field.name, repr(getattr(options, field.name))) for field in dataclasses.fields(options)])
    return 0


# ----------------------------------------------------------------------------------------------------------- explain


def _rows_by_name(table: dict) -> dict:
    return {row.name: row for row in table.values()}


def _row(table: dict, what: str) -> Callable[[str], object]:
    """A parser of ``NAME`` or ``NAME:PARAMETER,...`` for a table of biases or gates."""

    def parse(text: str) -> object:
        name, _, numbers = text.partition(":")
        rows = _rows_by_name(table)
        if name not in rows:
            raise argparse.ArgumentTypeError(f"unknown {what} {name!r}: expected one of {', '.join(rows)}")
        if not numbers:
            return rows[name]
        row, values = rows[name], numbers.split(",")
        fields = [field.name for field in dataclasses.fields(row) if isinstance(getattr(row, field.name), (float, type(None)))]
        if len(values) > len(fields):
            takes = f"takes {', '.join(fields)}" if fields else "takes no parameters"
            raise argparse.ArgumentTypeError(f"{what} {text!r}: {name} {takes}")
        try:
            return dataclasses.replace(row, **{field: float(value) for field, value in zip(fields, values)})  # noqa: B905
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{what} {text!r}: {error}") from None

    return parse


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected an integer >= 1, got {text!r}")
    return value


def _memory_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--memory", choices=("linear", "mlp"), default="linear")
    bias_names, gate_names = (", ".join(_rows_by_name(module.TABLE)) for module in (biases, retention))
    parser.add_argument("--bias", type=_row(biases.TABLE, "bias"), default=biases.L2(), metavar="NAME[:P,...]",
                        help=f"{bias_names}; with parameters: lp:2.5")  # fmt: skip
    parser.add_argument("--retention", type=_row(retention.TABLE, "retention gate"), default=retention.L2Retention(),
                        metavar="NAME[:P,...]", help=gate_names)  # fmt: skip
    parser.add_argument("--dim", type=_positive, default=64, help="head dimension of keys, and of values without --value-dim")
    parser.add_argument("--value-dim", type=_positive)
    parser.add_argument("--hidden", type=_positive, help="of an MLP memory (default: 4 times --dim)")
    parser.add_argument("--chunk", type=_positive, default=64, help="chunk_size")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")


def _explain_arguments(parser: argparse.ArgumentParser) -> None:
    _memory_arguments(parser)
    parser.add_argument("--device", choices=DEVICES, default="cpu", help="need not be there: nothing is computed")
    parser.add_argument("--decay", choices=("none", "scalar", "channel"), default="scalar")
    parser.add_argument("--lr", choices=("scalar", "channel"), default="scalar")
    parser.add_argument("--momentum", action="store_true")
    parser.add_argument("--no-grad", action="store_true", help="forward alone")
    parser.add_argument("--tokens", type=_positive, help="T (default: two chunks); with --no-grad and one or a few, decoding")


class _Elsewhere(torch.Tensor):
    """A tensor without numbers that says it is on some device. PyTorch's own fake tensors import half a compiler, and triton."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: self.where)


def _example(args: argparse.Namespace) -> dispatch.Explanation:
    """:func:`miras_kernels.explain` of a call like the one described, with tensors that hold no numbers."""
    b, h, d, dv = 1, 1, args.dim, args.value_dim or args.dim
    t, hidden = args.tokens or 2 * args.chunk, args.hidden or 4 * args.dim
    dtype = getattr(torch, args.dtype)
    wide = torch.float64 if args.dtype == "float64" else torch.float32

    def make(*shape: int, dtype: torch.dtype = wide) -> torch.Tensor:
        x = torch.empty(*shape, dtype=dtype, device="meta").as_subclass(_Elsewhere)
        x.where = torch.device(args.device)
        return x

    def gate(kind: str) -> torch.Tensor | None:
        return None if kind == "none" else make(b, t, h, *([dv] if kind == "channel" else []))

    call = dict(q=make(b, t, h, d, dtype=dtype), k=make(b, t, h, d, dtype=dtype), v=make(b, t, h, dv, dtype=dtype),
                lr=gate(args.lr), log_decay=gate(args.decay), bias=args.bias, retention=args.retention,
                chunk_size=args.chunk, initial_state=make(h, dv, d))  # fmt: skip
    call["q"].requires_grad_(not args.no_grad)  # one is enough
    if args.bias.needs_delta:
        call["delta"] = make(b, t, h)
    if args.momentum:
        call["momentum"] = make(b, t, h)
    if args.memory == "mlp":
        call |= dict(initial_state=(make(h, dv, hidden), make(h, hidden, d)), ln_weight=make(h, dv), ln_bias=make(h, dv))
    return explain(**call)


def explain_command(args: argparse.Namespace) -> int:
    """Print what each backend says about a call, and the one that "auto" takes."""
    try:
        reasons = _example(args)
    except (TypeError, ValueError) as error:
        print(f"no backend: the call itself is wrong: {error}", file=sys.stderr)
        return 2
    direction = ("forward" if args.no_grad else "forward and backward") + (f", T = {args.tokens}" if args.tokens else "")
    title = f"{args.memory} memory, {args.bias}, {args.retention}, {args.dtype} on {args.device}, {direction}"
    can = lambda name: _can("can serve it, " + reasons.algorithms[name], name, args.device)
    rows = [(name, f"cannot: {reason}" if reason else can(name)) for name, reason in reasons.items()]
    _print_rows(title, rows)
    print(f'"auto" takes {next(name for name, reason in reasons.items() if reason is None)}')
    return 0


# ------------------------------------------------------------------------------------------------------------ verify


def _verify_arguments(parser: argparse.ArgumentParser) -> None:
    _memory_arguments(parser)
    parser.add_argument("--device", help="default: cuda where there is a GPU")
    parser.set_defaults(**{action.dest: None for action in parser._actions if action.dest != "help"})  # None: all of them
    parser.add_argument("--seconds", type=float, default=60.0, metavar="N", help="when to stop (default: 60)")


def verify_command(args: argparse.Namespace) -> int:
    """Try the kernels of this machine."""
    from .testing import trial

    return trial.command(args)


# ------------------------------------------------------------------------------------------------------------ warmup


def _several(parse: Callable[[str], object]) -> Callable[[str], tuple]:
    """A parser of a list with commas, without repetitions."""
    return lambda text: tuple(dict.fromkeys(map(parse, text.split(","))))


def _dtype(text: str) -> torch.dtype:
    if text not in DTYPES:
        raise argparse.ArgumentTypeError(f"unknown dtype {text!r}: expected one of {', '.join(DTYPES)}")
    return getattr(torch, text)


def _biases(text: str) -> tuple[biases.Bias, ...]:
    """Biases with commas between them, as between the parameters of one: a number belongs to the name before it."""
    if text == "all":
        return tuple(biases.TABLE.values())
    found: list[str] = []
    for piece in text.split(","):
        if found and piece and piece[0] in "+-.0123456789":
            found[-1] += f",{piece}"
        else:
            found.append(piece)
    return tuple(dict.fromkeys(map(_row(biases.TABLE, "bias"), found)))


def _warmup_arguments(parser: argparse.ArgumentParser) -> None:
    numbers = _several(_positive)
    parser.add_argument("--key-dim", type=numbers, default=(64, 128), metavar="N,...", help="head dimensions of keys (default: 64,128)")
    parser.add_argument("--value-dim", type=numbers, metavar="N,...", help="of values (default: that of the keys)")
    parser.add_argument("--chunk-size", type=numbers, default=(64,), metavar="N,...", help="default: 64")
    parser.add_argument("--dtype", type=_several(_dtype), default=(torch.bfloat16,), metavar="NAME,...",
                        help="of q, k and v (default: bfloat16)")  # fmt: skip
    parser.add_argument("--bias", type=_biases, default=_biases("l2,huber_switch"), metavar="NAME[:P,...],...",
                        help=f"{', '.join(_rows_by_name(biases.TABLE))}, or all (default: l2,huber_switch)")  # fmt: skip
    parser.add_argument("--no-decay", action="store_true", help="calls without log_decay")
    parser.add_argument("--no-grad", action="store_true", help="calls without a backward")
    parser.add_argument("--packed", action="store_true", help="calls with cu_seqlens")
    parser.add_argument("--final-state", action="store_true", help="calls that return the final state")
    parser.add_argument("--steps", action="store_true", help="a decoder's steps as well")
    parser.add_argument("--batch", type=_positive, default=1, help="B (default: 1, which serves all where T is as below)")
    parser.add_argument("--tokens", type=numbers, default=(2048,), metavar="N,...",
                        help="T (default: 2048; any serves all, if the number of heads is a multiple of 16)")  # fmt: skip
    parser.add_argument("--heads", type=numbers, default=(16,), metavar="N,...", help="H (default: 16, which serves its multiples)")
    parser.add_argument("--target", choices=warmup.TARGETS, help="compile for a chip that is not here, and print what the code needs")


def warmup_command(args: argparse.Namespace) -> int:
    """Compile the Triton kernels that calls of the sizes given will need."""
    values = args.value_dim or (None,)
    constants = itertools.product(args.dtype, args.key_dim, values, args.chunk_size, args.bias)
    variants = [
        warmup.Variant(
            key_dim, value_dim or key_dim, chunk_size, dtype, bias, args.batch, args.tokens, args.heads,
            decay=not args.no_decay, differentiate=not args.no_grad, packed=args.packed, final_state=args.final_state,
            steps=args.steps,
        )
        for dtype, key_dim, value_dim, chunk_size, bias in constants
    ]  # fmt: skip
    return warmup.run(variants, args.target)


# -------------------------------------------------------------------------------------------------------------- fuzz


def _fuzz_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backend", choices=(*dispatch.NAMES[1:], "all"), default="all", help="all: those that run on this CPU (the default)"
    )
    parser.add_argument("--seconds", type=float, default=60.0, metavar="N", help="for each backend (default: 60)")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="S", help="the same seed tries the same calls in the same order (default: 0)"
    )
    parser.add_argument("--replay", metavar="JSON", help="try one example again, as a failing run printed it")


def fuzz_command(args: argparse.Namespace) -> int:
    """Try random calls against the reference; 1 if one was wrong."""
    from .testing import fuzzing

    names = fuzzing.backends(args.backend)
    for name in names:
        reason = dispatch.unavailable(name)
        if reason is not None:
            print(f"fuzz: backend {name!r} cannot run here: {reason}", file=sys.stderr)
            return 2
    if args.replay is not None:
        return _replay(args.replay, names)
    for name in names:
        outcome = fuzzing.fuzz(name, args.seconds, args.seed)
        routes = ", ".join(f"{count} {route}" for route, count in outcome.tried.most_common())
        print(f"{name}: {sum(outcome.tried.values())} calls tried ({routes}); {sum(outcome.refused.values())} drawn that it does not serve")
        for reason, count in outcome.refused.most_common(5):
            print(f"  {count} times: {reason}")
        if outcome.failure is not None:
            example, complaint = outcome.failure
            setting = "TRITON_INTERPRET=1 " if name == "triton" else ""  # examples are CPU tensors
            command = f"{setting}python -m miras_kernels fuzz --backend {name} --replay '{example.encode()}'"
            print(f"WRONG: {complaint}\nrepeat with:\n  {command}")
            return 1
    return 0


def _replay(text: str, names: Sequence[str]) -> int:
    from .testing import fuzzing

    try:
        example = fuzzing.Example.decode(text)
    except ValueError as error:
        print(f"fuzz: {error}", file=sys.stderr)
        return 2
    wrong = 0
    for name in names:
        try:
            fuzzing.run_example(example, name)
            print(f"{name}: right")
        except fuzzing.Refused as reason:
            print(f"{name}: does not serve it: {reason}")
        except fuzzing.Failure as failure:
            print(f"{name}: WRONG: {failure}")
            wrong = 1
    return wrong


# -------------------------------------------------------------------------------------------------------------- main

#: name: (one line of help, adds arguments, runs)
COMMANDS: dict[str, tuple[str, Callable, Callable]] = {
    "info": ("versions, devices, backends and options (the default)", lambda parser: None, info),
    "explain": ("which backends can serve a call, and which one 'auto' takes", _explain_arguments, explain_command),
    "fuzz": ("random calls of everything public, checked against the reference", _fuzz_arguments, fuzz_command),
    "verify": ("compare this machine's kernels with the reference; 'auto' then leaves wrong ones alone", _verify_arguments, verify_command),
    "warmup": ("compile the Triton kernels that calls of given sizes need, before a job does", _warmup_arguments, warmup_command),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m miras_kernels", description="What miras-kernels can do on this machine.")
    parser.set_defaults(run=info)
    commands = parser.add_subparsers(metavar="COMMAND")
    for name, (text, add_arguments, run) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        add_arguments(command)
        command.set_defaults(run=run)
    args = parser.parse_args(arguments)
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
