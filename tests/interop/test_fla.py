"""Delta rules under flash-linear-attention's signatures, against the recurrence as it is written and transformers' PyTorch functions."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from torch.nn import functional as F
from transformers.models.kimi_linear.modeling_kimi_linear import chunk_kimi_delta_attention
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule, torch_recurrent_gated_delta_rule

import miras_kernels as mk
from miras_kernels.interop.fla import chunk_delta_rule, chunk_gated_delta_rule, chunk_kda, fused_recurrent_gated_delta_rule

B, T, H, HV, K, V = 2, 70, 2, 4, 8, 6
RULES = {
    "gated": chunk_gated_delta_rule,
    "recurrent": fused_recurrent_gated_delta_rule,
    "delta": chunk_delta_rule,
    "kda": chunk_kda,
}


def tensors(rule: str, heads: int = H, dtype=torch.float64, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)
    positive = lambda *size: torch.rand(*size, generator=generator, dtype=torch.float64).to(dtype)
    x = dict(q=normal(B, T, heads, K), k=F.normalize(normal(B, T, heads, K), dim=-1), v=normal(B, T, HV, V), beta=positive(B, T, HV))
    if rule != "delta":
        size = (B, T, HV, K) if rule == "kda" else (B, T, HV)
        x["g"] = -positive(*size) - 30 * (positive(*size) < 0.05)
    x["initial_state"] = normal(B, HV, K, V)
    return x


def recurrence(q, k, v, beta, g=None, initial_state=None, scale=None, normalise=False):
    """``S_t = diag(alpha) S_{t-1} + beta k (v - k' diag(alpha) S_{t-1})`` and ``o_t = scale q' S_t``, token by token."""
    if normalise:
        q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    q, k = (x.repeat_interleave(v.shape[2] // x.shape[2], 2) for x in (q, k))
    state = torch.zeros(v.shape[0], v.shape[2], q.shape[-1], v.shape[-1], dtype=v.dtype) if initial_state is None else initial_state
    outputs = []
    for t in range(q.shape[1]):
        if g is not None:
            state = state * (g[:, t] if g.dim() == 4 else g[:, t, :, None]).exp().unsqueeze(-1)
        error = v[:, t] - torch.einsum("bhk,bhkv->bhv", k[:, t], state)
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], beta[:, t, :, None] * error)
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t] * (q.shape[-1] ** -0.5 if scale is None else scale), state))
    return torch.stack(outputs, 1), state


def assert_close(x: torch.Tensor, y: torch.Tensor, terms: int = 4096) -> None:
    """Equal up to the order of summation: about ``terms`` roundings that add up like a random walk, with a margin of 8."""
    assert x.shape == y.shape and x.dtype == y.dtype
    error, bound = (x - y).norm().item(), 8 * math.sqrt(terms) * torch.finfo(x.dtype).eps * y.norm().item()
    assert error <= bound, f"{error:.2e} > {bound:.2e}"


# ---------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("heads", [HV, H])
@pytest.mark.parametrize("options", [{}, {"use_qk_l2norm_in_kernel": True}, {"scale": 0.7}], ids=str)
def test_the_recurrence_as_it_is_written(rule, heads, options):
    """Outputs, states and all gradients, also with two value heads for every key head."""
    x = tensors(rule, heads)
    [t.requires_grad_() for t in x.values()]
    found = RULES[rule](**x, output_final_state=True, **options)
    wanted = recurrence(**x, scale=options.get("scale"), normalise="use_qk_l2norm_in_kernel" in options)
    for a, b in zip(found, wanted, strict=True):
        assert_close(a, b)
    weigh = lambda pair: sum((t * torch.arange(t.numel(), dtype=t.dtype).sin().view_as(t)).sum() for t in pair)
    grads = [torch.autograd.grad(weigh(pair), list(x.values())) for pair in (found, wanted)]
    for name, a, b in zip(x, *grads, strict=True):
        assert b.abs().max() > 0, name
        assert_close(a, b)


@pytest.mark.parametrize("theirs", [torch_chunk_gated_delta_rule, torch_recurrent_gated_delta_rule])
@pytest.mark.parametrize("ours", [chunk_gated_delta_rule, fused_recurrent_gated_delta_rule])
def test_transformers_gated_delta_rule(ours, theirs):
    x = tensors("gated", dtype=torch.float32)
    rest = dict(initial_state=x["initial_state"], output_final_state=True, use_qk_l2norm_in_kernel=True)
    wanted = theirs(x["q"], x["k"], x["v"], g=x["g"], beta=x["beta"], **rest)
    for a, b in zip(ours(x["q"], x["k"], x["v"], g=x["g"], beta=x["beta"], **rest), wanted, strict=True):
        assert_close(a, b)


def test_transformers_kimi_delta_attention():
    x = tensors("kda", HV, dtype=torch.float32)
    rest = dict(initial_state=x["initial_state"], output_final_state=True, use_qk_l2norm_in_kernel=True)
    wanted = chunk_kimi_delta_attention(x["q"], x["k"], x["v"], g=x["g"], beta=x["beta"], **rest)
    for a, b in zip(chunk_kda(x["q"], x["k"], x["v"], g=x["g"], beta=x["beta"], **rest), wanted, strict=True):
        assert_close(a, b)


def test_decays_by_channel_of_the_recurrent_form():
    """``gk`` per key channel and ``gv`` per value channel, each on top of ``g``; step sizes of 1 without ``beta``."""
    x = tensors("gated", HV)
    by_key = -torch.rand(B, T, HV, K, dtype=torch.float64)
    found = fused_recurrent_gated_delta_rule(**x, gk=by_key, output_final_state=True)
    wanted = recurrence(**{**x, "g": by_key + x["g"].unsqueeze(-1)})
    for a, b in zip(found, wanted, strict=True):
        assert_close(a, b)
    alone = fused_recurrent_gated_delta_rule(x["q"], x["k"], x["v"], gk=by_key)[0]
    assert_close(alone, recurrence(x["q"], x["k"], x["v"], torch.ones(B, T, HV, dtype=torch.float64), by_key)[0])
    by_value = -torch.rand(B, T, HV, V, dtype=torch.float64)
    found = fused_recurrent_gated_delta_rule(**x, gv=by_value)[0]
    channels = []
    for c in range(V):  # each value channel is a memory of its own
        one = {**x, "v": x["v"][..., c : c + 1], "initial_state": x["initial_state"][..., c : c + 1], "g": x["g"] + by_value[..., c]}
        channels.append(recurrence(**one)[0])
    assert_close(found, torch.cat(channels, -1))


@pytest.mark.parametrize("rule", ["gated", "recurrent"])
def test_the_gate_of_gated_deltanet(rule):
    x = tensors(rule)
    x["g"], x["beta"] = torch.randn(2, B, T, HV, dtype=torch.float64).unbind(0)
    A_log, dt_bias = torch.randn(2, HV, dtype=torch.float64).unbind(0)
    gates = dict(use_gate_in_kernel=True, A_log=A_log, dt_bias=dt_bias, use_beta_sigmoid_in_kernel=True)
    g, beta = -A_log.exp() * F.softplus(x["g"] + dt_bias), x["beta"].sigmoid()
    assert_close(RULES[rule](**x, **gates)[0], recurrence(**{**x, "g": g, "beta": beta})[0])
    assert_close(RULES[rule](**x, **gates, allow_neg_eigval=True)[0], recurrence(**{**x, "g": g, "beta": 2 * beta})[0])


def test_the_gate_of_kda():
    x = tensors("kda")
    x["g"] = torch.randn(B, T, HV, K, dtype=torch.float64)
    A_log, dt_bias = torch.randn(HV, dtype=torch.float64), torch.randn(HV * K, dtype=torch.float64)
    raw = x["g"] + dt_bias.view(HV, K)
    rate = A_log.exp().unsqueeze(-1)
    run = lambda **options: chunk_kda(**x, use_gate_in_kernel=True, dt_bias=dt_bias, **options)[0]
    assert_close(run(A_log=A_log), recurrence(**{**x, "g": -rate * F.softplus(raw)})[0])
    assert_close(run(A_log=A_log, lower_bound=-5.0, safe_gate=True), recurrence(**{**x, "g": -5 * (rate * raw).sigmoid()})[0])
    assert_close(run(lower_bound=-5.0), recurrence(**{**x, "g": -5 * raw.sigmoid()})[0])


@pytest.mark.parametrize("rule", RULES)
def test_packed_sequences_are_separate(rule):
    x = tensors(rule)
    state = x.pop("initial_state")
    lengths = [20, 0, 50]
    offsets = torch.tensor([0, 20, 20, 70])
    first = {name: t[:1] for name, t in x.items()}
    states = state[:1].repeat(3, 1, 1, 1) * torch.arange(1, 4).view(-1, 1, 1, 1)
    out, final = RULES[rule](**first, initial_state=states, output_final_state=True, cu_seqlens=offsets)
    for n, (start, length) in enumerate(zip(offsets.tolist(), lengths, strict=False)):
        piece = {name: t[:, start : start + length] for name, t in first.items()}
        if length:
            wanted, end = recurrence(**piece, initial_state=states[n : n + 1])
            assert_close(out[:, start : start + length], wanted)
        else:
            end = states[n : n + 1]
        assert_close(final[n : n + 1], end)


@pytest.mark.parametrize("rule", RULES)
def test_a_state_goes_on_in_either_layout(rule):
    x = tensors(rule)
    per_token = [name for name in x if name != "initial_state"]
    piece = lambda a, b: {name: x[name][:, a:b] for name in per_token}
    whole, end = RULES[rule](**x, output_final_state=True)
    first, state = RULES[rule](**piece(0, 30), initial_state=x["initial_state"], output_final_state=True)
    second, last = RULES[rule](**piece(30, T), initial_state=state, output_final_state=True)
    assert_close(torch.cat([first, second], 1), whole)
    assert_close(last, end)
    if rule != "delta":
        turned = x["initial_state"].transpose(-1, -2).contiguous()
        out, final = RULES[rule](**piece(0, T), initial_state=turned, state_v_first=True, output_final_state=True)
        assert_close(out, whole)
        assert_close(final.transpose(-1, -2), end)


@pytest.mark.parametrize("rule", RULES)
def test_bfloat16_in_and_out_with_float32_states(rule):
    x = {name: t.bfloat16() for name, t in tensors(rule).items()}
    x["initial_state"] = x["initial_state"].float()
    out, state = RULES[rule](**x, output_final_state=True)
    assert out.dtype == torch.bfloat16 and state.dtype == torch.float32
    wanted, end = recurrence(**{name: t.double() for name, t in x.items()})
    assert (out.double() - wanted).norm() < 2 * torch.finfo(torch.bfloat16).eps * wanted.norm()  # q's scale, then the output
    assert (state.double() - end).norm() < 512 * torch.finfo(torch.float32).eps * end.norm()


def test_the_delta_rule_runs_on_kernels(monkeypatch):
    x = tensors("delta", dtype=torch.float32)
    chosen = []
    run = mk.dispatch.choose
    monkeypatch.setattr(mk.dispatch, "choose", lambda *args: chosen.append(run(*args)) or chosen[-1])
    chunk_delta_rule(**x)
    assert chosen == ["cpp"]


# ------------------------------------------------------------------------------------------------ names and bad input

#: the names of fla-core 0.6.0's arguments in their order, up to where versions differ, and the others that are taken
LEADING = {
    "gated": "q k v g beta scale initial_state output_final_state use_qk_l2norm_in_kernel",
    "recurrent": "q k v g gk gv beta scale initial_state output_final_state use_qk_l2norm_in_kernel",
    "delta": "q k v beta scale initial_state output_final_state use_qk_l2norm_in_kernel",
    "kda": "q k v g beta scale initial_state output_final_state use_qk_l2norm_in_kernel",
}


@pytest.mark.parametrize("rule", RULES)
def test_arguments_have_their_names_and_order(rule):
    parameters = inspect.signature(RULES[rule]).parameters
    positional = [name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert " ".join(positional) == LEADING[rule]
    assert not any(p.kind is p.VAR_KEYWORD for p in parameters.values())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["head_first", "cp_context", "use_qk_l2norm"])
def test_unknown_keywords_are_errors(rule, name):
    with pytest.raises(TypeError, match=name):
        RULES[rule](**tensors(rule), **{name: None})


BAD = [
    ("gated", "v", torch.zeros(B, T, 3, V), "a multiple of 2"),
    ("gated", "k", torch.zeros(B, T, H, V), "expected the shape of q"),
    ("gated", "q", torch.zeros(B, T, H), r"expected a tensor \[B, T, H, D\], got shape"),
    ("gated", "g", torch.zeros(B, T, H), "expected a tensor of shape"),
    ("gated", "g", torch.ones(B, T, HV, dtype=torch.float64), "expected values <= 0"),
    ("gated", "beta", torch.zeros(B, T, H), "expected a tensor of shape"),
    ("gated", "beta", None, "expected a tensor of shape .* got None"),
    ("gated", "initial_state", torch.zeros(B, HV, V, K), "expected a tensor of shape"),
    ("gated", "A_log", None, "use_gate_in_kernel=True needs it"),
    ("gated", "dt_bias", torch.zeros(3), f"expected a tensor of {HV} values"),
    ("gated", "allow_neg_eigval", True, "needs use_beta_sigmoid_in_kernel=True"),
    ("gated", "chunk_size", 128, "expected one of 16, 32, 64, got 128"),
    ("kda", "g", torch.zeros(B, T, HV), "expected a tensor of shape"),
    ("kda", "chunk_size", 16, "expected one of 32, 64, got 16"),
    ("kda", "lower_bound", 1.0, "expected a number < 0"),
    ("recurrent", "gv", torch.zeros(B, T, HV, V), "expected None beside gk"),
    ("delta", "scale", "1", "expected a number or None"),
]


@pytest.mark.parametrize(("rule", "name", "value", "words"), BAD, ids=lambda x: x if isinstance(x, str) else "")
def test_wrong_arguments_are_named(rule, name, value, words):
    given = {**tensors(rule), name: value}
    if name in ("A_log", "dt_bias", "lower_bound"):
        given["use_gate_in_kernel"] = True
    if name == "gv":
        given["gk"] = torch.zeros(B, T, HV, K)
    with pytest.raises((TypeError, ValueError), match=f"^{name}: .*{words}"):
        RULES[rule](**given)
