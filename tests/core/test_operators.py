"""The operators in PyTorch: schemas, fakes, compilation, autocast; and what importing the package needs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import miras_kernels as mk
from miras_kernels import autograd
from miras_kernels.backends.reference import chunkwise
from miras_kernels.testing import Case
from miras_kernels.testing.parity import compare, expect, judge
from miras_kernels.testing.steps import check_results

CASES = [
    Case("plain", tokens=32, initial="none", decay="none"),
    Case("huber", bias=mk.Huber("coordinate"), tokens=32),
    Case("switch", bias=mk.Huber("switch"), tokens=32),
    Case("packed", lengths=(5, 16, 20)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_opcheck(case, backend):
    # a packed state may end inside chunks, which the kernels refuse to differentiate: see test_identities.py
    call = case.draw(torch.float32).call().replace(output_final_state=case.lengths is None)
    arguments = (*autograd._flatten(call), backend, 1)
    torch.library.opcheck(torch.ops.miras_kernels.memory, arguments)
    detached = [[t.detach() for t in x] if isinstance(x, list) else x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
    out, _, saved = torch.ops.miras_kernels.memory(*detached)
    backward = (*detached, saved, torch.ones_like(out), [])
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")  # a backward has no backward of its own
    torch.library.opcheck(torch.ops.miras_kernels.memory_backward, backward, test_utils=tests)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_compile_fullgraph(case, backend):
    inputs = case.draw(torch.float32)
    arguments = inputs.arguments()

    def step(arguments):
        out, state = mk.linear_memory(**{**arguments, "output_final_state": case.lengths is None}, backend=backend)
        return out.sin(), None if state is None else state.dual[0]

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    out, _dual = compiled(arguments)

    def with_gradients(out, leaves):
        grads = torch.autograd.grad(out.sum(), tuple(leaves.values()))
        return {"out": out.detach()} | dict(zip(leaves, grads, strict=True))

    wanted = expect(inputs, torch.float32, lambda x: with_gradients(chunkwise.run(x.call())[0].sin(), x.leaves()))
    report = compare(case, torch.float32, with_gradients(out, inputs.leaves()), wanted)
    assert report.ok, report


def test_compile_traces_the_reference_for_other_calls():
    inputs = Case("compiled", retention=mk.KLRetention(4.0), momentum=True, tokens=32).draw(torch.float32)
    torch._dynamo.reset()
    function = lambda arguments: mk.linear_memory(**arguments)[0]
    found = torch.compile(function, fullgraph=True, backend="aot_eager")(inputs.arguments())
    report = judge(inputs, {"out": found}, torch.float32)
    assert report.ok, report
    assert torch.autograd.grad(found.sum(), inputs.duals[0])[0].isfinite().all()


def test_compile_does_not_recompile_for_a_longer_sequence():
    counter = torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(lambda a: mk.linear_memory(**a)[0], fullgraph=True, backend=counter, dynamic=True)
    for tokens in (32, 64, 96):
        inputs = Case("dynamic", tokens=tokens).draw(torch.float32)
        compiled({**inputs.arguments(), "output_final_state": False})
    assert counter.frame_count == 1


def test_autocast_takes_the_dtype_of_a_matrix_product(backend):
    inputs = Case("autocast", tokens=32).draw(torch.float32)
    arguments = inputs.arguments()
    leaves = tuple(inputs.leaves().values())
    rounded = lambda given: {n: given[n].bfloat16() for n in ("q", "k", "v")}
    with torch.autocast("cpu", torch.bfloat16):
        mixed = {**arguments, "v": arguments["v"].bfloat16()}
        out, state = mk.linear_memory(**mixed, backend=backend)
        grads = torch.autograd.grad((out.float() * inputs.grad_out).sum(), leaves)
        inside = torch.autograd.grad(mk.linear_memory(**arguments, backend=backend)[0].float().sum(), leaves)
    outside = torch.autograd.grad(mk.linear_memory(**arguments | rounded(arguments), backend=backend)[0].float().sum(), leaves)
    for a, b in zip(inside, outside, strict=True):
        assert torch.equal(a, b)
    assert out.dtype == torch.bfloat16 and state.dual[0].dtype == torch.float32
    wanted, wanted_state = mk.linear_memory(**arguments | rounded(arguments), backend=backend)
    assert torch.equal(out, wanted) and torch.equal(state.dual[0], wanted_state.dual[0])
    assert [g.dtype for g in grads] == [x.dtype for x in leaves]
    with torch.autocast("cpu", torch.bfloat16):  # float64 is not cast
        double = inputs.to(torch.float64)
        assert mk.linear_memory(**double.arguments())[0].dtype == torch.float64


def test_gates_of_another_precision(backend):
    inputs = Case("gates", bias=mk.Huber("norm"), tokens=32).draw(torch.float32)
    half = {n: inputs.tensors[n].detach().bfloat16().requires_grad_() for n in ("lr", "log_decay", "delta")}
    out, _ = mk.linear_memory(**{**inputs.arguments(), **half}, backend=backend)
    wanted, _ = mk.linear_memory(**{**inputs.arguments(), **{n: x.detach().float() for n, x in half.items()}}, backend=backend)
    assert torch.equal(out, wanted)
    assert all(g.dtype == torch.bfloat16 and g.abs().sum() > 0 for g in torch.autograd.grad(out.sum(), tuple(half.values())))


def test_auto_takes_the_kernels_and_explain_says_why_not():
    inputs = Case("auto").draw(torch.float32)
    arguments = inputs.arguments()
    tokens = {n: arguments.pop(n) for n in ("q", "k", "v", "lr", "log_decay")}
    reasons = mk.explain(**tokens, **arguments)
    assert list(reasons)[:2] == ["cpp", "reference"] and reasons["cpp"] is None and reasons["reference"] is None
    assert "kernels are not built" in reasons["cuda"]
    reasons = mk.explain(**{n: x.double() for n, x in tokens.items()}, **{**arguments, "initial_state": None})
    assert "float64" in reasons["cpp"] and reasons["reference"] is None


def test_options():
    assert mk.options.checkpoint_interval(64, 256) == 4 and mk.options.checkpoint_interval(512, 256) == 1
    with pytest.raises(ValueError, match="checkpoint_every must be None or an integer >= 1, got 0"):
        mk.options.checkpoint_every = 0
    with pytest.raises(ValueError, match="check_values must be None, True or False, got 'yes'"):
        mk.options.check_values = "yes"
    with mk.override(checkpoint_every=3):
        assert mk.options.checkpoint_interval(64, 256) == 3
    assert mk.options.checkpoint_every is None


FRESH = """
import sys, warnings
sys.modules["triton"] = None
sys.modules["miras_kernels._C"] = None
import torch
import miras_kernels as mk
assert "transformers" not in sys.modules
q = torch.randn(1, 20, 2, 8, requires_grad=True)
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    out, _ = mk.linear_memory(q, q, q, torch.full((1, 20, 2), 0.1))
    mk.linear_memory(q, q, q, torch.full((1, 20, 2), 0.1))
out.sum().backward()
assert q.grad.isfinite().all()
messages = [str(w.message) for w in seen if "miras_kernels" in str(w.message)]
assert len(messages) == 1 and "the C++ kernels are missing" in messages[0], messages
try:
    mk.linear_memory(q, q, q, torch.full((1, 20, 2), 0.1), backend="cpp")
except ValueError as error:
    print(error)
"""


def test_a_fresh_process_without_triton_and_extension():
    done = subprocess.run([sys.executable, "-c", FRESH], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("backend: 'cpp' cannot serve this call: the extension")


def test_importing_imports_neither_triton_nor_transformers():
    program = "import sys, miras_kernels; print([m for m in ('triton', 'transformers', 'pytest', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=os.environ)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_tags_agree_between_languages():
    """Python, C++ and Triton give a bias or retention gate the same number."""
    from miras_kernels import _C

    assert _C.bias_names() == {tag: row.name for tag, row in mk.biases.TABLE.items()}
    assert _C.retention_names() == {tag: row.name for tag, row in mk.retention.TABLE.items()}


def test_a_parameter_too_many_is_refused():
    """Kernels take so many, as Python and csrc/params.h state; another would be lost."""
    for row, most, name in ((mk.L2, 3, "kBiasParams"), (mk.L2Retention, 2, "kRetentionParams")):
        of = lambda count, row=row: type("Many", (row,), {"parameters": property(lambda self: (0.5,) * count)})
        assert of(most)().padded == (0.5,) * most and row().padded == (0.0,) * most
        with pytest.raises(ValueError, match=f"Many: expected at most {most} parameters, as many as kernels take, got {most + 1}"):
            of(most + 1)()
        assert f"constexpr int {name} = {most};" in (Path(__file__).parents[2] / "csrc" / "params.h").read_text()


def test_a_state_leaves_and_enters_a_compiled_function():
    inputs = Case("state", tokens=21).draw(torch.float32)
    step = lambda arguments: mk.linear_memory(**arguments)
    with torch.no_grad():
        torch._dynamo.reset()
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        out, state = compiled(inputs.arguments())
        assert isinstance(state, mk.MemoryState) and state.open_chunk.position.tolist() == [21 % 16] * 2
        again, _ = compiled({**inputs.arguments(), "initial_state": state})
        twice = lambda call, first: {"out": first[0], "again": chunkwise.run(call.replace(state=first[1]))[0]}
        check_results(inputs, {"out": out, "again": again}, lambda call: twice(call, chunkwise.run(call)))


def test_second_derivatives_need_the_reference(backend):
    inputs = Case("twice", tokens=32).draw(torch.float32)
    leaves = tuple(inputs.leaves().values())
    (grad, *_) = torch.autograd.grad(mk.linear_memory(**inputs.arguments(), backend=backend)[0].sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        grad.sum().backward()
    out, _ = chunkwise.run(inputs.call())
    (grad, *_) = torch.autograd.grad(out.sum(), leaves, create_graph=True)
    assert torch.autograd.grad(grad.sum(), inputs.tensors["k"])[0].isfinite().all()


def test_tracing_sees_the_operator():
    """Plain eager calls bypass the dispatcher; tracing, fake tensors and transforms still see the operators."""
    inputs = Case("traced", tokens=32).draw(torch.float32)
    arguments = inputs.arguments()
    step = lambda q: mk.linear_memory(**{**arguments, "q": q})[0]
    with torch.no_grad():
        graph = torch.fx.experimental.proxy_tensor.make_fx(step)(arguments["q"])
        assert any(node.target is torch.ops.miras_kernels.memory.default for node in graph.graph.nodes)
        assert torch.equal(graph(2 * arguments["q"]), step(2 * arguments["q"]))
        mode = torch._subclasses.FakeTensorMode()
        fake = {n: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for n, x in arguments.items()}
        assert isinstance(mk.linear_memory(**fake)[0], torch._subclasses.FakeTensor)
    jacobian = torch.func.jacrev(lambda lr: mk.linear_memory(**{**arguments, "lr": lr})[0].sum())
    with pytest.raises(RuntimeError):  # no silently wrong result under functorch's transforms
        jacobian(arguments["lr"])


@pytest.mark.parametrize("name", ["q", "lr"])
def test_a_lazily_negated_tensor(name, backend):
    """The imaginary part of a conjugate: its storage holds the negated values."""
    arguments = Case("negative", tokens=21).draw(torch.float32).arguments()
    given = arguments[name].detach()
    negated = torch.complex(given, -given).conj().imag
    assert negated.is_neg() and negated.equal(given)
    with torch.no_grad():
        out, wanted = (mk.linear_memory(**{**arguments, name: x}, backend=backend)[0] for x in (negated, given))
    assert out.equal(wanted)
