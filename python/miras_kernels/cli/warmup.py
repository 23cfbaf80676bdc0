"""``warmup``: compile the Triton kernels that calls of given sizes need."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable

import torch

from .. import warmup
from ..tables import biases
from .shared import DTYPES, positive, row_parser, rows_by_name


def _several(parse: Callable[[str], object]) -> Callable[[str], tuple]:
    """A parser of a list with commas, without repetitions."""
    return lambda text: tuple(dict.fromkeys(map(parse, text.split(","))))


def _dtype(text: str) -> torch.dtype:
    if text not in DTYPES:
        raise argparse.ArgumentTypeError(f"unknown dtype {text!r}: expected one of {', '.join(DTYPES)}")
    return getattr(torch, text)


def _biases(text: str) -> tuple[biases.Bias, ...]:
    """A list of biases. Commas also separate the parameters of one: a number belongs to the name before it, and to an expression all that
    is no name of a bias."""
    if text == "all":
        return tuple(biases.TABLE.values())
    found: list[str] = []
    names = rows_by_name(biases.TABLE)
    for piece in text.split(","):
        expression = found and found[-1].startswith("custom:") and piece.partition(":")[0] not in names
        if found and (expression or (piece and piece[0] in "+-.0123456789")):
            found[-1] += f",{piece}"
        else:
            found.append(piece)
    return tuple(dict.fromkeys(map(row_parser(biases.TABLE, "bias"), found)))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    numbers = _several(positive)
    parser.add_argument("--key-dim", type=numbers, default=(64, 128), metavar="N,...", help="head dimensions of keys (default: 64,128)")
    parser.add_argument("--value-dim", type=numbers, metavar="N,...", help="of values (default: that of the keys)")
    parser.add_argument("--chunk-size", type=numbers, default=(64,), metavar="N,...", help="default: 64")
    parser.add_argument("--dtype", type=_several(_dtype), default=(torch.bfloat16,), metavar="NAME,...",
                        help="of q, k and v (default: bfloat16)")  # fmt: skip
    parser.add_argument("--bias", type=_biases, default=_biases("l2,huber_switch"), metavar="NAME[:P,...],...",
                        help=f"{', '.join(rows_by_name(biases.TABLE))}, or all (default: l2,huber_switch)")  # fmt: skip
    parser.add_argument("--no-decay", action="store_true", help="calls without log_decay")
    parser.add_argument("--no-grad", action="store_true", help="calls without a backward")
    parser.add_argument("--packed", action="store_true", help="calls with cu_seqlens")
    parser.add_argument("--final-state", action="store_true", help="calls that return the final state")
    parser.add_argument("--steps", action="store_true", help="a decoder's steps as well")
    parser.add_argument("--batch", type=positive, default=1, help="B (default: 1, which serves all where T is as below)")
    parser.add_argument("--tokens", type=numbers, default=(2048,), metavar="N,...",
                        help="T (default: 2048; any serves all, if the number of heads is a multiple of 16)")  # fmt: skip
    parser.add_argument("--heads", type=numbers, default=(16,), metavar="N,...", help="H (default: 16, which serves its multiples)")
    parser.add_argument("--target", choices=warmup.TARGETS, help="compile for a chip of another machine, and print what the code needs")


def run(args: argparse.Namespace) -> int:
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
