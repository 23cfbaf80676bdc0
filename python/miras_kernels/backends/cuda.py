"""The CUDA C++ kernels, ``csrc/cuda``, called by ctypes. Importing this module loads no library."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..call import Call
from ..decode.buffers import NAMES as BUFFERS
from ..tables import memories
from ..tables.biases import Bias
from ..tables.retention import Retention
from . import BACKENDS, checkpoints_like, cuda_chain
from .cuda_chain import TOKEN_TYPES, LinearChain, Tokens

__all__ = ["CudaBackend", "Step"]

LIBRARY = Path(__file__).parents[1] / "_cuda.so"


class Step(ctypes.Structure):
    """MirasStep of csrc/cuda/step.h, which describes the fields."""

    TOKENS = ("q", "k", "v", "out")
    GATES = ("lr", "log_decay", "delta", "momentum")
    WORKSPACE = ("products", "hidden", "partial", "scores", "after")
    _fields_: ClassVar = [
        *((name, Tokens) for name in TOKENS),
        *((name, ctypes.c_void_p) for name in (*GATES, *BUFFERS, "ln_weight", "ln_bias", *WORKSPACE)),
        ("ln_eps", ctypes.c_float),
        ("bias_params", ctypes.c_float * Bias.MAX_PARAMETERS),
        ("retention_params", ctypes.c_float * Retention.MAX_PARAMETERS),
        *((name, ctypes.c_int32) for name in ("bias", "retention", "token_type", "N", "T", "H", "K", "V", "C")),
        *((name, ctypes.c_int32) for name in ("lr_per_channel", "decay_per_channel", "delta_per_channel")),
    ]
    #: the fields whose offsets miras_step_layout returns, after the size of the struct
    MARKS = ("q", "out", "lr", BUFFERS[0], BUFFERS[-1], "ln_weight", "products", "after", "ln_eps", "bias_params", "bias",
             "N", "lr_per_channel", "delta_per_channel")  # fmt: skip

    @classmethod
    def layout(cls) -> list[int]:
        return [ctypes.sizeof(cls), *(getattr(cls, name).offset for name in cls.MARKS)]


class CudaBackend:
    """Hand-written decoding steps of both memories, for short inputs without gradients, and the linear memory's forward. The Triton kernels
    differentiate it, from the same checkpoints, and take all other calls.

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
            found = (ctypes.c_int64 * 32)()
            count = library.miras_step_layout(found, len(found))
            chains = (ctypes.c_int64 * 32)()
            of_chains = library.miras_linear_chain_layout(chains, len(chains))
            library.miras_step_buffers.restype = ctypes.c_char_p
            buffers = tuple(library.miras_step_buffers().decode().split())
        except (OSError, AttributeError) as error:
            return None, f"the kernels cannot be loaded: {error}"
        linear, mlp = (row.kernels[self.name].steps for row in (memories.LINEAR, memories.MLP))
        limits = [linear.head, mlp.head, mlp.hidden]
        chain = memories.LINEAR.kernels[self.name].sequences
        of_chain = [chain.head, max(chain.chunk), cuda_chain.COUPLED]
        same = buffers == BUFFERS and list(found[:count]) == Step.layout() + limits
        if not same or list(chains[:of_chains]) != LinearChain.layout() + of_chain:
            return None, f"{self.path.name} was built from other sources than this package: rebuild it"
        library.miras_linear_chain.argtypes = [ctypes.POINTER(LinearChain), ctypes.c_void_p]
        for name in ("miras_linear_step", "miras_mlp_step"):
            getattr(library, name).argtypes = [ctypes.POINTER(Step), ctypes.c_void_p]
        return library, None

    def files(self) -> list[Path]:
        return [self.path]

    def environment(self, device: torch.device) -> dict[str, str]:
        return {}

    def block_tokens(self, call: Call) -> int:
        return 0

    def decodes(self, call: Call) -> bool:
        """Whether a call without gradients has few enough tokens."""
        return call.cu_seqlens is None and 1 <= call.q.shape[1] <= call.memory.kernels[self.name].few

    def runs_on(self, device: torch.device) -> bool:
        return device.type == self.device

    def operands(self, dtype: torch.dtype) -> torch.dtype:
        return dtype  # of the chain; steps multiply in float32

    def refuses(self, call: Call, differentiate: bool) -> str | None:
        if not differentiate and self.decodes(call):
            return self.refuses_steps(call)
        kernels = call.memory.kernels[self.name]
        if kernels.sequences is None:
            return _only_decodes(call, differentiate, kernels.few)
        reason = call.exceeds(self.name) or cuda_chain.refusal(call) or _refuses_device(call)
        if reason is None and differentiate:
            triton = BACKENDS["triton"]
            of_triton = triton.unavailable() or triton.refuses(call, differentiate)
            return of_triton and f"the Triton kernels compute its gradients: {of_triton}"
        return reason

    def refuses_steps(self, call: Call) -> str | None:
        if call.q.dtype not in TOKEN_TYPES:
            return f"it takes float32, bfloat16 or float16 inputs, got {call.q.dtype}"
        return call.exceeds(self.name, steps=True) or _refuses_device(call)

    def stepper(self, call: Call) -> Callable:
        return Steps(self._loaded[0], call)

    def forward(self, call: Call, checkpoint_every: int) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        return cuda_chain.forward(self._loaded[0], call, checkpoint_every)

    def saved_like(self, call: Call, checkpoint_every: int) -> list[Tensor]:
        return checkpoints_like(call, checkpoint_every)

    def backward(self, call: Call, checkpoint_every: int, saved: list[Tensor], grad_out: Tensor, grad_state: list[Tensor]) -> dict:
        return BACKENDS["triton"].backward(call, checkpoint_every, saved, grad_out, grad_state)


class Steps:
    """Decoding steps for calls like one: see :func:`miras_kernels.dispatch.stepper`. A step fills a struct and launches kernels; it waits
    for nothing.
    """

    def __init__(self, library: Any, call: Call):
        self.library, self.launch = library, getattr(library, f"miras_{call.memory.name}_step")
        n, t, h = call.q.shape[:3]
        norm = dict(ln_weight=_gate(call.ln_weight), ln_bias=_gate(call.ln_bias)) if call.memory.needs_norm else {}
        self.tensors = norm | self._workspace(call)  # as long as their addresses are used
        self.constants: dict[str, Any] = {name: _address(x) for name, x in self.tensors.items()}
        self.constants |= dict(
            bias=call.bias.tag, retention=call.retention.tag, token_type=TOKEN_TYPES[call.q.dtype], N=n, T=t, H=h,
            K=call.hidden or call.q.shape[-1], V=call.v.shape[-1], C=call.chunk_size,
            ln_eps=call.ln_eps or 0.0, bias_params=_floats(call.bias.padded), retention_params=_floats(call.retention.padded),
        )  # fmt: skip

    def __call__(self, buffers, q, k, v, lr, log_decay, delta, momentum, out) -> None:
        tokens = [x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v, out)]
        gates = [_gate(x) for x in (lr, log_decay, delta, momentum)]
        step = Step(
            *map(Tokens.of, tokens), *map(_address, gates), *map(_address, buffers.all()), lr_per_channel=lr.dim() == 4,
            decay_per_channel=buffers.open_log_decay.dim() == 3, delta_per_channel=delta is not None and delta.dim() == 4, **self.constants,
        )  # fmt: skip
        with torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext():
            error = self.launch(ctypes.byref(step), torch.cuda.current_stream().cuda_stream if q.is_cuda else None)
        if error:
            raise RuntimeError(f"cuda: launching a step failed: {self.library.miras_cuda_error(error).decode()}")
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


def _only_decodes(call: Call, differentiate: bool, few: int) -> str:
    if differentiate:
        return "it only decodes: it has no gradients"
    if call.cu_seqlens is not None:
        return "it only decodes: it takes no packed sequences"
    return f"it only decodes: calls of at most {few} tokens, got {call.q.shape[1]}"


def _refuses_device(call: Call) -> str | None:
    if call.q.is_cuda and torch.cuda.get_device_capability(call.q.device) < (8, 0):
        return f"it needs compute capability 8.0, got {torch.cuda.get_device_capability(call.q.device)}"
    return None


def _gate(x: Tensor | None) -> Tensor | None:
    """A gate or LayerNorm parameter as the kernels take it."""
    return None if x is None else x.detach().to(torch.float32).contiguous()


def _floats(numbers: Sequence[float]) -> ctypes.Array[ctypes.c_float]:
    return (ctypes.c_float * len(numbers))(*numbers)


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _why_not_built() -> str:
    try:
        return importlib.import_module("miras_kernels._build_info").CUDA_MISSING or "the library was removed"
    except (ImportError, AttributeError):
        return "the package was installed without them"
