"""The operator of decoding steps gives the results of Decoder.step, eagerly and compiled; a block decodes in place."""

from __future__ import annotations

import pytest
import torch

import miras_kernels as mk
from miras_kernels.decode import operator
from miras_kernels.layers import PRESETS, BlockDecoder, MemoryBlock
from miras_kernels.testing import Case
from miras_kernels.testing.steps import cut, decoder

CASES = [
    Case("linear", bias=mk.Huber("switch"), tokens=24, chunk_size=8),
    Case("linear-lq-momentum", retention=mk.LqRetention(), momentum=True, tokens=24, chunk_size=8),
    Case("linear-channels", decay="channel", lr="channel", tokens=24, chunk_size=8),
    Case("linear-chunk-1", decay="none", tokens=24, chunk_size=1),
    Case("mlp", memory="mlp", key_dim=16, value_dim=16, hidden=24, momentum=True, retention=mk.KLRetention(), tokens=24, chunk_size=8),
]
NORM = ("ln_weight", "ln_bias", "ln_eps")


def prompted(case: Case, backend: str):
    """Two decoders after a prompt of 13 tokens, and the arguments of the other tokens."""
    arguments = case.draw(torch.float32).arguments()
    arguments = {name: x.detach() if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    _, state = case.function(**{**arguments, **cut(arguments, 0, 13)}, backend=backend)
    state = state.detach()
    norm = {name: arguments[name] for name in NORM if name in arguments}
    steps = [{**cut(arguments, t, t + 1), **norm} for t in range(13, 24)]
    return decoder(case, arguments, state, backend), decoder(case, arguments, state, backend), steps


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_equals_the_decoders_step(case, compiled, backend):
    one, other, steps = prompted(case, backend)
    torch._dynamo.reset()
    step = lambda x: operator.step(one, **x)
    step = torch.compile(step, backend="aot_eager", fullgraph=True) if compiled else step
    for given in steps:
        found, wanted = step(given), other.step(**{name: x for name, x in given.items() if name not in NORM})
        assert torch.equal(found, wanted)
        assert all(torch.equal(x, y) for x, y in zip(one.buffers.tensors(), other.buffers.tensors(), strict=True))


@pytest.mark.parametrize("case", [CASES[1], CASES[-1]], ids=str)
def test_opcheck(case, backend):
    one, _, steps = prompted(case, backend)
    names = ("q", "k", "v", "lr", "log_decay", "delta", "momentum", "ln_weight", "ln_bias", "ln_eps")
    arguments = operator._flatten(one, *(steps[0].get(name, 1e-6 if name == "ln_eps" else None) for name in names))
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.miras_kernels.step, arguments, test_utils=tests)


@torch.no_grad()
@pytest.mark.parametrize("preset", PRESETS)
def test_a_block_decodes_in_place(preset):
    torch.manual_seed(0)
    block = MemoryBlock(24, 3, preset=preset, chunk_size=None if PRESETS[preset].chunk_size == 1 else 4)
    x = torch.randn(2, 20, 24)
    whole, (out, state) = block(x)[0], block(x[:, :6], output_final_state=True)
    reader, outs = BlockDecoder(block, state), [out]
    stay = [t.data_ptr() for t in reader.tensors()]
    for begin, end in ((6, 7), (7, 8), (8, 9), (9, 13), (13, 14)):
        out, final = block(x[:, begin:end], initial_state=reader, output_final_state=True)
        assert final is reader
        outs.append(out)
    value = reader.state()
    for begin, end in ((14, 15), (15, 18)):  # the sequences are reordered
        reader.reorder(torch.tensor([1, 0]))
        outs.append(block(x[:, begin:end].flip(0), initial_state=reader)[0].flip(0))
        reader.reorder(torch.tensor([1, 0]))
    outs.append(block(x[:, 18:], initial_state=reader)[0])
    assert_same(torch.cat(outs, 1), whole)
    reader.load(value)
    assert_same(block(x[:, 14:], initial_state=reader)[0], whole[:, 14:])
    assert [t.data_ptr() for t in reader.tensors()] == stay


def assert_same(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Equal up to about a thousand roundings that add up like a random walk, times 8."""
    assert (found - wanted).norm() <= 8 * 1024**0.5 * torch.finfo(found.dtype).eps * wanted.norm()


@pytest.mark.parametrize("name", ["attention_mask", "cu_seqlens"])
def test_a_block_decoder_takes_no_masked_or_packed_rows(name):
    block = MemoryBlock(24, 3)
    reader = BlockDecoder(block, block.start(2))
    with pytest.raises(ValueError, match=f"{name}: with a BlockDecoder rows have no padding and are not packed; expected None, got Tensor"):
        block(torch.randn(2, 1, 24), initial_state=reader, **{name: torch.ones(2, 1)})


def test_an_output_gate_starts_closed():
    block = MemoryBlock(24, 3, output_gate=True)
    assert torch.equal(block(torch.randn(2, 5, 24))[0], torch.zeros(2, 5, 24))
    with pytest.raises(ValueError, match="output_gate: a block without projections leaves its output to the caller"):
        MemoryBlock(24, 3, output_gate=True, projections=False)
