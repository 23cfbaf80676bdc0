"""Watch a small byte-level Llama learn English twice: with its own attention, and with a Miras memory in its place.

    python examples/demo.py [--preset yaad] [--steps 200] [--seconds 180] [--seed 0] [--out examples/out]

The text is Python's own help pages (``pydoc_data.topics``). Both models see the same batches in the same order, step by step
in turn, with the same optimiser. At the end: a table, a picture with both learning curves, and what each model writes, byte by byte. Every
number is measured here.
"""

from __future__ import annotations

import argparse
import math
import os
import pydoc_data.topics
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

BEGAN = time.perf_counter()
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads do not spin: much faster where others use the cores too

import torch
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

import miras_kernels
from miras_kernels.backends.reference import chunkwise
from miras_kernels.hf import replace_attention
from miras_kernels.hf.compat import CACHE
from miras_kernels.layers import PRESETS
from miras_kernels.testing import Case, Report, check

PRESET = "yaad"  # the memory; "yaad_linear" trains faster where MLP memories have no fused kernels
LENGTH, BATCH = 256, 16  # bytes per sequence, sequences per step
LAYERS, HEADS, HEAD_DIM, INTERMEDIATE = 3, 3, 32, 256
LEARNING_RATE, WARMUP = 8e-3, 20
PROMPT, WRITTEN = 100, 150  # bytes of the continuation that the demo ends with
SPEED = dict(batch=4, tokens=256, heads=4, key_dim=64, value_dim=64, chunk_size=64)
REPORT_EVERY = 10.0  # seconds between two lines about training, where no terminal shows a bar


def load_text() -> tuple[torch.Tensor, torch.Tensor]:
    """Training and validation bytes: every paragraph once (pages repeat each other a lot), every eighth page held out."""
    pages, seen = [], set()
    for name in sorted(pydoc_data.topics.topics):
        paragraphs = {words(p): p for p in pydoc_data.topics.topics[name].split("\n\n") if words(p) not in seen}
        seen.update(paragraphs)
        pages.append("\n\n".join(paragraphs.values()).strip())
    train = "\n\n".join(page for i, page in enumerate(pages) if i % 8 != 7)
    held_out = [p for i, page in enumerate(pages) if i % 8 == 7 for p in page.split("\n\n")]
    known = words(train)
    kept = [p for p in held_out if words(p) not in known]
    valid = "\n\n".join(kept)
    assert len(kept) > 0 and not any(words(p) in known for p in valid.split("\n\n")), "validation text found in the training text"
    print(f"text: {len(train.encode()):,} bytes for training, {len(valid.encode()):,} for validation, no paragraph of it in training")
    return tuple(torch.tensor(list(text.encode())) for text in (train, valid))


def words(text: str) -> str:
    """The text, however it is broken into lines."""
    return " ".join(text.split())


def batches(text: torch.Tensor, steps: int, seed: int) -> torch.Tensor:
    """``[steps, BATCH, LENGTH]`` random places in the text: drawn once, used by both models."""
    starts = torch.randint(len(text) - LENGTH + 1, (steps, BATCH, 1), generator=torch.Generator().manual_seed(seed))
    return text[starts + torch.arange(LENGTH)]


def unigram_bits(train: torch.Tensor, valid: torch.Tensor) -> float:
    """Bits per byte of a model that knows only how frequent each byte is in the training text."""
    counts = torch.bincount(train, minlength=256).double() + 1
    return -(counts / counts.sum()).log2()[valid].mean().item()


# ---------------------------------------------------------------------------------------------------------- the models


class Contender:
    """A model with its optimiser, its clock and its learning curve."""

    def __init__(self, name: str, seed: int, preset: str | None):
        torch.manual_seed(seed)
        width = HEADS * HEAD_DIM
        config = LlamaConfig(
            vocab_size=256, hidden_size=width, intermediate_size=INTERMEDIATE, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
            max_position_embeddings=LENGTH, tie_word_embeddings=True, initializer_range=width**-0.5,
            bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        self.name, self.model = name, LlamaForCausalLM(config)
        if preset is not None:
            replace_attention(self.model, preset)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95))
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self.seconds, self.steps, self.curve = 0.0, 0, []

    def step(self, ids: torch.Tensor, rate: float) -> float:
        began = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = self.model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        loss = loss.item() / math.log(2)
        self.seconds += time.perf_counter() - began
        self.steps += 1
        return loss

    @torch.no_grad()
    def bits_per_byte(self, text: torch.Tensor) -> float:
        """Over the text in windows that overlap by one byte: every byte but the first (and a short tail) is predicted once."""
        windows, bits = text.unfold(0, LENGTH, LENGTH - 1), 0.0
        self.model.eval()
        for ids in windows.split(2 * BATCH):
            logits = self.model(input_ids=ids).logits[:, :-1]
            bits += torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
        self.model.train()
        return bits / math.log(2) / windows[:, 1:].numel()


def train(contenders: list[Contender], data: torch.Tensor, valid: torch.Tensor, seconds: float) -> None:
    """Train both in turn on the same batches, until these are used up or the time is; the learning rate falls with whichever is nearer."""
    began, steps = time.perf_counter(), len(data)
    some = valid[: 32 * (LENGTH - 1) + 1]
    terminal, reported = sys.stdout.isatty(), began
    with tqdm(total=steps, desc="training", unit="step", mininterval=0.5, file=sys.stdout, disable=not terminal) as bar:
        for i, ids in enumerate(data):
            used = max(i / steps, (time.perf_counter() - began) / seconds)
            if used >= 1:
                break
            if i % max(1, steps // 12) == 0:
                for c in contenders:
                    c.curve.append((i, c.bits_per_byte(some)))
            rate = LEARNING_RATE * min((i + 1) / WARMUP, 0.1 + 0.45 * (1 + math.cos(math.pi * used)))
            losses = ", ".join([f"{c.name} {c.step(ids, rate):.2f}" for c in contenders]) + " bits/byte"
            bar.set_postfix_str(losses, refresh=False)
            bar.update()
            if not terminal and time.perf_counter() - reported >= REPORT_EVERY:
                reported = time.perf_counter()
                print(f"training: step {i + 1} of {steps}, {losses}", flush=True)
    for c in contenders:
        c.curve += [(c.steps, c.bits_per_byte(some)), (c.steps, c.bits_per_byte(valid))]


# ---------------------------------------------------------------------------------------------------------- generation


class Continuation(NamedTuple):
    """What a model wrote after a prompt, byte by byte, and what it had to remember for that."""

    text: str
    rate: float  # bytes per second
    remembered: tuple[int, int]  # bytes of its cache after the prompt, and at the end


def generate(contender: Contender, prompt: torch.Tensor, count: int, seed: int) -> Continuation:
    """Sample ``count`` bytes, one at a time, from the state that the cache carries."""
    model = contender.model.eval()
    with torch.no_grad():
        before = remembered(model(prompt[None], use_cache=True)[CACHE])
        cache = model(prompt[None, :-1], use_cache=True)[CACHE]  # generate() reads the prompt's last byte
        torch.manual_seed(seed)
        began = time.perf_counter()
        ids = model.generate(
            prompt[None], **{CACHE: cache}, max_new_tokens=count, do_sample=True, temperature=0.7, pad_token_id=0,
            return_dict_in_generate=True,
        )  # fmt: skip
        rate = count / (time.perf_counter() - began)
    model.train()
    text = bytes(ids.sequences[0, len(prompt) :].tolist()).decode(errors="replace")
    return Continuation(text, rate, (before, remembered(ids[CACHE])))


def remembered(cache) -> int:
    """Bytes of a cache: the state of memories, or keys and values."""
    sizes = (layer.nbytes if hasattr(layer, "nbytes") else layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    return sum(sizes)


def show(contenders: list[Contender], prompt: torch.Tensor, count: int, seed: int) -> str:
    """What each contender makes of a prompt."""
    found = [generate(c, prompt, count, seed) for c in contenders]
    lines = ["", table([
        [f"{count} bytes after a prompt of {len(prompt)}", *(c.name for c in contenders)],
        ["generated, bytes per second", *(f"{x.rate:,.0f}" for x in found)],
        ["remembered after the prompt, bytes", *(f"{x.remembered[0]:,}" for x in found)],
        ["remembered at the end, bytes", *(f"{x.remembered[1]:,}" for x in found)],
    ]), f"The prompt: {bytes(prompt.tolist()).decode(errors='replace')!r}"]  # fmt: skip
    return "\n".join(lines + [f"{c.name} goes on: {x.text!r}" for c, x in zip(contenders, found, strict=True)])


# ---------------------------------------------------------------------------------------------------------- the kernel


def kernel_case(preset: str, **shape: int) -> Case:
    """A call of the memory with this preset's rule."""
    row = PRESETS[preset]
    if row.memory == "mlp":
        shape |= {"hidden": row.expansion * shape["key_dim"], "initial": "shared"}
    else:
        shape |= {"initial": "none"}
    decay = "none" if row.decay is None else "scalar"
    return Case("demo", memory=row.memory, bias=row.bias, retention=row.retention, decay=decay, **shape)


def speed(preset: str) -> dict[str, float]:
    """CPU seconds of forward and backward on one thread: the kernel and PyTorch's own operators, interleaved, medians."""
    inputs = kernel_case(preset, **SPEED).draw(torch.float32)
    leaves = tuple(inputs.leaves().values())
    arguments = inputs.arguments() | {"output_final_state": False}
    call = inputs.call().replace(output_final_state=False)
    memory = miras_kernels.mlp_memory if call.memory.name == "mlp" else miras_kernels.linear_memory
    contenders = {"kernel": lambda: memory(**arguments)[0], "eager": lambda: chunkwise.run(call)[0]}
    threads, times = torch.get_num_threads(), {name: [] for name in contenders}
    torch.set_num_threads(1)
    for _ in range(6):
        for name, run in contenders.items():
            began = time.process_time()
            torch.autograd.grad(run(), leaves, inputs.grad_out)
            times[name].append(time.process_time() - began)
    torch.set_num_threads(threads)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def table(rows: list[list[str]]) -> str:
    """Rows as text, the first one as the heading, columns after the first to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["   ".join([row[0].ljust(widths[0]), *(x.rjust(w) for x, w in zip(row[1:], widths[1:], strict=True))]) for row in rows]
    rule = "-" * len(lines[0])
    return "\n".join([lines[0], rule, *lines[1:], rule])


def report(args: argparse.Namespace, contenders: list[Contender], unigram: float, parity: Report, backend: str, found: dict) -> str:
    """Both tables and what they say, all of it from this run."""
    attention, memory = (c.curve[-1][1] for c in contenders)
    models = table([
        ["", *(c.name for c in contenders)],
        ["validation, bits per byte", *(f"{c.curve[-1][1]:.3f}" for c in contenders)],
        ["training, tokens per second", *(f"{c.steps * BATCH * LENGTH / c.seconds:,.0f}" for c in contenders)],
        ["training steps", *(f"{c.steps}" for c in contenders)],
        ["parameters", *(f"{c.parameters:,}" for c in contenders)],
    ])  # fmt: skip
    lines = ["", models, f"Byte frequencies alone would give {unigram:.3f} bits per byte."]
    if contenders[0].steps < args.steps:
        lines.append(f"Both were cut at step {contenders[0].steps} of {args.steps}: the time was up (--seconds {args.seconds:g}).")
    better = "neither was better" if attention == memory else f"{contenders[memory < attention].name} was the better one"
    lines.append(f"In this run {better}, by {abs(attention - memory):.3f} bits per byte (one seed, small models, a short text; beside the")
    start = ", an output gate and a learned initial memory" if PRESETS[args.preset].memory == "mlp" else " and an output gate"
    lines.append(f"memory itself its layers have a short convolution{start}, which the attention layers have not).\n")

    shape = "B{batch} T{tokens} H{heads} D{key_dim} C{chunk_size}".format(**SPEED)
    errors = [max(row.error for row in parity.rows if row.name.startswith("grad_") == of_gradient) for of_gradient in (False, True)]
    lines.append(table([
        [f"{args.preset}, {shape}", f"{backend} kernel" if backend != "reference" else backend, "eager PyTorch"],
        ["forward + backward, seconds (one thread)", *(f"{found[name]:.4f}" for name in ("kernel", "eager"))],
        ["times the kernel's time", "1.0", f"{found['eager'] / found['kernel']:.1f}"],
        ["error of outputs against float64", f"{errors[0]:.1e}", ""],
        ["error of the worst gradient", f"{errors[1]:.1e}", ""],
    ]))  # fmt: skip
    verdict = "within" if parity.ok else f"OUTSIDE (worst: {parity.worst.name})"
    lines.append(f"Relative errors, at the demo's own shape; they are {verdict} the error budget of float32.")
    return "\n".join(lines)


def draw(contenders: list[Contender], unigram: float, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for c in contenders:
        axes.plot(
            *zip(*c.curve[:-1], strict=True),
            marker="o",
            markersize=3,
            label=f"{c.name}: {c.curve[-1][1]:.2f} over all validation text at the end",
        )
    axes.axhline(unigram, color="grey", linestyle=":", label=f"byte frequencies alone: {unigram:.2f}")
    axes.set(xlabel="training step", ylabel="bits per byte, first validation windows", title="A byte-level Llama reads Python's help pages")
    axes.set_ylim(top=unigram + 1.5)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default=PRESET, choices=PRESETS, help="the memory")
    parser.add_argument("--steps", type=int, default=200, help="training steps of each model")
    parser.add_argument("--seconds", type=float, default=180, help="time for everything")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out", help="folder of the picture")
    args = parser.parse_args()
    if args.steps < 1:
        parser.error("--steps: expected at least 1")
    logging.set_verbosity_error()

    train_text, valid_text = load_text()
    contenders = [Contender("attention", args.seed, None), Contender(args.preset, args.seed, args.preset)]
    train(contenders, batches(train_text, args.steps, args.seed), valid_text, max(1.0, 0.85 * args.seconds - (time.perf_counter() - BEGAN)))

    shape = {"batch": 2, "tokens": LENGTH, "heads": HEADS, "key_dim": HEAD_DIM, "value_dim": HEAD_DIM}
    case = kernel_case(args.preset, **shape, chunk_size=PRESETS[args.preset].chunk_size)
    reasons = miras_kernels.explain(**case.draw(torch.float32).arguments())
    backend = next(name for name, reason in reasons.items() if reason is None)
    parity = check(case)
    found = speed(args.preset)

    unigram = unigram_bits(train_text, valid_text)
    picture = args.out / "learning_curves.png"
    draw(contenders, unigram, picture)
    print(report(args, contenders, unigram, parity, backend, found))
    print(show(contenders, valid_text[:PROMPT], WRITTEN, args.seed))
    print(f"\nlearning curves: {picture}\n{time.perf_counter() - BEGAN:.0f} s in all")
    if not parity.ok:
        raise SystemExit(f"the kernels are wrong:\n{parity}")


if __name__ == "__main__":
    main()
