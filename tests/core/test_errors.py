"""Every error: its type, and a text that names the argument, what was expected and what was given."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch

import miras_kernels as mk

B, T, H, DK, DV = 2, 6, 2, 4, 3


def linear(**changes):
    torch.manual_seed(0)
    arguments = dict(
        q=torch.randn(B, T, H, DK),
        k=torch.randn(B, T, H, DK),
        v=torch.randn(B, T, H, DV),
        lr=torch.full((B, T, H), 0.1),
        log_decay=torch.full((B, T, H), -0.1),
        chunk_size=4,
    )
    return mk.linear_memory(**{**arguments, **changes})


def mlp(**changes):
    torch.manual_seed(0)
    x = torch.randn(B, T, H, DK)
    arguments = dict(
        q=x, k=x, v=x, lr=torch.full((B, T, H), 0.1), log_decay=None, chunk_size=4,
        initial_state=(torch.randn(H, DK, 8), torch.randn(H, 8, DK)), ln_weight=torch.ones(H, DK), ln_bias=torch.zeros(H, DK),
    )  # fmt: skip
    return mk.mlp_memory(**{**arguments, **changes})


def packed(offsets, **changes):
    x, lr = torch.randn(1, T, H, DK), torch.full((1, T, H), 0.1)
    offsets = torch.tensor(offsets) if isinstance(offsets, list) else offsets
    return mk.linear_memory(x, x, x, lr, **{"cu_seqlens": offsets, "chunk_size": 4, **changes})


def resumed(**changes):
    _, state = linear(output_final_state=True)
    chunk = {n: v for n, v in changes.items() if n in ("position", "start", "log_decay")}
    state = dataclasses.replace(state, **{n: v for n, v in changes.items() if n in ("dual", "momentum")})
    return linear(initial_state=dataclasses.replace(state, open_chunk=dataclasses.replace(state.open_chunk, **chunk)))


ones = torch.ones
REFUSED = [
    # the call, the error, its text
    (lambda: linear(q=[1.0]), TypeError, "q: expected a tensor, got list of 1"),
    (lambda: linear(q=ones(B, T, DK)), ValueError, "q: expected 4 dimensions [B, T, H, D], got shape (2, 6, 4)"),
    (lambda: linear(q=ones(B, T, H, DK).long()), TypeError, "q: expected a floating-point tensor, got dtype torch.int64"),
    (lambda: linear(k=ones(B, T, H, DK, dtype=torch.float64)), TypeError, "k: expected dtype torch.float32 as q, got torch.float64"),
    (lambda: linear(k=ones(B, T, H, 5)), ValueError, "k: expected the shape of q, (2, 6, 2, 4), got (2, 6, 2, 5)"),
    (lambda: linear(v=ones(B, 5, H, DV)), ValueError, "v: expected shape [B, T, H, Dv] = (2, 6, 2) + (Dv,), got (2, 5, 2, 3)"),
    (lambda: linear(v=ones(B, T, H, 0)), ValueError, "v: expected at least one head and one channel, got shape (2, 6, 2, 0)"),
    (lambda: linear(v=ones(B, T, H, DV, device="meta")), ValueError, "v: expected device cpu as q, got meta"),
    (lambda: linear(q=ones(B, T, H, DK).to_sparse()), ValueError, "q: expected a strided (dense) tensor, got layout torch.sparse_coo"),
    (lambda: linear(lr=0.1), TypeError, "lr: expected a tensor, got 0.1"),
    (lambda: linear(lr=ones(B, T)), ValueError, "lr: expected shape [B, T, H] or [B, T, H, Dv] = (2, 6, 2) or (2, 6, 2, 3), got (2, 6)"),
    (lambda: linear(lr=ones(B, T, H, dtype=torch.float64)), TypeError, "lr: float64 needs float64 q, k and v, got q of dtype torch.float32"),
    (lambda: linear(log_decay=ones(B, T, H, 7)), ValueError, "log_decay: expected shape [B, T, H] or [B, T, H, Dv] = (2, 6, 2) or (2, 6, 2, 3)"),
    (lambda: linear(log_decay=ones(B, T, H)), ValueError, "log_decay: expected values <= 0 (alpha = exp(log_decay) in (0, 1]), got a maximum of 1"),
    (lambda: linear(momentum=ones(B, T, H)), ValueError, "momentum: expected values in [0, 1), got [1, 1]"),
    (lambda: linear(momentum=-ones(B, T, H)), ValueError, "momentum: expected values in [0, 1), got [-1, -1]"),
    (lambda: linear(momentum=0.5), TypeError, "momentum: expected a tensor, got 0.5"),
    (lambda: linear(momentum=ones(B, T, H, DV)), ValueError, "momentum: expected shape [B, T, H] = (2, 6, 2), got (2, 6, 2, 3)"),
    (lambda: linear(bias="l2"), TypeError, "bias: expected an attentional bias such as L2() or Huber('norm'), got 'l2'"),
    (lambda: linear(bias=mk.L2), TypeError, "bias: expected an attentional bias such as L2() or Huber('norm'), got type"),
    (lambda: linear(retention=None), TypeError, "retention: expected a retention gate such as L2Retention(), got NoneType"),
    (lambda: linear(delta=1.0), ValueError, "delta: the bias L2() uses none, got 1.0"),
    (lambda: linear(bias=mk.Huber()), ValueError, "delta: the bias Huber(kind='coordinate', sharpness=10.0) needs one (a float or a tensor"),
    (lambda: linear(bias=mk.RobustL2()), ValueError, "delta: the bias RobustL2(eps=1e-06) needs one (a float or a tensor [B, T, H]), got None"),
    (lambda: linear(bias=mk.Huber(), delta="1"), TypeError, "delta: expected a float or a tensor [B, T, H], got '1'"),
    (lambda: linear(bias=mk.Huber(), delta=-1.0), ValueError, "delta: expected a finite value >= 0, got -1.0"),
    (lambda: linear(bias=mk.Huber(), delta=-ones(B, T, H)), ValueError, "delta: expected values >= 0, got a minimum of -1"),
    (lambda: linear(bias=mk.Huber("norm"), delta=ones(B, T, H, DV)), ValueError, "delta: expected shape [B, T, H] = (2, 6, 2), got (2, 6, 2, 3)"),
    (lambda: linear(chunk_size=0), ValueError, "chunk_size: expected an integer >= 1, got 0"),
    (lambda: linear(chunk_size=4.0), TypeError, "chunk_size: expected an integer >= 1, got 4.0"),
    (lambda: linear(output_final_state=1), TypeError, "output_final_state: expected True or False, got 1"),
    (lambda: linear(backend="cudnn"), ValueError, "backend: expected one of 'auto', 'reference', 'cpp', 'triton', 'cuda', got 'cudnn'"),
    (lambda: linear(backend="cuda"), ValueError, "backend: 'cuda' cannot serve this call: "),
    (lambda: linear(backend="triton", chunk_size=200), ValueError, "backend: 'triton' cannot serve this call: chunk_size is limited to 128, got 200"),
    (lambda: linear(backend="cpp", chunk_size=257), ValueError, "chunk_size is limited to 256, got 257"),
    (lambda: linear(backend="cpp", v=ones(B, T, H, 257)), ValueError, "head dimensions are limited to 256, got 257"),
    (lambda: mlp(backend="cpp", initial_state=(ones(H, DK, 1025), ones(H, 1025, DK))), ValueError, "backend: 'cpp' cannot serve this call: hidden sizes are limited to 1024, got 1025"),
    (lambda: mlp(backend="cpp", chunk_size=257), ValueError, "chunk_size is limited to 256, got 257"),
    (lambda: linear(initial_state=ones(B, H, DK, DV)), ValueError, "initial_state: expected shape [N, H, ...] or [H, ...] = (2, 2, 3, 4) or (2, 3, 4), got (2, 2, 4, 3)"),
    (lambda: linear(initial_state=(ones(H, DV, DK),) * 2), ValueError, "initial_state: expected 1 matrices, got tuple of 2"),
    (lambda: linear(initial_state=ones(H, DV, DK, dtype=torch.float64)), TypeError, "initial_state: float64 needs float64 q, k and v"),
    (lambda: resumed(dual=(ones(1),)), ValueError, "initial_state.dual: expected shape [N, H, ...] = (2, 2, 3, 4), got (1,)"),
    (lambda: resumed(dual=(ones(1),) * 2), ValueError, "initial_state.dual: expected 1 matrices, got tuple of 2"),
    (lambda: resumed(momentum=(ones(B, H, DV, DK),)), ValueError, "initial_state.momentum: the state carries momentum, so the call needs momentum, got momentum=None"),
    (lambda: resumed(position=torch.tensor([2, 4])), ValueError, "initial_state.open_chunk.position: expected values in [0, chunk_size) = [0, 4), got [2, 4]"),
    (lambda: resumed(position=torch.tensor([2])), ValueError, "initial_state.open_chunk.position: expected an int64 tensor of shape (2,), got a tensor of shape (1,)"),
    (lambda: resumed(start=(ones(B, H, 1, 1),)), ValueError, "initial_state.open_chunk.start: expected shape [N, H, ...] = (2, 2, 3, 4), got (2, 2, 1, 1)"),
    (lambda: resumed(log_decay=ones(B)), ValueError, "initial_state.open_chunk.log_decay: expected shape as log_decay per sequence = (2, 2), got (2,)"),
    (lambda: packed([0, 3]), ValueError, "cu_seqlens: expected to end at T = 6, got 3"),
    (lambda: packed([1, 6]), ValueError, "cu_seqlens: expected to start at 0, got 1"),
    (lambda: packed([0, 4, 3, 6]), ValueError, "cu_seqlens: expected offsets that do not decrease, got [0, 4, 3, 6]"),
    (lambda: packed([0]), ValueError, "cu_seqlens: expected shape [N + 1] with N >= 1, got (1,)"),
    (lambda: packed((0, 6)), TypeError, "cu_seqlens: expected an integer tensor [N + 1], got tuple of 2"),
    (lambda: packed([0.0, 6.0]), TypeError, "cu_seqlens: expected dtype int32 or int64, got torch.float32"),
    (lambda: packed([0, 3, 6], initial_state=ones(1, H, DK, DK)), ValueError, "initial_state: expected shape [N, H, ...] or [H, ...] = (2, 2, 4, 4)"),
    (lambda: linear(cu_seqlens=torch.tensor([0, 6])), ValueError, "cu_seqlens: packed sequences need B = 1, got B = 2"),
    (lambda: mlp(v=ones(B, T, H, DV)), ValueError, "v: an MLP memory needs Dv = Dk = 4, got shape (2, 6, 2, 3)"),
    (lambda: mlp(initial_state=None), ValueError, "initial_state: an MLP memory needs its 2 matrices (W1 [..., D, Hd], W2 [..., Hd, D]), got None"),
    (lambda: mlp(initial_state=ones(H, DK, 8)), ValueError, "initial_state: expected 2 matrices (W1 [..., D, Hd], W2 [..., Hd, D]), got a tensor"),
    (lambda: mlp(initial_state=(ones(H, DK, 8), ones(H, 7, DK))), ValueError, "initial_state: expected shape [N, H, ...] or [H, ...] = (2, 2, 8, 4) or (2, 8, 4), got (2, 7, 4)"),
    (lambda: mlp(ln_weight=None), TypeError, "ln_weight: expected a tensor, got NoneType"),
    (lambda: mlp(ln_bias=ones(DK)), ValueError, "ln_bias: expected shape [H, D] = (2, 4), got (4,)"),
    (lambda: mlp(ln_eps=0.0), ValueError, "ln_eps: expected a number > 0, got 0.0"),
    (lambda: mlp(lr=ones(B, T, H, DK)), ValueError, "lr: channel-wise gates [B, T, H, Dv] need a linear memory; an MLP memory takes [B, T, H] = (2, 6, 2)"),
    (lambda: mk.Lp(1.5), ValueError, "Lp: p < 2 needs a sharpness (psi' is unbounded at e = 0), got p=1.5, sharpness=None"),
    (lambda: mk.Lp(0.5, sharpness=1.0), ValueError, "Lp: p must be a finite number >= 1, got 0.5"),
    (lambda: mk.Lp("3"), TypeError, "Lp: p must be a number, got str"),
    (lambda: mk.Lp(3.0, sharpness=1.0, eps=0.0), ValueError, "Lp: eps must be a finite number > 0, got 0"),
    (lambda: mk.L1(sharpness=0.0), ValueError, "L1: sharpness must be a finite number > 0, got 0"),
    (lambda: mk.Huber("soft"), ValueError, "Huber: kind must be one of 'coordinate', 'norm', 'switch', got 'soft'"),
    (lambda: mk.RobustL2(eps=-1.0), ValueError, "RobustL2: eps must be a finite number > 0, got -1"),
    (lambda: mk.LqRetention(q=1.0), ValueError, "LqRetention: q must be a finite number > 1, got 1"),
    (lambda: mk.LqRetention(floor=0.0), ValueError, "LqRetention: floor must be a finite number > 0, got 0"),
    (lambda: mk.KLRetention(mass=-1.0), ValueError, "KLRetention: mass must be a finite number > 0, got -1"),
    (lambda: mk.ElasticNetRetention(-0.1), ValueError, "ElasticNetRetention: threshold must be a finite number >= 0, got -0.1"),
]  # fmt: skip


@pytest.mark.parametrize("call, error, text", REFUSED, ids=[text[:60] for *_, text in REFUSED])
def test_refused(call, error, text):
    with pytest.raises(error, match=re.escape(text)):
        call()


def test_the_calls_are_accepted_without_the_error():
    linear()
    mlp()
    packed([0, 2, 6])
    resumed()


def test_value_checks_can_be_turned_off():
    with mk.override(check_values=False):
        out, _ = linear(log_decay=torch.full((B, T, H), 0.01))
    assert out.isfinite().all()
