"""The paper's block (Miras, arXiv 2504.13173, section 5.3; Titans, arXiv 2501.00663, section 4.4) around a memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..memory import linear_memory, mlp_memory
from ..parallel import ContextParallel
from ..state import MemoryState
from .functional import Projected, convolve, inverse_softplus, rotated, suit, token_mask, unit, wide
from .presets import Preset, resolve
from .state import BlockDecoder, BlockState

__all__ = ["MemoryBlock", "Projected"]

_SPAN = 10.0  # initial decay span of a linear memory's fastest head: tokens for a factor of e
_SPREAD = 100.0  # span of the slowest head over that of the fastest
_MOMENTUM = 0.999  # upper bound, such that it is below 1 after rounding too


class MemoryBlock(nn.Module):
    r"""A causal sequence layer with a memory that is trained while it reads (test-time training); no position embedding.

    ::

        q, k, v = silu(conv(q_proj(x), k_proj(x), v_proj(x)))     depthwise causal convolution; then q and k L2-normalised
        lr, log_decay, delta, momentum = gates(x)                 per head, from one low-rank projection, in float32
        o = linear_memory(q, k, v, lr, log_decay, delta=delta)    or mlp_memory, depending on the preset
        out = o_proj(rms_norm(o) * silu(g_proj(x)))               normalised per head

    **Stability of the inner loop.** All gradients of a chunk are taken at its start, so with psi(e) = e the chunk multiplies the memory
    by ``gamma_C I - K``, ``K = sum_s w_s lr_s k_s k_s'`` with weights ``w_s <= 1``. This does not grow while the eigenvalues of K are
    below ``1 + gamma_C``; they reach ``sum_s lr_s |k_s|^2`` when a key repeats. Therefore keys have at most unit norm and
    ``lr = sigmoid(.) / chunk_size``, which bounds the eigenvalues by 1 for all inputs and parameter values. With the largest step size
    a chunk of equal keys moves the memory exactly to the mean of their values; TTT (arXiv 2407.04620) averages a mini-batch's
    gradients in the same way, and with ``chunk_size = 1`` it is DeltaNet's update. Huber's psi has a slope of at most 1 (or is
    bounded), so the same holds. The size of the memory's output does not matter, as it is normalised.

    **An MLP memory** ``M(x) = x + LN(W1 gelu(W2 x))`` starts every sequence from the parameters ``w1 [H, D, Hd]`` and ``w2 [H, Hd, D]``
    (D is head_dim here, Hd = expansion * D); ``ln_weight, ln_bias [H, D]`` are not updated while it reads, and ln_eps = 1e-6. All are
    in the module's dtype; recurrence and states are float32 or better. To first order a chunk of equal keys multiplies the error by
    ``1 - K`` with ::

        K = sum_s lr_s w^2 r^2 (|a|^2 + |W1 diag(gelu'(W2 k))|^2)    a = gelu(W2 k), r = 1 / std(W1 a), w = ln_weight

    For independent entries of variances s1^2 and s2^2 this is ``w^2 (1 / s1^2 + c^2 / s2^2) sum_s lr_s``, c = 1 + expansion^-1/2.
    Therefore ``w`` is initialised to the root mean square of v - k, ``s1 = sqrt(2) w`` and ``s2 = sqrt(2) c w``: both matrices learn
    equally fast, and K is about 1 at the largest ``lr`` above, half of that in the middle of its range. (TTT-MLP's initial matrices of
    size 0.02 need its smaller rate, 0.1.) During training no bound on K holds for all parameter values, but the memory does not
    diverge: LN bounds every prediction by ``|k| + |ln_bias| + sqrt(D) max|w|``, and since LN removes the norm of W1, steps are
    orthogonal to W1: a step that is too long increases that norm, which makes later steps shorter.

    Decay has the opposite effect. It shrinks W1 until steps and decay are in balance, where ``K^2 ~ Hd (1 - gamma_C^2)`` while errors
    are as large as initially, *for any step size*. At K > 2 outputs stay finite, but gradients grow from chunk to chunk: with decay
    spans of 10 to 1000 tokens they overflow within 1000 tokens. Initial spans are therefore at least ``chunk_size * Hd`` tokens
    (K ~ 1). As errors decrease K increases again: for backpropagation over several spans, detach the state now and then. None of this
    was observed without decay (``ttt_mlp``).

    **Momentum** repeats a token's step: in total it moves the memory by ``lr / (1 - momentum)``. So ``lr`` is multiplied by
    ``1 - momentum``, with momentum = 0.999 sigmoid(.), initially half of that.

    **Mirror maps.** Under ``LqRetention`` the primal is largest for a dual of norm ``floor`` (q = 4), and an MLP's matrices are
    initialised to that norm; it is several times smaller than those above, so that the same step moves them further (K would be 14 for
    head_dim 32, 10 for 64 and 7 for 128): Moneta's ``rate`` is 1/8. Under ``KLRetention`` they are initialised to the softmax of
    logits of standard deviation 1.25, where K is between 1 and 2 at ``rate`` 1; on text, in which tokens repeat, gradients over 2048
    tokens then reach 1e17, and 50 with a quarter of it: Memora's ``rate`` is 1/8 too (``examples/soak.py``).

    **Initial gates.** ``lr`` in the middle of its range; decay spans of 10 to 1000 tokens (MLP: 1 to 100 times ``chunk_size * Hd``),
    evenly spaced in the logarithm over the heads (as Mamba initialises its time steps); ``delta`` at the size of the initial errors,
    so that both branches of a Huber loss are used. ``log_decay = -softplus(.) <= 0`` and ``delta = softplus(.) > 0`` by construction.

    Args:
        hidden_size: channels D of the layer's input and output.
        num_heads: H.
        head_dim: channels of a head; ``hidden_size // num_heads`` by default.
        preset: a name from :data:`~miras_kernels.layers.PRESETS` or a :class:`~miras_kernels.layers.Preset`.
        chunk_size: overrides the preset's.
        conv_width: taps of the convolution, >= 1.
        gate_rank: rank of the gates' projection.
        norm_eps: of the RMS norm; relative to an output of size 1, before a linear memory's ``lr`` is divided by ``chunk_size``.
        init_std: initial standard deviation of the projections.
        projections: False for a block without q_proj, k_proj, v_proj and o_proj, to be used with those of an attention layer, for
            example: the block then takes :class:`Projected`, returns the input of o_proj, ``[B, T, num_heads * head_dim]``, and its
            convolution is initialised to the identity.
        output_gate: multiplies the output by a parameter ``[D]`` that is initialised to zero, for a layer whose output is added to
            another's.
        backend: of :func:`~miras_kernels.linear_memory` or :func:`~miras_kernels.mlp_memory`.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """

    # None where the preset, or a block without projections, does not have it
    q_proj: Any
    k_proj: Any
    v_proj: Any
    o_proj: Any
    gate_down: Any
    gate_up: Any
    gate_bias: Any
    decay_rate: Any
    w1: Any
    w2: Any
    ln_weight: Any
    ln_bias: Any
    #: set by miras_kernels.parallel
    context: ContextParallel | None = None  # also of layers that an earlier version has pickled

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int | None = None,
        *,
        preset: str | Preset = "yaad_linear",
        chunk_size: int | None = None,
        conv_width: int = 4,
        gate_rank: int = 16,
        norm_eps: float = 1e-5,
        init_std: float = 0.02,
        projections: bool = True,
        output_gate: bool = False,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        sizes = {"hidden_size": hidden_size, "num_heads": num_heads, "conv_width": conv_width, "gate_rank": gate_rank}
        if head_dim is not None:
            sizes["head_dim"] = head_dim
        for name, size in sizes.items():
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"{name}: expected an integer >= 1, got {size!r}")
        if output_gate and not projections:
            raise ValueError("output_gate: a block without projections leaves its output to the caller; expected False, got True")
        if head_dim is None and hidden_size % num_heads:
            raise ValueError(f"num_heads: expected a divisor of hidden_size = {hidden_size} (or a head_dim), got {num_heads}")
        self.preset = resolve(preset, chunk_size)
        self.hidden_size, self.num_heads, self.head_dim = (hidden_size, num_heads, head_dim or hidden_size // num_heads)
        self.conv_width, self.norm_eps, self.backend = conv_width, norm_eps, backend
        inner, where = self.num_heads * self.head_dim, dict[str, Any](device=device, dtype=dtype)
        projection = lambda: nn.Linear(hidden_size, inner, bias=False, **where) if projections else None
        self.q_proj, self.k_proj, self.v_proj = projection(), projection(), projection()
        self.g_proj = nn.Linear(hidden_size, inner, bias=False, **where)
        self.o_proj = nn.Linear(inner, hidden_size, bias=False, **where) if projections else None
        self.output_gate = nn.Parameter(torch.empty(hidden_size, **where)) if output_gate else None
        self.conv_weight = nn.Parameter(torch.empty(3 * inner, conv_width, **where))
        self.norm_weight = nn.Parameter(torch.empty(self.head_dim, **where))
        gates = sum(self._gate_sizes())
        self.gate_down = nn.Parameter(torch.empty(gate_rank, hidden_size, **where)) if gates else None
        self.gate_up = nn.Parameter(torch.empty(gates, gate_rank, **where)) if gates else None
        self.gate_bias = nn.Parameter(torch.empty(gates, **where)) if gates else None
        self.decay_rate = nn.Parameter(torch.empty(num_heads, **where)) if self.preset.decay in ("dt", "rate", "key_rate") else None
        self.w1 = self.w2 = self.ln_weight = self.ln_bias = None
        if self.preset.expansion is not None:
            hidden = self.preset.expansion * self.head_dim
            self.w1 = nn.Parameter(torch.empty(num_heads, self.head_dim, hidden, **where))
            self.w2 = nn.Parameter(torch.empty(num_heads, hidden, self.head_dim, **where))
            self.ln_weight = nn.Parameter(torch.empty(num_heads, self.head_dim, **where))
            self.ln_bias = nn.Parameter(torch.empty(num_heads, self.head_dim, **where))
        self.reset_parameters(init_std)

    @torch.no_grad()
    def reset_parameters(self, init_std: float = 0.02) -> None:
        """Initialise all parameters from torch's random generator."""
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.g_proj, self.o_proj):
            if projection is not None:
                nn.init.normal_(projection.weight, std=init_std)
        if self.q_proj is None:
            nn.init.zeros_(self.conv_weight)
            nn.init.ones_(self.conv_weight[:, -1])
        else:
            nn.init.uniform_(self.conv_weight, -(self.conv_width**-0.5), self.conv_width**-0.5)
        nn.init.ones_(self.norm_weight)
        if self.output_gate is not None:
            nn.init.zeros_(self.output_gate)
        if self.decay_rate is not None:
            nn.init.zeros_(self.decay_rate)
        # The norm of a value: rms inputs of 1, a convolution of variance 1/3, silu(x) ~ x / 2.
        value = init_std * (self.hidden_size * self.head_dim / 3) ** 0.5 / 2
        error = value
        if self.w1 is not None:
            weight = ((1 + value**2) / self.head_dim) ** 0.5  # the root mean square of v - k
            nn.init.normal_(self.w1, std=2**0.5 * weight)
            nn.init.normal_(self.w2, std=2**0.5 * weight * (1 + (self.head_dim / self.w1.shape[-1]) ** 0.5))
            for dual in (self.w1, self.w2):
                suit(self.preset.retention, dual)
            nn.init.constant_(self.ln_weight, weight)
            nn.init.zeros_(self.ln_bias)
            error = (2 * (1 + value**2)) ** 0.5
        if self.gate_bias is None:
            return
        nn.init.normal_(self.gate_down, std=init_std)
        nn.init.normal_(self.gate_up, std=init_std)
        at = torch.linspace(0, 1, self.num_heads, dtype=torch.float64) if self.num_heads > 1 else torch.full((1,), 0.5, dtype=torch.float64)
        spans = (_SPAN if self.w1 is None else self.preset.chunk_size * self.w1.shape[-1]) * _SPREAD**at
        start = {"lr": torch.zeros_like(spans), "dt": inverse_softplus(1 / spans), "log_decay": inverse_softplus(1 / spans),
                 "delta": inverse_softplus(torch.full_like(spans, error)), "momentum": torch.zeros_like(spans)}  # fmt: skip
        if self.preset.decay == "key_rate":  # the channels of every head have different spans
            at = torch.linspace(0, 1, self.head_dim, dtype=torch.float64)
            start["key_log_decay"] = inverse_softplus(1 / (_SPAN * _SPREAD**at)).repeat(self.num_heads)
        self.gate_bias.copy_(torch.cat([start[name] for name in self.preset.token_gates]))

    def _gate_sizes(self) -> list[int]:
        """How many numbers a token has for each gate."""
        return [self.num_heads * (self.head_dim if name == "key_log_decay" else 1) for name in self.preset.token_gates]

    def extra_repr(self) -> str:
        return f"hidden_size={self.hidden_size}, num_heads={self.num_heads}, head_dim={self.head_dim}, preset={self.preset}"

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        initial_state: BlockState | BlockDecoder | None = None,
        output_final_state: bool = False,
        projected: Projected | None = None,
    ) -> tuple[Tensor, BlockState | BlockDecoder | None]:
        """Read a batch of sequences.

        Padding is exact: a row's result is that of its real tokens alone, wherever the padding is (left, right, or in between);
        outputs at padded positions are zero, and their inputs have no influence. The real tokens of each row are moved to the front, in
        order, and the outputs back, so that shapes do not depend on the mask's values and no synchronisation is needed. Only with
        ``output_final_state`` padded rows are packed instead, which needs the mask's values on the CPU.

        Args:
            hidden_states: ``[B, T, D]``, any floating dtype.
            attention_mask: ``[B, T]``, nonzero at real tokens. None: no padding.
            cu_seqlens: ``[N + 1]``, packs N sequences into B = 1, see :func:`~miras_kernels.linear_memory`.
            initial_state: of the B (or N) sequences; a sequence may be split at any token. A :class:`BlockDecoder` is updated in place
                and allows neither a mask nor packed sequences.
            output_final_state: whether to return the state after each sequence's last real token; a row without any keeps its state.
            projected: for a block made with ``projections=False``.

        Returns:
            ``out [B, T, D]`` and the final state or None.
        """
        x = hidden_states
        if x.dim() != 3 or x.shape[-1] != self.hidden_size:
            raise ValueError(f"hidden_states: expected shape [B, T, D] with D = {self.hidden_size}, got {tuple(x.shape)}")
        if initial_state is not None and not isinstance(initial_state, BlockState | BlockDecoder):
            raise TypeError(f"initial_state: expected a BlockState or a BlockDecoder, got {type(initial_state).__name__}")
        self._check_projected(x, projected)
        if self.context is not None and (attention_mask is not None or initial_state is not None or output_final_state):
            raise ValueError(
                "context parallelism trains on whole sequences: expected no attention_mask, no initial_state and no output_final_state "
                "(of a model of transformers: use_cache=False)"
            )
        if isinstance(initial_state, BlockDecoder):
            for name, given in (("attention_mask", attention_mask), ("cu_seqlens", cu_seqlens)):
                if given is not None:
                    raise ValueError(
                        f"{name}: with a BlockDecoder rows have no padding and are not packed; expected None, got {type(given).__name__}"
                    )
            return self._run(x, projected, None, initial_state, output_final_state)
        if attention_mask is None:
            return self._run(x, projected, cu_seqlens, initial_state, output_final_state)
        if cu_seqlens is not None:
            raise ValueError("attention_mask: packed sequences (cu_seqlens) have no padding, got both")
        mask = token_mask(attention_mask, x)
        if mask.device.type == "cpu" and not torch.compiler.is_compiling() and bool(mask.all()):
            return self._run(x, projected, None, initial_state, output_final_state)
        if output_final_state:
            return self._run_packed(x, projected, mask, initial_state)
        order = torch.argsort(mask, dim=1, descending=True, stable=True)  # real tokens first
        real = mask.gather(1, order).unsqueeze(-1)
        front = lambda t: t.gather(1, order.unsqueeze(-1).expand_as(t)).masked_fill(~real, 0)
        out, _ = self._run(front(x), projected and projected.map(front), None, initial_state, False)
        out = out.gather(1, order.argsort(1).unsqueeze(-1).expand_as(out))
        return out.masked_fill(~mask.unsqueeze(-1), 0), None

    def start(self, sequences: int) -> BlockState:
        """The state before the first token."""
        weight = self.norm_weight
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        if self.w1 is not None:
            dual = tuple(w.to(dtype).expand(sequences, *w.shape) for w in (self.w1, self.w2))
        else:
            dual = (weight.new_zeros(sequences, self.num_heads, self.head_dim, self.head_dim, dtype=dtype),)
        momentum = tuple(map(torch.zeros_like, dual)) if self.preset.momentum else None
        return BlockState(MemoryState(dual, momentum), weight.new_zeros(sequences, self.conv_width - 1, self.conv_weight.shape[0]))

    def _check_projected(self, x: Tensor, projected: Projected | None) -> None:
        if (projected is None) != (self.q_proj is not None):
            expected = (
                "None (the block has projections of its own)" if projected is not None else "q, k and v (the block has no projections)"
            )
            raise ValueError(f"projected: expected {expected}, got {type(projected).__name__}")
        if projected is None:
            return
        turned = self.head_dim if projected.cos is None else min(projected.cos.shape[-1], self.head_dim)
        for name, tensor, width in zip(projected._fields, projected, (len(self.conv_weight), turned, turned), strict=True):
            if tensor is not None and tuple(tensor.shape) != (*x.shape[:2], width):
                raise ValueError(f"projected.{name}: expected shape {(*x.shape[:2], width)}, got {tuple(tensor.shape)}")

    def _run_packed(
        self, x: Tensor, projected: Projected | None, mask: Tensor, initial_state: BlockState | None
    ) -> tuple[Tensor, BlockState | None]:
        """Read rows with padding as packed sequences, so that each final state is that after the row's last real token."""
        lengths = mask.sum(1)
        rows, at = lengths.nonzero().squeeze(1), mask.flatten().nonzero().squeeze(1)
        every = len(rows) == len(mask)
        before = self.start(len(mask)) if initial_state is None and not every else initial_state
        if len(rows) == 0:
            return x.new_zeros(*mask.shape, self.hidden_size if self.o_proj is not None else len(self.conv_weight) // 3), before
        pack = lambda t: t.flatten(0, 1)[at].unsqueeze(0)
        start = before if every or before is None else before.map(lambda t: t[rows])
        offsets = F.pad(lengths[rows].cumsum(0), (1, 0)) if len(mask) > 1 else None
        out, state = self._run(pack(x), projected and projected.map(pack), offsets, start, True)
        out = out.new_zeros(mask.numel(), out.shape[-1]).index_copy(0, at, out.squeeze(0))
        assert isinstance(state, BlockState)
        return out.unflatten(0, mask.shape), state if before is None or every else before.overwritten(rows, state)

    def _run(
        self,
        x: Tensor,
        projected: Projected | None,
        cu_seqlens: Tensor | None,
        initial_state: BlockState | BlockDecoder | None,
        output_final_state: bool,
    ) -> tuple[Tensor, BlockState | BlockDecoder | None]:
        qkv = torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1) if projected is None else projected.qkv
        before = None if initial_state is None else initial_state.conv
        stretch = None if self.context is None else self.context.local(x.shape[1], cu_seqlens)
        if stretch is not None:
            cu_seqlens, before = stretch.cu_seqlens(x.device), stretch.tokens_before(qkv, self.conv_width - 1)
        mixed, conv = convolve(qkv, self.conv_weight, before, cu_seqlens)
        q, k, v = F.silu(mixed).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(2)
        if projected is not None and projected.cos is not None and projected.sin is not None:
            q, k = (rotated(t, projected.cos, projected.sin) for t in (q, k))
        memory: Callable[..., tuple[Tensor, MemoryState | None]] = linear_memory
        start, scale = None, self.preset.chunk_size if self.preset.lr == "bounded" else 1
        norm: dict[str, Any] = {}
        if self.w1 is not None:
            memory, start, scale, norm = mlp_memory, (self.w1, self.w2), 1, dict(ln_weight=self.ln_weight, ln_bias=self.ln_bias)
        tokens = dict(q=unit(q), k=unit(k), v=v, **self.gates(x), **norm)
        final: BlockState | BlockDecoder | None
        if isinstance(initial_state, BlockDecoder):
            o, final = initial_state.read(tokens, conv), initial_state
        else:
            rules = dict(bias=self.preset.bias, retention=self.preset.retention, chunk_size=self.preset.chunk_size, backend=self.backend,
                         **(dict(decay_first=True) if self.preset.decay_first else {}))  # fmt: skip
            if stretch is not None:
                o, state = stretch.read(memory, **tokens, **rules, initial_state=start), None
            else:
                first = start if initial_state is None else initial_state.memory
                o, state = memory(**tokens, **rules, initial_state=first, output_final_state=output_final_state, cu_seqlens=cu_seqlens)
            final = None if state is None else BlockState.after(initial_state, state, conv, qkv)
        o = wide(o)
        o = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + self.norm_eps / scale**2) * self.norm_weight
        out = o.flatten(2).to(v.dtype) * F.silu(self.g_proj(x))
        out = out if self.o_proj is None else self.o_proj(out)
        return out if self.output_gate is None else out * self.output_gate, final if output_final_state else None

    def gates(self, hidden_states: Tensor) -> dict[str, Tensor]:
        """The token gates of the preset (``lr``, ``log_decay``, ``delta``, ``momentum [B, T, H]``, ``key_log_decay [B, T, H, D]``), in
        float32 (float64 for float64).

        Autocast does not apply, since bfloat16 cannot represent a decay close to 1.
        """
        row, shape = self.preset, (*hidden_states.shape[:2], self.num_heads)
        with torch.autocast(hidden_states.device.type, enabled=False):
            x = wide(hidden_states)
            raw = {}
            if row.token_gates:
                projected = F.linear(F.linear(x, self.gate_down.to(x.dtype)), self.gate_up.to(x.dtype), self.gate_bias.to(x.dtype))
                raw = dict(zip(row.token_gates, projected.split(self._gate_sizes(), -1), strict=True))
            gates = {}
            if row.lr == "bounded":
                gates["lr"] = torch.sigmoid(raw["lr"]) * (row.rate / row.chunk_size)
            else:
                gates["lr"] = F.softplus(raw["dt"]) if row.lr == "dt" else x.new_ones(shape)
            if row.decay == "token":
                gates["log_decay"] = -F.softplus(raw["log_decay"])
            elif row.decay == "dt":
                gates["log_decay"] = -self.decay_rate.to(x.dtype).exp() * gates["lr"]
            elif row.decay == "rate":
                gates["log_decay"] = -self.decay_rate.to(x.dtype).exp() * F.softplus(raw["log_decay"])
            elif row.decay == "key_rate":
                per_key = F.softplus(raw["key_log_decay"]).unflatten(-1, (self.num_heads, self.head_dim))
                gates["key_log_decay"] = -self.decay_rate.to(x.dtype).exp().unsqueeze(-1) * per_key
            elif row.decay == "fixed":
                gates["log_decay"] = torch.log1p(-torch.exp2(-5 - torch.arange(shape[-1], dtype=x.dtype, device=x.device))).expand(shape)
            if row.bias.needs_delta:
                gates["delta"] = F.softplus(raw["delta"])
            if row.momentum:
                gates["momentum"] = _MOMENTUM * torch.sigmoid(raw["momentum"])
                gates["lr"] = gates["lr"] * (1 - gates["momentum"])
        return gates
