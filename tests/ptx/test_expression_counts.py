"""Custom biases compile to the instructions of built-in ones."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch

import expressions
from miras_kernels.testing import Case
from ptx.compiling import compiled
from quick import slow

#: sizes whose chains hold their states in registers
SIZES = dict(key_dim=64, value_dim=32, chunk_size=64, tokens=128, batch=1, heads=1)


def instructions(case: Case) -> dict[str, list[str]]:
    """The PTX instructions of every kernel that a forward and a backward launch, with their operands but no register numbers."""
    from miras_kernels.kernels.offline.compile import recorded

    found = {}
    for x in recorded(case.draw(torch.bfloat16).call(), 4, "sm_90"):
        ptx = compiled(x.kernel, x.arguments, x.config, "sm_90").ptx
        found[x.kernel.__name__] = list(lines(ptx))
    return found


def lines(ptx: str) -> Iterator[str]:
    for line in ptx.splitlines():
        text = re.sub(r"\s+", " ", re.sub(r"%\w+", "%", line.split("//")[0])).strip()
        if text.endswith(";") and not text.startswith("."):
            yield text


@pytest.mark.slow
def test_l2_is_the_same_code():
    built_in, custom = expressions.pairs("l2", **SIZES)[0]
    assert instructions(custom) == instructions(built_in)


PAIRS = [pair for pair in expressions.pairs("count", **SIZES) if "bias-" in pair[0].name]


@pytest.mark.parametrize("pair", [slow(x) for x in PAIRS], ids=lambda pair: pair[0].name)
def test_the_number_of_instructions(pair):
    """At most 5 % more than a built-in bias has, in every kernel."""
    wanted, found = map(instructions, pair)
    assert wanted.keys() == found.keys()
    more = {name: (len(found[name]), len(wanted[name])) for name in wanted if len(found[name]) > 1.05 * len(wanted[name])}
    assert not more, more
