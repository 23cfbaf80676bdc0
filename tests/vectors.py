"""The independent numbers in tests/vectors: float64 inputs, outputs and gradients made by unrelated code."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import miras_kernels as mk

FILES = sorted((Path(__file__).parent / "vectors").glob("*.npz"))
BIASES = {
    "dot": mk.DotProduct,
    "l2": mk.L2,
    "l1": mk.L1,
    "lp": mk.Lp,
    "huber_coordinate": lambda: mk.Huber("coordinate"),
    "huber_norm": lambda: mk.Huber("norm"),
    "huber_switch": lambda **p: mk.Huber("switch", **p),
    "robust": mk.RobustL2,
}
GATES = {gate.name: type(gate) for gate in mk.retention.TABLE.values()}


def load(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """``(config, tensors)`` of one file."""
    with np.load(path) as data:
        return json.loads(str(data["config"])), {name: torch.from_numpy(data[name]) for name in data.files if name != "config"}


def arguments(config: dict, tensors: dict[str, Tensor]) -> tuple[dict, dict[str, Tensor]]:
    """Keyword arguments of the public function, and the leaves that the file has gradients for."""
    leaves = {
        name: x.clone().requires_grad_() for name, x in tensors.items() if f"grad_{name}" in tensors and name[:3] not in ("out", "fin")
    }
    keywords = {name: x for name, x in leaves.items() if not name.startswith("initial_dual")}
    duals = tuple(x for name, x in sorted(leaves.items()) if name.startswith("initial_dual"))
    keywords |= {
        "bias": BIASES[config["bias"]](**config["bias_params"]),
        "retention": GATES[config["retention"]](**config["retention_params"]),
        "chunk_size": config["chunk_size"],
        "initial_state": duals if len(duals) > 1 else duals[0],
        "output_final_state": True,
    }
    return keywords, leaves


def expected(tensors: dict[str, Tensor], leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """The expected outputs, final states and gradients, by name."""
    finals = {name: x for name, x in tensors.items() if name == "out" or name.startswith("final_")}
    return finals | {f"grad_{name}": tensors[f"grad_{name}"] for name in leaves}


def results(out: Tensor, state: mk.MemoryState, tensors: dict[str, Tensor], leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """The results of a run, under the same names."""
    found = {"out": out} | {f"final_dual_{i}": x for i, x in enumerate(state.dual)}
    found |= {f"final_momentum_{i}": x for i, x in enumerate(state.momentum or ())}
    loss = (out * tensors["grad_out"]).sum()
    loss = loss + sum((x * tensors[f"grad_final_dual_{i}"]).sum() for i, x in enumerate(state.dual))
    grads = torch.autograd.grad(loss, tuple(leaves.values()))
    return found | {f"grad_{name}": g for name, g in zip(leaves, grads, strict=True)}
