"""The C++ kernels against the float64 reference, over every case they serve."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import threading

import pytest
import torch

import miras_kernels as mk
import vectors
from miras_kernels import dispatch
from miras_kernels.backends.reference import chunkwise
from miras_kernels.decode import buffers
from miras_kernels.memory import run
from miras_kernels.tables import memories
from miras_kernels.testing import Case, check, evaluate, registry
from miras_kernels.testing.case_list import BIASES, GATES
from miras_kernels.testing.parity import compare, spread
from miras_kernels.validation import make_call
from quick import combinations, or_slow, sample, slow
from served import CHANNELS, DELTA, MLP, SERVED, TOGETHER


def instruction_sets(case: Case) -> list[str]:
    """The best one of this machine and one other, which changes from case to case: code paths of the same binary."""
    from miras_kernels import _C

    best, *others = _C.cpu_capabilities()
    return [best, *others[SERVED.index(case) % max(1, len(others)) :][:1]]


#: slow cases; smaller ones of the same kinds are quick
LARGE = ("channels-wide", "linear-largest-huber_switch", "linear-largest-huber_coordinate", "mlp-lq-momentum-common")


@pytest.mark.parametrize(
    "case", or_slow(SERVED, [case for case in (*registry()[1::2], *sample(SERVED), *TOGETHER, *DELTA) if case.name not in LARGE])
)
def test_float32(case, poisoned, monkeypatch):
    from miras_kernels import _C

    for level in instruction_sets(case):
        monkeypatch.setenv("MIRAS_CPU_CAPABILITY", level)  # the kernels read it in every call
        assert _C.cpu_capability() == level
        report = check(case, "cpp")
        assert report.ok, f"{level}: {report}"


@pytest.mark.parametrize("case", or_slow(SERVED[::2], [case for case in SERVED[::8] if case.name not in LARGE]))
def test_bfloat16(case, poisoned):
    report = check(case, "cpp", torch.bfloat16)
    assert report.ok, report


PAIRS = "avx512_bf16"


@pytest.fixture
def pairs(monkeypatch):
    """The instruction set that multiplies bfloat16 numbers; it is taken only by name."""
    from miras_kernels import _C

    assert PAIRS not in _C.cpu_capabilities()
    if PAIRS not in _C.cpu_capabilities_by_name():
        with pytest.raises(ValueError, match=f"MIRAS_CPU_CAPABILITY: expected one of .*, got '{PAIRS}'"):
            monkeypatch.setenv("MIRAS_CPU_CAPABILITY", PAIRS)
            _C.cpu_capability()
        pytest.skip(f"this CPU, or the compiler that built the kernels, has no {PAIRS}")
    monkeypatch.setenv("MIRAS_CPU_CAPABILITY", PAIRS)


FEW = ("linear-huber_norm-odd", "lq3-channels", "kl-momentum-packed", "mlp-huber_norm", "mlp-lq3-momentum-odd")
IN_PAIRS = [case for case in SERVED if not case.variants and case.name not in LARGE]
IN_PAIRS = [case for i, case in enumerate(IN_PAIRS) if i % 2 == 0 or case.name in FEW]


@pytest.mark.parametrize("case", or_slow(IN_PAIRS, [case for case in IN_PAIRS if case.name in FEW]))
def test_products_in_bfloat16(case, poisoned, pairs):
    report = check(case, "cpp", torch.bfloat16)
    assert report.ok, report


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("changes", [{}, {"chunk_size": 1}, MLP], ids=str)
def test_what_is_multiplied_in_bfloat16(changes, dtype, pairs, monkeypatch):
    """Chunks with bfloat16 inputs; everything else, exact steps in blocks too, has the bits of avx512."""
    inputs = Case("levels", tokens=40, **changes).draw(dtype)
    found = evaluate(inputs, "cpp")
    monkeypatch.setenv("MIRAS_CPU_CAPABILITY", "avx512")
    same = [torch.equal(x, found[name]) for name, x in evaluate(inputs, "cpp").items()]
    assert not any(same) if dtype == torch.bfloat16 and "chunk_size" not in changes else all(same)


def test_an_unknown_instruction_set_is_an_error():
    program = "from miras_kernels import _C; _C.cpu_capability()"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, "MIRAS_CPU_CAPABILITY": "mmx"}
    )
    assert done.returncode != 0
    assert "MIRAS_CPU_CAPABILITY" in done.stderr and "mmx" in done.stderr and "portable" in done.stderr


def test_the_extension_has_the_packages_buffers_and_limits():
    from miras_kernels import _C

    assert tuple(_C.step_buffers()) == buffers.NAMES
    for row in (memories.LINEAR, memories.MLP):
        for limits in row.kernels["cpp"][:2]:
            given = {name: x for name, x in limits._asdict().items() if x is not None}
            assert given == {name: _C.limits()[name] for name in given}
    assert _C.limits()["bias_parameters"] == mk.biases.Bias.MAX_PARAMETERS
    assert _C.limits()["retention_parameters"] == mk.retention.Retention.MAX_PARAMETERS


@pytest.mark.parametrize("path", vectors.FILES, ids=lambda p: p.stem)
def test_vectors(path):
    """Within the effect of rounding on the file's numbers and on a run with them."""
    config, tensors = vectors.load(path)
    memory = memories.TABLE[config["memory"]]

    def results(tensors: dict, run) -> dict:
        keywords, leaves = vectors.arguments(config, tensors)
        return vectors.results(*run(keywords), tensors, leaves)

    by_chunks = lambda keywords: chunkwise.run(make_call(memory, **keywords))
    found = results({name: x.float() for name, x in tensors.items()}, lambda keywords: run(memory, **keywords, backend="cpp"))
    exact = {name: tensors[name] for name in found}
    budgets = spread(exact, lambda: results({name: x * 1 for name, x in tensors.items()}, by_chunks))
    report = compare(Case(path.stem), torch.float32, found, budgets)
    assert report.ok, report


@pytest.mark.parametrize("case", SERVED[::9], ids=str)
@pytest.mark.parametrize("every", [1, 2, 3, 100])
def test_fewer_checkpoints_change_nothing(case, every):
    inputs = case.draw(torch.float32)
    with mk.override(checkpoint_every=1):
        wanted = evaluate(inputs, "cpp")
    with mk.override(checkpoint_every=every):
        found = evaluate(inputs, "cpp")
    for name, x in wanted.items():
        assert torch.equal(found[name], x), name


@pytest.mark.parametrize("memory, momentum", [("linear", False), ("linear", True), ("mlp", False), ("mlp", True)])
def test_memory_of_checkpoints_follows_the_option(memory, momentum):
    case = Case("checkpoints", memory=memory, momentum=momentum, tokens=512, chunk_size=16, key_dim=32, value_dim=32)
    inputs = case.draw(torch.float32)
    sizes = {}
    for every in (1, 2, 4):
        seen, given = set(), {t.data_ptr() for t in inputs.leaves().values()}

        def pack(x, seen=seen, given=given):
            if x.data_ptr() not in given:
                seen.add((x.data_ptr(), x.numel()))
            return x

        with mk.override(checkpoint_every=every), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            getattr(mk, f"{memory}_memory")(**{**inputs.arguments(), "output_final_state": False}, backend="cpp")
        sizes[every] = sum(n for _, n in seen)
    numbers = (2 if momentum else 1) * (case.key_dim * case.value_dim if memory == "linear" else 2 * case.key_dim * case.hidden)
    states = case.batch * case.heads * (case.tokens // case.chunk_size) * numbers
    kept = 0 if memory == "linear" else case.batch * case.heads * case.tokens * (2 * case.key_dim + case.chunk_size)
    assert sizes == {every: states // every + kept for every in sizes}


def test_scratch_is_taken_once():
    """The MLP's as docs/benchmarks.md states it, in a new thread, which has none yet."""
    from miras_kernels import _C

    case = Case("scratch", memory="mlp", batch=1, heads=2, tokens=256, chunk_size=16, key_dim=64, value_dim=64, hidden=256)
    inputs, sizes = case.draw(torch.float32), []
    d, hd, c, n = case.key_dim, case.hidden, case.chunk_size, 64 // case.chunk_size

    def train():
        sizes[:] = [_C.scratch_bytes(), *((evaluate(inputs, "cpp"), _C.scratch_bytes())[1] for _ in range(2))]

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    stated = 4 * (d * hd * (2 * n + 3) + hd * c * (4 * n + 3) + c * d * (n + 27) + 10 * c * c)
    assert sizes[0] == 0 and sizes[1] == sizes[2]
    assert stated <= sizes[1] < 1.05 * stated


def couples(case: Case) -> bool:
    """Whether the bias or the retention gate couples the value rows of a linear memory."""
    return case.bias.row_coupled or case.retention.matrix_coupled


@pytest.mark.parametrize("case", SERVED[::7], ids=str)
def test_bitwise_repeatable(case):
    """With the same number of threads, and with more, unless these share out value rows (linear, not coupled, fewer heads than threads)."""
    before, results = torch.get_num_threads(), []
    inputs = case.draw(torch.float32)
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            first, again = evaluate(inputs, "cpp"), evaluate(inputs, "cpp")
            for name, x in first.items():
                assert torch.equal(x, again[name]), name
            if case.memory == "mlp" or couples(case) or threads <= max(1, case.sequences * case.heads):
                results.append(first)
    finally:
        torch.set_num_threads(before)
    for name, x in results[0].items():
        assert all(torch.equal(x, other[name]) for other in results[1:]), name


#: large enough to be shared by several threads
SHARED = dict(memory="mlp", batch=1, heads=1, tokens=150, chunk_size=64, key_dim=40, value_dim=40, hidden=112)
#: two parts, three of unequal value rows, and chunks of which the last has less than a block of tokens
SHARED_LINEAR = dict(batch=1, heads=1, tokens=135, chunk_size=64, key_dim=40, value_dim=104)
NORM = mk.Huber("norm")
COUPLED = mk.CustomBias("e * (1 + delta / sqrt(norm2 + eps))", eps=1e-6)
SOFT = mk.CustomRetention("tanh(A)")
LQ = mk.LqRetention(1.5)


@pytest.mark.parametrize(
    "changes",
    [
        dict(**SHARED, bias=NORM),
        slow(dict(**SHARED | dict(chunk_size=33), momentum=True)),
        slow(dict(**SHARED, bias=NORM, dtype=torch.bfloat16, pairs=True)),
        slow(dict(**SHARED | dict(chunk_size=33, hidden=101), retention=LQ, momentum=True, dtype=torch.bfloat16, pairs=True)),
        slow(dict(**SHARED, retention=mk.KLRetention(), momentum=True)),
        slow(dict(**SHARED | dict(hidden=256), retention=LQ, lengths=(150,))),
        dict(**SHARED_LINEAR, bias=NORM, momentum=True),
        slow(dict(**SHARED_LINEAR, bias=NORM, dtype=torch.bfloat16)),
        slow(dict(**SHARED_LINEAR, bias=NORM, momentum=True, dtype=torch.bfloat16, pairs=True)),
        slow(dict(**SHARED_LINEAR, retention=LQ, dtype=torch.bfloat16, pairs=True)),
        slow(dict(**SHARED_LINEAR, bias=mk.Huber("switch"), delta="float")),
        slow(dict(**SHARED_LINEAR, bias=mk.RobustL2(), retention=mk.KLRetention(), lengths=(135,))),
        slow(dict(**SHARED_LINEAR, bias=mk.RobustL2(), retention=SOFT, momentum=True, decay="none")),
        slow(dict(**SHARED_LINEAR | dict(chunk_size=48), bias=COUPLED, retention=mk.ElasticNetRetention(0.05))),
        slow(dict(**SHARED_LINEAR, bias=NORM, decay="channel", lr="channel")),
        dict(**SHARED_LINEAR, retention=LQ),
        slow(dict(**SHARED_LINEAR, retention=mk.LqRetention(4.0), momentum=True, bias=mk.RobustL2(), dtype=torch.bfloat16)),
        slow(dict(**SHARED_LINEAR, retention=LQ, momentum=True, decay="channel", lr="channel")),
    ],
    ids=str,
)
def test_threads_that_share_a_head(changes, request):
    """One head of an MLP memory, or of a linear one with coupled value rows: the same bits for any number of threads, within the budget."""
    changes = dict(changes)
    dtype = changes.pop("dtype", torch.float32)
    if changes.pop("pairs", False):
        request.getfixturevalue("pairs")
    case, before, results = Case("shared", **changes), torch.get_num_threads(), []
    inputs = case.draw(dtype)
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results.append(evaluate(inputs, "cpp"))
        report = check(case, "cpp", dtype)
        assert report.ok, report
    finally:
        torch.set_num_threads(before)
    for name, x in results[0].items():
        assert all(torch.equal(x, other[name]) for other in results[1:]), name


VARIANTS = {
    **{bias.name: dict(bias=bias) for bias in BIASES.values()},
    **{gate.name: dict(retention=gate) for gate in GATES.values() if gate.tag},
    "momentum": dict(momentum=True),
    "delta-rule": dict(chunk_size=1, decay="key", decay_first=True, erase_k=True),
    "channels": dict(bias=mk.Huber(), **CHANNELS),
    "all": dict(bias=mk.Huber(), retention=mk.KLRetention(), momentum=True, **CHANNELS),
}


@pytest.mark.parametrize(
    ("shape", "variant"),
    combinations([(1, 1), (1, 3), (3, 1)], list(VARIANTS), quick=lambda shape, variant: variant % 3 == shape),
    ids=str,
)
def test_any_number_of_threads(variant, shape):
    """With fewer heads than threads the value rows are split; the result stays within the budget."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        shape = dict(batch=shape[0], heads=shape[1], key_dim=64, value_dim=96, tokens=70, chunk_size=32)
        case = Case("threads", **{**shape, **VARIANTS[variant]})
        report = check(case, "cpp")
        assert report.ok, report
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("chunk_size", [1, 7, 16, 64])
def test_hidden_units_that_do_nothing(chunk_size):
    """Units whose column of W1 and row of W2 are zero stay zero and change neither outputs nor other gradients."""
    inputs = Case("padded", **MLP, chunk_size=chunk_size).draw(torch.float32)
    pad = lambda x, dim, n=9: torch.cat([x.detach(), torch.zeros_like(x.narrow(dim, 0, n))], dim)
    both = lambda pair: (pad(pair[0], 3), pad(pair[1], 2))
    duals = tuple(x.requires_grad_() for x in both(inputs.duals))
    wanted = evaluate(inputs, "cpp")
    found = evaluate(dataclasses.replace(inputs, duals=duals, grad_duals=both(inputs.grad_duals)), "cpp")
    for name, x in wanted.items():
        if "dual" in name:
            dim = 3 if name.endswith("0") else 2
            if name.startswith("final"):
                assert not found[name].narrow(dim, 24, 9).any()
            found[name] = found[name].narrow(dim, 0, 24)
        assert torch.equal(found[name], x), name


def test_the_flush_to_zero_mode_stays_inside_the_kernels():
    case = Case("denormals", decay="strong")
    inputs = case.draw(torch.float32)
    tiny = torch.tensor([1e-40])
    assert (tiny * 0.5).item() != 0
    evaluate(inputs, "cpp")
    assert (tiny * 0.5).item() != 0


PLANTED = {
    "linear": (Case("planted", tokens=48), "log_decay"),
    "channels": (Case("planted", tokens=48, momentum=True, decay="channel", lr="channel"), "log_decay"),
    "momentum": (Case("planted", tokens=48, retention=mk.KLRetention(), momentum=True), "momentum"),
    "lq": (Case("planted", tokens=48, retention=mk.LqRetention(1.5)), "retention"),
    "mlp": (Case("planted", tokens=48, **MLP), "log_decay"),
    "mlp-momentum": (Case("planted", tokens=48, retention=mk.ElasticNetRetention(0.05), momentum=True, **MLP), "momentum"),
    "mlp-lq": (Case("planted", tokens=48, retention=mk.LqRetention(1.5), **MLP), "retention"),
}


@pytest.mark.parametrize("name", [name if name in ("linear", "mlp-momentum") else slow(name) for name in PLANTED])
def test_a_planted_bug_is_caught(monkeypatch, name):
    """The comparison can fail: a gate that is slightly too weak is found, and a gradient that is too large."""
    case, gate = PLANTED[name]
    backend = dispatch.BACKENDS["cpp"]
    assert check(case, "cpp").ok
    forward, backward = backend.forward, backend.backward

    def weaker(call, every):
        return forward(call.replace(**{gate: mk.LqRetention(1.51) if gate == "retention" else getattr(call, gate) * 0.99}), every)

    with monkeypatch.context() as patch:
        patch.setattr(backend, "forward", weaker)
        report = check(case, "cpp")
        assert not report.ok and not {r.name: r for r in report.rows}["out"].ok
    inputs = case.draw(torch.float32)
    for leaf in inputs.leaves():
        matrix = leaf.startswith("initial_")
        place = [n for n in inputs.leaves() if n.startswith("initial_")].index(leaf) if matrix else None

        def wrong(*args, leaf=leaf, place=place):
            grads = backward(*args)
            if place is None:
                grads[leaf] = grads[leaf] * 1.001
            else:
                grads["state"] = [x * 1.001 if i == place else x for i, x in enumerate(grads["state"])]
            return grads

        with monkeypatch.context() as patch:
            patch.setattr(backend, "backward", wrong)
            report = check(case, "cpp")
            assert {r.name for r in report.rows if not r.ok} == {f"grad_{leaf}"}
