"""Launches reach the driver as Triton's own launch would make them, and a warm call neither waits for the device nor copies to it.

There is no device: `kernels/offline/driver.py` receives the launches. Triton decides when it is imported whether it interprets, so these
tests run in a process without TRITON_INTERPRET, which the first test starts if need be.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import miras_kernels as mk
from miras_kernels import autograd, dispatch
from miras_kernels.testing import Case

pytest.importorskip("triton")
INTERPRETED = os.environ["TRITON_INTERPRET"] == "1"
compiled_only = pytest.mark.skipif(INTERPRETED, reason="runs in the process that test_without_interpreter starts")


@pytest.mark.skipif(not INTERPRETED, reason="this is the process without an interpreter")
def test_without_interpreter():
    command = [sys.executable, "-m", "pytest", __file__, "-q", "-p", "no:cacheprovider"]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr


# ------------------------------------------------------------------------------------------------------------------ calls

#: cases by what their launches differ in
CASES = {
    "plain": dict(),
    "16 heads": dict(heads=16),
    "1 head, 1 sequence": dict(heads=1, batch=1),
    "1 token": dict(tokens=1),
    "32 tokens": dict(tokens=32),
    "no decay": dict(decay="none", initial="none"),
    "a threshold": dict(bias=mk.Huber("coordinate"), layout="fused"),
    "decay by channel": dict(decay="channel", lr="channel"),
    "decay by key channel": dict(chunk_size=1, decay="key", erase_k=True),
    "momentum": dict(momentum=True),
    "gate": dict(retention=mk.LqRetention(), layout="heads_first"),
    "packed": dict(lengths=(5, 40, 3)),
    "mlp": dict(memory="mlp", value_dim=16),
    "mlp, momentum, packed": dict(memory="mlp", value_dim=16, momentum=True, lengths=(5, 11)),
}


def arguments_of(case: Case, offset: int = 0, dtype: torch.dtype = torch.bfloat16, final: bool = False) -> dict:
    """``offset``: elements by which contiguous tensors miss the alignment of fresh ones."""

    def moved(x):
        if isinstance(x, tuple):
            return tuple(map(moved, x))
        if not isinstance(x, torch.Tensor) or not x.is_floating_point() or not x.is_contiguous():
            return x
        return torch.empty(x.numel() + offset, dtype=x.dtype)[offset:].view(x.shape).copy_(x.detach()).requires_grad_()

    arguments = {name: moved(x) for name, x in case.draw(dtype).arguments().items()}
    return arguments | dict(output_final_state=final, backend="triton")


def train(case: Case, arguments: dict) -> None:
    out, state = case.function(**arguments)
    (out.float().sum() + (0 if state is None else sum(x.sum() for x in state.dual))).backward()


def train_fused(case: Case, arguments: dict) -> None:
    """With the output in the forward's chain."""
    from miras_kernels.kernels.common import configs

    with configs.fuse(True):
        train(case, arguments)


def decode(case: Case, arguments: dict) -> None:
    with torch.no_grad():
        case.function(**arguments)


def calls() -> list[tuple]:
    """Every case, aligned and not, for training; decoding steps; float32."""
    cases = [Case(name, **{"batch": 2, "tokens": 20, "heads": 3} | size) for name, size in CASES.items()]
    made = [(train, case, arguments_of(case, offset)) for case in cases for offset in (0, 1)]
    made += [(train, case, arguments_of(case, final=True)) for case in cases if case.name in ("plain", "packed", "mlp")]
    made.append((train, cases[0], arguments_of(cases[0], dtype=torch.float32)))
    made += [(train_fused, cases[0], arguments_of(cases[0], offset)) for offset in (0, 1)]
    for name, offset, tokens in (("plain", 0, 1), ("plain", 1, 3), ("16 heads", 0, 1), ("momentum", 0, 1), ("gate", 0, 1), ("mlp", 0, 1)):
        case = dataclasses.replace(next(case for case in cases if case.name == name), tokens=tokens)
        made.append((decode, case, arguments_of(case, offset, final=True)))
    return made


# --------------------------------------------------------------------------------------------------------------- launches


class Machine:
    """What reaches the launcher. Kernels are not compiled; a function is named by what Triton would compile."""

    def __init__(self, monkeypatch):
        import triton.compiler
        from miras_kernels.kernels.common import bound
        from triton.runtime.driver import driver

        self.launches: list[tuple] = []
        self.by_triton = 0
        self.bound = bound
        bound._none.layouts.clear()

        class Kernel(triton.compiler.CompiledKernel):
            def __init__(self, source, options):
                self.src, self.name, self.module, self.packed_metadata = source, source.name, None, (1, 1, 0)
                self.function = (source.name, source.hash(), str(options))
                self._init_handles = lambda: None

            @property
            def run(self):
                return driver.active.launcher_cls(self.src, None)

            def __del__(self):
                pass

        monkeypatch.setattr(triton.compiler, "compile", lambda source, target, options: Kernel(source, options))
        triton_run = triton.JITFunction.run

        def counted(*args, **kwargs):
            self.by_triton += 1
            return triton_run(*args, **kwargs)

        monkeypatch.setattr(triton.JITFunction, "run", counted)
        bound_run = bound.run

        def twice(kernel, grid, config, device, options, shared, own) -> None:
            """First by Triton, then by this package: both must launch the same."""
            given = shared.all | own
            triton_run(kernel, grid=grid, warmup=False, **{name: given[name] for name in kernel.arg_names}, **options(config, device))
            bound_run(kernel, grid, config, device, options, shared, own)
            theirs, ours = self.launches[-2:]
            assert ours == theirs, kernel.__name__

        monkeypatch.setattr(bound, "run", twice)

    def receive(self, x, y, z, stream, function, metadata, launch_metadata, enter, leave, *arguments) -> None:
        given = [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in arguments]
        self.launches.append((x, y, z, stream, function, metadata, given))

    def count(self, run, *call) -> SimpleNamespace:
        """How many launches a call has, and how many of them this package leaves to Triton."""
        before, self.by_triton = len(self.launches), 0
        run(*call)
        return SimpleNamespace(all=(len(self.launches) - before) // 2, by_triton=self.by_triton)


@pytest.fixture
def machine(monkeypatch):
    from miras_kernels.kernels.offline.driver import without_device

    made = Machine(monkeypatch)
    with without_device(made.receive):
        yield made


@compiled_only
def test_launches_are_those_of_triton(machine):
    """Every kind of call twice; the second time nothing is left to Triton."""
    made = calls()
    first = [machine.count(*call) for call in made]
    assert all(count.all > 1 for count in first) and sum(count.by_triton for count in first) > 100
    again = [machine.count(*call) for call in made]
    assert [count.all for count in again] == [count.all for count in first]
    assert [count.by_triton for count in again] == [0] * len(made)


def blind_to_alignment(bound) -> tuple:
    return bound, "_alignment", lambda addresses: True


def blind_to_constants(bound) -> tuple:
    read = bound.Layout.read

    def tensors_only(self, values):
        given, key = read(self, values)
        return given, key[: 1 + len(self.tensors(values))]

    return bound.Layout, "read", tensors_only


FAULTS = (blind_to_alignment, blind_to_constants)


@compiled_only
@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_key_would_be_seen(machine, monkeypatch, fault):
    """The test above fails with keys that tell apart too little, if the package does not compare them with Triton's."""
    monkeypatch.setattr(*fault(machine.bound))
    monkeypatch.setattr(machine.bound, "_agrees", lambda *_: True)
    with pytest.raises(AssertionError):
        for _ in range(2):
            for call in calls():
                machine.count(*call)


@compiled_only
def test_keys(machine):
    """A key changes with whatever Triton compiles anew for, and with nothing else."""

    def key(n=3, strides=(64, 1), size=16, **tensors):
        shared = machine.bound.Shared(dict(n=n, strides=strides), dict(size=size))
        return machine.bound.Shared(dict(x=torch.zeros(8)) | tensors, before=shared).read()[1]

    assert key() is key(x=torch.ones(8)) is key(n=5) is key(strides=(32, 1))
    others = (
        dict(x=torch.zeros(8, dtype=torch.bfloat16)), dict(x=torch.zeros(9)[1:]), dict(x=None), dict(n=1), dict(n=32), dict(n=2**40),
        dict(n=3.0), dict(strides=(64, 2)), dict(strides=(33, 1)), dict(size=17), dict(y=None),
    )  # fmt: skip
    kinds = {key(), *(key(**given) for given in others)}
    assert len(kinds) == 1 + len(others)


@compiled_only
def test_other_rules_than_known_leave_launches_to_triton(machine, monkeypatch):
    monkeypatch.setattr(machine.bound, "_alignment", lambda addresses: (False,) * len(addresses))
    made = calls()[:4]
    for _ in range(2):
        counts = [machine.count(*call) for call in made]
    assert all(count.by_triton == count.all > 0 for count in counts)


@compiled_only
@pytest.mark.parametrize("version", ["unknown", "hook"])
def test_left_to_triton(machine, monkeypatch, version):
    from triton import knobs

    call, seen = calls()[0], []
    machine.count(*call)
    assert machine.count(*call).by_triton == 0
    if version == "unknown":
        monkeypatch.setattr(machine.bound, "KNOWN", False)
    else:
        knobs.runtime.launch_enter_hook.add(seen.append)
    try:
        count = machine.count(*call)
    finally:
        knobs.runtime.launch_enter_hook.calls.clear()
    assert count.by_triton == count.all == 9


@compiled_only
def test_devices_and_streams(machine, monkeypatch):
    """Another device has code of its own; the stream is that of the moment."""
    from triton.runtime.driver import driver

    call = calls()[0]
    for _ in range(2):
        machine.count(*call)
    monkeypatch.setattr(driver.active, "get_current_stream", lambda device: 7 + device)
    machine.count(*call)
    assert {what[3] for what in machine.launches[-18:]} == {7}
    monkeypatch.setattr(driver.active, "get_current_device", lambda: 1)
    assert machine.count(*call).by_triton > 0
    assert machine.count(*call).by_triton == 0
    assert {what[3] for what in machine.launches[-18:]} == {8}


# ------------------------------------------------------------------------------------------------------------ CUDA graphs


class NoTransfer(TorchDispatchMode):
    """Raises where an operator reads from the device or copies to it. Operators whose sizes depend on data have no kernel for meta tensors,
    which stand for the device's here, and raise by themselves."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
        devices = {x.device.type for x in tensors}
        if len(devices) > 1 or function is torch.ops.aten._local_scalar_dense.default:
            raise AssertionError(f"{function} between {' and '.join(sorted(devices))}")
        return result


class NoData(TorchFunctionMode):
    """Raises where a tensor is made of Python's numbers: dispatch modes do not see that copy."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.tensor, torch.as_tensor, torch.asarray, torch.Tensor.new_tensor):
            raise AssertionError(f"{function.__name__} copies to the device")
        return function(*args, **(kwargs or {}))


@pytest.fixture
def device_only(monkeypatch):
    """Calls run eagerly on meta tensors, as if these had data."""
    monkeypatch.setattr(autograd, "is_plain_eager", lambda tensors: True)
    monkeypatch.setattr(dispatch.BACKENDS["triton"], "unavailable", lambda: None)
    monkeypatch.setattr(dispatch.BACKENDS["triton"], "runs_on", lambda device: True)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # it does not know the meta device
    from miras_kernels.kernels.common import launch

    launched: list[str] = []
    with launch.recording(lambda kernel, *_: launched.append(kernel.__name__), "sm_90"):
        yield launched


def to_meta(x):
    if isinstance(x, tuple):
        return tuple(map(to_meta, x))
    if isinstance(x, mk.MemoryState):
        return x.map(to_meta)
    return x.detach().to("meta").requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x


@pytest.mark.parametrize("final", [False, True], ids=["out", "final state"])
@pytest.mark.parametrize("name", CASES)
def test_a_call_stays_on_the_device(device_only, name, final):
    """Forward and backward of a call can be captured: nothing waits for the device or copies to it."""
    case = Case(name, **{"batch": 2, "tokens": 40, "heads": 3} | CASES[name])
    arguments = {name: to_meta(x) for name, x in arguments_of(case, final=final).items()}
    with NoData(), NoTransfer():
        train(case, arguments)
    assert any(name.endswith("_bwd") for name in device_only)
    assert all(x.grad is not None for x in arguments.values() if isinstance(x, torch.Tensor) and x.requires_grad)


TRANSFERS = {
    "number": lambda x: x.sum().item(),
    "list": lambda x: x.tolist(),
    "copy": lambda x: x + torch.tensor([1.0]).to("meta"),
    "data": lambda x: torch.tensor([1.0, 2.0], device="meta"),
    "selection": lambda x: x[x > 0],
    "branch": lambda x: bool((x > 0).any()),
}


@pytest.mark.parametrize("transfer", TRANSFERS.values(), ids=list(TRANSFERS))
def test_a_transfer_would_be_seen(transfer):
    x = torch.ones(3, device="meta")
    with pytest.raises((AssertionError, RuntimeError, NotImplementedError)), NoData(), NoTransfer():
        transfer(x)
