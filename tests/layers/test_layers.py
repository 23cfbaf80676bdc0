"""The block around the memory as a module: causality, padding, packing, cutting, gradients, dtypes, errors."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math

import pytest
import torch
from layers_tiny import MLP, NAMES, SIZES, assert_close, block, tokens

from miras_kernels import L2, Huber, KLRetention
from miras_kernels.layers import PRESETS, BlockState, MemoryBlock, Preset, Projected
from quick import slow

# ------------------------------------------------------------------------------------------------------- causality and independence


@pytest.mark.parametrize("name", NAMES)
def test_no_output_depends_on_a_later_token(name):
    module, x, t = block(name), tokens(2, 13), 6
    changed = x.clone()
    changed[:, t:] = 100 * tokens(2, 13, seed=2)[:, t:]
    before, after = module(x)[0], module(changed)[0]
    assert_close(after[:, :t], before[:, :t])
    assert ((after - before)[:, t:].abs().amax(-1) > 1e-3).all()


@pytest.mark.parametrize("name", NAMES)
def test_no_sample_depends_on_another(name):
    module, x = block(name), tokens(3, 11)
    together = module(x)[0]
    for i in range(3):
        assert_close(module(x[i : i + 1])[0][0], together[i])


def test_every_token_influences_the_last_output():
    x = tokens(1, 13).requires_grad_()
    module = block("linear_attention")
    (grad,) = torch.autograd.grad(module(x)[0][0, -1].sum(), x)
    assert (grad.abs().amax(-1) > 0).all()


# ------------------------------------------------------------------------------------------------------------- padding

ROWS = {  # which of the 12 tokens of a row are real
    "left": ([0] * 5 + [1] * 7, [0] * 1 + [1] * 11, [1] * 12),
    "right": ([1] * 7 + [0] * 5, [1] * 2 + [0] * 10, [1] * 12),
    "mixed": ([0] * 3 + [1] * 6 + [0] * 3, [1] * 9 + [0] * 3, [0] * 4 + [1] * 8),
    "holes": ([1, 0, 1, 1, 0, 0, 1, 1, 1, 0, 1, 1], [0, 1] * 6, [1] * 12),
    "empty row": ([0] * 12, [1] * 12, [0] * 6 + [1] * 6),
}


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", ["yaad", "yaad_linear", "deltanet", "mamba2"])
def test_padding_is_exact_for_any_padded_values(name, rows):
    module = block(name)
    mask, weight = torch.tensor(ROWS[rows]), tokens(3, 12, seed=3)
    x = tokens(3, 12).masked_fill(mask[..., None] == 0, math.nan).requires_grad_()
    out, state = module(x, mask)
    assert state is None
    (out * weight).sum().backward()
    padded = {n: p.grad.clone() for n, p in module.named_parameters()}
    module.zero_grad()
    assert (out[mask == 0] == 0).all()
    assert (x.grad[mask == 0] == 0).all()
    for i in range(3):
        real = mask[i] == 1
        if not real.any():
            continue
        alone = x.detach()[i : i + 1, real].requires_grad_()
        expected = module(alone)[0]
        assert_close(out[i : i + 1, real], expected)
        (expected * weight[i, real]).sum().backward()
        assert_close(x.grad[i : i + 1, real], alone.grad)
    for n, p in module.named_parameters():
        assert_close(padded[n], p.grad)


def test_padded_outputs_are_zero_even_where_a_projection_has_a_bias():
    module, mask = block(), torch.tensor(ROWS["mixed"])
    module.o_proj.bias = torch.nn.Parameter(torch.ones(SIZES["hidden_size"], dtype=torch.float64))
    out, _ = module(tokens(3, 12), mask)
    assert (out[mask == 0] == 0).all()
    assert (out[mask == 1] != 0).all()


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_a_mask_of_ones_changes_nothing(dtype):
    module, x = block(dtype=torch.float32), tokens(2, 9, torch.float32)
    assert torch.equal(module(x, torch.ones(2, 9, dtype=dtype))[0], module(x)[0])


@pytest.mark.parametrize("name", ["deltanet", "titans", "yaad", "yaad_linear"])
@pytest.mark.parametrize("cut", [2, 5])
def test_a_row_of_only_padding_keeps_its_state(name, cut):
    module, x = block(name), tokens(3, 13)
    mask = torch.ones(3, 13)
    mask[0, :cut], mask[1, cut:9] = 0, 0
    state, outs = None, []
    for piece, part in zip(x.split([cut, 9 - cut, 4], 1), mask.split([cut, 9 - cut, 4], 1), strict=True):
        out, state = module(piece, part, initial_state=state, output_final_state=True)
        outs.append(out)
    for i in range(3):
        real = mask[i] == 1
        expected, final = module(x[i : i + 1, real], output_final_state=True)
        assert_close(torch.cat(outs, 1)[i : i + 1, real], expected)
        for a, b in zip(state.memory.dual, final.memory.dual, strict=True):
            assert_close(a[i : i + 1], b)
        assert_close(state.conv[i : i + 1], final.conv)
    empty, same = module(x, torch.zeros(3, 13), initial_state=state, output_final_state=True)
    assert same is state and torch.equal(empty, torch.zeros_like(x))


@pytest.mark.parametrize("name", ["titans", "yaad_linear"])
def test_start_is_the_state_before_the_first_token(name):
    module, x = block(name), tokens(2, 7)
    assert_close(module(x, initial_state=module.start(2))[0], module(x)[0])


@pytest.mark.parametrize("name", ["yaad", "yaad_linear"])
def test_projections_outside_of_the_block(name):
    """A block without projections computes the same; its convolution is initialised to the identity."""
    whole, x = block(name), tokens(2, 11)
    rest = block(name, projections=False)
    assert torch.equal(rest.conv_weight, torch.tensor([0, 0, 0, 1.0], dtype=torch.float64).expand(72, 4))
    missing, unexpected = rest.load_state_dict(whole.state_dict(), strict=False)
    assert not missing and {key.split(".")[0] for key in unexpected} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    mask = torch.ones(2, 11)
    mask[0, :3], mask[1, 4:6] = 0, 0
    projected = Projected(torch.cat([p(x) for p in (whole.q_proj, whole.k_proj, whole.v_proj)], -1))
    for final in (False, True):
        out, _ = rest(x, mask, projected=projected, output_final_state=final)
        assert_close(whole.o_proj(out), whole(x, mask)[0])


def test_with_rotary_positions_a_linear_memory_depends_on_distances_only():
    rest, x = block(projections=False), tokens(2, 11)
    qkv = torch.randn(2, 11, 72, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

    def run(shift):
        angles = (torch.arange(11) + shift)[None, :, None] * torch.tensor([1.0, 0.3, 0.1, 0.03], dtype=torch.float64).repeat(2)
        return rest(x, projected=Projected(qkv, angles.cos().expand(2, 11, 8), angles.sin().expand(2, 11, 8)))[0]

    assert_close(run(7), run(0))
    assert (run(0) - rest(x, projected=Projected(qkv))[0]).norm() > 1e-2


@pytest.mark.parametrize("rows", ["left", "right", "mixed", "holes"])
@pytest.mark.parametrize("name", ["yaad", "yaad_linear"])
def test_the_state_after_padding_is_that_of_the_real_tokens(name, rows):
    module, x, mask = block(name), tokens(3, 12), torch.tensor(ROWS[rows])
    more = tokens(3, 7, seed=4)
    out, state = module(x, mask, output_final_state=True)
    assert_close(out, module(x, mask)[0])
    continued, _ = module(more, initial_state=state)
    for i in range(3):
        real = x[i : i + 1, mask[i] == 1]
        assert_close(continued[i : i + 1], module(torch.cat([real, more[i : i + 1]], 1))[0][:, real.shape[1] :])


# ------------------------------------------------------------------------------------------------- packing and cutting


@pytest.mark.parametrize("name", ["yaad", "ttt_mlp", "yaad_linear", "deltanet", "retnet"])
def test_packed_sequences_equal_separate_calls(name):
    module, lengths = block(name), (1, 0, 2, 3, 9, 4, 0)
    x, weight = tokens(1, sum(lengths)).requires_grad_(), tokens(1, sum(lengths), seed=3)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    out, state = module(x, cu_seqlens=offsets, output_final_state=True)
    (grad,) = torch.autograd.grad((out * weight).sum(), x)
    for i, (a, b) in enumerate(itertools.pairwise(offsets)):
        alone = x.detach()[:, a:b].requires_grad_()
        expected, expected_state = module(alone, output_final_state=True)
        (expected_grad,) = torch.autograd.grad((expected * weight[:, a:b]).sum(), alone)
        assert_close(out[:, a:b], expected)
        assert_close(grad[:, a:b], expected_grad)
        for dual, expected_dual in zip(state.memory.dual, expected_state.memory.dual, strict=True):
            assert_close(dual[i], expected_dual[0])
        assert_close(state.conv[i], expected_state.conv[0])
    # each continues from its own state
    more = tokens(1, 2 * len(lengths), seed=4)
    continued, _ = module(more, cu_seqlens=torch.arange(0, 2 * len(lengths) + 1, 2), initial_state=state)
    for i, (a, b) in enumerate(itertools.pairwise(offsets)):
        whole = module(torch.cat([x[:, a:b], more[:, 2 * i : 2 * i + 2]], 1))[0]
        assert_close(continued[:, 2 * i : 2 * i + 2], whole[:, b - a :])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("pieces", [(13,) + (1,) * 5, (1, 2, 5, 10), (4, 8, 6)])
def test_a_sequence_can_be_read_in_pieces(name, pieces):
    module, x = block(name), tokens(2, sum(pieces))
    whole, final = module(x, output_final_state=True)
    outputs, state = [], None
    for piece in x.split(pieces, 1):
        out, state = module(piece, initial_state=state, output_final_state=True)
        outputs.append(out)
    assert_close(torch.cat(outputs, 1), whole)
    for dual, expected in zip(state.memory.dual, final.memory.dual, strict=True):
        assert_close(dual, expected)
    assert_close(state.conv, final.conv)


@pytest.mark.parametrize("name", ["yaad", "yaad_linear"])
def test_gradients_flow_through_the_state_between_pieces(name):
    module, x, weight = block(name, torch.float32), tokens(2, 20, torch.float32), tokens(2, 20, torch.float32, seed=3)
    (module(x)[0] * weight).sum().backward()
    whole = {n: p.grad.clone() for n, p in module.named_parameters()}
    module.zero_grad()
    first, state = module(x[:, :8], output_final_state=True)
    second, _ = module(x[:, 8:], initial_state=state)
    (torch.cat([first, second], 1) * weight).sum().backward()
    for n, p in module.named_parameters():
        assert_close(p.grad, whole[n])
    assert all(not t.requires_grad for t in (*state.detach().memory.tensors(), state.detach().conv))


@pytest.mark.parametrize(("batch", "length"), [(0, 5), (2, 0)])
@pytest.mark.parametrize(("name", "shapes"), [("yaad_linear", [(8, 8)]), ("yaad", [(8, 32), (32, 8)])])
def test_empty_inputs(name, shapes, batch, length):
    module = block(name)
    out, state = module(tokens(batch, length), output_final_state=True)
    assert out.shape == (batch, length, SIZES["hidden_size"])
    assert isinstance(state, BlockState)
    assert [tuple(dual.shape) for dual in state.memory.dual] == [(batch, 3, *shape) for shape in shapes]


# --------------------------------------------------------------------------------------------- gradients, dtypes, tools


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_reach_every_parameter(name, dtype):
    module, x = block(name, dtype), tokens(2, 21, dtype).requires_grad_()
    out, _ = module(x)
    assert out.dtype == dtype
    (out.float() * tokens(2, 21, torch.float32, seed=3)).sum().backward()
    for n, t in [*module.named_parameters(), ("x", x)]:
        assert t.grad is not None, n
        assert torch.isfinite(t.grad).all(), n
        assert t.grad.abs().max() > 0, n


@pytest.mark.parametrize("name", ["yaad", "l2_mlp", "yaad_linear", "mamba2"])
def test_gradcheck(name):
    torch.manual_seed(0)
    module = MemoryBlock(3, 1, 3 if name in MLP else 2, preset=name, chunk_size=2, gate_rank=2, init_std=0.7, dtype=torch.float64)
    names, values = zip(*module.named_parameters(), strict=True)
    x = torch.randn(1, 5, 3, dtype=torch.float64, requires_grad=True)
    run = lambda x, *p: torch.func.functional_call(module, dict(zip(names, p, strict=True)), (x,))[0]
    assert torch.autograd.gradcheck(run, (x, *values), fast_mode=name in MLP)


@pytest.mark.parametrize("name", ["yaad", "yaad_linear"])
def test_gates_are_float32_under_autocast(name):
    module, x = block(name, torch.float32), tokens(2, 21, torch.float32)
    plain = module.gates(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast, out = module.gates(x), module(x)[0]
    assert out.dtype == torch.bfloat16
    for n, gate in plain.items():
        assert cast[n].dtype == torch.float32
        assert torch.equal(cast[n], gate)
    exact = module(x)[0]
    # Roundings to 8 bits on the way: projections, convolution, silu, normalised q and k, memory, two products at the end.
    assert (out.float() - exact).norm() <= 8 * 2**-8 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_mlp_memory_has_parameters_in_the_modules_dtype_and_a_float32_state(dtype):
    module = block("yaad", dtype)
    assert {p.dtype for p in module.parameters()} == {dtype}
    _, state = module(tokens(2, 0, dtype), output_final_state=True)
    for dual, start in zip(state.memory.dual, (module.w1, module.w2), strict=True):
        assert dual.dtype == torch.float32
        assert torch.equal(dual, start.float().expand_as(dual))
    assert all(x.dtype == torch.float32 for x in module(tokens(2, 9, dtype), output_final_state=True)[1].memory.tensors())


@pytest.mark.parametrize(("name", "padded"), [slow("yaad_linear", False), ("yaad_linear", True), slow("yaad", True)])
def test_torch_compile_in_one_graph(name, padded):
    module, x = block(name, torch.float32), tokens(2, 12, torch.float32)
    mask = torch.tensor(ROWS["mixed"][:2]) if padded else None
    compiled = torch.compile(copy.deepcopy(module), fullgraph=True, backend="aot_eager")
    for run in (module, compiled):
        run(x, mask)[0].square().sum().backward()
    assert_close(compiled(x, mask)[0], module(x, mask)[0])
    for (n, p), q in zip(module.named_parameters(), compiled.parameters(), strict=True):
        assert q.grad.abs().max() > 0, n
        assert_close(q.grad, p.grad)


def test_initialisation_follows_the_seed():
    a, b, c = block(seed=3), block(seed=3), block(seed=4)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.q_proj.weight, c.q_proj.weight)


def test_custom_presets():
    row = dataclasses.replace(PRESETS["l2"], retention=KLRetention(), chunk_size=4)
    module, x = block(row), tokens(1, 9)
    assert (module(x)[0] - block("l2")(x)[0]).abs().max() > 1e-3
    row = Preset(L2(), "bounded", "token", 4, "", memory="mlp", expansion=2)
    module = block(row)
    assert (module.w1.shape, module.w2.shape, module.ln_weight.shape) == ((3, 8, 16), (3, 16, 8), (3, 8))
    assert torch.isfinite(module(x)[0]).all()


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("make", "kind", "text"),
    [
        (lambda: MemoryBlock(8, 2, preset="mneta"), ValueError, r"preset: expected one of 'moneta', .*'mamba2', got 'mneta'"),
        (lambda: MemoryBlock(8, 2, preset=L2()), TypeError, "preset: expected a name or a Preset, got L2"),
        (lambda: MemoryBlock(8, 3), ValueError, r"num_heads: expected a divisor of hidden_size = 8 \(or a head_dim\), got 3"),
        (lambda: MemoryBlock(8, 0), ValueError, "num_heads: expected an integer >= 1, got 0"),
        (lambda: MemoryBlock(8.0, 2), ValueError, r"hidden_size: expected an integer >= 1, got 8\.0"),
        (lambda: MemoryBlock(8, 2, 0), ValueError, "head_dim: expected an integer >= 1, got 0"),
        (lambda: MemoryBlock(8, 2, gate_rank=0), ValueError, "gate_rank: expected an integer >= 1, got 0"),
        (lambda: MemoryBlock(8, 2, conv_width=0), ValueError, "conv_width: expected an integer >= 1, got 0"),
        (lambda: MemoryBlock(8, 2, chunk_size=0), ValueError, "chunk_size: expected an integer >= 1, got 0"),
        (lambda: MemoryBlock(8, 2, chunk_size=1.5), TypeError, "chunk_size: expected an integer >= 1, got float"),
        (lambda: Preset(L2(), "one", None, 4, "", memory="rnn"), ValueError, "memory: expected one of 'linear', 'mlp', got 'rnn'"),
        (lambda: Preset(L2(), "one", None, 4, "", memory="mlp"), ValueError, "expansion: expected an integer >= 1 .* got None"),
        (lambda: Preset(L2(), "one", None, 4, "", memory="mlp", expansion=0), ValueError, "expansion: expected an integer >= 1 .* got 0"),
        (lambda: Preset(L2(), "one", None, 4, "", expansion=4), ValueError, "expansion: a linear memory has none, expected None, got 4"),
        (lambda: Preset(L2(), "one", None, 4, "", momentum=True), ValueError, "momentum: True needs lr='bounded', got lr='one'"),
        (lambda: Preset(Huber(), "fast", None, 4, ""), ValueError, "lr: expected one of 'bounded', 'one', 'dt', got 'fast'"),
        (lambda: Preset(L2(), "one", "dt", 4, ""), ValueError, "decay: 'dt' needs lr='dt', got lr='one'"),
        (lambda: block()(tokens(1, 5)[0]), ValueError, r"hidden_states: expected shape \[B, T, D\] with D = 24, got \(5, 24\)"),
        (lambda: block()(tokens(1, 5)[..., :3]), ValueError, r"hidden_states: expected shape .* got \(1, 5, 3\)"),
        (lambda: block()(tokens(1, 5), [1] * 5), TypeError, r"attention_mask: expected a tensor \[B, T\], got list"),
        (lambda: block()(tokens(1, 5), torch.ones(1, 4)), ValueError, r"attention_mask: expected shape \[B, T\] = \(1, 5\), got \(1, 4\)"),
        (
            lambda: block()(tokens(1, 5), torch.ones(1, 5), cu_seqlens=torch.tensor([0, 5])),
            ValueError,
            "attention_mask: packed .* got both",
        ),
        (
            lambda: block()(tokens(1, 5), initial_state=torch.zeros(1)),
            TypeError,
            "initial_state: expected a BlockState or a BlockDecoder, got Tensor",
        ),
        (lambda: block(projections=False)(tokens(1, 5)), ValueError, r"projected: expected q, k and v .*got NoneType"),
        (lambda: block()(tokens(1, 5), projected=Projected(torch.zeros(1, 5, 72))), ValueError, "projected: expected None .*got Projected"),
        (
            lambda: block(projections=False)(tokens(1, 5), projected=Projected(torch.zeros(1, 5, 71))),
            ValueError,
            r"projected\.qkv: expected shape \(1, 5, 72\), got \(1, 5, 71\)",
        ),
        (
            lambda: block()(tokens(2, 5), initial_state=block()(tokens(1, 5), output_final_state=True)[1]),
            ValueError,
            r"initial_state\.conv: expected shape \(2, 3, 72\), got \(1, 3, 72\)",
        ),
    ],
)
def test_errors_name_argument_expectation_and_what_came(make, kind, text):
    with pytest.raises(kind, match=text):
        make()
