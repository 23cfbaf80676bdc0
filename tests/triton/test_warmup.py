"""``python -m miras_kernels warmup``: its errors, what it compiles, and which later calls find their code."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import itertools
import os
import subprocess
import sys

import pytest
import torch

import miras_kernels as mk
from miras_kernels import dispatch, warmup
from miras_kernels.__main__ import main
from miras_kernels.backends import triton as triton_backend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def variant(**changes) -> warmup.Variant:
    """The commonest kind of call, with the command's own sizes."""
    common = dict(key_dim=64, value_dim=64, chunk_size=64, dtype=torch.bfloat16, bias=mk.L2(), batch=1, tokens=(2048,), heads=(16,))
    return warmup.Variant(**{**common, **changes})


@pytest.fixture
def given(monkeypatch) -> list:
    """The variants and the target that the command would compile."""
    found = []
    monkeypatch.setattr(warmup, "run", lambda *what: found.append(what) or 0)
    return found


# ------------------------------------------------------------------------------------------------------------- arguments


def test_defaults_are_the_commonest_training_call(given):
    assert main(["warmup"]) == 0
    [(variants, target)] = given
    assert target is None
    sizes = [(64, 64), (64, 64), (128, 128), (128, 128)]
    assert [(v.key_dim, v.value_dim) for v in variants] == sizes
    assert {v.bias for v in variants} == {mk.L2(), mk.Huber("switch")}
    assert variants[0] == variant()
    assert all(v.decay and v.differentiate and not v.packed and not v.final_state and not v.steps for v in variants)


def test_lists_are_multiplied(given):
    command = "warmup --key-dim 32,64,32 --value-dim 16,128 --chunk-size 16,32 --dtype float32,float16 --bias l2,lp_smooth:1.5,4,l1:2"
    command += " --no-decay --no-grad --packed --final-state --steps --tokens 100 --heads 4,8 --target gfx942"
    main(command.split())
    [(variants, target)] = given
    assert target == "gfx942"
    biases = (mk.L2(), mk.Lp(1.5, sharpness=4.0), mk.L1(2.0))
    expected = itertools.product((torch.float32, torch.float16), (32, 64), (16, 128), (16, 32), biases)
    assert [(v.dtype, v.key_dim, v.value_dim, v.chunk_size, v.bias) for v in variants] == list(expected)
    assert all(not v.decay and not v.differentiate and v.packed and v.final_state and v.steps for v in variants)
    assert all((v.batch, v.tokens, v.heads) == (1, (100,), (4, 8)) for v in variants)


def test_all_biases(given):
    main(["warmup", "--bias", "all", "--key-dim", "64"])
    [(variants, _)] = given
    assert [v.bias for v in variants] == list(mk.biases.TABLE.values())


def test_a_variant_is_named_as_the_command_takes_it(given):
    """The text after the sizes is a valid --bias."""
    written = [mk.CustomBias("min(max(e, -c), c * 2)", c=0.5), mk.CustomBias(loss="log(cosh(s * e)) / s", s=4.0)]
    for bias in (*mk.biases.TABLE.values(), *written):
        name = str(variant(bias=bias))
        assert name.startswith("k64 v64 chunk 64 bfloat16 ")
        main(["warmup", "--key-dim", "64", "--bias", name.split()[-1]])
    assert [variants[0].bias.code.replace(" ", "") for variants, _ in given] == [
        bias.code.replace(" ", "") for bias in (*mk.biases.TABLE.values(), *written)
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--bias foo", "argument --bias: unknown bias 'foo': expected one of dot, l2, l1, lp"),
        ("--bias l2,", "argument --bias: unknown bias ''"),
        ("--bias lp:1.5", "p < 2 needs a sharpness"),
        ("--key-dim 64,x", "argument --key-dim: expected an integer >= 1, got 'x'"),
        ("--tokens 0", "argument --tokens: expected an integer >= 1, got '0'"),
        ("--dtype int8", "argument --dtype: unknown dtype 'int8': expected one of float32, bfloat16"),
        ("--target sm_12", "argument --target: invalid choice: 'sm_12'"),
    ],
)
def test_unknown_names_are_errors(capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        main(["warmup", *arguments.split()])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--chunk-size 64,130", "k64 v64 chunk 130 bfloat16 l2: chunk_size is limited to 128, got 130"),
        ("--key-dim 64,512", "k512 v512 chunk 64 bfloat16 l2: head dimensions are limited to 256, got 512"),
        ("--value-dim 300", "k64 v300 chunk 64 bfloat16 l2: head dimensions are limited to 256, got 300"),
        ("--dtype float64", "it takes float32, bfloat16 or float16 inputs, got torch.float64"),
        ("--packed --batch 2", "cu_seqlens: packed sequences need B = 1, got B = 2"),
    ],
)
def test_calls_without_kernels_are_errors(capsys, arguments, message):
    """Before anything is compiled, with the text of the call's own error."""
    assert main(["warmup", *arguments.split(), "--target", "sm_90"]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1 and not printed.out


# ----------------------------------------------------------------------------------------------- where nothing can be compiled


def test_no_triton(capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "triton" else find(name, *rest))
    for arguments in ([], ["--target", "sm_90"]):
        assert main(["warmup", *arguments]) == 2
        assert capsys.readouterr().err == "warmup: triton is not installed\n"


def test_no_gpu(capsys, monkeypatch):
    monkeypatch.setattr(triton_backend, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["warmup"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("warmup: no GPU here: ") and "--target sm_90" in printed and printed.count("\n") == 1


def test_interpreter(capsys, monkeypatch):
    monkeypatch.setattr(triton_backend, "interpreted", lambda: True)
    for arguments in ([], ["--target", "sm_90"]):
        assert main(["warmup", *arguments]) == 2
        assert capsys.readouterr().err.startswith("warmup: TRITON_INTERPRET is set")


# ----------------------------------------------------------------------------------------------------------- what is compiled


def test_targets_equal_those_of_the_kernels():
    from miras_kernels.kernels.offline import compile as offline

    assert tuple(offline.TARGETS) == warmup.TARGETS


KINDS = [
    dict(),
    dict(decay=False),
    dict(differentiate=False),
    dict(final_state=True, bias=mk.Huber("switch")),
    dict(final_state=True, differentiate=False),
    dict(packed=True, final_state=True),
    dict(differentiate=False, steps=True),
]
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(kind) or "training")


@kinds
def test_recorded_launches_equal_those_of_calls(kind, monkeypatch):
    """The recording calls the backend; here the public function does, and runs."""
    small = variant(key_dim=16, value_dim=16, chunk_size=16, tokens=(24,), heads=(1,), **kind)
    backend, seen = dispatch.BACKENDS["triton"], []
    forward, backward = backend.forward, backend.backward

    def watched_forward(call, every):
        seen.append(("forward", every, call.bias, call.cu_seqlens is None, call.log_decay is None, call.output_final_state))
        return forward(call, every)

    def watched_backward(call, every, saved, grad_out, grad_state):
        seen.append(("backward", every, len(grad_state)))
        return backward(call, every, saved, grad_out, grad_state)

    monkeypatch.setattr(backend, "forward", watched_forward)
    monkeypatch.setattr(backend, "backward", watched_backward)
    warmup.make_calls(small, DEVICE)
    made = seen.copy()
    seen.clear()
    for sizes in small.sizes():
        assert warmup.launches(small, sizes)
    assert made == seen
    grads = [what[-1] for what in made if what[0] == "backward"]
    times = 1 if small.packed else 2  # the final state at a chunk's end and inside one
    assert grads == ([] if not small.differentiate else [1, 0] * times if small.final_state else [0])


def test_steps_are_compiled():
    """With and without decays, the kernels of a decoding step; none of them without --steps."""
    for decay in (True, False):
        kind = variant(decay=decay, steps=True)
        names = [given.kernel.__name__ for given in warmup.launches(kind, kind.sizes()[0])]
        assert names[-2:] == ["linear_step_predict", "linear_step_write"] and len(names) > 4
        kind = variant(decay=decay)
        assert "linear_step_predict" not in [given.kernel.__name__ for given in warmup.launches(kind, kind.sizes()[0])]


def codes(kind: warmup.Variant) -> set:
    """What Triton's code depends on, for every call of a kind: types, constants, and whether an integer is 1 or a multiple of 16."""
    from miras_kernels.kernels.common import tiles

    found = set()
    for sizes in kind.sizes():
        for launched in warmup.launches(kind, sizes):
            parameters = inspect.signature(launched.kernel.fn).parameters
            key = []
            for name, parameter in parameters.items():
                x = launched.arguments[name]
                if isinstance(x, torch.Tensor):
                    x = x.dtype
                elif name in tiles.LENGTHS:
                    x = "any"
                elif isinstance(x, int | tuple) and parameter.annotation is inspect.Parameter.empty:
                    x = ["1" if n == 1 else "16" if n % 16 == 0 else "any" for n in (x if isinstance(x, tuple) else (x,))]
                key.append((name, str(x)))
            found.add((launched.kernel.fn.__name__, launched.config, *key))
    return found


@kinds
@pytest.mark.parametrize("chunk_size", [16, 64, 128])
def test_later_calls_find_their_code(kind, chunk_size):
    """As the docstring promises, the default sizes serve all multiples."""
    kind = variant(chunk_size=chunk_size, **kind)
    warm = codes(kind)
    for batch, tokens, heads in ((1, 1024, 16), (3, 1000, 32), (8, 3 * chunk_size, 48), (2, 77, 16), (5, 65536, 16), (1, chunk_size, 64)):
        later = dataclasses.replace(kind, batch=1 if kind.packed else batch, tokens=(tokens,), heads=(heads,))
        assert codes(later) <= warm, (batch, tokens, heads)


def test_other_sizes_need_other_code():
    """The test above could not fail if `codes` saw no difference."""
    warm = codes(variant())
    for changes in (dict(heads=(8,)), dict(heads=(1,)), dict(key_dim=72), dict(decay=False), dict(differentiate=False)):
        assert not codes(variant(**changes)) <= warm, changes


@pytest.mark.parametrize("memory_order", ["heads first", "fused"])
def test_any_memory_order(memory_order, monkeypatch):
    kind, arguments = variant(), warmup.Variant.arguments
    warm = codes(kind)

    def laid_out(self, sizes, device):
        found = arguments(self, sizes, device)
        for name in "qkv":
            x = found[name].detach()
            found[name] = torch.cat([x, x, x], -1)[..., :64] if memory_order == "fused" else x.transpose(1, 2).contiguous().transpose(1, 2)
            assert found[name].stride() != x.stride()
        return found

    monkeypatch.setattr(warmup.Variant, "arguments", laid_out)
    assert codes(kind) <= warm


# --------------------------------------------------------------------------------------------------------------- compilation


@pytest.mark.slow
def test_compiles_for_another_chip(tmp_path):
    """In a process of its own, since triton decides on import whether it interprets. The second run finds everything in the cache."""
    code = """
from miras_kernels.__main__ import main
from miras_kernels.warmup import counting
for _ in range(2):
    with counting() as counts:
        assert main("warmup --target sm_90 --key-dim 32 --chunk-size 16 --bias l2 --no-grad --no-decay".split()) == 0
    print(counts.compiled, counts.found)
"""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    header, variant_line, *rows, first = done.stdout.splitlines()[:6]
    assert header == "sm_90: forward, no decay; B = 1, T = 2048, H = 16"
    assert variant_line == "k32 v32 chunk 16 bfloat16 l2"
    assert [row.split("  ")[1] for row in rows] == ["linear_chain_fwd whole", "linear_output", "linear_chain_fwd_fused whole"]
    for row in rows:
        words = row.split()
        registers, spills, shared = (int(words[words.index(name) + 1]) for name in ("registers", "spills", "shared"))
        assert registers > 0 and spills == 0 and shared > 0, row
        assert "tensor cores mma" in row or "tensor cores wgmma" in row, row
    assert (first, done.stdout.splitlines()[-1]) == ("3 0", "0 3")


def test_prints_a_line_for_every_kind(capsys, monkeypatch):
    """The command on a GPU, without the calls, which are tested above."""
    made = []
    monkeypatch.setattr(triton_backend, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def make_calls(kind, device):
        from triton import knobs

        assert device == "cuda"
        made.append(kind)
        for cache_hit in (False, False, True):
            knobs.compilation.listener(src=None, metadata={}, metadata_group={}, times=None, cache_hit=cache_hit)

    monkeypatch.setattr(warmup, "make_calls", make_calls)
    assert main(["warmup", "--key-dim", "64,128", "--bias", "l2"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "a GPU: forward and backward, decay; B = 1, T = 2048, H = 16"
    assert [line.split("  ")[0] for line in printed[1:3]] == [str(kind).ljust(30).rstrip() for kind in made]
    assert all(line.endswith(" s  2 compiled, 1 found in the cache") for line in printed[1:3])
    assert len(printed) == 4 and printed[3].startswith("4 kernels compiled; Triton keeps them in ")
    from triton import knobs

    assert knobs.compilation.listener is None


@pytest.mark.skipif(DEVICE == "cpu", reason="runs the command on a GPU")
def test_a_later_process_compiles_nothing(tmp_path):
    """After the command, a job in another process makes a call of other sizes."""
    job = """
import torch, miras_kernels
from miras_kernels.warmup import counting
x = torch.randn(3, 3072, 32, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True)
gate = torch.rand(3, 3072, 32, device="cuda")
with counting() as counts:
    out, _ = miras_kernels.linear_memory(x, x, x, gate / 32, -gate, chunk_size=16, backend="triton")
    out.float().square().mean().backward()
assert counts.compiled == 0 and counts.found >= 8, (counts.compiled, counts.found)
"""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "miras_kernels", "warmup", "--key-dim", "32", "--chunk-size", "16", "--bias", "l2"]
    for run in (command, [sys.executable, "-c", job]):
        done = subprocess.run(run, check=False, capture_output=True, text=True, timeout=600, env=environment)
        assert done.returncode == 0, done.stderr + done.stdout
