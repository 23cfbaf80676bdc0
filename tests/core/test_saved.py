"""Files that an earlier version saved still load: a pickled layer, a pickled state with every bias and gate, a folder of a whole model.

The files in ``saved/`` were written at commit 7c81e26, before the modules moved.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import torch

import miras_kernels as mk
from miras_kernels.hf import load
from miras_kernels.tables.biases import TABLE as BIASES
from miras_kernels.tables.retention import TABLE as GATES

SAVED = Path(__file__).parent / "saved"
#: float32 sums in the order of another CPU: about 256 roundings that add up like a random walk, with a margin of 8
BOUND = 8 * math.sqrt(256) * torch.finfo(torch.float32).eps


def read(name: str) -> dict:
    return torch.load(SAVED / name, weights_only=False)


@torch.no_grad()
def test_a_pickled_layer():
    saved = read("block.pt")
    (y, _), (wanted, _) = saved["block"](saved["x"]), saved["y"]
    assert (y - wanted).norm() <= BOUND * wanted.norm()


def test_a_pickled_state_with_every_bias_and_gate():
    saved = read("state.pt")
    state = saved["state"]
    assert isinstance(state, mk.MemoryState) and isinstance(state.open_chunk, mk.OpenChunk) and state.momentum is not None
    assert state.open_chunk.position.tolist() == [1, 1]
    for rows, table in ((saved["biases"], BIASES), (saved["gates"], GATES)):
        assert {row.tag for row in rows} == set(table) - {mk.CustomBias.tag if table is BIASES else mk.CustomRetention.tag}  # newer
        for row in rows:
            assert type(row) is type(table[row.tag]) and type(row)(**vars_of(row)) == row


def vars_of(row) -> dict:
    return {field.name: getattr(row, field.name) for field in dataclasses.fields(row)}


@torch.no_grad()
def test_a_saved_folder():
    saved, model = read("logits.pt"), load(SAVED / "folder")
    logits = model(input_ids=saved["ids"], use_cache=False).logits
    assert (logits - saved["logits"]).norm() <= BOUND * saved["logits"].norm()
