"""``info``: versions, devices, backends and options."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import os
import platform

import torch

from .. import __version__, dispatch, options
from ..versions import TRANSFORMERS, in_tested_range
from .shared import can, print_rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """It takes none."""


def _version(package: str) -> str:
    """An installed version, without importing the package; some builds of PyTorch bring triton under another distribution's name."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        others = importlib.metadata.packages_distributions().get(package)
        return f"{importlib.metadata.version(others[0])} ({others[0]})" if others else "not installed"


def _transformers() -> str:
    """Its version, and whether it is one that the tests run with."""
    version, tested = _version("transformers"), " to ".join(TRANSFORMERS)
    if version == "not installed":
        return version
    return f"{version} ({'within' if in_tested_range(version) else 'OUTSIDE'} the tested range, {tested})"


def _cpu() -> str:
    threads = f"{torch.get_num_threads()} threads"
    extension = getattr(dispatch.BACKENDS["cpp"], "extension", None)
    if extension is None:
        return f"{platform.machine()}, {threads}"
    asked = os.environ.get("MIRAS_CPU_CAPABILITY")
    try:
        level = f"kernels use {extension.cpu_capability()}"
    except (RuntimeError, ValueError) as error:
        level = f"kernels cannot run: {error}"
    because = f", as MIRAS_CPU_CAPABILITY={asked} asks" if asked else ""
    levels = [*extension.cpu_capabilities(), *(f"{name} if asked" for name in extension.cpu_capabilities_by_name())]
    return f"{platform.machine()}, {threads}, {level}{because} (can run here: {', '.join(levels)})"


def _accelerators() -> list[tuple[str, str]]:
    if not torch.cuda.is_available():
        return [("cuda", "none")]
    found = []
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        found.append((f"cuda:{i}", f"{p.name}, compute capability {p.major}.{p.minor}, {p.total_memory / 2**30:.0f} GiB"))
    return found


def run(_: argparse.Namespace) -> int:
    """Print versions, devices, backends and options."""
    versions = [("miras-kernels", __version__), ("python", platform.python_version()), ("torch", torch.__version__)]
    print_rows("versions", [*versions, ("triton", _version("triton")), ("transformers", _transformers())])
    print_rows("devices", [("cpu", _cpu()), *_accelerators()])
    missing = {name: dispatch.unavailable(name) for name in dispatch.NAMES[1:]}
    device = {name: "cpu" if name == "cpp" or not torch.cuda.is_available() else "cuda" for name in missing}
    rows = [(name, f"cannot run: {reason}" if reason else can("can run here", name, device[name])) for name, reason in missing.items()]
    print_rows("backends", rows)
    print_rows("options", [(field.name, repr(getattr(options, field.name))) for field in dataclasses.fields(options)])
    return 0
