"""Between the public functions and the backends: operators and autograd. No mathematics here.

``miras_kernels::memory`` and ``miras_kernels::memory_backward`` are ordinary PyTorch operators (``torch.library``), with
fakes for ``torch.compile`` and one autograd formula for all backends. They carry a :class:`Call` as flat arguments. In plain
eager mode nobody looks at an operator, and its dispatch in Python costs a tenth of a short call: there a
``torch.autograd.Function`` with the same two halves calls the backend directly.
"""

import torch
from torch import Tensor

from . import dispatch
from .backends.reference import chunkwise, derived
from .call import Call
from .state import MemoryState, OpenChunk
from .tables import biases, retention
from .tracing import is_plain_eager

__all__ = ["run"]

#: the differentiable arguments, in the operators' order, before the state's tensors
DIFFERENTIABLE = (*Call.PER_TOKEN, "ln_weight", "ln_bias")
STATE = len(DIFFERENTIABLE)


def run(call: Call, backend: str, differentiate: bool, checkpoint_every: int) -> tuple[Tensor, MemoryState | None]:
    """Run a validated call on a backend: ``(out, final state or None)``, differentiable in every tensor."""
    if backend == "reference" and not (derived.covers(call) and not (differentiate and _ends_open(call))):
        return _run_reference(call)
    checkpoint_every = checkpoint_every if differentiate else 0
    if is_plain_eager(_tensors(call)):
        if differentiate:
            arguments = (*_flatten(call), backend, checkpoint_every)
            out, *tensors = _Memory.apply(arguments, *arguments[:STATE], *arguments[STATE])
        else:
            out, tensors, _ = _forward(call, backend, checkpoint_every)
    else:
        out, tensors, _ = torch.ops.miras_kernels.memory(*_flatten(call), backend, checkpoint_every)
    if not call.output_final_state:
        return out, None
    return out, _state_from(call, tensors)


def _tensors(call: Call) -> list[Tensor]:
    """The differentiable tensors of a call."""
    given = [getattr(call, name) for name in DIFFERENTIABLE]
    return [x for x in given if x is not None] + call.state.tensors()


def _run_reference(call: Call) -> tuple[Tensor, MemoryState | None]:
    """Differentiable PyTorch, for what no operator covers: autograd through it reaches cuts inside a chunk too."""
    dtype = call.state.dual[0].dtype
    erase_k = None if call.erase_k is None else call.erase_k.to(dtype)
    with torch.autocast(call.q.device.type, enabled=False):
        out, state = chunkwise.run(call.replace(q=call.q.to(dtype), k=call.k.to(dtype), v=call.v.to(dtype), erase_k=erase_k))
    out = out.to(call.v.dtype)
    if not call.output_final_state:
        return out, None
    state = state if _ends_open(call) else MemoryState(state.dual, state.momentum)
    return out, state.replace_tensors(_not_given(call, state.tensors()))


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


# -------------------------------------------------------------------------------------------------- flat arguments


def _flatten(call: Call) -> tuple:
    """A call as the operators' arguments, less the backend."""
    open_chunk = call.state.open_chunk
    return (
        call.q, call.k, call.v, call.lr, call.log_decay, call.delta, call.momentum, call.erase_k, call.key_log_decay,
        call.ln_weight, call.ln_bias,
        call.state.tensors(), None if open_chunk is None else open_chunk.position, call.cu_seqlens,
        call.memory, call.ln_eps, call.bias.code, call.retention.code, call.chunk_size, call.output_final_state,
        call.decay_first,
    )  # fmt: skip


def _call(
    q, k, v, lr, log_decay, delta, momentum, erase_k, key_log_decay, ln_weight, ln_bias, state, position, cu_seqlens,
    memory, ln_eps, bias, gate, chunk_size, output_final_state, decay_first,
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
        erase_k=erase_k, key_log_decay=key_log_decay, decay_first=decay_first,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ forward and backward


def _forward(call: Call, backend: str, checkpoint_every: int) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """``(out, final state tensors, saved for the backward)``."""
    out, final, saved = dispatch.BACKENDS[backend].forward(call, checkpoint_every)
    if not call.output_final_state:
        final = []
    elif not _ends_open(call):
        final = final[: len(call.state.matrices())]
    return out, _not_given(call, final), saved


def _not_given(call: Call, final: list[Tensor]) -> list[Tensor]:
    """``final``, of tensors of their own: an operator's outputs may be neither inputs nor each other, nor a new state the old one."""
    taken: list[Tensor] = call.state.tensors()
    for x in final:
        taken.append(x.clone() if any(x is y for y in taken) else x)
    return taken[len(taken) - len(final) :]


def _backward(
    call: Call, backend: str, checkpoint_every: int, saved: list[Tensor], grad_out: Tensor, grad_state: list[Tensor]
) -> list[Tensor]:
    """Gradients of the present differentiable arguments in their order, the initial matrices' last."""
    grads = dispatch.BACKENDS[backend].backward(call, checkpoint_every, saved, grad_out, grad_state)
    return [grads[name] for name in _present(call)] + grads["state"]


def _present(call: Call) -> list[str]:
    return [name for name in DIFFERENTIABLE if getattr(call, name) is not None]


def _remember(ctx, arguments: tuple, saved: list[Tensor]) -> None:
    """Keep an operator's arguments and what its forward saved."""
    ctx.set_materialize_grads(False)
    ctx.tensor_at = [i for i, x in enumerate(arguments) if isinstance(x, Tensor)]
    ctx.others = [None if isinstance(x, Tensor) or i == STATE else x for i, x in enumerate(arguments)]
    ctx.state_tensors = len(arguments[STATE])
    ctx.save_for_backward(*[arguments[i] for i in ctx.tensor_at], *arguments[STATE], *saved)


def _gradients(ctx, backward, grad_out: Tensor | None, grad_final: list[Tensor | None]) -> list:
    """Gradients in the places of an operator's arguments, by ``backward(arguments, saved, grad_out, grad_state)``."""
    arguments, tensors = list(ctx.others), list(ctx.saved_tensors)
    for i in ctx.tensor_at:
        arguments[i] = tensors.pop(0)
    arguments[STATE], saved = tensors[: ctx.state_tensors], tensors[ctx.state_tensors :]
    call = _call(*arguments[:-2])
    matrices = call.state.matrices()
    grad_state, grad_rest = grad_final[: len(matrices)], grad_final[len(matrices) :]
    if any(g is not None for g in grad_rest):
        raise RuntimeError(
            f"miras_kernels: the {arguments[-2]!r} backend does not differentiate through a state that was cut inside a chunk; cut at "
            "multiples of chunk_size, detach the state, or run both pieces with backend='reference'"
        )
    if all(g is None for g in grad_state):
        grad_state = []
    else:
        grad_state = [torch.zeros_like(x) if g is None else g for g, x in zip(grad_state, matrices, strict=True)]
    grads = list(backward(arguments, saved, torch.zeros_like(call.v) if grad_out is None else grad_out, grad_state))
    result: list = [None] * len(arguments)
    for name in _present(call):
        result[DIFFERENTIABLE.index(name)] = grads.pop(0)
    result[STATE] = grads + [None] * (ctx.state_tensors - len(grads))
    return result


class _Memory(torch.autograd.Function):
    """``apply(arguments of the operator, *its differentiable arguments, *the state's tensors)``, for plain eager mode."""

    @staticmethod
    def forward(ctx, arguments, *_):
        out, final, saved = _forward(_call(*arguments[:-2]), *arguments[-2:])
        _remember(ctx, arguments, saved)
        return out, *final

    @staticmethod
    def backward(ctx, grad_out, *grad_final):
        run = lambda arguments, *rest: _backward(_call(*arguments[:-2]), *arguments[-2:], *rest)
        if torch.is_grad_enabled():  # create_graph=True: the operator makes a second derivative an error, not a silent zero
            run = lambda arguments, *rest: torch.ops.miras_kernels.memory_backward(*arguments, *rest)
        grads = _gradients(ctx, run, grad_out, list(grad_final))
        return None, *grads[:STATE], *grads[STATE]


# --------------------------------------------------------------------------------------------------------- operators

_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor lr, Tensor? log_decay, Tensor? delta, Tensor? momentum, Tensor? erase_k, "
    "Tensor? key_log_decay, Tensor? ln_weight, Tensor? ln_bias, Tensor[] state, Tensor? position, Tensor? cu_seqlens, "
    "str memory, float ln_eps, str bias, str gate, SymInt chunk_size, bool output_final_state, bool decay_first, "
    "str backend, SymInt checkpoint_every"
)


@torch.library.custom_op("miras_kernels::memory", mutates_args=(), schema=f"({_ARGUMENTS}) -> (Tensor, Tensor[], Tensor[])")
def _memory(*arguments):
    out, final, saved = _forward(_call(*arguments[:-2]), *arguments[-2:])
    return out, [_own(x) for x in final], saved


def _own(x: Tensor) -> Tensor:
    """A contiguous tensor that shares its memory with no other, as an operator's outputs must be: a state may come as views."""
    whole = x.is_contiguous() and x.untyped_storage().nbytes() == x.numel() * x.element_size()
    return x if whole else x.clone(memory_format=torch.contiguous_format)


@_memory.register_fake
def _memory_fake(*arguments):
    call, (backend, checkpoint_every) = _call(*arguments[:-2]), arguments[-2:]
    final = [x.new_empty(x.shape) for x in _structure(call).tensors()] if call.output_final_state else []
    return call.v.new_empty(call.v.shape), final, dispatch.BACKENDS[backend].saved_like(call, checkpoint_every)


@torch.library.custom_op(
    "miras_kernels::memory_backward",
    mutates_args=(),
    schema=f"({_ARGUMENTS}, Tensor[] saved, Tensor grad_out, Tensor[] grad_state) -> Tensor[]",
)
def _memory_backward(*everything):
    *arguments, backend, checkpoint_every, saved, grad_out, grad_state = everything
    return _backward(_call(*arguments), backend, checkpoint_every, saved, grad_out, grad_state)


@_memory_backward.register_fake
def _memory_backward_fake(*arguments):
    call = _call(*arguments[:-5])
    tensors = [getattr(call, name) for name in _present(call)] + list(call.state.matrices())
    return [x.new_empty(x.shape) for x in tensors]


def _setup_context(ctx, inputs, output) -> None:
    _remember(ctx, inputs, output[2])


def _operator_backward(ctx, grad_out, grad_final, grad_saved):
    run = lambda arguments, *rest: torch.ops.miras_kernels.memory_backward(*arguments, *rest)
    return tuple(_gradients(ctx, run, grad_out, list(grad_final or [])))


_memory.register_autograd(_operator_backward, setup_context=_setup_context)
