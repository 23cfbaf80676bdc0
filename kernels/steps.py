"""What the decoding steps of both memories share: where a sequence stands in its chunk, its primal, and the launches.

A step reads ``T`` tokens, usually one, into the matrices of :class:`~miras_kernels.decode.Buffers`, in place; it is defined by
``python/miras_kernels/reference/step.py``. There is nothing to multiply but a matrix by a vector: a step takes the time of reading and
writing the state, so its arithmetic is elementwise products and sums in float32, without tensor cores.

Each sequence stands somewhere else in its chunk. Every program reads that from ``position`` and none writes it: the programs of a
sequence would race. ``advance``, launched after the step, moves positions (and the sums of log-decays, where heads share theirs) on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..decode import thresholds
from . import configs, launch
from . import retention as retentions
from .tiles import only_if


@triton.jit
def vector(x, row, o, m, stride: tl.constexpr = 1):
    """A token's vector as float32, 0 outside the mask."""
    return tl.load(x + row + o * stride, mask=m, other=0.0).to(tl.float32)


@triton.jit
def gate_of(gate, row, o, m, D: tl.constexpr, CHANNEL: tl.constexpr):
    """A token's gate as float32: a number, or a vector of the channels ``o``."""
    if CHANNEL:
        return vector(gate, row * D, o, m)
    else:
        return tl.load(gate + row).to(tl.float32)


@triton.jit
def mapped(b_a, m, shift, total, AXIS: tl.constexpr, RETENTION: tl.constexpr, R0: tl.constexpr, R1: tl.constexpr):
    """``phi(A)``, 0 outside the mask. A row of A runs along AXIS; -1: it runs through several tiles, and ``shift, total`` are given."""
    if RETENTION == retentions.ROWS and AXIS >= 0:
        shift = tl.expand_dims(tl.max(tl.where(m, b_a, retentions.BOTTOM), AXIS), AXIS)
        b_e = tl.where(m, retentions.term(tl.where(m, b_a, shift), shift, RETENTION, R0, R1), 0.0)
        total = tl.expand_dims(tl.sum(b_e, AXIS), AXIS)
    if RETENTION == retentions.ROWS:  # a row of nothing but padding stays finite; any other has a term of 1
        b_a, total = tl.where(m, b_a, shift), tl.maximum(total, 1.0)
    return tl.where(m, retentions.primal(b_a, shift, total, RETENTION, R0, R1), 0.0)


@triton.jit
def begin(
    b_a, start, primal, o, m, fresh, shift, total, AXIS: tl.constexpr, RETENTION: tl.constexpr, R0: tl.constexpr, R1: tl.constexpr
):  # fmt: skip
    """``(A_0, W_0)`` of the chunk that a token belongs to, for a tile of the dual; its first token (``fresh``) finds and keeps them."""
    b_start, b_w = b_a, b_a
    if start is not None:
        b_start = tl.where(fresh, b_a, tl.load(start + o, mask=only_if(fresh == 0, m), other=0.0))
        tl.store(start + o, b_a, mask=only_if(fresh, m))
        b_w = b_start
    if RETENTION != retentions.L2:
        b_w = tl.load(primal + o, mask=only_if(fresh == 0, m), other=0.0)
        if fresh:
            b_w = mapped(b_a, m, shift, total, AXIS, RETENTION, R0, R1)
            tl.store(primal + o, b_w, mask=m)
    return b_start, b_w


@triton.jit
def read_matrix(b_a, b_start, b_w, gamma, rho, RETENTION: tl.constexpr):
    """What a token reads: ``gamma W_0 + rho D`` with D = A - gamma A_0, what the chunk has written; the dual itself without a gate."""
    if RETENTION == retentions.L2:
        return b_a
    else:
        return gamma * b_w + rho * (b_a - gamma * b_start)


@triton.jit
def moved(b_a, b_s, carried, o, m, theta, alpha):
    """A after the token's write ``b_s``: ``S <- theta S + b_s`` where there is momentum, ``A <- alpha A + S``."""
    if carried is not None:
        b_s += theta * tl.load(carried + o, mask=m, other=0.0)
        tl.store(carried + o, b_s, mask=m)
    return alpha * b_a + b_s


@triton.jit(do_not_specialize=("T",))
def advance(log_decay, sums, position, T, H, C: tl.constexpr, BH: tl.constexpr):
    """Positions after T tokens and, unless channels have their own, the open chunk's sums of log-decays ``[N, H]``; one sequence."""
    i_n = tl.program_id(0).to(tl.int64)
    o_h = tl.arange(0, BH)
    m_h = o_h < H
    before = tl.load(position + i_n)
    if sums is not None:
        b_sum = tl.load(sums + i_n * H + o_h, mask=m_h, other=0.0)
        for t in tl.range(0, T):
            if log_decay is not None:
                b_sum += vector(log_decay, (i_n * T + t) * H, o_h, m_h)
            b_sum = tl.where((before + t + 1) % C == 0, 0.0, b_sum)
        tl.store(sums + i_n * H + o_h, b_sum, mask=m_h)
    tl.debug_barrier()
    tl.store(position + i_n, (before + T) % C)


# --------------------------------------------------------------------------------------------------------------- launcher


@dataclasses.dataclass(frozen=True)
class Step:
    """How calls of one kind are launched. Keeps nothing of the call but numbers."""

    key: configs.Key
    config: configs.Config
    sizes: dict
    constants: dict
    threshold: Callable[[float], Tensor]  # delta as a tensor where it is given as a number

    @staticmethod
    def of(call) -> Step:
        bias, gate = call.bias, call.retention
        hidden = call.state.dual[0].shape[-1] if call.memory == "mlp" else 0
        key = configs.Key(
            call.q.shape[-1], call.v.shape[-1], call.chunk_size, call.q.element_size(), bias.row_coupled, hidden,
            gate.tag, call.momentum is not None,
        )  # fmt: skip
        config = configs.step(key)
        sizes = dict(C=call.chunk_size)
        if hidden:
            sizes |= dict(D=key.key_dim, Hd=hidden, BD=key.padded_v, BH=key.block_hidden(config), EPS=call.ln_eps)
        else:
            block_v, block_k = key.blocks(config)
            sizes |= dict(Dk=key.key_dim, Dv=key.value_dim, BV=block_v, BK=block_k, ENTIRE=key.entire)
        p, r = (*bias.parameters, 0.0, 0.0, 0.0)[:3], (*gate.parameters, 0.0, 0.0)[:2]
        constants = dict(BIAS=bias.tag, P0=p[0], P1=p[1], P2=p[2], RETENTION=gate.tag, R0=r[0], R1=r[1])
        constants |= dict(READS=bias.reads_memory, COUPLED=bias.row_coupled)
        return Step(key, config, sizes, constants, thresholds(call))

    def launch(self, kernel, units: int, buffers, q, k, v, lr, log_decay, delta, momentum, out, **arguments) -> None:
        """Run a step kernel with ``units`` programs a head, then ``advance``."""
        delta = self.threshold(delta) if isinstance(delta, float) else delta
        gates = dict(lr=lr, log_decay=log_decay, delta=delta, momentum=momentum)
        gates = {name: None if x is None else x.contiguous() for name, x in gates.items()}
        tokens = {name: x if x.stride(-1) == 1 else x.contiguous() for name, x in dict(q=q, k=k, v=v, out=out).items()}
        strides = {f"stride_{n[0]}{axis}": x.stride(i) for n, x in tokens.items() for i, axis in enumerate("bth")}
        (n, t, h), device = q.shape[:3], q.device
        arguments |= self.sizes | self.constants | tokens | gates | strides
        launch.start(
            kernel, (n * units, h), self.config, device,
            dict(
                dual=buffers.dual, start=buffers.start, primal=buffers.primal, rho=buffers.rho, carried=buffers.momentum,
                sums=buffers.log_decay, position=buffers.position, T=t, H=h, DELTA=0 if delta is None else delta.dim() - 2, **arguments,
            ),
        )  # fmt: skip
        if tokens["out"] is not out:
            out.copy_(tokens["out"])
        if self.key.chunk_size > 1:  # else every sequence stands at a boundary before and after
            shared = buffers.log_decay.dim() == 2
            launch.start(
                advance, (n,), configs.Config(0, 0, 1, 1), device,
                dict(
                    log_decay=gates["log_decay"] if shared else None, sums=buffers.log_decay if shared else None, position=buffers.position,
                    T=t, H=h, C=self.key.chunk_size, BH=triton.next_power_of_2(h),
                ),
            )  # fmt: skip


def stepper(call):
    """``run(buffers, q, k, v, lr, log_decay, delta, momentum, out)`` for calls like this one."""
    from . import linear_step, mlp_step

    with torch.no_grad():
        return (linear_step if call.memory == "linear" else mlp_step).stepper(call)
