"""Libraries that train or quantise models, where they are installed: `make test-extras` installs them beside .venv."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch
from hf_tiny import assert_close, ids, plain
from torch import distributed, nn
from transformers import AutoConfig, BitsAndBytesConfig

from miras_kernels.hf import MirasLlamaForCausalLM, memory_config, replace_attention

SIZES = dict(hidden_size=64, intermediate_size=64, head_dim=16)  # in 4 bits, 32 or 64 numbers share a scale
pytestmark = pytest.mark.filterwarnings("ignore")


def needs(library: str):
    """The library, or a skipped test."""
    return pytest.importorskip(library, reason=f"{library} is not installed: make test-extras")


# ---------------------------------------------------------------------------------------------------- deepspeed

#: steps of plain SGD
STEPS, RATE = 3, 0.1


def sharded_steps(rank: int, folder: str) -> None:
    """One of two processes under ZeRO-3, each with half of the batch: losses and parameters must be those of one process without it."""
    os.environ.update(DS_ACCELERATOR="cpu", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_SIZE="2")
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    deepspeed = importlib.import_module("deepspeed")
    deepspeed.ops.__compatible_ops__.update(dict.fromkeys(deepspeed.ops.__compatible_ops__, False))  # nothing is compiled
    settings = {
        "train_micro_batch_size_per_gpu": 2, "gradient_clipping": 0.0, "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False, "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }  # fmt: skip
    batch = ids(4)
    for preset, init in (("yaad", "new"), ("yaad_linear", "from_attention")):
        nets = []
        for _ in range(2):
            nets.append(plain("Llama", **SIZES))
            torch.manual_seed(1)
            replace_attention(nets[-1], preset, [0, 2], init=init, chunk_size=4)
            nets[-1].train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        single, sharded = nets
        optimizer = torch.optim.SGD(single.parameters(), lr=RATE)
        engine = deepspeed.initialize(model=sharded, optimizer=torch.optim.SGD(sharded.parameters(), lr=RATE), config=settings)[0]
        assert all(p.numel() == 0 for p in sharded.parameters())  # they are in pieces
        for _ in range(STEPS):
            expected = single(input_ids=batch, labels=batch).loss
            expected.backward()
            optimizer.step()
            optimizer.zero_grad()
            half = batch[2 * rank : 2 * rank + 2]
            loss = engine(input_ids=half, labels=half).loss
            engine.backward(loss)
            engine.step()
            both = loss.detach().clone()
            distributed.all_reduce(both)
            assert_close(both / 2, expected)
        wanted = dict(single.named_parameters())
        with deepspeed.zero.GatheredParameters(list(sharded.parameters())):
            for name, p in sharded.named_parameters():
                assert_close(p, wanted[name])
    Path(folder, f"done{rank}").touch()
    distributed.destroy_process_group()


def test_deepspeed(tmp_path):
    needs("deepspeed")
    torch.multiprocessing.spawn(sharded_steps, (str(tmp_path),), nprocs=2)
    assert (tmp_path / "done0").exists() and (tmp_path / "done1").exists()


# ---------------------------------------------------------------------------------------------------- quantised linear layers


def restored(packed: nn.Module) -> nn.Module:
    """A model with the weights that the quantised ones stand for."""
    net = plain("Llama", **SIZES)
    for name, module in net.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            module.weight.data = packed.get_submodule(name)(torch.eye(module.in_features)).detach().T.contiguous()
    return net


def with_memories(net: nn.Module, init: str) -> nn.Module:
    torch.manual_seed(1)
    return replace_attention(net, "yaad_linear", [0, 2], init=init, chunk_size=4)


def assert_trained_as_restored(packed: nn.Module, init: str) -> None:
    """Outputs, and gradients of the memories' parameters, are those of the weights that the quantised ones stand for."""
    nets = [with_memories(net, init) for net in (restored(packed), packed)]
    losses = [net(input_ids=ids(), labels=ids()).loss for net in nets]
    assert_close(losses[1], losses[0])
    found = []
    for net, loss in zip(nets, losses, strict=True):
        loss.backward()
        found.append({n: p.grad for n, p in net.named_parameters() if ".memory." in n})
    for name, grad in found[1].items():
        assert grad.any()
        assert_close(grad, found[0][name])


def torchao(kind: str, **options) -> nn.Module:
    """A model whose linear layers but the head torchao has quantised."""
    needs("torchao")
    module, name = f"torchao.{kind}".rsplit(".", 1)
    net = plain("Llama", **SIZES)
    importlib.import_module("torchao.quantization").quantize_(net.model, getattr(importlib.import_module(module), name)(**options))
    assert type(net.model.layers[0].self_attn.q_proj.weight) is not nn.Parameter
    return net


@pytest.mark.parametrize("init", ["new", "from_attention"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("quantization.Int8WeightOnlyConfig", {}),
        ("quantization.Float8WeightOnlyConfig", {}),
        ("quantization.IntxWeightOnlyConfig", dict(weight_dtype=torch.int4)),
    ],
)
def test_weights_of_torchao(kind, options, init):
    assert_trained_as_restored(torchao(kind, **options), init)


def test_quantised_activations_of_torchao():
    """They pass no gradients on: memories that would be trained through these layers are refused, before anything is changed."""
    net = torchao("quantization.Int8DynamicActivationInt8WeightConfig")
    before = dict(net.named_modules())
    with pytest.raises(ValueError, match=r"init: 'from_attention' .* q_proj of layer 0 \(Linear with a weight of type .*or init='new'"):
        with_memories(net, "from_attention")
    assert before == dict(net.named_modules())
    assert torch.isfinite(with_memories(net, "new")(input_ids=ids()).logits).all()


def test_int4_weights_of_torchao_need_mslk():
    """Refused by torchao itself, while it quantises."""
    needs("torchao")
    if importlib.util.find_spec("mslk") is not None:
        pytest.skip("mslk is installed")
    with pytest.raises(ImportError, match="mslk"):
        torchao("quantization.Int4WeightOnlyConfig", group_size=32)


@pytest.mark.parametrize("bits", [4, 8])
def test_quanto(bits):
    """Its layers pass gradients on if their weights are not trained; also before these are packed, when every forward quantises them."""
    quanto = needs("optimum.quanto")
    for packed, init in ((False, "from_attention"), (True, "from_attention"), (True, "new")):
        net = plain("Llama", **SIZES)
        quanto.quantize(net.model, weights=quanto.qint4 if bits == 4 else quanto.qint8)
        if packed:
            quanto.freeze(net)
        if init == "from_attention":
            with pytest.raises(ValueError, match=r"init: 'from_attention' .* q_proj of layer 0 \(QLinear .*requires_grad_\(False\)"):
                with_memories(net, init)
        for module in net.model.layers.modules():
            if isinstance(module, nn.Linear):
                module.weight.requires_grad_(False)
        assert_trained_as_restored(net, init)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("init", ["new", "from_attention"])
def test_bitsandbytes(init, bits, tmp_path):
    """Trained, saved and loaded."""
    needs("bitsandbytes")
    plain("Llama", **SIZES).save_pretrained(tmp_path / "plain")
    quantization = BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4, bnb_4bit_compute_dtype=torch.float32)
    config = memory_config(AutoConfig.from_pretrained(tmp_path / "plain"), "yaad_linear", [0], init=init, chunk_size=4)
    net = MirasLlamaForCausalLM.from_pretrained(tmp_path / "plain", config=config, quantization_config=quantization)
    attention = net.model.layers[0].self_attn
    assert type(attention.memory.g_proj) is nn.Linear and type(net.model.layers[1].self_attn.q_proj) is not nn.Linear
    net.train()(input_ids=ids(), labels=ids()).loss.backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.any() for p in attention.memory.parameters())
    net.save_pretrained(tmp_path / "quantised")
    saved = json.loads((tmp_path / "quantised" / "config.json").read_text())["quantization_config"]["llm_int8_skip_modules"]
    assert r".*\.memory" in saved
    again = MirasLlamaForCausalLM.from_pretrained(tmp_path / "quantised")
    with torch.no_grad():
        assert_close(again(input_ids=ids()).logits, net.eval()(input_ids=ids()).logits)
