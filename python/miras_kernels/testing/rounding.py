"""Monte Carlo arithmetic: float64 computations whose results are perturbed as rounding in float32 or less would perturb them."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import hardshrink
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["ARITHMETIC", "SMALLEST", "ULPS", "Rounding"]

#: unit roundoff of float32, in which every backend computes
ARITHMETIC = 2.0**-24
#: roundings allowed for an elementary function, or for operations of a kernel that the reference does not have
ULPS = 4.0
SMALLEST = torch.finfo(torch.float32).tiny

aten = torch.ops.aten


@functools.cache
def _noise() -> Tensor:
    return torch.rand(2**20 + 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1


@functools.cache
def _factors(most: float) -> Tensor:
    return 1 + most * _noise()


def _layer_norm(x, shape, weight, bias, eps):
    if weight is not None or bias is not None or len(shape) != 1:
        raise NotImplementedError("Rounding: expected a layer_norm over one axis without weight and bias")
    centred = x - x.mean(-1, keepdim=True)
    r = ((centred * centred).mean(-1, keepdim=True) + eps).rsqrt()
    return centred * r, x.mean(-1, keepdim=True), r


def _layer_norm_backward(grad, x, shape, mean, r, weight, bias, mask):
    y = (x - mean) * r
    return r * (grad - grad.mean(-1, keepdim=True) - y * (grad * y).mean(-1, keepdim=True)), None, None


#: operations that move, select or negate numbers
EXACT = {
    aten._to_copy, aten._unsafe_view, aten.abs, aten.alias, aten.cat, aten.clone, aten.constant_pad_nd, aten.copy_, aten.detach,
    aten.empty_like, aten.expand, aten.fill, aten.fill_, aten.flip, aten.full, aten.full_like, aten.gather, aten.index,
    aten.index_put, aten.index_select, aten.lift_fresh, aten.masked_fill, aten.masked_fill_, aten.max, aten.maximum, aten.minimum,
    aten.neg, aten.new_empty, aten.new_full, aten.new_ones, aten.new_zeros, aten.ones, aten.ones_like, aten.permute, aten.relu_,
    aten.roll, aten.scalar_tensor, aten.scatter_, aten.select, aten.select_backward, aten.sgn, aten.sign, aten.slice,
    aten.slice_backward, aten.softshrink_backward, aten.split, aten.split_with_sizes, aten.squeeze, aten.stack, aten.t,
    aten.transpose, aten.tril, aten.unbind, aten.unsqueeze, aten.view, aten.where, aten.zero_, aten.zeros, aten.zeros_like,
}  # fmt: skip
ROUNDED = {aten.add, aten.div, aten.mul, aten.reciprocal, aten.rsub, aten.softshrink, aten.sqrt, aten.sub}
PRODUCTS = {aten.bmm, aten.mm}
SUMS = {aten.cumsum, aten.mean, aten.sum}
#: functions of rows with cancellation inside, as separate operations
STEPS: dict[Any, Callable] = {
    aten.native_layer_norm: _layer_norm,
    aten.native_layer_norm_backward: _layer_norm_backward,
    aten._softmax_backward_data: lambda grad, y, dim, dtype: y * (grad - (grad * y).sum(dim, keepdim=True)),
}


class Rounding(TorchDispatchMode):
    """Inside this context float64 operations round at random, as float32 does in the worst case; matrix products have operands and
    results of another dtype, as under autocast.

    * Moving, selecting and negating numbers is exact.
    * A sum of n terms (also a matrix product) gets the roundings of all partial sums, added one after the other in a random order: of
      variance ``u^2 (Q (n + 1) / 6 - Q / n + S^2 (n + 1) / 3)``, with S the sum and Q the sum of squares, and ``u^2 Q`` more for the
      products.
    * An elementary function, or any other operation that is in no table here, has its arguments rounded and gets ULPS roundings of
      its result.
    * Results of functions below the smallest normal number are 0.
    * Operands of 16 bits are perturbed by up to a unit roundoff of their dtype and then rounded to it.
    """

    def __init__(self, operands: torch.dtype, seed: int):
        super().__init__()
        self.operands, self.random = operands, random.Random(seed)

    def window(self, numbers: Tensor, like: Tensor) -> Tensor:
        """A random window of the numbers, of the shape of ``like``."""
        n = like.numel()
        if n > len(numbers):
            numbers = numbers.repeat(1 + n // len(numbers))
        first = self.random.randrange(len(numbers) - n + 1)
        return numbers[first : first + n].view(like.shape)

    def factors(self, roundings: float, like: Tensor) -> Tensor:
        return self.window(_factors(roundings * ARITHMETIC), like)

    def cast(self, x: Tensor) -> Tensor:
        if self.operands == torch.float32:
            return x
        return (x * self.window(_factors(torch.finfo(self.operands).eps / 2), x)).to(self.operands).to(x.dtype)

    def summed(self, total: Tensor, squares: Tensor, n: int, products: bool) -> Tensor:
        """A rounded sum of n terms, from the exact sum and the sum of squares; both are overwritten."""
        if n == 1 and not products:
            return total
        variance = squares.mul_((n + 1) / 6 - 1 / n + products).addcmul_(total, total, value=(n + 1) / 3)
        return total.addcmul_(variance.sqrt_(), self.window(_noise(), total), value=ARITHMETIC)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, packet = kwargs or {}, func.overloadpacket
        if packet in STEPS:
            with self:
                return STEPS[packet](*args, **kwargs)
        if packet in PRODUCTS:
            a, b = map(self.cast, args)
            return self.cast(self.summed(func(a, b), func(a * a, b * b), a.shape[-1], True))
        if packet not in EXACT and func._schema.is_mutable and args[0].is_floating_point():
            raise NotImplementedError(f"Rounding: {func} writes its argument in place")
        result = func(*args, **kwargs)
        if packet in EXACT:
            return result
        if not isinstance(result, Tensor) or packet not in ROUNDED | SUMS | {aten.cumprod}:
            result = func(*(self.rounded(x, 1.0) for x in args), **kwargs)
            return tuple(self.rounded(x, ULPS) for x in result) if isinstance(result, tuple) else self.rounded(result, ULPS)
        if result.dtype != torch.float64:
            return result
        if packet in SUMS:
            n = args[0].shape[args[1]] if packet is aten.cumsum else max(1, args[0].numel() // max(1, result.numel()))
            squares = func(args[0] * args[0], *args[1:], **kwargs) / (n if packet is aten.mean else 1)
            return self.summed(result, squares, n, False)
        return result.mul_(self.factors(math.sqrt(result.shape[args[1]]) if packet is aten.cumprod else 1.0, result))

    def rounded(self, x, roundings: float):
        """``x`` with so many roundings, if it is a float64 tensor."""
        if not isinstance(x, Tensor) or x.dtype != torch.float64:
            return x
        return hardshrink(x * self.factors(roundings, x), SMALLEST)
