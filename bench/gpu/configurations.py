"""The Triton kernels' launch configurations; other backends have none."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from .plan import Settings


def _configs():
    from miras_kernels.kernels.common import configs

    return configs


def table(settings: Settings) -> dict[str, dict[str, object]]:
    """Every configuration of every kernel: ``{kernel: {label: configuration}}``."""
    return {} if settings.backend != "triton" else {name: {str(c): c for c in found} for name, found in _configs().KERNELS.items()}


#: whether the forward's chain computes the output, in calls that are to launch a kernel
FUSED = {"linear_chain_fwd_fused": True, "linear_chain_fwd": False, "linear_output": False}


@contextlib.contextmanager
def forced(kernel: str | None, label: str | None, settings: Settings) -> Iterator[None]:
    """A context in which a kernel is launched, with one configuration; None leaves the choice to each kernel."""
    with contextlib.ExitStack() as stack:
        if kernel is not None:
            stack.enter_context(_configs().force(kernel, table(settings)[kernel][label]))
        if kernel in FUSED:
            stack.enter_context(_configs().fuse(FUSED[kernel]))
        yield


def fused():
    """A context in which the chain computes the output wherever it can, as calls of many heads do."""
    return _configs().fuse(True)


@contextlib.contextmanager
def launches(settings: Settings) -> Iterator[dict[str, str]]:
    """The configuration that each kernel is launched with inside the block; a kernel that is missing was not launched."""
    seen: dict[str, str] = {}
    if settings.backend != "triton":
        yield seen
        return
    from miras_kernels.kernels.common import launch

    start = launch.start

    def watched(kernel, grid, config, *arguments):
        seen[kernel.__name__] = str(config)
        start(kernel, grid, config, *arguments)

    launch.start = watched
    try:
        yield seen
    finally:
        launch.start = start
