"""Baselines: PyTorch on the same recurrence, and other libraries at the same sizes.

The libraries compute other recurrences: what is compared is the cost of a layer with the same heads and the same state. Signatures as of
fla-core 0.6.0 and titans-pytorch 0.5.5. An exception in a baseline becomes a note.
"""

from __future__ import annotations

import torch

from miras_kernels.testing import Inputs

from ..common.implementations import Run, compiled, differentiated, eager, titans
from .plan import FLA, TITANS


def delta_rule(inputs: Inputs, direction: str, gated: bool = False) -> Run:
    """fla's, with step sizes in (0, 1)."""
    from fla.ops.delta_rule import chunk_delta_rule
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    x = inputs.tensors
    beta = torch.rand_like(x["lr"]).to(x["q"].dtype).requires_grad_()
    leaves = (x["q"], x["k"], x["v"], *((x["log_decay"],) if gated else ()), beta)
    function = chunk_gated_delta_rule if gated else chunk_delta_rule
    return differentiated(lambda: function(*leaves)[0], leaves, inputs.grad_out, direction)


MAKE = {"eager": eager, "compile": compiled, TITANS: titans, FLA[0]: delta_rule,
        FLA[1]: lambda inputs, direction: delta_rule(inputs, direction, gated=True)}  # fmt: skip
