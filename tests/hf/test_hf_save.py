"""Saving and loading models with memories, also in a fresh process; configurations and classes."""

from __future__ import annotations

import copy
import json
import os
import pickle
import re
import subprocess
import sys
import types
from pathlib import Path

import accelerate
import pytest
import torch
import transformers
from hf_tiny import ARCHITECTURES, LAYERS, MLP, ids, model, plain
from huggingface_hub import ModelCard
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaForCausalLM

import miras_kernels as mk
import miras_kernels.hf as hf
from miras_kernels.hf import MemoryAttention, load, memory_config, replace_attention, report
from miras_kernels.layers import PRESETS, Preset

KINDS = ("Model", "ForSequenceClassification", "ForTokenClassification")


def assert_same(a, b):
    assert type(a) is type(b)
    x, y = a.state_dict(), b.state_dict()
    assert x.keys() == y.keys() and all(torch.equal(x[name], y[name]) and x[name].dtype == y[name].dtype for name in x)
    a, b = a.eval(), b.eval()
    assert torch.equal(a(input_ids=ids())[0], b(input_ids=ids())[0])


@pytest.mark.parametrize(
    ("architecture", "init"), [*((name, "new") for name in ARCHITECTURES), ("Qwen2", "from_attention"), ("Gemma3", "from_attention")]
)
def test_saving_and_loading(architecture, init, tmp_path):
    net = model(architecture, [0, 2], init=init)
    net.save_pretrained(tmp_path)
    same = {"attn_implementation": net.config._attn_implementation}  # not saved
    for read in (load, AutoModelForCausalLM.from_pretrained, type(net).from_pretrained):
        loaded = read(tmp_path, **same)
        assert_same(loaded, net)
    base = AutoModel.from_pretrained(tmp_path, **same)
    assert_same(base, net.model)
    assert base.config.model_type == f"miras_{plain(architecture).config.model_type}"
    loaded.save_pretrained(tmp_path / "again")
    assert_same(load(tmp_path / "again", **same), net)
    text = loaded.generate(ids(), max_new_tokens=4, do_sample=False)
    assert torch.equal(text, net.generate(ids(), max_new_tokens=4, do_sample=False))


@pytest.mark.parametrize("preset", [*MLP, "huber", "retnet", "mamba2", "deltanet"])
def test_every_preset_is_saved(preset, tmp_path):
    net = model(preset=preset, layers=[1], conv_width=2, gate_rank=5, num_heads=3)
    net.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert_same(loaded, net)
    memory = loaded.model.layers[1].self_attn.memory
    assert memory.preset == net.model.layers[1].self_attn.memory.preset
    assert (memory.num_heads, memory.conv_width, memory.gate_down.shape[0] if memory.gate_down is not None else 5) == (3, 2, 5)


def of_one_s_own():
    bias = mk.CustomBias("e * exp(-norm2 / (s * delta)**2)", s=1.5)
    preset = Preset(bias, "bounded", "token", 4, "of these tests", retention=mk.CustomRetention("A / (1 + abs(A))"))
    return model(preset=preset, layers=[1]).eval()


def test_biases_and_gates_of_one_s_own_are_saved(tmp_path):
    net = of_one_s_own()
    net.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert_same(loaded, net)
    assert loaded.model.layers[1].self_attn.memory.preset == net.model.layers[1].self_attn.memory.preset
    for wrong, problem in (("s*__import__('os')", "is not part of an expression"), ("s * e + q", "unknown name 'q'")):
        config = json.loads((tmp_path / "config.json").read_text())
        config["miras"]["memories"][0]["preset"]["bias"]["text"] = wrong
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=f"CustomBias: .*{problem}"):
            load(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_all_task_heads(kind, tmp_path):
    net = model("Qwen2", kind=kind)
    assert type(net).__name__ == f"MirasQwen2{kind}"
    net.save_pretrained(tmp_path)
    assert_same(load(tmp_path), net)
    assert_same(getattr(transformers, f"Auto{'Model' if kind != 'Model' else ''}{kind}").from_pretrained(tmp_path), net)


def test_half_precision_shards_and_tied_weights(tmp_path):
    net = model(dtype=torch.bfloat16, tie_word_embeddings=True, preset="yaad")
    net.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    loaded = load(tmp_path)
    assert_same(loaded, net)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight and loaded.dtype == torch.bfloat16
    assert load(tmp_path, dtype=torch.float32).dtype == torch.float32


def test_from_config_initialises_as_replace_attention_does():
    net = model(preset="yaad", layers=[1])
    made = AutoModelForCausalLM.from_config(net.config)
    assert type(made) is type(net)
    for kept, new in zip(
        net.model.layers[1].self_attn.memory.parameters(), made.model.layers[1].self_attn.memory.parameters(), strict=True
    ):
        assert kept.shape == new.shape and torch.isfinite(new).all()
        assert abs(kept.float().std() - new.float().std()) <= 0.5 * kept.float().std()
    assert type(AutoModelForSequenceClassification.from_config(net.config)).__name__ == "MirasLlamaForSequenceClassification"


@pytest.mark.parametrize("preset", ["moneta", "yaad_linear"])
@pytest.mark.parametrize("init", ["new", "from_attention"])
def test_loading_a_plain_checkpoint_into_the_class_with_memories(init, preset, tmp_path):
    """The same as ``replace_attention``, for checkpoints that it cannot change in place."""
    base = plain("Qwen3")
    base.save_pretrained(tmp_path)
    config = memory_config(AutoConfig.from_pretrained(tmp_path), preset, [0, 2], init=init, chunk_size=4)
    loaded, info = hf.MirasQwen3ForCausalLM.from_pretrained(tmp_path, config=config, output_loading_info=True)
    assert set(info["missing_keys"]) == set(report(loaded).new)
    assert (not info["unexpected_keys"]) == (init == "from_attention")
    values = loaded.state_dict()
    for name, x in base.state_dict().items():
        if name in values:
            assert torch.equal(values[name], x), name
    memory, start = loaded.model.layers[0].self_attn.memory, model("Qwen3", [0], preset=preset, init=init).model.layers[0].self_attn.memory
    for (name, x), y in zip(memory.named_parameters(), start.parameters(), strict=True):
        assert torch.isfinite(x).all() and abs(x.abs().mean() - y.abs().mean()) <= 0.3 * y.abs().mean(), name
        if name in ("norm_weight", "gate_bias", "ln_weight", "ln_bias") or (name == "conv_weight" and init == "from_attention"):
            assert torch.equal(x, y), name


@pytest.mark.parametrize("lost", ["w1", "gate_bias", "g_proj.weight"])
def test_a_missing_tensor_is_initialised_and_the_others_are_loaded(lost, tmp_path):
    net = model(preset="moneta", layers=[1])
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.125)
    net.save_pretrained(tmp_path)
    name = f"model.layers.1.self_attn.memory.{lost}"
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, info = type(net).from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {name}
    new, old = loaded.state_dict(), net.state_dict()
    assert torch.isfinite(new[name]).all() and not torch.equal(new[name], old[name])
    assert all(torch.equal(new[key], old[key]) for key in old if key != name)
    if lost == "gate_bias":
        assert torch.equal(new[name], model(preset="moneta", layers=[1]).state_dict()[name])


@pytest.mark.parametrize("init", ["new", "from_attention"])
def test_weights_on_disk(init, tmp_path):
    net = model("Qwen2", [0, 2], init=init, preset="yaad").eval()
    net.save_pretrained(tmp_path)
    loaded = accelerate.disk_offload(load(tmp_path), str(tmp_path / "disk"), execution_device=torch.device("cpu"), offload_buffers=True)
    assert torch.equal(loaded(input_ids=ids()).logits, net(input_ids=ids()).logits)
    text = loaded.generate(ids(), max_new_tokens=4, do_sample=False)
    assert torch.equal(text, net.generate(ids(), max_new_tokens=4, do_sample=False))


def test_a_state_dict_can_be_loaded_again():
    net, other = model(layers=[0, 1], preset="yaad"), model(layers=[0, 1], preset="yaad", seed=5)
    other.load_state_dict(net.state_dict())
    assert_same(other, net)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        plain().load_state_dict(net.state_dict())


def test_pickles_and_copies(tmp_path):
    net = model(layers=[1])
    assert_same(pickle.loads(pickle.dumps(net)), net)
    assert_same(copy.deepcopy(net), net)
    torch.save(net, tmp_path / "whole.pt")
    assert_same(torch.load(tmp_path / "whole.pt", weights_only=False), net)
    assert copy.deepcopy(net.config).to_dict() == net.config.to_dict()


def test_configurations_are_plain_json():
    net = model(preset=Preset(PRESETS["moneta"].bias, "bounded", "token", 8, "mine"), layers=[2], chunk_size=None)
    field = json.loads(net.config.to_json_string())["miras"]
    assert field["version"] == 1 and field["memories"][0]["layers"] == [2]
    assert field["memories"][0]["preset"]["bias"] == {"type": "Lp", "p": 3.0, "sharpness": 10.0, "eps": 1e-06}
    assert hf.plan.write(hf.plan.read(net.config)) == net.config.miras == field


def test_the_original_configuration_is_unchanged():
    net = plain()
    config, before = net.config, net.config.to_dict()
    twin = LlamaForCausalLM(config)
    replace_attention(net, layers=[0])
    assert net.config is not config and config.to_dict() == before and twin.config is config
    assert all(module.config is net.config for module in net.modules() if hasattr(module, "config"))
    assert type(twin) is LlamaForCausalLM and type(twin.model.layers[0].self_attn).__name__ == "LlamaAttention"
    names = {cls for family in hf.classes.FAMILIES.values() for cls in family.models}
    assert not any(issubclass(cls, hf.classes.MirasModelMixin) for cls in names)


@pytest.mark.parametrize("architecture", ["Llama", "Gemma3"])
def test_hidden_states_are_recorded(architecture):
    before = plain(architecture)
    before(input_ids=ids(), output_hidden_states=True)  # registers the hooks
    for net in (model(architecture), replace_attention(before, layers=[1])):
        out = net(input_ids=ids(), output_hidden_states=True)
        assert len(out.hidden_states) == LAYERS + 1
        assert torch.equal(net.lm_head(out.hidden_states[-1]), out.logits) or architecture == "Gemma3"


FRESH = """
import sys, torch
torch.set_num_threads(1)
folder, text = sys.argv[1], torch.load(sys.argv[1] + "/text.pt")
from transformers import AutoConfig, AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
except ValueError as error:
    print("alone:", error)
else:
    raise SystemExit("loaded as something else")
remote = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
assert torch.equal(remote.generate(text[:, :5], max_new_tokens=6, do_sample=False), text)
remote.save_pretrained(folder + "/again")
from miras_kernels.hf import MirasQwen2ForCausalLM, load
assert type(remote) is MirasQwen2ForCausalLM
for place in (folder, folder + "/again"):
    for model in (load(place), AutoModelForCausalLM.from_pretrained(place)):
        assert type(model) is MirasQwen2ForCausalLM
        assert torch.equal(model.generate(text[:, :5], max_new_tokens=6, do_sample=False), text)
print("own:", load(folder + "/own")(torch.arange(1, 9)[None])[0].double().sum().item())
print("all well")
"""


def test_a_fresh_process(tmp_path):
    """It loads and saves a model with memories, and one with a bias and a gate of the user's own."""
    net, own = model("Qwen2", [0, 2], init="from_attention").eval(), of_one_s_own()
    net.save_pretrained(tmp_path)
    own.save_pretrained(tmp_path / "own")
    torch.save(net.generate(ids(2, 5), max_new_tokens=6, do_sample=False), tmp_path / "text.pt")
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run([sys.executable, "-c", FRESH, str(tmp_path)], capture_output=True, text=True, env=environment, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "all well" in ran.stdout and "alone:" in ran.stdout
    read = float(re.search(r"own: (\S+)", ran.stdout)[1])
    assert read == pytest.approx(own(torch.arange(1, 9)[None])[0].double().sum().item(), abs=1e-4)
    assert sorted(p.name for p in (tmp_path / "again").glob("*.py")) == ["modeling_miras.py"]


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (lambda path: load(path), ValueError, "path: expected a model with memories .* got LlamaForCausalLM of type 'llama'"),
        (
            lambda path: hf.MirasLlamaForCausalLM.from_pretrained(path),
            ValueError,
            "config.miras: MirasLlamaForCausalLM needs the layers that have memories",
        ),
        (lambda path: hf.MirasLlamaModel(hf.MirasLlamaConfig()), ValueError, "config.miras: MirasLlamaModel needs the layers .* got None"),
        (lambda path: hf.MirasLlamaForCausalLM.from_pretrained(path, tp_plan="auto"), NotImplementedError, "tp_plan: .*got 'auto'"),
        (lambda path: newer(), ValueError, "config.miras: expected version 1, got 2"),
        (lambda path: fewer_layers(), ValueError, "layers: expected indices from 0 to 0, got 2"),
    ],
)
def test_errors(call, kind, text, tmp_path):
    plain().save_pretrained(tmp_path)
    with pytest.raises(kind, match=text):
        call(tmp_path)


def newer():
    config = model().config
    config.miras = {**config.miras, "version": 2}
    return hf.MirasLlamaForCausalLM(config)


def fewer_layers():
    config = model(layers=[2]).config
    config.num_hidden_layers = 1
    return hf.MirasLlamaForCausalLM(config)


def test_public_classes_have_docstrings():
    assert all(getattr(hf, name).__doc__ for name in hf.__all__) and len(set(hf.__all__)) == len(hf.__all__)
    assert {f"Miras{name}ForCausalLM" for name in ARCHITECTURES} < set(hf.__all__)


def test_remaining_attention_can_change_its_implementation():
    net = model(layers=[0, 1]).eval()
    before = net(input_ids=ids()).logits
    net.set_attn_implementation("eager")
    assert torch.allclose(net(input_ids=ids()).logits, before, atol=1e-5)
    assert sum(isinstance(m, MemoryAttention) for m in net.modules()) == 2


def test_a_model_card(tmp_path):
    """It says which memories there are, and does not replace a README.md that is there."""
    net = model("Qwen2", [0], preset="titans")
    replace_attention(net, "huber", [2], init="from_attention", chunk_size=8)
    net.config.name_or_path = "someone/some-model"
    net.save_pretrained(tmp_path / "new")
    text = (tmp_path / "new" / "README.md").read_text()
    assert "# MirasQwen2ForCausalLM\n" in text and "2 of 3 layers; the others are attention." in text
    assert (
        "| 0 | Titans (LMM), arXiv 2501.00663, section 3 (MLP, 4 hidden units a channel, momentum) | `L2()` | `L2Retention()` | 4 | 4 |"
        in text
    )
    assert "| 2 | Huber loss per coordinate: " in text and "`Huber(kind='coordinate'" in text and "| 8 | 4 |  |" in text
    assert "base_model: someone/some-model" in text and "whose attention layers' projections the memories use" in text
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "README.md").write_text("mine")
    net.save_pretrained(tmp_path / "old")
    assert (tmp_path / "old" / "README.md").read_text() == "mine"
    beside = model(mode="parallel")
    beside.save_pretrained(tmp_path / "beside", is_main_process=False)
    assert not (tmp_path / "beside" / "README.md").exists()
    beside.save_pretrained(tmp_path / "beside")
    text = (tmp_path / "beside" / "README.md").read_text()
    assert "3 of 3 layers, beside attention." in text and "a model without a published name" in text and "base_model" not in text


@pytest.mark.parametrize("published", [False, True])
def test_the_card_that_is_uploaded(published, tmp_path, monkeypatch):
    """Ours in place of the one that transformers generates; a card that the repository has stays. Nothing is sent."""
    sent, repository = [], types.SimpleNamespace(repo_id="someone/tiny")
    hub = types.SimpleNamespace(create_repo=lambda *args, **kwargs: repository)
    for module in (transformers.modeling_utils, transformers.utils.hub):
        for name, fake in (("hf_api", lambda: hub), ("create_repo", hub.create_repo)):
            if hasattr(module, name):  # the second before transformers 5.24
                monkeypatch.setattr(module, name, fake)

    def card(name, **kwargs):
        if Path(name).exists():
            return ModelCard(Path(name).read_text())
        if published:
            return ModelCard("---\nlicense: mit\n---\nwritten by hand")
        raise LocalEntryNotFoundError("there is none")

    monkeypatch.setattr(ModelCard, "load", card)
    monkeypatch.setattr(
        transformers.PreTrainedModel,
        "_upload_modified_files",
        lambda self, folder, *a, **k: sent.append((Path(folder) / "README.md").read_text()),
    )
    net = model(layers=[0], preset="titans")
    net.save_pretrained(str(tmp_path / "tiny"), push_to_hub=True)
    net.push_to_hub("tiny", tags=["small"])
    assert len(sent) == 2
    for text in sent:
        assert ("Titans (LMM)" in text and "from miras_kernels.hf import load" in text) != published
        assert ("written by hand" in text) == published and "automatically generated" not in text
    assert "- miras-kernels\n- small\n" in sent[1] or published
