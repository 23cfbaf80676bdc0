"""The equations of docs/mathematics.md as written there, for one chunk of one head, against autograd through the definition."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import miras_kernels as mk
from miras_kernels.backends.reference import definition
from miras_kernels.testing import Case, evaluate, relative_error
from miras_kernels.testing.case_list import BIASES, GATES

# Two float64 computations of one function, as in test_reference.py.
EXACT = 1e-9
C = 7
TOKENS = dict(batch=1, heads=1, tokens=C, chunk_size=C)


class Weights(NamedTuple):
    """Section 3, for gates of ``n`` channels; row 0 is the start of the recursions, row t token t."""

    gamma: Tensor  # [C + 1, n]
    M: Tensor  # [C + 1, C, n]
    b: Tensor  # [C + 1, n]
    Theta: Tensor  # [C + 1, C]
    pi: Tensor  # [C + 1]


def weights(alpha: Tensor, theta: Tensor) -> Weights:
    zeros = torch.zeros(C, alpha.shape[-1], dtype=alpha.dtype)
    rows = [Weights(torch.ones_like(alpha[0]), zeros, zeros[0], zeros[:, 0], torch.ones_like(theta[0]))]
    for t in range(C):
        before, unit = rows[-1], torch.eye(C, dtype=alpha.dtype)[t]
        Theta, pi = theta[t] * before.Theta + unit, theta[t] * before.pi
        rows.append(Weights(alpha[t] * before.gamma, alpha[t] * before.M + Theta[:, None], alpha[t] * before.b + pi, Theta, pi))
    return Weights(*map(torch.stack, zip(*rows, strict=True)))


def jacobian(bias: mk.biases.Bias, e: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor | float, Tensor | float]:
    """Section 4: d, c and p."""
    one, sech2 = torch.ones_like(e), lambda x: 1 / torch.cosh(x) ** 2
    if isinstance(bias, (mk.DotProduct, mk.L2)):
        return one, 0.0, 0.0
    if isinstance(bias, mk.L1):
        return bias.sharpness * sech2(bias.sharpness * e), 0.0, 0.0
    if isinstance(bias, mk.Lp):
        p, a, m = bias.p, bias.sharpness, e * e + bias.eps
        if a is None:
            return p * (p - 1) * e.abs() ** (p - 2), 0.0, 0.0
        return p * m ** ((p - 3) / 2) * (a * m * sech2(a * e) + (p - 1) * e * torch.tanh(a * e)), 0.0, 0.0
    n = e.norm(dim=-1, keepdim=True)
    if isinstance(bias, mk.RobustL2):
        r = (n * n + bias.eps).rsqrt()
        return 1 + delta * r, -delta * r**3 * e, r * e
    if isinstance(bias, mk.CustomBias):
        assert bias == BIASES[bias.tag], "the row of section 4 is for the table's expression"
        r = (1 + (n / delta) ** 2).rsqrt()
        return r, -(r**3) * e / delta**2, n * n * r**3 * e / delta**3
    assert isinstance(bias, mk.Huber), f"section 4 has no row for {bias}"
    if bias.kind == "coordinate":
        return torch.where(e.abs() <= delta, one, 0.0), 0.0, torch.where(e.abs() <= delta, 0.0, e.sign())
    a, inside = bias.sharpness, n <= delta
    if bias.kind == "norm":
        return torch.where(inside, one, delta / n), torch.where(inside, 0.0, -delta * e / n**3), torch.where(inside, 0.0, e / n)
    return torch.where(inside, one, delta * a * sech2(a * e)), 0.0, torch.where(inside, 0.0, torch.tanh(a * e))


def psi_vjp(bias: mk.biases.Bias, e: Tensor, delta: Tensor | None, y: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Section 4: the gradient of the error, that of the prediction (0 for the dot product), and that of delta."""
    d, c, p = jacobian(bias, e, delta)
    grad = d * y + (c * y).sum(-1, keepdim=True) * e
    of_delta = {} if delta is None else {"grad_delta": p * y if delta.shape == e.shape else (p * y).sum(-1, keepdim=True)}
    return grad, grad * bias.reads_memory, of_delta


def phi_vjp(gate: mk.retention.Retention, A: Tensor, G: Tensor, grad_rho: Tensor) -> Tensor:
    """Section 5."""
    W = gate.phi(A)
    if isinstance(gate, mk.LqRetention):
        N = (A.abs() ** gate.q).sum() + gate.floor**gate.q
        rho = N ** (-(gate.q - 2) / gate.q)
        return rho * G - (gate.q - 2) * rho / N * ((G * A).sum() + grad_rho) * A.sign() * A.abs() ** (gate.q - 1)
    if isinstance(gate, mk.KLRetention):
        return W * (G - (G * W).sum(-1, keepdim=True) / gate.mass)
    if isinstance(gate, mk.ElasticNetRetention):
        return G * (A.abs() > gate.threshold)
    if isinstance(gate, mk.SigmoidRetention):
        return G * W * (1 - W)
    if isinstance(gate, mk.CustomRetention):
        assert gate == GATES[gate.tag], "the row of section 5 is for the table's expression"
        return G / (1 + A.abs() / dict(gate.values)["bound"]) ** 2
    assert isinstance(gate, mk.L2Retention), f"section 5 has no row for {gate}"
    return G


def gate_gradients(w: Weights, alpha, theta, gM, gb, gTheta, gpi, reads, inner) -> dict[str, Tensor]:
    """Section 7 with momentum, per channel as in section 8.

    ``reads`` are ``gamma_t o_t' W_0 q_t [C, n]``, ``inner`` is ``gamma_C <J, A_0> [n]``; gM, gb are complete, with their last rows.
    """
    grad_alpha, grad_theta, later = torch.zeros_like(alpha), torch.zeros_like(theta), inner
    gM, gb = gM.clone(), gb.clone()
    for t in reversed(range(C)):  # row t of the weights belongs to the token before
        later = later + reads[t]
        grad_alpha[t] = alpha[t] * ((gM[t] * w.M[t]).sum(0) + gb[t] * w.b[t]) + later
        gTheta, gpi = gTheta + gM[t].sum(-1), gpi + gb[t].sum()
        grad_theta[t] = gTheta @ w.Theta[t] + gpi * w.pi[t]
        if t > 0:
            gM[t - 1] += alpha[t] * gM[t]
            gb[t - 1] += alpha[t] * gb[t]
        gTheta, gpi = theta[t] * gTheta, theta[t] * gpi
    return {"grad_log_decay": grad_alpha, "grad_momentum": grad_theta}


def without_momentum(w: Weights, X: Tensor, reads: Tensor, writes: Tensor, inner: Tensor) -> Tensor:
    """Section 7, the sum over pairs: ``writes`` are ``L_Cs u_s' J k_s``."""
    return torch.stack([X[r:, :r].sum() + reads[r:].sum() - writes[:r].sum() + inner.sum() for r in range(C)])[:, None]


def drawn(case: Case) -> tuple:
    """The case's tensors of its only head, gates as columns; the results of evaluate(); the gradients of its results."""
    inputs = case.draw()
    columns = {name: x.detach()[0, :, 0] for name, x in inputs.tensors.items() if not name.startswith("ln")}
    columns = {name: x if x.dim() == 2 else x[:, None] for name, x in columns.items()}
    head = lambda parts: [x.detach()[0, 0] for x in parts]
    A, J = head(inputs.duals), head(inputs.grad_duals)
    S, Js = ([*head(x)] or [torch.zeros_like(a) for a in A] for x in (inputs.momenta, inputs.grad_momenta))
    theta = columns["momentum"][:, 0] if case.momentum else torch.zeros(C, dtype=torch.float64)
    return inputs, columns, theta, A, S, J, Js, inputs.grad_out[0, :, 0]


def assert_same(inputs, found: dict[str, Tensor]) -> None:
    """Every result and gradient has been computed, and is correct."""
    wanted = evaluate(inputs, definition.run)
    assert wanted.keys() <= found.keys()
    errors = {name: relative_error(found[name].reshape(x.shape), x) for name, x in wanted.items()}
    assert max(errors.values()) < EXACT, errors


PAIRS = list(itertools.product(BIASES.values(), GATES.values()))
NAMES = [f"{bias.name}-{gate.name}" for bias, gate in PAIRS]


@pytest.mark.parametrize("i", range(len(PAIRS)), ids=NAMES)
def test_linear(i):
    (bias, gate), momentum, kind = PAIRS[i], i // 2 % 2 == 1, ("scalar", "channel")[i % 2]
    case = Case(
        "linear", bias=bias, retention=gate, momentum=momentum, decay=kind, lr=kind, delta=kind, key_dim=5, value_dim=4, seed=i, **TOKENS
    )
    inputs, x, theta, (A,), (S,), (J,), (Js,), dO = drawn(case)
    q, k, v, lr, delta, alpha = x["q"], x["k"], x["v"], x["lr"], x.get("delta"), x["log_decay"].exp()
    w, W, rho = weights(alpha, theta), gate.phi(A), gate.rho(A).item()
    gamma, b = w.gamma[1:].expand(C, 4), w.b[1:].expand(C, 4)
    M, Theta, QK = w.M[1:].expand(C, C, 4), w.Theta[1:], q @ k.T

    E = (k @ W.T if bias.reads_memory else 0) - v  # sections 2, 3 and 8
    G = bias.psi(E + v, v, delta) if bias.reads_memory else E
    U = lr * G
    own = b * (q @ S.T) - torch.einsum("tsv,ts,sv->tv", M, QK, U)
    results = {
        "out": gamma * (q @ W.T) + rho * own,
        "final_dual_0": gamma[-1, :, None] * A + b[-1, :, None] * S - (M[-1] * U).T @ k,
        "final_momentum_0": w.pi[-1] * S - (Theta[-1, :, None] * U).T @ k,
    }

    N = rho * torch.einsum("tsv,tv,sv->ts", M, dO, U)  # sections 6 and 8
    dU = -rho * torch.einsum("tsv,ts,tv->sv", M, QK, dO) - M[-1] * (k @ J.T) - Theta[-1, :, None] * (k @ Js.T)
    dE, dP, grad_delta = psi_vjp(bias, E, delta, lr * dU)
    dW = (gamma * dO).T @ q + dP.T @ k
    grads = {
        "grad_q": (gamma * dO) @ W + rho * (b * dO) @ S - N @ k,
        "grad_k": dP @ W - N.T @ q - (M[-1] * U) @ J - (Theta[-1, :, None] * U) @ Js,
        "grad_v": -dE,
        "grad_lr": dU * G if kind == "channel" else (dU * G).sum(-1),
        "grad_initial_dual_0": gamma[-1, :, None] * J + phi_vjp(gate, A, dW, (dO * own).sum()),
        "grad_initial_momentum_0": b[-1, :, None] * J + w.pi[-1] * Js + rho * (b * dO).T @ q,
    }

    gM, gb = -rho * torch.einsum("ts,tv,sv->tsv", QK, dO, U), rho * dO * (q @ S.T)  # section 7
    gM[-1] -= U * (k @ J.T)
    gb[-1] += (J * S).sum(-1)
    reads, inner = gamma * (q @ W.T) * dO, gamma[-1] * (J * A).sum(-1)
    if kind == "scalar":
        gM, gb, reads, inner = (part.sum(-1, keepdim=True) for part in (gM, gb, reads, inner))
        X, writes = -rho * w.M[1:, :, 0] * QK * (dO @ U.T), M[-1, :, 0] * (U * (k @ J.T)).sum(-1)
    gates = gate_gradients(w, alpha, theta, gM, gb, -(U * (k @ Js.T)).sum(-1), (Js * S).sum(), reads, inner)
    if kind == "scalar" and not momentum:
        assert relative_error(without_momentum(w, X, reads, writes, inner), gates["grad_log_decay"]) < EXACT
    assert_same(inputs, results | grads | grad_delta | gates)


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_blocks(size):
    """Section 13: a block of C tokens, some chunks of ``size`` and perhaps the beginning of one."""
    case = Case("blocks", key_dim=5, value_dim=4, seed=size, **{**TOKENS, "chunk_size": size})
    inputs, x, theta, (A,), _, (J,), _, dO = drawn(case)
    q, k, v, lr, alpha = x["q"], x["k"], x["v"], x["lr"], x["log_decay"].exp()
    w, b = weights(alpha, theta), [t // size * size for t in range(C)]  # b(t + 1): tokens count from 1
    gamma, L, r = w.gamma[1:], w.M[1:, :, 0], w.gamma[b]  # rows of the weights count from 0, the state before the block
    L_b = w.M[b, :, 0]

    G = L_b * (k @ k.T)
    E = torch.linalg.solve(torch.eye(C, dtype=A.dtype) + G * lr[:, 0], r * (k @ A.T) - v)
    U, P = lr * E, L * (q @ k.T)
    results = {"out": gamma * (q @ A.T) - P @ U, "final_dual_0": gamma[-1] * A - (L[-1, :, None] * U).T @ k}

    dU, y, dE = -P.T @ dO - L[-1, :, None] * (k @ J.T), torch.zeros_like(E), torch.zeros_like(E)
    for t in reversed(range(C)):
        y[t] = dU[t] - G[:, t] @ dE
        dE[t] = lr[t] * y[t]
    N, F = L * (dO @ U.T), L_b * (dE @ U.T)
    grads = {
        "grad_q": gamma * (dO @ A) - N @ k,
        "grad_k": r * (dE @ A) - (F + F.T) @ k - N.T @ q - L[-1, :, None] * (U @ J),
        "grad_v": -dE,
        "grad_lr": (y * E).sum(-1),
        "grad_initial_dual_0": gamma[-1] * J + (gamma * dO).T @ q + (r * dE).T @ k,
    }
    X, reads = -P * (dO @ U.T), (gamma * (q @ A.T) * dO).sum(-1, keepdim=True)
    for t in range(size, C):
        X[b[t] - 1] -= G[t] * (dE @ U.T)[t]
        reads[b[t] - 1] += (r * (k @ A.T) * dE)[t].sum()
    kept, inner = L[-1] * (U * (k @ J.T)).sum(-1), gamma[-1] * (J * A).sum()
    assert_same(inputs, results | grads | {"grad_log_decay": without_momentum(w, X, reads, kept, inner)})


def mean(x: Tensor) -> Tensor:
    return x.mean(-1, keepdim=True)


def norm(y: Tensor) -> tuple[Tensor, Tensor]:
    r = (mean((y - mean(y)) ** 2) + 1e-6).rsqrt()
    return r * (y - mean(y)), r


def norm_vjp(X: Tensor, r: Tensor, y: Tensor) -> Tensor:
    return r * (y - mean(y) - X * mean(y * X))


def gelu(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """gelu, gelu', gelu''."""
    a, c = 2 * (2 / torch.pi) ** 0.5, 0.044715
    s, y1, y2 = torch.sigmoid(a * (z + c * z**3)), a * (1 + 3 * c * z * z), 6 * a * c * z
    return z * s, s + z * y1 * s * (1 - s), s * (1 - s) * (2 * y1 + z * (y2 + (1 - 2 * s) * y1**2))


@pytest.mark.parametrize("i", range(len(PAIRS)), ids=NAMES)
def test_mlp(i):
    (bias, gate), momentum = PAIRS[i], i % 2 == 1
    case = Case("mlp", memory="mlp", bias=bias, retention=gate, momentum=momentum, key_dim=6, value_dim=6, hidden=5, seed=i, **TOKENS)
    inputs, x, theta, (A1, A2), (S1, S2), (J1, J2), (Js1, Js2), dO = drawn(case)
    q, k, v, lr, delta, alpha = x["q"], x["k"], x["v"], x["lr"], x.get("delta"), x["log_decay"].exp()
    ln_weight, ln_bias = (inputs.tensors[name].detach()[0] for name in ("ln_weight", "ln_bias"))
    w, W1, W2, rho1, rho2 = weights(alpha, theta), gate.phi(A1), gate.phi(A2), gate.rho(A1).item(), gate.rho(A2).item()
    gamma, b, M, pi = w.gamma[1:], w.b[1:], w.M[1:, :, 0], w.pi[-1]
    M_end, Theta_end = M[-1, :, None], w.Theta[-1, :, None]

    Z = k @ W2.T  # section 9
    H, slope, curve = gelu(Z)
    X, r = norm(H @ W1.T)
    E = (k + ln_weight * X + ln_bias if bias.reads_memory else 0) - v
    G = bias.psi(E + v, v, delta) if bias.reads_memory else E
    y = ln_weight * G
    G1 = norm_vjp(X, r, y)
    Gh = G1 @ W1
    G2 = Gh * slope
    U1, U2 = lr * G1, lr * G2
    own2 = b * (q @ S2.T) - (M * (q @ k.T)) @ U2
    Hq, slope_q, _ = gelu(gamma * (q @ W2.T) + rho2 * own2)
    own1 = b * (Hq @ S1.T) - (M * (Hq @ H.T)) @ U1
    Xq, rq = norm(gamma * (Hq @ W1.T) + rho1 * own1)
    results = {
        "out": q + ln_weight * Xq + ln_bias,
        "final_dual_0": gamma[-1] * A1 + b[-1] * S1 - (M_end * U1).T @ H,
        "final_dual_1": gamma[-1] * A2 + b[-1] * S2 - (M_end * U2).T @ k,
        "final_momentum_0": pi * S1 - (Theta_end * U1).T @ H,
        "final_momentum_1": pi * S2 - (Theta_end * U2).T @ k,
    }

    dYq = norm_vjp(Xq, rq, ln_weight * dO)  # section 10
    N1 = rho1 * M * (dYq @ U1.T)
    dZq = slope_q * (gamma * (dYq @ W1) + rho1 * b * (dYq @ S1) - N1 @ H)
    N2 = rho2 * M * (dZq @ U2.T)
    dU1 = -rho1 * (M * (Hq @ H.T)).T @ dYq - M_end * (H @ J1.T) - Theta_end * (H @ Js1.T)
    dU2 = -rho2 * (M * (q @ k.T)).T @ dZq - M_end * (k @ J2.T) - Theta_end * (k @ Js2.T)
    dG2 = lr * dU2
    dGh = slope * dG2
    dG1 = lr * dU1 + dGh @ W1.T
    dy = norm_vjp(X, r, dG1)
    dE, dP, grad_delta = psi_vjp(bias, E, delta, ln_weight * dy)
    dX = ln_weight * dP - r * (dG1 * mean(y * X) + y * mean(dG1 * X))
    dY = norm_vjp(X, r, dX) - r * X * mean(dG1 * G1)
    dZ = slope * (dY @ W1 - N1.T @ Hq - (M_end * U1) @ J1 - (Theta_end * U1) @ Js1) + curve * Gh * dG2
    dW1, dW2 = (gamma * dYq).T @ Hq + G1.T @ dGh + dY.T @ H, (gamma * dZq).T @ q + dZ.T @ k
    grads = {
        "grad_q": dO + gamma * (dZq @ W2) + rho2 * b * (dZq @ S2) - N2 @ k,
        "grad_k": dP + dZ @ W2 - N2.T @ q - (M_end * U2) @ J2 - (Theta_end * U2) @ Js2,
        "grad_v": -dE,
        "grad_lr": (dU1 * G1).sum(-1) + (dU2 * G2).sum(-1),
        "grad_ln_weight": (dO * Xq + dy * G + dP * X).sum(0),
        "grad_ln_bias": (dO + dP).sum(0),
        "grad_initial_dual_0": gamma[-1] * J1 + phi_vjp(gate, A1, dW1, (dYq * own1).sum()),
        "grad_initial_dual_1": gamma[-1] * J2 + phi_vjp(gate, A2, dW2, (dZq * own2).sum()),
        "grad_initial_momentum_0": b[-1] * J1 + pi * Js1 + rho1 * (b * dYq).T @ Hq,
        "grad_initial_momentum_1": b[-1] * J2 + pi * Js2 + rho2 * (b * dZq).T @ q,
    }

    total = lambda a, b, c, d: (a * b).sum(-1) + (c * d).sum(-1)
    gM = -(rho1 * (Hq @ H.T) * (dYq @ U1.T) + rho2 * (q @ k.T) * (dZq @ U2.T))
    gM[-1] -= total(U1, H @ J1.T, U2, k @ J2.T)
    gb = rho1 * (dYq * (Hq @ S1.T)).sum(-1) + rho2 * (dZq * (q @ S2.T)).sum(-1)
    gb[-1] += (J1 * S1).sum() + (J2 * S2).sum()
    gTheta, gpi = -total(U1, H @ Js1.T, U2, k @ Js2.T), (Js1 * S1).sum() + (Js2 * S2).sum()
    reads, inner = gamma[:, 0] * total(Hq @ W1.T, dYq, q @ W2.T, dZq), gamma[-1] * ((J1 * A1).sum() + (J2 * A2).sum())
    gates = gate_gradients(w, alpha, theta, gM[..., None], gb[:, None], gTheta, gpi, reads[:, None], inner)
    assert_same(inputs, results | grads | grad_delta | gates)
