"""The MLP memory (docs/mathematics.md, sections 9 and 10): the launches of a forward and a backward, in order.

    forward    decays.py: weights from the gates;  mlp_chain_fwd
    backward   decays.py;  for each group of chunks, the last first: mlp_chain_fwd to recompute, mlp_read_bwd, mlp_dq_bwd, mlp_chain_bwd;
               decays_bwd.py: gates

A group has as many segments as fill a chip, of all sequences. mlp_chain_fwd recomputes them all at once, and the workspace between the
kernels does not grow with the sequence. It has the operands' dtype, except for what LayerNorm reads.

Without momentum the gradients of log-decays are summed over pairs as in linear/sequence.py, for both matrices; with momentum both
matrices' shares of gM and gb are added for decays_bwd.py. The gradients of LayerNorm's parameters are summed per head of each sequence.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from miras_kernels.backends.groups import Groups

from ..common.chunks import BODY, HEAD, SEGMENT, TAIL, WHOLE
from ..common.decays import chunk_weights
from ..common.decays_bwd import decay_gradient, gate_gradients
from ..common.final_state import Final, open_chunk_end, opened_chunk
from ..common.launch import Problem, launch
from .chain import mlp_chain_bwd, mlp_chain_fwd
from .read import mlp_dq_bwd, mlp_read_bwd


def forward(p: Problem, every: int, wants_final: bool, may_end_open: bool) -> tuple[Tensor, Final | None, Tensor | None]:
    """``(out, final state, checkpoints)``; checkpoints ``[slots, H, 2 or 4, Hd, D]``: as in linear/sequence.py."""
    weights, out, memory = chunk_weights(p), p.result(p.value_dim), pack(p.call.state.matrices())
    segments = p.segments(p.chunk_size * max(every, 1))
    checkpoints = p.empty(segments.count, *memory.shape[1:], dtype=torch.float32) if every else None

    def walk(part: int) -> None:
        opened = _opened(p) if part == HEAD.value else dict(opened=None, readouts=None, opened_scales=None)
        chunk, float32 = (p.sequences, p.heads, p.chunk_size), torch.float32
        own = opened | dict(
            PART=part, decays=weights.decays, moves=weights.moves, memory=memory,
            hidden=p.empty(*chunk, p.hidden), updates=p.empty(*chunk, p.value_dim), sums=p.empty(*chunk, p.value_dim, dtype=float32),
            pairs=p.empty(*chunk, p.chunk_size, dtype=float32) if weights.pairs is None else weights.pairs,
            scores=p.empty(*chunk, p.chunk_size), states=p.empty(*memory.shape[:2], 2, *memory.shape[3:]) if p.key.gated else None,
            checkpoints=checkpoints, duals=None, momenta=None, scales=None, out=out,
            first_segment=segments.first, group_segments=None, SEGMENTS=segments.per_sequence, EVERY=max(every, 1),
        )  # fmt: skip
        launch(mlp_chain_fwd, p, p.sequences, "hidden", own)

    if p.position is None and not may_end_open:
        walk(WHOLE.value)
        after = unpack(memory)
        return out, Final(after[:2], momentum=after[2:]) if wants_final else None, checkpoints
    if p.position is not None:
        walk(HEAD.value)
    walk(BODY.value)
    start = unpack(memory[:, :, :2].clone())
    walk(TAIL.value)
    after = unpack(memory)
    return out, Final(after[:2], *open_chunk_end(p.call, start), after[2:]), checkpoints


class Group(NamedTuple):
    """The recomputed forward of a group, for every chunk of ``[places, every]`` and head."""

    states: Tensor  # [chunks, H, 2, Hd, D]   W1' and W2 before the chunk
    hidden: Tensor  # [chunks, H, C, Hd]   Z
    updates: Tensor  # [chunks, H, C, D]   Gu
    sums: Tensor  # [chunks, H, C, D] float32   U
    duals: Tensor | None  # [chunks, H, 2, Hd, D] float32   A, with ``states = phi(A)``
    momenta: Tensor | None  # [chunks, H, 2, Hd, D]
    scales: Tensor | None  # [chunks, H, 2] float32   rho


def recompute(p: Problem, checkpoints: Tensor, every: int, groups: Groups, i: int) -> Problem:
    """Recompute the segments of a group, all at once; gives the problem of the group's launches, which share what was recomputed."""
    segments, memory = p.segments(p.chunk_size * every), checkpoints[groups.slots[i]]
    chunks, c, float32 = len(memory) * every, p.chunk_size, torch.float32
    matrices = (chunks, p.heads, 2, p.hidden, p.value_dim)
    group = Group(
        p.empty(*matrices), p.empty(chunks, p.heads, c, p.hidden), p.empty(chunks, p.heads, c, p.value_dim),
        p.empty(chunks, p.heads, c, p.value_dim, dtype=float32),
        p.empty(*matrices, dtype=float32) if p.key.gated else None, p.empty(*matrices) if p.key.momentum else None,
        p.empty(chunks, p.heads, 2, dtype=float32) if p.retention.has_rho else None,
    )  # fmt: skip
    p = p.sharing(**group._asdict(), group_segments=groups.segments[i], EVERY=every)
    own = dict(
        PART=SEGMENT.value, memory=memory, opened=None, readouts=None, opened_scales=None, pairs=None, scores=None, checkpoints=None,
        out=None, first_segment=segments.first, SEGMENTS=segments.per_sequence,
    )  # fmt: skip
    launch(mlp_chain_fwd, p, len(memory), "hidden", own)
    return p


class Workspace(NamedTuple):
    """What the three backward kernels pass to each other, for every chunk of a group and head."""

    inner_grad: Tensor  # [chunks, H, C, Hd]   Ga
    hidden_q: Tensor  # [chunks, H, C, Hd]   Zq
    grad_hidden_q: Tensor  # [chunks, H, C, Hd]   dZq
    from_hidden: Tensor  # [chunks, H, C, Hd]   RA, then dZ
    from_inner: Tensor  # [chunks, H, C, Hd]   R2, then dGz
    from_updates: Tensor  # [chunks, H, C, D]   R1
    grad_sums: Tensor  # [chunks, H, C, D]   dUq
    scores: Tensor  # [chunks, H, C, C]   rho1 L o Aq A', then P'
    grad_scores: Tensor  # [chunks, H, C, C]   N1, then N2
    weights: Tensor  # [chunks, H, C, C] float32   L, with momentum M
    grad_norm: Tensor  # [chunks, H, 2, D] float32   shares of dw, db
    grad_scales: Tensor | None  # [chunks, H, 2] float32   d rho

    @staticmethod
    def of(p: Problem, chunks: int) -> Workspace:
        wide = [p.empty(chunks, p.heads, p.chunk_size, p.hidden) for _ in range(5)]
        narrow = [p.empty(chunks, p.heads, p.chunk_size, p.value_dim) for _ in range(2)]
        square = [p.empty(chunks, p.heads, p.chunk_size, p.chunk_size, dtype=x) for x in (None, None, torch.float32)]
        scaled = p.retention.has_rho
        rest = [p.empty(chunks, p.heads, *x, dtype=torch.float32) if x else None for x in ((2, p.value_dim), (2,) if scaled else None)]
        return Workspace(*wide, *narrow, *square, *rest)


def backward(p: Problem, checkpoints: Tensor, every: int, grad_out: Tensor, grad_state: list[Tensor]) -> dict:
    """Gradients by argument name, ``state`` for the initial matrices: ``[N, H, D, Hd]`` and ``[N, H, Hd, D]``, then their momenta."""
    p = p.sharing(**chunk_weights(p, backward=True)._asdict(), grad_out=grad_out.contiguous())
    moving = p.key.momentum
    float32, decaying, per_token = torch.float32, p.log_decay is not None, p.bias.delta == 1

    def rows(count: int, wanted: bool = True) -> Tensor | None:
        return p.empty(count, p.batch, p.tokens, p.heads, dtype=float32) if wanted else None

    rows_lr, rows_delta = p.result(dtype=float32), p.result(dtype=float32) if per_token else None
    rows_to_end, rows_read, rows_pairs = rows(1, decaying or moving), rows(1, decaying), rows(2, decaying and not moving)
    rows_carry, rows_step = rows(1, moving), rows(1, moving)
    grad_pairs = p.empty(p.slots.count, p.heads, p.chunk_size, p.chunk_size, dtype=float32) if moving else None
    inner = p.empty(3 if moving else 1, p.slots.count, p.heads, dtype=float32) if decaying or moving else None
    grad_q, grad_k, grad_v = (p.result(p.value_dim) for _ in range(3))
    grad_delta = p.result(p.value_dim, dtype=float32) if p.bias.delta == 2 else None
    grad_memory = pack(tuple(grad_state) or tuple(torch.zeros_like(x) for x in p.call.state.matrices()))
    grad_primal = torch.empty_like(grad_memory[:, :, :2]) if p.key.gated else None
    grad_layer_norm = p.empty(p.sequences, p.heads, 2, p.value_dim, dtype=float32).zero_()
    row_sums = p.empty(p.sequences, p.heads, 3 if moving else 2, p.chunk_size, p.value_dim, dtype=float32)
    grad_sum = p.empty(p.sequences, p.heads, p.chunk_size, p.value_dim)

    groups = Groups.of(p.call, every)
    chunks = groups.slots.shape[1] * every
    p = p.sharing(
        **Workspace.of(p, chunks)._asdict(), grad_q=grad_q, grad_k=grad_k, grad_v=grad_v, grad_delta=grad_delta,
        row_sums=row_sums, grad_sum=grad_sum, grad_memory=grad_memory, grad_primal=grad_primal, grad_layer_norm=grad_layer_norm,
        grad_pairs=grad_pairs, rows_lr=rows_lr, rows_delta=rows_delta, rows_to_end=rows_to_end, rows_read=rows_read,
        rows_carry=rows_carry, rows_step=rows_step, inner=inner,
    )  # fmt: skip
    for i in reversed(range(len(groups.slots))):
        group = recompute(p, checkpoints, every, groups, i)
        of_first, of_second = (None, None) if rows_pairs is None else rows_pairs
        launch(mlp_read_bwd, group, chunks, "hidden", dict(rows_pairs=of_first))
        launch(mlp_dq_bwd, group, chunks, "hidden", dict(rows_pairs=of_second))
        launch(mlp_chain_bwd, group, p.sequences, "hidden", dict(group_places=groups.places[i]))

    grads = {"q": grad_q, "k": grad_k, "v": grad_v, "lr": rows_lr, "state": list(unpack(grad_memory))}
    grads["ln_weight"], grads["ln_bias"] = grad_layer_norm.sum(0).unbind(1)
    if moving:
        added = {"rows_read": None if rows_read is None else rows_read[0], "rows_to_end": rows_to_end[0]}
        grads |= gate_gradients(p, grad_pairs, rows_step=rows_step[0], rows_carry=rows_carry[0], inner=inner, **added)
    elif decaying:
        grads["log_decay"] = decay_gradient(p, rows_read, rows_pairs.sum(0, keepdim=True), rows_to_end, inner, p.chunk_size)
    if p.delta is not None:
        grads["delta"] = rows_delta if per_token else grad_delta
    return grads


def pack(matrices: tuple[Tensor, ...]) -> Tensor:
    """``W1 [N, H, D, Hd], W2 [N, H, Hd, D], momenta likewise -> [N, H, 2 or 4, Hd, D]``, the first of a pair transposed; a copy."""
    return torch.stack([x if i % 2 else x.transpose(-1, -2) for i, x in enumerate(matrices)], 2)


def unpack(memory: Tensor) -> tuple[Tensor, ...]:
    """The inverse of :func:`pack`; views."""
    return tuple(x if i % 2 else x.transpose(-1, -2) for i, x in enumerate(memory.unbind(2)))


def _opened(p: Problem) -> dict[str, Tensor | None]:
    """The chunk that a call resumes in, as `mlp_chain_fwd` takes it."""
    x = opened_chunk(p)
    readouts, scales = (pack(x.readouts), torch.stack(x.scales, 2)) if x.readouts else (None, None)
    return dict(opened=pack(x.primals), readouts=readouts, opened_scales=scales)
