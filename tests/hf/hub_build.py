"""Load a build for the Hub where the package is not installed, and save what it computes: ``python hub_build.py FOLDER BACKEND OUT``.

With the kernels package if it is there (tests/hf/test_hub_kernels.py), else as that imports it.
"""

import importlib.util
import json
import sys
from pathlib import Path

import torch


def load(folder: Path):
    try:
        import kernels

        return kernels.get_local_kernel(folder)
    except (ImportError, AttributeError):
        variant = folder / "build" / "torch-universal"
        name = json.loads((variant / "metadata.json").read_text())["id"]
        spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module


def results(memories, backend: str) -> dict:
    """Outputs and gradients of a call of each memory and of a block."""
    torch.manual_seed(0)
    q, k, v = (torch.nn.functional.normalize(torch.randn(1, 24, 2, 16), dim=-1).requires_grad_() for _ in range(3))
    w1, w2 = (torch.randn(1, 2, *shape) / 4 for shape in ((16, 32), (32, 16)))
    lr, delta, norm = torch.full((1, 24, 2), 0.05), torch.full((1, 24, 2), 0.5), torch.ones(2, 16)
    out, _ = memories.linear_memory(q, k, v, lr, bias=memories.Huber("switch"), delta=delta, chunk_size=16, backend=backend)
    grads = torch.autograd.grad(out.square().sum(), (q, k, v))
    found = {"linear": out.detach(), **dict(zip(("grad_q", "grad_k", "grad_v"), grads, strict=True))}
    with torch.no_grad():
        found["mlp"], _ = memories.mlp_memory(
            q, k, v, lr, initial_state=(w1, w2), ln_weight=norm, ln_bias=0 * norm, chunk_size=16, backend=backend
        )
        block = memories.layers.MemoryBlock(32, 2, preset="yaad_linear", backend=backend)
        found["block"] = block(torch.randn(1, 24, 32))[0]
    return found


if __name__ == "__main__":
    sys.modules["miras_kernels"] = None  # importing it is an error
    folder, backend, out = sys.argv[1:]
    module = load(Path(folder))
    torch.save({**results(module, backend), "module": module.__name__, "with_kernels": "kernels" in sys.modules}, out)
