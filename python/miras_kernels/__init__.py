"""miras-kernels: fused kernels for sequence models that are associative memories trained at test time."""

from typing import TYPE_CHECKING, Any

from .decode import Decoder
from .memory import explain, linear_memory, mlp_memory
from .options import options, override
from .state import MemoryState, OpenChunk
from .tables import biases, retention
from .tables.biases import L1, L2, CustomBias, DotProduct, Huber, Lp, RobustL2
from .tables.retention import CustomRetention, ElasticNetRetention, KLRetention, L2Retention, LqRetention, SigmoidRetention

if TYPE_CHECKING:
    from .testing import verify

__version__ = "0.1.0"

__all__ = [
    "L1",
    "L2",
    "CustomBias",
    "CustomRetention",
    "Decoder",
    "DotProduct",
    "ElasticNetRetention",
    "Huber",
    "KLRetention",
    "L2Retention",
    "Lp",
    "LqRetention",
    "MemoryState",
    "OpenChunk",
    "RobustL2",
    "SigmoidRetention",
    "biases",
    "explain",
    "linear_memory",
    "mlp_memory",
    "options",
    "override",
    "retention",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Import ``verify`` on first use: it needs modules that only testing needs."""
    if name != "verify":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .testing import verify

    return verify
