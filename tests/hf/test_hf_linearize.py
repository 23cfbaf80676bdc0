"""hf.linearize: memories learn from attention, interruptions change nothing, hybrids, what is refused."""

from __future__ import annotations

import copy
import functools
import math
import shutil

import pytest
import tokenizers
import torch
import transformers
from hf_tiny import HOSTS, LAYERS, VOCAB, assert_close, ids, plain, unavailable
from torch.nn import functional as F

from miras_kernels.__main__ import main
from miras_kernels.hf import Finetune, MemoryAttention, Rank, Transfer, linearize, load, replace_attention
from quick import slow

DATA, HELD_OUT = ids(10), ids(4, seed=2)


def pair(architecture="Llama", layers=None, preset="yaad_linear", **options):
    """A teacher, and a copy of it with memories."""
    teacher = plain(architecture, **options)
    init = "new" if architecture.startswith("Deepseek") else "from_attention"
    torch.manual_seed(1)
    return teacher, replace_attention(copy.deepcopy(teacher), preset, layers, init=init, chunk_size=4, conv_width=2, gate_rank=4)


def states(net):
    return {name: x.clone() for name, x in net.state_dict().items()}


def same(left, right) -> bool:
    return left.keys() == right.keys() and all(torch.equal(x, right[name]) for name, x in left.items())


def error(teacher, model, i):
    """Layer i's squared error relative to the attention's outputs, for the teacher's hidden states, in a pass of its own."""
    layer, found = teacher.model.layers[i].self_attn, []
    hook = layer.register_forward_hook(lambda module, args, kwargs, out: found.append((kwargs, out[0])), with_kwargs=True)
    with torch.no_grad():
        teacher(input_ids=DATA)
        hook.remove()
        (kwargs, wanted), = found  # fmt: skip
        out, _ = model.model.layers[i].self_attn(kwargs["hidden_states"], kwargs["position_embeddings"])
    return ((out - wanted).square().sum() / wanted.square().sum()).item()


# ---------------------------------------------------------------------------------------------------- the stages


def test_transfer_teaches_each_memory_its_attention():
    """The loss is that of a pass of its own; it falls; the teacher, the other layers and the caller's random numbers do not change."""
    teacher, model = pair(layers=[0, 2])
    before, old, others = [error(teacher, model, i) for i in (0, 2)], states(teacher), states(model)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    done = linearize(model, teacher=teacher, data=DATA, stages=[Transfer(steps=25, lr=1e-2, batch_size=10)])
    assert torch.equal(torch.rand(3), expected) and same(states(teacher), old)
    losses = done.history[0]["losses"]
    assert len(losses) == 25 and done.history[0]["layers"] == [0, 2] and done.layers == (0, 2) and done.model is model
    for found, wanted in zip(losses[0], before, strict=True):
        assert abs(found - wanted) < 1e-4 * wanted
    for i, start in zip((0, 2), before, strict=True):
        assert error(teacher, model, i) < 0.5 * start
    changed = {name for name, x in model.state_dict().items() if not torch.equal(x, others[name])}
    assert changed and all(name.startswith(("model.layers.0.self_attn.", "model.layers.2.self_attn.")) for name in changed)
    assert {p.requires_grad for p in model.parameters()} == {True} and all(
        p.grad is None for p in [*model.parameters(), *teacher.parameters()]
    )


@pytest.mark.parametrize("loss", ["kl", "lm"])
def test_the_first_loss_of_finetuning(loss):
    teacher, model = pair(layers=[1])
    logits, wanted = (net(input_ids=DATA).logits[:, :-1].double().log_softmax(-1) for net in (model, teacher))
    if loss == "kl":
        expected = (wanted.exp() * (wanted - logits)).sum(-1).mean().item()
    else:
        expected = -logits.gather(-1, DATA[:, 1:, None]).mean().item()
    done = linearize(model, teacher=teacher, data=DATA, stages=[Finetune(steps=1, batch_size=10, loss=loss)])
    assert abs(done.history[0]["losses"][0] - expected) < 1e-5 * expected


@pytest.mark.parametrize("architecture", ["Llama", slow("GPT2")])  # Linear, and Conv1D with its matrices transposed
def test_low_rank_changes_are_in_the_matrices_at_the_end(architecture):
    teacher, model = pair(architecture, layers=[1])
    before = states(model)
    stage = Finetune(steps=8, lr=1e-2, batch_size=10, rank=2)
    done = linearize(model, teacher=teacher, data=DATA, held_out=DATA, stages=[stage])
    assert done.history[2]["losses"][-1] < done.history[2]["losses"][0]
    ranks = {}
    for name, module in model.named_modules():
        assert not module._forward_hooks
        weight = getattr(module, "weight", None)
        if weight is not None and weight.dim() == 2:
            change = (weight.detach() - before[f"{name}.weight"]).double()
            ranks[name] = 0 if not change.any() else int(torch.linalg.matrix_rank(change, rtol=1e-4))
    inside = {x for x in ranks if ".1.self_attn." in x or ".1.attn." in x}
    outside = {x for x in ranks if (".layers." in x or ".h." in x) and x not in inside}
    assert {ranks[x] for x in outside} == {2} and max(ranks[x] for x in inside) > 2
    assert {ranks[x] for x in ranks if x not in inside | outside} == {0}  # embeddings


def test_ranking_keeps_attention_where_it_is_missed_most(tmp_path):
    """The increase of each layer is the loss of the teacher with that memory alone; the worst have the teacher's attention again."""
    teacher, model = pair()
    expected = {}
    for i in range(LAYERS):
        alone = replace_attention(
            copy.deepcopy(teacher), "yaad_linear", [i], init="from_attention", chunk_size=4, conv_width=2, gate_rank=4
        )
        alone.model.layers[i].self_attn.load_state_dict(model.model.layers[i].self_attn.state_dict())
        nats = [F.cross_entropy(x(input_ids=HELD_OUT).logits[:, :-1].flatten(0, 1), HELD_OUT[:, 1:].flatten()) for x in (alone, teacher)]
        expected[i] = (nats[0] - nats[1]).item()
    done = linearize(model, teacher=teacher, data=DATA, held_out=HELD_OUT, stages=[Rank(keep=2)])
    increase, worst = done.history[-1]["increase"], sorted(expected, key=expected.get)[1:]
    assert all(abs(increase[str(i)] - x) < 1e-5 for i, x in expected.items())
    assert done.history[-1]["kept"] == sorted(worst) and set(done.layers) == set(range(LAYERS)) - set(worst)
    assert abs(done.history[-1]["held_out"] - done.history[0]["held_out"] - min(expected.values())) < 1e-5
    for i in worst:
        assert type(model.model.layers[i].self_attn) is type(teacher.model.layers[i].self_attn)
        assert model.model.layers[i].self_attn.q_proj.weight is not teacher.model.layers[i].self_attn.q_proj.weight
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert_close(again(input_ids=HELD_OUT).logits, model(input_ids=HELD_OUT).logits)
    assert torch.equal(*(x.generate(HELD_OUT[:1], max_new_tokens=5, do_sample=False) for x in (again, model)))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [x for x in HOSTS if x != "Gemma"])
def test_every_host(architecture, tmp_path):
    if unavailable(architecture):
        pytest.skip(unavailable(architecture))
    teacher, model = pair(architecture)
    stages = [Transfer(steps=12, lr=1e-2, batch_size=5), Rank(), Finetune(steps=3, batch_size=5, rank=2)]
    done = linearize(model, teacher=teacher, data=DATA, held_out=HELD_OUT, stages=stages)
    losses = torch.tensor(done.history[2]["losses"])
    assert losses[-4:].mean() < losses[:4].mean()
    assert all(math.isfinite(x["held_out"]) for x in done.history) and len(done.layers) == LAYERS - 1
    model.save_pretrained(tmp_path)
    assert_close(load(tmp_path)(input_ids=HELD_OUT).logits, model(input_ids=HELD_OUT).logits)


@pytest.mark.slow
def test_autocast():
    """The losses of float32, to the precision of bfloat16."""
    found = []
    for enabled in (False, True):
        teacher, model = pair(layers=[1])
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            done = linearize(model, teacher=teacher, data=DATA, stages=[Transfer(steps=2, batch_size=10), Finetune(steps=2, batch_size=10)])
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        found.append([x["losses"][0] for x in done.history])
    (transfer, finetune), (rounded, last) = found
    assert 0 < abs(rounded[0] - transfer[0]) < 0.1 * transfer[0] and abs(last - finetune) < 0.1 * finetune


# ---------------------------------------------------------------------------------------------------- interruptions


class Interrupted:
    """Rows of which the n-th batch cannot be read."""

    def __init__(self, reads):
        self.reads = reads

    def __len__(self):
        return len(DATA)

    def __getitem__(self, i):
        self.reads -= 1
        if self.reads < 0:
            raise OSError("the disk is gone")
        return {"input_ids": DATA[i].tolist()}


@pytest.mark.parametrize(
    "reads", [slow(2), slow(6), slow(8), 17, slow(24)]
)  # at the start, before and at a checkpoint, after one, in the last step
def test_an_interrupted_run_ends_as_an_uninterrupted_one(reads, tmp_path):
    """GPT-2, whose dropout is random. A row is read to check it, then 2 a step: 8 in the first stage, 16 in the last."""
    options = dict(architecture="GPT2", layers=[0, 2], resid_pdrop=0.1)
    stages = [Transfer(steps=4, lr=1e-2, batch_size=2), Rank(), Finetune(steps=8, lr=1e-2, batch_size=2, rank=2)]
    settings = dict(held_out=HELD_OUT, stages=stages, save_every=3)
    teacher, whole = pair(**options)
    expected = linearize(whole, teacher=teacher, data=DATA, **settings)
    _, model = pair(**options)
    with pytest.raises(OSError, match="the disk is gone"):
        linearize(model, teacher=teacher, data=Interrupted(reads), folder=tmp_path / "a", **settings)
    assert all(not x._forward_hooks for net in (model, teacher) for x in net.modules()) and all(p.requires_grad for p in model.parameters())
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    _, fresh = pair(**options)
    for folder, net in {"a": fresh, "b": model}.items():  # a new model, and the one that is there
        done = linearize(net, teacher=teacher, data=DATA, folder=tmp_path / folder, **settings)
        assert done.history == expected.history and done.layers == expected.layers
        assert same(states(net), states(whole))
    assert not list(tmp_path.glob("*/*.new"))
    _, last = pair(**options)
    assert same(states(linearize(last, teacher=teacher, data=Interrupted(1), folder=tmp_path / "a", **settings).model), states(whole))


def test_a_loss_that_is_not_finite(tmp_path):
    """The model is that of the step before, the checkpoint the last good one."""
    teacher, model = pair(layers=[1])
    stages = [Transfer(steps=5, batch_size=2)]
    calls, attention = [], teacher.model.layers[1].self_attn

    def spoil(module, args, out):
        calls.append(states(model))
        return (out[0] * (math.nan if len(calls) == 4 else 1), *out[1:])

    hook = attention.register_forward_hook(spoil)
    with pytest.raises(FloatingPointError, match=r"transfer: expected a finite loss and gradient, got nan .*\(layer 1, step 3 of 5\)"):
        linearize(model, teacher=teacher, data=DATA, stages=stages, folder=tmp_path, save_every=2)
    hook.remove()
    assert same(states(model), calls[3]) and all(torch.isfinite(x).all() for x in model.state_dict().values())
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert saved["step"] == 2 and same(saved["model"], calls[2])


# ---------------------------------------------------------------------------------------------------- what is refused


REFUSED = {
    "no memory": (lambda t, m: dict(model=plain(seed=3)), ValueError, "model: expected memories in place of attention"),
    "beside attention": (
        lambda t, m: dict(model=replace_attention(plain(), mode="parallel")), ValueError, "model: expected memories in place of attention"),
    "unknown host": (
        lambda t, m: dict(teacher=transformers.BertLMHeadModel(transformers.BertConfig(hidden_size=24, num_attention_heads=4,
                                                                                       num_hidden_layers=1, vocab_size=VOCAB))),
        TypeError, "teacher: expected one built on LlamaModel"),
    "no head": (lambda t, m: dict(model=m.model), TypeError, "model: expected a causal language model"),
    "no model": (lambda t, m: dict(model="llama"), TypeError, "model: expected a transformers model"),
    "hidden size": (lambda t, m: dict(teacher=plain(hidden_size=32)), ValueError, "teacher: expected hidden_size = 24, .*, got 32"),
    "vocabulary": (lambda t, m: dict(teacher=plain(vocab_size=60)), ValueError, "teacher: expected vocab_size = 50"),
    "layers": (lambda t, m: dict(teacher=plain(num_hidden_layers=2)), ValueError, "teacher: expected num_hidden_layers = 3"),
    "other host": (lambda t, m: dict(teacher=plain("Qwen2")), TypeError, "teacher: expected the architecture of the model"),
    "no teacher": (lambda t, m: dict(teacher=None), ValueError, "teacher: stage 'transfer' needs one"),
    "no attention left": (lambda t, m: dict(teacher=pair()[1]), ValueError, "teacher: expected attention in layer 0"),
    "the same": (lambda t, m: dict(teacher=m), ValueError, "teacher: expected attention in layer 0"),
    "misspelt": (lambda t, m: dict(stages=["transfer", "fintune"]), ValueError, "stages: expected 'transfer', .*, got 'fintune'"),
    "one string": (lambda t, m: dict(stages="transfer"), TypeError, "stages: expected a sequence of"),
    "none": (lambda t, m: dict(stages=[]), ValueError, "stages: expected at least one"),
    "a number": (lambda t, m: dict(stages=[3]), TypeError, "stages: expected names, Transfer, Rank or Finetune, got 3"),
    "not held out": (lambda t, m: dict(stages=["rank"]), ValueError, "held_out: stage 'rank' measures"),
    "all kept": (lambda t, m: dict(stages=[Rank(keep=3)], held_out=DATA), ValueError, "rank: keep: expected less than 3"),
    "no rows": (lambda t, m: dict(data=DATA[:0]), ValueError, "data: expected rows of token ids, got none"),
    "empty rows": (lambda t, m: dict(data=DATA[:, :0]), ValueError, "data: expected rows of at least 2 tokens, got 0"),
    "no data": (lambda t, m: dict(data=None), TypeError, "data: expected token ids"),
    "text": (lambda t, m: dict(data=["some text"]), TypeError, "data: expected rows of token ids or with 'input_ids', got str"),
    "floats": (lambda t, m: dict(data=DATA.float()), TypeError, "data: expected rows of integers"),
    "three dimensions": (lambda t, m: dict(data=DATA[None]), ValueError, r"data: expected token ids \[N, T\], got shape"),
    "other vocabulary": (lambda t, m: dict(held_out=DATA + VOCAB), ValueError, "held_out: expected token ids from 0 to 49"),
    "save_every": (lambda t, m: dict(save_every=0), ValueError, "save_every: expected an integer >= 1"),
}  # fmt: skip


@pytest.fixture(scope="module")
def net():
    return pair()


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_named_before_anything_is_changed(name, net):
    teacher, model = net
    before = states(teacher), states(model)
    changes, kind, text = REFUSED[name]
    arguments = dict(teacher=teacher, data=DATA) | changes(teacher, model)
    with pytest.raises(kind, match=text):
        linearize(arguments.pop("model", model), **arguments)
    assert same(states(teacher), before[0]) and same(states(model), before[1])


@pytest.mark.parametrize(
    ("part", "stage"), [("self_attn.o_proj", Transfer()), ("mlp.up_proj", Finetune()), ("mlp.up_proj", Finetune(rank=None))]
)
def test_quantised_matrices_are_refused_where_they_would_change(part, stage):
    teacher, model = pair(layers=[1])
    projection = model.model.layers[1].get_submodule(part)
    projection.weight = torch.nn.Parameter(projection.weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=rf"model: expected floating-point parameters .* torch.int8 \(.*{part.split('.')[1]}"):
        linearize(model, teacher=teacher, data=DATA, stages=[stage])


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (functools.partial(Transfer, steps=0), "transfer: steps: expected an integer >= 1, got 0"),
        (functools.partial(Transfer, lr=math.nan), "transfer: lr: expected a number > 0, got nan"),
        (functools.partial(Rank, keep=True), "rank: keep: expected an integer >= 1, got True"),
        (functools.partial(Finetune, loss="mse"), "finetune: loss: expected one of 'kl', 'lm', got 'mse'"),
        (functools.partial(Finetune, rank=0), "finetune: rank: expected an integer >= 1 or None, got 0"),
    ],
)
def test_settings_of_stages(make, text):
    with pytest.raises(ValueError, match=text):
        make()


def test_refused_rows_shared_parameters_and_folders(tmp_path):
    teacher, model = pair(layers=[1])
    stages = [Transfer(steps=1, batch_size=2)]
    with pytest.raises(ValueError, match="data: expected 13 tokens in every row"):
        linearize(model, teacher=teacher, data=[DATA[0].tolist(), DATA[1].tolist()[:9]], stages=stages)
    linearize(model, teacher=teacher, data=DATA, stages=stages, folder=tmp_path)
    before = states(model)
    with pytest.raises(ValueError, match="belongs to another run, with seed = 0"):
        linearize(model, teacher=teacher, data=DATA, stages=stages, folder=tmp_path, seed=1)
    (tmp_path / "checkpoint.pt").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="folder: expected a checkpoint of linearize in"):
        linearize(model, teacher=teacher, data=DATA, stages=stages, folder=tmp_path)
    model.model.layers[0].mlp = teacher.model.layers[0].mlp
    with pytest.raises(ValueError, match="teacher: expected parameters of its own"):
        linearize(model, teacher=teacher, data=DATA, stages=stages)
    assert before.keys() == states(model).keys()


# ---------------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model of bytes, its tokenizer, and a text."""
    path = tmp_path_factory.mktemp("bytes")
    plain(vocab_size=256).save_pretrained(path)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({x: i for i, x in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(path)
    (path / "text.txt").write_text("the memory reads the text. " * 40)
    return path


@pytest.mark.slow
def test_the_command(folder, tmp_path, capsys):
    command = ["linearize", str(folder), "--text", str(folder / "text.txt"), "--out", str(tmp_path), "--length", "16", "--transfer", "4",
               "--finetune", "3", "--keep", "1", "--batch", "4", "--held-out", "0.1", "--save-every", "2"]  # fmt: skip
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines()[1:6]] == ["teacher", "replaced", "transfer", "rank", "finetune"]
    model = load(tmp_path)
    layers = [i for i, layer in enumerate(model.model.layers) if isinstance(layer.self_attn, MemoryAttention)]
    assert len(layers) == LAYERS - 1 and f"memories in layers {layers[0]}, {layers[1]}; saved in {tmp_path}" in printed
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert model.generate(**tokenizer("the memory", return_tensors="pt"), max_new_tokens=3).shape == (1, 13)
    assert main(command) == 0  # there is nothing left to do
    assert capsys.readouterr().out == printed
    assert main([*command, "--seed", "1"]) == 2
    assert "folder: " in (message := capsys.readouterr().err) and "belongs to another run" in message


@pytest.mark.slow
def test_the_command_names_what_is_wrong(folder, tmp_path, capsys):
    start = ["linearize", str(folder), "--out", str(tmp_path), "--text"]
    for arguments, text in (
        ([str(folder / "text.txt"), "--length", "900"], "--text: expected at least 2 rows of 900 tokens"),
        ([str(folder / "text.txt"), "--length", "16", "--keep", "3"], "rank: keep: expected less than 3"),
        ([str(folder / "text.txt"), "--length", "16", "--transfer", "0", "--finetune", "0"], "stages: expected at least one"),
        ([str(folder / "missing.txt")], "missing.txt"),
    ):
        assert main([*start, *arguments]) == 2
        assert text in capsys.readouterr().err
