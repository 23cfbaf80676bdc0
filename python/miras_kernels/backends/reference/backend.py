"""The reference as a backend. Calls that derived.py covers go through the operators; autograd.py runs the others as plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ...call import Call
from ...tables.memories import LINEAR, MLP
from . import derived, step
from .blocks import block_tokens


class ReferenceBackend:
    """Serves every call."""

    name = "reference"
    unverified = "use"  # the others are compared with it
    variants: tuple[str, ...] = ("decay_first", "erase_k", "key_log_decay")

    def unavailable(self) -> None:
        return None

    def files(self) -> list[Path]:
        return []

    def environment(self, device: torch.device) -> dict[str, str]:
        return {}

    def block_tokens(self, call: Call) -> int:
        return block_tokens(call) if derived.covers(call) else 0

    def decodes(self, call: Call) -> bool:
        return False

    def decodes_decay_first(self, call: Call) -> bool:
        return False

    def runs_on(self, device: torch.device) -> bool:
        return True

    def operands(self, dtype: torch.dtype) -> torch.dtype:
        return dtype if dtype == torch.float64 else torch.float32

    def refuses(self, call: Call, differentiate: bool) -> None:
        return None

    def forward(self, call: Call, checkpoint_every: int) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        with torch.autocast(call.q.device.type, enabled=False):
            out, state, saved = derived.forward(_widen(call))
        return out.to(call.q.dtype).contiguous(), state.tensors(), saved if checkpoint_every else []

    def saved_like(self, call: Call, checkpoint_every: int) -> list[Tensor]:
        if not checkpoint_every:
            return []
        b, _, h, dk = call.q.shape
        n, dv, dual = derived.saved_chunks(call), call.v.shape[-1], call.state.dual[0]
        return [dual.new_empty(b, h, n, dv, dk), dual.new_empty(b, h, n, derived.saved_tokens(call), dv)]

    def backward(self, call: Call, checkpoint_every: int, saved: list[Tensor], grad_out: Tensor, grad_state: list[Tensor]) -> dict:
        grad_out = grad_out.to(saved[0].dtype)
        with torch.autocast(call.q.device.type, enabled=False):
            grads = derived.backward(_widen(call), saved, grad_out, grad_state[0] if grad_state else None)
        for name in ("q", "k", "v"):
            grads[name] = grads[name].to(call.q.dtype)
        grads = {name: x.contiguous() for name, x in grads.items()}
        return grads | {"state": [grads.pop("dual")]}

    def refuses_backward(self, call: Call) -> str | None:
        return None

    def refuses_steps(self, call: Call) -> str | None:
        return None if call.memory in (LINEAR, MLP) else f"it has no decoding step for {call.memory.title}"

    def stepper(self, call: Call) -> Callable:
        return step.stepper(call)


def _widen(call: Call) -> Call:
    """q, k and v in the dtype of the arithmetic (float32, or float64)."""
    dtype = call.state.dual[0].dtype
    return call.replace(q=call.q.to(dtype), k=call.k.to(dtype), v=call.v.to(dtype))
