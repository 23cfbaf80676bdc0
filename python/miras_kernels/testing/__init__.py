"""Cases and error budgets, shared by the tests, the benchmarks and users' own checks."""

from .case_list import registry
from .cases import Case, Inputs
from .parity import Report, check, evaluate, operands, relative_error, truth
from .steps import check_steps
from .verifying import Outcome, Verification, verify

__all__ = [
    "Case", "Inputs", "Outcome", "Report", "Verification", "check", "check_steps", "evaluate", "operands", "registry",
    "relative_error", "truth", "verify",
]  # fmt: skip
