"""The C++ kernels for the CPU, ``csrc/cpu``, as a backend."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..call import Call
from ..options import options
from ..tables.biases import Bias
from ..tables.custom import CustomBias, CustomRetention
from ..tables.memories import LINEAR
from ..tables.retention import L2Retention, Retention
from . import checkpoints_like
from .reference.blocks import block_tokens

__all__ = ["CppBackend"]


class CppBackend:
    """Fused kernels of both memories: float32 arithmetic, float32 or bfloat16 inputs."""

    name = "cpp"
    unverified = "use"  # continuous integration runs them
    variants: tuple[str, ...] = ("decay_first", "erase_k", "key_log_decay")

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
        if dtype == torch.bfloat16 and self.extension and self.extension.cpu_capability() == "avx512_bf16":
            return dtype  # in chunks; not in decoding steps and exact steps in blocks
        return torch.float32

    def refuses(self, call: Call, differentiate: bool) -> str | None:
        reason = self._out_of_range(call)
        if reason is None and call.lasting_variants and not _block_tokens(call):
            return f"it serves {call.lasting_variants[0]} with L2(), lr and log_decay per token, and no momentum"
        if reason is None and differentiate and call.state.open_chunk is not None:
            return "it does not differentiate from a state that was cut inside a chunk"
        return reason

    def _out_of_range(self, call: Call) -> str | None:
        """The reason why no kernel here can serve a call, or None."""
        if call.q.dtype not in (torch.float32, torch.bfloat16):
            return f"it computes in float32, for float32 or bfloat16 inputs, got {call.q.dtype}"
        return call.exceeds(self.name)

    def forward(self, call: Call, checkpoint_every: int) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        chunk = call.state.open_chunk
        opened = (None, None, None) if chunk is None else (_matrices(call, chunk.start), chunk.position, chunk.log_decay)
        run = getattr(self.extension, f"{call.memory.name}_forward")
        out, dual, momenta, start, open_log_decay, *saved = run(
            *_inputs(call), opened, _offsets(call), _rules(call), _interval(call, checkpoint_every), call.output_final_state, *_block(call)
        )
        matrices = [dual, start] if call.momentum is None else [dual, momenta, start]
        final = matrices if len(call.memory.matrices) == 1 else [x for pair in matrices for x in pair]
        return out, [*final, open_log_decay], saved if checkpoint_every else []

    def block_tokens(self, call: Call) -> int:
        return _block_tokens(call)

    def decodes_decay_first(self, call: Call) -> bool:
        return call.key_log_decay is None and self.decodes(call)

    def decodes(self, call: Call) -> bool:
        """Whether a call without gradients has so few tokens that they are decoded one by one."""
        return call.cu_seqlens is None and not call.lasting_variants and 1 <= call.q.shape[1] <= call.memory.kernels[self.name].few

    def refuses_backward(self, call: Call) -> str | None:
        return None

    def refuses_steps(self, call: Call) -> str | None:
        return self._out_of_range(call)

    def stepper(self, call: Call) -> Steps:
        return Steps(self.extension, call)

    def repeated(self, call: Call) -> Callable[..., tuple[Tensor, Tensor | None] | None] | None:
        """``run(q, k, v, lr, log_decay, delta, dual)`` for calls without gradients like this one, of a linear memory whose dual is its
        state: the output and the dual after the tokens. It does nothing and returns None if an argument is not as in the call. None if
        there is no such function.
        """
        if call.memory is not LINEAR or call.momentum is not None or call.state.open_chunk is not None:
            return None
        arguments, check = (_tokens(call), _rules(call)), options.check_values is not False
        if self.decodes(call):
            direct = call.chunk_size == 1 and isinstance(call.retention, L2Retention)
            return self.extension.StateCalls(*arguments, call.decay_first, call.inplace_state, check) if direct else None
        ends_open = call.output_final_state and call.q.shape[1] % call.chunk_size != 0
        if call.cu_seqlens is not None or call.variants or _block_tokens(call) or call.inplace_state or ends_open:
            return None
        return self.extension.SequenceCalls(*arguments, call.output_final_state, check)

    def saved_like(self, call: Call, checkpoint_every: int) -> list[Tensor]:
        size = _block_tokens(call) or call.chunk_size
        checkpoints = checkpoints_like(call.replace(chunk_size=size), _interval(call, checkpoint_every))
        if call.memory is LINEAR or not checkpoints:
            return checkpoints
        b, t, h, d = call.v.shape
        empty = checkpoints[0].new_empty
        return [*checkpoints, empty(2, b, h, t, d), empty(b, h, t, call.chunk_size)]  # MlpParams::products and scores of csrc/params.h

    def backward(self, call: Call, checkpoint_every: int, saved: list[Tensor], grad_out: Tensor, grad_state: list[Tensor]) -> dict:
        run = getattr(self.extension, f"{call.memory.name}_backward")
        duals = len(call.state.dual)
        *grads, d_dual, d_momenta = run(
            *_inputs(call), _offsets(call), _rules(call), _interval(call, checkpoint_every), *saved, grad_out,
            (_matrices(call, grad_state[:duals]), _matrices(call, grad_state[duals:])), *_block(call),
        )  # fmt: skip
        names: tuple[str, ...] = ("q", "k", "v", "lr", "log_decay", "delta", "momentum")
        names += ("ln_weight", "ln_bias") if call.memory.needs_norm else ("erase_k", "key_log_decay")
        state = [d_dual] if call.momentum is None else [d_dual, d_momenta]
        return {
            **dict(zip(names, grads, strict=True)),
            "state": state if len(call.memory.matrices) == 1 else [x for pair in state for x in pair],
        }


class Steps:
    """Decoding steps for calls like one: see :func:`miras_kernels.dispatch.stepper`."""

    def __init__(self, extension: Any, call: Call):
        self.extension, self.call = extension, call

    def __call__(self, buffers, q, k, v, lr, log_decay, delta, momentum, out) -> None:
        if self.bind(buffers)(q, k, v, lr, log_decay, delta, momentum, out) is None:
            raise ValueError("a step's arguments are not like those of the call that it was prepared for")

    def bind(self, buffers) -> Callable[..., Tensor | None]:
        """``step(q, k, v, lr, log_decay, delta, momentum, out)`` on these buffers, which must stay where they are.

        It returns the output, or does nothing and returns None if an argument is not as in the call.
        """
        make = getattr(self.extension, f"{self.call.memory.name.capitalize()}Stepper")
        return make(_tokens(self.call), _norm(self.call), buffers.all(), _rules(self.call), options.check_values is not False)

    def on_value(self) -> tuple[Tensor, list[Tensor]]:
        """Decode the call on its state as a value, without a decoder's buffers."""
        call, state, chunk = self.call, self.call.state, self.call.state.open_chunk
        run = getattr(self.extension, f"{call.memory.name}_steps")
        opened = ((), None, None) if chunk is None else (chunk.start, chunk.position, chunk.log_decay)
        matrices = (state.dual, state.momentum or ())
        how = (call.decay_first, call.inplace_state)
        out, dual, momenta, start, open_log_decay = run(_tokens(call), _norm(call), matrices, opened, _rules(call), *how)
        return out, [*dual, *momenta, *start, open_log_decay]


def _inputs(call: Call) -> tuple:
    """The first arguments of the extension's functions."""
    norm = (_norm(call),) if call.memory.needs_norm else ()
    return _tokens(call), *norm, (_matrices(call, call.state.dual), _matrices(call, call.state.momentum))


def _tokens(call: Call) -> tuple:
    return call.q, call.k, call.v, call.lr, call.log_decay, call.delta, call.momentum


def _norm(call: Call) -> tuple:
    return call.ln_weight, call.ln_bias, call.ln_eps


def _matrices(call: Call, matrices: Sequence[Tensor] | None) -> Tensor | Sequence[Tensor] | None:
    """A memory's matrices as the extension takes them: one tensor, or two; None if there are none."""
    if not matrices:
        return None
    return matrices[0] if len(call.memory.matrices) == 1 else matrices


def _offsets(call: Call) -> Tensor | None:
    return None if call.cu_seqlens is None else call.cu_seqlens.to(torch.int64)


def _rules(call: Call) -> tuple:
    """The rules of the bias and of the retention gate, and the chunk size."""
    return _rule(call.bias), _rule(call.retention), call.chunk_size


@functools.lru_cache(maxsize=256)
def _rule(row: Bias | Retention) -> tuple:
    """Tag, parameters, and the program of a custom row, compiled for the kernels."""
    if isinstance(row, CustomBias):
        return row.tag, row.parameters, _program(row, "psi", "derivatives")
    if isinstance(row, CustomRetention):
        return row.tag, row.parameters, _program(row, "primal", "slope")
    return row.tag, row.parameters, None


def _program(row: CustomBias | CustomRetention, *names: str) -> Any:
    value, derivatives = (getattr(row.programs, name) for name in names)
    lines = lambda x: (x.constants, [(operation, operands) for operation, *operands in x.instructions], x.outputs)
    return importlib.import_module("miras_kernels._C").Program(len(value.inputs), lines(value), lines(derivatives))


#: tokens of a block with erase_k or key_log_decay, whose pairs of tokens are taken one by one
_KEYED_BLOCK = 16


def _block_tokens(call: Call) -> int:
    """How many tokens a block of this call has, or 0 where it is not computed in blocks."""
    plain = block_tokens(call)
    keyed = call.erase_k is not None or call.key_log_decay is not None
    return min(plain, _KEYED_BLOCK) if keyed else plain


def _block(call: Call) -> tuple[tuple, ...]:
    """The linear kernels' argument ``block``."""
    return ((_block_tokens(call), call.decay_first, call.erase_k, call.key_log_decay),) if call.memory is LINEAR else ()


def _interval(call: Call, checkpoint_every: int) -> int:
    """How many chunks, or blocks of chunks, share a checkpoint."""
    size = _block_tokens(call) if checkpoint_every else 0
    return max(1, checkpoint_every * call.chunk_size // size) if size else checkpoint_every


def _load() -> tuple[Any, str | None]:
    """The extension module and None, or None and the reason why it is not there."""
    try:
        return importlib.import_module("miras_kernels._C"), None
    except ImportError as error:
        try:
            reason = importlib.import_module("miras_kernels._build_info").CPP_MISSING
        except (ImportError, AttributeError):
            reason = None
        return None, f"the extension is not built: {reason}" if reason else f"the extension cannot be loaded: {error}"
