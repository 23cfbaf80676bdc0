"""Shared by the subcommands: parsers of arguments, and printing of rows."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .. import dispatch, verification
from ..backends import triton as triton_backend
from ..tables import biases, memories, retention

DTYPES = ("float32", "bfloat16", "float16", "float64")


def print_rows(title: str, rows: Sequence[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in rows)
    print(title)
    for name, text in rows:
        print(f"  {name:{width}s}  {text}")


def can(what: str, backend: str, device: str) -> str:
    """That a backend can do something, with a note if it is slow or not verified."""
    interpreted = backend == "triton" and triton_backend.interpreted()
    what += ", but in Triton's interpreter, slowly: TRITON_INTERPRET is set" if interpreted else ""
    place = torch.device(device)
    return what if backend == "reference" or backend not in dispatch.candidates(place) else f"{what}; {verification.state(backend, place)}"


def rows_by_name(table: dict) -> dict:
    return {row.name: row for row in table.values()}


def row_parser(table: dict, what: str) -> Callable[[str], Any]:
    """A parser of ``NAME``, ``NAME:PARAMETER,...`` or ``custom:EXPRESSION,NAME=NUMBER,...`` for a table of biases or gates."""

    def parse(text: str) -> Any:
        name, _, numbers = text.partition(":")
        rows = rows_by_name(table)
        if name not in rows:
            raise argparse.ArgumentTypeError(f"unknown {what} {name!r}: expected one of {', '.join(rows)}")
        if not numbers:
            return rows[name]
        if name == "custom":
            try:
                return written(rows[name], numbers)
            except (TypeError, ValueError) as error:
                raise argparse.ArgumentTypeError(str(error)) from None
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


def written(row: Any, text: str) -> Any:
    """The row of an expression with the values of its names, ``e / (1 + (e / s)**2), s=1``; a loss begins with ``loss=``.

    Raises:
        ValueError: it is none.
    """
    expression, *parts = re.split(r",(?=\s*\w+\s*=)", text)
    values: dict[str, float] = {}
    for name, _, value in (part.partition("=") for part in parts):
        try:
            values[name.strip()] = float(value)
        except ValueError:
            raise ValueError(f"{row.name}: {name.strip()}: expected a number, got {value.strip()!r}") from None
    if expression.startswith("loss="):
        return type(row)(loss=expression.removeprefix("loss="), **values)
    return type(row)(expression, **values)


def positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected an integer >= 1, got {text!r}")
    return value


def memory_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--memory", choices=tuple(memories.TABLE), default="linear")
    bias_names, gate_names = (", ".join(rows_by_name(module.TABLE)) for module in (biases, retention))
    parser.add_argument("--bias", type=row_parser(biases.TABLE, "bias"), default=biases.L2(), metavar="NAME[:P,...]",
                        help=f"{bias_names}; with parameters: lp:2.5, custom:'e/(1+(e/s)**2),s=1'")  # fmt: skip
    parser.add_argument("--retention", type=row_parser(retention.TABLE, "retention gate"), default=retention.L2Retention(),
                        metavar="NAME[:P,...]", help=gate_names)  # fmt: skip
    parser.add_argument("--dim", type=positive, default=64, help="head dimension of keys, and of values without --value-dim")
    parser.add_argument("--value-dim", type=positive)
    parser.add_argument("--hidden", type=positive, help="of an MLP memory (default: 4 times --dim)")
    parser.add_argument("--chunk", type=positive, default=64, help="chunk_size")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
