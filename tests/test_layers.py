"""The block around the memory: causality, padding, packing, cutting, written-out recurrences, stability, errors."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from miras_kernels import L2, Huber, KLRetention
from miras_kernels.layers import PRESETS, BlockState, MemoryBlock, Preset

NAMES = sorted(PRESETS)
SIZES = {"hidden_size": 24, "num_heads": 3, "head_dim": 8, "init_std": 0.3}


def block(preset="yaad", dtype=torch.float64, seed=0, **options) -> MemoryBlock:
    """A small block; a large init_std, so that gates differ from token to token. Chunks of 4 unless the preset says 1."""
    torch.manual_seed(seed)
    if isinstance(preset, str) and PRESETS[preset].chunk_size > 1:
        options.setdefault("chunk_size", 4)
    return MemoryBlock(**{**SIZES, **options}, preset=preset, dtype=dtype)


def tokens(batch: int, length: int, dtype=torch.float64, seed=1) -> torch.Tensor:
    return torch.randn(batch, length, SIZES["hidden_size"], generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def assert_close(x: torch.Tensor, y: torch.Tensor, terms: int = 1024):
    """Equal up to the order of summation: about ``terms`` roundings that add up like a random walk, with a margin of 8."""
    x, y = x.detach(), y.detach()
    assert x.shape == y.shape and x.dtype == y.dtype
    assert torch.isfinite(x).all()
    bound = 8 * math.sqrt(terms) * torch.finfo(x.dtype).eps * max(y.norm().item(), torch.finfo(x.dtype).tiny)
    error = (x - y).norm().item()
    assert error <= bound, f"{error:.2e} > {bound:.2e}"


# ------------------------------------------------------------------------------------------------------- who sees whom


@pytest.mark.parametrize("name", NAMES)
def test_no_output_depends_on_a_later_token(name):
    module, x, t = block(name), tokens(2, 13), 6
    changed = x.clone()
    changed[:, t:] = 100 * tokens(2, 13, seed=2)[:, t:]
    before, after = module(x)[0], module(changed)[0]
    assert_close(after[:, :t], before[:, :t])
    assert ((after - before)[:, t:].abs().amax(-1) > 1e-3).all()


@pytest.mark.parametrize("name", NAMES)
def test_no_sample_depends_on_another(name):
    module, x = block(name), tokens(3, 11)
    together = module(x)[0]
    for i in range(3):
        assert_close(module(x[i : i + 1])[0][0], together[i])


def test_every_token_reaches_the_end():
    x = tokens(1, 13).requires_grad_()
    module = block("linear_attention")
    (grad,) = torch.autograd.grad(module(x)[0][0, -1].sum(), x)
    assert (grad.abs().amax(-1) > 0).all()


# ------------------------------------------------------------------------------------------------------------- padding

ROWS = {  # what is real in rows of 12 tokens
    "left": ([0] * 5 + [1] * 7, [0] * 1 + [1] * 11, [1] * 12),
    "right": ([1] * 7 + [0] * 5, [1] * 2 + [0] * 10, [1] * 12),
    "mixed": ([0] * 3 + [1] * 6 + [0] * 3, [1] * 9 + [0] * 3, [0] * 4 + [1] * 8),
    "holes": ([1, 0, 1, 1, 0, 0, 1, 1, 1, 0, 1, 1], [0, 1] * 6, [1] * 12),
    "empty row": ([0] * 12, [1] * 12, [0] * 6 + [1] * 6),
}


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", ["yaad", "deltanet", "mamba2"])
def test_padding_is_exact_whatever_it_holds(name, rows):
    module = block(name)
    mask, weight = torch.tensor(ROWS[rows]), tokens(3, 12, seed=3)
    x = tokens(3, 12).masked_fill(mask[..., None] == 0, math.nan).requires_grad_()
    out, state = module(x, mask)
    assert state is None
    (out * weight).sum().backward()
    padded = {n: p.grad.clone() for n, p in module.named_parameters()}
    module.zero_grad()
    assert (out[mask == 0] == 0).all()
    assert (x.grad[mask == 0] == 0).all()
    for i in range(3):
        real = mask[i] == 1
        if not real.any():
            continue
        alone = x.detach()[i : i + 1, real].requires_grad_()
        expected = module(alone)[0]
        assert_close(out[i : i + 1, real], expected)
        (expected * weight[i, real]).sum().backward()
        assert_close(x.grad[i : i + 1, real], alone.grad)
    for n, p in module.named_parameters():
        assert_close(padded[n], p.grad)


def test_padded_outputs_are_zero_even_where_a_projection_has_a_bias():
    module, mask = block(), torch.tensor(ROWS["mixed"])
    module.o_proj.bias = torch.nn.Parameter(torch.ones(SIZES["hidden_size"], dtype=torch.float64))
    out, _ = module(tokens(3, 12), mask)
    assert (out[mask == 0] == 0).all()
    assert (out[mask == 1] != 0).all()


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_a_mask_of_ones_changes_nothing(dtype):
    module, x = block(dtype=torch.float32), tokens(2, 9, torch.float32)
    assert torch.equal(module(x, torch.ones(2, 9, dtype=dtype))[0], module(x)[0])


@pytest.mark.parametrize("rows", ["left", "right", "mixed", "holes"])
def test_the_state_after_padding_is_that_of_the_real_tokens(rows):
    module, x, mask = block(), tokens(3, 12), torch.tensor(ROWS[rows])
    more = tokens(3, 7, seed=4)
    out, state = module(x, mask, output_final_state=True)
    assert_close(out, module(x, mask)[0])
    continued, _ = module(more, initial_state=state)
    for i in range(3):
        real = x[i : i + 1, mask[i] == 1]
        assert_close(continued[i : i + 1], module(torch.cat([real, more[i : i + 1]], 1))[0][:, real.shape[1] :])


# ------------------------------------------------------------------------------------------------- packing and cutting


@pytest.mark.parametrize("name", ["yaad", "deltanet", "retnet"])
def test_packed_sequences_equal_a_loop(name):
    module, lengths = block(name), (1, 2, 3, 9, 4)
    x, weight = tokens(1, sum(lengths)).requires_grad_(), tokens(1, sum(lengths), seed=3)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    out, state = module(x, cu_seqlens=offsets, output_final_state=True)
    (grad,) = torch.autograd.grad((out * weight).sum(), x)
    for i, (a, b) in enumerate(itertools.pairwise(offsets)):
        alone = x.detach()[:, a:b].requires_grad_()
        expected, expected_state = module(alone, output_final_state=True)
        (expected_grad,) = torch.autograd.grad((expected * weight[:, a:b]).sum(), alone)
        assert_close(out[:, a:b], expected)
        assert_close(grad[:, a:b], expected_grad)
        assert_close(state.memory.dual[0][i], expected_state.memory.dual[0][0])
        assert_close(state.conv[i], expected_state.conv[0])
    # each goes on from its own state
    more = tokens(1, 2 * len(lengths), seed=4)
    continued, _ = module(more, cu_seqlens=torch.arange(0, 2 * len(lengths) + 1, 2), initial_state=state)
    for i, (a, b) in enumerate(itertools.pairwise(offsets)):
        whole = module(torch.cat([x[:, a:b], more[:, 2 * i : 2 * i + 2]], 1))[0]
        assert_close(continued[:, 2 * i : 2 * i + 2], whole[:, b - a :])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("pieces", [(13,) + (1,) * 5, (1, 2, 5, 10), (4, 8, 6)])
def test_a_sequence_may_be_cut_anywhere(name, pieces):
    module, x = block(name), tokens(2, sum(pieces))
    whole, final = module(x, output_final_state=True)
    outputs, state = [], None
    for piece in x.split(pieces, 1):
        out, state = module(piece, initial_state=state, output_final_state=True)
        outputs.append(out)
    assert_close(torch.cat(outputs, 1), whole)
    assert_close(state.memory.dual[0], final.memory.dual[0])
    assert_close(state.conv, final.conv)


def test_gradients_pass_a_cut_between_chunks():
    module, x, weight = block(dtype=torch.float32), tokens(2, 20, torch.float32), tokens(2, 20, torch.float32, seed=3)
    (module(x)[0] * weight).sum().backward()
    whole = {n: p.grad.clone() for n, p in module.named_parameters()}
    module.zero_grad()
    first, state = module(x[:, :8], output_final_state=True)
    second, _ = module(x[:, 8:], initial_state=state)
    (torch.cat([first, second], 1) * weight).sum().backward()
    for n, p in module.named_parameters():
        assert_close(p.grad, whole[n])
    assert all(not t.requires_grad for t in (*state.detach().memory.tensors(), state.detach().conv))


@pytest.mark.parametrize(("batch", "length"), [(0, 5), (2, 0)])
def test_nothing_to_read(batch, length):
    module = block()
    out, state = module(tokens(batch, length), output_final_state=True)
    assert out.shape == (batch, length, SIZES["hidden_size"])
    assert isinstance(state, BlockState)
    assert state.memory.dual[0].shape == (batch, 3, 8, 8)


# ------------------------------------------------------------------------------------------- against written-out loops


def written_out(module: MemoryBlock, x: torch.Tensor) -> torch.Tensor:
    """The block token by token and head by head, from its parameters, sharing no code with it. One sequence ``[T, D]``."""
    h, d, name = module.num_heads, module.head_dim, next(n for n in NAMES if PRESETS[n].source == module.preset.source)
    stream = torch.cat([p(x) for p in (module.q_proj, module.k_proj, module.v_proj)], -1)
    raw = None
    if module.gate_up is not None:
        raw = (x @ module.gate_down.T @ module.gate_up.T + module.gate_bias).reshape(len(x), -1, h)  # [T, gates, H]
    state = [torch.zeros(d, d, dtype=x.dtype) for _ in range(h)]
    started = list(state)
    outputs = []
    for t in range(len(x)):
        mixed = sum(module.conv_weight[:, 3 - j] * stream[t - j] for j in range(4) if t >= j)
        q, k, v = (mixed * torch.sigmoid(mixed)).reshape(3, h, d)
        heads = []
        for i in range(h):
            if t % module.preset.chunk_size == 0:
                started[i] = state[i]
            unit = lambda y: y / (y @ y + 1e-6).sqrt()
            key, error = unit(k[i]), started[i] @ unit(k[i]) - v[i]
            bounded = 1 / (1 + torch.exp(-raw[t, 0, i])) / module.preset.chunk_size if module.preset.lr == "bounded" else None
            if name == "linear_attention":
                decay, write = 1.0, v[i]
            elif name == "retnet":
                decay, write = 1 - 2.0 ** (-5 - i), v[i]
            elif name == "mamba2":
                dt = torch.log(1 + torch.exp(raw[t, 0, i]))
                decay, write = torch.exp(-dt * torch.exp(module.decay_rate[i])), dt * v[i]
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
    module, x = block(name), tokens(1, 11)
    assert_close(module(x)[0][0], written_out(module, x[0]))


def test_both_branches_of_huber_are_in_use_at_the_start():
    torch.manual_seed(0)
    module = MemoryBlock(128, 4, preset="yaad")
    x = F.rms_norm(torch.randn(2, 64, 128), (128,))
    v = module._convolve(torch.cat([p(x) for p in (module.q_proj, module.k_proj, module.v_proj)], -1), None, None)[0].chunk(3, -1)[2]
    outside = (F.silu(v).unflatten(-1, (4, 32)).norm(dim=-1) > module.gates(x)["delta"]).float().mean()
    assert 0.05 < outside < 0.95


def test_heads_forget_over_spans_between_10_and_1000_tokens_at_the_start():
    module = MemoryBlock(64, 4, preset="l2", dtype=torch.float64, init_std=0.0)
    log_decay = module.gates(torch.zeros(1, 1, 64, dtype=torch.float64))["log_decay"][0, 0]
    assert_close(-1 / log_decay, torch.tensor([10, 10 ** (5 / 3), 10 ** (7 / 3), 1000], dtype=torch.float64))


# ----------------------------------------------------------------------------------------------------------- stability


def open_gates(module: MemoryBlock) -> None:
    """The largest step and no forgetting, whatever the token."""
    start = {"lr": 50.0, "log_decay": -50.0, "delta": 50.0}
    with torch.no_grad():
        module.gate_down.zero_()
        module.gate_bias.copy_(torch.tensor([start[n] for n in module.preset.token_gates]).repeat_interleave(module.num_heads))


@pytest.mark.parametrize("name", ["yaad", "huber", "l2", "ttt_linear", "deltanet"])
@pytest.mark.parametrize("delta", [50.0, -2.0])
def test_the_state_stays_bounded_while_keys_repeat(name, delta):
    module = block(name, torch.float32, chunk_size=1 if name == "deltanet" else 16)
    open_gates(module)
    if module.preset.bias.needs_delta:
        with torch.no_grad():
            module.gate_bias[-module.num_heads :] = delta
    few = 3 * tokens(1, 2, torch.float32)
    x = few[:, torch.arange(512) // 64 % 2]  # 64 equal tokens, then 64 others, and so on
    v = F.silu(module._convolve(torch.cat([p(x) for p in (module.q_proj, module.k_proj, module.v_proj)], -1), None, None)[0])
    largest = v.chunk(3, -1)[2].unflatten(-1, (3, 8)).norm(dim=-1).amax().item()
    _, state = module(x, output_final_state=True)
    # Two keys k1, k2: what is stored solves for them, at most |v| (|k1| + |k2|) / sin(k1, k2); Huber may overshoot by one step.
    k = v.chunk(3, -1)[1].unflatten(-1, (3, 8))
    k1, k2 = F.normalize(k[0, 63], dim=-1), F.normalize(k[0, 127], dim=-1)
    sine = (1 - (k1 * k2).sum(-1) ** 2).sqrt().amin().item()
    assert state.memory.dual[0].flatten(1).norm(dim=1).amax() <= 3**0.5 * (2 * largest / sine + 1)


def test_without_the_bound_on_lr_the_state_blows_up():
    """What the block's parametrisation prevents: 16 equal keys, each with a step of 1, multiply the error by -15."""
    loose = block(Preset(L2(), "one", None, 16, ""), torch.float32)
    x = tokens(1, 1, torch.float32).expand(1, 256, -1)
    _, state = loose(x, output_final_state=True)
    assert not state.memory.dual[0].norm() < 1e6


def test_lr_never_exceeds_one_over_the_chunk_size():
    for name in ("yaad", "ttt_linear", "deltanet"):
        module = block(name)
        assert (module.gates(1e3 * tokens(2, 50))["lr"] <= 1 / module.preset.chunk_size).all()
        assert "log_decay" not in module.gates(tokens(1, 2)) or (module.gates(1e3 * tokens(2, 50))["log_decay"] <= 0).all()


# --------------------------------------------------------------------------------------------- gradients, dtypes, tools


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_reach_every_parameter(name, dtype):
    module, x = block(name, dtype), tokens(2, 21, dtype).requires_grad_()
    out, _ = module(x)
    assert out.dtype == dtype
    (out.float() * tokens(2, 21, torch.float32, seed=3)).sum().backward()
    for n, t in [*module.named_parameters(), ("x", x)]:
        assert t.grad is not None, n
        assert torch.isfinite(t.grad).all(), n
        assert t.grad.abs().max() > 0, n


@pytest.mark.parametrize("name", ["yaad", "mamba2"])
def test_gradcheck(name):
    torch.manual_seed(0)
    module = MemoryBlock(3, 1, 2, preset=name, chunk_size=2, gate_rank=2, init_std=0.7, dtype=torch.float64)
    names, values = zip(*module.named_parameters(), strict=True)
    x = torch.randn(1, 5, 3, dtype=torch.float64, requires_grad=True)
    run = lambda x, *p: torch.func.functional_call(module, dict(zip(names, p, strict=True)), (x,))[0]
    assert torch.autograd.gradcheck(run, (x, *values))


def test_gates_are_float32_under_autocast():
    module, x = block(dtype=torch.float32), tokens(2, 21, torch.float32)
    plain = module.gates(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast, out = module.gates(x), module(x)[0]
    assert out.dtype == torch.bfloat16
    for n, gate in plain.items():
        assert cast[n].dtype == torch.float32
        assert torch.equal(cast[n], gate)
    exact = module(x)[0]
    # Roundings to 8 bits on the way: projections, convolution, silu, normalised q and k, memory, two products at the end.
    assert (out.float() - exact).norm() <= 8 * 2**-8 * exact.norm()


@pytest.mark.parametrize("padded", [False, True])
def test_torch_compile_in_one_graph(padded):
    module, x = block(dtype=torch.float32), tokens(2, 12, torch.float32)
    mask = torch.tensor(ROWS["mixed"][:2]) if padded else None
    compiled = torch.compile(copy.deepcopy(module), fullgraph=True, backend="aot_eager")
    for run in (module, compiled):
        run(x, mask)[0].square().sum().backward()
    assert_close(compiled(x, mask)[0], module(x, mask)[0])
    for (n, p), q in zip(module.named_parameters(), compiled.parameters(), strict=True):
        assert q.grad.abs().max() > 0, n
        assert_close(q.grad, p.grad)


def test_initialisation_follows_the_seed():
    a, b, c = block(seed=3), block(seed=3), block(seed=4)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.q_proj.weight, c.q_proj.weight)


def test_a_preset_of_ones_own():
    row = dataclasses.replace(PRESETS["l2"], retention=KLRetention(), chunk_size=4)
    module, x = block(row), tokens(1, 9)
    assert (module(x)[0] - block("l2")(x)[0]).abs().max() > 1e-3


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("make", "kind", "text"),
    [
        (lambda: MemoryBlock(8, 2, preset="moneta"), ValueError, r"preset: expected one of 'yaad', .*'mamba2', got 'moneta'"),
        (lambda: MemoryBlock(8, 2, preset=L2()), TypeError, "preset: expected a name or a Preset, got L2"),
        (lambda: MemoryBlock(8, 3), ValueError, r"num_heads: expected a divisor of hidden_size = 8 \(or a head_dim\), got 3"),
        (lambda: MemoryBlock(8, 0), ValueError, "num_heads: expected an integer >= 1, got 0"),
        (lambda: MemoryBlock(8.0, 2), ValueError, r"hidden_size: expected an integer >= 1, got 8\.0"),
        (lambda: MemoryBlock(8, 2, 0), ValueError, "head_dim: expected an integer >= 1, got 0"),
        (lambda: MemoryBlock(8, 2, gate_rank=0), ValueError, "gate_rank: expected an integer >= 1, got 0"),
        (lambda: MemoryBlock(8, 2, conv_width=0), ValueError, "conv_width: expected an integer >= 1, got 0"),
        (lambda: MemoryBlock(8, 2, chunk_size=0), ValueError, "chunk_size: expected an integer >= 1, got 0"),
        (lambda: MemoryBlock(8, 2, chunk_size=1.5), TypeError, "chunk_size: expected an integer >= 1, got float"),
        (lambda: Preset(L2(), "one", None, 4, "", memory="mlp"), ValueError, "memory: expected one of 'linear', got 'mlp'"),
        (lambda: Preset(L2(), "one", None, 4, "", momentum=True), ValueError, "momentum: expected one of False, got True"),
        (lambda: Preset(Huber(), "fast", None, 4, ""), ValueError, "lr: expected one of 'bounded', 'one', 'dt', got 'fast'"),
        (lambda: Preset(L2(), "one", "dt", 4, ""), ValueError, "decay: 'dt' needs lr='dt', got lr='one'"),
        (lambda: block()(tokens(1, 5)[0]), ValueError, r"hidden_states: expected shape \[B, T, D\] with D = 24, got \(5, 24\)"),
        (lambda: block()(tokens(1, 5)[..., :3]), ValueError, r"hidden_states: expected shape .* got \(1, 5, 3\)"),
        (lambda: block()(tokens(1, 5), [1] * 5), TypeError, r"attention_mask: expected a tensor \[B, T\], got list"),
        (lambda: block()(tokens(1, 5), torch.ones(1, 4)), ValueError, r"attention_mask: expected shape \[B, T\] = \(1, 5\), got \(1, 4\)"),
        (
            lambda: block()(tokens(1, 5), torch.ones(1, 5), cu_seqlens=torch.tensor([0, 5])),
            ValueError,
            "attention_mask: packed .* got both",
        ),
        (lambda: block()(tokens(1, 5), initial_state=torch.zeros(1)), TypeError, "initial_state: expected a BlockState, got Tensor"),
        (lambda: block()(tokens(2, 5), torch.tensor([[0] * 5, [1] * 5]), output_final_state=True), ValueError, "at least one real token"),
        (
            lambda: block()(tokens(2, 5), initial_state=block()(tokens(1, 5), output_final_state=True)[1]),
            ValueError,
            r"initial_state\.conv: expected shape \(2, 3, 72\), got \(1, 3, 72\)",
        ),
    ],
)
def test_errors_name_argument_expectation_and_what_came(make, kind, text):
    with pytest.raises(kind, match=text):
        make()
