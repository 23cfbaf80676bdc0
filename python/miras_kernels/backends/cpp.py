"""The C++ kernels for the CPU as a backend."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..call import Call
from ..dispatch import kept_states_like
from ..options import options
from ..tables.memories import LINEAR
from .reference.blocks import block_tokens

__all__ = ["CppBackend"]


class CppBackend:
    """Fused kernels of both memories, ``csrc/cpu``: float32 arithmetic, float32 or bfloat16 inputs."""

    name = "cpp"
    unverified = "take"  # continuous integration runs them
    variants: tuple[str, ...] = ("decay_first",)

    def __init__(self):
        self.extension, self.missing = _load()

    def unavailable(self) -> str | None:
        return self.missing

    def files(self) -> list[Path]:
        return [Path(self.extension.__file__)]

    def environment(self, device: torch.device) -> dict[str, str]:
        return {"capability": self.extension.cpu_capability()}

    def runs_on(self, device: torch.device) -> bool:
        return device.type == "cpu"

    def operands(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float32

    def refuses(self, call: Call, differentiate: bool) -> str | None:
        reason = self._out_of_range(call)
        if reason is None and call.decay_first and not block_tokens(call):
            return "it serves decay_first with L2(), lr and log_decay per token, and no momentum"
        if reason is None and differentiate and call.state.open_chunk is not None:
            return "it does not differentiate from a state that was cut inside a chunk"
        return reason

    def _out_of_range(self, call: Call) -> str | None:
        """What no kernel here takes."""
        if call.q.dtype not in (torch.float32, torch.bfloat16):
            return f"it computes in float32, for float32 or bfloat16 inputs, got {call.q.dtype}"
        return call.memory.kernels[self.name].sequences.exceeded_by(call)

    def forward(self, call: Call, checkpoint_every: int) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        if checkpoint_every == 0 and self.decodes(call):
            return self._forward_by_steps(call)
        chunk = call.state.open_chunk
        opened = (None, None, None) if chunk is None else (_matrices(call, chunk.start), chunk.position, chunk.log_decay)
        run = getattr(self.extension, f"{call.memory.name}_forward")
        out, dual, carried, start, log_decay, saved = run(
            *_inputs(call), *opened, _offsets(call), *_rules(call), call.chunk_size, _interval(call, checkpoint_every),
            call.output_final_state, *_block(call),
        )  # fmt: skip
        matrices = [dual, start] if call.momentum is None else [dual, carried, start]
        final = matrices if len(call.memory.matrices) == 1 else [x for pair in matrices for x in pair]
        return out, [*final, log_decay], [saved] if checkpoint_every else []

    def block_tokens(self, call: Call) -> int:
        return block_tokens(call)

    def decodes(self, call: Call) -> bool:
        """Whether a call without gradients has so few tokens that they are read one by one."""
        return call.cu_seqlens is None and not call.decay_first and 1 <= call.q.shape[1] <= call.memory.kernels[self.name].few

    def _forward_by_steps(self, call: Call) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        run = getattr(self.extension, f"{call.memory.name}_steps")
        chunk, state = call.state.open_chunk, call.state
        opened = ((), None, None) if chunk is None else (chunk.start, chunk.position, chunk.log_decay)
        out, dual, carried, start, log_decay = run(
            call.q, call.k, call.v, call.lr, call.log_decay, call.delta, call.momentum, call.ln_weight, call.ln_bias, call.ln_eps,
            state.dual, state.momentum or (), *opened, *_rules(call), call.chunk_size,
        )  # fmt: skip
        return out, [*dual, *carried, *start, log_decay], []

    def refuses_steps(self, call: Call) -> str | None:
        return self._out_of_range(call)

    def stepper(self, call: Call) -> Steps:
        return Steps(self.extension, call)

    def saved_like(self, call: Call, checkpoint_every: int) -> list[Tensor]:
        size = block_tokens(call) or call.chunk_size
        return kept_states_like(call.replace(chunk_size=size), _interval(call, checkpoint_every))

    def backward(self, call: Call, checkpoint_every: int, saved: list[Tensor], grad_out: Tensor, grad_state: list[Tensor]) -> dict:
        run = getattr(self.extension, f"{call.memory.name}_backward")
        duals = len(call.state.dual)
        *grads, d_dual, d_carried = run(
            *_inputs(call), _offsets(call), saved[0], grad_out, _matrices(call, grad_state[:duals]), _matrices(call, grad_state[duals:]),
            *_rules(call), call.chunk_size, _interval(call, checkpoint_every), *_block(call),
        )  # fmt: skip
        names = ("q", "k", "v", "lr", "log_decay", "delta", "momentum") + (("ln_weight", "ln_bias") if call.memory.needs_norm else ())
        state = [d_dual] if call.momentum is None else [d_dual, d_carried]
        return {
            **dict(zip(names, grads, strict=True)),
            "state": state if len(call.memory.matrices) == 1 else [x for pair in state for x in pair],
        }


class Steps:
    """Steps for calls like one: see :func:`miras_kernels.dispatch.stepper`."""

    def __init__(self, extension: object, call: Call):
        self.make = getattr(extension, f"{call.memory.name.capitalize()}Stepper")
        self.call = call

    def __call__(self, buffers, q, k, v, lr, log_decay, delta, momentum, out) -> None:
        if self.bind(buffers)(q, k, v, lr, log_decay, delta, momentum, out) is None:
            raise ValueError("a step's arguments are not like those of the call that it was made for")

    def bind(self, buffers) -> Callable[..., Tensor | None]:
        """``step(q, k, v, lr, log_decay, delta, momentum, out)`` on these buffers, which must stay where they are.

        Returns the output, or None if an argument is not as in the call: then nothing has happened.
        """
        call = self.call
        return self.make(
            call.q, call.k, call.v, call.lr, call.log_decay, call.delta, call.momentum, options.check_values is not False,
            call.ln_weight, call.ln_bias, call.ln_eps, buffers, *_rules(call), call.chunk_size,
        )  # fmt: skip


def _inputs(call: Call) -> tuple:
    norm = (call.ln_weight, call.ln_bias, call.ln_eps) if call.memory.needs_norm else ()
    gates = (call.lr, call.log_decay, call.delta, call.momentum)
    return call.q, call.k, call.v, *gates, *norm, _matrices(call, call.state.dual), _matrices(call, call.state.momentum)


def _matrices(call: Call, matrices: Sequence[Tensor] | None) -> Tensor | Sequence[Tensor] | None:
    """A memory's matrices as the extension takes them: one tensor, or two; None where there are none."""
    if not matrices:
        return None
    return matrices[0] if len(call.memory.matrices) == 1 else matrices


def _offsets(call: Call) -> Tensor | None:
    return None if call.cu_seqlens is None else call.cu_seqlens.to(torch.int64)


def _rules(call: Call) -> list[tuple[int, tuple[float, ...]]]:
    """The bias and the retention gate: their tags and parameters."""
    return [(row.tag, row.parameters) for row in (call.bias, call.retention)]


def _block(call: Call) -> tuple[int | bool, ...]:
    """The linear kernels' arguments ``block`` and ``decay_first``."""
    return (block_tokens(call), call.decay_first) if call.memory == LINEAR else ()


def _interval(call: Call, checkpoint_every: int) -> int:
    """How many chunks, or blocks of chunks, share a saved state."""
    size = block_tokens(call)
    return max(1, checkpoint_every * call.chunk_size // size) if checkpoint_every and size else checkpoint_every


def _load() -> tuple[object | None, str | None]:
    """The extension module and None, or None and the reason why it is missing."""
    try:
        return importlib.import_module("miras_kernels._C"), None
    except ImportError as error:
        try:
            reason = importlib.import_module("miras_kernels._build_info").CPP_MISSING
        except (ImportError, AttributeError):
            reason = None
        return None, f"the extension is not built: {reason}" if reason else f"the extension cannot be loaded: {error}"
