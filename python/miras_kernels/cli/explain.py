"""``explain``: which backends can serve a call, and the one that "auto" takes."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch

from .. import explain
from ..tables import memories
from .shared import can, memory_arguments, positive, print_rows

DEVICES = ("cpu", "cuda", "mps", "xpu")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    memory_arguments(parser)
    parser.add_argument("--device", choices=DEVICES, default="cpu", help="need not exist here: nothing is computed")
    parser.add_argument("--decay", choices=("none", "scalar", "channel"), default="scalar")
    parser.add_argument("--lr", choices=("scalar", "channel"), default="scalar")
    parser.add_argument("--momentum", action="store_true")
    parser.add_argument("--no-grad", action="store_true", help="forward alone")
    parser.add_argument("--tokens", type=positive, help="T (default: two chunks); with --no-grad and one or a few, decoding")


class Placeholder(torch.Tensor):
    """A tensor without data that reports any device. PyTorch's own fake tensors import its compiler, and triton."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    where: Any
    device = property(lambda self: self.where)


def _example(args: argparse.Namespace) -> dict[str, str | None]:
    """:func:`miras_kernels.explain` of a call like the one described, with tensors that hold no numbers."""
    b, h, d, dv = 1, 1, args.dim, args.value_dim or args.dim
    t, hidden = args.tokens or 2 * args.chunk, args.hidden or 4 * args.dim
    memory, dtype = memories.TABLE[args.memory], getattr(torch, args.dtype)
    wide = torch.float64 if args.dtype == "float64" else torch.float32

    def make(*shape: int, dtype: torch.dtype = wide) -> torch.Tensor:
        x: Placeholder = torch.empty(*shape, dtype=dtype, device="meta").as_subclass(Placeholder)
        x.where = torch.device(args.device)
        return x

    def gate(kind: str) -> torch.Tensor | None:
        return None if kind == "none" else make(b, t, h, *([dv] if kind == "channel" else []))

    call = dict(q=make(b, t, h, d, dtype=dtype), k=make(b, t, h, d, dtype=dtype), v=make(b, t, h, dv, dtype=dtype),
                lr=gate(args.lr), log_decay=gate(args.decay), bias=args.bias, retention=args.retention,
                chunk_size=args.chunk, memory=memory.name,
                initial_state=tuple(make(h, *shape) for shape in memory.shapes(d, dv, hidden)))  # fmt: skip
    call["q"].requires_grad_(not args.no_grad)  # one is enough
    if args.bias.needs_delta:
        call["delta"] = make(b, t, h)
    if args.momentum:
        call["momentum"] = make(b, t, h)
    if memory.needs_norm:
        call |= dict(ln_weight=make(h, dv), ln_bias=make(h, dv))
    return explain(**call)


def run(args: argparse.Namespace) -> int:
    """Print whether each backend can serve a call, and the one that "auto" takes."""
    try:
        reasons = _example(args)
    except (TypeError, ValueError) as error:
        print(f"no backend: the call itself is wrong: {error}", file=sys.stderr)
        return 2
    direction = ("forward" if args.no_grad else "forward and backward") + (f", T = {args.tokens}" if args.tokens else "")
    title = f"{args.memory} memory, {args.bias}, {args.retention}, {args.dtype} on {args.device}, {direction}"
    rows = [(name, f"cannot: {reason}" if reason else can("can serve it", name, args.device)) for name, reason in reasons.items()]
    print_rows(title, rows)
    print(f'"auto" takes {next(name for name, reason in reasons.items() if reason is None)}')
    return 0
