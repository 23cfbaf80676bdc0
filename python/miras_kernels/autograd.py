"""The operators between the public functions and the backends. No mathematics here.

``miras_kernels::memory`` and ``miras_kernels::memory_backward`` are ordinary PyTorch operators (``torch.library``), with
fakes for ``torch.compile`` and one autograd formula for all backends. They carry a :class:`Call` as flat arguments.
"""

# Annotations here are read by torch.library to make the schemas: no `from __future__ import annotations`.

import torch
from torch import Tensor

from . import biases, dispatch, retention
from .reference import chunkwise, derived
from .reference.inputs import Call
from .state import MemoryState, OpenChunk

__all__ = ["run"]


def run(call: Call, backend: str, differentiate: bool, checkpoint_every: int) -> tuple[Tensor, MemoryState | None]:
    """Run a validated call on a backend: ``(out, final state or None)``, differentiable in every tensor."""
    if backend == "reference" and not (derived.covers(call) and not (differentiate and _ends_open(call))):
        return _run_reference(call)
    out, tensors, _ = torch.ops.miras_kernels.memory(*_flatten(call), backend, checkpoint_every if differentiate else 0)
    if not call.output_final_state:
        return out, None
    return out, _state_from(call, tensors)


def _run_reference(call: Call) -> tuple[Tensor, MemoryState | None]:
    """Differentiable PyTorch, for what no operator covers: autograd through it reaches cuts inside a chunk too."""
    dtype = call.state.dual[0].dtype
    out, state = chunkwise.run(call.replace(q=call.q.to(dtype), k=call.k.to(dtype), v=call.v.to(dtype)))
    if not call.output_final_state:
        state = None
    elif not _ends_open(call):
        state = MemoryState(state.dual, state.momentum)
    return out.to(call.v.dtype), state


# ------------------------------------------------------------------------------------------------------ final states


def _ends_open(call: Call) -> bool:
    """Whether a final state must tell where in a chunk its sequences stopped."""
    if not call.output_final_state:
        return False
    return call.cu_seqlens is not None or call.state.open_chunk is not None or call.q.shape[1] % call.chunk_size != 0


def _structure(call: Call) -> MemoryState:
    """The final state's structure, holding the initial tensors (and, for an open chunk, their shapes)."""
    state = MemoryState(call.state.dual, call.state.momentum)
    if not _ends_open(call):
        return state
    dual = call.state.dual[0]
    n, h = dual.shape[:2]
    per_row = call.log_decay is not None and call.log_decay.dim() == 4
    log_decay = dual.new_empty(n, h, dual.shape[2]) if per_row else dual.new_empty(n, h)
    return MemoryState(call.state.dual, call.state.momentum, OpenChunk(_end_position(call), call.state.dual, log_decay))


def _end_position(call: Call) -> Tensor:
    """``[N]``: tokens of its last chunk that each sequence has read, 0 at a boundary."""
    before = 0 if call.state.open_chunk is None else call.state.open_chunk.position
    if call.cu_seqlens is not None:
        return (before + call.cu_seqlens.diff().to(torch.int64)) % call.chunk_size
    n = call.state.dual[0].shape[0]
    tokens = torch.full((n,), call.q.shape[1], dtype=torch.int64, device=call.q.device)
    return (before + tokens) % call.chunk_size


def _state_from(call: Call, tensors: list[Tensor]) -> MemoryState:
    return _structure(call).replace_tensors(tensors)


# --------------------------------------------------------------------------------------------------------- operators


def _flatten(call: Call) -> tuple:
    """A call as the operators' arguments, less the backend."""
    open_chunk = call.state.open_chunk
    return (
        call.q, call.k, call.v, call.lr, call.log_decay, call.delta, call.momentum, call.ln_weight, call.ln_bias,
        call.state.tensors(), None if open_chunk is None else open_chunk.position, call.cu_seqlens,
        call.memory, call.ln_eps, call.bias.code, call.retention.code, call.chunk_size, call.output_final_state,
    )  # fmt: skip


def _call(
    q, k, v, lr, log_decay, delta, momentum, ln_weight, ln_bias, state, position, cu_seqlens,
    memory, ln_eps, bias, gate, chunk_size, output_final_state,
) -> Call:  # fmt: skip
    """The call that :func:`_flatten` took apart."""
    m = 1 if memory == "linear" else 2
    open_chunk = None if position is None else OpenChunk(position, tuple(state[:m]), state[-1])
    structure = MemoryState(tuple(state[:m]), None if momentum is None else tuple(state[:m]), open_chunk)
    return Call(
        memory=memory, q=q, k=k, v=v, lr=lr, log_decay=log_decay, delta=delta, momentum=momentum,
        ln_weight=ln_weight, ln_bias=ln_bias, ln_eps=ln_eps, state=structure.replace_tensors(state), cu_seqlens=cu_seqlens,
        bias=biases.from_code(bias), retention=retention.from_code(gate),
        chunk_size=chunk_size, output_final_state=output_final_state,
    )  # fmt: skip


@torch.library.custom_op("miras_kernels::memory", mutates_args=())
def _memory(
    q: Tensor, k: Tensor, v: Tensor, lr: Tensor, log_decay: Tensor | None, delta: Tensor | None, momentum: Tensor | None,
    ln_weight: Tensor | None, ln_bias: Tensor | None, state: list[Tensor], position: Tensor | None,
    cu_seqlens: Tensor | None, memory: str, ln_eps: float, bias: str, gate: str, chunk_size: int,
    output_final_state: bool, backend: str, checkpoint_every: int,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
    """``(out, final state tensors, saved for the backward)``."""
    call = _call(
        q, k, v, lr, log_decay, delta, momentum, ln_weight, ln_bias, state, position, cu_seqlens, memory, ln_eps, bias,
        gate, chunk_size, output_final_state,
    )  # fmt: skip
    out, final, saved = dispatch.BACKENDS[backend].forward(call, checkpoint_every)
    if not output_final_state:
        final = []
    elif not _ends_open(call):
        final = final[: len(call.state.dual) * (1 if momentum is None else 2)]
    return out, [_owned(x, state) for x in final], saved


def _owned(x: Tensor, inputs: list[Tensor]) -> Tensor:
    """An operator's output may not be one of its inputs."""
    return x.clone() if any(x is y for y in inputs) else x


@_memory.register_fake
def _memory_fake(q, k, v, *rest):
    call, (backend, checkpoint_every) = _call(q, k, v, *rest[:-2]), rest[-2:]
    final = [x.new_empty(x.shape) for x in _structure(call).tensors()] if call.output_final_state else []
    return v.new_empty(v.shape), final, dispatch.BACKENDS[backend].saved_like(call, checkpoint_every)


@torch.library.custom_op("miras_kernels::memory_backward", mutates_args=())
def _memory_backward(
    q: Tensor, k: Tensor, v: Tensor, lr: Tensor, log_decay: Tensor | None, delta: Tensor | None, momentum: Tensor | None,
    ln_weight: Tensor | None, ln_bias: Tensor | None, state: list[Tensor], position: Tensor | None,
    cu_seqlens: Tensor | None, memory: str, ln_eps: float, bias: str, gate: str, chunk_size: int,
    output_final_state: bool, backend: str, checkpoint_every: int,
    saved: list[Tensor], grad_out: Tensor, grad_state: list[Tensor],
) -> list[Tensor]:  # fmt: skip
    """Gradients of the present differentiable arguments in their order, the state's tensors last."""
    call = _call(
        q, k, v, lr, log_decay, delta, momentum, ln_weight, ln_bias, state, position, cu_seqlens, memory, ln_eps, bias,
        gate, chunk_size, output_final_state,
    )  # fmt: skip
    grads = dispatch.BACKENDS[backend].backward(call, checkpoint_every, saved, grad_out, grad_state)
    return [grads[name] for name in _differentiable(call)] + grads["dual"]


def _differentiable(call: Call) -> list[str]:
    names = (*Call.PER_TOKEN, "ln_weight", "ln_bias")
    return [name for name in names if getattr(call, name) is not None]


@_memory_backward.register_fake
def _memory_backward_fake(q, k, v, *rest):
    call = _call(q, k, v, *rest[:-5])
    tensors = [getattr(call, name) for name in _differentiable(call)] + list(call.state.dual)
    return [x.new_empty(x.shape) for x in tensors]


def _setup_context(ctx, inputs, output) -> None:
    *arguments, ctx.backend, ctx.checkpoint_every = inputs
    call = _call(*arguments)
    _, final, saved = output
    ctx.set_materialize_grads(False)
    ctx.matrices = len(call.state.dual)
    ctx.state_tensors = len(arguments[9])
    ctx.counts = (ctx.state_tensors, len(saved))
    ctx.arguments = [None if isinstance(x, Tensor) or i == 9 else x for i, x in enumerate(arguments)]
    ctx.tensor_at = [i for i, x in enumerate(arguments) if isinstance(x, Tensor)]
    ctx.save_for_backward(*[arguments[i] for i in ctx.tensor_at], *arguments[9], *saved, *final[: ctx.matrices])


def _backward(ctx, grad_out, grad_final, grad_saved):
    tensors = list(ctx.saved_tensors)
    arguments = list(ctx.arguments)
    for i in ctx.tensor_at:
        arguments[i] = tensors.pop(0)
    arguments[9], saved, final = tensors[: ctx.counts[0]], tensors[ctx.counts[0] : sum(ctx.counts)], tensors[sum(ctx.counts) :]
    call = _call(*arguments)
    grad_final = list(grad_final or [])
    grad_dual = grad_final[: ctx.matrices]
    if any(g is not None for g in grad_final[ctx.matrices :]):
        raise RuntimeError(
            f"miras_kernels: the {ctx.backend!r} backend does not differentiate through a state that was cut inside a chunk; cut at "
            "multiples of chunk_size, detach the state, or run both pieces with backend='reference'"
        )
    if all(g is None for g in grad_dual):
        grad_dual = []
    else:
        grad_dual = [torch.zeros_like(x) if g is None else g for g, x in zip(grad_dual, final, strict=True)]
    if grad_out is None:
        grad_out = torch.zeros_like(call.v)
    grads = list(torch.ops.miras_kernels.memory_backward(*arguments, ctx.backend, ctx.checkpoint_every, saved, grad_out, grad_dual))
    result = [None] * (len(arguments) + 2)
    places = {name: i for i, name in enumerate((*Call.PER_TOKEN, "ln_weight", "ln_bias"))}
    for name in _differentiable(call):
        result[places[name]] = grads.pop(0)
    result[9] = grads
    return tuple(result)


_memory.register_autograd(_backward, setup_context=_setup_context)
