"""Shared parts of both memories' decoding steps: the weights of the chunk's writes, the end of a chunk, and the launches.

A step reads one token into the ``Buffers`` of ``python/miras_kernels/decode/buffers.py``, whose names the kernels' parameters have; its
definition is ``python/miras_kernels/backends/reference/step.py``. kappa: ``weights``, mu: ``momentum_weights``.
A step only multiplies matrices by vectors, so it takes as long as its reads: ``phi(A_0)`` once, for k and q together, and the factors of
the open chunk's tokens. The arithmetic is elementwise in float32, without tensor cores. The token that ends its chunk writes the matrices;
this is decided on the device, since every sequence has its own position in its chunk.

A token takes two or three launches. The programs of a launch may run in any order, so only a later launch reads what they write. The first
launch advances ``position`` and no other program of that launch reads it; in the later ones the token's row is ``position - 1``.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import triton
import triton.language as tl

from ...tables.biases import Bias
from ..common import bias as biases
from ..common import configs, launch
from ..common import retention as retentions
from ..common.tiles import dot


@triton.jit
def vector(x, row, o, m):
    """A token's vector as float32, 0 outside the mask."""
    return tl.load(x + row + o, mask=m, other=0.0).to(tl.float32)


@triton.jit
def offset_of(strides, i_n, t, i_h):
    """Of a token and head in q, k or v."""
    return i_n * strides.b + t * strides.t + i_h * strides.h


@triton.jit
def gate_of(gate, row, o, m, D: tl.constexpr, CHANNEL: tl.constexpr):
    """A token gate as float32: a number, or a vector of the channels ``o``."""
    if CHANNEL:
        return vector(gate, row * D, o, m)
    else:
        return tl.load(gate + row).to(tl.float32)


@triton.jit
def advance(position, C: tl.constexpr):
    """Advance a sequence's position. The barrier makes every thread read before one writes, here and wherever a value is replaced."""
    before = tl.load(position)
    tl.debug_barrier()
    tl.store(position, (before + 1) % C)


@triton.jit
def row_of(position, C: tl.constexpr):
    """The token's place in its chunk, after ``position`` has advanced."""
    return ((tl.load(position) + C - 1) % C).to(tl.int32)


# ----------------------------------------------------------------------------------------- weights of the chunk's writes


@triton.jit
def channels_of(o_v, m_v, CHANNEL: tl.constexpr):
    """The columns of ``weights`` for the values ``o_v``: their own for decays by channel, else one that all share."""
    if CHANNEL:
        return o_v, m_v
    else:
        return tl.arange(0, 1), tl.full((1,), True, tl.int1)


@triton.jit
def decay_of(log_decay, open_log_decay, row, o_w, m_w, W: tl.constexpr):
    """``(alpha, log gamma) [BW]`` of a token: its decay, and that from the chunk's start up to it."""
    b_open = tl.load(open_log_decay + o_w, mask=m_w, other=0.0)
    b_decay = b_open * 0.0
    if log_decay is not None:
        b_decay = vector(log_decay, row * W, o_w, m_w)
    return tl.exp(b_decay), b_open + b_decay


@triton.jit
def first_weights(weights, momentum_weights, o_w, m_w, alpha, momentum, W: tl.constexpr):
    """``(weights_0 [BW], weights_1 [BW], moves_1)`` after the token: ``mu <- theta mu; kappa <- alpha kappa + mu``."""
    b_weights0 = alpha * tl.load(weights + o_w, mask=m_w, other=0.0)
    b_weights1, moves_1 = alpha * 0.0, 0.0
    if momentum_weights is not None:
        moves_1 = momentum * tl.load(momentum_weights + 1)
        b_weights1 = alpha * tl.load(weights + W + o_w, mask=m_w, other=0.0) + moves_1
    return b_weights0, b_weights1, moves_1


@triton.jit
def store_first_weights(weights, momentum_weights, o_w, m_w, b_weights0, b_weights1, moves_1, W: tl.constexpr):
    tl.store(weights + o_w, b_weights0, mask=m_w)
    tl.store(weights + W + o_w, b_weights1, mask=m_w)
    if momentum_weights is not None:
        tl.store(momentum_weights, 0.0)
        tl.store(momentum_weights + 1, moves_1)


@triton.jit
def row_weights(weights, momentum_weights, o_r, m_r, o_w, m_w, alpha, momentum, W: tl.constexpr):
    """``(weights [BR, BW], momentum_weights [BR])`` of the chunk's earlier tokens, after this token."""
    b_weights = alpha[None, :] * tl.load(weights + (2 + o_r)[:, None] * W + o_w[None, :], mask=m_r[:, None] & m_w[None, :], other=0.0)
    b_moves = tl.full((o_r.shape[0],), 0.0, tl.float32)
    if momentum_weights is not None:
        b_moves = momentum * tl.load(momentum_weights + 2 + o_r, mask=m_r, other=0.0)
        b_weights += b_moves[:, None]
    return b_weights, b_moves


@triton.jit
def store_row_weights(weights, momentum_weights, o_r, m_r, o_w, m_w, b_weights, b_moves, W: tl.constexpr):
    tl.store(weights + (2 + o_r)[:, None] * W + o_w[None, :], b_weights, mask=m_r[:, None] & m_w[None, :])
    if momentum_weights is not None:
        tl.store(momentum_weights + 2 + o_r, b_moves, mask=m_r)


# ------------------------------------------------------------------------------------------------------------ a chunk's end


@triton.jit
def mapped(b_a, m, shift, total, AXIS: tl.constexpr, RETENTION: tl.constexpr):
    """``phi(A)``, 0 outside the mask. A row of A lies along AXIS; -1: it lies across several tiles, and ``shift, total`` are given."""
    if RETENTION.row_coupled and AXIS >= 0:
        shift = tl.expand_dims(tl.max(tl.where(m, b_a, retentions.BOTTOM), AXIS), AXIS)
        b_e = tl.where(m, retentions.term(tl.where(m, b_a, shift), shift, RETENTION), 0.0)
        total = tl.expand_dims(tl.sum(b_e, AXIS), AXIS)
    if RETENTION.row_coupled:  # keeps rows of padding finite; any other row has a term of 1
        b_a, total = tl.where(m, b_a, shift), tl.maximum(total, 1.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.where(m, retentions.primal(b_a, shift, total, RETENTION), 0.0)


@triton.jit
def end_tile(
    start, written, momenta, left, right, weights, momentum_weights, open_log_decay, row, o_k, m_k, o_v, m_v, o_w, m_w,
    K: tl.constexpr, V: tl.constexpr, W: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """A tile of A (returned) and S at the end of a chunk, from the weights after its last token; stored as the next chunk's start."""
    o, m = o_k[:, None] * V + o_v[None, :], m_k[:, None] & m_v[None, :]
    b_gamma = tl.exp(tl.load(open_log_decay + o_w, mask=m_w, other=0.0))
    b_a = b_gamma[None, :] * tl.load(start + o, mask=m, other=0.0)
    if written is not None:
        b_weights0 = tl.load(weights + o_w, mask=m_w, other=0.0)
        if tl.max(b_weights0, 0) > 0.0:
            b_a += b_weights0[None, :] * tl.load(written + o, mask=m, other=0.0)
    if momenta is not None:
        b_s = tl.load(momenta + o, mask=m, other=0.0)
        b_a += tl.load(weights + W + o_w, mask=m_w, other=0.0)[None, :] * b_s
        b_s *= tl.load(momentum_weights + 1)
    for r in tl.range(0, row + 1, BR, disable_licm=True):
        o_r = r + tl.arange(0, BR)
        m_r = o_r <= row
        b_left = tl.load(left + o_r[None, :] * K + o_k[:, None], mask=m_r[None, :] & m_k[:, None], other=0.0)  # [BK, BR]
        b_right = tl.load(right + o_r[:, None] * V + o_v[None, :], mask=m_r[:, None] & m_v[None, :], other=0.0)  # [BR, BV]
        b_weights = tl.load(weights + (2 + o_r)[:, None] * W + o_w[None, :], mask=m_r[:, None] & m_w[None, :], other=0.0)
        b_a += dot(b_left, b_weights * b_right)
        if momenta is not None:
            b_s += dot(b_left, tl.load(momentum_weights + 2 + o_r, mask=m_r, other=0.0)[:, None] * b_right)
    tl.store(start + o, b_a, mask=m)
    if momenta is not None:
        tl.store(momenta + o, b_s, mask=m)
    return b_a


@triton.jit
def begin_weights(weights, momentum_weights, open_log_decay, o_w, m_w, W: tl.constexpr):
    """Reset rows 0 and 1 and log gamma for the first token of a chunk."""
    tl.store(open_log_decay + o_w, o_w * 0.0, mask=m_w)
    tl.store(weights + o_w, o_w * 0.0, mask=m_w)
    tl.store(weights + W + o_w, o_w * 0.0, mask=m_w)
    if momentum_weights is not None:
        tl.store(momentum_weights + 1, 1.0)


# --------------------------------------------------------------------------------------------------------------- launcher


class Launch(NamedTuple):
    """One launch of a step: programs per head, and the constants of its configuration."""

    kernel: triton.runtime.JITFunction
    programs: int
    config: configs.Config
    blocks: dict


@dataclasses.dataclass(frozen=True)
class Step:
    """The launches of calls of one kind. Holds no tensor of the call."""

    key: configs.Key
    bias: Bias
    launches: tuple[Launch, ...]
    constants: dict

    @staticmethod
    def of(call, kernels: dict) -> Step:
        """``kernels`` in launch order, each with the axis its programs divide: ``"value"``, ``"hidden"``, or ``"head"`` (one program)."""
        key = configs.Key.of(call)
        architecture, launches = launch.architecture_of(call.q.device), []
        for kernel, along in kernels.items():
            config = configs.choose(kernel.__name__, key, architecture)
            block_v, _ = key.blocks(config)
            programs = {"value": -(-key.value_dim // block_v), "hidden": -(-key.hidden // key.part), "head": 1}[along]
            launches.append(Launch(kernel, programs, config, dict(BV=block_v)))
        constants = dict(RETENTION=retentions.Retention.of(call.retention), C=call.chunk_size, BR=configs.STEP_ROWS, BD=key.padded_v)
        if key.hidden:
            constants |= dict(D=key.key_dim, Hd=key.hidden, BH=key.part, EPS=call.ln_eps)
        else:
            constants |= dict(Dk=key.key_dim, Dv=key.value_dim, BK=key.padded_k)
        return Step(key, call.bias, tuple(launches), constants)

    def launch(self, buffers, q, k, v, lr, log_decay, delta, momentum, out, constants: dict, **tensors) -> None:
        """Run the kernels for one token after the other; each gets the arguments that it names."""
        gates = dict(lr=lr, log_decay=log_decay, delta=delta, momentum=momentum)
        gates = {name: None if x is None else x.contiguous() for name, x in gates.items()}
        tokens = {name: x if x.stride(-1) == 1 else x.contiguous() for name, x in dict(q=q, k=k, v=v, out=out).items()}
        strides = {f"{name}_strides": launch.Strides.of(x) for name, x in tokens.items()}
        n, count, h = q.shape[:3]
        predicting = buffers.start if buffers.primal is None else buffers.primal
        bias = biases.Bias.of(self.bias, 0 if delta is None else delta.dim() - 2)
        shared = launch.Shared(
            tensors | tokens | gates | strides | vars(buffers) | dict(predicting=predicting, T=count, H=h),
            self.constants | constants | dict(BIAS=bias),
        )
        for t in range(count):
            for kernel, programs, config, blocks in self.launches:
                launch.start(kernel, (n * programs, h), config, q.device, shared, blocks | dict(t=t))
        if tokens["out"] is not out:
            out.copy_(tokens["out"])
