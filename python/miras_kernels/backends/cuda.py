"""The CUDA C++ kernels, ``csrc/cuda``, as a backend, called by ctypes. Importing this module loads no library."""

from __future__ import annotations

import ctypes
import functools
import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..call import Call
from ..decode.buffers import NAMES as BUFFERS
from ..expressions import OPERATIONS
from ..tables import memories
from ..tables.biases import Bias
from ..tables.retention import Retention
from . import BACKENDS, checkpoints_like, cuda_linear, cuda_linear_backward, cuda_mlp, cuda_mlp_backward
from .cuda_program import REGISTERS, encoded, registers
from .cuda_types import TOKEN_TYPES, Tokens, address, contiguous, floats, launch, refuses_chunks

__all__ = ["CudaBackend", "Step"]

LIBRARY = Path(__file__).parents[1] / "_cuda.so"
#: by memory, what reads whole chunks of it: a module with the struct `Chain`, `refuses` and `forward`
SEQUENCES: dict[str, ModuleType] = {"linear": cuda_linear, "mlp": cuda_mlp}
#: by memory, its backward: a module with the struct `Backward`, `refuses` and `backward`; the Triton kernels do what it refuses
BACKWARDS: dict[str, ModuleType] = {"linear": cuda_linear_backward, "mlp": cuda_mlp_backward}


class Step(ctypes.Structure):
    """MirasStep of csrc/cuda/step.h, which describes the fields."""

    TOKENS = ("q", "k", "v", "out")
    GATES = ("lr", "log_decay", "delta", "momentum")
    WORKSPACE = ("products", "hidden", "partial", "scores", "after")
    PROGRAMS = ("bias_program", "retention_program")
    _fields_: ClassVar = [
        *((name, Tokens) for name in TOKENS),
        *((name, ctypes.c_void_p) for name in (*GATES, *BUFFERS, "ln_weight", "ln_bias", *WORKSPACE, *PROGRAMS)),
        ("ln_eps", ctypes.c_float),
        ("bias_params", ctypes.c_float * Bias.MAX_PARAMETERS),
        ("retention_params", ctypes.c_float * Retention.MAX_PARAMETERS),
        *((name, ctypes.c_int32) for name in ("bias", "retention", "token_type", "N", "T", "H", "K", "V", "C")),
        *((name, ctypes.c_int32) for name in ("lr_per_channel", "decay_per_channel", "delta_per_channel")),
    ]
    #: the fields whose offsets miras_step_layout returns, after the size of the struct
    MARKS = ("q", "out", "lr", BUFFERS[0], BUFFERS[-1], "ln_weight", "products", "after", *PROGRAMS, "ln_eps", "bias_params",
             "bias", "N", "lr_per_channel", "delta_per_channel")  # fmt: skip

    @classmethod
    def layout(cls) -> list[int]:
        return [ctypes.sizeof(cls), *(getattr(cls, name).offset for name in cls.MARKS)]


class CudaBackend:
    """Hand-written decoding steps of both memories, for short inputs without gradients, and the forward of some memories' chunks
    (``SEQUENCES``), with their backward (``BACKWARDS``) or that of the Triton kernels.

    Args:
        path: of the library.
        device: the device type of the tensors that it takes; "cpu" for a library that the tests build without CUDA.
    """

    name = "cuda"
    unverified = "skip"
    variants: tuple[str, ...] = ()

    def __init__(self, path: Path = LIBRARY, device: str = "cuda"):
        self.path, self.device = path, device

    def unavailable(self) -> str | None:
        if self.device == "cuda" and torch.version.hip is not None:
            return "it runs on NVIDIA GPUs only"
        if not self.path.exists():
            return f"the kernels are not built: {_why_not_built()}"
        if self.device == "cuda" and not torch.cuda.is_available():
            return "there is no GPU here"
        return self._loaded[1]

    @functools.cached_property
    def _loaded(self) -> tuple[Any, str | None]:
        """The library and None, or None and the reason why it cannot be used."""
        try:
            library = ctypes.CDLL(str(self.path))
            library.miras_cuda_error.restype = ctypes.c_char_p
            found = _layout(library.miras_step_layout)
            library.miras_step_buffers.restype = ctypes.c_char_p
            buffers = tuple(library.miras_step_buffers().decode().split())
            library.miras_operations.restype = ctypes.c_char_p
            operations = library.miras_operations().decode().split()
            chains = {name: _layout(getattr(library, f"miras_{name}_chain_layout")) for name in SEQUENCES}
            backwards = {name: _layout(getattr(library, f"miras_{name}_backward_layout")) for name in BACKWARDS}
        except (OSError, AttributeError) as error:
            return None, f"the kernels cannot be loaded: {error}"
        linear, mlp = (row.kernels[self.name].steps for row in (memories.LINEAR, memories.MLP))
        limits = [linear.head, mlp.head, mlp.hidden, REGISTERS]
        same = chains == {name: kernels.Chain.layout() for name, kernels in SEQUENCES.items()} and operations == list(OPERATIONS)
        same = same and backwards == {name: kernels.Backward.layout() for name, kernels in BACKWARDS.items()}
        if buffers != BUFFERS or found != Step.layout() + limits or not same:
            return None, f"{self.path.name} was built from other sources than this package: rebuild it"
        for name in ("miras_linear_step", "miras_mlp_step"):
            getattr(library, name).argtypes = [ctypes.POINTER(Step), ctypes.c_void_p]
        for name, kernels in SEQUENCES.items():
            getattr(library, f"miras_{name}_chain").argtypes = [ctypes.POINTER(kernels.Chain), ctypes.c_void_p]
        library.miras_linear_reverse.argtypes = [ctypes.POINTER(cuda_linear_backward.Backward), ctypes.c_void_p]
        for function in (library.miras_mlp_replay, library.miras_mlp_reverse):
            function.argtypes = [ctypes.POINTER(cuda_mlp_backward.Backward), ctypes.c_void_p]
        return library, None

    def files(self) -> list[Path]:
        return [self.path, *BACKENDS["triton"].files()]

    def environment(self, device: torch.device) -> dict[str, str]:
        triton = BACKENDS["triton"]  # does the backward of some calls
        return {} if triton.unavailable() else triton.environment(device)

    def block_tokens(self, call: Call) -> int:
        return 0

    def decodes(self, call: Call) -> bool:
        """Whether a call without gradients has few enough tokens."""
        return call.cu_seqlens is None and call.q.shape[1] <= call.memory.kernels[self.name].few

    def decodes_decay_first(self, call: Call) -> bool:
        return False

    def runs_on(self, device: torch.device) -> bool:
        return device.type == self.device

    def operands(self, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def refuses(self, call: Call, differentiate: bool) -> str | None:
        if not differentiate and self.decodes(call):
            return self.refuses_steps(call)
        if call.memory.name in SEQUENCES:
            kernels, triton = SEQUENCES[call.memory.name], BACKENDS["triton"]
            reason = _refuses_device(call) or refuses_chunks(call) or kernels.refuses(self._loaded[0], call)
            if reason is None and differentiate and (own := self.refuses_backward(call)):
                reason = triton.unavailable() or triton.refuses(call, True)
                return None if reason is None else f"the Triton kernels do its backward, since {own}: {reason}"
            return reason
        if differentiate:
            return "it only decodes: it has no gradients"
        if call.cu_seqlens is not None:
            return "it only decodes: it takes no packed sequences"
        return f"it only decodes: calls of at most {call.memory.kernels[self.name].few} tokens, got {call.q.shape[1]}"

    def refuses_backward(self, call: Call) -> str | None:
        """The Triton kernels do what it refuses."""
        if (kernels := BACKWARDS.get(call.memory.name)) is None:
            return "it has no backward of this memory"
        return kernels.refuses(self._loaded[0], call)

    def refuses_steps(self, call: Call) -> str | None:
        if call.q.dtype not in TOKEN_TYPES:
            return f"it takes float32, bfloat16 or float16 inputs, got {call.q.dtype}"
        exceeded = call.exceeds(self.name, steps=True)
        if exceeded is not None:
            return exceeded
        for row in (call.bias, call.retention):
            if registers(row) > REGISTERS:
                return f"it has {REGISTERS} registers for an expression's values, {row!r} needs {registers(row)}"
        return _refuses_device(call)

    def stepper(self, call: Call) -> Callable:
        return Steps(self._loaded[0], call)

    def forward(self, call: Call, checkpoint_every: int) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        return SEQUENCES[call.memory.name].forward(self._loaded[0], call, checkpoint_every)

    def saved_like(self, call: Call, checkpoint_every: int) -> list[Tensor]:
        return checkpoints_like(call, checkpoint_every)

    def backward(self, call: Call, checkpoint_every: int, saved: list[Tensor], grad_out: Tensor, grad_state: list[Tensor]) -> dict:
        if self.refuses_backward(call):
            return BACKENDS["triton"].backward(call, checkpoint_every, saved, grad_out, grad_state)
        return BACKWARDS[call.memory.name].backward(self._loaded[0], call, checkpoint_every, saved, grad_out, grad_state)


class Steps:
    """Decoding steps for calls like one: see :func:`miras_kernels.dispatch.stepper`. A step fills a struct and launches kernels; it waits
    for nothing.
    """

    def __init__(self, library: Any, call: Call):
        self.library, self.launch = library, getattr(library, f"miras_{call.memory.name}_step")
        n, t, h = call.q.shape[:3]
        norm = dict(ln_weight=contiguous(call.ln_weight), ln_bias=contiguous(call.ln_bias)) if call.memory.needs_norm else {}
        programs = {name: encoded(row, call.q.device) for name, row in zip(Step.PROGRAMS, (call.bias, call.retention), strict=True)}
        self.tensors = norm | programs | self._workspace(call)  # as long as their addresses are used
        self.constants: dict[str, Any] = {name: address(x) for name, x in self.tensors.items()}
        self.constants |= dict(
            bias=call.bias.tag, retention=call.retention.tag, token_type=TOKEN_TYPES[call.q.dtype], N=n, T=t, H=h,
            K=call.hidden or call.q.shape[-1], V=call.v.shape[-1], C=call.chunk_size,
            ln_eps=call.ln_eps or 0.0, bias_params=floats(call.bias.padded), retention_params=floats(call.retention.padded),
        )  # fmt: skip

    def __call__(self, buffers, q, k, v, lr, log_decay, delta, momentum, out) -> None:
        tokens = [x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v, out)]
        gates = [contiguous(x) for x in (lr, log_decay, delta, momentum)]
        step = Step(
            *map(Tokens.of, tokens), *map(address, gates), *map(address, buffers.all()), lr_per_channel=lr.dim() == 4,
            decay_per_channel=buffers.open_log_decay.dim() == 3, delta_per_channel=delta is not None and delta.dim() == 4, **self.constants,
        )  # fmt: skip
        launch(self.library, self.launch, step, q.device)
        if tokens[-1] is not out:
            out.copy_(tokens[-1])

    def _workspace(self, call: Call) -> dict[str, Tensor | None]:
        """What one launch of a step writes for the next."""
        (n, _, h, d), chunk = call.v.shape, call.chunk_size
        room = lambda *shape: torch.empty(n, h, *shape, dtype=torch.float32, device=call.q.device)
        if not call.hidden:
            return dict(products=room(4, d))
        parts = -(-call.hidden // self.library.miras_mlp_units())
        return dict(hidden=room(2, call.hidden), partial=room(2, parts, d), scores=room(parts, chunk), after=room(2 * (2 + chunk) + 1))


def _layout(function: Callable) -> list[int]:
    """What a function of the library says of a struct."""
    found = (ctypes.c_int64 * 32)()
    return list(found[: function(found, len(found))])


def _refuses_device(call: Call) -> str | None:
    if call.q.is_cuda and torch.cuda.get_device_capability(call.q.device) < (8, 0):
        return f"it needs compute capability 8.0, got {torch.cuda.get_device_capability(call.q.device)}"
    return None


def _why_not_built() -> str:
    try:
        return importlib.import_module("miras_kernels._build_info").CUDA_MISSING or "the library was removed"
    except (ImportError, AttributeError):
        return "the package was installed without them"
