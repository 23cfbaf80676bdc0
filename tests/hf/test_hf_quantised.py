"""Memories in models whose linear layers are quantised; stand-ins do what quantisation libraries do to weights."""

from __future__ import annotations

import peft
import pytest
import torch
from hf_tiny import assert_close, ids, plain
from torch import nn
from transformers import AutoConfig, BitsAndBytesConfig, GPTQConfig

from miras_kernels.hf import MirasLlamaForCausalLM, memory_config, replace_attention
from miras_kernels.hf.quantised import leave_out_memories
from miras_kernels.layers import MemoryBlock


class EightBits(nn.Module):
    """Integers with a scale per row: buffers, no parameters."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def values(self):
        return self.weight.to(self.scale.dtype) * self.scale

    def forward(self, x):
        return nn.functional.linear(x, self.values().to(x.dtype))


class FourBits(EightBits):
    """Two numbers in a byte, in a frozen parameter of another shape than the layer's weight."""

    def __init__(self, linear: nn.Linear):
        super().__init__(linear)
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 7
        whole = ((linear.weight.detach() / scale).round() + 8).to(torch.uint8).flatten()
        del self.weight
        self.weight = nn.Parameter((whole[::2] | whole[1::2] << 4).unsqueeze(1), requires_grad=False)
        self.scale = scale

    def values(self):
        whole = torch.stack([self.weight[:, 0] & 15, self.weight[:, 0] >> 4], 1).view(self.out_features, self.in_features)
        return (whole.to(self.scale.dtype) - 8) * self.scale


class Activations(EightBits):
    """Quantised inputs: the products of integers have no gradient."""

    def forward(self, x):
        with torch.no_grad():
            return super().forward(x)


class _Views(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors
        return (grad.view(-1, weight.shape[0]) @ weight).view(*grad.shape[:-1], -1), None


class Views(EightBits):
    """A backward for contiguous gradients."""

    def forward(self, x):
        return _Views.apply(x, self.values())


def quantised(net, kind, restored=False):
    """Every linear layer but the head quantised; or with the weights that these stand for."""
    for module in list(net.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and name != "lm_head":
                made = kind(child)
                if restored:
                    child.weight.data = made.values()
                else:
                    setattr(module, name, made)
    return net


@pytest.mark.parametrize("kind", [EightBits, FourBits])
@pytest.mark.parametrize("init", ["new", "from_attention"])
def test_a_model_with_quantised_projections(init, kind):
    """The memory's own parameters are trained in the model's dtype, and its projections are called as modules."""
    nets = []
    for restored in (False, True):
        net = quantised(plain("Llama", attention_bias=False), kind, restored)
        torch.manual_seed(1)
        nets.append(replace_attention(net, "yaad_linear", [0, 2], init=init, chunk_size=4))
    packed, full = nets
    assert_close(packed(input_ids=ids()).logits, full(input_ids=ids()).logits)
    memory = packed.model.layers[0].self_attn.memory
    assert isinstance(memory, MemoryBlock) and {p.dtype for p in memory.parameters()} == {torch.float32}
    for net in nets:
        net(input_ids=ids(), labels=ids()).loss.backward()
    expected = dict(full.named_parameters())
    for n, p in packed.named_parameters():
        if p.requires_grad:
            assert_close(p.grad, expected[n].grad)
    text = packed.eval().generate(ids(), max_new_tokens=4, do_sample=False)
    assert torch.equal(text, packed.generate(ids(), max_new_tokens=4, do_sample=False, use_cache=False))


def test_adapters_on_a_quantised_model():
    """LoRA on the layers that are not quantised, the memory in full."""
    net = replace_attention(quantised(plain("Llama"), FourBits), "yaad_linear", [0, 2], init="from_attention", chunk_size=4)
    adapted = peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["lm_head"], modules_to_save=["memory"]))
    optimizer, losses = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2), []
    for _ in range(6):
        losses.append(adapted(input_ids=ids(), labels=ids()).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.parametrize("kind", [Activations, Views])
def test_projections_that_pass_no_gradients_on(kind):
    net = quantised(plain("Llama"), kind)
    before = (type(net), net.config, dict(net.named_modules()))
    with pytest.raises(ValueError, match=rf"init: 'from_attention' .* q_proj of layer 1 \({kind.__name__} .*type Tensor\).*or init='new'"):
        replace_attention(net, "yaad_linear", [1], init="from_attention")
    assert before == (type(net), net.config, dict(net.named_modules()))
    replace_attention(net, "yaad_linear", [1])
    assert torch.isfinite(net(input_ids=ids()).logits).all()


# -------------------------------------------------------------------------------------- what loading must not quantise


@pytest.mark.parametrize("as_dict", [False, True])
def test_a_quantisation_leaves_memories_out(as_dict):
    """Also when the model is saved and loaded again: the memory's parameters are in the checkpoint as they are."""
    given = BitsAndBytesConfig(load_in_8bit=True)
    config = plain().config
    config.quantization_config = given.to_dict() if as_dict else given
    found = memory_config(config, "yaad_linear", [0]).quantization_config
    left_out = found["llm_int8_skip_modules"] if as_dict else found.llm_int8_skip_modules
    assert left_out == ["lm_head", "embed_out", "score", "classifier", "qa_outputs", r".*\.memory"]
    assert given.llm_int8_skip_modules is None  # that of other models
    twice = leave_out_memories(leave_out_memories({"quant_method": "x", "modules_to_not_convert": ["lm_head"]}))
    assert twice["modules_to_not_convert"] == ["lm_head", r".*\.memory"]


def test_transformers_reads_the_list_as_we_do():
    from transformers.quantizers.quantizers_utils import should_convert_module

    names = ["model.layers.0.self_attn.memory.g_proj", "model.layers.0.self_attn.memory.q_proj", "lm_head"]
    others = ["model.layers.0.self_attn.q_proj", "model.layers.11.mlp.down_proj"]
    left_out = leave_out_memories(BitsAndBytesConfig(load_in_8bit=True)).llm_int8_skip_modules
    assert [should_convert_module(name, left_out) for name in names + others] == [False] * 3 + [True] * 2


def test_quantisations_without_a_list_are_refused(tmp_path):
    config = plain().config
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(
        ValueError, match="quantization_config: memories are not quantised; .*modules_to_not_convert.* got quant_method, bits"
    ):
        memory_config(config, "yaad_linear", [0])
    plain().save_pretrained(tmp_path)
    config = memory_config(AutoConfig.from_pretrained(tmp_path), "yaad_linear", [0])
    with pytest.raises(ValueError, match="quantization_config: memories are not quantised"):
        MirasLlamaForCausalLM.from_pretrained(tmp_path, config=config, quantization_config=GPTQConfig(bits=4))
