"""Small blocks and their inputs, for the tests of the layers."""

from __future__ import annotations

import math

import torch

from miras_kernels.layers import PRESETS, MemoryBlock

NAMES = sorted(PRESETS)
MLP = ("l2_mlp", "memora", "moneta", "titans", "ttt_mlp", "yaad")
SIZES = {"hidden_size": 24, "num_heads": 3, "head_dim": 8, "init_std": 0.3}


def block(preset="yaad_linear", dtype=torch.float64, seed=0, **options) -> MemoryBlock:
    """A small block. A large init_std makes gates differ from token to token; ``chunk_size`` is 4 unless the preset's is 1."""
    torch.manual_seed(seed)
    if isinstance(preset, str) and PRESETS[preset].chunk_size > 1:
        options.setdefault("chunk_size", 4)
    return MemoryBlock(**{**SIZES, **options}, preset=preset, dtype=dtype)


def tokens(batch: int, length: int, dtype=torch.float64, seed=1) -> torch.Tensor:
    return torch.randn(batch, length, SIZES["hidden_size"], generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def assert_close(x: torch.Tensor, y: torch.Tensor, terms: int = 1024):
    """Equal up to the order of summation: the bound is 8 times the error of ``terms`` roundings that add up like a random walk."""
    x, y = x.detach(), y.detach()
    assert x.shape == y.shape and x.dtype == y.dtype
    assert torch.isfinite(x).all()
    bound = 8 * math.sqrt(terms) * torch.finfo(x.dtype).eps * max(y.norm().item(), torch.finfo(x.dtype).tiny)
    error = (x - y).norm().item()
    assert error <= bound, f"{error:.2e} > {bound:.2e}"
