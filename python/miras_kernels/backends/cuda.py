"""The CUDA C++ kernels as a backend: decoding, ``csrc/cuda``, called by ctypes. Importing this module loads no library."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..call import Call

__all__ = ["CudaBackend", "Step"]

LIBRARY = Path(__file__).parents[1] / "_cuda.so"
#: as MirasTokenType has them
TOKEN_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Tokens(ctypes.Structure):
    """MirasTokens of csrc/cuda/step.h."""

    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("batch", "token", "head"))]

    @staticmethod
    def of(x: Tensor) -> Tokens:
        return Tokens(x.data_ptr(), *x.stride()[:3])


class Step(ctypes.Structure):
    """MirasStep of csrc/cuda/step.h, which says what the fields are."""

    TOKENS = ("q", "k", "v", "out")
    GATES = ("lr", "log_decay", "delta", "theta")
    STATE = ("start", "primal", "rho", "carried", "momentum", "left", "right", "kept", "moved", "sums", "position")
    BETWEEN = ("products", "hidden", "partial", "scores", "after")
    _fields_ = [
        *((name, Tokens) for name in TOKENS),
        *((name, ctypes.c_void_p) for name in (*GATES, *STATE, "ln_weight", "ln_bias", *BETWEEN)),
        ("ln_eps", ctypes.c_float),
        ("bias_params", ctypes.c_float * 3),
        ("retention_params", ctypes.c_float * 2),
        *((name, ctypes.c_int32) for name in ("bias", "retention", "token_type", "N", "T", "H", "K", "V", "C")),
        *((name, ctypes.c_int32) for name in ("lr_per_channel", "decay_per_channel", "delta_per_channel")),
    ]
    #: what miras_step_layout tells the offsets of, after the size of the whole
    MARKS = ("q", "out", "lr", "start", "left", "sums", "position", "ln_weight", "products", "after", "ln_eps", "bias_params", "bias",
             "N", "lr_per_channel", "delta_per_channel")  # fmt: skip

    @classmethod
    def layout(cls) -> list[int]:
        return [ctypes.sizeof(cls), *(getattr(cls, name).offset for name in cls.MARKS)]


class CudaBackend:
    """Hand-written decoding steps of both memories: short inputs without gradients; the Triton kernels take the others.

    Args:
        path: of the library.
        device: the type of the tensors that it takes; "cpu" for one that the tests build without CUDA.
    """

    name = "cuda"
    unverified = "leave"
    variants: tuple[str, ...] = ()

    def __init__(self, path: Path = LIBRARY, device: str = "cuda"):
        self.path, self.device = path, device

    def unavailable(self) -> str | None:
        if self.device == "cuda" and torch.version.hip is not None:
            return "it is made for NVIDIA's GPUs"
        if not self.path.exists():
            return f"the kernels are not built: {_why_not_built()}"
        if self.device == "cuda" and not torch.cuda.is_available():
            return "there is no GPU here"
        return self._loaded[1]

    @functools.cached_property
    def _loaded(self) -> tuple[ctypes.CDLL | None, str | None]:
        """The library and None, or None and why it cannot be used."""
        try:
            library = ctypes.CDLL(str(self.path))
            library.miras_cuda_error.restype = ctypes.c_char_p
            found = (ctypes.c_int64 * 32)()
            count = library.miras_step_layout(found, len(found))
        except (OSError, AttributeError) as error:
            return None, f"the kernels cannot be loaded: {error}"
        if list(found[:count]) != Step.layout():
            return None, f"{self.path.name} was built from other sources than this package: build it anew"
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
        return True

    def runs_on(self, device: torch.device) -> bool:
        return device.type == self.device

    def operands(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float32

    def refuses(self, call: Call, differentiate: bool) -> str | None:
        if differentiate:
            return "it only decodes: it has no gradients"
        if call.cu_seqlens is not None:
            return "it only decodes: it takes no packed sequences"
        few = call.memory.kernels[self.name].few
        if call.q.shape[1] > few:
            return f"it only decodes: calls of at most {few} tokens, got {call.q.shape[1]}"
        return self.refuses_steps(call)

    def refuses_steps(self, call: Call) -> str | None:
        if call.q.dtype not in TOKEN_TYPES:
            return f"it takes float32, bfloat16 or float16 inputs, got {call.q.dtype}"
        exceeded = call.memory.kernels[self.name].steps.exceeded_by(call)
        if exceeded is not None:
            return exceeded
        if call.q.is_cuda and torch.cuda.get_device_capability(call.q.device) < (8, 0):
            return f"it needs compute capability 8.0, got {torch.cuda.get_device_capability(call.q.device)}"
        return None

    def stepper(self, call: Call) -> Callable:
        """``run(buffers, q, k, v, lr, log_decay, delta, momentum, out)``: fills a struct and launches; waits for nothing."""
        from ..decode.decoder import thresholds

        launch = getattr(self._loaded[0], f"miras_{call.memory.name}_step")
        n, t, h = call.q.shape[:3]
        constant = dict(
            bias=call.bias.tag, retention=call.retention.tag, token_type=TOKEN_TYPES[call.q.dtype], N=n, T=t, H=h,
            K=call.hidden or call.q.shape[-1], V=call.v.shape[-1], C=call.chunk_size,
        )  # fmt: skip
        bias, gate = (ctypes.c_float * 3)(*call.bias.padded), (ctypes.c_float * 2)(*call.retention.padded)
        threshold, parameters = thresholds(call), {}
        if call.memory.needs_norm:
            parameters = dict(ln_weight=_gate(call.ln_weight), ln_bias=_gate(call.ln_bias))
        kept = parameters | self._between(call)
        constant |= {name: x.data_ptr() for name, x in kept.items()}
        constant |= dict(ln_eps=call.ln_eps or 0.0, bias_params=bias, retention_params=gate)

        def run(buffers, q, k, v, lr, log_decay, delta, momentum, out) -> None:
            delta = threshold(delta) if isinstance(delta, float) else delta
            tokens = [x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v, out)]
            gates = [_gate(x) for x in (lr, log_decay, delta, momentum)]
            x = buffers
            state = (
                x.start, x.primal, x.rho, x.carried, x.momentum, x.left, x.right, x.kept, x.moved, x.log_decay, x.position,
            )  # fmt: skip
            step = Step(
                *map(Tokens.of, tokens), *map(_address, gates), *map(_address, state), lr_per_channel=lr.dim() == 4,
                decay_per_channel=x.log_decay.dim() == 3, delta_per_channel=delta is not None and delta.dim() == 4, **constant,
            )  # fmt: skip
            with torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext():
                error = launch(ctypes.byref(step), torch.cuda.current_stream().cuda_stream if q.is_cuda else None)
            if error:
                raise RuntimeError(f"cuda: launching a step failed: {self._loaded[0].miras_cuda_error(error).decode()}")
            if tokens[-1] is not out:
                out.copy_(tokens[-1])

        run.keeps = kept  # as long as their addresses
        return run

    def _between(self, call: Call) -> dict[str, Tensor]:
        """Room for what one launch of a step writes for the next."""
        (n, _, h, d), chunk = call.v.shape, call.chunk_size
        room = lambda *shape: torch.empty(n, h, *shape, dtype=torch.float32, device=call.q.device)
        if call.memory.name == "linear":
            return dict(products=room(4, d))
        hidden = call.hidden
        parts = -(-hidden // self._loaded[0].miras_mlp_units())
        return dict(hidden=room(2, hidden), partial=room(2, parts, d), scores=room(parts, chunk), after=room(2 * (2 + chunk) + 1))

    def forward(self, call: Call, checkpoint_every: int) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        from ..decode import decoder as decode

        return *decode.forward(call, self.name), []

    def saved_like(self, call: Call, checkpoint_every: int) -> list[Tensor]:
        return []

    def backward(self, call: Call, checkpoint_every: int, saved: list[Tensor], grad_out: Tensor, grad_state: list[Tensor]) -> dict:
        raise NotImplementedError("the cuda backend refuses calls that need gradients")


def _gate(x: Tensor | None) -> Tensor | None:
    """A gate or parameter as the kernels take it."""
    return None if x is None else x.detach().to(torch.float32).contiguous()


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _why_not_built() -> str:
    try:
        return importlib.import_module("miras_kernels._build_info").CUDA_MISSING or "the library was removed"
    except (ImportError, AttributeError):
        return "the package was installed without them"
