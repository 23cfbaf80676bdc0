"""The delta rule's variants: decay before the error, keys for erasing, decay per key channel."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F

import miras_kernels as mk
from miras_kernels.backends.reference import chunkwise, definition
from miras_kernels.tables.memories import LINEAR
from miras_kernels.validation import make_call

B, T, H, DK, DV = 2, 37, 2, 5, 3
VARIANTS = ("decay_first", "erase_k", "key_log_decay")
#: every combination of at least one of them
COMBINATIONS = [c for n in (1, 2, 3) for c in itertools.combinations(VARIANTS, n)]


def tokens(used=(), seed=0, decay="token", dtype=torch.float64) -> dict:
    """Arguments of ``linear_memory``; decay per "token" or per "value" channel, strong in places, unless it is per key channel."""
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)
    positive = lambda *size: torch.rand(*size, generator=generator, dtype=torch.float64).to(dtype)
    x = dict(q=normal(B, T, H, DK), k=F.normalize(normal(B, T, H, DK), dim=-1), v=normal(B, T, H, DV), lr=positive(B, T, H))
    if "key_log_decay" in used:
        x["key_log_decay"] = -positive(B, T, H, DK) - 40 * (positive(B, T, H, DK) < 0.05)
    elif decay is not None:
        size = (B, T, H) if decay == "token" else (B, T, H, DV)
        x["log_decay"] = -positive(*size) - 40 * (positive(*size) < 0.05)
    if "erase_k" in used:
        x["erase_k"] = F.normalize(normal(B, T, H, DK), dim=-1)
    x["initial_state"] = normal(B, H, DV, DK)
    return {**x, "decay_first": "decay_first" in used, "chunk_size": 1, "output_final_state": True}


def relative(x: torch.Tensor, y: torch.Tensor) -> float:
    return ((x - y).norm() / y.norm()).item()


def assert_same(x: torch.Tensor, y: torch.Tensor, bound: float = 1e-9) -> None:
    assert x.shape == y.shape and relative(x, y) < bound


def both_ways(arguments: dict, bias, **more) -> list[list[torch.Tensor]]:
    """Output, final state and every gradient, by the definition and by the reference."""
    given = {name: x.requires_grad_() if isinstance(x, torch.Tensor) else x for name, x in {**arguments, **more}.items()}
    tensors = [x for x in given.values() if isinstance(x, torch.Tensor)]
    settings = dict(log_decay=None, bias=bias, retention=mk.L2Retention(), delta=None, momentum=None, cu_seqlens=None)
    found = []
    for form in (definition, chunkwise):
        out, state = form.run(make_call(LINEAR, **{**settings, **given}))
        loss = (out * torch.arange(out.numel(), dtype=out.dtype).sin().view_as(out)).sum() + state.dual[0].sin().sum()
        found.append([out, state.dual[0], *torch.autograd.grad(loss, tensors)])
    return found


@pytest.mark.parametrize("used", COMBINATIONS, ids="+".join)
@pytest.mark.parametrize("decay", [None, "token", "value"])
def test_blocks_are_the_definition(used, decay):
    for found, wanted in zip(*reversed(both_ways(tokens(used, decay=decay), mk.L2())), strict=True):
        assert_same(found, wanted)


@pytest.mark.parametrize("used", COMBINATIONS, ids="+".join)
@pytest.mark.parametrize("kind", ["bias", "momentum", "channel-wise lr"])
def test_tokens_are_the_definition(used, kind):
    arguments, bias, more = tokens(used), mk.L2(), {}
    if kind == "bias":
        bias, more = mk.Huber("norm"), {"delta": 0.3}
    elif kind == "momentum":
        more = {"momentum": 0.5 * torch.rand(B, T, H, dtype=torch.float64)}
    else:
        arguments["lr"] = torch.rand(B, T, H, DV, dtype=torch.float64)
    for found, wanted in zip(*reversed(both_ways(arguments, bias, **more)), strict=True):
        assert_same(found, wanted)


@pytest.mark.parametrize("used", COMBINATIONS, ids="+".join)
def test_the_recurrence_as_it_is_written(used):
    x = tokens(used)
    rank1 = lambda a, b: a.unsqueeze(-1) * b.unsqueeze(-2)
    dual, outputs = x["initial_state"], []
    for t in range(T):
        q, k, v, lr = (x[name][:, t] for name in ("q", "k", "v", "lr"))
        erase = x["erase_k"][:, t] if "erase_k" in used else k
        alpha = x["key_log_decay"][:, t].exp().unsqueeze(-2) if "key_log_decay" in used else x["log_decay"][:, t].exp()[..., None, None]
        seen = alpha * dual if "decay_first" in used else dual
        error = torch.einsum("bhvk,bhk->bhv", seen, erase) - v
        dual = alpha * dual - lr[..., None, None] * rank1(error, k)
        outputs.append(torch.einsum("bhvk,bhk->bhv", dual, q))
    out, state = mk.linear_memory(**x)
    assert_same(out, torch.stack(outputs, 1))
    assert_same(state.dual[0], dual)


def test_equal_keys_and_steps_of_two_are_solved_accurately():
    """The worst conditioned system of a block: every token has the same key, and reflects the error instead of removing it."""
    x = tokens(("decay_first",), decay=None)
    x["k"], x["lr"] = x["k"][:, :1].expand(-1, T, -1, -1).contiguous(), torch.full((B, T, H), 2.0, dtype=torch.float64)
    for found, wanted in zip(*reversed(both_ways(x, mk.L2())), strict=True):
        assert_same(found, wanted)


# ------------------------------------------------------------------------------------------------------- identities


def outputs(**arguments) -> tuple[torch.Tensor, torch.Tensor]:
    out, state = mk.linear_memory(**arguments)
    return out, state.dual[0]


def test_erasing_with_the_keys_of_writing_changes_nothing():
    x = tokens()
    for found, wanted in zip(outputs(**x, erase_k=x["k"]), outputs(**x), strict=True):
        assert_same(found, wanted)


def test_without_decay_it_does_not_matter_when_it_comes():
    x = tokens(decay=None)
    for found, wanted in zip(outputs(**{**x, "decay_first": True}), outputs(**x), strict=True):
        assert_same(found, wanted)


@pytest.mark.parametrize("first", [False, True])
def test_equal_decays_of_all_key_channels_are_a_decay_per_token(first):
    x = {**tokens(), "decay_first": first}
    by_channel = {**x, "key_log_decay": x["log_decay"].unsqueeze(-1).expand(-1, -1, -1, DK)}
    del by_channel["log_decay"]
    for found, wanted in zip(outputs(**by_channel), outputs(**x), strict=True):
        assert_same(found, wanted)


def test_decay_first_is_the_plain_rule_with_divided_values():
    """``lr -> alpha lr, v -> v / alpha``, which is useless where alpha is small."""
    x = tokens(decay="token")
    x["log_decay"] = x["log_decay"].clamp(min=-1)
    alpha = x["log_decay"].exp()
    divided = {**x, "lr": alpha * x["lr"], "v": x["v"] / alpha.unsqueeze(-1)}
    for found, wanted in zip(outputs(**{**x, "decay_first": True}), outputs(**divided), strict=True):
        assert_same(found, wanted)


@pytest.mark.parametrize("used", COMBINATIONS, ids="+".join)
def test_a_sequence_may_be_cut_and_packed(used):
    x = tokens(used)
    per_token = [name for name in x if isinstance(x[name], torch.Tensor) and name != "initial_state"]
    whole = outputs(**x)
    piece = lambda a, b, **more: {**x, **{name: x[name][:, a:b] for name in per_token}, **more}
    first, state = mk.linear_memory(**piece(0, 20))
    second, state = mk.linear_memory(**piece(20, T, initial_state=state))
    assert_same(torch.cat([first, second], 1), whole[0])
    assert_same(state.dual[0], whole[1])
    packed = {name: x[name].flatten(0, 1).unsqueeze(0) for name in per_token}
    out, final = outputs(**{**x, **packed, "cu_seqlens": torch.tensor([0, T, 2 * T])})
    assert_same(out.unflatten(1, (B, T)).squeeze(0), whole[0])
    assert_same(final, whole[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("used", COMBINATIONS, ids="+".join)
def test_low_precision(used, dtype):
    """bfloat16 inputs are read as they are: what they differ by is the rounding of the output."""
    x = {name: y.to(dtype) if isinstance(y, torch.Tensor) else y for name, y in tokens(used).items()}
    exact = {name: y.double() if isinstance(y, torch.Tensor) else y for name, y in x.items()}
    out, state = outputs(**x)
    wanted, wanted_state = outputs(**exact)
    assert out.dtype == dtype and state.dtype == torch.float32
    eps = torch.finfo(torch.float32).eps
    assert_same(out.double(), wanted, 512 * eps + (torch.finfo(dtype).eps if dtype != torch.float32 else 0))
    assert_same(state.double(), wanted_state, 512 * eps)


def test_the_inputs_of_autocast():
    x = {name: y.float() if isinstance(y, torch.Tensor) else y for name, y in tokens(("erase_k", "decay_first")).items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, _ = mk.linear_memory(**x)
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize("used", COMBINATIONS, ids="+".join)
def test_compiled(used):
    x = tokens(used)
    compiled = torch.compile(mk.linear_memory, backend="aot_eager", fullgraph=True)
    assert_same(compiled(**x)[0], mk.linear_memory(**x)[0])


# ----------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("used", COMBINATIONS, ids="+".join)
@pytest.mark.parametrize("backend", ["cpp", "triton", "cuda"])
def test_other_backends_say_which_option_they_do_not_serve(used, backend):
    x = tokens(used, dtype=torch.float32)
    served = mk.dispatch.BACKENDS[backend].variants
    lacks = [name for name in VARIANTS if name in used and name not in served]
    reason = mk.explain(**x)[backend]
    if not lacks:
        assert reason is None or not any(name in reason for name in used)
        return
    if mk.dispatch.unavailable(backend) is None:
        assert reason == f"it does not serve {lacks[0]}"
    with pytest.raises(ValueError, match=f"'{backend}' cannot serve this call"):
        mk.linear_memory(**x, backend=backend)


BAD = {
    "decay_first": [(1, TypeError, "expected True or False, got 1")],
    "erase_k": [
        (torch.zeros(B, T, H, DV, dtype=torch.float64), ValueError, "expected the shape of k"),
        (torch.zeros(B, T, H, DK), TypeError, "expected dtype torch.float64 as q"),
        (3, TypeError, "expected a tensor, got 3"),
    ],
    "key_log_decay": [
        (torch.zeros(B, T, H, dtype=torch.float64), ValueError, r"expected shape \[B, T, H, Dk\]"),
        (torch.ones(B, T, H, DK, dtype=torch.float64), ValueError, "expected values <= 0, got a maximum of 1"),
    ],
}


@pytest.mark.parametrize(("name", "wrong"), [(name, wrong) for name, cases in BAD.items() for wrong in cases])
def test_wrong_arguments_are_named(name, wrong):
    value, kind, words = wrong
    with pytest.raises(kind, match=f"^{name}: {words}"):
        mk.linear_memory(**{**tokens(decay=None), name: value})


@pytest.mark.parametrize("name", VARIANTS)
def test_they_need_single_tokens_and_plain_retention(name):
    x = tokens((name,))
    with pytest.raises(ValueError, match=f"^{name}: needs chunk_size=1 .* got chunk_size=64"):
        mk.linear_memory(**{**x, "chunk_size": 64})
    with pytest.raises(ValueError, match=rf"^{name}: needs retention=L2Retention\(\), got KLRetention"):
        mk.linear_memory(**x, retention=mk.KLRetention())


def test_a_key_has_one_decay():
    x = tokens(("key_log_decay",))
    with pytest.raises(ValueError, match="^key_log_decay: expected log_decay=None beside it"):
        mk.linear_memory(**x, log_decay=torch.zeros(B, T, H, dtype=torch.float64))


# ---------------------------------------------------------------------------------------------------- single tokens


@pytest.mark.parametrize("used", [c for c in COMBINATIONS if "decay_first" in c and "erase_k" not in c], ids="+".join)
@pytest.mark.parametrize("decay", ["token", "value"])
def test_a_single_token_runs_on_the_kernels_of_the_plain_rule(used, decay, backend):
    """Its decay is one of the state. Gradients pass it."""
    x = {name: y.float() if isinstance(y, torch.Tensor) else y for name, y in tokens(used, decay=decay).items()}
    token = {name: y[:, :1] if isinstance(y, torch.Tensor) and name != "initial_state" else y for name, y in x.items()}
    leaves = [y.requires_grad_() for y in token.values() if isinstance(y, torch.Tensor)]
    assert mk.explain(**token)[backend] is None
    out, state = mk.linear_memory(**token, backend=backend)
    grads = torch.autograd.grad(out.sum() + state.dual[0].sin().sum(), leaves)
    exact = {name: y.detach().double().requires_grad_() if isinstance(y, torch.Tensor) else y for name, y in token.items()}
    settings = dict(bias=mk.L2(), retention=mk.L2Retention(), delta=None, momentum=None, cu_seqlens=None)
    wanted, end = definition.run(make_call(LINEAR, **{"log_decay": None, **settings, **exact}))
    leaves = [y for y in exact.values() if isinstance(y, torch.Tensor)]
    wanted_grads = torch.autograd.grad(wanted.sum() + end.dual[0].sin().sum(), leaves)
    for a, b in zip((out, state.dual[0], *grads), (wanted, end.dual[0], *wanted_grads), strict=True):
        assert_same(a.double(), b, 512 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("used", [("decay_first",), ("decay_first", "key_log_decay")], ids="+".join)
def test_a_decoder_decays_before_its_steps(used, backend):
    x = {name: y.float() if isinstance(y, torch.Tensor) else y for name, y in tokens(used).items()}
    out, state = mk.linear_memory(**x, backend="reference")
    decoder = mk.Decoder(mk.MemoryState((x["initial_state"],)), chunk_size=1, backend=backend)
    decay, found = x["key_log_decay" if "key_log_decay" in used else "log_decay"], []
    for t in range(T):
        decoder.decay(decay[:, t])
        found.append(decoder.step(*(x[name][:, t : t + 1] for name in ("q", "k", "v", "lr"))))
    assert_same(torch.cat(found, 1), out, 512 * torch.finfo(torch.float32).eps)
    assert_same(decoder.state().dual[0], state.dual[0], 512 * torch.finfo(torch.float32).eps)


def test_a_decoder_says_what_it_cannot_decay():
    state = mk.MemoryState((torch.zeros(B, H, DV, DK),))
    for settings in (dict(chunk_size=2), dict(chunk_size=1, retention=mk.KLRetention())):
        with pytest.raises(ValueError, match="^decay: needs a linear memory, chunk_size=1 and retention"):
            mk.Decoder(state, **settings).decay(torch.zeros(B, H))
    for wrong in (torch.zeros(B, H, DV), 0.5):
        with pytest.raises(ValueError, match=r"^log_decay: expected shape \[N, H\] or \[N, H, Dk\]"):
            mk.Decoder(state, chunk_size=1).decay(wrong)


# ------------------------------------------------------------------------------------------------------ C++ kernels


@pytest.mark.parametrize("sizes", [(1, 8, 8), (33, 40, 20), (100, 17, 65)], ids=str)
@pytest.mark.parametrize("decay", ["token", None, "strong"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("used", COMBINATIONS, ids="+".join)
def test_cpp_kernels(used, sizes, decay, packed, monkeypatch):
    """Outputs, states and every gradient against the definition in float64, with steps of size 0, keys of 0 and empty sequences."""
    from miras_kernels import _C

    length, dk, dv = sizes
    generator = torch.Generator().manual_seed(1)
    normal = lambda *size: torch.randn(*size, generator=generator)
    positive = lambda *size: torch.rand(*size, generator=generator)
    n = 1 if packed else B
    x = dict(q=normal(n, length, H, dk), k=F.normalize(normal(n, length, H, dk), dim=-1), v=normal(n, length, H, dv))
    x["lr"] = positive(n, length, H)
    x["k"][:, 3::7], x["lr"][:, 2::5] = 0, 0
    if decay is not None:
        size = (n, length, H, dk) if "key_log_decay" in used else (n, length, H)
        strong = 50 * (positive(*size) < 0.2) if decay == "strong" else 0
        x["log_decay" if "key_log_decay" not in used else "key_log_decay"] = -positive(*size) - strong
    if "erase_k" in used:
        x["erase_k"] = F.normalize(normal(n, length, H, dk), dim=-1)
    x["initial_state"] = normal(3 if packed else n, H, dv, dk)
    offsets = torch.tensor([0, length // 3, length // 3, length]) if packed else None
    rest = dict(chunk_size=1, decay_first="decay_first" in used, cu_seqlens=offsets)

    def results(run, dtype) -> list[torch.Tensor]:
        leaves = {name: y.to(dtype).requires_grad_() for name, y in x.items()}
        out, state = run(**leaves, **rest, output_final_state=True)
        loss = (out * torch.arange(out.numel()).sin().view_as(out)).sum() + state.dual[0].sin().sum()
        return [out, state.dual[0], *torch.autograd.grad(loss, list(leaves.values()))]

    settings = dict(log_decay=None, bias=mk.L2(), retention=mk.L2Retention(), delta=None, momentum=None)
    wanted = results(lambda **y: definition.run(make_call(LINEAR, **{**settings, **y})), torch.float64)
    for level in _C.cpu_capabilities():
        monkeypatch.setenv("MIRAS_CPU_CAPABILITY", level)
        for found, exact in zip(results(lambda **y: mk.linear_memory(**y, backend="cpp"), torch.float32), wanted, strict=True):
            assert_same(found.double(), exact, 512 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("used", COMBINATIONS, ids="+".join)
def test_the_cpp_kernels_name_what_they_leave_to_the_reference(used):
    x = tokens(used, dtype=torch.float32)
    assert mk.explain(**x)["cpp"] is None
    size = 32 if used == ("decay_first",) else 16
    assert mk.explain(**x).algorithms["cpp"] == f"exact steps in blocks of {size} tokens"
    by_channel = {"lr": torch.rand(B, T, H, DV)} | ({} if "key_log_decay" in used else {"log_decay": -torch.rand(B, T, H, DV)})
    others = [{"bias": mk.L1()}, {"momentum": torch.rand(B, T, H)}, *({name: y} for name, y in by_channel.items())]
    for other in others:
        reason = f"it serves {used[0]} with L2(), lr and log_decay per token, and no momentum"
        assert mk.explain(**{**x, **other})["cpp"] == reason
