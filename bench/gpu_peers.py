"""The other libraries that bench/gpu.py times, each on inputs that are valid for it, at the same sizes.

They compute other recurrences than ours: what is compared is the price of a layer with the same heads and the same state.
Signatures as of fla-core 0.6.0, mlstm-kernels 2.0.6, attn-gym 0.0.17, titans-pytorch 0.5.5 and torch 2.11. Whatever a peer raises
becomes a note.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from contenders import titans_layer
from gpu_plan import FORWARD


@dataclasses.dataclass(frozen=True)
class Peer:
    """
    Attributes:
        package: whose version is reported.
        make: ``tensors -> (function, leaves)``; the function returns the output.
        memory: which of ours it is compared with.
        everywhere: at the shapes beside the target row too, where time is short.
        delta_rule: a delta rule with a ``D x D`` state: what our fast biases are measured against.
        tunes: its first call lets ``triton.autotune`` try dozens of configurations, each to be compiled.
        compiles: its first call compiles anything.
    """

    package: str
    make: Callable
    memory: str = "linear"
    everywhere: bool = False
    delta_rule: bool = False
    tunes: bool = False
    compiles: bool = True


def _sdpa(x):
    """Softmax attention, cuDNN's kernels: the cost of attention at this length."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    q, k, v = x.heads_first

    def run():
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
            return scaled_dot_product_attention(q, k, v, is_causal=True)

    return run, (q, k, v)


def _delta_rule(x):
    from fla.ops.delta_rule import chunk_delta_rule

    return lambda: chunk_delta_rule(x.q, x.k, x.v, x.beta)[0], (x.q, x.k, x.v, x.beta)


def _gated_delta_rule(x):
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    return lambda: chunk_gated_delta_rule(x.q, x.k, x.v, x.log_decay, x.beta)[0], (x.q, x.k, x.v, x.log_decay, x.beta)


def _simple_gla(x):
    from fla.ops.simple_gla import chunk_simple_gla

    return lambda: chunk_simple_gla(x.q, x.k, x.v, x.log_decay)[0], (x.q, x.k, x.v, x.log_decay)


def _ttt_linear(x):
    """Chunks of 16 tokens, as its model has them, with its LayerNorm in the inner loss."""
    from fla.ops.ttt import fused_chunk_ttt_linear

    weight, bias, eta = x.layer_norm
    return lambda: fused_chunk_ttt_linear(x.q, x.k, x.v, weight, bias, eta, chunk_size=16)[0], (x.q, x.k, x.v, weight, bias, eta)


def _mlstm(x):
    """The mLSTM with sigmoid input gates, its chunk size left to it."""
    from mlstm_kernels.torch import get_mlstm_kernel

    kernel = get_mlstm_kernel("chunkwise--triton_xl_chunk_siging")
    leaves = (*x.heads_first, *x.mlstm_gates)
    return lambda: kernel(*leaves), leaves


def _attn_gym(x):
    from attn_gym.linear import chunk_gdn

    return lambda: chunk_gdn(x.q, x.k, x.v, x.log_decay, x.beta)[0], (x.q, x.k, x.v, x.log_decay, x.beta)


def _titans(x):
    """The MLP memory of titans-pytorch: see :func:`contenders.titans_layer`."""
    return titans_layer(x.inputs(x.shape.base))


TITANS = "titans-pytorch"
PEERS = {
    "fla delta rule": Peer("fla-core", _delta_rule, everywhere=True, delta_rule=True, tunes=True),
    "torch SDPA (cuDNN)": Peer("torch", _sdpa, everywhere=True),
    "mLSTM (sigmoid)": Peer("mlstm-kernels", _mlstm, everywhere=True),
    "fla gated delta rule": Peer("fla-core", _gated_delta_rule, delta_rule=True, tunes=True),
    "fla simple GLA": Peer("fla-core", _simple_gla, tunes=True),
    "fla TTT-linear (C 16)": Peer("fla-core", _ttt_linear, tunes=True),
    "attn-gym gated delta rule": Peer("attn-gym", _attn_gym, delta_rule=True),
    TITANS: Peer("titans-pytorch", _titans, memory="mlp", everywhere=True, compiles=False),
}


def of_memory(memory: str) -> tuple[str, ...]:
    """Whom a memory of ours is compared with."""
    return tuple(name for name, peer in PEERS.items() if peer.memory == memory)


def few(memory: str) -> tuple[str, ...]:
    """Those of them who are timed at every shape."""
    return tuple(name for name in of_memory(memory) if PEERS[name].everywhere)


def make(name: str, tensors, direction: str) -> Callable[[], tuple]:
    """A peer as a function without arguments that returns its output or its gradients."""
    import torch

    run, leaves = PEERS[name].make(tensors)

    def forward() -> tuple:
        with torch.no_grad():
            return (run(),)

    def both() -> tuple:
        out = run()
        return torch.autograd.grad(out, leaves, tensors.grad_like(out))

    return forward if direction == FORWARD else both


_share = {"index": 0, "count": 1}


def compile_share(index: int, count: int) -> None:
    """Let this process' autotuners try every ``count``-th configuration only, and keep no choice on disk.

    Several processes then fill the compilers' cache together, with nobody's timings disturbed: the process that measures tunes
    for itself. Where Triton's autotuner is not the one that this knows, it does all of its work.
    """
    from triton.runtime.autotuner import Autotuner

    _share.update(index=index, count=count)
    bench = getattr(Autotuner, "_bench", None)
    if bench is None or hasattr(bench, "whole") or not hasattr(Autotuner, "check_disk_cache"):
        return

    def some(self, *args, config, **meta):
        if config in self.configs and self.configs.index(config) % _share["count"] != _share["index"]:
            return [float("inf")] * 3
        return bench(self, *args, config=config, **meta)

    def never_cached(self, key, configs, run):
        run()
        return False

    some.whole = bench
    Autotuner._bench, Autotuner.check_disk_cache = some, never_cached
