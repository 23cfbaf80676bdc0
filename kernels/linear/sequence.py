"""The linear memory (docs/mathematics.md, sections 2, 6 and 7): the launches of a forward and a backward, in order.

    forward     decays.py: weights from the gates;  chain.py: S and E of every chunk;  read.py: the output
                where `configs.Key.fuses` says so:  decays.py;  fused.py: the output, without S and E in memory
    backward    decays.py;  chain.py: S and E recomputed;  linear_du_bwd;  linear_chain_bwd;  linear_dqk_bwd;  decays_bwd.py: gates
    exact steps (section 13):  block_solve and block_reads before the chain,  block_errors_bwd after its backward
    with decays by key channel (section 14):  keyed.py instead of decays.py, block_solve, linear_dqk_bwd and decays_bwd.py

A token's log-decay scales what the state at the chunk's start and earlier tokens contribute to later reads and to the next chunk. Its
gradient is the sum over these pairs, taken from the products themselves (dS as in read.py):

    d log alpha_t = sum_{r >= t} gamma_r q_r'S dO_r  +  sum_{r >= t > s} (dS o Q K')_rs  -  sum_{s < t} dec_s U_s'(J'k_s)  +  gamma_C <J, S>

The shorter form in the literature, ``cumsum(q.dq - k.dk)``, subtracts numbers of order 1 where the result may be orders of magnitude
smaller. Each tile of values or keys writes its partial sums to a row of ``[tiles, B, T, H]``, added afterwards: no atomics.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.chunks import BODY, HEAD, TAIL, WHOLE
from ..common.decays import chunk_weights
from ..common.decays_bwd import decay_gradient, gate_gradients
from ..common.final_state import Final, open_chunk_end
from ..common.launch import Problem
from . import channel as linear_channel
from . import keyed as linear_keyed
from . import read as linear_read
from .block import Solved, error_gradients, solve
from .chain import ChainGradients, chain_gradients, empty_chain, recompute, walk
from .dqk import ReadGradients, read_gradients
from .fused import walk_fused


def forward(p: Problem, every: int, wants_final: bool, may_end_open: bool) -> tuple[Tensor, Final | None, Tensor | None]:
    """``(out, final state, checkpoints)``; checkpoints: float32 matrices of every ``every``-th chunk, None for ``every = 0``."""
    fused, weights = p.fuses(), chunk_weights(p)._asdict()
    p, out = (p.sharing(**weights), p.result(p.value_dim)) if fused else (p.sharing(**weights, **empty_chain(p)._asdict()), None)
    p, solved = _solve(p)
    matrices = p.call.state.matrices()
    segments = p.segments(p.chunk_size * max(every, 1))
    several = () if len(matrices) == 1 else (len(matrices),)
    checkpoints = p.empty(segments.count, p.heads, *several, p.key_dim, p.value_dim, dtype=torch.float32) if every else None

    def walked(part: int, initial: tuple[Tensor, ...], wanted: bool = True) -> tuple[Tensor, ...]:
        final = p.empty(len(initial), p.sequences, p.heads, p.key_dim, p.value_dim, dtype=torch.float32) if wanted else None
        if len(initial) > 1:  # with the same strides
            initial = torch.stack(initial).unbind(0)
        stored = dict(checkpoints=checkpoints, EVERY=max(every, 1), SEGMENTS=segments.per_sequence, first_segment=segments.first)
        if fused:
            walk_fused(p, solved, initial[0], part, out, None if final is None else final[0], stored)
        else:
            walk(p, solved, p.sequences, initial, part, final, stored | dict(segment_owner=None))
        return () if final is None else final.transpose(-1, -2).unbind(0)

    final = None
    if p.key.exact or (p.position is None and not may_end_open):
        after = walked(WHOLE.value, matrices, wants_final)
        final = Final(after[:1], momentum=after[1:]) if wants_final else None
        if p.key.exact and may_end_open:  # chunks of one token
            final = final._replace(start=after[:1], open_decay=matrices[0].new_zeros(p.sequences, p.heads))
    else:
        before = matrices if p.position is None else walked(HEAD.value, matrices)
        start = walked(BODY.value, before)
        after = walked(TAIL.value, start)
        final = Final(after[:1], *open_chunk_end(p.call, start[:1]), after[1:])
    if not fused:
        out = (linear_channel if p.key.channels else linear_read).output(p)
    return out, final, checkpoints


def backward(p: Problem, checkpoints: Tensor, every: int, grad_out: Tensor, grad_state: list[Tensor]) -> dict:
    """Gradients by argument name, ``state`` for the initial matrices ``[N, H, Dv, Dk]``: dual and, with momentum, momentum matrix."""
    weights, chain = chunk_weights(p, backward=True), empty_chain(p)
    p = p.sharing(**weights._asdict(), **chain._asdict(), grad_out=grad_out.contiguous())
    p, solved = _solve(p)
    recompute(p, solved, checkpoints, every)
    scores = rows_pairs = grad_pairs = None
    if p.key.channels:
        scores = linear_channel.chunk_scores(p)
        from_out, grad_scores = linear_channel.du_from_output(p, scores)
    else:
        from_out, grad_scores, rows_pairs, grad_pairs = linear_read.score_gradients(p)
    of_chain = chain_gradients(p, solved, from_out, grad_state)
    del from_out
    of_errors = error_gradients(p, solved, of_chain.v) if p.key.exact else None
    of_tokens = of_errors or of_chain
    grads = {"v": of_tokens.v, "lr": of_tokens.lr, "state": of_chain.initial}
    if p.key.keyed:
        return grads | linear_keyed.gradients(p, of_chain, of_errors, grad_scores)
    of_reads = read_gradients(p, of_chain, of_errors, grad_scores)
    grads |= {"q": of_reads.q, "k": of_reads.k, "erase_k": of_reads.erase_k}
    if of_errors is not None and p.log_decay is not None:
        sums = (of_reads.rows_read, rows_pairs, of_chain.rows_to_end, of_reads.inner)
        return grads | {"log_decay": decay_gradient(p, *sums, p.block, of_reads.rows_error, of_errors.rows_crossed)}
    if p.delta is not None:
        grads["delta"] = of_chain.delta
    return grads | _gate_gradients(p, of_chain, of_reads, scores, rows_pairs, grad_pairs)


def _solve(p: Problem) -> tuple[Problem, Solved]:
    """The systems of a call in exact steps, and the problem that the chain solves."""
    return linear_keyed.solve(p) if p.key.keyed else (p, solve(p))


def _gate_gradients(
    p: Problem,
    of_chain: ChainGradients,
    of_reads: ReadGradients,
    scores: Tensor | None,
    rows_pairs: Tensor | None,
    grad_pairs: Tensor | None,
) -> dict[str, Tensor]:
    """d log alpha and d theta, by argument name; ``scores``: ``Q K'`` where decays go by channel."""
    if p.key.channels:
        log_decay, *of_steps = linear_channel.decay_gradient(p, scores, of_chain.states)
        grads = {"log_decay": log_decay}
        if p.momentum is not None:
            grad_steps, rows_carry = of_steps
            rows = dict(rows_read=None, rows_to_end=None, rows_step=of_chain.rows_step.sum(0), rows_carry=rows_carry)
            grads |= gate_gradients(p, grad_steps, inner=of_reads.inner.sum(1), **rows)
        return grads
    if p.momentum is not None:
        read = None if of_reads.rows_read is None else of_reads.rows_read.sum(0)
        rows = dict(rows_read=read, rows_to_end=of_chain.rows_to_end.sum(0), rows_step=of_chain.rows_step.sum(0))
        rows |= dict(rows_carry=of_reads.rows_carry.sum(0), inner=of_reads.inner.sum(1))
        return gate_gradients(p, grad_pairs, **rows)
    if p.log_decay is None:
        return {}
    sums = (of_reads.rows_read, rows_pairs, of_chain.rows_to_end, of_reads.inner)
    return {"log_decay": decay_gradient(p, *sums, p.block)}
