"""Addresses of calls with more than 2^31 elements: every kernel in Triton's interpreter, without allocating the memory.

The launchers run on meta tensors. The last program of every launch runs twice: with integers as a GPU gets them, int32 where they fit, and
with int64 integers. If a product wraps, the two runs access different addresses. Loads return 0, stores are dropped.
"""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import miras_kernels as mk
from miras_kernels.backends import groups
from miras_kernels.tables.memories import LINEAR, MLP
from miras_kernels.validation import make_call

#: no token count is a multiple of the chunk size, so that sequences end inside a chunk
CALLS = {
    "plain": dict(bias=mk.Huber("coordinate")),
    "fused": dict(bias=mk.Huber("coordinate")),
    "streamed": dict(bias=mk.Huber("norm"), retention=mk.LqRetention(), momentum=True),
    "channels": dict(bias=mk.Huber("coordinate"), channels=True),
    "channels-momentum": dict(momentum=True, channels=True),
    "keyed": dict(keyed=True, chunk_size=1),
    "mlp": dict(memory="mlp", bias=mk.Huber("coordinate")),
    "mlp-gates": dict(memory="mlp", retention=mk.LqRetention(), momentum=True),
}
#: (B, T, H): B T H < 2^31, so it is passed as int32, but twice as much exceeds 2^31, as does B T H times 16 channels
SHAPES = {"many": (2**26 + 1, 10, 2), "long": (1, 2**24 + 10, 72)}
#: loads and stores of a program after which it is stopped: enough of a chain over a long sequence
MOST = 150


class Enough(BaseException):
    """Stops a program after MOST accesses."""


class Memory:
    """Address space for the tensors of one launch, and the addresses that a program accesses."""

    def __init__(self, arguments: dict):
        tensors = [x for x in arguments.values() if isinstance(x, torch.Tensor)]
        self.bases = {id(x): (i + 1) << 52 for i, x in enumerate(tensors)}
        self.sizes = np.array([0, *(1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) for x in tensors)])
        self.sizes *= np.array([0, *(x.element_size() for x in tensors)])
        self.touched: list[np.ndarray] = []

    def pointer(self, x: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(dtype=x.dtype, data_ptr=lambda: self.bases[id(x)])

    def touch(self, pointers: np.ndarray, mask: np.ndarray) -> None:
        if len(self.touched) == MOST:
            raise Enough
        self.touched.append(np.broadcast_to(pointers, mask.shape)[mask].copy())

    def load(self, pointers, mask, other, dtype):
        self.touch(pointers, mask)
        return np.zeros(pointers.shape, dtype)

    def store(self, pointers, value, mask):
        self.touch(pointers, mask)

    def strays(self) -> int:
        """Number of accesses outside the tensors."""
        places = np.concatenate([*self.touched, np.zeros(0, np.uint64)]).astype(np.int64)
        tensor, offset = places >> 52, places & ((1 << 52) - 1)
        return int((offset >= self.sizes[np.clip(tensor, 0, len(self.sizes) - 1)]).sum())


def touched(kernel, grid: tuple[int, ...], arguments: dict, wide: bool, monkeypatch) -> Memory:
    """The accesses of a launch's last program; ``wide``: with int64 integers."""
    import triton.language as tl
    from triton.runtime import interpreter

    memory, builder, convert = Memory(arguments), interpreter.interpreter_builder, interpreter._implicit_cvt
    last = tuple(n - 1 for n in grid) + (0,) * (3 - len(grid))

    def integer(x: int):
        return tl.tensor(interpreter.TensorHandle(np.array([x], np.int64), tl.int64), tl.int64)

    def program(axis: int):
        handle = np.array([last[axis]], np.int64 if wide else np.int32)
        return interpreter.TensorHandle(handle, tl.int64 if wide else tl.int32)

    class Executor(interpreter.GridExecutor):
        def _init_args_hst(self, args, kwargs):
            return args, {name: memory.pointer(x) if isinstance(x, torch.Tensor) else x for name, x in kwargs.items()}

        def _restore_args_dev(self, *_):
            pass

    with monkeypatch.context() as patch:
        patch.setattr(interpreter, "_interpreter", memory)
        patch.setattr(builder, "create_get_program_id", program)
        patch.setattr(interpreter, "_implicit_cvt", lambda x: integer(x) if wide and type(x) is int else convert(x))
        with contextlib.suppress(Enough):
            Executor(kernel.fn, kernel.arg_names, (1,))(**arguments)
    return memory


def call_of(shape: tuple[int, int, int], memory: str = "linear", channels=False, momentum=False, keyed=False, **settings):
    b, t, h, d, hidden = *shape, 16, 16

    def meta(*sizes: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta")

    gate = (b, t, h, *([d] if channels else []))
    tokens = [meta(b, t, h, d, dtype=torch.bfloat16) for _ in range(3)]
    rest = dict(
        bias=mk.L2(), retention=mk.L2Retention(), chunk_size=16, cu_seqlens=None, output_final_state=True,
        delta=meta(*gate) if "bias" in settings else None, momentum=meta(b, t, h) if momentum else None,
    ) | settings  # fmt: skip
    if keyed:
        by_key = dict(erase_k=tokens[1], key_log_decay=meta(b, t, h, d))
        return make_call(LINEAR, *tokens, meta(*gate), None, initial_state=meta(b, h, d, d), **by_key, **rest)
    if memory == "linear":
        return make_call(LINEAR, *tokens, meta(*gate), meta(*gate), initial_state=meta(b, h, d, d), **rest)
    norm = dict(ln_weight=meta(h, d), ln_bias=meta(h, d), ln_eps=1e-6)
    return make_call(MLP, *tokens, meta(*gate), meta(*gate), initial_state=(meta(b, h, d, hidden), meta(b, h, hidden, d)), **norm, **rest)


@pytest.fixture
def launches(monkeypatch) -> list:
    """Collects ``(kernel, grid, arguments)`` of every launch, without launching."""
    if torch.cuda.is_available():
        pytest.skip("needs Triton's interpreter")
    from miras_kernels.kernels.common import launch

    monkeypatch.setattr(groups, "MIN_GROUP", 2**40)  # all chunks in one group
    found: list = []
    record = lambda kernel, grid, config, device, shared, own: found.append((kernel, grid, launch.by_name(kernel, shared, own)))
    monkeypatch.setattr(launch, "start", record)
    return found


def wrapped(launches: list, monkeypatch) -> list[str]:
    """The kernels whose addresses wrap or leave their tensors."""
    wrong, seen = [], set()
    for kernel, grid, arguments in launches:
        narrow, wide = (touched(kernel, grid, arguments, wide, monkeypatch) for wide in (False, True))
        same = len(narrow.touched) == len(wide.touched) and all(map(np.array_equal, narrow.touched, wide.touched))
        seen |= {kernel.fn.__name__} if wide.touched else set()
        if not same or narrow.strays():
            wrong.append(f"{kernel.fn.__name__}: {'wraps' if not same else 'leaves its tensors'}")
    assert seen == {kernel.fn.__name__ for kernel, *_ in launches}
    return wrong


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("shape", SHAPES)
def test_no_product_wraps(name, shape, launches, monkeypatch):
    if shape == "long" and name not in ("plain", "fused", "streamed", "mlp"):
        pytest.skip("the other kernels locate their chunks in the same way")
    from miras_kernels.kernels.common import configs
    from miras_kernels.kernels.offline import compile as offline

    with configs.fuse(name == "fused"):
        offline.recorded(call_of(SHAPES[shape], **CALLS[name]), 1)
    assert any("fused" in kernel.fn.__name__ for kernel, *_ in launches) == (name == "fused")
    assert launches and not wrapped(launches, monkeypatch)


@pytest.mark.parametrize("memory", ["linear", "mlp"])
def test_decoding(memory, launches, monkeypatch):
    from miras_kernels.kernels.offline import compile as offline

    offline.recorded_step(call_of((2**24 + 1, 1, 2), memory, retention=mk.LqRetention(), momentum=True))
    assert launches and not wrapped(launches, monkeypatch)


def test_a_planted_bug_is_caught(launches, monkeypatch):
    """Without `wide` the products of `linear/dqk.py` with the number of rows wrap."""
    from miras_kernels.kernels.linear import dqk
    from miras_kernels.kernels.offline import compile as offline

    offline.recorded(call_of(SHAPES["many"], **CALLS["streamed"]), 1)
    launches[:] = [x for x in launches if x[0].fn.__name__ == "linear_dqk_bwd"]
    monkeypatch.setattr(dqk, "wide", lambda x: x)
    assert wrapped(launches, monkeypatch) == ["linear_dqk_bwd: wraps"]
