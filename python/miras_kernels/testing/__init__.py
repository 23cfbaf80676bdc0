"""Cases and error budgets: what the project's own tests, its benchmarks and its users' checks share."""

from .cases import Case, Inputs, registry
from .parity import Report, check, evaluate, relative_error, truth

__all__ = ["Case", "Inputs", "Report", "check", "evaluate", "registry", "relative_error", "truth"]
