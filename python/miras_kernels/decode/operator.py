"""A decoder's step as a custom op, ``miras_kernels::step``, which ``torch.compile`` traces into one graph.

The operator writes a decoder's buffers in place and says so in its schema, so that a compiled program keeps them where they are. It
chooses the backend in every call: :meth:`Decoder.step <miras_kernels.decode.Decoder.step>`, which remembers its choice, cannot be traced.
"""

from __future__ import annotations

import string

import torch
from torch import Tensor

from .. import dispatch
from ..call import Call
from ..state import MemoryState
from ..tables import biases, memories, retention
from ..tracing import is_plain_eager
from .buffers import NAMES, Buffers, unpacked
from .decoder import Decoder

__all__ = ["step"]


def step(
    decoder: Decoder,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    log_decay: Tensor | None = None,
    *,
    delta: Tensor | None = None,
    momentum: Tensor | None = None,
    ln_weight: Tensor | None = None,
    ln_bias: Tensor | None = None,
    ln_eps: float = 1e-6,
) -> Tensor:
    """:meth:`Decoder.step <miras_kernels.decode.Decoder.step>` that also works under ``torch.compile``: ``[N, T, H, Dv]``. No gradients.

    Arguments are not checked; gates are tensors in the dtype of the arithmetic. ``ln_weight`` and ``ln_bias`` are given with every
    step, since a layer's parameters may have changed or moved to another device since the last one; the decoder's own are ignored.
    """
    if decoder.keeps:
        raise ValueError("decoder: one that keeps tokens is read by its method step; expected one without keep, got one with it")
    gates = (lr, log_decay, delta, momentum)
    run = _step if is_plain_eager([q, k, v]) else torch.ops.miras_kernels.step
    with torch.no_grad():
        return run(*_flatten(decoder, q, k, v, *gates, ln_weight, ln_bias, ln_eps))


def _flatten(decoder: Decoder, q, k, v, lr, log_decay, delta, momentum, ln_weight, ln_bias, ln_eps) -> tuple:
    """The operator's arguments."""
    dtype, settings = decoder.buffers.start.dtype, decoder.settings
    if ln_weight is not None:
        ln_weight, ln_bias = ln_weight.to(dtype), ln_bias.to(dtype)
    return (
        *decoder.buffers.all(), q, k, v, lr, log_decay, delta, momentum, ln_weight, ln_bias, ln_eps,
        decoder.memory.name, settings["bias"].code, settings["retention"].code, settings["chunk_size"], decoder.backend,
    )  # fmt: skip


def _step(*arguments) -> Tensor:
    buffers, tokens = Buffers(*arguments[: len(NAMES)]), arguments[len(NAMES) : -5]
    q, k, v, lr, log_decay, delta, momentum, ln_weight, ln_bias, ln_eps = tokens
    memory, bias, gate, chunk_size, backend = arguments[-5:]
    state = MemoryState(unpacked(buffers.start), None if buffers.momenta is None else unpacked(buffers.momenta))  # for its shapes
    call = Call(
        memory=memories.TABLE[memory], q=q, k=k, v=v, lr=lr, log_decay=log_decay, delta=delta, momentum=momentum,
        ln_weight=ln_weight, ln_bias=ln_bias, ln_eps=ln_eps, state=state, cu_seqlens=None, bias=biases.from_code(bias),
        retention=retention.from_code(gate), chunk_size=chunk_size, output_final_state=True,
    )  # fmt: skip
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    dispatch.stepper(backend, call)(buffers, q, k, v, lr, log_decay, delta, momentum, out)
    return out


_SCHEMA = ", ".join(f"Tensor({letter}!)? buffer_{name}" for letter, name in zip(string.ascii_lowercase, NAMES, strict=False))
_SCHEMA += (
    ", Tensor q, Tensor k, Tensor v, Tensor lr, Tensor? log_decay, Tensor? delta, Tensor? momentum, Tensor? ln_weight, "
    "Tensor? ln_bias, float ln_eps, str memory, str bias, str gate, SymInt chunk_size, str backend"
)
_operator = torch.library.custom_op(
    "miras_kernels::step", _step, mutates_args=tuple(f"buffer_{name}" for name in NAMES), schema=f"({_SCHEMA}) -> Tensor"
)


@_operator.register_fake
def _fake(*arguments) -> Tensor:
    v = arguments[len(NAMES) + 2]
    return v.new_empty(v.shape)
