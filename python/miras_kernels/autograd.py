"""Between the public functions and the backends: operators and autograd. No mathematics here.

``miras_kernels::memory`` and ``miras_kernels::memory_backward`` are ordinary PyTorch operators (``torch.library``), with
fakes for ``torch.compile`` and one autograd formula for all backends. They carry a :class:`Call` as flat arguments. Dispatching an
operator in Python costs a tenth of a short call, and in plain eager mode nothing intercepts operators: there a
``torch.autograd.Function`` with the same two halves calls the backend directly.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import decode, dispatch
from .backends.reference import chunkwise, derived
from .call import Call
from .state import MemoryState, OpenChunk
from .tables import biases, retention
from .tables.memories import TABLE
from .tracing import is_plain_eager

__all__ = ["run"]


def run(call: Call, backend: str, differentiate: bool, checkpoint_every: int) -> tuple[Tensor, MemoryState | None]:
    """Run a validated call on a backend: ``(out, final state or None)``, differentiable in every tensor."""
    if backend == "reference" and not (derived.covers(call) and not (differentiate and _ends_open(call))):
        return _run_reference(call)
    checkpoint_every = checkpoint_every if differentiate else 0
    given = call.differentiable()
    if not is_plain_eager(given):
        out, tensors, _ = torch.ops.miras_kernels.memory(*_flatten(call), backend, checkpoint_every)
    elif differentiate:
        out, *tensors = _Memory.apply(call, backend, checkpoint_every, *given)
    else:
        out, tensors, _ = _forward(call, backend, checkpoint_every)
    if not call.output_final_state:
        return out, None
    return out, _structure(call).replace_tensors(tensors)


def _run_reference(call: Call) -> tuple[Tensor, MemoryState | None]:
    """Plain PyTorch, for calls without an operator; it also differentiates through states cut inside a chunk."""
    dtype = call.state.dual[0].dtype
    erase_k = None if call.erase_k is None else call.erase_k.to(dtype)
    with torch.autocast(call.q.device.type, enabled=False):
        out, state = chunkwise.run(call.replace(q=call.q.to(dtype), k=call.k.to(dtype), v=call.v.to(dtype), erase_k=erase_k))
    out = out.to(call.v.dtype)
    if not call.output_final_state:
        return out, None
    state = state if _ends_open(call) else MemoryState(state.dual, state.momentum)
    return out, state.replace_tensors(_own_tensors(call, state.tensors()))


# ------------------------------------------------------------------------------------------------------ final states


def _ends_open(call: Call) -> bool:
    """Whether sequences may end inside a chunk, so that the final state needs an open chunk."""
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
    """``[N]``: tokens that each sequence has read of its last chunk, 0 at a boundary."""
    before = 0 if call.state.open_chunk is None else call.state.open_chunk.position
    if call.cu_seqlens is not None:
        return (before + call.cu_seqlens.diff().to(torch.int64)) % call.chunk_size
    n = call.state.dual[0].shape[0]
    tokens = torch.full((n,), call.q.shape[1], dtype=torch.int64, device=call.q.device)
    return (before + tokens) % call.chunk_size


# -------------------------------------------------------------------------------------------------- flat arguments


def _flatten(call: Call) -> tuple:
    """A call as arguments of the operators, without backend and checkpoint_every."""
    open_chunk = call.state.open_chunk
    return (
        call.q, call.k, call.v, call.lr, call.log_decay, call.delta, call.momentum, call.erase_k, call.key_log_decay,
        call.ln_weight, call.ln_bias,
        call.state.tensors(), None if open_chunk is None else open_chunk.position, call.cu_seqlens,
        call.memory.name, call.ln_eps, call.bias.code, call.retention.code, call.chunk_size, call.output_final_state,
        call.decay_first,
    )  # fmt: skip


def _call(
    q, k, v, lr, log_decay, delta, momentum, erase_k, key_log_decay, ln_weight, ln_bias, state, position, cu_seqlens,
    memory, ln_eps, bias, gate, chunk_size, output_final_state, decay_first,
) -> Call:  # fmt: skip
    """The inverse of :func:`_flatten`."""
    m = len(TABLE[memory].matrices)
    open_chunk = None if position is None else OpenChunk(position, tuple(state[:m]), state[-1])
    structure = MemoryState(tuple(state[:m]), None if momentum is None else tuple(state[:m]), open_chunk)
    return Call(
        memory=TABLE[memory], q=q, k=k, v=v, lr=lr, log_decay=log_decay, delta=delta, momentum=momentum,
        ln_weight=ln_weight, ln_bias=ln_bias, ln_eps=ln_eps, state=structure.replace_tensors(state), cu_seqlens=cu_seqlens,
        bias=biases.from_code(bias), retention=retention.from_code(gate),
        chunk_size=chunk_size, output_final_state=output_final_state,
        erase_k=erase_k, key_log_decay=key_log_decay, decay_first=decay_first,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ forward and backward


def _forward(call: Call, backend: str, checkpoint_every: int) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """``(out, final state tensors, saved for the backward)``."""
    if checkpoint_every == 0 and dispatch.BACKENDS[backend].decodes(call):
        out, final = decode.read(call, backend)
        saved: list[Tensor] = []
    else:
        out, final, saved = dispatch.BACKENDS[backend].forward(call, checkpoint_every)
    if not call.output_final_state:
        final = []
    elif not _ends_open(call):
        final = final[: len(call.state.matrices())]
    return out, _own_tensors(call, final), saved


def _own_tensors(call: Call, final: list[Tensor]) -> list[Tensor]:
    """``final`` with inputs and repeated tensors cloned: an operator's outputs must be distinct from its inputs and from each other.

    With ``inplace_state``, which no operator has, a tensor may be that in its place in the initial state: it has been overwritten.
    """
    given = call.state.tensors()
    taken = list(given)
    for i, x in enumerate(final):
        overwritten = call.inplace_state and i < len(given) and x is given[i]
        taken.append(x.clone() if not overwritten and any(x is y for y in taken) else x)
    return taken[len(given) :]


def _backward(
    call: Call, backend: str, checkpoint_every: int, saved: list[Tensor], grad_out: Tensor, grad_state: list[Tensor]
) -> list[Tensor]:
    """Gradients of the differentiable arguments that are present, in their order, then of the initial matrices."""
    grads = dispatch.BACKENDS[backend].backward(call, checkpoint_every, saved, grad_out, grad_state)
    return [grads[name] for name in call.present()] + grads["state"]


#: stands for each of a call's tensors in autograd's context, which keeps the tensors themselves with save_for_backward
_SAVED = torch.empty(0)


def _save(ctx, call: Call, backend: str, checkpoint_every: int, saved: Sequence[Tensor]) -> None:
    """Keep a call, how it ran and what its forward saved."""
    ctx.set_materialize_grads(False)
    tensors = call.tensors()
    ctx.call, ctx.backend, ctx.checkpoint_every = call.replace_tensors([_SAVED] * len(tensors)), backend, checkpoint_every
    ctx.tensors = len(tensors)
    ctx.save_for_backward(*tensors, *saved)


def _gradients(ctx, backward: Callable, grad_out: Tensor | None, grad_final: Sequence[Tensor | None]) -> tuple[Call, list[Tensor | None]]:
    """The call that :func:`_save` kept, and gradients of :meth:`Call.differentiable`, by
    ``backward(call, backend, checkpoint_every, saved, grad_out, grad_state)``.
    """
    tensors = ctx.saved_tensors
    call = ctx.call.replace_tensors(tensors[: ctx.tensors])
    matrices = call.state.matrices()
    of_matrices, of_open_chunk = grad_final[: len(matrices)], grad_final[len(matrices) :]
    if any(g is not None for g in of_open_chunk):
        raise RuntimeError(
            f"miras_kernels: the {ctx.backend!r} backend does not differentiate through a state that was cut inside a chunk; cut at "
            "multiples of chunk_size, detach the state, or run both parts with backend='reference'"
        )
    grad_state: list[Tensor] = []
    if any(g is not None for g in of_matrices):
        grad_state = [torch.zeros_like(x) if g is None else g for g, x in zip(of_matrices, matrices, strict=True)]
    grad_out = torch.zeros_like(call.v) if grad_out is None else grad_out
    grads = list(backward(call, ctx.backend, ctx.checkpoint_every, list(tensors[ctx.tensors :]), grad_out, grad_state))
    return call, grads + [None] * (len(call.differentiable()) - len(grads))


def _backward_operator(call: Call, *rest) -> list[Tensor]:
    return torch.ops.miras_kernels.memory_backward(*_flatten(call), *rest)


class _Memory(torch.autograd.Function):
    """``apply(call, backend, checkpoint_every, *call.differentiable())``, for plain eager mode."""

    @staticmethod
    def forward(ctx, call, backend, checkpoint_every, *_):
        out, final, saved = _forward(call, backend, checkpoint_every)
        _save(ctx, call, backend, checkpoint_every, saved)
        return out, *final

    @staticmethod
    def backward(ctx, grad_out, *grad_final):
        # with create_graph=True the operator makes a second derivative an error, not a silent zero
        run = _backward_operator if torch.is_grad_enabled() else _backward
        return None, None, None, *_gradients(ctx, run, grad_out, grad_final)[1]


# --------------------------------------------------------------------------------------------------------- operators

_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor lr, Tensor? log_decay, Tensor? delta, Tensor? momentum, Tensor? erase_k, "
    "Tensor? key_log_decay, Tensor? ln_weight, Tensor? ln_bias, Tensor[] state, Tensor? position, Tensor? cu_seqlens, "
    "str memory, float ln_eps, str bias, str gate, SymInt chunk_size, bool output_final_state, bool decay_first, "
    "str backend, SymInt checkpoint_every"
)


@torch.library.custom_op("miras_kernels::memory", mutates_args=(), schema=f"({_ARGUMENTS}) -> (Tensor, Tensor[], Tensor[])")
def _memory(*arguments):
    *flat, backend, checkpoint_every = arguments
    out, final, saved = _forward(_call(*flat), backend, checkpoint_every)
    return out, [_with_own_storage(x) for x in final], saved


def _with_own_storage(x: Tensor) -> Tensor:
    """A contiguous tensor with a storage of its own, as an operator's outputs must be; a backend may return views."""
    whole = x.is_contiguous() and x.untyped_storage().nbytes() == x.numel() * x.element_size()
    return x if whole else x.clone(memory_format=torch.contiguous_format)


@_memory.register_fake
def _memory_fake(*arguments):
    *flat, backend, checkpoint_every = arguments
    call = _call(*flat)
    final = [x.new_empty(x.shape) for x in _structure(call).tensors()] if call.output_final_state else []
    return call.v.new_empty(call.v.shape), final, dispatch.BACKENDS[backend].saved_like(call, checkpoint_every)


@torch.library.custom_op(
    "miras_kernels::memory_backward",
    mutates_args=(),
    schema=f"({_ARGUMENTS}, Tensor[] saved, Tensor grad_out, Tensor[] grad_state) -> Tensor[]",
)
def _memory_backward(*arguments):
    *flat, backend, checkpoint_every, saved, grad_out, grad_state = arguments
    return _backward(_call(*flat), backend, checkpoint_every, saved, grad_out, grad_state)


@_memory_backward.register_fake
def _memory_backward_fake(*arguments):
    call = _call(*arguments[:-5])
    tensors = [getattr(call, name) for name in call.present()] + list(call.state.matrices())
    return [x.new_empty(x.shape) for x in tensors]


def _setup_context(ctx, inputs, output) -> None:
    *flat, backend, checkpoint_every = inputs
    _save(ctx, _call(*flat), backend, checkpoint_every, output[2])


def _operator_backward(ctx, grad_out, grad_final, grad_saved):
    call, grads = _gradients(ctx, _backward_operator, grad_out, grad_final or [])
    of_arguments = dict(zip(call.present(), grads, strict=False))
    # the rest: position, cu_seqlens, and the options of _ARGUMENTS
    return *map(of_arguments.get, Call.DIFFERENTIABLE), grads[len(of_arguments) :], *(None,) * 11


_memory.register_autograd(_operator_backward, setup_context=_setup_context)
