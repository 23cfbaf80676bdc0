"""The cases of the C++ kernels: the registry's, and some that combine properties which the registry has one at a time."""

from __future__ import annotations

import miras_kernels as mk
from miras_kernels.call import Call
from miras_kernels.testing import Case, registry


class Forgetful(Case):
    """Every third channel decays by exp(-50) in every step, and all channels by exp(-1e4) in some; some tokens have no momentum."""

    def _draw(self, seed):
        inputs = super()._draw(seed)
        log_decay, momentum = inputs.tensors["log_decay"], inputs.tensors.get("momentum")
        log_decay[..., ::3] = -50.0
        log_decay[:, 5::11] = -1e4
        if momentum is not None:
            momentum[:, 2::7] = 0.0
        return inputs


CHANNELS = dict(decay="channel", lr="channel", delta="channel")
MLP = dict(memory="mlp", key_dim=16, value_dim=16, hidden=24)
ODD = dict(memory="mlp", tokens=45, key_dim=19, value_dim=19, hidden=37, chunk_size=7)
COMMON = dict(memory="mlp", batch=1, heads=1, tokens=130, key_dim=64, value_dim=64, hidden=256)
#: combinations of retention gate, momentum, decay and channel-wise gates
TOGETHER = [
    Case("lq1.5", retention=mk.LqRetention(1.5), seed=1),
    Case("lq1.5-momentum-channels", bias=mk.Huber(), retention=mk.LqRetention(1.5), momentum=True, **CHANNELS, seed=2),
    Case("lq3-channels", bias=mk.Lp(3.0), retention=mk.LqRetention(3.0, 0.5), **CHANNELS, value_dim=40, chunk_size=7, seed=3),
    Case(
        "lq4-momentum",
        bias=mk.Huber("norm"),
        retention=mk.LqRetention(4.0),
        momentum=True,
        tokens=150,
        chunk_size=64,
        key_dim=40,
        value_dim=72,
    ),
    Case("kl-momentum-packed", bias=mk.RobustL2(), retention=mk.KLRetention(4.0), momentum=True, lengths=(1, 16, 30, 5), seed=5),
    Case("kl-channels-packed", bias=mk.L1(), retention=mk.KLRetention(), lengths=(20, 7, 17), **CHANNELS, momentum=True, seed=6),
    Case("elastic-momentum-no-decay", retention=mk.ElasticNetRetention(0.1), momentum=True, decay="none", key_dim=19, value_dim=33, seed=7),
    Case("sigmoid-momentum-chunk-1", retention=mk.SigmoidRetention(), momentum=True, chunk_size=1, tokens=9, seed=8),
    Case("momentum-strong-decay", momentum=True, decay="strong", tokens=80, chunk_size=32, seed=9),
    Case("momentum-extreme-decay", momentum=True, decay="extreme", tokens=80, chunk_size=32, seed=10),
    Case("momentum-no-state", bias=mk.Huber("switch"), momentum=True, initial="none", layout="fused", seed=11),
    Case("channels-wide", momentum=True, **CHANNELS, batch=1, heads=1, tokens=100, key_dim=64, value_dim=136, chunk_size=64, seed=12),
    Forgetful("forgetful", decay="channel", tokens=80, chunk_size=32, seed=13),
    Forgetful("forgetful-momentum", bias=mk.Huber(), decay="channel", momentum=True, tokens=80, chunk_size=32, seed=14),
    Forgetful("forgetful-sigmoid", retention=mk.SigmoidRetention(), decay="channel", momentum=True, lengths=(40, 17), seed=15),
    Forgetful("forgetful-scalar", decay="scalar", momentum=True, tokens=80, chunk_size=32, heads=4, seed=16),
    # exact steps in several blocks: Triton's interpreter would take a quarter of a minute for each
    Case("blocks-chunk-1", chunk_size=1, tokens=71, seed=17),
    Case("blocks-chunk-2-no-decay", chunk_size=2, decay="none", tokens=71, key_dim=19, value_dim=33, seed=18),
    Case("blocks-chunk-1-extreme-decay", chunk_size=1, decay="extreme", tokens=70, keys="repeated", seed=19),
    Case("blocks-chunk-1-packed-shared", chunk_size=1, initial="shared", lengths=(7, 41, 0, 33), keys="zero", seed=20),
    Case("blocks-largest", chunk_size=1, batch=1, heads=1, tokens=70, key_dim=256, value_dim=256, seed=34),
    Case("mlp-lq1.5", retention=mk.LqRetention(1.5), **MLP, seed=21),
    Case("mlp-lq1.5-momentum", bias=mk.Huber(), retention=mk.LqRetention(1.5), momentum=True, **MLP, seed=22),
    Case("mlp-lq3-momentum-odd", bias=mk.Lp(3.0), retention=mk.LqRetention(3.0, 0.5), momentum=True, **ODD, seed=23),
    Case("mlp-lq4-strong-decay", bias=mk.Huber("norm"), retention=mk.LqRetention(4.0), decay="strong", **MLP, seed=24),
    Case(
        "mlp-kl-momentum-packed", bias=mk.RobustL2(), retention=mk.KLRetention(4.0), momentum=True, lengths=(1, 16, 30, 5), **MLP, seed=25
    ),
    Case("mlp-kl-odd", bias=mk.DotProduct(), retention=mk.KLRetention(), initial="shared", **ODD, seed=26),
    Case("mlp-lq-momentum-common", retention=mk.LqRetention(), momentum=True, **COMMON, chunk_size=16, seed=27),
    Case("mlp-elastic-momentum-no-decay", bias=mk.L1(), retention=mk.ElasticNetRetention(0.1), momentum=True, decay="none", **ODD, seed=28),
    Case("mlp-sigmoid-packed", bias=mk.Huber(), retention=mk.SigmoidRetention(), lengths=(7, 33, 1), layout="fused", **MLP, seed=29),
    Case("mlp-sigmoid-momentum-chunk-1", retention=mk.SigmoidRetention(), momentum=True, **{**MLP, "chunk_size": 1, "tokens": 9}, seed=30),
    Case("mlp-momentum-common", bias=mk.Huber("switch"), momentum=True, **COMMON, chunk_size=64, seed=31),
    Case("mlp-momentum-extreme-decay", momentum=True, decay="extreme", **MLP, seed=32),
    Forgetful("mlp-forgetful-momentum", bias=mk.Huber(), momentum=True, heads=4, **MLP, seed=33),
]
#: options of the delta rule
DELTA = [case for case in registry(variants=Call.VARIANTS) if case.variants]
SERVED = [*registry(), *TOGETHER, *DELTA]
