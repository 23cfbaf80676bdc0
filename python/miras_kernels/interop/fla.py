"""Delta rules under the signatures of flash-linear-attention (``fla.ops``, version 0.6), on CPUs and GPUs, differentiable.

::

    from miras_kernels.interop.fla import chunk_gated_delta_rule      # instead of fla.ops.gated_delta_rule's

Argument names, layouts, defaults and return values are those of flash-linear-attention; arguments after ``use_qk_l2norm_in_kernel`` are
keyword-only, since their order differs between its versions. All functions compute, with ``S [K, V]`` per value head::

    S_t = diag(alpha_t) S_{t-1} + beta_t k_t (v_t - k_t' diag(alpha_t) S_{t-1})
    o_t = scale q_t' S_t

with ``alpha_t = exp(g_t)`` per token (gated delta rule), per key channel (KDA) or 1 (delta rule). They are
:func:`~miras_kernels.linear_memory` with ``chunk_size=1``, ``L2()`` and (where something decays) ``decay_first=True``: a kernel's block
size is not part of the model, so ``chunk_*`` and ``fused_recurrent_*`` are one algorithm here. What concerns the kernels of
flash-linear-attention alone (``chunk_size``, ``cu_seqlens_cpu``, ``safe_gate``) is accepted and changes nothing. Keywords that are not
listed here (``cp_context``, ``head_first``, ``return_intermediate_states`` ...) are errors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..memory import linear_memory

__all__ = ["chunk_delta_rule", "chunk_gated_delta_rule", "chunk_kda", "fused_recurrent_gated_delta_rule"]


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    *,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor | None]:
    """The gated delta rule (Gated DeltaNet, arXiv 2412.06464).

    Args:
        q, k: ``[B, T, H, K]``.
        v: ``[B, T, HV, V]``; HV is a multiple of H, and consecutive value heads share a query and key head.
        g: ``[B, T, HV]``, the logarithm of the decay, <= 0.
        beta: ``[B, T, HV]``, step sizes.
        scale: of the queries; ``K ** -0.5`` by default.
        initial_state: ``[N, HV, K, V]``, with ``state_v_first`` ``[N, HV, V, K]``; N is B, or the number of packed sequences.
        output_final_state: whether to return the state after the last token.
        use_qk_l2norm_in_kernel: divide queries and keys by ``sqrt(sum of squares + 1e-6)``, in float32.
        use_gate_in_kernel: the decay is ``-exp(A_log) softplus(g + dt_bias)``, with ``A_log`` and ``dt_bias`` ``[HV]``.
        use_beta_sigmoid_in_kernel: the step size is ``sigmoid(beta)``; with ``allow_neg_eigval`` twice that.
        state_v_first: the layout of both states.
        cu_seqlens: ``[N + 1]``, packs N sequences into ``B = 1``.

    Returns:
        ``o [B, T, HV, V]`` in the dtype of the inputs, and the final state (float32 or float64) or None.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    _check_block(chunk_size, (16, 32, 64))
    shape = _shape(q, k, v)
    _expect("g", g, shape[:3])
    if use_gate_in_kernel:
        g = _gate(g, A_log, dt_bias, shape[2:3])
    beta = _step_size(beta, shape, use_beta_sigmoid_in_kernel, allow_neg_eigval)
    return _run(
        q, k, v, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, state_v_first, cu_seqlens,
        log_decay=g, decay_first=True,
    )  # fmt: skip


def fused_recurrent_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    *,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """:func:`chunk_gated_delta_rule`, also with a decay per key channel ``gk [B, T, HV, K]`` or per value channel ``gv [B, T, HV, V]``
    (not both), which multiplies that of ``g``. Without ``beta`` step sizes are 1. Unlike flash-linear-attention's it is differentiable."""
    shape = _shape(q, k, v)
    for name, x, size in (("g", g, shape[:3]), ("gk", gk, (*shape[:3], q.shape[-1])), ("gv", gv, shape)):
        if x is not None:
            _expect(name, x, size)
    if gk is not None and gv is not None:
        raise ValueError("gv: expected None beside gk (decays per key channel and per value channel are not served together), got both")
    if use_gate_in_kernel:
        if g is None:
            raise ValueError("g: use_gate_in_kernel=True needs it, got None")
        g = _gate(g, A_log, dt_bias, shape[2:3])
    beta = _step_size(q.new_ones(shape[:3]) if beta is None else beta, shape, use_beta_sigmoid_in_kernel, allow_neg_eigval)
    by_channel = gk if gk is not None else gv
    decay = g
    if by_channel is not None:
        decay = by_channel if g is None else by_channel.to(torch.promote_types(by_channel.dtype, g.dtype)) + g.unsqueeze(-1)
    return _run(
        q, k, v, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, state_v_first, cu_seqlens,
        **{"log_decay" if gk is None else "key_log_decay": decay}, decay_first=decay is not None,
    )  # fmt: skip


def chunk_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    *,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor | None]:
    """The delta rule (DeltaNet, arXiv 2406.06484): :func:`chunk_gated_delta_rule` without decay. It takes float32 as well."""
    _check_block(chunk_size, (16, 32, 64))
    _expect("beta", beta, _shape(q, k, v)[:3])
    return _run(q, k, v, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, False, cu_seqlens)


def chunk_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    *,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    safe_gate: bool = False,
    lower_bound: float | None = None,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor | None]:
    """Kimi Delta Attention (arXiv 2510.26692): :func:`chunk_gated_delta_rule` with a decay per key channel.

    Args:
        g: ``[B, T, HV, K]``.
        use_gate_in_kernel: the decay is ``-exp(A_log) softplus(g + dt_bias)``, with ``A_log [HV]`` and ``dt_bias [HV * K]``;
            with ``lower_bound`` (< 0) it is ``lower_bound sigmoid(exp(A_log) (g + dt_bias))``, where ``A_log`` may be None.

    The other arguments and the returned values are those of :func:`chunk_gated_delta_rule`.
    """
    _check_block(chunk_size, (32, 64))
    shape = _shape(q, k, v)
    _expect("g", g, (*shape[:3], q.shape[-1]))
    if safe_gate and use_gate_in_kernel and lower_bound is None:
        raise ValueError("lower_bound: safe_gate=True with use_gate_in_kernel=True needs one, got None")
    if use_gate_in_kernel:
        g = _gate(g, A_log, dt_bias, g.shape[2:], lower_bound)
    beta = _step_size(beta, shape, use_beta_sigmoid_in_kernel, allow_neg_eigval)
    return _run(
        q, k, v, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, state_v_first, cu_seqlens,
        key_log_decay=g, decay_first=True,
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------------- arguments


def _shape(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, ...]:
    """``(B, T, HV, V)``."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor) or x.dim() != 4:
            raise ValueError(f"{name}: expected a tensor [B, T, H, D], got {_describe(x)}")
    if k.shape != q.shape:
        raise ValueError(f"k: expected the shape of q, {tuple(q.shape)}, got {tuple(k.shape)}")
    if v.shape[:2] != q.shape[:2] or v.shape[2] == 0 or v.shape[2] % max(q.shape[2], 1):
        b, t, h, _ = q.shape
        raise ValueError(f"v: expected shape [B, T, HV, V] = ({b}, {t}, a multiple of {h}, V), got {tuple(v.shape)}")
    return tuple(v.shape)


def _expect(name: str, x: object, shape: tuple[int, ...]) -> None:
    if not isinstance(x, Tensor) or tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name}: expected a tensor of shape {tuple(shape)}, got {_describe(x)}")


def _describe(x: object) -> str:
    return f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else repr(x)


def _check_block(chunk_size: object, sizes: tuple[int, ...]) -> None:
    if chunk_size not in sizes:
        raise ValueError(f"chunk_size: expected one of {', '.join(map(str, sizes))}, got {chunk_size!r}")


def _step_size(beta: Tensor, shape: tuple[int, ...], sigmoid: bool, allow_neg_eigval: bool) -> Tensor:
    _expect("beta", beta, shape[:3])
    if not sigmoid:
        if allow_neg_eigval:
            raise ValueError("allow_neg_eigval: True needs use_beta_sigmoid_in_kernel=True, got False")
        return beta
    return _wide(beta).sigmoid() * (2 if allow_neg_eigval else 1)


def _gate(g: Tensor, A_log: Tensor | None, dt_bias: Tensor | None, shape: tuple[int, ...], lower_bound: float | None = None) -> Tensor:
    """The logarithm of the decay from a gate's input ``g [B, T, *shape]``."""
    heads, rest = shape[0], shape[1:]
    g = _wide(g)
    if dt_bias is not None:
        if not isinstance(dt_bias, Tensor) or dt_bias.numel() != g[0, 0].numel():
            raise ValueError(f"dt_bias: expected a tensor of {g[0, 0].numel()} values, got {_describe(dt_bias)}")
        g = g + _wide(dt_bias).view(shape)
    if A_log is None and lower_bound is None:
        raise ValueError("A_log: use_gate_in_kernel=True needs it, got None")
    rate: Any = 1.0
    if A_log is not None:
        if not isinstance(A_log, Tensor) or A_log.numel() != heads:
            raise ValueError(f"A_log: expected a tensor of {heads} values, got {_describe(A_log)}")
        rate = _wide(A_log).exp().view(heads, *[1] * len(rest))
    if lower_bound is None:
        return -rate * F.softplus(g)
    if not lower_bound < 0:
        raise ValueError(f"lower_bound: expected a number < 0, got {lower_bound!r}")
    return lower_bound * (rate * g).sigmoid()


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


# -------------------------------------------------------------------------------------------------------------- call

#: what linear_memory calls the arguments that have another name here
_NAMES = {"lr": "beta", "log_decay": "g", "key_log_decay": "g"}


def _run(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, scale: float | None, initial_state: Tensor | None, output_final_state: bool,
    normalise: bool, state_v_first: bool, cu_seqlens: Tensor | None, **decay: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """:func:`~miras_kernels.linear_memory` in the layouts of flash-linear-attention."""
    groups = v.shape[2] // q.shape[2]
    repeat: Callable[[Tensor], Tensor] = (lambda x: x.repeat_interleave(groups, 2)) if groups > 1 else (lambda x: x)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale: expected a number or None, got {scale!r}")
    q, k = (repeat(_key(x, normalise, by)) for x, by in ((q, scale), (k, None)))
    if initial_state is not None:
        n = cu_seqlens.shape[0] - 1 if isinstance(cu_seqlens, Tensor) else q.shape[0]
        sizes = (v.shape[-1], q.shape[-1]) if state_v_first else (q.shape[-1], v.shape[-1])
        _expect("initial_state", initial_state, (n, v.shape[2], *sizes))
        initial_state = initial_state if state_v_first else initial_state.transpose(-1, -2)
    try:
        out, state = linear_memory(
            q, k, v, beta, chunk_size=1, initial_state=initial_state, output_final_state=output_final_state, cu_seqlens=cu_seqlens, **decay
        )
    except (TypeError, ValueError) as error:
        name, colon, rest = str(error).partition(":")
        if name in _NAMES and colon:
            raise type(error)(f"{_NAMES[name]}:{rest}") from None
        raise
    if state is None:
        return out, None
    return out, state.dual[0] if state_v_first else state.dual[0].transpose(-1, -2)


def _key(x: Tensor, normalise: bool, scale: float | None) -> Tensor:
    """Queries or keys as the recurrence takes them: of norm 1, then scaled, in float32 or better; their dtype stays."""
    y = _wide(x)
    factor: Tensor | float | None = scale
    if normalise:
        norm = torch.rsqrt(y.square().sum(-1, keepdim=True) + 1e-6)
        factor = norm if scale is None else norm * scale
    return (y if factor is None else y * factor).to(x.dtype)
