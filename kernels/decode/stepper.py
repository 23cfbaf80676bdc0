"""The way in to the decoding steps of either memory."""

from __future__ import annotations

from collections.abc import Callable

import torch

from . import linear, mlp


def stepper(call) -> Callable:
    """``run(buffers, q, k, v, lr, log_decay, delta, momentum, out)`` for calls like this one."""
    with torch.no_grad():
        return (linear if call.memory.name == "linear" else mlp).stepper(call)
