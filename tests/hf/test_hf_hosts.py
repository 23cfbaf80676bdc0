"""Every architecture of the table: replaced, trained, generating, saved; unknown ones, and text models inside of larger ones."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys

import pytest
import torch
import transformers
from hf_tiny import ARCHITECTURES, HOSTS, LENGTH, ROWS, VOCAB, assert_close, gradients, host, ids, model, plain, unavailable
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import miras_kernels.hf as hf
from miras_kernels.hf import Host, MemoryAttention, hosts, load, memory_config, register_host, replace_attention, report
from miras_kernels.layers.functional import rotated
from miras_kernels.versions import minor

MASK = torch.tensor(ROWS["left"])
NEW = [name for name in HOSTS if name not in ARCHITECTURES]  # the others are in every test of this folder
LATENT = ("DeepseekV2", "DeepseekV3")
every_new_host = pytest.mark.parametrize("architecture", NEW)


@pytest.fixture(autouse=True)
def available(request):
    name = getattr(request.node, "callspec", None) and request.node.callspec.params.get("architecture")
    if name and unavailable(name):
        pytest.skip(unavailable(name))


def test_the_table_is_tested():
    assert {f"{name}{'Text' if name == 'Gemma3' else ''}Model" for name in HOSTS} == set(hosts.TABLE)
    assert not any(map(unavailable, HOSTS)) or transformers.__version__.startswith("5.4.")


@pytest.mark.parametrize("init", ["new", "from_attention"])
@every_new_host
def test_replaced_models_train_and_generate(architecture, init):
    if architecture in LATENT and init == "from_attention":
        with pytest.raises(ValueError, match=f"init: {architecture}Config has compressed keys and values .* expected 'new'"):
            model(architecture, init=init)
        return
    before, net = plain(architecture), model(architecture, [0, 2], init=init)
    assert type(net).__name__ == f"Miras{type(before).__name__}" and isinstance(net, type(before))
    layers = hosts.attentions(net.base_model, host(architecture))
    assert [isinstance(layer, MemoryAttention) for layer in layers] == [True, False, True]
    old, parts = dict(before.named_parameters()), report(net)
    assert set(parts.new) | set(parts.copied) >= {n for n in dict(net.named_parameters()) if n not in old}
    assert bool(parts.copied) == (init == "from_attention")
    for n, grad in gradients(net, input_ids=ids(), labels=ids()).items():
        assert torch.isfinite(grad).all() and grad.abs().max() > 0, n
    net.eval()
    options = dict(max_new_tokens=5, do_sample=False)
    padded = net.generate(ids(), attention_mask=MASK, **options)
    assert torch.equal(padded, net.generate(ids(), attention_mask=MASK, **options, use_cache=False))
    for row, mask in enumerate(MASK):
        assert torch.equal(padded[row, LENGTH:], net.generate(ids()[row : row + 1, mask == 1], **options)[0, -5:])


@every_new_host
def test_packing_and_memories_beside_attention(architecture):
    before, net, lengths = plain(architecture).eval(), model(architecture, [0], mode="parallel").eval(), (5, 1, 7)
    assert torch.equal(net(input_ids=ids()).logits, before(input_ids=ids()).logits)
    replace_attention(net, "l2", [1, 2], chunk_size=4)
    with torch.no_grad():
        hosts.attentions(net.base_model, host(architecture))[0].memory.output_gate.fill_(0.5)
    options = dict(max_new_tokens=5, do_sample=False)
    assert torch.equal(net.generate(ids(), **options), net.generate(ids(), **options, use_cache=False))
    alone = torch.cat([net(input_ids=part).logits for part in ids(1).split(lengths, 1)], 1)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    if not host(architecture).packs:
        with pytest.raises(ValueError, match=f"position_ids, cu_seq_lens_q: the attention of Miras{architecture}Model does not separate"):
            net(input_ids=ids(1), position_ids=positions)
        net = model(architecture).eval()
        alone = torch.cat([net(input_ids=part).logits for part in ids(1).split(lengths, 1)], 1)
    assert_close(net(input_ids=ids(1), position_ids=positions).logits, alone)


@pytest.mark.parametrize("architecture", [name for name in HOSTS if name not in LATENT])
def test_a_memory_made_from_attention_has_its_queries_keys_and_values(architecture):
    """Scores and values are those that the attention layer computes, after norms and rotary position embedding."""
    before, seen, inputs, turned = plain(architecture).eval(), [], [], host(architecture)

    def probe(module, q, k, v, mask, **kwargs):
        seen.append((q, k, v))
        return q.transpose(1, 2), None

    hooks = [
        layer.register_forward_pre_hook(lambda _, args, kwargs: inputs.append((*args, kwargs)), with_kwargs=True)
        for layer in hosts.attentions(before.base_model, turned)
    ]
    ALL_ATTENTION_FUNCTIONS["probe"], before.config._attn_implementation = probe, "probe"
    try:
        before(input_ids=ids())
    finally:
        del ALL_ATTENTION_FUNCTIONS["probe"]
    for hook in hooks:
        hook.remove()
    after = model(architecture, init="from_attention").eval()
    for i, layer in enumerate(hosts.attentions(after.base_model, turned)):
        kwargs = inputs[i][-1]
        x = inputs[i][0] if len(inputs[i]) == 2 else kwargs["hidden_states"]
        projected = layer._project(x, kwargs.get("position_embeddings"))
        q, k, v = projected.qkv.unflatten(-1, (3, 4, 8)).unbind(2)
        if projected.cos is not None:
            q, k = (rotated(t, projected.cos, projected.sin) for t in (q, k))
        their_q, their_k, their_v = (t.repeat_interleave(4 // t.shape[1], 1) for t in seen[i])
        assert_close(torch.einsum("bthd,bshd->bhts", q, k), their_q @ their_k.transpose(2, 3))
        assert_close(v.transpose(1, 2), their_v)


FRESH = """
import sys, torch
torch.set_num_threads(1)
from miras_kernels.hf import load
for folder in sys.argv[1:]:
    text = torch.load(folder + "/text.pt")
    assert torch.equal(load(folder).generate(text[:, :5], max_new_tokens=4, do_sample=False), text), folder
print("all well")
"""


def test_saving_and_loading_in_a_fresh_process(tmp_path):
    folders = []
    for architecture in NEW:
        if unavailable(architecture):
            continue
        net = model(architecture, [0, 2], init="new" if architecture in LATENT else "from_attention").eval()
        folder = tmp_path / architecture
        net.save_pretrained(folder)
        text = net.generate(ids(2, 5), max_new_tokens=4, do_sample=False)
        torch.save(text, folder / "text.pt")
        loaded = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=net.config._attn_implementation)
        for other in (loaded, pickle.loads(pickle.dumps(net))):
            assert type(other) is type(net) and all(map(torch.equal, other.state_dict().values(), net.state_dict().values()))
            assert_close(other(input_ids=ids()).logits, net(input_ids=ids()).logits)  # bits depend on addresses in products of some CPUs
        folders.append(str(folder))
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    ran = subprocess.run([sys.executable, "-c", FRESH, *folders], capture_output=True, text=True, env=environment, check=False)
    assert ran.returncode == 0 and "all well" in ran.stdout, ran.stderr


@pytest.mark.parametrize("architecture", ["Mixtral", "Qwen3Moe", "GPT2"])
def test_a_checkpoint_of_the_hub_loads_into_the_class_with_memories(architecture, tmp_path):
    """Experts are stored one by one there and fused in the model."""
    base = plain(architecture)
    base.save_pretrained(tmp_path)
    config = memory_config(base.config, "l2", [0, 2], init="from_attention", chunk_size=4)
    cls = getattr(hf, f"Miras{type(base).__name__}")
    loaded, info = cls.from_pretrained(tmp_path, config=config, output_loading_info=True)
    assert set(info["missing_keys"]) == set(report(loaded).new) and not info["unexpected_keys"]
    assert base.config._experts_implementation == loaded.config._experts_implementation  # not the slow one
    values = loaded.state_dict()
    assert all(torch.equal(values[name], x) for name, x in base.state_dict().items())


# --------------------------------------------------------------------------------------------------- an unknown architecture


class TowerConfig(PreTrainedConfig):
    model_type = "tower"
    hidden_size, num_hidden_layers, num_attention_heads, vocab_size = 24, 3, 3, VOCAB
    initializer_range = 0.2


class Mixer(nn.Module):
    def __init__(self, config, index):
        super().__init__()
        self.index, size = index, config.hidden_size
        self.qkv, self.out = nn.Linear(size, 3 * size), nn.Linear(size, size)

    def forward(self, hidden_states, **kwargs):
        q, k, v = self.qkv(hidden_states).unflatten(-1, (3, 3, 8)).permute(2, 0, 3, 1, 4)
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)), None


class Floor(nn.Module):
    def __init__(self, config, index):
        super().__init__()
        self.norm, self.mixer = nn.LayerNorm(config.hidden_size), Mixer(config, index)

    def forward(self, x, **kwargs):
        return x + self.mixer(self.norm(x), **kwargs)[0]


class TowerModel(PreTrainedModel):
    config_class, base_model_prefix = TowerConfig, "tower"

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.floors = nn.ModuleList([Floor(config, i) for i in range(config.num_hidden_layers)])
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        x = self.embed(input_ids)
        kwargs.pop("use_cache", None)
        for floor in self.floors:
            x = floor(x, attention_mask=attention_mask, **kwargs)
        return x


class TowerForCausalLM(PreTrainedModel):
    config_class, base_model_prefix = TowerConfig, "tower"

    def __init__(self, config):
        super().__init__(config)
        self.tower = TowerModel(config)
        self.head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def forward(self, input_ids=None, **kwargs):
        return self.head(self.tower(input_ids, **kwargs))


def without(what):
    """The model with one requirement less."""
    net = TowerForCausalLM(TowerConfig())
    floor = net.tower.floors[1]
    if what == "layers":
        del net.tower.floors[2]
    elif what == "attention":
        floor.blender = floor.mixer
        del floor.mixer
    elif what == "kwargs":
        floor.__class__ = type("Bare", (Floor,), dict(forward=lambda self, x, attention_mask=None: x))
    elif what == "hidden_size":
        net.config.hidden_size = None
    return net


def test_an_unknown_architecture_is_registered(tmp_path):
    with pytest.raises(
        TypeError,
        match=r"got TowerForCausalLM\. .*Floor \(layer 0\) has no module 'self_attn', it has norm, mixer\. See .*register_host",
    ):
        replace_attention(without(None))
    names = dict(layers="floors", attention="mixer", projections=("qkv",), output="out", rotary=None)
    cls = register_host(TowerModel, TowerForCausalLM, attention_class=Mixer, **names)
    assert cls.__name__ == "MirasTowerModel"
    for init in ("new", "from_attention"):
        torch.manual_seed(0)
        net = replace_attention(without(None), "yaad_linear", [0, 2], init=init, chunk_size=4).eval()
        assert [isinstance(floor.mixer, MemoryAttention) for floor in net.tower.floors] == [True, False, True]
        logits = net(ids(), attention_mask=MASK)
        for row, mask in enumerate(MASK):
            assert_close(net(ids()[row : row + 1, mask == 1])[0, :1], net(ids()[row : row + 1, mask == 1][:, :1])[0])
        assert torch.isfinite(logits).all()
        logits.sum().backward()
        assert all(p.grad is not None for p in net.tower.floors[0].mixer.memory.parameters())
        net.save_pretrained(tmp_path / init)
        assert torch.equal(load(tmp_path / init).eval()(ids()), net(ids()))
    net, before = without(None), without(None)
    net.load_state_dict(before.state_dict())
    assert torch.equal(replace_attention(net, mode="parallel")(ids()), before(ids()))
    with pytest.raises(ValueError, match="config_class: expected a class of its own, not registered before, .* got TowerConfig"):
        register_host(TowerModel, **names)
    for what, text in {
        "layers": "TowerModel does not have a list of modules 'floors' with 3",
        "attention": r"Floor \(layer 1\) has no module 'mixer', it has norm, blender",
        "kwargs": r"Bare \(layer 1\)\.forward does not take \*\*kwargs, which it must hand on to its attention",
        "hidden_size": "TowerConfig has no hidden_size",
    }.items():
        with pytest.raises(TypeError, match=f"model: TowerForCausalLM .*{text}"):
            replace_attention(without(what))


class NoKwargs(TowerModel):
    config_class = type("OtherConfig", (TowerConfig,), {"model_type": "other"})

    def forward(self, input_ids):
        return input_ids


def gemma3_with_images():
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4)
    config = transformers.Gemma3Config(text_config=plain("Gemma3").config, vision_config=vision, mm_tokens_per_image=4)
    return transformers.Gemma3ForConditionalGeneration(config)


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (lambda: register_host(TowerConfig), TypeError, "base, heads: expected subclasses of PreTrainedModel, got .*TowerConfig"),
        (lambda: register_host(NoKwargs), TypeError, r"base: NoKwargs.forward must take \*\*kwargs and hand them on"),
        (
            lambda: register_host(transformers.LlamaModel),
            ValueError,
            "config_class: expected a class of its own, .*LlamaConfig in LlamaModel",
        ),
        (lambda: register_host(NoKwargs, TowerForCausalLM), ValueError, "the same for NoKwargs and its heads; got TowerConfig"),
        (
            lambda: register_host(NoKwargs, type("Head", (NoKwargs,), {})),
            ValueError,
            "heads: expected names that end in ForCausalLM, .*got Head",
        ),
        (lambda: register_host(NoKwargs, layer="h"), TypeError, "unexpected keyword argument 'layer'"),
        (lambda: Host(layers=None), TypeError, "layers: expected a name, got None"),
        (lambda: Host(projections=("q", "k")), ValueError, r"projections: expected the names of three modules, .* got \('q', 'k'\)"),
        (lambda: Host(fused="rows"), ValueError, "fused: expected one of 'parts', 'heads', got 'rows'"),
        (lambda: Host(norm="all"), ValueError, "norm: expected one of 'head', 'flat', got 'all'"),
        (lambda: Host(rotary="full"), ValueError, "rotary: expected one of 'half', .*None, got 'full'"),
        (
            lambda: replace_attention(transformers.T5Model(transformers.T5Config(d_model=8, num_layers=1, num_heads=2, vocab_size=9))),
            TypeError,
            "model: expected one built on LlamaModel, .* got T5Model. .*T5Model is an encoder and a decoder",
        ),
        (lambda: replace_attention(gemma3_with_images()), TypeError, "model: Gemma3ForConditionalGeneration attends .* in both directions"),
    ],
)
def test_errors(call, kind, text):
    with pytest.raises(kind, match=text):
        call()


# --------------------------------------------------------------------------------------------- a text model inside of another


def seeing():
    """A LLaVA with 4 tokens for an image; token 49 stands for them."""
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4, projection_dim=8
    )
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=plain().config, image_token_index=49, image_seq_length=4, vision_feature_layer=-1
    )
    torch.manual_seed(0)
    return transformers.LlavaForConditionalGeneration(config).eval()


def test_the_text_model_of_a_model_for_images(tmp_path):
    before = seeing()
    shared, pixels = before.config, torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    text = torch.cat([ids(2, 3).clamp(max=48), torch.full((2, 4), 49), ids(2, 5).clamp(max=48)], 1)
    mask = torch.ones_like(text)
    mask[0, :2] = 0
    net = replace_attention(copy.deepcopy(before), "yaad_linear", [0, 2], init="from_attention", chunk_size=4)
    assert type(net) is type(before) and type(net.model.language_model).__name__ == "MirasLlamaModel"
    assert (
        net.config is not shared and net.config.text_config is net.model.language_model.config and not hasattr(shared.text_config, "miras")
    )
    options = dict(pixel_values=pixels, attention_mask=mask, max_new_tokens=4, do_sample=False)
    written = net.generate(text, **options)
    assert torch.equal(written, net.generate(text, **options, use_cache=False))
    assert not torch.equal(written, net.generate(text, **{**options, "pixel_values": -pixels}))
    net.train()(input_ids=text, pixel_values=pixels, labels=text).loss.backward()
    for n, p in net.model.language_model.named_parameters():
        assert torch.isfinite(p.grad).all() and p.grad.abs().max() > 0, n
    net.eval().save_pretrained(tmp_path)
    for loaded in (load(tmp_path), type(net).from_pretrained(tmp_path)):
        assert type(loaded.model.language_model) is type(net.model.language_model)
        assert torch.equal(loaded.generate(text, **options), written)
    with pytest.raises(ValueError, match="layers: layer 0 has been replaced already"):
        replace_attention(net, layers=[0])
    if minor(transformers.__version__) > (5, 4):  # which cannot do this without memories either
        with pytest.raises(ValueError, match="attention_mask: expected"):
            net.generate(text, **options, cache_implementation="static")
