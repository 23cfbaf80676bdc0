"""Tensor functions of a :class:`~miras_kernels.layers.MemoryBlock`, for its tokens and its initialisation."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..tables.retention import KLRetention, LqRetention, Retention
from ..tracing import is_plain_eager

__all__ = ["Projected", "convolve", "depthwise", "inverse_softplus", "rotated", "suit", "token_mask", "unit", "wide"]

_LOGITS = 1.25  # initial standard deviation of the logits of a softmax


class Projected(NamedTuple):
    """Inputs of a :class:`MemoryBlock` without projections, in addition to the hidden states.

    Attributes:
        qkv: ``[B, T, 3 * num_heads * head_dim]``, the projected queries, keys and values.
        cos, sin: ``[B, T, R]``, a rotary position embedding of the first R <= head_dim channels, or None. It is applied to queries and
            keys before they are normalised, so that a linear memory depends on the distance of two tokens only.
    """

    qkv: Tensor
    cos: Tensor | None = None
    sin: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> Projected:
        """Apply ``function`` to every tensor."""
        turn = (None, None) if self.cos is None or self.sin is None else (function(self.cos), function(self.sin))
        return Projected(function(self.qkv), *turn)


def convolve(x: Tensor, weight: Tensor, context: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution of ``x [B, T, channels]`` by ``weight [channels, taps]``, and each sequence's last ``taps - 1`` inputs.

    Every sequence is preceded by its context (zeros by default); packed sequences are moved apart to make room for it.
    """
    before, tokens, channels = weight.shape[1] - 1, x.shape[1], x.shape[2]
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if context is None:
        context = x.new_zeros(sequences, before, channels)
    elif tuple(context.shape) != (sequences, before, channels):
        raise ValueError(f"initial_state.conv: expected shape {(sequences, before, channels)}, got {tuple(context.shape)}")
    context = context.to(x.dtype)
    if tokens == 0:
        return x, context.clone()
    if cu_seqlens is None:
        stream = torch.cat([context, x], 1)
        return depthwise(stream, weight), stream[:, tokens:]
    offsets = cu_seqlens.to(torch.int64)
    number = torch.arange(sequences, device=x.device)
    of_token = torch.bucketize(torch.arange(tokens, device=x.device), offsets[1:], right=True)  # [T], the token's sequence;
    of_token = of_token.clamp_max(sequences - 1)  # tokens after the last offset belong to none
    at = torch.arange(tokens, device=x.device) + of_token * before  # [T], the start of the token's window
    around = (offsets + F.pad(number, (0, 1)) * before)[:-1, None] + torch.arange(before, device=x.device)  # [N, before]
    stream = x.new_zeros(tokens + sequences * before, channels)
    stream = stream.index_copy(0, around.flatten(), context.flatten(0, 1)).index_copy(0, at + before, x.squeeze(0))
    last = offsets[1:, None] + number[:, None] * before + torch.arange(before, device=x.device)
    return depthwise(stream.unsqueeze(0), weight)[:, at], stream[last]


def depthwise(x: Tensor, weight: Tensor, zeros: int = 0) -> Tensor:
    """Depthwise causal convolution ``[B, T, channels] -> [B, zeros + T - (taps - 1), channels]`` of x after so many zeros (< taps)."""
    if x.device.type == "cpu" and is_plain_eager((x, weight)):
        return _Depthwise.apply(x, weight, zeros)
    return _convolution(x, weight, zeros)[:, : zeros + x.shape[1] - (weight.shape[1] - 1)]


def _convolution(x: Tensor, weight: Tensor, zeros: int) -> Tensor:
    """With zeros on both sides; as a 2-d convolution, since the layout of tokens is channels-last already."""
    image = x.transpose(1, 2).unsqueeze(2)  # [B, channels, 1, T]
    return F.conv2d(image, weight[:, None, None], padding=(0, zeros), groups=x.shape[-1]).squeeze(2).transpose(1, 2)


class _Depthwise(torch.autograd.Function):
    """:func:`depthwise` with a backward for CPUs, where PyTorch's gradient of the weights takes ten times as long."""

    @staticmethod
    def forward(ctx, x, weight, zeros):
        ctx.save_for_backward(x, weight)
        ctx.zeros = zeros
        return _convolution(x, weight, zeros)[:, : zeros + x.shape[1] - (weight.shape[1] - 1)]

    @staticmethod
    def backward(ctx, grad):
        (x, weight), zeros = ctx.saved_tensors, ctx.zeros
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            dx = _convolution(grad, weight.flip(1).to(grad.dtype), weight.shape[1] - 1)[:, zeros:].to(x.dtype)
        if ctx.needs_input_grad[1]:
            sums = [wide(grad).new_zeros(weight.shape[0]) for _ in range(weight.shape[1])]
            tokens = max(1, 2**18 * grad.shape[1] // max(1, grad.numel()))  # of a stretch whose products stay in the cache
            for start in range(0, grad.shape[1], tokens):
                dy = wide(grad[:, start : start + tokens])
                for tap, total in enumerate(sums):
                    first = start + tap - zeros  # of the inputs that this tap reads; those before 0 are zeros
                    read = x[:, max(first, 0) : max(first + dy.shape[1], 0)]
                    total += (read * dy[:, dy.shape[1] - read.shape[1] :]).sum((0, 1))
            dweight = torch.stack(sums, 1).to(weight.dtype)
        return dx, dweight, None


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply a rotary position embedding ``[B, T, R]`` to the first R channels of ``x [B, T, H, D]``; pairs are R / 2 channels apart
    (Llama's layout)."""
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    a, b = turned.chunk(2, -1)
    turned = (turned * cos.unsqueeze(2) + torch.cat([-b, a], -1) * sin.unsqueeze(2)).to(x.dtype)
    return turned if rest.shape[-1] == 0 else torch.cat([turned, rest], -1)


def token_mask(mask: Tensor, x: Tensor) -> Tensor:
    """A mask ``[B, T]`` of real tokens as booleans, on the device of ``x``."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"attention_mask: expected a tensor [B, T], got {type(mask).__name__}")
    if tuple(mask.shape) != tuple(x.shape[:2]):
        raise ValueError(f"attention_mask: expected shape [B, T] = {tuple(x.shape[:2])}, got {tuple(mask.shape)}")
    return mask.to(device=x.device) != 0


def wide(x: Tensor) -> Tensor:
    """``x`` in float32 or better."""
    return x if x.dtype == torch.float64 else x.float()


def unit(x: Tensor) -> Tensor:
    """``x`` normalised to norm <= 1 over the last axis; a zero vector stays zero and has a finite gradient."""
    y = wide(x)
    return (y * torch.rsqrt(y.square().sum(-1, keepdim=True) + 1e-6)).to(x.dtype)


def suit(retention: Retention, dual: Tensor) -> None:
    """Scale normal duals ``[H, rows, columns]`` in place such that a retention gate's primal varies most."""
    if isinstance(retention, LqRetention):  # |phi(A)|_q is largest at |A|_q = floor (q = 4)
        dual *= retention.floor / dual.flatten(1).norm(retention.q, dim=1)[:, None, None]
    elif isinstance(retention, KLRetention):  # neither uniform nor one-hot
        dual *= _LOGITS / dual.std()


def inverse_softplus(y: Tensor) -> Tensor:
    return y + torch.log(-torch.expm1(-y))
