"""The CUDA C++ kernels, compiled by nvcc: their PTX executed on the CPU (tests/ptx), where any fault that is reported fails a test; and
compiled for chips that need not be present. With a GPU and a built library, comparisons run on the GPU too.
"""

from __future__ import annotations

import functools
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import expressions
import miras_kernels as mk
from assembled import NVCC, assembled, build, compiled
from decoding import LONG, PAIRS, SHAPES, assert_right, at_different_places, unavailable
from miras_kernels import dispatch
from miras_kernels.backends import cuda as cuda_backend
from miras_kernels.backends.cuda import CudaBackend
from miras_kernels.backends.reference import chunkwise
from miras_kernels.memory import FUNCTIONS
from miras_kernels.tables import memories
from miras_kernels.tables.memories import Kernels, Limits
from miras_kernels.tables.retention import TABLE as GATES
from miras_kernels.testing import Case
from miras_kernels.testing.steps import before, check_results, cut, decoder, results
from not_finite import TRITON, assert_as_in_the_reference
from ptx import cuda as machine
from ptx.host import Launch
from ptx.test_deleted import assert_reported
from quick import or_slow, sample, slow

needs_nvcc = pytest.mark.skipif(NVCC is None, reason="there is no nvcc here")


@pytest.fixture(scope="session")
def built() -> tuple[Path, dict[str, str]]:
    if NVCC is None:
        pytest.skip("there is no nvcc here")
    return machine.build(NVCC)


@pytest.fixture
def cuda(built, monkeypatch) -> Iterator[CudaBackend]:
    """The "cuda" backend, for CPU tensors, on the machine."""
    with machine.on_machine(built) as backend:
        monkeypatch.setitem(dispatch.BACKENDS, "cuda", backend)
        assert backend.unavailable() is None
        yield backend


on_cpu = functools.partial(assert_right, backend="cuda", device="cpu")


@pytest.mark.parametrize("case", or_slow(PAIRS, sample(PAIRS)[::2]))
def test_steps(case, cuda):
    """Two tokens that end a chunk of 16, and the first token of the next."""
    on_cpu(case, cuts=[14, 16, 17])


@pytest.mark.parametrize("name", SHAPES)
def test_sizes(name, cuda):
    on_cpu(SHAPES[name], cuts=[15, 16, 17])


@pytest.mark.parametrize("memory", LONG)
def test_chunks_of_many_tokens(memory, cuda):
    on_cpu(LONG[memory], cuts=[60, 68, 70, 71])


LARGEST = [
    Case("largest", batch=1, heads=1, key_dim=256, value_dim=256, momentum=True, retention=GATES[2], seed=1),
    Case("largest-coupled", batch=1, heads=1, key_dim=255, value_dim=255, bias=mk.RobustL2(), retention=GATES[1], seed=2),
    Case("largest-mlp", memory="mlp", batch=1, heads=1, key_dim=128, value_dim=128, hidden=1024, seed=3),
    Case("odd-mlp", memory="mlp", batch=1, heads=1, key_dim=127, value_dim=127, hidden=33, retention=GATES[4], momentum=True, seed=4),
]


@pytest.mark.parametrize("case", or_slow(LARGEST, LARGEST[3:]))
def test_largest(case, cuda):
    on_cpu(case, cuts=[15, 16, 17])


EXPRESSIONS = dict(
    expressions.pairs("linear", batch=1, heads=1, key_dim=8, value_dim=9, tokens=17)
    + expressions.pairs("mlp", memory="mlp", batch=1, heads=1, key_dim=8, value_dim=8, hidden=10, tokens=17, momentum=True)
)


@pytest.mark.parametrize("case", or_slow([*EXPRESSIONS], [*EXPRESSIONS][::5]))
def test_same_steps_as_the_built_in_row(case, cuda):
    """Biases and gates written as expressions, which the kernels interpret."""
    report = expressions.check_same_steps((case, EXPRESSIONS[case]), "cuda", [14, 16, 17])
    assert report.ok, report


def test_an_expression_of_too_many_values_is_refused(cuda):
    text = "e"
    for i in range(34):  # every tanh is kept until the sum on its right is known
        text = f"tanh({i + 1} * e) + ({text})"
    call = Case("many", bias=mk.CustomBias(text), tokens=1).draw(torch.float32).call()
    assert "32 registers" in cuda.refuses_steps(call)


@pytest.mark.parametrize("memory", ["linear", "mlp"])
@pytest.mark.parametrize("expression", [dict(bias=mk.CustomBias("tanh(e)")), dict(retention=mk.CustomRetention("tanh(A)"))])
def test_expressions_are_decoded_only(memory, expression, cuda):
    case = Case("chunks", memory=memory, batch=1, heads=1, tokens=128, key_dim=64, value_dim=64, hidden=256, chunk_size=64, **expression)
    assert cuda.refuses(case.draw(torch.bfloat16).call(), differentiate=False) is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("memory", ["linear", "mlp"])
def test_sixteen_bits(memory, dtype, cuda):
    """Tokens of 16 bits, a state of 32: only outputs are rounded."""
    case = Case("sixteen", memory=memory, batch=1, heads=2, value_dim=16, hidden=20, momentum=True, layout="fused")
    on_cpu(case, cuts=[15, 16, 17], dtype=dtype)


@pytest.mark.parametrize("memory", ["linear", "mlp"])
def test_sequences_at_different_places(memory, cuda):
    at_different_places("cuda", memory, "cpu")


@pytest.mark.parametrize("kind", ["clip", "power-elastic"])
def test_nan_is_kept(kind, cuda):
    assert_as_in_the_reference(TRITON[kind], "cuda", 3, 1, gradients=False)


@pytest.mark.skipif(unavailable("cuda") != "", reason=f"cuda: {unavailable('cuda')}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_gpu(dtype, poisoned):
    """The library that was built, across the end of a chunk."""
    for case in (*SHAPES.values(), *LONG.values(), *LARGEST):
        c = case.chunk_size
        assert_right(case, "cuda", sorted({max(0, c - 3), c - 1, c, c + 2}), dtype, "cuda")


def test_a_number_for_delta_may_change(cuda):
    case = Case("threshold", batch=1, heads=1, key_dim=8, value_dim=8, bias=mk.Huber("coordinate"), delta="float")
    inputs = case.draw(torch.float32)
    arguments = inputs.arguments()
    with torch.no_grad():
        _, state = mk.linear_memory(**{**arguments, **cut(arguments, 0, 5)}, backend="reference")
        reader, thresholds = decoder(case, arguments, state, "cuda"), {5: 0.7, 6: 0.01, 7: 0.7}
        found = [reader.step(**{**cut(arguments, t, t + 1), "delta": delta}) for t, delta in thresholds.items()]

        def wanted(call):
            delta = call.delta.clone()
            for t, x in thresholds.items():
                delta[:, t] = x
            return {"out": chunkwise.run(call.replace(delta=delta))[0][:, 5:]}

        check_results(before(inputs, 8), {"out": torch.cat(found, 1)}, wanted)


# ---------------------------------------------------------------------------------------------------------------- dispatch


@pytest.mark.parametrize("memory", ["linear", "mlp"])
def test_the_public_functions_use_it_for_short_inputs(memory, cuda):
    case = Case("short", memory=memory, tokens=20, batch=2, key_dim=8, value_dim=8, hidden=12, decay="scalar", momentum=True)
    run = FUNCTIONS[memory]
    inputs = case.draw(torch.float32)
    arguments = inputs.arguments()
    with torch.no_grad():
        _, state = run(**{**arguments, **cut(arguments, 0, 15)}, backend="reference")
        for a, b in ((15, 16), (16, 18)):
            found, state = run(**{**arguments, **cut(arguments, a, b), "initial_state": state}, backend="cuda")
            last = lambda out, state, n=b - a: results(out[:, -n:], state)
            check_results(before(inputs, b), results(found, state), lambda call, last=last: last(*chunkwise.run(call)))


def test_refusals_name_the_reason(cuda):
    case = Case("refused", tokens=5, batch=1, heads=1)
    arguments = case.draw(torch.float32).arguments()
    with pytest.raises(ValueError, match="'cuda' cannot serve this call: it reads chunks of bfloat16 or float16 inputs"):
        mk.linear_memory(**arguments, backend="cuda")
    one = {name: x[:, :1] for name, x in (("q", arguments["q"]), ("k", arguments["k"]), ("v", arguments["v"]))}
    assert cuda.refuses(Case("one", tokens=1).draw(torch.float32).call(), False) is None
    assert "float32, bfloat16 or float16 inputs, got torch.float64" in cuda.refuses_steps(case.draw(torch.float64).call())
    wide = torch.zeros(1, 1, 1, 257)
    assert "limited to 256, got 257" in cuda.refuses(case.draw(torch.float32).call().replace(**{**one, "q": wide, "k": wide}), False)
    mlp = Case("mlp", memory="mlp", key_dim=129, value_dim=129, tokens=1, batch=1, heads=1, hidden=1025).draw(torch.float32).call()
    assert "limited to 128, got 129" in cuda.refuses(mlp, False)
    narrow = torch.zeros(1, 1, 1, 8)
    assert "hidden sizes are limited to 1024, got 1025" in cuda.refuses(mlp.replace(q=narrow, k=narrow, v=narrow), False)


def test_a_missing_library_is_explained(tmp_path, monkeypatch):
    missing = CudaBackend(tmp_path / "none.so", "cpu")
    monkeypatch.setitem(sys.modules, "miras_kernels._build_info", type(sys)("_build_info"))
    assert missing.unavailable() == "the kernels are not built: the package was installed without them"
    sys.modules["miras_kernels._build_info"].CUDA_MISSING = "there was no nvcc"
    assert missing.unavailable() == "the kernels are not built: there was no nvcc"
    (tmp_path / "broken.so").write_text("nothing")
    assert "cannot be loaded" in CudaBackend(tmp_path / "broken.so", "cpu").unavailable()


def test_a_library_of_other_sources_is_refused(built, monkeypatch):
    """The library tells the struct's layout, the names of its buffers and its limits; all must be those of this package."""
    assert CudaBackend(built[0], "cpu").unavailable() is None
    for owner, name, other in (
        (cuda_backend.Step, "layout", lambda: [1, *cuda_backend.Step.__dict__["MARKS"]]),
        (cuda_backend, "BUFFERS", cuda_backend.BUFFERS[::-1]),
        (type(memories.MLP), "kernels", {"cuda": Kernels(None, Limits(128, 2048), few=4)}),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, other)
            assert "built from other sources" in CudaBackend(built[0], "cpu").unavailable()


def test_every_field_is_marked_or_beside_a_marked_one():
    """A field that is added to one struct alone moves a mark or changes the size: every kind of field has marks at its ends."""
    names = [name for name, _ in cuda_backend.Step._fields_]
    assert set(cuda_backend.Step.MARKS) <= set(names)
    assert {names[0], names[-1]} <= set(cuda_backend.Step.MARKS)


# ---------------------------------------------------------------------------------------------------------------- barriers

COUPLED = dict(batch=1, heads=2, key_dim=32, value_dim=32, hidden=40, retention=mk.KLRetention(), bias=mk.Huber("norm"))


@pytest.mark.parametrize("memory", [slow("linear"), slow("mlp")])
def test_a_deleted_barrier_is_reported_or_had_nothing_to_do(memory, built, monkeypatch):
    """Of the steps that end a chunk and begin the next, as for the Triton kernels."""
    launches: dict[str, Launch] = {}
    with machine.on_machine(built, before=lambda x: launches.setdefault(x.entry, x.copy())) as backend:
        monkeypatch.setitem(dispatch.BACKENDS, "cuda", backend)
        on_cpu(Case("barriers", memory=memory, **COUPLED), cuts=[15, 16, 17])
    assert "bar.sync" in set().union(*map(assert_reported, launches.values()))


# ---------------------------------------------------------------------------------------------------------------- compiled


@pytest.mark.slow
@needs_nvcc
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize(("source", "kernels"), [("linear_step.cu", 2), ("mlp_step.cu", 3)])
def test_nothing_spills(source, kernels, architecture):
    said = assembled(source, architecture)
    registers = [int(x) for x in re.findall(r"Used (\d+) registers", said)]
    assert len(registers) == 2 * kernels and max(registers) <= 255
    stores = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert len(stores) >= len(registers) and set(stores) == {("0", "0", "0")}, said


@pytest.mark.slow
@needs_nvcc
def test_the_library_builds_and_loads(tmp_path, monkeypatch):
    """It has this package's struct, also without a GPU, and stays small. (Its objects serve other tests too.)"""
    library = tmp_path / "_cuda.so"
    monkeypatch.setattr(build, "compile_source", lambda compiler, source, to, *options: shutil.copy(compiled(source) / "x.o", to))
    build.build(library)
    assert library.stat().st_size < 20e6
    backend = CudaBackend(library)
    assert backend._loaded[1] is None
    assert backend.unavailable() == (None if torch.cuda.is_available() else "there is no GPU here")
