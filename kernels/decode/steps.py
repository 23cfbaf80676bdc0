"""What the decoding steps of both memories share: the weights of what a chunk has written, its end, and the launches.

A step reads a token into the ``Buffers`` of ``python/miras_kernels/decode/buffers.py``, whose names the kernels' parameters have; it is
defined by ``python/miras_kernels/backends/reference/step.py``. There is nothing to multiply but a matrix by a vector, so a token takes
the time of reading what it needs: ``phi(A_0)`` once, for k and q together, and the factors of the open chunk's tokens. Its arithmetic is
elementwise products and sums in float32, without tensor cores. The token that ends its chunk writes the matrices; whether it does is
read on the device, since every sequence is at its own place in its chunk.

A token takes two or three launches, each shared out among programs that may run in any order: what one of them writes another
launch reads. The first launch moves ``position`` on, which nobody else reads in it; to the later ones the token's row is the one before.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
import triton.language as tl

import triton

from ..common import configs, launch
from ..common import retention as retentions
from ..common.tiles import dot


@triton.jit
def vector(x, row, o, m):
    """A token's vector as float32, 0 outside the mask."""
    return tl.load(x + row + o, mask=m, other=0.0).to(tl.float32)


@triton.jit
def gate_of(gate, row, o, m, D: tl.constexpr, CHANNEL: tl.constexpr):
    """A token's gate as float32: a number, or a vector of the channels ``o``."""
    if CHANNEL:
        return vector(gate, row * D, o, m)
    else:
        return tl.load(gate + row).to(tl.float32)


@triton.jit
def move_on(position, C: tl.constexpr):
    """One token more of a sequence's chunk. The barrier: every thread reads before one writes, here and wherever a place is rewritten."""
    before = tl.load(position)
    tl.debug_barrier()
    tl.store(position, (before + 1) % C)


@triton.jit
def row_of(position, C: tl.constexpr):
    """The token's place in its chunk, after ``position`` has moved on."""
    return ((tl.load(position) + C - 1) % C).to(tl.int32)


# ----------------------------------------------------------------------------------------- weights of what a chunk has written


@triton.jit
def channels_of(o_v, m_v, CHANNEL: tl.constexpr):
    """The columns of ``weights`` for values ``o_v``: those of its own for a channel-wise decay, else the one that all share."""
    if CHANNEL:
        return o_v, m_v
    else:
        return tl.arange(0, 1), tl.full((1,), True, tl.int1)


@triton.jit
def decay_of(log_decay, open_log_decay, row, o_w, m_w, W: tl.constexpr):
    """``(alpha, log gamma) [BW]`` of a token: its decay, and the chunk's up to it."""
    b_open = tl.load(open_log_decay + o_w, mask=m_w, other=0.0)
    b_decay = b_open * 0.0
    if log_decay is not None:
        b_decay = vector(log_decay, row * W, o_w, m_w)
    return tl.exp(b_decay), b_open + b_decay


@triton.jit
def first_weights(weights, momentum_weights, o_w, m_w, alpha, momentum, W: tl.constexpr):
    """Rows 0 and 1 after the token, ``(kappa_0 [BW], kappa_1 [BW], mu_1)``: ``mu <- theta mu; kappa <- alpha kappa + mu``."""
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
    """``(weights [BR, BW], momentum_weights [BR])`` of tokens before this one, after it."""
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
def mapped(b_a, m, shift, total, AXIS: tl.constexpr, RETENTION: tl.constexpr, R0: tl.constexpr, R1: tl.constexpr):
    """``phi(A)``, 0 outside the mask. A row of A runs along AXIS; -1: it runs through several tiles, and ``shift, total`` are given."""
    if RETENTION == retentions.ROWS and AXIS >= 0:
        shift = tl.expand_dims(tl.max(tl.where(m, b_a, retentions.BOTTOM), AXIS), AXIS)
        b_e = tl.where(m, retentions.term(tl.where(m, b_a, shift), shift, RETENTION, R0, R1), 0.0)
        total = tl.expand_dims(tl.sum(b_e, AXIS), AXIS)
    if RETENTION == retentions.ROWS:  # a row of nothing but padding stays finite; any other has a term of 1
        b_a, total = tl.where(m, b_a, shift), tl.maximum(total, 1.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.where(m, retentions.primal(b_a, shift, total, RETENTION, R0, R1), 0.0)


@triton.jit
def end_tile(
    start, written, momenta, left, right, weights, momentum_weights, open_log_decay, row, o_k, m_k, o_v, m_v, o_w, m_w,
    K: tl.constexpr, V: tl.constexpr, W: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """A tile of the matrices at the end of a chunk, by the weights after its last token: starts A and S of the next one. Returns A's."""
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
    """Rows 0 and 1 and log gamma as a chunk's first token finds them."""
    tl.store(open_log_decay + o_w, o_w * 0.0, mask=m_w)
    tl.store(weights + o_w, o_w * 0.0, mask=m_w)
    tl.store(weights + W + o_w, o_w * 0.0, mask=m_w)
    if momentum_weights is not None:
        tl.store(momentum_weights + 1, 1.0)


# --------------------------------------------------------------------------------------------------------------- launcher


class Launch(NamedTuple):
    """One of the launches of a step: programs a head, and the constants of its configuration."""

    kernel: triton.runtime.JITFunction
    programs: int
    config: configs.Config
    blocks: dict


@dataclasses.dataclass(frozen=True)
class Step:
    """How calls of one kind are launched. Keeps nothing of the call but numbers."""

    key: configs.Key
    launches: tuple[Launch, ...]
    constants: dict

    @staticmethod
    def of(call, kernels: dict) -> Step:
        """Kernels in their order, each with what it cuts a head along: ``"value"``, ``"hidden"`` or, not at all, ``"head"``."""
        bias, gate = call.bias, call.retention
        key = configs.Key(
            call.q.shape[-1], call.v.shape[-1], call.chunk_size, call.q.element_size(), bias.row_coupled,
            call.hidden, gate.tag, call.momentum is not None,
            call.log_decay is not None and call.log_decay.dim() == 4,
        )  # fmt: skip
        architecture, launches = launch.architecture_of(call.q.device), []
        for kernel, along in kernels.items():
            config = configs.choose(kernel.__name__, key, architecture)
            block_v, _ = key.blocks(config)
            programs = {"value": -(-key.value_dim // block_v), "hidden": -(-key.hidden // key.part), "head": 1}[along]
            launches.append(Launch(kernel, programs, config, dict(BV=block_v)))
        constants = launch.rules_of(bias, gate) | dict(C=call.chunk_size)
        constants |= dict(READS=bias.reads_memory, COUPLED=bias.row_coupled, BR=configs.STEP_ROWS, BD=key.padded_v)
        if key.hidden:
            constants |= dict(D=key.key_dim, Hd=key.hidden, BH=key.part, EPS=call.ln_eps)
        else:
            constants |= dict(Dk=key.key_dim, Dv=key.value_dim, BK=key.padded_k)
        return Step(key, tuple(launches), constants)

    def launch(self, buffers, q, k, v, lr, log_decay, delta, momentum, out, **arguments) -> None:
        """Run the kernels for one token after the other; each gets those of the arguments that it names."""
        gates = dict(lr=lr, log_decay=log_decay, delta=delta, momentum=momentum)
        gates = {name: None if x is None else x.contiguous() for name, x in gates.items()}
        tokens = {name: x if x.stride(-1) == 1 else x.contiguous() for name, x in dict(q=q, k=k, v=v, out=out).items()}
        strides = {f"stride_{n[0]}{axis}": x.stride(i) for n, x in tokens.items() for i, axis in enumerate("bth")}
        n, count, h = q.shape[:3]
        arguments |= self.constants | tokens | gates | strides | vars(buffers) | dict(
            predicting=buffers.start if buffers.primal is None else buffers.primal,
            T=count, H=h, DELTA=0 if delta is None else delta.dim() - 2,
        )  # fmt: skip
        for t in range(count):
            for kernel, programs, config, blocks in self.launches:
                given = arguments | blocks | dict(t=t)
                launch.start(kernel, (n * programs, h), config, q.device, {name: given[name] for name in kernel.arg_names})
        if tokens["out"] is not out:
            out.copy_(tokens["out"])


def stepper(call):
    """``run(buffers, q, k, v, lr, log_decay, delta, momentum, out)`` for calls like this one."""
    from . import linear as linear_step
    from . import mlp as mlp_step

    with torch.no_grad():
        return (linear_step if call.memory.name == "linear" else mlp_step).stepper(call)
