"""What :func:`~miras_kernels.hf.accelerate` gives a model, in the form that the ``kernels`` package loads from a local folder::

    from kernels import Mode, kernelize, use_kernel_mapping
    from miras_kernels.hf.hub import write_kernels

    with use_kernel_mapping(write_kernels(folder), inherit_mapping=False):
        kernelize(model, mode=Mode.INFERENCE, device="cpu")

transformers decorates the functions that these replace where it accepts the installed version of ``kernels``. They are replaced for all
models of the process, unlike by ``accelerate``. ``transformers.KernelConfig`` and ``from_pretrained(use_kernels=True, kernel_config=...)``
refuse CPUs (5.20 to 5.24), so that ``kernelize`` is called directly.

``make hub`` (:func:`write_build`) writes the memories themselves, with the Triton kernels, the reference and the layers, as a repository
that is ready to be uploaded. It needs nothing of this package where it is loaded::

    memories = kernels.get_local_kernel(Path("build/hub"))  # or kernels.get_kernel(name of the repository), where it has been uploaded
    out, state = memories.linear_memory(q, k, v, lr)
    block = memories.layers.MemoryBlock(512, 8)
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .. import __version__
from . import linear_attention

__all__ = ["LAYERS", "write_build", "write_kernels"]


class chunk_gated_delta_rule(nn.Module):
    can_torch_compile = True

    def forward(self, query, key, value, g, beta, chunk_size=64, initial_state=None, output_final_state=False,
                use_qk_l2norm_in_kernel=False, **rest) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        return linear_attention.gated_delta_rule(
            query, key, value, g, beta, initial_state, output_final_state, use_qk_l2norm_in_kernel, **rest
        )


class fused_recurrent_gated_delta_rule(nn.Module):
    can_torch_compile = True

    def forward(self, query, key, value, g, beta, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=False,
                **rest) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        return linear_attention.gated_delta_rule(
            query, key, value, g, beta, initial_state, output_final_state, use_qk_l2norm_in_kernel, **rest
        )


class chunk_kda(nn.Module):
    can_torch_compile = True

    def forward(self, query, key, value, g, beta, chunk_size=64, initial_state=None, output_final_state=False,
                use_qk_l2norm_in_kernel=False, **rest) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        return linear_attention.kimi_delta_attention(
            query, key, value, g, beta, initial_state, output_final_state, use_qk_l2norm_in_kernel, **rest
        )


class fused_recurrent_kda(nn.Module):
    can_torch_compile = True

    def forward(self, query, key, value, g, beta, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=False,
                **rest) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        return linear_attention.kimi_delta_attention(
            query, key, value, g, beta, initial_state, output_final_state, use_qk_l2norm_in_kernel, **rest
        )


class causal_conv1d_fn(nn.Module):
    can_torch_compile = True

    def forward(self, hidden_states, weight, bias=None, activation=None, **rest) -> Tensor:
        return linear_attention.convolution(hidden_states, weight, bias, activation, **rest)


#: by the names under which transformers looks for them
LAYERS = {
    layer.__name__: layer
    for layer in (chunk_gated_delta_rule, fused_recurrent_gated_delta_rule, chunk_kda, fused_recurrent_kda, causal_conv1d_fn)
}


def write_kernels(folder: str | Path) -> dict[str, dict[str, Any]]:
    """Write a repository of kernels for CPUs that loads this package's functions, and return its mapping for ``use_kernel_mapping``.

    Raises:
        ImportError: ``kernels`` is not installed.
    """
    LocalLayerRepository = importlib.import_module("kernels").LocalLayerRepository  # not this repository's folder of that name

    variant = Path(folder) / "build" / "torch-cpu"
    variant.mkdir(parents=True, exist_ok=True)
    _write_metadata(variant, f"miras_kernels_{__version__.replace('.', '_')}_torch_cpu", "cpu")
    (variant / "__init__.py").write_text("from miras_kernels.hf import hub as layers\n", "utf-8")
    return {name: {"cpu": LocalLayerRepository(Path(folder), layer_name=name)} for name in LAYERS}


def _write_metadata(variant: Path, name: str, backend: str) -> None:
    """What ``kernels`` 0.17 reads; ``name`` is that of the module when it has been loaded."""
    metadata = {"id": name, "name": "miras-kernels", "version": 1, "license": "Apache-2.0", "python-depends": [],
                "backend": {"type": backend}}  # fmt: skip
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=1), "utf-8")


# --------------------------------------------------------------------------------------------- a repository for the Hub

_LEFT_OUT = {"hf", "interop", "cli", "offline", "__pycache__", "__main__.py", "warmup.py", "_build_info.py"}
_BUILD_INFO = """CPP_MISSING = CUDA_MISSING = "a build for the Hub has the Triton kernels alone; pip install miras-kernels has them"\n"""
#: where the package names itself
_OWN_NAME = re.compile(
    r"""(?<=^import )miras_kernels$|(?<=from )miras_kernels\b|(?<=")miras_kernels(?=\.|::)|(?<=torch\.ops\.)miras_kernels\b""", re.MULTILINE
)
_CARD = """---
library_name: kernels
license: apache-2.0
---
# miras-kernels {version}

Fused forward and backward kernels for sequence models that are associative memories trained while they read: the Triton kernels, the
reference and the layers of miras-kernels. It needs PyTorch, and Triton for the kernels. On CPUs the reference runs; the C++ kernels are in
the package only.

```python
import kernels

memories = kernels.get_kernel("NAME OF THIS REPOSITORY")
out, state = memories.linear_memory(q, k, v, lr, bias=memories.Huber("switch"), delta=delta)
block = memories.layers.MemoryBlock(512, 8, preset="yaad")
```
"""


def write_build(folder: str | Path) -> Path:
    """Write the memories as a universal build: ``build/torch-universal``, and a README.md; the folder of the build is returned.

    Its module has a name of its own, and so have its operators, so that it does not collide with an installed package or another version.

    Raises:
        FileExistsError: the folder has files already.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"folder: expected a new or empty one, got {folder}")
    sources = dict(_sources())
    digest = hashlib.sha256("".join(name + text for name, text in sorted(sources.items())).encode()).hexdigest()[:8]
    name, variant = f"miras_kernels_{__version__.replace('.', '_')}_{digest}", folder / "build" / "torch-universal"
    own = lambda found: f"{name} as miras_kernels" if found.string[: found.start()].endswith("\nimport ") else name
    for path, text in sources.items():
        (variant / path).parent.mkdir(parents=True, exist_ok=True)
        (variant / path).write_text(_OWN_NAME.sub(own, text), "utf-8")
    (variant / "_build_info.py").write_text(_BUILD_INFO, "utf-8")
    with (variant / "__init__.py").open("a", encoding="utf-8") as file:
        file.write("\nfrom . import layers  # noqa: E402, F401\n")
    _write_metadata(variant, name, "cuda")
    (folder / "README.md").write_text(_CARD.format(version=__version__), "utf-8")
    return variant


def _sources() -> Iterator[tuple[str, str]]:
    """Names and contents of the files, as they lie below the package."""
    package, kernels = (importlib.util.find_spec(name) for name in ("miras_kernels", "miras_kernels.kernels"))
    for prefix, spec in (("", package), ("kernels/", kernels)):
        for root in (Path(x) for x in (spec.submodule_search_locations if spec else None) or []):
            for path in root.rglob("*.py"):
                inside = path.relative_to(root)
                if not _LEFT_OUT.intersection(inside.parts) and (prefix or inside.parts[0] != "kernels"):
                    yield f"{prefix}{inside.as_posix()}", path.read_text("utf-8")


if __name__ == "__main__":
    print(f"written: {write_build(sys.argv[1])}")
