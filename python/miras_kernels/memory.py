"""The public functions: signatures, shapes and equations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import autograd, decode, dispatch
from .backends.cpp import CppBackend
from .backends.cuda import CudaBackend
from .backends.reference.backend import ReferenceBackend
from .backends.triton import TritonBackend
from .call import Call
from .decode import repeat
from .state import MemoryState
from .tables import memories
from .tables.biases import L2, Bias
from .tables.memories import Memory
from .tables.retention import L2Retention, Retention
from .validation import make_call
from .window import takes_back

__all__ = ["explain", "linear_memory", "mlp_memory"]

dispatch.BACKENDS.update({backend.name: backend for backend in (ReferenceBackend(), CppBackend(), CudaBackend(), TritonBackend())})


@takes_back
def linear_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    log_decay: Tensor | None = None,
    *,
    bias: Bias = L2(),  # noqa: B008  immutable
    retention: Retention = L2Retention(),  # noqa: B008  immutable
    delta: float | Tensor | None = None,
    momentum: Tensor | None = None,
    erase_k: Tensor | None = None,
    key_log_decay: Tensor | None = None,
    decay_first: bool = False,
    chunk_size: int = 64,
    initial_state: MemoryState | Tensor | tuple[Tensor] | None = None,
    output_final_state: bool = False,
    inplace_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, MemoryState | None]:
    r"""A matrix that is trained on ``k -> v`` while the sequence is read, and read out with queries.

    Within a chunk of ``chunk_size`` tokens, counted from the sequence's start, with the dual :math:`A_0` at the chunk's start
    and the primal :math:`W_0 = \phi(A_0)` (Miras, arXiv 2504.13173, sections 3 and 5)::

        e_t = W_0 k_t - v_t
        S_t = momentum_t S_{t-1} - lr_t psi(e_t) k_t'           (without momentum: S_t = -lr_t psi(e_t) k_t')
        A_t = exp(log_decay_t) A_{t-1} + S_t
        o_t = (gamma_t W_0 + rho (A_t - gamma_t A_0)) q_t        gamma_t = exp(log_decay_1 + ... + log_decay_t)

    ``chunk_size`` is part of the model: changing it changes the outputs of the same weights. q and k are neither scaled nor normalised
    here.

    Args:
        q, k: ``[B, T, H, Dk]``, float64, float32, bfloat16 or float16; any strides. Under autocast they are cast like the
            arguments of a matrix product.
        v: ``[B, T, H, Dv]``, same dtype.
        lr: step sizes ``eta``, ``[B, T, H]`` or channel-wise ``[B, T, H, Dv]``. Gates are converted to float32 (float64 for float64
            inputs).
        log_decay: ``log(alpha) <= 0``, ``[B, T, H]`` or channel-wise ``[B, T, H, Dv]``; None for no decay. Channels are value
            channels: rows of ``A [Dv, Dk]`` decay. For a decay of its columns, by key channel, see ``key_log_decay``.
        bias: the attentional bias, see :mod:`miras_kernels.biases`.
        retention: the retention gate, see :mod:`miras_kernels.retention`.
        delta: threshold or radius, for the biases that have one: a float, ``[B, T, H]``, or ``[B, T, H, Dv]`` for
            ``Huber("coordinate")``.
        momentum: ``theta`` in [0, 1), ``[B, T, H]``.
        erase_k: ``[B, T, H, Dk]``, the keys whose error is taken, ``e_t = W_0 erase_k_t - v_t``; the write stays along ``k_t``. None: k.
            Comba (arXiv 2506.02475) erases along another key than it writes. Like the next two arguments it needs ``chunk_size=1`` and
            ``L2Retention()``, and the backends that do not serve it refuse it.
        key_log_decay: ``[B, T, H, Dk]``, the decay per key channel, ``A_t = A_{t-1} diag(exp(key_log_decay_t)) + S_t``, in the place of
            ``log_decay``: gated linear attention (GLA, arXiv 2312.06635, with ``DotProduct()``) and Kimi Delta Attention (KDA,
            arXiv 2510.26692, with ``decay_first``).
        decay_first: take the error after the decay, ``e_t = alpha_t A_{t-1} k_t - v_t``: Gated DeltaNet (arXiv 2412.06464) and KDA.
        initial_state: a :class:`MemoryState`, a dual ``[N, H, Dv, Dk]``, or a learned one ``[H, Dv, Dk]`` shared by all
            sequences; None for zeros.
        output_final_state: whether to return the state after the last token.
        inplace_state: overwrite ``initial_state`` with the state after the last token, and return that: the :class:`MemoryState` given, or
            one that holds the tensors given. Of an open chunk or momentum that the given state lacks, the returned one has new tensors.
            Without gradients only. With ``chunk_size=1`` and ``L2Retention()`` the C++ kernels then write no second state; they hold
            duals as ``[N, H, Dk, Dv]`` in memory, as those that this function returns do.
        cu_seqlens: ``[N + 1]`` int32 or int64, from 0 to T without decreasing: N sequences packed into ``B = 1``. The state of an
            empty one stays as it is.
        backend: "auto", "reference", "cpp", "triton" or "cuda". "auto" takes the fastest that can serve the call on the
            tensors' device, see :func:`explain`.

    Returns:
        ``out [B, T, H, Dv]`` in the dtype of the inputs, and the final state (float32 or float64) or None. Gradients reach
        every tensor argument, initial states included.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what was given.
    """
    settings = None
    if momentum is erase_k is key_log_decay is cu_seqlens is None:
        settings = (bias, retention, chunk_size, decay_first, output_final_state, inplace_state, backend)
        found = repeat(settings, q, k, v, lr, log_decay, delta, initial_state)
        if found is not None:
            return found
    return run(
        memories.LINEAR, q, k, v, lr, log_decay, bias=bias, retention=retention, delta=delta, momentum=momentum, chunk_size=chunk_size,
        initial_state=initial_state, output_final_state=output_final_state, inplace_state=inplace_state, cu_seqlens=cu_seqlens,
        erase_k=erase_k, key_log_decay=key_log_decay, decay_first=decay_first, backend=backend, remember=settings,
    )  # fmt: skip


@takes_back
def mlp_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    log_decay: Tensor | None = None,
    *,
    initial_state: MemoryState | tuple[Tensor, Tensor],
    ln_weight: Tensor,
    ln_bias: Tensor,
    ln_eps: float = 1e-6,
    bias: Bias = L2(),  # noqa: B008  immutable
    retention: Retention = L2Retention(),  # noqa: B008  immutable
    delta: float | Tensor | None = None,
    momentum: Tensor | None = None,
    chunk_size: int = 64,
    output_final_state: bool = False,
    inplace_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, MemoryState | None]:
    """A two-layer MLP ``M(x) = x + LN(W1 gelu(W2 x))`` that is trained on ``k -> v`` while the sequence is read.

    The recurrence of :func:`linear_memory` for each matrix, with a dual and a mirror map of its own and the same scalar gates. Gradients
    of both are taken at the chunk's start; the read-out at a token uses both matrices of that token (Titans, arXiv 2501.00663,
    section 3; TTT, arXiv 2407.04620; docs/mathematics.md, section 9). gelu has its tanh form; LN is over D.

    Args:
        q, k, v: ``[B, T, H, D]``: the residual needs ``Dk = Dv = D``.
        lr, log_decay, momentum: ``[B, T, H]``.
        initial_state: a :class:`MemoryState`, or ``(W1, W2)`` with W1 ``[N, H, D, Hd]`` or ``[H, D, Hd]`` and W2
            ``[N, H, Hd, D]`` or ``[H, Hd, D]``. Required: at zero both gradients are zero.
        ln_weight, ln_bias: ``[H, D]``, parameters of the LayerNorm, fixed in the inner loop.
        ln_eps: > 0.

    The other arguments, the returned values and the errors are those of :func:`linear_memory`.
    """
    return run(
        memories.MLP, q, k, v, lr, log_decay, bias=bias, retention=retention, delta=delta, momentum=momentum, chunk_size=chunk_size,
        initial_state=initial_state, output_final_state=output_final_state, inplace_state=inplace_state, cu_seqlens=cu_seqlens,
        ln_weight=ln_weight, ln_bias=ln_bias, ln_eps=ln_eps, backend=backend,
    )  # fmt: skip


#: by name of the memory
FUNCTIONS: dict[str, Callable[..., tuple[Tensor, MemoryState | None]]] = {"linear": linear_memory, "mlp": mlp_memory}


def run(memory: Memory, q: Tensor, k: Tensor, v: Tensor, lr: Tensor, log_decay: Tensor | None = None, *, backend: str = "auto",
        remember: tuple | None = None, **arguments) -> tuple[Tensor, MemoryState | None]:  # fmt: skip
    """Run a memory of :mod:`miras_kernels.tables.memories`; the arguments are those of its public function.

    Args:
        remember: the settings by which :func:`miras_kernels.decode.repeat` will find a call like this one.
    """
    call = given = _call(memory, q, k, v, lr, log_decay, arguments)
    differentiate = _differentiates(call)
    if call.inplace_state and differentiate:
        raise ValueError("inplace_state: True needs a call without gradients (torch.no_grad()), got arguments that require them")
    name = dispatch.choose(backend, call, differentiate)
    if call.q.shape[0] == 0 or call.q.shape[1] == 0:
        out, state = _nothing(call), call.state if call.inplace_state else call.state.map(torch.clone) if call.output_final_state else None
    else:
        if call.decays_before and (differentiate or not dispatch.BACKENDS[name].decodes_decay_first(call)):
            call = call.decayed()
        out, state = autograd.run(call, name, differentiate, call.checkpoint_interval(name))
    if call.inplace_state and state is not None:
        state = given.state.overwritten(state)
        initial = arguments["initial_state"]
        state = initial if isinstance(initial, MemoryState) and len(initial.tensors()) == len(state.tensors()) else state
    if remember is not None and name == "cpp" and not differentiate:
        decode.remember(remember, given)
    return out, state


def explain(
    q: Tensor, k: Tensor, v: Tensor, lr: Tensor, log_decay: Tensor | None = None, *, memory: str | None = None, **arguments
) -> dispatch.Explanation:
    """Which backends could serve a call, without running it.

    Args:
        memory: "linear" or "mlp"; by default the one that takes the arguments given.

    The other arguments are those of :func:`linear_memory` or :func:`mlp_memory`.

    Returns:
        For every backend, fastest first for the tensors' device, None if it can serve the call, else the reason why not: it does not
        support the call, or verification found it wrong on this machine (:func:`miras_kernels.verify`). ``backend="auto"`` takes the
        first one with None. The attribute ``algorithms`` says how those with None would compute it: in chunks, with exact steps in
        blocks, or token by token.
    """
    arguments.pop("backend", None)
    call = _call(memories.find(memory, arguments), q, k, v, lr, log_decay, arguments)
    return dispatch.explain(call, _differentiates(call))


def _call(memory: Memory, q: Tensor, k: Tensor, v: Tensor, lr: Tensor, log_decay: Tensor | None, arguments: dict[str, Any]) -> Call:
    q, k, v, erase_k = _autocast(q, k, v, arguments.get("erase_k"))
    if erase_k is not None:
        arguments["erase_k"] = erase_k
    call = make_call(memory, q, k, v, lr, log_decay, **arguments)
    if call.decay_first and call.log_decay is None and call.key_log_decay is None:
        return call.replace(decay_first=False)
    return call


def _autocast(*tensors: Any) -> tuple[Any, ...]:
    """Queries, keys and values, under autocast in its dtype, as for a matrix product."""
    first = tensors[0]
    if not isinstance(first, Tensor) or not torch.is_autocast_enabled(first.device.type):
        return tensors
    dtype = torch.get_autocast_dtype(first.device.type)
    cast = lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x
    return tuple(map(cast, tensors))


def _differentiates(call: Call) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in call.differentiable())


def _nothing(call: Call) -> Tensor:
    """The output of a call without tokens: empty, with zero gradients for every argument."""
    return torch.empty_like(call.v) + sum(0 * x.sum() for x in call.differentiable() if x.requires_grad)
