"""A driver without a device: kernels are compiled, specialised and launched as on a chip, and whoever asks receives the launches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace

from triton.runtime.driver import driver

from ...backends import triton as backend
from ..common import launch
from .compile import TARGETS

__all__ = ["without_device"]


class _Driver:
    """What Triton's launches use of a driver; its one device holds what a block of an H100 may hold."""

    def __init__(self, target, receive: Callable):
        self.get_current_target = lambda: target
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0
        self.launcher_cls = lambda source, metadata: receive
        self.utils = SimpleNamespace(
            load_binary=lambda name, code, shared, device: (1, name, 0, 0, 1024),
            unload_module=lambda module: None,
            get_device_properties=lambda device: {"max_shared_mem": 232_448},
        )


@contextlib.contextmanager
def without_device(receive: Callable, architecture: str = "sm_90") -> Iterator[None]:
    """Within it ``backend="triton"`` takes CPU tensors and launches nothing: ``receive`` is called instead.

    Args:
        receive: gets what Triton gives its launcher: the grid's three sizes, stream, function (here the kernel's name), packed metadata,
            launch metadata, two hooks, and the kernel's arguments.
    """
    if backend.interpreted():
        raise RuntimeError("expected a process without TRITON_INTERPRET, which Triton reads once")
    changes = {(launch, "architecture"): lambda device: architecture, (backend, "interpreted"): lambda: True}
    before = {where: getattr(*where) for where in changes}
    driver.set_active(_Driver(TARGETS[architecture], receive))
    for where, new in changes.items():
        setattr(*where, new)
    try:
        yield
    finally:
        for where, old in before.items():
            setattr(*where, old)
        driver._active = None
