"""The CUDA C++ kernels: their sources on the CPU in a small emulator of CUDA, and compiled for chips that need not be present.

With a GPU and a built library, the same comparisons run on the GPU.
"""

from __future__ import annotations

import ctypes
import functools
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import miras_kernels as mk
from decoding import LONG, PAIRS, SHAPES, assert_right, at_different_places, run, unavailable
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
from quick import or_slow, sample, slow

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc" / "cuda"
EMULATOR = Path(__file__).resolve().parent / "cuda_emulator"
NVCC = runpy.run_path(str(SOURCES / "build.py"))["nvcc"]()


def compiled(source: Path, folder: Path) -> Path:
    """A source compiled for the CPU."""
    flags = ["-std=c++17", "-O1", "-fPIC", f"-I{EMULATOR}", "-iquote", str(SOURCES), "-w", "-x", "c++"]
    target = folder / f"{source.stem}.o"
    subprocess.run(["g++", *flags, "-c", str(source), "-o", str(target)], check=True)
    return target


def linked(objects: dict[str, Path], folder: Path) -> CudaBackend:
    """The kernels for CPU tensors."""
    library = folder / "emulated.so"
    subprocess.run(["g++", "-shared", *map(str, objects.values()), "-o", str(library)], check=True)
    return CudaBackend(library, "cpu")


@pytest.fixture(scope="session")
def objects(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("cuda")
    return {path.name: compiled(path, folder) for path in [*sorted(SOURCES.glob("*.cu")), EMULATOR / "order.cpp"]}


@pytest.fixture(scope="session")
def library(objects, tmp_path_factory) -> CudaBackend:
    return linked(objects, tmp_path_factory.mktemp("cuda"))


def changed(objects: dict[str, Path], source: str, before: str, after: str, folder: Path) -> CudaBackend:
    """The kernels with a text of a source replaced by another."""
    text = (SOURCES / source).read_text()
    assert before in text
    (folder / source).write_text(text.replace(before, after))
    return linked({**objects, source: compiled(folder / source, folder)}, folder)


@pytest.fixture
def cuda(library, monkeypatch) -> CudaBackend:
    """The "cuda" backend, for CPU tensors."""
    monkeypatch.setitem(dispatch.BACKENDS, "cuda", library)
    assert library.unavailable() is None
    return library


on_cpu = functools.partial(assert_right, backend="cuda", device="cpu")


@pytest.mark.parametrize("case", or_slow(PAIRS, sample(PAIRS)[::2]))
def test_steps(case, cuda, poisoned):
    """Two tokens that end a chunk of 16, and the first token of the next."""
    on_cpu(case, cuts=[14, 16, 17])


@pytest.mark.parametrize("name", SHAPES)
def test_sizes(name, cuda, poisoned):
    on_cpu(SHAPES[name], cuts=[15, 16, 17])


@pytest.mark.parametrize("memory", LONG)
def test_chunks_of_many_tokens(memory, cuda, poisoned):
    on_cpu(LONG[memory], cuts=[60, 68, 70, 71])


LARGEST = [
    Case("largest", batch=1, heads=1, key_dim=256, value_dim=256, momentum=True, retention=GATES[2], seed=1),
    Case("largest-coupled", batch=1, heads=1, key_dim=255, value_dim=255, bias=mk.RobustL2(), retention=GATES[1], seed=2),
    Case("largest-mlp", memory="mlp", batch=1, heads=1, key_dim=128, value_dim=128, hidden=1024, seed=3),
    Case("odd-mlp", memory="mlp", batch=1, heads=1, key_dim=127, value_dim=127, hidden=33, retention=GATES[4], momentum=True, seed=4),
]


@pytest.mark.parametrize("case", LARGEST, ids=str)
def test_largest(case, cuda, poisoned):
    on_cpu(case, cuts=[15, 16, 17])


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


ORDERS = ["wide", "coupled", "entire", "mlp", "mlp-gated", "mlp-entire"]


def in_both_orders(backend: CudaBackend, case: Case) -> list[list[torch.Tensor]]:
    """The results of steps if threads and blocks run in ascending order, and in descending order."""
    found, order = [], ctypes.CDLL(str(backend.path)).miras_emulator_backwards
    for backwards in (0, 1):
        order(backwards)
        try:
            out, state = run(case.draw(torch.float32), "cuda", [14, 15, 16, 18])
        finally:
            order(0)
        found.append([out, *state.tensors()])
    return found


@pytest.mark.parametrize("name", ORDERS)
def test_threads_in_any_order(name, cuda):
    """The results are bitwise equal: no barrier is missing, and no block reads what another one writes."""
    forwards, backwards = in_both_orders(cuda, SHAPES[name])
    assert all(torch.equal(x, y) for x, y in zip(forwards, backwards, strict=True))


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
    refusal = lambda **changes: cuda.refuses(case.draw(torch.float32).call().replace(**changes), False)
    assert "at most 4 tokens, got 5" in refusal()
    assert "no packed sequences" in refusal(cu_seqlens=torch.tensor([0, 5]))
    with pytest.raises(ValueError, match="'cuda' cannot serve this call: it only decodes: it has no gradients"):
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


def test_a_library_of_other_sources_is_refused(library, monkeypatch):
    """The library tells the struct's layout, the names of its buffers and its limits; all must be those of this package."""
    assert CudaBackend(library.path, "cpu").unavailable() is None
    for owner, name, other in (
        (cuda_backend.Step, "layout", lambda: [1, *cuda_backend.Step.__dict__["MARKS"]]),
        (cuda_backend, "BUFFERS", cuda_backend.BUFFERS[::-1]),
        (type(memories.MLP), "kernels", {"cuda": Kernels(None, Limits(128, 2048), few=4)}),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, other)
            assert "built from other sources" in CudaBackend(library.path, "cpu").unavailable()


def test_every_field_is_marked_or_beside_a_marked_one():
    """A field that is added to one struct alone moves a mark or changes the size: every kind of field has marks at its ends."""
    names = [name for name, _ in cuda_backend.Step._fields_]
    assert set(cuda_backend.Step.MARKS) <= set(names)
    assert {names[0], names[-1]} <= set(cuda_backend.Step.MARKS)


# ------------------------------------------------------------------------------------------------------------ planted bugs


@pytest.mark.parametrize(
    ("source", "before", "after", "name", "cuts"),
    [
        slow("linear_step.cu", "read += score[i] * w", "read += 0.999f * score[i] * w", "wide", [12, 13, 15]),
        ("linear_step.cu", " = *open_log_decay = 0.0f", " = 0.0f", "coupled", [15, 16]),
        slow("mlp_step.cu", "sum += score[i] * left", "sum += 0.9f * score[i] * left", "mlp", [12, 13, 15]),
    ],
)
def test_a_planted_bug_is_caught(source, before, after, name, cuts, objects, tmp_path, monkeypatch):
    monkeypatch.setitem(dispatch.BACKENDS, "cuda", changed(objects, source, before, after, tmp_path))
    with pytest.raises(AssertionError):
        on_cpu(SHAPES[name], cuts=cuts)


def test_a_missing_barrier_is_caught(objects, tmp_path, monkeypatch):
    """The barrier before log gamma is written, which every thread reads."""
    backend = changed(objects, "linear_step.cu", "  __syncthreads();  // every thread has read them\n", "", tmp_path)
    monkeypatch.setitem(dispatch.BACKENDS, "cuda", backend)
    forwards, backwards = in_both_orders(backend, SHAPES["coupled"])
    assert not all(torch.equal(x, y) for x, y in zip(forwards, backwards, strict=True))


# ---------------------------------------------------------------------------------------------------------------- compiled


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize(("source", "kernels"), [("linear_step.cu", 2), ("mlp_step.cu", 3)])
def test_nothing_spills(source, kernels, architecture, tmp_path):
    command = [NVCC, "-std=c++17", "-O3", f"-I{SOURCES.parent}", f"-arch={architecture}", "-Xptxas", "-v", "-c"]
    done = subprocess.run([*command, str(SOURCES / source), "-o", str(tmp_path / "x")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
    registers = [int(x) for x in re.findall(r"Used (\d+) registers", done.stderr)]
    assert len(registers) == 2 * kernels and max(registers) <= 255
    stores = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert len(stores) >= len(registers) and set(stores) == {("0", "0", "0")}, done.stderr


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
def test_the_library_builds_and_loads(tmp_path):
    """For all chips at once, as setup.py builds it; it has this package's struct, also without a GPU."""
    library = tmp_path / "_cuda.so"
    subprocess.run([sys.executable, str(SOURCES / "build.py"), str(library)], check=True, timeout=1800)
    backend = CudaBackend(library)
    assert backend._loaded[1] is None
    assert backend.unavailable() == (None if torch.cuda.is_available() else "there is no GPU here")
