"""Memory use does not grow with the number of calls."""

from __future__ import annotations

import ctypes

import pytest
import torch

import miras_kernels as mk
from miras_kernels import dispatch
from miras_kernels.testing import Case
from miras_kernels.testing.steps import cut, decoder

STEPS, WARM_UP = 1000, 50
CASES = {
    "linear": Case("grows", tokens=24, momentum=True, retention=mk.KLRetention(), bias=mk.Huber("switch")),
    "mlp": Case("grows", memory="mlp", tokens=24, key_dim=16, value_dim=16, momentum=True),
    "packed": Case("grows", lengths=(5, 19), decay="channel"),
}


def given_out() -> int:
    """Bytes allocated by malloc and not freed, of all threads: exact, unlike the size of the process."""

    class Mallinfo2(ctypes.Structure):
        _fields_ = tuple((f"field{i}", ctypes.c_size_t) for i in range(10))

    mallinfo2 = ctypes.CDLL(None).mallinfo2  # of the GNU C library
    mallinfo2.restype = Mallinfo2
    found = mallinfo2()
    return found.field7 + found.field4  # uordblks, in arenas; hblkhd, mapped separately


def growth(step) -> int:
    """Growth in bytes over STEPS steps."""
    for _ in range(WARM_UP):
        step()
    before = given_out()
    for _ in range(STEPS):
        step()
    return given_out() - before


def training(case: Case):
    """A training step: outputs and state, every gradient, and an update of the leaves."""
    inputs = case.draw(torch.float32)
    arguments, leaves = inputs.arguments(), list(inputs.leaves().values())
    run = case.function

    def step() -> None:
        out, state = run(**arguments, backend="cpp")
        gradients = torch.autograd.grad(out.square().mean() + state.dual[0].square().mean(), leaves, allow_unused=True)
        with torch.no_grad():
            for x, g in zip(leaves, gradients, strict=True):
                if g is not None:
                    x.sub_(g, alpha=1e-6)

    return step


# Small enough to detect a leak of the smallest tensor of a step, a gate [B, T, H] in float32, STEPS times.
LIMIT = 4 * 24 * 2 * STEPS // 4


@pytest.mark.parametrize("name", CASES)
def test_a_thousand_training_steps(name):
    assert growth(training(CASES[name])) < LIMIT


def test_a_thousand_decoded_tokens():
    case = Case("grows", tokens=1, bias=mk.Huber("switch"))
    arguments = case.draw(torch.float32).arguments()
    reader = decoder(case, arguments, mk.MemoryState((arguments["initial_state"].detach(),)), "cpp")
    token = {name: x.detach() for name, x in cut(arguments, 0, 1).items()}
    assert growth(lambda: reader.step(**token)) < LIMIT


def test_a_leak_is_detected(monkeypatch):
    backend, kept = dispatch.BACKENDS["cpp"], []
    forward = backend.forward

    def leaking(call, every):
        kept.append(torch.empty_like(call.lr))
        return forward(call, every)

    monkeypatch.setattr(backend, "forward", leaking)
    assert growth(training(CASES["linear"])) > LIMIT
