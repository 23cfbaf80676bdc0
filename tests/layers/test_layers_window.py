"""Blocks whose states take back tokens: memory and convolution."""

from __future__ import annotations

import pytest
import torch

from miras_kernels.layers import MemoryBlock

PRESETS = ("yaad_linear", "gated_deltanet", "titans", "moneta")


def block(preset, **options):
    torch.manual_seed(0)
    return MemoryBlock(16, 2, preset=preset, chunk_size=1 if preset == "gated_deltanet" else 4, **options).eval()


@torch.no_grad()
@pytest.mark.parametrize("conv_width", [1, 4])
@pytest.mark.parametrize("preset", PRESETS)
def test_the_state_is_that_without_the_tokens(preset, conv_width):
    """To rounding: the projections of 5 tokens are not those of 3 to the bit."""
    of, x = block(preset, conv_width=conv_width), torch.randn(2, 20, 16)
    for ends, back in (((9, 14), 2), ((9, 14), 5), ((9, *range(10, 18)), 6), ((4, 6), 6)):
        state = of.start(2).keep(6)
        for begin, end in zip((0, *ends), ends, strict=False):
            _, state = of(x[:, begin:end], initial_state=state, output_final_state=True)
        assert state.inputs.shape[1] == state.memory.window.count + conv_width - 1
        cropped, left = state.crop(back), ends[-1] - back
        expected = of.start(2) if left == 0 else of(x[:, :left], initial_state=of.start(2), output_final_state=True)[1]
        assert torch.equal(cropped.conv, expected.conv) or left
        torch.testing.assert_close(cropped.conv, expected.conv)
        for a, b in zip(cropped.memory.matrices(), expected.memory.matrices(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        rest, _ = of(x[:, left:], initial_state=cropped)
        torch.testing.assert_close(rest, of(x, initial_state=of.start(2))[0][:, left:], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(cropped.crop(0).conv, cropped.conv)
        if back > 1:
            torch.testing.assert_close(state.crop(1).crop(back - 1).conv, cropped.conv)


@torch.no_grad()
def test_padding_of_one_row_and_of_several():
    of, x = block("yaad_linear"), torch.randn(2, 9, 16)
    mask = torch.ones(2, 9)
    mask[:, :3] = 0
    _, one = of(x[:1], mask[:1], initial_state=of.start(1).keep(6), output_final_state=True)
    _, expected = of(x[:1, 3:7], initial_state=of.start(1), output_final_state=True)
    torch.testing.assert_close(one.crop(2).conv, expected.conv)
    torch.testing.assert_close(one.crop(2).memory.dual[0], expected.memory.dual[0], rtol=1e-4, atol=1e-5)
    _, two = of(x, mask, initial_state=of.start(2).keep(6), output_final_state=True)  # rows are packed: nothing is kept
    with pytest.raises(ValueError, match="tokens: "):
        two.crop(1)
