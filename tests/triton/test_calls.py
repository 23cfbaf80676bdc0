"""Triton calls in pieces and on states cut anywhere, refused calls, and the choice of configurations."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys

import pytest
import torch

import miras_kernels as mk
from miras_kernels.backends.reference import chunkwise
from miras_kernels.tables.retention import TABLE as GATES
from miras_kernels.testing import Case, evaluate, operands, relative_error
from miras_kernels.testing.parity import compare, judge, margin, spread
from quick import combinations, slow

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(
    ("memory", "every"),
    [("linear", 1), ("linear", 3), slow("linear", 100), slow("mlp", 1), slow("mlp", 3), slow("mlp", 100), ("mlp-lq-momentum", 3)],
)
def test_the_checkpoint_interval_does_not_change_a_bit(memory, every, monkeypatch):
    memory, *gated = memory.split("-")
    if memory == "mlp":  # groups of one segment
        monkeypatch.setattr("miras_kernels.backends.groups.MIN_GROUP", 1)
    size = {"linear": {"batch": 1}, "mlp": {"value_dim": 16, "heads": 1}}[memory]
    size |= {"retention": mk.LqRetention(), "momentum": True, "lengths": (50, 33)} if gated else {}
    case = Case("checkpoints", memory=memory, tokens=90, chunk_size=16, bias=mk.Huber("coordinate"), **size)
    inputs = case.draw(torch.float32, DEVICE)
    with mk.override(checkpoint_every=2):
        wanted = evaluate(inputs, "triton")
    with mk.override(checkpoint_every=every):
        found = evaluate(inputs, "triton")
    for name, x in wanted.items():
        assert torch.equal(found[name], x), name


def test_groups_of_packed_sequences_are_full(monkeypatch):
    """16 chunks of eight sequences, of which a group takes at least 8: three groups, since the host knows no lengths; not sixteen."""
    from miras_kernels.kernels.offline.compile import recorded

    monkeypatch.setattr("miras_kernels.backends.groups.MIN_GROUP", 8)
    case = Case("groups", memory="mlp", heads=1, value_dim=16, key_dim=16, hidden=16, lengths=(32,) * 8)
    launches = [x.kernel.__name__ for x in recorded(case.draw(torch.float32).call(), 1)]
    assert launches.count("mlp_chain_bwd") == launches.count("mlp_read_bwd") == 3


@pytest.mark.parametrize(
    ("memory", "bias", "lengths", "dtype"),
    combinations(
        ["linear", "mlp"], [mk.Huber("coordinate"), mk.DotProduct()], [None, (5, 40, 17)], [torch.float32, torch.bfloat16],
        quick=lambda memory, bias, lengths, dtype: lengths == dtype == (memory ^ bias),
    ),
    ids=lambda x: "batch" if x is None else "packed" if isinstance(x, tuple) else getattr(x, "name", str(x)),
)  # fmt: skip
def test_resuming_anywhere(memory, bias, lengths, dtype):
    """Calls on consecutive pieces, each from the state of the last, equal one call: cut at boundaries, inside chunks, across an end."""
    size = {"linear": {}, "mlp": {"value_dim": 16, "decay": "slight"}}[memory]
    assert_pieces_make_the_whole(Case("cut", memory=memory, bias=bias, tokens=62, batch=2, heads=1, lengths=lengths, **size), dtype)


@pytest.mark.parametrize("lengths", [slow(None), (5, 40, 17)], ids=str)
def test_resuming_anywhere_with_the_output_in_the_chain(lengths):
    from miras_kernels.kernels.common import configs

    with configs.fuse(True):
        assert_pieces_make_the_whole(Case("cut", bias=mk.Huber("coordinate"), tokens=62, batch=2, heads=1, lengths=lengths), torch.float32)


CUTS = {  # retention gates, momentum, decays by channel, in a batch or packed
    "lq-momentum": dict(retention=mk.LqRetention(), momentum=True),
    "kl-packed": dict(retention=mk.KLRetention(), lengths=(5, 40, 17)),
    "elastic-channels": dict(retention=mk.ElasticNetRetention(0.05), decay="channel", lr="channel"),
    "momentum-packed": dict(momentum=True, lengths=(5, 40, 17)),
    "sigmoid-channels-momentum": dict(retention=mk.SigmoidRetention(), decay="channel", momentum=True),
}


MLP_CUT = dict(memory="mlp", value_dim=16, decay="slight")
CUTS |= {
    "mlp-lq-momentum": dict(retention=mk.LqRetention(), momentum=True, **MLP_CUT),
    "mlp-kl-packed": dict(retention=mk.KLRetention(), lengths=(5, 40, 17), **MLP_CUT),
    "mlp-sigmoid-momentum-packed": dict(retention=mk.SigmoidRetention(), momentum=True, lengths=(5, 40, 17), **MLP_CUT),
}


@pytest.mark.parametrize("name", [slow(name) if "sigmoid" in name else name for name in CUTS])
def test_resuming_anywhere_under_a_gate(name):
    """The resumed chunk predicts with its start, and its read-out mixes phi(start) with the writes since then."""
    assert_pieces_make_the_whole(Case("cut", tokens=62, batch=1, heads=1, **CUTS[name]), torch.float32)


def assert_pieces_make_the_whole(case: Case, dtype: torch.dtype) -> None:
    """Checked against the whole call's error budget; the open chunk's tensors against that of the final state."""
    lengths, run = case.lengths, case.function
    inputs = case.draw(dtype, DEVICE, margin(case, operands("triton", dtype)))
    arguments = inputs.arguments()
    detach = lambda x: x.detach() if isinstance(x, torch.Tensor | mk.MemoryState) else tuple(map(detach, x)) if isinstance(x, tuple) else x
    arguments = {name: detach(x) for name, x in arguments.items()}
    whole, final = run(**arguments, backend="triton")
    tokens = ("q", "k", "v", "lr", "log_decay", "delta", "momentum")
    first = [0, *(torch.tensor(lengths).cumsum(0).tolist() if lengths else [62])]
    if lengths:  # every sequence in two pieces
        pieces = [[range(a, a + 3) for a in first[:-1]], [range(a + 3, b) for a, b in itertools.pairwise(first)]]
    else:
        pieces = [[range(a, b)] for a, b in [(0, 16), (16, 26), (26, 30), (30, 35), (35, 62)]]
    state, outs = arguments["initial_state"], torch.empty_like(whole)
    for piece in pieces:
        rows = torch.tensor([t for part in piece for t in part], device=DEVICE)
        part = {name: arguments[name][:, rows] for name in tokens if arguments[name] is not None}
        packed = torch.tensor([0, *(len(x) for x in piece)], device=DEVICE).cumsum(0) if lengths else None
        out, state = run(**{**arguments, **part, "initial_state": state, "cu_seqlens": packed}, backend="triton")
        outs[:, rows] = out
    reached = {"out": outs} | {f"final_dual_{i}": x for i, x in enumerate(state.dual)}
    reached |= {f"final_momentum_{i}": x for i, x in enumerate(state.momentum or ())}
    report = judge(inputs, reached, operands("triton", dtype))
    assert report.ok, report
    if final.open_chunk is not None:
        budget = {row.name: row.budget for row in report.rows}
        assert torch.equal(state.open_chunk.position, final.open_chunk.position)
        for i, (x, y) in enumerate(zip(state.open_chunk.start, final.open_chunk.start, strict=True)):
            assert relative_error(x, y) < 2 * budget[f"final_dual_{i}"]
        assert relative_error(state.open_chunk.log_decay, final.open_chunk.log_decay) < case.chunk_size * 2.0**-24


def test_sequences_at_different_positions_in_their_chunks():
    case = Case("positions", tokens=24, chunk_size=16, batch=3, bias=mk.L2())
    inputs = case.draw(torch.float32, DEVICE).arguments()
    inputs = {name: x.detach() if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
    open_at = torch.tensor([0, 5, 15], device=DEVICE)
    opened = mk.MemoryState((inputs["initial_state"],), None, _open_chunk(open_at, torch.randn_like(inputs["initial_state"])))
    results = lambda out, state: {"out": out} | {str(i): x for i, x in enumerate(state.tensors()) if x.is_floating_point()}
    wide = case.draw(torch.float32).to(torch.float64).call()
    wide = wide.replace(state=opened.map(lambda x: x.double().cpu() if x.is_floating_point() else x.cpu()))
    reference = lambda: results(*chunkwise.run(wide))
    found, state = mk.linear_memory(**{**inputs, "initial_state": opened}, backend="triton")
    report = compare(case, torch.float32, results(found, state), spread(reference(), reference))
    assert report.ok, report
    assert state.open_chunk.position.tolist() == [(p + case.tokens) % case.chunk_size for p in open_at.tolist()]


def _open_chunk(position, start):
    from miras_kernels.state import OpenChunk

    start = torch.where((position == 0)[:, None, None, None], torch.zeros_like(start), start)
    return OpenChunk(position, (start,), -torch.rand(start.shape[:2], device=start.device) * (position > 0)[:, None])


@pytest.mark.parametrize("shape", [(0, 8), (2, 0)], ids=["no sequence", "no token"])
def test_empty_inputs(shape):
    b, t = shape
    q, lr = torch.randn(b, t, 2, 16, device=DEVICE, requires_grad=True), torch.rand(b, t, 2, device=DEVICE, requires_grad=True)
    initial = torch.randn(b, 2, 16, 16, device=DEVICE, requires_grad=True)
    out, state = mk.linear_memory(q, q, q, lr, -lr, chunk_size=16, initial_state=initial, output_final_state=True, backend="triton")
    assert out.shape == q.shape and torch.equal(state.dual[0], initial)
    gradients = torch.autograd.grad(out.sum() + (state.dual[0] * 2).sum(), (q, lr, initial))
    assert all(g.shape == x.shape for g, x in zip(gradients, (q, lr, initial), strict=True))
    assert (gradients[2] == 2).all()


# ---------------------------------------------------------------------------------------------------------------- dispatch


def refusal(**changes) -> str:
    case = Case("refused", **{"tokens": 8, "batch": 1, "heads": 1, **changes})
    run = case.function
    with pytest.raises(ValueError) as caught:
        run(**case.draw(torch.float32, DEVICE).arguments(), backend="triton")
    return str(caught.value)


def test_refusals_name_the_limit():
    assert "chunk_size is limited to 128, got 200" in refusal(chunk_size=200)
    assert "head dimensions are limited to 256, got 264" in refusal(key_dim=264)
    assert "head dimensions are limited to 256, got 257" in refusal(value_dim=257)
    mlp = dict(memory="mlp", key_dim=16, value_dim=16)
    assert "chunk_size must be one of 16, 32, 64 for an MLP memory, got 128" in refusal(chunk_size=128, **mlp)
    assert "head dimensions are limited to 128, got 136" in refusal(memory="mlp", key_dim=136, value_dim=136)
    assert "hidden sizes are limited to 1024, got 1025" in refusal(hidden=1025, **mlp)


def test_auto_falls_back_to_another_backend():
    """``"auto"`` takes a backend that serves the call, and `explain` says why triton does not."""
    case = Case("other", tokens=8, batch=1, heads=1, chunk_size=200)
    arguments = case.draw(torch.float32, DEVICE).arguments()
    reasons = mk.explain(**arguments)
    assert "chunk_size is limited to 128" in reasons["triton"]
    assert mk.linear_memory(**arguments)[0].shape == arguments["v"].shape


def test_a_denied_configuration_is_not_used(monkeypatch):
    from miras_kernels.kernels.common import configs

    key = configs.Key(64, 64, 64, 2, False)
    first, second = configs.eligible("linear_chain_fwd", key)
    monkeypatch.setattr(configs, "toolchain", lambda architecture: ("3.6.0", "12.8"))
    monkeypatch.setattr(configs, "DENIED", (configs.Denial("sm_90", "3.6", "12.", "linear_chain_fwd", str(first), "wrong"),))
    assert configs.choose("linear_chain_fwd", key, "sm_90") == second
    assert configs.choose("linear_chain_fwd", key, "sm_80") == first
    monkeypatch.setattr(configs, "DENIED", (configs.Denial("sm_9", "3.5", "", "linear_chain_fwd", str(first), "wrong"),))
    assert configs.choose("linear_chain_fwd", key, "sm_90") == first
    monkeypatch.setattr(
        configs, "DENIED", tuple(configs.Denial("sm_90", "", "", "linear_chain_fwd", str(c), "wrong") for c in (first, second))
    )
    with pytest.raises(ValueError, match=r"linear_chain_fwd: no configuration for .* on sm_90: .*wrong"):
        configs.choose("linear_chain_fwd", key, "sm_90")
    with configs.force("linear_chain_fwd", configs.Config(8, 8, 1, 1)), pytest.raises(ValueError, match="does not serve"):
        configs.choose("linear_chain_fwd", key)


def test_configurations_are_few_and_serve_every_key():
    from miras_kernels.kernels.common import configs

    assert all(len(rules) <= 8 for rules in configs.KERNELS.values())
    assert {field.name for field in dataclasses.fields(configs.Key)} == {
        "key_dim", "value_dim", "chunk_size", "itemsize", "coupled", "hidden", "gated", "matrix_coupled", "momentum", "channels", "exact",
        "keyed",
    }  # fmt: skip
    sizes = (1, 16, 33, 64, 96, 128, 200, 256)
    keys = list(itertools.starmap(configs.Key, itertools.product(sizes, sizes, configs.CHUNK_SIZES, (2, 4), (False, True))))
    for key, gate, momentum, channels in itertools.product(keys[::7], GATES.values(), (False, True), (False, True)):
        traits = dict(gated=not gate.is_identity, matrix_coupled=gate.matrix_coupled)
        keys.append(dataclasses.replace(key, momentum=momentum, channels=channels, **traits))
    keys += [dataclasses.replace(key, exact=True) for key in keys if key.chunk_size in (32, 64) and not (key.coupled or key.gated)]
    for key in keys:
        for kernel in configs.KERNELS:
            chain = kernel.removesuffix("_streamed")
            if chain in ("linear_chain_fwd", "linear_chain_bwd") and key.streams(chain) != kernel.endswith("_streamed"):
                continue
            if kernel.endswith("_fused") and not key.fusable:
                assert not configs.eligible(kernel, key)
                continue
            config = configs.choose(kernel, key)
            assert config == configs.eligible(kernel, key)[0]
            if key.coupled and kernel in ("linear_chain_fwd", "linear_chain_bwd"):
                assert key.blocks(config)[0] == key.padded_v


def test_importing_the_package_does_not_import_triton():
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, miras_kernels as mk\n"
        "q, lr = torch.randn(1, 20, 2, 8), torch.rand(1, 20, 2)\n"
        "out, _ = mk.linear_memory(q, q, q, lr, chunk_size=16)\n"
        "assert 'triton' in mk.explain(q, q, q, lr)['triton']\n"
        "try:\n    mk.linear_memory(q, q, q, lr, chunk_size=16, backend='triton')\n"
        "except ValueError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "'triton' cannot serve this call: " in done.stdout
