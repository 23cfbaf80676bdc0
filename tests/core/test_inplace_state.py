"""``inplace_state=True``: the numbers of a state as a value, in the given state; and calls like an earlier one, which are checked less."""

from __future__ import annotations

import pytest
import torch

import miras_kernels as mk
from decoding import MLP
from miras_kernels import memory, verification
from miras_kernels.tables.retention import TABLE as GATES
from miras_kernels.testing import Case
from miras_kernels.testing.steps import cut

CPU = torch.device("cpu")
CASES = [
    Case("every-token", chunk_size=1),
    Case("every-token-decays-first", chunk_size=1, decay_first=True),
    Case("every-token-decays-first-by-key", chunk_size=1, decay_first=True, decay="key"),
    Case("every-token-momentum", chunk_size=1, momentum=True, decay="channel"),
    Case("every-token-kl", chunk_size=1, retention=GATES[2]),
    Case("odd", key_dim=5, value_dim=19, chunk_size=1, decay="channel", decay_first=True, lr="channel"),
    Case("chunks", momentum=True),
    Case("mlp", **MLP, momentum=True),
    Case("mlp-every-token", **MLP, chunk_size=1),
]


def own(state: mk.MemoryState, transposed: bool = True) -> mk.MemoryState:
    """A copy that shares no memory, in the layout of states that are returned or in the other one."""
    copy = lambda x: x.mT.contiguous().mT if transposed and x.dim() == 4 else x.contiguous()
    return state.map(lambda x: copy(x.clone()))


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_given_state_is_overwritten(case, backend, transposed):
    """Single tokens and, where kernels serve them, longer runs, bit for bit."""
    arguments = case.draw(torch.float32).arguments() | {"backend": backend}
    with torch.no_grad():
        _, value = case.function(**{**arguments, **cut(arguments, 0, 13), "backend": "reference"})
        given = own(value, transposed)
        tensors = given.tensors()
        for a, b in [(13, 14), (14, 15), (15, 16), (16, 19), (19, case.tokens)][: 3 if case.name == "odd" else 5]:
            wanted, value = case.function(**{**arguments, **cut(arguments, a, b), "initial_state": value})
            again = {**arguments, **cut(arguments, a, b), "initial_state": given, "output_final_state": False}
            out, state = case.function(**again, inplace_state=True)
            assert torch.equal(out, wanted) and state is given
            assert all(x is y for x, y in zip(state.tensors(), tensors, strict=True))
            assert all(torch.equal(x, y) for x, y in zip(tensors, value.tensors(), strict=True))


@pytest.mark.parametrize("shape", [dict(chunk_size=1, decay_first=True), dict(chunk_size=4)], ids=["every-token", "chunks"])
def test_triton(shape):
    if shape.get("decay_first"):
        shape = shape | dict(tokens=2)
    case = Case("triton", batch=1, heads=2, key_dim=8, value_dim=8, **{"tokens": 5, **shape})
    arguments = case.draw(torch.float32).arguments() | {"backend": "triton"}
    with torch.no_grad():
        state = mk.MemoryState((torch.zeros(1, 2, 8, 8),))
        given = own(state)
        for t in range(case.tokens):
            wanted, state = case.function(**{**arguments, **cut(arguments, t, t + 1), "initial_state": state})
            out, given = case.function(**{**arguments, **cut(arguments, t, t + 1), "initial_state": given}, inplace_state=True)
            assert torch.equal(out, wanted)
            assert all(torch.equal(x, y) for x, y in zip(given.tensors(), state.tensors(), strict=True))


def tokens(t: int = 1, n: int = 2, **changes):
    torch.manual_seed(0)
    x = {name: torch.randn(n, t, 3, 8) for name in "qkv"} | {"lr": torch.rand(n, t, 3)}
    return {**x, "log_decay": -torch.rand(n, t, 3), "decay_first": True, "chunk_size": 1, **changes}


def test_tensors_packed_sequences_and_no_tokens(backend):
    dual = torch.randn(2, 3, 8, 8)
    wanted = mk.linear_memory(**tokens(backend=backend), initial_state=dual.clone(), output_final_state=True)[1].dual[0]
    before = dual.clone()
    _, state = mk.linear_memory(**tokens(backend=backend), initial_state=dual, inplace_state=True)
    assert state.dual[0] is dual and torch.equal(dual, wanted) and not torch.equal(dual, before)
    _, state = mk.linear_memory(**tokens(0, backend=backend), initial_state=dual, inplace_state=True)
    assert state.dual[0] is dual and torch.equal(dual, wanted)
    packed = tokens(7, 1, cu_seqlens=torch.tensor([0, 3, 7]), backend=backend)
    wanted = mk.linear_memory(**packed, initial_state=dual.clone(), output_final_state=True)[1].dual[0]
    mk.linear_memory(**packed, initial_state=dual, inplace_state=True)
    assert torch.equal(dual, wanted)


def test_an_open_chunk_that_the_given_state_lacks(backend):
    arguments = tokens(3, chunk_size=4, decay_first=False, backend=backend)
    given = mk.MemoryState((torch.randn(2, 3, 8, 8),))
    _, wanted = mk.linear_memory(**arguments, initial_state=own(given, False), output_final_state=True)
    _, state = mk.linear_memory(**arguments, initial_state=given, inplace_state=True)
    assert state.dual[0] is given.dual[0] and state.open_chunk is not None
    assert all(torch.equal(x, y) for x, y in zip(state.tensors(), wanted.tensors(), strict=True))


def test_compiled():
    """The compiled program copies."""
    run = torch.compile(lambda x, s: mk.linear_memory(**x, initial_state=s, inplace_state=True)[0], backend="aot_eager", fullgraph=True)
    eager, compiled = torch.randn(2, 3, 8, 8), torch.empty(0)
    compiled = eager.clone()
    for seed in range(2):
        x = tokens() | {"q": torch.full((2, 1, 3, 8), seed + 1.0)}
        wanted, _ = mk.linear_memory(**x, initial_state=eager, inplace_state=True)
        torch.testing.assert_close(run(x, compiled), wanted)
        torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize(
    "changes, error",
    [
        (dict(inplace_state=1), "inplace_state: expected True or False, got 1"),
        (dict(initial_state=None), "initial_state: inplace_state=True needs a state to write into, got None"),
        (dict(initial_state=torch.zeros(3, 8, 8)), r"initial_state: inplace_state=True needs a state of every sequence, .* \(3, 8, 8\)"),
        (dict(initial_state=torch.zeros(2, 3, 8, 8).bfloat16()), "initial_state: .* needs dtype torch.float32, got torch.bfloat16"),
        (dict(initial_state=torch.zeros(3, 8, 8).expand(2, 3, 8, 8)), r"initial_state: .* memory of its own .* strides \(0, 64, 8, 1\)"),
        (dict(initial_state=torch.zeros(2, 3, 8, 8, requires_grad=True)), "inplace_state: True needs a call without gradients"),
        (dict(initial_state=torch.zeros(2, 3, 8, 9)), "initial_state: expected shape"),
    ],
)
def test_errors(changes, error):
    with pytest.raises((TypeError, ValueError), match=error):
        mk.linear_memory(**tokens(), **{"initial_state": torch.zeros(2, 3, 8, 8), "inplace_state": True, **changes})


@pytest.mark.parametrize("transposed", [True, False])
def test_autograd_sees_the_write(transposed):
    dual = own(mk.MemoryState((torch.randn(2, 3, 8, 8),)), transposed).dual[0]
    scale = torch.ones((), requires_grad=True)
    for _ in range(2):
        loss = (scale * dual).sum()
        mk.linear_memory(**tokens(), initial_state=dual, inplace_state=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


# ---------------------------------------------------------------------------------------------- calls like an earlier one


@pytest.fixture
def runs(monkeypatch):
    """The calls that were not repeated."""
    found, run = [], memory.run
    monkeypatch.setattr(memory, "run", lambda *given, **rest: found.append(rest) or run(*given, **rest))
    monkeypatch.setattr(memory.decode.earlier, "_earlier", {})
    return found


def state(seed: int = 0) -> mk.MemoryState:
    return mk.MemoryState((torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed)).mT,))


@pytest.mark.parametrize("bias", [mk.L2(), mk.L1(), mk.Huber("coordinate")], ids=str)
@pytest.mark.parametrize("inplace", [True, False])
def test_a_repeated_call_gives_the_same(runs, bias, inplace):
    settings = tokens(bias=bias, inplace_state=inplace, output_final_state=True) | (dict(delta=0.5) if bias.needs_delta else {})
    wanted = mk.linear_memory(**settings, initial_state=own(state()))
    found = mk.linear_memory(**settings, initial_state=own(state()))
    assert len(runs) == 1
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1].dual[0], wanted[1].dual[0])
    given = own(state())
    out, after = mk.linear_memory(**settings, initial_state=given.dual[0])
    assert len(runs) == 1 and torch.equal(out, wanted[0]) and (after.dual[0] is given.dual[0]) == inplace
    with torch.inference_mode():
        assert torch.equal(mk.linear_memory(**settings, initial_state=own(state()))[0], wanted[0])


def test_repeated_calls_are_checked(runs):
    first = tokens(output_final_state=True)
    mk.linear_memory(**first, initial_state=state())
    with pytest.raises(ValueError, match="log_decay: expected values <= 0"):
        mk.linear_memory(**first | {"log_decay": torch.ones(2, 1, 3)}, initial_state=state())
    with pytest.raises(ValueError, match="log_decay: expected shape"):
        mk.linear_memory(**first | {"log_decay": torch.zeros(2, 1, 4)}, initial_state=state())
    with pytest.raises(TypeError, match="k: expected dtype"):
        mk.linear_memory(**first | {"k": first["k"].bfloat16()}, initial_state=state())
    with pytest.raises(TypeError, match="bias: expected"):
        mk.linear_memory(**first, bias=[], initial_state=state())
    with pytest.raises(ValueError, match="initial_state: expected shape"):
        mk.linear_memory(**first, initial_state=torch.zeros(2, 3, 8, 9))


def test_other_calls_are_not_repeated(runs):
    first = tokens(output_final_state=True)
    wanted, _ = mk.linear_memory(**first, initial_state=state())
    others = [
        lambda: mk.linear_memory(**first | {"q": first["q"].clone().requires_grad_()}, initial_state=state())[0],
        lambda: mk.linear_memory(**first | {"q": first["q"].double(), "k": first["k"].double(), "v": first["v"].double()})[0],
        lambda: mk.linear_memory(**first, initial_state=mk.MemoryState((state().dual[0].contiguous(),)))[0],
        lambda: mk.linear_memory(**first, initial_state=(state().dual[0],))[0],
        lambda: mk.linear_memory(**first | {"q": torch._neg_view(-first["q"])}, initial_state=state())[0],
        lambda: mk.linear_memory(**first, initial_state=state(), backend="reference")[0],
    ]
    for i, other in enumerate(others):
        out = other()
        assert len(runs) == 2 + i
        if i != 1:  # without a state
            torch.testing.assert_close(out.detach(), wanted)
    q = first["q"].clone().requires_grad_()
    mk.linear_memory(**first | {"q": q}, initial_state=state())[0].sum().backward()
    assert q.grad.abs().sum() > 0
    with torch.autocast("cpu", torch.bfloat16):
        assert mk.linear_memory(**first, initial_state=state())[0].dtype == torch.bfloat16


def test_a_failed_verification_ends_it(runs, cache):
    first = tokens(output_final_state=True)
    mk.linear_memory(**first, initial_state=state())
    what = verification.configuration("linear", mk.L2(), mk.L2Retention(), torch.float32, verification.DECODE)
    verification.add("cpp", CPU, {what: {"when": "2026-01-01", "failure": "planted"}})
    mk.linear_memory(**first, initial_state=state())
    mk.linear_memory(**first, initial_state=state())
    assert len(runs) == 3


def test_few_calls_are_remembered(runs):
    for n in range(1, 70):
        dual = torch.zeros(n, 3, 8, 8)
        mk.linear_memory(**tokens(n=n), initial_state=dual)
    assert len(memory.decode.earlier._earlier) <= memory.decode.earlier._MOST
