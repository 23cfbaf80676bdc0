"""Programs of custom biases and retention gates as csrc/cuda/interpret.h reads them."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..expressions import OPERATIONS, Program
from ..tables.custom import CustomBias, CustomRetention
from ..tables.row import Row

__all__ = ["REGISTERS", "encoded", "registers"]

#: kRegisters of csrc/cuda/interpret.h
REGISTERS = 32


def registers(row: Row) -> int:
    """How many registers the program of a row needs, 0 if it has none."""
    return _places(_program(row))[1] if isinstance(row, (CustomBias, CustomRetention)) else 0


def encoded(row: Row, device: torch.device) -> Tensor | None:
    """The program of a row, None if it has none."""
    if not isinstance(row, (CustomBias, CustomRetention)):
        return None
    program = _program(row)
    places, _ = _places(program)
    words = [len(program.instructions), places[program.outputs[0]]]
    for (operation, *operands), to in zip(program.instructions, places[_given(program) :], strict=True):
        words += [list(OPERATIONS).index(operation), to, *(places[x] for x in operands), *(0,) * (3 - len(operands))]
    constants = torch.tensor(program.constants, dtype=torch.float32).view(torch.int32)
    return torch.cat([torch.tensor(words, dtype=torch.int32), constants]).to(device)


def _program(row: CustomBias | CustomRetention) -> Program:
    return row.programs.psi if isinstance(row, CustomBias) else row.programs.primal


def _given(program: Program) -> int:
    return len(program.inputs) + len(program.constants)


@functools.lru_cache(maxsize=256)
def _places(program: Program) -> tuple[list[int], int]:
    """For every value its register, or REGISTERS + i for constant i; and how many registers there are."""
    inputs, given = len(program.inputs), _given(program)
    last = {x: i for i, (_, *operands) in enumerate(program.instructions) for x in operands}
    last |= dict.fromkeys(program.outputs, len(program.instructions))
    places = [*range(inputs), *range(REGISTERS, REGISTERS + given - inputs)]
    free, used = list(range(inputs, 3)), 3  # the kernels write three inputs
    for i, (_, *operands) in enumerate(program.instructions):
        free += {places[x] for x in operands if last[x] == i and not inputs <= x < given}
        if not free:
            free, used = [used], used + 1
        places.append(free.pop())
    return places, used
