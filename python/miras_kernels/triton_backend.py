"""The Triton kernels as a backend. Importing this module does not import triton."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch
from torch import Tensor

from .reference.inputs import Call
from .retention import L2Retention

__all__ = ["TritonBackend"]


class TritonBackend:
    """Fused linear-memory kernels, ``kernels/``: float32 states, tensor cores for 16-bit inputs."""

    name = "triton"

    def unavailable(self) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if not torch.cuda.is_available() and not interpreted():
            return "there is no GPU here (TRITON_INTERPRET=1, set before triton is imported, runs the kernels on CPU tensors, slowly)"
        return None

    def runs_on(self, device: torch.device) -> bool:
        return device.type == "cuda" or (device.type == "cpu" and interpreted())

    def operands(self, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def refuses(self, call: Call, differentiate: bool) -> str | None:
        from miras_kernels.kernels import configs

        if call.memory != "linear":
            return "it has the linear memory only, so far"
        if call.q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"it takes float32, bfloat16 or float16 inputs, got {call.q.dtype}"
        if not isinstance(call.retention, L2Retention):
            return f"it has L2Retention only, so far, got {call.retention}"
        if call.momentum is not None:
            return "it has no momentum, so far"
        for name in ("lr", "log_decay"):
            if getattr(call, name) is not None and getattr(call, name).dim() == 4:
                return f"it has no channel-wise {name} [B, T, H, Dv], so far"
        heads = max(call.q.shape[-1], call.v.shape[-1])
        if heads > configs.MAX_HEAD:
            return f"head dimensions are limited to {configs.MAX_HEAD}, got {heads}"
        if call.chunk_size not in configs.CHUNK_SIZES:
            return f"chunk_size must be one of {', '.join(map(str, configs.CHUNK_SIZES))}, got {call.chunk_size}"
        if differentiate and call.state.open_chunk is not None:
            return "it does not differentiate from a state that was cut inside a chunk"
        return None

    def forward(self, call: Call, checkpoint_every: int) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        from miras_kernels.kernels import launch, linear_fwd

        p = launch.Problem(call)
        out, final, checkpoints = linear_fwd.forward(p, checkpoint_every, call.output_final_state, _may_end_open(call))
        return out, list(final or ()), [] if checkpoints is None else [checkpoints]

    def saved_like(self, call: Call, checkpoint_every: int) -> list[Tensor]:
        if not checkpoint_every:
            return []
        dual, tokens, n = call.state.dual[0], call.q.shape[1], call.state.dual[0].shape[0]
        if call.cu_seqlens is None:
            slots = n * -(-tokens // (call.chunk_size * checkpoint_every))
        else:
            slots = n + tokens // (call.chunk_size * checkpoint_every)
        return [dual.new_empty(slots, dual.shape[1], dual.shape[3], dual.shape[2])]

    def backward(self, call: Call, checkpoint_every: int, saved: list[Tensor], grad_out: Tensor, grad_dual: list[Tensor]) -> dict:
        from miras_kernels.kernels import launch, linear_bwd

        grads = linear_bwd.backward(launch.Problem(call), saved[0], checkpoint_every, grad_out, grad_dual[0] if grad_dual else None)
        return {**grads, "dual": [grads["dual"]]}


@functools.cache
def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, as triton decides when it is imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def _may_end_open(call: Call) -> bool:
    """Whether a final state must tell where in a chunk its sequences stopped, as far as shapes tell."""
    return call.output_final_state and (call.cu_seqlens is not None or call.q.shape[1] % call.chunk_size != 0)
