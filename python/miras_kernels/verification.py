"""Results of :func:`miras_kernels.verify` on this machine, kept in files, which decide what "auto" skips.

A *configuration* is a memory, a bias, a retention gate, a dtype and a mode: "sequence" (chunks, with and without gradients) or "decode"
(token by token). Results with a caller's sizes apply to these sizes, results with the default sizes to all. They are kept in
:func:`folder`, one JSON file per backend and :func:`machine`, which is read once per process and device. A file that cannot be read, or
is of another machine or version, is ignored.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

import miras_kernels

from .backends import BACKENDS
from .tables.biases import Bias
from .tables.retention import Retention

__all__ = [
    "COMMAND", "DECODE", "SEQUENCE", "add", "configuration", "distrust_reason", "folder", "known", "machine", "results", "sizes", "state",
]  # fmt: skip

SCHEMA = 1
COMMAND = "python -m miras_kernels verify"
SEQUENCE, DECODE = "sequence", "decode"

#: by backend and device: {configuration, followed by sizes if they are a caller's: {"when": day, "failure": text or None}}
_known: dict[tuple[str, torch.device], dict[str, dict]] = {}
_warned: set[str] = set()


def configuration(memory: str, bias: Bias, retention: Retention, dtype: torch.dtype, mode: str) -> str:
    return f"{memory} {bias.name} {retention.name} {str(dtype).removeprefix('torch.')} {mode}"


def sizes(key_dim: int, value_dim: int, hidden: int, chunk_size: int) -> str:
    return f"{key_dim}x{value_dim}{f' hidden {hidden}' if hidden else ''} chunk {chunk_size}"


# ----------------------------------------------------------------------------------------------------------- records


def folder() -> Path | None:
    """``$MIRAS_CACHE``, or ``miras_kernels`` in ``$XDG_CACHE_HOME`` or ``~/.cache``; None where there is no home."""
    if own := os.environ.get("MIRAS_CACHE"):
        return Path(own)
    with contextlib.suppress(RuntimeError):
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "miras_kernels"
    return None


def machine(name: str, device: torch.device) -> dict[str, str]:
    """Everything that a backend's results depend on."""
    backend, digest = BACKENDS[name], hashlib.sha256()
    expressions = (Path(__file__).parent / "expressions").glob("*.py")  # the kernels run their programs
    for path in sorted([*backend.files(), *expressions]):
        digest.update(path.name.encode() + path.read_bytes())
    found = {
        "miras-kernels": miras_kernels.__version__,
        "torch": torch.__version__,
        "kernels": digest.hexdigest(),
        **backend.environment(device),
    }
    if device.type != "cuda":
        return found | {"device": platform.machine()}
    card = torch.cuda.get_device_properties(device)
    return found | {"device": card.name, "capability": f"{card.major}.{card.minor}", "driver": _driver()}


def _driver() -> str:
    for path in ("/proc/driver/nvidia/version", "/sys/module/amdgpu/version"):
        with contextlib.suppress(OSError):
            return Path(path).read_text().splitlines()[0]
    return str(getattr(torch._C, "_cuda_getDriverVersion", lambda: "unknown")())  # in a container without the driver's files


def _path(place: Path, name: str, here: dict[str, str]) -> Path:
    return place / f"verified-{name}-{hashlib.sha256(json.dumps(here, sort_keys=True).encode()).hexdigest()[:16]}.json"


def _read(path: Path, here: dict[str, str]) -> dict[str, dict]:
    """The results in a file; none, with a warning, if it cannot be read or is of another machine."""
    try:
        content = json.loads(path.read_text("utf-8"))
        if content["schema"] != SCHEMA or content["machine"] != here:
            raise ValueError("it was written by another version or on another machine")
        results = {key: {"when": x["when"], "failure": x["failure"]} for key, x in content["results"].items()}
        if not all(isinstance(x["when"], str) and isinstance(x["failure"], (str, type(None))) for x in results.values()):
            raise TypeError("a result is not text")
        return results
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        _warn_once(str(path), f"{path} is ignored: {type(error).__name__}: {error}")
        return {}


def results(name: str, device: torch.device) -> dict[str, dict]:
    """The results of a backend on a device. Kernels are hashed only if there is a file of results."""
    found = _known.get((name, device))
    if found is None:
        found = {}
        try:
            place = folder()
            if place is not None and any(file.startswith(f"verified-{name}-") for file in os.listdir(place)):
                here = machine(name, device)
                found = _read(_path(place, name, here), here)
        except FileNotFoundError:
            pass
        except Exception as error:  # a fault of the folder or the driver must not fail a memory's call
            _warn_once(f"{name} {device}", f"results of verification are ignored: {type(error).__name__}: {error}")
        _known[name, device] = found
    return found


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One writer at a time, where files can be locked."""
    with path.with_suffix(".lock").open("w") as lock:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def add(name: str, device: torch.device, new: dict[str, dict]) -> None:
    """Add results, for this process and in the file.

    Raises:
        OSError: the file cannot be written; the results still apply in this process.
    """
    _known[name, device] = results(name, device) | new
    place, here = folder(), machine(name, device)
    if place is None:
        raise OSError("there is no home directory; set MIRAS_CACHE to a folder")
    place.mkdir(parents=True, exist_ok=True)
    path = _path(place, name, here)
    with _locked(path):
        content = {"schema": SCHEMA, "machine": here, "results": _read(path, here) | new}
        whole = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            whole.write_text(json.dumps(content, indent=1), "utf-8")
            os.replace(whole, path)
        finally:
            whole.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------- for dispatch


def known(name: str, device: torch.device) -> bool:
    """Whether there are results of a backend on a device."""
    return bool(results(name, device))


def distrust_reason(name: str, device: torch.device, configuration: str, sizes: str, unverified: str, warn: bool) -> str | None:
    """Why "auto" skips a backend in a configuration, or None.

    Args:
        unverified: what to do without results of it: "use", "warn" (once, if ``warn``) or "skip".
    """
    here = results(name, device)
    found = [here[key] for key in (configuration, f"{configuration} {sizes}") if key in here]
    for result in found:
        if result["failure"] is not None:
            return f"failed verification on {result['when']}: {result['failure']}; run {COMMAND} after updating"
    if found or unverified == "use":
        return None
    memory, bias, retention, dtype, _ = configuration.split()
    command = f"run {COMMAND} --device {device.type} --memory {memory} --bias {bias} --retention {retention} --dtype {dtype}"
    if unverified == "skip":
        return f'not verified on this machine, so "auto" skips it: {command}'
    if warn:
        _warn_once(name, f"the {name} kernels have not been verified on this machine for {configuration}: {command}")
    return None


# A compiled program keeps the backend that it was traced with. torch.compiler.assume_constant_result sets this mark too, but it imports
# the compiler.
known._dynamo_marked_constant = distrust_reason._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _warn_once(key: str, text: str) -> None:
    if key not in _warned:
        _warned.add(key)
        warnings.warn(f"miras_kernels: {text}", stacklevel=6)


def state(name: str, device: torch.device) -> str:
    """The results of a backend, in a few words."""
    found = results(name, device).values()
    if not found:
        return f"not verified: run {COMMAND}"
    failed = sum(x["failure"] is not None for x in found)
    return f"verified {max(x['when'] for x in found)}: {len(found)} configurations, {failed or 'none'} failed"
