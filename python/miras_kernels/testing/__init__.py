"""Cases and error budgets: what the project's own tests, its benchmarks and its users' checks share."""

from .case_list import registry
from .cases import Case, Inputs
from .parity import Report, check, evaluate, operands, relative_error, truth
from .steps import check_steps

__all__ = ["Case", "Inputs", "Report", "check", "check_steps", "evaluate", "operands", "registry", "relative_error", "truth"]
