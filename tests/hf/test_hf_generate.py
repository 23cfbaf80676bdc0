"""Generation with memories: every way of reading a text gives the results of reading it at once."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import transformers
from hf_tiny import ARCHITECTURES, CACHE, LENGTH, ROWS, VOCAB, assert_close, cache_of, ids, model, plain
from transformers import DynamicCache, QuantizedCache

from miras_kernels.hf import MemoryAttention, MemoryCacheLayer

#: presets with every kind of state: linear and MLP, momentum, another mirror map, chunk_size 1, no dependence on chunk_size
PRESETS = ("yaad_linear", "deltanet", "mamba2", "titans", "moneta", "yaad")
MASK = torch.tensor(ROWS["left"])


def net(architecture="Llama", layers=None, **options):
    return model(architecture, layers, **options).eval()


def predicted(text: torch.Tensor, of) -> torch.Tensor:
    """The next tokens that one forward over each row of ``text`` predicts."""
    return of(input_ids=text, use_cache=False).logits.argmax(-1)


@pytest.mark.parametrize(("layers", "init"), [(None, "new"), ([1, 2], "from_attention")])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_generation_follows_the_full_forward_with_and_without_padding(architecture, layers, init):
    of = net(architecture, layers, init=init)
    text = of.generate(ids(), max_new_tokens=7, do_sample=False)
    assert torch.equal(predicted(text, of)[:, LENGTH - 1 : -1], text[:, LENGTH:])
    padded = of.generate(ids(), attention_mask=MASK, max_new_tokens=7, do_sample=False)
    for row, mask in enumerate(MASK):
        alone = of.generate(ids()[row : row + 1, mask == 1], max_new_tokens=7, do_sample=False)
        assert torch.equal(padded[row, LENGTH:], alone[0, -7:])


@pytest.mark.parametrize(("layers", "init"), [(None, "new"), ([0, 2], "from_attention")])
@pytest.mark.parametrize("preset", PRESETS)
def test_generation_with_every_kind_of_memory(preset, layers, init):
    of = net("Qwen2", layers, preset=preset, init=init)
    for mask in (None, MASK):
        cached = of.generate(
            ids(), attention_mask=mask, max_new_tokens=7, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        whole = of.generate(
            ids(), attention_mask=mask, max_new_tokens=7, do_sample=False, output_logits=True, return_dict_in_generate=True, use_cache=False
        )
        assert torch.equal(cached.sequences, whole.sequences)
        assert_close(torch.stack(cached.logits), torch.stack(whole.logits))


@pytest.mark.parametrize("init", ["new", "from_attention"])
@pytest.mark.parametrize("preset", PRESETS)
def test_padding_of_any_length_does_not_change_the_state(preset, init):
    """Padding that is no multiple of the chunk size, in a batch and in a batch of one; projections with biases."""
    of = net("Qwen2", [0, 2], preset=preset, init=init)
    logits = of(input_ids=ids(), attention_mask=MASK).logits
    for row, mask in enumerate(MASK):
        text, real = ids()[row : row + 1], mask == 1
        expected = of(input_ids=text[:, real]).logits[0]
        assert_close(logits[row, real], expected)
        assert_close(of(input_ids=text, attention_mask=mask[None]).logits[0, real], expected)
        options = dict(max_new_tokens=6, do_sample=False)
        padded, alone = of.generate(text, attention_mask=mask[None], **options), of.generate(text[:, real], **options)
        assert torch.equal(padded[:, -6:], alone[:, -6:])


@pytest.mark.parametrize("layers", [None, [1]])
@pytest.mark.parametrize(
    "how",
    [
        dict(num_beams=3, num_return_sequences=2),
        dict(num_beams=2, do_sample=True),
        dict(do_sample=True, num_return_sequences=3, temperature=0.7, top_k=10),
        dict(repetition_penalty=1.3, no_repeat_ngram_size=2),
    ],
)
def test_beams_and_samples_do_not_depend_on_the_cache(layers, how):
    of = net("Llama", layers)
    for mask in (None, MASK):
        texts = []
        for use_cache in (True, False):
            torch.manual_seed(5)
            texts.append(of.generate(ids(), attention_mask=mask, max_new_tokens=6, use_cache=use_cache, **how))
        assert torch.equal(*texts)


@pytest.mark.parametrize("size", [1, 3, 5])
@pytest.mark.parametrize("layers", [None, [1]])
def test_chunked_prefill(layers, size):
    of = net("Mistral", layers, init="from_attention")
    for mask in (None, MASK):
        options = dict(attention_mask=mask, max_new_tokens=6, do_sample=False)
        assert torch.equal(of.generate(ids(), **options, prefill_chunk_size=size), of.generate(ids(), **options))


@pytest.mark.parametrize(("layers", "init"), [(None, "from_attention"), ([0], "new")])
@pytest.mark.parametrize("pieces", [(1,) * LENGTH, (4, 9), (5, 0, 7, 1), (3, 3, 3, 4)])
def test_prefill_in_pieces(pieces, layers, init):
    of, cache, logits = net("Qwen3", layers, init=init), DynamicCache(), []
    for piece in ids().split([n for n in pieces if n], 1):
        out = of(input_ids=piece, **{CACHE: cache})
        assert cache_of(out) is cache
        logits.append(out.logits)
    assert cache.get_seq_length() == LENGTH
    assert_close(torch.cat(logits, 1), of(input_ids=ids()).logits)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("architecture", ["Llama", "Qwen2", "Gemma3"])
def test_several_turns_with_padding(architecture, rows):
    """Three turns, in one of which a row may have no tokens; then decoding steps without padding."""
    first, text = torch.tensor(ROWS[rows]), ids(2, LENGTH + 8)
    mask = torch.cat([first, torch.tensor([[0] * 5, [1] * 2 + [0] * 3]), torch.ones(2, 3, dtype=torch.int64)], 1)
    for init in ("new", "from_attention"):
        wide = {"sliding_window": 64} if architecture == "Gemma3" else {}  # the remaining attention counts padding in its window
        of, cache, logits = net(architecture, [0, 1], init=init, **wide), DynamicCache(), []
        cuts = [0, 3, LENGTH, LENGTH + 5, LENGTH + 6, LENGTH + 7, LENGTH + 8]
        for begin, end in itertools.pairwise(cuts):
            logits.append(of(input_ids=text[:, begin:end], attention_mask=mask[:, :end], **{CACHE: cache}).logits)
        logits = torch.cat(logits, 1)
        for row in range(2):
            real = mask[row] == 1
            assert_close(logits[row, real], of(input_ids=text[row : row + 1, real]).logits[0])


@pytest.mark.parametrize("preset", ["yaad_linear", "titans"])
def test_the_state_is_that_of_the_real_tokens(preset):
    of = net("Qwen2", [1], preset=preset)
    for rows in ROWS.values():
        mask = torch.tensor(rows)
        state = cache_of(of(input_ids=ids(), attention_mask=mask, use_cache=True)).layers[1].state
        other = torch.where(mask == 1, ids(), ids(seed=2))
        same = cache_of(of(input_ids=other, attention_mask=mask, use_cache=True)).layers[1].state
        for row in range(2):
            real = ids()[row : row + 1, mask[row] == 1]
            alone = cache_of(of(input_ids=real, use_cache=True)).layers[1].state
            for a, b, c in zip(state.memory.matrices(), alone.memory.matrices(), same.memory.matrices(), strict=True):
                assert_close(a[row : row + 1], b)
                assert torch.equal(a, c)
            assert_close(state.conv[row : row + 1], alone.conv)


def test_generate_continues_from_a_cache():
    of = net("Llama", [0, 2])
    first = of.generate(ids(), max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    longer = torch.cat([first.sequences, ids(2, 4, seed=7)], 1)
    options = dict(
        attention_mask=torch.ones_like(longer), max_new_tokens=5, do_sample=False
    )  # a generated token may equal the padding token
    second = of.generate(longer, **{CACHE: cache_of(first)}, **options)
    assert torch.equal(second, of.generate(longer, **options))


def test_embeddings_and_pipelines():
    of = net()
    text = of.generate(ids(), max_new_tokens=5, do_sample=False)
    embedded = of.generate(inputs_embeds=of.get_input_embeddings()(ids()), max_new_tokens=5, do_sample=False)
    assert torch.equal(embedded, text[:, LENGTH:])

    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", padding_side="left")
    pipeline = transformers.pipeline("text-generation", model=of, tokenizer=tokenizer)
    prompts = ["w3 w4 w5 w6 w7", "w9 w8"]
    options = dict(max_new_tokens=5, do_sample=False, return_full_text=False)
    together = pipeline(prompts, batch_size=2, **options)
    alone = [pipeline(prompt, **options) for prompt in prompts]
    assert together == alone and together[0][0]["generated_text"]


# ------------------------------------------------------------------------------------------------------------- the cache


def test_the_state_is_in_the_models_cache_and_does_not_grow():
    of, sizes = net(layers=[0, 2], preset="yaad"), []
    for length in (2, 7, 30):
        cache = cache_of(of(input_ids=ids(1, length), use_cache=True))
        assert isinstance(cache, DynamicCache)
        assert [isinstance(layer, MemoryCacheLayer) for layer in cache.layers] == [True, False, True]
        assert cache.get_seq_length() == cache.get_seq_length(1) == length
        sizes.append((cache.layers[0].nbytes, cache.layers[1].keys.nbytes))
    assert len({state for state, _ in sizes}) == 1 and sizes[0][1] < sizes[1][1] < sizes[2][1]


@pytest.mark.parametrize("preset", ["yaad_linear", "titans"])
def test_the_state_is_in_float32(preset):
    half = net(dtype=torch.bfloat16, preset=preset)
    full = net(preset=preset)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = cache_of(full(input_ids=ids(), use_cache=True))
    for cache in (cache_of(half(input_ids=ids(), use_cache=True)), cast):
        assert {x.dtype for layer in cache.layers for x in layer.state.memory.tensors()} == {torch.float32}
    text = half.generate(ids(), max_new_tokens=5, do_sample=False)
    assert text.shape == (2, LENGTH + 5)


@torch.no_grad()
def test_operations_on_a_cache():
    of, turn = net("Llama", [0, 1]), ids(2, 4, seed=3)
    read = lambda text: cache_of(of(input_ids=text, use_cache=True))
    after = lambda cache, text: of(input_ids=text, **{CACHE: cache}).logits
    expected, other = after(read(ids()), turn), read(ids())
    kept = copy.deepcopy(other)
    assert other.layers[0].batch_size == 2
    other.reorder_cache(torch.tensor([1, 0]))
    assert_close(after(other, turn.flip(0)).flip(0), expected)
    assert_close(after(kept, turn), expected)  # it was not written in place
    other = read(ids())
    other.batch_repeat_interleave(3)
    assert_close(after(other, turn.repeat_interleave(3, 0)), expected.repeat_interleave(3, 0))
    other.batch_select_indices(torch.tensor([3, 0]))
    assert other.layers[1].batch_size == 2 and other.get_seq_length() == LENGTH + 4
    other = read(ids(seed=9))
    for layer in other.layers[:2]:
        layer.offload()
        layer.prefetch()
        layer.reset()
        assert (layer.get_seq_length(), layer.nbytes) == (0, 0) and not hasattr(layer, "batch_size")
    with pytest.raises(ValueError, match="crop: a memory takes back tokens only if it has kept them"):
        read(ids()).crop(-1)
    with pytest.raises(NotImplementedError, match="has no keys and values"):
        read(ids()).layers[0].update(turn, turn)


def test_a_state_is_not_written_in_place():
    of = net()
    cache = cache_of(of(input_ids=ids(), use_cache=True))
    state, copies = cache.layers[0].state, [x.clone() for x in cache.layers[0].state.memory.tensors()]
    of(input_ids=ids(2, 6), **{CACHE: cache})
    assert cache.layers[0].state is not state
    assert all(torch.equal(x, y) for x, y in zip(state.memory.tensors(), copies, strict=True))


def test_no_cache_in_training_by_default():
    of = net()
    assert cache_of(of(input_ids=ids())) is not None
    assert cache_of(of(input_ids=ids(), use_cache=False)) is None
    of.train()
    assert cache_of(of(input_ids=ids())) is None
    asked = of(input_ids=ids(), use_cache=True)
    assert_close(asked.logits, of(input_ids=ids()).logits)
    assert cache_of(asked).get_seq_length() == LENGTH


# ----------------------------------------------------------------------------------------------------------- refusals


def foreign():
    cache = cache_of(plain().eval()(input_ids=ids(), use_cache=True))
    return net(layers=[1])(input_ids=ids(2, 1), **{CACHE: cache})


def read():
    return cache_of(net()(input_ids=ids(), use_cache=True))


def packed(**options):
    return net()(input_ids=ids(), position_ids=torch.arange(LENGTH)[None] % 5, **options)


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (lambda: net()(input_ids=ids(), **{CACHE: ((ids(), ids()),)}), TypeError, "got the object tuple"),
        (
            lambda: net(layers=[1]).model.layers[1].self_attn(torch.randn(1, 3, 24), **{CACHE: object()}),
            TypeError,
            f"{CACHE}: .*got the object object",
        ),
        (lambda: net().generate_batch([[1, 2]]), NotImplementedError, "generate_batch: .*no continuous batching"),
        (lambda: net().init_continuous_batching(), NotImplementedError, "no continuous batching"),
        (lambda: net()(input_ids=ids(), cache=object()), TypeError, "cache: .*no continuous batching; got the object object"),
        (foreign, ValueError, f"{CACHE}: layer 1 .*expected its state or an empty cache, got keys and values for 13 tokens"),
        (lambda: packed(**{CACHE: DynamicCache()}), ValueError, "use_cache: packed documents leave no state"),
        (lambda: packed(use_cache=True), ValueError, "use_cache: packed documents leave no state"),
        (
            lambda: net()(input_ids=ids(2, 1), attention_mask=torch.ones(2, 1), **{CACHE: read()}),
            ValueError,
            r"attention_mask: expected \[B, T\] with T = 14 \(13 in the cache and 1 new ones\), got \(2, 1\)",
        ),
        (lambda: net()(input_ids=ids(3, 1), **{CACHE: read()}), ValueError, "initial_state"),
    ],
)  # fmt: skip
def test_unsupported_calls_are_refused(call, kind, text):
    with pytest.raises(kind, match=text):
        call()


def test_packed_documents_leave_no_cache():
    assert cache_of(packed()) is None


def test_quantized_caches_are_refused():
    if transformers.utils.is_optimum_quanto_available() or transformers.utils.is_hqq_available():
        with pytest.raises(TypeError, match="needs a DynamicCache"):
            net()(input_ids=ids(), **{CACHE: QuantizedCache("quanto", plain().config)})
    assert not issubclass(QuantizedCache, DynamicCache)


def test_replaced_layers_are_memories():
    assert sum(isinstance(m, MemoryAttention) for m in net("Gemma2", [1]).modules()) == 1
