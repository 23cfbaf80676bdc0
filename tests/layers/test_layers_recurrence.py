"""The block around the memory against written-out recurrences; its initialisation and its stability."""

from __future__ import annotations

import itertools
import math
import statistics

import pytest
import torch
from layers_tiny import MLP, NAMES, assert_close, block, tokens
from torch.nn import functional as F

import miras_kernels as mk
from miras_kernels import L2
from miras_kernels.layers import PRESETS, MemoryBlock, Preset
from miras_kernels.layers.functional import convolve, depthwise

# ------------------------------------------------------------------------------------------- against written-out loops


def recalled(matrices: tuple[torch.Tensor, torch.Tensor], module: MemoryBlock, head: int, x: torch.Tensor) -> torch.Tensor:
    """The MLP memory of one head, ``x + LN(W1 gelu(W2 x))``, from the formulas of gelu (tanh form) and LayerNorm."""
    z = matrices[1] @ x
    u = matrices[0] @ (z / 2 * (1 + torch.tanh((2 / math.pi) ** 0.5 * (z + 0.044715 * z**3))))
    centred = u - u.mean()
    return x + centred / (centred @ centred / len(u) + 1e-6).sqrt() * module.ln_weight[head] + module.ln_bias[head]


def descended(name: str, matrices, module: MemoryBlock, head: int, key, value, delta) -> tuple[torch.Tensor, ...]:
    """Gradients of an MLP memory's inner loss in its matrices.

    Yaad's loss has psi = delta tanh(10 e) beyond delta, Moneta's is |e|^3 with tanh(10 e) for the sign and a little more than |e|.
    """
    prediction = recalled(matrices, module, head, key)
    psi = error = prediction - value
    if name == "yaad" and error.norm() > delta:
        psi = delta * torch.tanh(10 * error)
    elif name == "moneta":
        psi = 3 * torch.tanh(10 * error) * (error**2 + 1e-6)
    return torch.autograd.grad(prediction, matrices, psi, create_graph=True)


def primal(name: str, dual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | float]:
    """``(phi(A), rho)``: Moneta's A / |A|_4^2 with a floor of 1 under the norm, Memora's softmax of every row."""
    if name == "moneta":
        scale = (1 + (dual**4).sum()) ** -0.5
        return scale * dual, scale
    if name == "memora":
        raised = dual.exp()
        return raised / raised.sum(-1, keepdim=True), 1.0
    return dual, 1.0


def written_out(module: MemoryBlock, x: torch.Tensor) -> torch.Tensor:
    """The block token by token and head by head, from its parameters, sharing no code with it. One sequence ``[T, D]``."""
    h, d, name = module.num_heads, module.head_dim, next(n for n in NAMES if PRESETS[n].source == module.preset.source)
    stream = torch.cat([p(x) for p in (module.q_proj, module.k_proj, module.v_proj)], -1)
    raw = None
    if module.gate_up is not None:
        raw = (x @ module.gate_down.T @ module.gate_up.T + module.gate_bias).reshape(len(x), -1, h)  # [T, gates, H]
    state = [torch.zeros(d, d, dtype=x.dtype) for _ in range(h)]
    if name in MLP:
        state = [(module.w1[i], module.w2[i]) for i in range(h)]
        momenta = [(0.0, 0.0)] * h
    started, written, passed = list(state), [(0.0, 0.0)] * h, [1.0] * h
    outputs = []
    for t in range(len(x)):
        mixed = sum(module.conv_weight[:, 3 - j] * stream[t - j] for j in range(4) if t >= j)
        q, k, v = (mixed * torch.sigmoid(mixed)).reshape(3, h, d)
        heads = []
        for i in range(h):
            if t % module.preset.chunk_size == 0:
                started[i], written[i], passed[i] = state[i], (0.0, 0.0), 1.0
            unit = lambda y: y / (y @ y + 1e-6).sqrt()
            key, error = unit(k[i]), None if name in MLP else started[i] @ unit(k[i]) - v[i]
            bounded = 1 / (1 + torch.exp(-raw[t, 0, i])) / module.preset.chunk_size if module.preset.lr == "bounded" else None
            bounded = bounded / 8 if name in ("moneta", "memora") else bounded
            if name == "linear_attention":
                decay, write = 1.0, v[i]
            elif name == "retnet":
                decay, write = 1 - 2.0 ** (-5 - i), v[i]
            elif name == "mamba2":
                dt = torch.log(1 + torch.exp(raw[t, 0, i]))
                decay, write = torch.exp(-dt * torch.exp(module.decay_rate[i])), dt * v[i]
            elif name in MLP:
                decay = 1.0 if name == "ttt_mlp" else 1 / (1 + torch.exp(raw[t, 1, i]))
                delta = torch.log(1 + torch.exp(raw[t, 2, i])) if name == "yaad" else None
                starts, scales = zip(*(primal(name, a) for a in started[i]), strict=True)
                steps = [-bounded * g for g in descended(name, starts, module, i, key, v[i], delta)]
                if name == "titans":
                    theta = 0.999 / (1 + torch.exp(-raw[t, 2, i]))
                    steps = [theta * s + (1 - theta) * step for s, step in zip(momenta[i], steps, strict=True)]
                    momenta[i] = tuple(steps)
                written[i] = tuple(decay * x + step for x, step in zip(written[i], steps, strict=True))
                state[i] = tuple(decay * a + step for a, step in zip(state[i], steps, strict=True))
                passed[i] = decay * passed[i]
                read = [passed[i] * w + scale * x for w, scale, x in zip(starts, scales, written[i], strict=True)]
                o = recalled(read, module, i, unit(q[i]))
                heads.append(o / (o @ o / d + module.norm_eps).sqrt() * module.norm_weight)
                continue
            elif name in ("gated_deltanet", "kda"):  # S <- S diag(alpha), then S <- S + beta (v - S k) k'
                slow = raw[t, 1, i] if name == "gated_deltanet" else raw[t].flatten()[h + i * d : h + (i + 1) * d]  # a head, or its keys
                decay = torch.exp(-torch.exp(module.decay_rate[i]) * torch.log(1 + torch.exp(slow)))
                write = bounded * (v[i] - (decay * state[i]) @ key)
            elif name in ("deltanet", "ttt_linear"):
                decay, write = 1.0, -bounded * error
            else:
                decay = 1 / (1 + torch.exp(raw[t, 1, i]))  # exp(-softplus)
                if name == "l2":
                    write = -bounded * error
                else:
                    delta = torch.log(1 + torch.exp(raw[t, 2, i]))
                    clipped = error.clamp(-delta, delta)
                    switched = error if error.norm() <= delta else delta * torch.tanh(10 * error)
                    write = -bounded * (clipped if name == "huber" else switched)
            state[i] = decay * state[i] + torch.outer(write, key)
            o = state[i] @ unit(q[i])
            scale = module.preset.chunk_size if bounded is not None else 1
            heads.append(o / (o @ o / d + module.norm_eps / scale**2).sqrt() * module.norm_weight)
        gate = module.g_proj(x[t])
        outputs.append(module.o_proj(torch.cat(heads) * gate * torch.sigmoid(gate)))
    return torch.stack(outputs)


@pytest.mark.parametrize("name", NAMES)
def test_a_block_equals_the_written_out_recurrence(name):
    module, x, weight = block(name), tokens(1, 11), tokens(1, 11, seed=3)[0]
    names, values = zip(*module.named_parameters(), strict=True)
    fused, expected = module(x)[0][0], written_out(module, x[0])
    assert_close(fused, expected)
    grads, expected_grads = (torch.autograd.grad((out * weight).sum(), values) for out in (fused, expected))
    for n, grad, expected_grad in zip(names, grads, expected_grads, strict=True):
        assert expected_grad.abs().max() > 0, n
        assert_close(grad, expected_grad)


@pytest.mark.parametrize("name", NAMES)
def test_every_preset_runs_on_kernels(name, monkeypatch):
    """In the sizes of real layers, with gradients: C++ kernels on a CPU, Triton kernels on a GPU, at the paper's chunk sizes."""
    asked = {}

    def explained(memory, q, *rest, **arguments):
        tokens = [x.detach() for x in (q, *rest)]
        asked.update(mk.explain(tokens[0].requires_grad_(), *tokens[1:], **{n: x for n, x in arguments.items() if n != "backend"}))
        return memory(q, *rest, **arguments)

    for memory in ("linear_memory", "mlp_memory"):
        run = getattr(mk, memory)
        monkeypatch.setattr(f"miras_kernels.layers.block.{memory}", lambda *args, run=run, **kwargs: explained(run, *args, **kwargs))
    MemoryBlock(128, 2, preset=name)(torch.randn(1, 3, 128))
    assert asked["cpp"] is None and asked["triton"] is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("batch", "tokens", "channels", "taps", "zeros"),  # the second and third: several stretches
    [(2, 9, 5, 4, 3), (1, 150, 4096, 4, 3), (2, 70, 3072, 4, 0), (1, 2, 4, 4, 3), (1, 5, 3, 1, 0)],
)
def test_the_convolution_and_its_gradients(batch, tokens, channels, taps, zeros, dtype):
    """They are those of ``conv1d`` in float64; in bfloat16 PyTorch may round after every tap, and sums over tokens are in float32."""
    torch.manual_seed(0)
    shapes = (batch, tokens, channels), (channels, taps), (batch, tokens + zeros - taps + 1, channels)
    x, weight, grad = (torch.randn(shape, dtype=dtype) for shape in shapes)

    def results(function, x, weight, grad):
        out = function(x.requires_grad_(), weight.requires_grad_())
        return out, *torch.autograd.grad(out, (x, weight), grad)

    exact = results(
        lambda x, weight: F.conv1d(F.pad(x, (0, 0, zeros, 0)).transpose(1, 2), weight[:, None], groups=channels).transpose(1, 2),
        *(each.double() for each in (x, weight, grad)),
    )
    found = results(lambda *given: depthwise(*given, zeros), x, weight, grad)
    for roundings, ours, wanted in zip((taps, taps, 1), found, exact, strict=True):
        budget = roundings * torch.finfo(dtype).eps / 2 + 1e-5 if dtype == torch.bfloat16 else 1e-14
        assert ours.dtype == dtype and (ours - wanted).norm() <= budget * wanted.norm()


def projected(module: MemoryBlock, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """q, k and v ``[B, T, H, D]`` of a block, q and k of norm 1."""
    mixed = convolve(torch.cat([p(x) for p in (module.q_proj, module.k_proj, module.v_proj)], -1), module.conv_weight, None, None)[0]
    q, k, v = F.silu(mixed).unflatten(-1, (3, module.num_heads, module.head_dim)).unbind(2)
    return F.normalize(q, dim=-1), F.normalize(k, dim=-1), v


@pytest.mark.parametrize(("name", "size", "init_std"), [("yaad_linear", 128, 0.02), ("yaad", 128, 0.02), ("yaad", 96, 0.1)])
def test_both_branches_of_huber_are_used_after_initialisation(name, size, init_std):
    torch.manual_seed(0)
    module = MemoryBlock(size, 4, preset=name, init_std=init_std)
    x = F.rms_norm(torch.randn(2, 64, size), (size,))
    _, k, v = projected(module, x)
    predicted = torch.zeros(())
    if name == "yaad":
        rows = lambda keys, head: torch.stack([recalled((module.w1[head], module.w2[head]), module, head, key) for key in keys])
        predicted = torch.stack([rows(k[:, :, i].flatten(0, 1), i).unflatten(0, (2, 64)) for i in range(4)], 2)
    outside = ((predicted - v).norm(dim=-1) > module.gates(x)["delta"]).float().mean()
    assert 0.05 < outside < 0.95


def test_initial_decay_spans_are_10_to_1000_tokens():
    module = MemoryBlock(64, 4, preset="l2", dtype=torch.float64, init_std=0.0)
    log_decay = module.gates(torch.zeros(1, 1, 64, dtype=torch.float64))["log_decay"][0, 0]
    assert_close(-1 / log_decay, torch.tensor([10, 10 ** (5 / 3), 10 ** (7 / 3), 1000], dtype=torch.float64))


def test_initial_decay_spans_of_an_mlp_memory_start_at_hidden_size_times_chunk_size():
    module = MemoryBlock(24, 3, preset="l2_mlp", dtype=torch.float64, init_std=0.0)
    log_decay = module.gates(torch.zeros(1, 1, 24, dtype=torch.float64))["log_decay"][0, 0]
    assert_close(-1 / log_decay, 16 * 32 * torch.tensor([1, 10, 100], dtype=torch.float64))


# ----------------------------------------------------------------------------------------------------------- stability


def open_gates(module: MemoryBlock) -> None:
    """Set the gates to the largest step size and no decay for every token."""
    start = {"lr": 50.0, "log_decay": -50.0, "delta": 50.0, "momentum": 0.0}
    with torch.no_grad():
        module.gate_down.zero_()
        module.gate_bias.copy_(torch.tensor([start[n] for n in module.preset.token_gates]).repeat_interleave(module.num_heads))


@pytest.mark.parametrize("name", ["yaad_linear", "huber", "l2", "ttt_linear", "deltanet"])
@pytest.mark.parametrize("delta", [50.0, -2.0])
def test_the_state_stays_bounded_with_repeated_keys(name, delta):
    module = block(name, torch.float32, chunk_size=1 if name == "deltanet" else 16)
    open_gates(module)
    if module.preset.bias.needs_delta:
        with torch.no_grad():
            module.gate_bias[-module.num_heads :] = delta
    few = 3 * tokens(1, 2, torch.float32)
    x = few[:, torch.arange(512) // 64 % 2]  # 64 equal tokens, then 64 others, and so on
    v = F.silu(convolve(torch.cat([p(x) for p in (module.q_proj, module.k_proj, module.v_proj)], -1), module.conv_weight, None, None)[0])
    largest = v.chunk(3, -1)[2].unflatten(-1, (3, 8)).norm(dim=-1).amax().item()
    _, state = module(x, output_final_state=True)
    # Two keys k1, k2: what is stored solves for them, at most |v| (|k1| + |k2|) / sin(k1, k2); Huber may overshoot by one step.
    k = v.chunk(3, -1)[1].unflatten(-1, (3, 8))
    k1, k2 = F.normalize(k[0, 63], dim=-1), F.normalize(k[0, 127], dim=-1)
    sine = (1 - (k1 * k2).sum(-1) ** 2).sqrt().amin().item()
    assert state.memory.dual[0].flatten(1).norm(dim=1).amax() <= 3**0.5 * (2 * largest / sine + 1)


def test_without_the_bound_on_lr_the_state_diverges():
    """The block's parametrisation prevents this: 16 equal keys with step size 1 multiply the error by -15."""
    loose = block(Preset(L2(), "one", None, 16, ""), torch.float32)
    x = tokens(1, 1, torch.float32).expand(1, 256, -1)
    _, state = loose(x, output_final_state=True)
    assert not state.memory.dual[0].norm() < 1e6


def test_lr_never_exceeds_one_over_the_chunk_size():
    for name in ("yaad", "ttt_mlp", "yaad_linear", "ttt_linear", "deltanet"):
        module = block(name)
        assert (module.gates(1e3 * tokens(2, 50))["lr"] <= 1 / module.preset.chunk_size).all()
        assert "log_decay" not in module.gates(tokens(1, 2)) or (module.gates(1e3 * tokens(2, 50))["log_decay"] <= 0).all()


@pytest.mark.parametrize(("size", "heads", "head_dim", "init_std"), [(128, 4, 32, 0.02), (96, 3, 32, 0.1), (768, 1, 64, 0.02)])
def test_the_first_steps_of_an_mlp_memory_are_stable(size, heads, head_dim, init_std):
    """A chunk of equal keys with the largest step sizes multiplies the error by 1 - J J', J the Jacobian of the prediction in W1 and W2."""
    torch.manual_seed(0)
    module = MemoryBlock(size, heads, head_dim, preset="ttt_mlp", init_std=init_std, dtype=torch.float64)
    x = F.rms_norm(torch.randn(1, 4, size, dtype=torch.float64), (size,))
    k, share = projected(module, x)[1][0], 16 * module.gates(x)["lr"].max().item()  # share of the largest step size
    largest = []
    for i, key in itertools.product(range(heads), k):
        predict = lambda w1, w2, i=i, key=key: recalled((w1, w2), module, i, key[i])
        jacobian = torch.cat([x.flatten(1) for x in torch.func.jacrev(predict, (0, 1))(module.w1[i], module.w2[i])], 1)
        largest.append(torch.linalg.matrix_norm(jacobian, 2).square().item())
    assert 0.5 < statistics.median(largest) < 2
    assert share * max(largest) < 2


@pytest.mark.parametrize(("name", "delta"), [("l2_mlp", None), ("ttt_mlp", None), ("titans", None), ("yaad", 50.0), ("yaad", -2.0)])
def test_an_mlp_memory_learns_repeated_keys_with_the_largest_steps(name, delta):
    """64 chunks with 2 keys: the remaining error is due to LN's fixed norm and zero mean; a small delta takes longer."""
    module = block(name, torch.float32, chunk_size=16)
    open_gates(module)
    if delta is not None:
        with torch.no_grad():
            module.gate_bias[-3:] = delta
    x = (3 * tokens(1, 2, torch.float32))[:, torch.arange(1024) // 8 % 2]
    _, k, v = projected(module, x)
    _, state = module(x, output_final_state=True)
    assert all(torch.isfinite(dual).all() for dual in state.memory.dual)
    for i, t in itertools.product(range(3), (1015, 1023)):
        error = lambda w1, w2, i=i, t=t: (recalled((w1, w2), module, i, k[0, t, i]) - v[0, t, i]).norm()
        wanted = v[0, t, i] - k[0, t, i]
        centred = (wanted - wanted.mean()).norm()
        least = ((wanted.norm() ** 2 - centred**2) + (centred - 8**0.5 * module.ln_weight[i, 0]) ** 2).sqrt()
        first, last = error(module.w1[i], module.w2[i]), error(*(dual[0, i] for dual in state.memory.dual))
        assert last < (first if delta == -2 else least + 0.1 * (first - least))


@pytest.mark.parametrize("name", ["l2_mlp", "titans", "memora", "moneta"])
def test_gradients_through_an_mlp_memory_do_not_grow_with_the_distance(name):
    """With the initial decays of an MLP memory; with those of a linear memory they do grow."""
    torch.manual_seed(0)
    module = MemoryBlock(32, 2, preset=name)
    x = F.rms_norm(torch.randn(4, 32)[torch.randint(4, (1, 1024))] + 0.3 * torch.randn(1, 1024, 32), (32,)).requires_grad_()

    def reached() -> torch.Tensor:
        """``[T]``, the norm of the last output's gradient with respect to every token."""
        return torch.autograd.grad(module(x)[0][0, -1].norm(), x)[0][0].norm(dim=-1)

    grad = reached()
    assert grad[:-64].max() < grad[-1]
    if name != "l2_mlp":
        return
    with torch.no_grad():
        module.gate_bias[2:] = math.log(math.expm1(1 / 30))
    grad = reached()
    assert not grad[:-64].max() < 100 * grad[-1]
