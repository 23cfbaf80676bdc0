"""Shared by the tests of verification: one configuration that is verified in a tenth of a second, and results for it."""

from __future__ import annotations

import torch

import miras_kernels as mk
from miras_kernels import verification

CPU, GPU = torch.device("cpu"), torch.device("cuda")
KEY = "linear l2 l2 float32"
COMMAND = "verify --memory linear --bias l2 --retention l2 --dtype float32 --device cpu"
PASS = {"when": "2026-01-01", "failure": None}
FAIL = {"when": "2026-01-02", "failure": "out error 3e-02, budget 1e-05 (plain)"}


def forget(monkeypatch):
    """Act as a new process."""
    monkeypatch.setattr(verification, "_known", {})
    monkeypatch.setattr(verification, "_warned", set())


def verify(**changes):
    """Two configurations, sequence and decode, in a tenth of a second."""
    return mk.verify(**dict(memory="linear", bias=mk.L2(), retention=mk.L2Retention(), dtype=torch.float32, device="cpu") | changes)


def tokens(t: int, requires_grad: bool = False):
    x = torch.ones(1, t, 1, 8, requires_grad=requires_grad)
    return x, x, x, torch.full((1, t, 1), 0.1)


def taken(t: int = 20, requires_grad: bool = False, **arguments) -> str:
    """The backend that "auto" takes on the CPU."""
    reasons = mk.explain(*tokens(t, requires_grad), **arguments)
    return next(name for name, reason in reasons.items() if reason is None)
