"""What PTX computes where numpy has no operator for it. Arrays of float32 and of integers with their types.

Exactness: add, sub, mul, div, sqrt, fma and conversions round once, to nearest (an fma whose result is subnormal may round twice). Of
float64 an fma rounds twice. The `.approx` and `.full` forms are computed in float64 and rounded: closer to the true value than a GPU's.
"""

from __future__ import annotations

import numpy as np

F32, F64, U16, U32, U64, I32, I64 = (np.dtype(x).type for x in ("f4", "f8", "u2", "u4", "u8", "i4", "i8"))
TIE = U64(0x10000000)


def fma(a, b, c):
    product = np.multiply(a, b, dtype=F64)  # exact
    total = product + c
    low = total.view(U64) & U64(0x1FFFFFFF)
    ties = low == TIE
    if ties.any():  # rounding to float64 may have made this half a float32's ulp: the rest decides
        c = np.broadcast_to(np.asarray(c, F64), total.shape)
        back = total - product
        rest = (product - (total - back)) + (c - back)
        away = np.where(rest > 0, np.inf, -np.inf)
        total = np.where(ties & (rest != 0), np.nextafter(total, away), total)
    return total.astype(F32)


def fma_down(a, b, c):
    """Rounded towards minus infinity."""
    product = np.multiply(a, b, dtype=F64)
    total = product + c
    back = total - product
    rest = (product - (total - back)) + (np.asarray(c, F64) - back)
    near = total.astype(F32)
    return np.where((near > total) | ((near == total) & (rest < 0)), np.nextafter(near, F32(-np.inf)), near)


def in_double(function):
    return lambda *x: function(*(np.asarray(v, F64) for v in x)).astype(F32)


ex2, lg2, tanh, sin, cos = map(in_double, (np.exp2, np.log2, np.tanh, np.sin, np.cos))
rcp, rsqrt = in_double(lambda x: 1 / x), in_double(lambda x: 1 / np.sqrt(x))


def flushed(x):
    """Subnormal numbers as zeros of their sign (.ftz)."""
    return np.where(np.abs(x) < F32(2.0**-126), np.copysign(F32(0), x), x)


def to_bf16(x):
    """Bits of float32 numbers rounded to nearest even, in the upper half's place of a uint16."""
    bits = x.view(U32)
    rounded = ((bits + U32(0x7FFF) + ((bits >> U32(16)) & U32(1))) >> U32(16)).astype(U16)
    return np.where(np.isnan(x), U16(0x7FFF), rounded)


def from_bf16(bits):
    return (bits.astype(U32) << U32(16)).view(F32)


def to_f16(x):
    return x.astype(np.float16).view(U16)


def from_f16(bits):
    return bits.view(np.float16).astype(F32)


def pair(high, low):
    return (high.astype(U32) << U32(16)) | low


def truncated(x, kind):
    """float32 to an integer, towards zero; out of range the nearest one, 0 for NaN."""
    limits = np.iinfo(kind)
    wide = np.trunc(np.asarray(x, F64))
    inside = np.clip(np.nan_to_num(wide, nan=0.0), float(limits.min), float(limits.max))
    return np.where(wide >= float(limits.max), limits.max, inside.astype(kind))


def divided(a, b):
    """Integers towards zero."""
    quotient = np.abs(a) // np.where(b == 0, 1, np.abs(b))
    return np.where((a < 0) != (b < 0), -quotient, quotient).astype(a.dtype)


def remainder(a, b):
    return (a - divided(a, b) * b).astype(a.dtype)


def upper(a, b, signed: bool):
    """The upper 64 bits of a product."""
    halves = lambda x: (x & U64(0xFFFFFFFF), x >> U64(32))
    (a0, a1), (b0, b1) = halves(a), halves(b)
    middle = a1 * b0 + ((a0 * b0) >> U64(32))
    other = a0 * b1 + (middle & U64(0xFFFFFFFF))
    result = a1 * b1 + (middle >> U64(32)) + (other >> U64(32))
    if signed:
        result = result - np.where(a >> U64(63) != 0, b, U64(0)) - np.where(b >> U64(63) != 0, a, U64(0))
    return result


def shifted_left(a, b):
    bits = a.dtype.itemsize * 8
    return np.where(b < bits, a << np.minimum(b, bits - 1).astype(a.dtype), 0).astype(a.dtype)


def shifted_right(a, b):
    bits = a.dtype.itemsize * 8
    moved = a >> np.minimum(b, bits - 1).astype(a.dtype)
    return moved if a.dtype.kind == "i" else np.where(b < bits, moved, 0).astype(a.dtype)


def bit_field(x, place, length):
    """bfe: bits of ``x`` from ``place`` on; a signed word keeps the sign of the last one."""
    bits = x.dtype.itemsize * 8
    above = U32(bits) - np.minimum(length & U32(255), U32(bits))
    return shifted_right(shifted_left(shifted_right(x, place & U32(255)), above), above)


def inserted(x, into, place, length):
    """bfi: the lowest bits of ``x`` in the place of some of ``into``."""
    place, length = np.minimum(place & U32(255), U32(63)).astype(U64), np.minimum(length & U32(255), U32(32)).astype(U64)
    mask = ((U64(1) << length) - U64(1)) << place
    return ((into & ~mask) | ((x.astype(U64) << place) & mask)).astype(U32)


def permuted(a, b, selector):
    """prmt: bytes of ``b:a`` by four hexadecimal digits; a digit's highest bit replicates the byte's sign."""
    both, result = (b.astype(U64) << U64(32)) | a, U32(0)
    for i in range(4):
        digit = (selector >> U32(4 * i)) & U32(15)
        byte = (both >> ((digit & U32(7)) * U32(8)).astype(U64)) & U64(255)
        byte = np.where(digit & U32(8) != 0, np.where(byte & U64(128) != 0, U64(255), U64(0)), byte)
        result = result | (byte.astype(U32) << U32(8 * i))
    return result


def funnel(low, high, shift, left: bool):
    both = (high.astype(U64) << U64(32)) | low
    shift = (shift & U32(31)).astype(U64)
    return ((both << shift) >> U64(32)).astype(U32) if left else (both >> shift).astype(U32)


def logic(a, b, c, table: int):
    result = a ^ a
    for i in range(8):
        if table >> i & 1:
            result = result | ((a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c))
    return result


def ballot(x):
    """A warp's predicates as bits."""
    return (x.reshape(-1, 32).astype(U32) << np.arange(32, dtype=U32)).sum(1, dtype=U32).repeat(32)
