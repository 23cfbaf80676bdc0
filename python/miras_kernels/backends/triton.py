"""The Triton kernels as a backend. Importing this module does not import triton."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from ..call import Call
from . import checkpoints_like, may_end_open

__all__ = ["TritonBackend"]


class TritonBackend:
    """Fused kernels, ``kernels/``: float32 states, tensor cores for 16-bit inputs."""

    name = "triton"
    unverified = "warn"
    variants: tuple[str, ...] = ("decay_first", "erase_k", "key_log_decay")

    def unavailable(self) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if not torch.cuda.is_available() and not interpreted():
            return "there is no GPU here (TRITON_INTERPRET=1, set before triton is imported, runs the kernels on CPU tensors, slowly)"
        return None

    def files(self) -> list[Path]:
        spec = importlib.util.find_spec("miras_kernels.kernels")
        folders = [] if spec is None else spec.submodule_search_locations or []
        return [path for folder in folders for path in Path(folder).rglob("*.py") if path.parent.name != "offline"]

    def environment(self, device: torch.device) -> dict[str, str]:
        import triton
        from triton import knobs

        found = {"triton": triton.__version__}
        if device.type == "cuda" and torch.version.hip is None:
            for tool in ("ptxas", "ptxas_blackwell"):  # the chip decides which one compiles
                try:
                    found[tool] = getattr(knobs.nvidia, tool).version
                except (AttributeError, RuntimeError):
                    found[tool] = "none"
        return found

    def runs_on(self, device: torch.device) -> bool:
        return device.type == "cuda" or (device.type == "cpu" and interpreted())

    def operands(self, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def decodes_decay_first(self, call: Call) -> bool:
        return False

    def refuses(self, call: Call, differentiate: bool) -> str | None:
        if not differentiate and self.decodes(call):
            return self.refuses_steps(call)
        reason = self._refuses_dtype(call) or call.exceeds(self.name)
        if reason is None and call.lasting_variants and not self.block_tokens(call):
            return f"it serves {call.lasting_variants[0]} with L2(), lr and log_decay per token, and no momentum"
        if reason is None and differentiate and call.state.open_chunk is not None:
            return "it does not differentiate from a state that was cut inside a chunk"
        return reason

    def _refuses_dtype(self, call: Call) -> str | None:
        if call.q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"it takes float32, bfloat16 or float16 inputs, got {call.q.dtype}"
        return None

    def block_tokens(self, call: Call) -> int:
        from miras_kernels.kernels.common import configs

        return configs.block_tokens(call)

    def decodes(self, call: Call) -> bool:
        """Whether a call without gradients has few enough tokens."""
        return call.cu_seqlens is None and not call.lasting_variants and 1 <= call.q.shape[1] <= call.memory.kernels[self.name].few

    def refuses_backward(self, call: Call) -> str | None:
        return None

    def refuses_steps(self, call: Call) -> str | None:
        return self._refuses_dtype(call) or call.exceeds(self.name, steps=True)

    def stepper(self, call: Call) -> Callable:
        from miras_kernels.kernels.decode.stepper import stepper

        return stepper(call)

    def forward(self, call: Call, checkpoint_every: int) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        from miras_kernels.kernels.common import launch

        forward = _sequence_kernels(call.memory.name).forward
        every = self._interval(call, checkpoint_every)
        out, final, checkpoints = forward(launch.Problem(call), every, call.output_final_state, may_end_open(call))
        return out, [] if final is None else final.tensors(), [] if checkpoints is None else [checkpoints]

    def saved_like(self, call: Call, checkpoint_every: int) -> list[Tensor]:
        return checkpoints_like(call.replace(chunk_size=self.block_tokens(call) or call.chunk_size), self._interval(call, checkpoint_every))

    def backward(self, call: Call, checkpoint_every: int, saved: list[Tensor], grad_out: Tensor, grad_state: list[Tensor]) -> dict:
        from miras_kernels.kernels.common import launch

        backward = _sequence_kernels(call.memory.name).backward
        return backward(launch.Problem(call), saved[0], self._interval(call, checkpoint_every), grad_out, grad_state)

    def _interval(self, call: Call, checkpoint_every: int) -> int:
        """How many chunks, or blocks of chunks, share a checkpoint."""
        size = self.block_tokens(call)
        return max(1, checkpoint_every * call.chunk_size // size) if checkpoint_every and size else checkpoint_every


@functools.cache
def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter: it decides this when it is imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def _sequence_kernels(memory: str) -> ModuleType:
    return importlib.import_module(f"miras_kernels.kernels.{memory}.sequence")
