"""Compare this machine's kernels with the reference in every configuration: :func:`miras_kernels.verify`."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import itertools
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch

from .. import dispatch, verification
from ..tables.biases import L2, Bias
from ..tables.biases import TABLE as BIASES
from ..tables.memories import TABLE
from ..tables.retention import TABLE as GATES
from ..tables.retention import Retention
from ..verification import DECODE, SEQUENCE
from .cases import Case, Inputs
from .parity import check, relative_error
from .steps import check_steps, final, inputs_of, whole

__all__ = ["Outcome", "Verification", "verify"]

PASSED, FAILED, OPEN = "passed", "failed", "not verified"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The result of one backend in one configuration: "passed", "failed" or "not verified", and why."""

    backend: str
    configuration: str
    status: str
    why: str = ""


@dataclasses.dataclass(frozen=True)
class Verification:
    """The results of :func:`verify`; prints as a table.

    Attributes:
        unkept: why the results could not be stored for other processes, or empty.
    """

    device: torch.device
    outcomes: tuple[Outcome, ...]
    unkept: str = ""

    def count(self, status: str) -> int:
        return sum(x.status == status for x in self.outcomes)

    @property
    def ok(self) -> bool:
        """Whether something passed and nothing failed."""
        return self.count(FAILED) == 0 < self.count(PASSED)

    def __str__(self) -> str:
        if not self.outcomes:
            return f"nothing to verify on {self.device}: no kernels support this here; python -m miras_kernels explain says why"
        groups: dict[str, list[Outcome]] = {}
        for x in self.outcomes:
            memory, _, _, dtype, mode = x.configuration.split()[:5]
            groups.setdefault(f"{x.backend:7s} {memory:6s} {dtype:8s} {mode:8s}", []).append(x)
        lines = [f"{self.device!s:32s}  " + "  ".join((PASSED, FAILED, OPEN))]
        for group, rows in groups.items():
            part = Verification(self.device, tuple(rows))
            lines.append(f"{group}  " + "  ".join(f"{part.count(status):{len(status)}d}" for status in (PASSED, FAILED, OPEN)))
        lines += [f"FAILED: {x.backend}, {x.configuration}: {x.why}" for x in self.outcomes if x.status == FAILED]
        lines += [f"{OPEN}: {why}" for why in dict.fromkeys(x.why for x in self.outcomes if x.status == OPEN)]
        return "\n".join(lines + [f"the results could not be stored: {self.unkept}"] * bool(self.unkept))


def verify(
    *,
    memory: str | None = None,
    bias: Bias | None = None,
    retention: Retention | None = None,
    dtype: torch.dtype | None = None,
    key_dim: int | None = None,
    value_dim: int | None = None,
    hidden: int | None = None,
    chunk_size: int | None = None,
    device: torch.device | str | None = None,
    seconds: float = 60.0,
) -> Verification:
    """Compare the kernels that "auto" would choose on this machine with the float64 reference, and store the results.

    Every configuration is checked with a plain call, and with packed sequences, a shared initial state and, where the backend has them,
    momentum and (linear memories) gates per channel; a backend that serves few sizes also with its largest size, for few and for many
    heads: outputs, final states and every gradient, or decoding steps after a prompt, within the budgets of
    :func:`miras_kernels.testing.check`. From then on "auto" does not choose a backend in configurations in which it failed, also in later
    processes: see :mod:`miras_kernels.verification`.

    Args:
        memory, bias, retention, dtype: check only these; None for all, the simplest first.
        key_dim, value_dim, hidden, chunk_size: sizes. If any is given, the results apply to these sizes only, and the others default to
            64, ``key_dim``, ``4 * key_dim`` and 64; ``hidden`` is for MLP memories.
        device: by default the GPU, or the CPU where there is none.
        seconds: time limit. Configurations that were not reached are "not verified", and the next call starts with them; those that
            failed come last.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    _validate(memory, bias, retention, dtype, seconds)
    own = _sizes(memory, key_dim=key_dim, value_dim=value_dim, hidden=hidden, chunk_size=chunk_size)
    end = time.monotonic() + seconds
    try:
        place = torch.empty(0, device=device or ("cuda" if torch.cuda.is_available() else "cpu")).device
    except (RuntimeError, AssertionError) as error:  # the latter where PyTorch was built without CUDA
        raise ValueError(f"device: expected one that is here, got {str(device)!r}: {error}") from None
    names = [
        name for name in dispatch.candidates(place)
        if name != "reference" and dispatch.unavailable(name) is None and dispatch.BACKENDS[name].runs_on(place)
    ]  # fmt: skip
    dtypes = (torch.bfloat16, torch.float32, torch.float16) if dtype is None else (dtype,)
    every = itertools.product(_rows(memory, bias, retention), dtypes, (SEQUENCE, DECODE), names)
    cached, checks = functools.cache(_serves), []

    def serves(name: str, mode: str, dtype: torch.dtype, case: Case) -> bool:
        return cached(name, mode, dtype, dataclasses.replace(case, bias=L2(), seed=0))

    for row, dtype, mode, name in every:
        for needed, optional in _cases(*row, own):
            if all(serves(name, mode, dtype, case) for case in needed):
                more = [case for case in optional if serves(name, mode, dtype, case)]
                checks.append(_Check(name, mode, (*needed, *more), dtype, place, own is not None))
                break
    checks.sort(key=_Check.order)
    outcomes: list[Outcome] = []
    try:
        for one in checks:
            outcomes.append(one.run(end))
            if outcomes[-1].status == FAILED and not _still_works(place):
                end = float("-inf")  # after an illegal address all later results are meaningless
    finally:
        unkept = _store(outcomes, place)
    return Verification(place, tuple(outcomes), unkept)


def _validate(memory: object, bias: object, retention: object, dtype: object, seconds: object) -> None:
    if memory is not None and memory not in TABLE:
        raise ValueError(f"memory: expected one of {', '.join(map(repr, TABLE))} or None, got {memory!r}")
    for name, x, kind in (("bias", bias, Bias), ("retention", retention, Retention), ("dtype", dtype, torch.dtype)):
        if not isinstance(x, (kind, type(None))):
            raise TypeError(f"{name}: expected a {kind.__name__} or None, got {x!r}")
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not seconds > 0:
        raise ValueError(f"seconds: expected a number > 0, got {seconds!r}")


def _sizes(memory: str | None, **given: int | None) -> dict[str, Any] | None:
    """A caller's sizes as properties of a case; None if there are none."""
    own = {name: x for name, x in given.items() if x is not None}
    for name, x in own.items():
        if isinstance(x, bool) or not isinstance(x, int) or x < 1:
            raise ValueError(f"{name}: expected an integer >= 1 or None, got {x!r}")
    if memory == "linear" and "hidden" in own:
        raise ValueError(f"hidden: a linear memory has none, expected None, got {own['hidden']}")
    d = own.get("key_dim", 64)
    if memory != "linear" and own.get("value_dim", d) != d:
        raise ValueError(f"value_dim: an MLP memory needs Dv = Dk = {d}, got {own['value_dim']} (a linear one: memory='linear')")
    return dict[str, Any](key_dim=d, value_dim=d, hidden=4 * d, chunk_size=64) | own if own else None


def _rows(memory: str | None, bias: Bias | None, retention: Retention | None) -> list[tuple[str, Bias, Retention]]:
    """Every memory, bias and retention gate, the simplest first."""
    every = itertools.product([bias] if bias else BIASES.values(), [retention] if retention else GATES.values())
    rows = sorted(every, key=lambda row: (row[0].name != "l2") + (row[1].name != "l2"))
    return [(m, *row) for row in rows for m in ([memory] if memory else TABLE)]


#: by memory: Dk, Dv, hidden size and chunk_size of two cases; then those of kernels that serve few sizes, with blocks for each of them
SIZES = {"linear": ((64, 64, 0, 64), (40, 24, 0, 16)), "mlp": ((32, 32, 64, 16), (24, 24, 40, 16))}
FEW_SIZES = {
    "linear": ((64, 64, 0, 64), (64, 64, 0, 16), (128, 128, 0, 64)),
    "mlp": ((64, 64, 256, 32), (64, 64, 64, 16), (64, 64, 256, 64)),
}
MANY_HEADS = dict(batch=16, heads=16)  # more than a chip has multiprocessors


def _cases(memory: str, bias: Bias, retention: Retention, own: dict[str, Any] | None) -> Iterator[tuple[list[Case], list[Case]]]:
    """What a backend must serve to be checked, and what it is checked with too if it serves that: a plain case and one with all gates; or
    else a plain and a packed case with a shared initial state, and the largest size."""
    shared = dict[str, Any](memory=memory, bias=bias, retention=retention, seed=len(bias.name + retention.name))
    names = ("key_dim", "value_dim", "hidden", "chunk_size")
    usual, few = ([own or dict(zip(names, sizes, strict=True)) for sizes in table[memory]] for table in (SIZES, FEW_SIZES))

    def plain(name: str, size: dict[str, Any], **others: Any) -> Case:
        return Case(name, tokens=2 * size["chunk_size"] + 6, **size, **shared, **dict[str, Any](batch=1) | others)

    def packed(name: str, size: dict[str, Any], **gates: Any) -> Case:
        chunk = size["chunk_size"]
        return Case(name, tokens=2 * chunk + 6, lengths=(chunk + 4, 1, chunk), initial="shared", **size, **shared, **gates)

    channels = dict(decay="channel", lr="channel") if memory == "linear" else {}
    yield [plain("plain", usual[0]), packed("with all gates", usual[1], momentum=True, **channels)], []
    more = [plain("many heads", few[-1], **MANY_HEADS), packed("with momentum", few[-1], momentum=True)]
    if own is None:
        more.append(plain("large", few[-1]))
    yield [plain("plain", few[0]), packed("packed", few[1])], more


@dataclasses.dataclass(frozen=True)
class _Check:
    """A check of one backend in one configuration."""

    backend: str
    mode: str
    cases: tuple[Case, ...]
    dtype: torch.dtype
    device: torch.device
    own: bool

    @property
    def key(self) -> str:
        case = self.cases[0]
        name = verification.configuration(case.memory, case.bias, case.retention, self.dtype, self.mode)
        if not self.own:
            return name
        return f"{name} {verification.sizes(case.key_dim, case.value_dim, case.hidden * (case.memory == 'mlp'), case.chunk_size)}"

    def order(self) -> int:
        """Configurations without a result come first, failed ones last."""
        known = verification.results(self.backend, self.device).get(self.key)
        return 0 if known is None else 1 + (known["failure"] is not None)

    def run(self, end: float) -> Outcome:
        for case in self.cases:
            if time.monotonic() > end:
                return Outcome(self.backend, self.key, OPEN, "the time was over")
            case = _of_mode(case, self.mode)
            try:
                inputs = inputs_of(case, self.backend, self.dtype, self.device)
            except RuntimeError as error:  # no draw keeps a distance from a kink
                return Outcome(self.backend, self.key, OPEN, str(error))
            try:
                wrong = self._wrong(case, inputs)
            except torch.OutOfMemoryError:
                return Outcome(self.backend, self.key, OPEN, "the device's memory is too small")
            except Exception as error:  # also errors of the compiler
                wrong = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
            if wrong is not None:
                return Outcome(self.backend, self.key, FAILED, f"{wrong} ({case.name})")
        return Outcome(self.backend, self.key, PASSED)

    def _wrong(self, case: Case, inputs: Inputs) -> str | None:
        name = self.backend
        if self.mode == DECODE:
            cuts = [case.tokens - 7, *range(case.tokens - 6, case.tokens - 2), case.tokens]
            rows = list(check_steps(case, name, self.dtype, cuts, device=self.device).rows)
        else:
            rows = list(check(case, name, self.dtype, str(self.device)).rows)
            with torch.no_grad():
                out, state = case.function(**inputs.arguments(), backend=name)
            exact, budgets = whole(inputs.to(torch.float64), 0), {row.name: row for row in rows}
            for part, x in final(out, state).items():
                error = relative_error(x, exact[part])
                rows.append(dataclasses.replace(budgets[part], name=f"{part} without gradients", error=error))
        worst = max(rows, key=lambda row: row.error / row.budget)
        return None if worst.ok else f"{worst.name} error {worst.error:.0e}, budget {worst.budget:.0e}"


def _of_mode(case: Case, mode: str) -> Case:
    return dataclasses.replace(case, lengths=None) if mode == DECODE else case


def _serves(name: str, mode: str, dtype: torch.dtype, case: Case) -> bool:
    """Whether a backend supports a case. Its bias does not matter, so that results can be cached."""
    backend, call = dispatch.BACKENDS[name], _of_mode(case, mode).draw(dtype).call()
    return (backend.refuses_steps(call) if mode == DECODE else backend.refuses(call, True)) is None


def _still_works(device: torch.device) -> bool:
    """Whether a device still computes after a failure."""
    try:
        return torch.ones(2, device=device).sum().item() == 2
    except RuntimeError:
        return False


def _store(outcomes: list[Outcome], device: torch.device) -> str:
    """Store what passed and failed; returns why that is not possible, or ""."""
    unkept, today = "", datetime.date.today().isoformat()
    for name in dict.fromkeys(x.backend for x in outcomes):
        new = {
            x.configuration: {"when": today, "failure": x.why if x.status == FAILED else None}
            for x in outcomes if x.backend == name and x.status != OPEN
        }  # fmt: skip
        try:
            verification.add(name, device, new)
        except (OSError, RuntimeError) as error:  # the latter from a device that no longer works
            unkept = str(error)
    return unkept


def command(args: argparse.Namespace) -> int:
    """``python -m miras_kernels verify``: 1 if a check failed, 2 if nothing could be checked."""
    dtype = args.dtype and getattr(torch, args.dtype)
    sizes = dict(key_dim=args.dim, value_dim=args.value_dim, hidden=args.hidden, chunk_size=args.chunk)
    print(f"verifying for at most {args.seconds:g} s", flush=True)
    try:
        found = verify(memory=args.memory, bias=args.bias, retention=args.retention, dtype=dtype, **sizes,
                       device=args.device, seconds=args.seconds)  # fmt: skip
    except (TypeError, ValueError) as error:
        print(f"verify: {error}", file=sys.stderr)
        return 2
    print(found)
    return 0 if found.ok else 1 if found.count(FAILED) else 2
