"""Random calls of the public functions, checked against the reference and by identities.

    python -m miras_kernels fuzz --seconds 60 --backend cpp --seed 0

An :class:`Example` is a case whose sizes, gates, layouts and extreme values are drawn by hypothesis, and a way to compute its results: in
one call, in pieces, sequence by sequence, permuted, or with a more general gate at a limit (:data:`ROUTES`). All results are compared with
the float64 reference within the budgets of :mod:`~miras_kernels.testing.parity`; besides, a later token must not change a bit of an
earlier output. An example that fails is made smaller while it still fails, and printed as a command that repeats it.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import math
import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from .. import dispatch
from ..backends.reference import chunkwise
from ..call import Call
from ..tables import biases, memories, retention
from ..tables.biases import L2, Huber
from ..tables.retention import ElasticNetRetention, L2Retention, LqRetention
from . import expressions
from .cases import Case, Inputs
from .kinks import has_kinks
from .parity import ARITHMETIC, ULPS, Report, evaluate, expect, judge, margin, operands, relative_error
from .routes import ROUTES, of_tokens, results_of

__all__ = ["Example", "Failure", "examples", "fuzz", "run_example"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclasses.dataclass(frozen=True)
class Example:
    """A case and how to check it.

    Attributes:
        route: how results are computed, one of :data:`ROUTES`, or "causality".
        at: where a sequence is split or changed; taken modulo its length.
    """

    case: Case
    dtype: str = "float32"
    route: str = "one call"
    at: int = 0

    def encode(self) -> str:
        """As JSON without spaces; only what differs from a default case."""
        fields = {f.name: getattr(self.case, f.name) for f in dataclasses.fields(Case) if f.name != "name"}
        plain = Case("fuzz")
        case = {name: x for name, x in fields.items() if x != getattr(plain, name)}
        case |= {name: x.code for name, x in case.items() if name in ("bias", "retention")}
        return json.dumps({"case": case, "dtype": self.dtype, "route": self.route, "at": self.at}, separators=(",", ":"))

    @staticmethod
    def decode(text: str) -> Example:
        """The inverse of :meth:`encode`.

        Raises:
            ValueError: the text is not an example.
        """
        try:
            fields = json.loads(text)
            case = fields.pop("case")
            if "bias" in case:
                case["bias"] = biases.from_code(case["bias"])
            if "retention" in case:
                case["retention"] = retention.from_code(case["retention"])
            if case.get("lengths"):
                case["lengths"] = tuple(case["lengths"])
            return Example(Case("fuzz", **case), **fields)
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise ValueError(f"replay: expected the JSON that a failing run printed, got {text!r} ({error})") from None


class Failure(AssertionError):
    """The results of an example are wrong."""


class Refused(Exception):
    """The backend does not support an example."""


@torch.no_grad()
def _causality(example: Example, inputs: Inputs, run) -> None:
    """Change the tokens from ``at`` on; no bit of an earlier output may change."""
    arguments, t = inputs.arguments(), example.at % inputs.tensors["q"].shape[1]

    def disturbed(x: Tensor) -> Tensor:
        x = x.detach().clone()
        x[:, t:] *= 0.5
        return x

    before, after = (results_of(example.case, x, run)[0] for x in (arguments, of_tokens(arguments, disturbed)))
    if not torch.equal(before[:, :t], after[:, :t]):
        first = int((before != after).flatten(2).any(-1)[:, :t].any(0).nonzero()[0])
        raise Failure(f"causality: changing tokens from {t} on changed the output at {first}")


def run_example(example: Example, run: str | Callable) -> None:
    """Check one example.

    Raises:
        Failure: the results are wrong.
        Refused: the backend does not support it.
    """
    case, dtype = example.case, DTYPES[example.dtype]
    if callable(run):
        dtype = torch.float32  # a function may support no other dtype
    multiplied = operands(run, dtype)
    try:
        inputs = case.draw(dtype, margin=margin(case, multiplied))
    except RuntimeError:
        raise Refused("no draw keeps a distance from the kinks of the bias or the gate, so that it cannot be judged") from None
    for row in (case.bias, case.retention):
        if isinstance(row, (biases.CustomBias, retention.CustomRetention)) and expressions.derivative_error(row) > 1e-9:
            raise Failure(f"the derivatives of {row} are not those of autograd: error {expressions.derivative_error(row):.1e}")
    differentiate = example.route == "one call"
    if not callable(run):
        call = inputs.call()
        reason = dispatch.unserved(run, call) or dispatch.BACKENDS[run].refuses(call, differentiate)
        if reason is not None:
            raise Refused(reason)
    if example.route == "causality":
        _causality(example, inputs, run)
        return
    results = ROUTES[example.route](inputs, run, example.at)
    if not _clearly_right(inputs, results, multiplied):
        report = judge(inputs, results, multiplied)
        if any(row.budget == math.inf for row in report.rows) and all(row.budget == math.inf for row in report.rows if not row.ok):
            raise Refused("its inner loop diverges under rounding errors, so that nothing can be expected of it")
        if not report.ok and not _beyond_float32(inputs, report):
            raise Failure(f"{example.route}: {report}")


def _beyond_float32(inputs: Inputs, report: Report) -> bool:
    """Whether all wrong results overflow in the float32 reference too, as those of an inner loop that diverges do."""
    usual = evaluate(inputs.to(torch.float64).to(torch.float32), chunkwise.run)
    return not any(row.error < math.inf or usual[row.name].isfinite().all() for row in report.rows if not row.ok)


def _clearly_right(inputs: Inputs, results: dict[str, Tensor], multiplied: torch.dtype) -> bool:
    """Whether every error is at most twice that of two perturbed runs, which is much faster than computing the budgets."""
    wanted = expect(inputs, multiplied, runs=2)
    return all(
        relative_error(x, wanted[name].exact) <= 2 * wanted[name].usual + ULPS * ARITHMETIC + torch.finfo(x.dtype).eps / 2 < math.inf
        for name, x in results.items()
    )


# -------------------------------------------------------------------------------------------------------- strategies


def examples(backend: str | None = None, custom: bool = False):
    """A hypothesis strategy for :class:`Example`, with sizes that suit a backend; shrinks towards small and plain examples.

    Args:
        custom: whether biases are random expressions, and gates often are.
    """
    from hypothesis import strategies as st

    chunk_sizes = st.sampled_from([16, 32]) if backend == "triton" else st.integers(1, 40)
    most = 40 if backend == "triton" else 90
    # parameters as kernels take them, in float32: a budget knows the rounding of operations, not that of constants
    numbers = lambda low, high: st.floats(low, high).map(lambda x: torch.tensor(x, dtype=torch.float32).item())
    float_biases = st.one_of(
        st.sampled_from(list(biases.TABLE.values())),
        numbers(1.0, 20.0).map(biases.L1),
        numbers(1.05, 4.0).map(lambda p: biases.Lp(p) if p >= 2 else biases.Lp(p, sharpness=10.0)),
        numbers(1.0, 20.0).map(lambda s: Huber("switch", sharpness=s)),
    )
    gates = st.one_of(
        st.sampled_from(list(retention.TABLE.values())),
        st.builds(LqRetention, numbers(1.2, 6.0), numbers(0.3, 3.0)),
        numbers(0.3, 5.0).map(retention.KLRetention),
        numbers(0.0, 0.5).map(ElasticNetRetention),
    )
    if custom:
        float_biases, gates = expressions.biases(), st.one_of(st.just(L2Retention()), expressions.gates(), gates)

    served = Call.VARIANTS if backend is None else dispatch.BACKENDS[backend].variants
    variants = [(), *(used for n in range(1, 4) for used in itertools.combinations(served, n))]

    @st.composite
    def build(draw) -> Example:
        one_of = lambda *values: draw(st.sampled_from(values))
        memory = one_of(*memories.TABLE)
        linear, dtype = memory == "linear", one_of("float32", "bfloat16", *(("float16",) if backend == "triton" else ()))
        # a number as delta cannot be moved away from errors, so 16-bit products may be on the other side of a kink than float64
        variant = one_of(*variants) if linear and not custom and one_of(False, False, False, True) else ()
        bias, exact = L2() if variant else draw(float_biases), backend is None or operands(backend, DTYPES[dtype]) == torch.float32
        gate = L2Retention() if variant else draw(gates)
        if not exact and (has_kinks(bias) or has_kinks(gate)):  # Case.draw keeps no wide margin from kinks of expressions
            dtype = "float32"
        number = ("float",) if bias.needs_delta and exact else ()
        # their step sizes would make gradients underflow in float16
        huge = () if dtype == "float16" else ("huge",)
        lengths = draw(st.one_of(st.none(), st.lists(st.integers(0, most // 3), min_size=1, max_size=4).filter(any).map(tuple)))
        # the softmax of one entry and LayerNorm of one or two channels have gradients of exactly 0, but not after rounding
        key_dim = draw(st.integers(2 if linear else 6, 40))
        # kernels have the delta rule's options with scalar gates
        per_channel = ("channel",) if linear and not (variant and backend) else ()
        strong, by_channel = ("strong", "extreme") if linear else (), ("channel", "extreme_channel") if per_channel else ()
        decays = ("scalar", "none", "slight", *strong, *by_channel)
        # mild decays for MLP memories: where the primal of one matrix is 0 the other one only decays, and would underflow in float32
        case = Case(
            "fuzz", memory=memory, bias=bias, retention=gate,
            decay_first="decay_first" in variant, erase_k="erase_k" in variant,
            seed=draw(st.integers(0, 999)), lengths=lengths,
            batch=1 if lengths else draw(st.integers(1, 3)), tokens=sum(lengths) if lengths else draw(st.integers(1, most)),
            heads=draw(st.integers(1, 3)), key_dim=key_dim, value_dim=draw(st.integers(1, 40)) if linear else key_dim,
            hidden=draw(st.integers(6, 48)), chunk_size=1 if variant else draw(chunk_sizes), momentum=not variant and draw(st.booleans()),
            decay=one_of("key", "extreme_key") if "key_log_decay" in variant else one_of(*decays),
            delta=one_of("token", *number, *per_channel), lr=one_of("scalar", *per_channel),
            initial=one_of("dual", "shared", *(("none",) if linear else ())),
            layout=one_of("contiguous", "fused", "heads_first"), keys=one_of("unit", "zero", "repeated", *huge),
        )  # fmt: skip
        return Example(case, dtype, one_of(*ROUTES, "causality"), draw(st.integers(0, most)))

    return build()


# --------------------------------------------------------------------------------------------------------------- loop


@dataclasses.dataclass
class Outcome:
    """The results of a run."""

    tried: collections.Counter = dataclasses.field(default_factory=collections.Counter)  # by route
    refused: collections.Counter = dataclasses.field(default_factory=collections.Counter)  # by reason
    failure: tuple[Example, str] | None = None


def fuzz(run: str | Callable, seconds: float, seed: int, strategy=None, shrink_seconds: float = 60.0) -> Outcome:
    """Check examples until the time is up or one fails, which is then made smaller.

    Args:
        run: a backend's name, or a function as :func:`~miras_kernels.testing.evaluate` takes it.
        seed: the same seed gives the same examples in the same order.
        strategy: of examples; :func:`examples` by default.
    """
    import hypothesis

    outcome, known = Outcome(), dict[str, str | None]()
    end = time.monotonic() + seconds

    def attempt(example: Example) -> None:
        key = example.encode()
        if key not in known:
            if time.monotonic() > end + (shrink_seconds if any(known.values()) else 0):
                return  # only examples that are known to fail still fail
            known[key] = _complaint(example, run, outcome)
        if known[key]:
            raise Failure(example, known[key])

    settings = hypothesis.settings(
        max_examples=50, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck), print_blob=False,
        phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink), report_multiple_bugs=False, verbosity=hypothesis.Verbosity.quiet,
    )  # fmt: skip
    strategy = examples(run if isinstance(run, str) else None) if strategy is None else strategy
    for round_ in itertools.takewhile(lambda _: time.monotonic() <= end, itertools.count()):
        try:
            hypothesis.seed(seed + round_)(settings(hypothesis.given(strategy)(attempt)))()
        except Failure as failure:
            outcome.failure = failure.args
            break
    return outcome


def _complaint(example: Example, run: str | Callable, outcome: Outcome) -> str | None:
    """What is wrong with an example's results, or None; an exception is wrong too."""
    try:
        run_example(example, run)
    except Refused as reason:
        outcome.refused[str(reason)] += 1
        return None
    except Failure as failure:
        outcome.tried[example.route] += 1
        return str(failure)
    except Exception as error:  # the public functions support every call that is drawn here
        outcome.tried[example.route] += 1
        return f"{type(error).__name__}: {error}"
    outcome.tried[example.route] += 1
    return None


def backends(name: str) -> Iterable[str]:
    """The backends of this name; "all" are those that run on this machine's CPU."""
    if name != "all":
        return (name,)
    return [n for n in ("cpp", "triton") if dispatch.unavailable(n) is None and dispatch.BACKENDS[n].runs_on(torch.device("cpu"))]
