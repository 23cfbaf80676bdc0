"""A figure of an attentional bias."""

from __future__ import annotations

from typing import Any

import torch

from .bias import Bias

__all__ = ["plot"]


def plot(bias: Bias, delta: float, limit: float) -> Any:
    """psi and its slope against the error, as a figure of matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot: matplotlib is needed, and not installed (pip install matplotlib)") from error
    e = torch.linspace(-limit, limit, 601, dtype=torch.float64)[:, None]
    zero, threshold = torch.zeros_like(e), torch.full_like(e, delta) if bias.needs_delta else None
    slope, _, _ = bias.psi_vjp(e, zero, threshold, torch.ones_like(e))
    figure = Figure(figsize=(8, 3), layout="constrained")
    for axes, values, name in zip(figure.subplots(1, 2), (bias.psi(e, zero, threshold), slope), ("psi", "slope of psi"), strict=True):
        axes.plot(e.flatten().tolist(), values.flatten().tolist())
        axes.set(xlabel="error", title=name)
        axes.grid(alpha=0.3)
    figure.suptitle(f"{bias!r}" + (f", delta = {delta:g}" if bias.needs_delta else ""))
    return figure
