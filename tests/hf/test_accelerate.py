"""Linear attention of models in transformers on this library's kernels: the same numbers as transformers' PyTorch code."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import sys

import pytest
import torch
import transformers
from hf_tiny import ROWS, VOCAB, assert_close, gradients, ids
from torch import nn
from transformers import StaticCache

import miras_kernels as mk
from miras_kernels.hf import accelerate
from miras_kernels.hf.compat import CACHE

MASK = torch.tensor(ROWS["left"])
LAYERS = ["linear_attention", "linear_attention", "full_attention", "linear_attention"]
#: sizes of hybrids with grouped value heads
GROUPED = dict(
    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=6, linear_conv_kernel_dim=4, head_dim=8
)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16)
HOSTS = {
    "Qwen3Next": ("Qwen3NextConfig", {**GROUPED, **EXPERTS}),
    "Qwen3_5": ("Qwen3_5TextConfig", GROUPED),
    "Qwen3_5Moe": ("Qwen3_5MoeTextConfig", {**GROUPED, **EXPERTS}),
    "OlmoHybrid": (
        "OlmoHybridConfig",
        dict(linear_num_key_heads=3, linear_num_value_heads=3, linear_key_head_dim=8, linear_value_head_dim=12, linear_conv_kernel_dim=4),
    ),
    "KimiLinear": (
        "KimiLinearConfig",
        dict(
            linear_num_heads=3, linear_head_dim=8, linear_conv_kernel_dim=4, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=8,
            v_head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, n_group=1, topk_group=1,
            mlp_layer_types=["dense", "sparse", "sparse", "sparse"], num_key_value_heads=4,
        ),
    ),
}  # fmt: skip
ALL = pytest.mark.parametrize("name", HOSTS)


def host(name: str, dtype=torch.float32, **options) -> transformers.PreTrainedModel:
    """A tiny model with random weights."""
    config, sizes = HOSTS[name]
    settings = dict(
        vocab_size=VOCAB, hidden_size=24, intermediate_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, initializer_range=0.2, layer_types=LAYERS, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, name + "ForCausalLM")(getattr(transformers, config)(**{**settings, **sizes, **options}))
    return model.to(dtype).eval()


def layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if type(module).__name__.endswith(("GatedDeltaNet", "DeltaAttention"))]


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The backends that memories ran on."""
    chosen, choose = [], mk.dispatch.choose
    monkeypatch.setattr(mk.dispatch, "choose", lambda *args: chosen.append(choose(*args)) or chosen[-1])
    return chosen


@ALL
def test_logits_and_every_gradient(name, calls):
    model = host(name)
    given = dict(input_ids=ids(), labels=ids(), use_cache=False)
    wanted, grads = model(**given).logits, gradients(model, **given)
    assert accelerate(model) is model and not calls
    found = model(**given).logits
    assert len(calls) == len(layers(model)) == 3
    assert mk.dispatch.unavailable("cpp") or set(calls) == {"cpp"}
    assert_close(found, wanted)
    found_grads = gradients(model, **given)
    assert found_grads.keys() == grads.keys()
    for parameter, grad in grads.items():
        assert_close(found_grads[parameter], grad, terms=65536)


@pytest.mark.parametrize("name", ["Qwen3_5", "OlmoHybrid"])  # rounding sends tokens to other experts
def test_bfloat16(name):
    model, exact = host(name, torch.bfloat16), host(name)
    exact.load_state_dict(model.state_dict())
    wanted, theirs = exact(ids()).logits, model(ids()).logits
    ours = accelerate(model)(ids()).logits
    assert (ours - wanted).norm() <= 2 * (theirs - wanted).norm() + 8 * torch.finfo(torch.bfloat16).eps * wanted.norm()


@ALL
@pytest.mark.parametrize("static", [False, True])
@torch.no_grad()
def test_generation_of_a_left_padded_batch(name, static):
    model = host(name)
    given = dict(attention_mask=MASK, max_new_tokens=8, do_sample=False, output_logits=True, return_dict_in_generate=True)
    if static:
        given.update(cache_implementation="static", disable_compile=True)
    wanted = model.generate(ids(), **given)
    found = accelerate(model).generate(ids(), **given)
    assert torch.equal(found.sequences, wanted.sequences)
    for a, b in zip(found.logits, wanted.logits, strict=True):
        assert_close(a, b)


@ALL
@torch.no_grad()
def test_a_cache_goes_on_in_pieces_of_several_tokens(name):
    model = accelerate(host(name))
    whole, cache, pieces = model(ids()).logits, None, []
    for start, end in ((0, 6), (6, 7), (7, 13)):
        outputs = model(ids()[:, start:end], use_cache=True, **({} if cache is None else {CACHE: cache}))
        cache = getattr(outputs, CACHE)
        pieces.append(outputs.logits)
    assert_close(torch.cat(pieces, 1), whole)


@ALL
@torch.no_grad()
def test_packed_documents_are_separate(name):
    model = accelerate(host(name))
    text, ends = ids(1, 21), [0, 5, 6, 21]
    position = torch.cat([torch.arange(b - a) for a, b in itertools.pairwise(ends)]).unsqueeze(0)
    offsets = torch.tensor(ends, dtype=torch.int32)
    packed = dict(position_ids=position, cu_seq_lens_q=offsets, cu_seq_lens_k=offsets, max_length_q=15, max_length_k=15)
    found = model(text, **packed, use_cache=False).logits
    for start, end in itertools.pairwise(ends):
        assert_close(found[:, start:end], model(text[:, start:end], use_cache=False).logits)
    with pytest.raises(ValueError, match="^use_cache: packed documents"):
        model(text, **packed, use_cache=True)


@ALL
def test_packed_documents_have_gradients(name):
    """Those of a packed row are the sum of its documents'."""
    model = accelerate(host(name))
    text, ends = ids(1, 16), [0, 5, 16]
    weight = torch.randn(1, 16, VOCAB)
    offsets, position = torch.tensor(ends), torch.cat([torch.arange(5), torch.arange(11)]).unsqueeze(0)
    parameters = [p for p in model.parameters() if p.requires_grad]
    grads = lambda *losses: torch.autograd.grad(sum(losses), parameters, allow_unused=True)
    packed = grads((model(text, position_ids=position, cu_seq_lens_q=offsets, use_cache=False).logits * weight).sum())
    apart = grads(*[(model(text[:, a:b], use_cache=False).logits * weight[:, a:b]).sum() for a, b in ((0, 5), (5, 16))])
    for a, b in zip(packed, apart, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert_close(a, b, terms=65536)


@ALL
def test_it_is_undone(name):
    model = host(name)
    wanted, kinds, names = model(ids()).logits, [type(x) for x in model.modules()], list(model.state_dict())
    accelerate(model)
    accelerate(model)  # twice is once
    assert [type(x) for x in model.modules()] != kinds and list(model.state_dict()) == names
    assert all(isinstance(x, kind) for x, kind in zip(model.modules(), kinds, strict=True))
    accelerate(model, False)
    assert [type(x) for x in model.modules()] == kinds
    assert torch.equal(model(ids()).logits, wanted)
    accelerate(model, False)
    assert [type(x) for x in model.modules()] == kinds


@ALL
def test_no_module_of_transformers_changes(name):
    plain, model = host(name), host(name)
    source = sys.modules[type(layers(model)[0]).__module__]
    before = dict(vars(source))
    forward = type(layers(model)[0]).forward
    accelerate(model)(ids())
    assert dict(vars(source)) == before and type(layers(plain)[0]).forward is forward
    assert type(layers(plain)[0]) is not type(layers(model)[0])


@ALL
def test_copies_pickles_and_checkpoints(name, tmp_path):
    model = accelerate(host(name))
    wanted = model(ids()).logits
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
        assert [type(x) for x in layers(other)] == [type(x) for x in layers(model)]
        assert torch.equal(other(ids()).logits, wanted)
        assert type(layers(accelerate(other, False))[0]) is type(layers(host(name))[0])
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert type(layers(loaded)[0]) is type(layers(host(name))[0])
    assert_close(accelerate(loaded)(ids()).logits, wanted)


@pytest.mark.parametrize("name", ["Qwen3_5", pytest.param("KimiLinear", marks=pytest.mark.slow)])
@torch.no_grad()
def test_a_decoding_step_compiles_into_one_graph(name):
    model = accelerate(host(name))
    text = ids()
    cache = StaticCache(config=model.config, max_cache_len=32)
    model(text[:, :10], **{CACHE: cache}, use_cache=True)
    step = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = [step(text[:, t : t + 1], **{CACHE: cache}, use_cache=True, position_ids=torch.tensor([[t]])).logits for t in range(10, 13)]
    assert_close(torch.cat(found, 1), model(text).logits[:, 10:])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_steps_are_the_same(checkpointing):
    losses = []
    for fast in (False, True):
        model = host("Qwen3_5").train()
        if fast:
            accelerate(model)
        if checkpointing:
            model.gradient_checkpointing_enable()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        run = []
        for _ in range(3):
            loss = model(ids(), labels=ids(), use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            run.append(loss.detach())
        losses.append(torch.stack(run))
    assert losses[0][-1] < losses[0][0]
    assert_close(losses[1], losses[0], terms=65536)


# ----------------------------------------------------------------------------------------------------------- errors


def test_a_model_without_such_layers():
    with pytest.raises(ValueError, match="^model: expected one with layers of Qwen3NextGatedDeltaNet, .*, got Linear without any"):
        accelerate(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("wrong", "words"), [((3,), "^model: .* got int"), ((nn.Linear(2, 2), 1), "^enable: expected True or False, got 1")]
)
def test_wrong_arguments_are_named(wrong, words):
    with pytest.raises(TypeError, match=words):
        accelerate(*wrong)


def test_layers_that_are_written_in_another_way_are_refused(monkeypatch):
    model = host("Qwen3_5")
    kind = type(layers(model)[0])
    fake = type(kind.__name__, (kind,), {"forward": lambda self, hidden_states, **_: hidden_states, "__module__": kind.__module__})
    layers(model)[1].__class__ = fake
    kinds = [type(x) for x in model.modules()]
    with pytest.raises(ValueError, match="^model: the layers of transformers .* call no function causal_conv1d_fn"):
        accelerate(model)
    assert [type(x) for x in model.modules()] == kinds


def test_packing_by_seq_idx_alone_is_refused():
    model = accelerate(host("Qwen3_5"))
    with pytest.raises(ValueError, match="^seq_idx: expected cu_seq_lens_q as well"):
        model(ids(1), seq_idx=torch.zeros(1, 13, dtype=torch.int32), use_cache=False)
