"""The inputs at one shape. ``Case.draw`` works on the CPU in float64, so a few chunks of it are repeated to the full size."""

from __future__ import annotations

import dataclasses
import functools

import torch

from miras_kernels import L2, DotProduct, Huber, Lp
from miras_kernels.testing import Case, Inputs

from ..common.implementations import recurrence
from .plan import Settings, Shape

BIASES = {"l2": L2(), "huber_coordinate": Huber("coordinate"), "lp 3": Lp(3.0), "huber_switch": Huber("switch"), "dot": DotProduct()}
#: of q, k and v, for all implementations
DTYPE = torch.bfloat16


def case_of(shape: Shape, name: str, **changes) -> Case:
    """A test case in one of the benchmark's shapes, with a bias, or with a variant of the recurrence and the shape's usual bias."""
    kind = {"bias": BIASES[name]} if name in BIASES else {"bias": BIASES[shape.biases[0]], **recurrence(name)}
    sizes = {key: getattr(shape, key) for key in ("memory", "batch", "tokens", "heads", "key_dim", "value_dim", "chunk_size")}
    kind |= dict(hidden=shape.hidden, initial="dual", decay=kind.get("decay", "slight")) if shape.hidden else {"initial": "none"}
    return Case(f"gpu {shape} {name}", **(sizes | kind | changes))


@functools.lru_cache(maxsize=4)
def draw(shape: Shape, name: str, settings: Settings) -> Inputs:
    """Inputs on the device. The decays of an MLP memory get slighter with the length, so that all of them together leave a third of it:
    LayerNorm overflows on a memory that shrinks to nothing."""
    few = case_of(shape, name, batch=1, tokens=min(shape.tokens, 4 * shape.chunk_size), heads=1)
    drawn = few.draw(torch.float32).to(DTYPE, settings.device)
    tokens = lambda x: x.detach().repeat(shape.batch, -(-shape.tokens // few.tokens), shape.heads, *[1] * (x.dim() - 3))[:, : shape.tokens]
    full = lambda name, x: x.detach().repeat(shape.heads, 1) if name.startswith("ln_") else tokens(x)
    tensors = {name: full(name, x) for name, x in drawn.tensors.items()}
    if shape.hidden:
        tensors["log_decay"].mul_(min(1.0, 1024 / shape.tokens))
    duals = tuple(x.detach().repeat(shape.batch, shape.heads, 1, 1) for x in drawn.duals)
    case = dataclasses.replace(few, batch=shape.batch, tokens=shape.tokens, heads=shape.heads)
    return Inputs(
        case,
        {name: x.requires_grad_() for name, x in tensors.items()},
        tuple(x.requires_grad_() for x in duals),
        tokens(drawn.grad_out),
        (),
    )
