"""Linearise a small attention model: half of its layers become memories, and what that costs in bits per byte.

    python -m examples.linearize [--presets yaad_linear yaad] [--seed 0] [--out FILE.json]

A byte-level Llama with attention (the teacher) is trained on the text of examples/demo.py. For each preset, memories first learn the
outputs of all its attention layers, half of the layers (those that lose most) get attention back, and the whole is finetuned on the
teacher's predictions: miras_kernels.hf.linearize. For comparison the same hybrid is trained from random parameters for as many steps on
batches of the same size. All numbers are measured in this run, on validation text that nothing was trained or chosen on.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from bench.common import results
from miras_kernels.hf import Finetune, Rank, Transfer, linearize, replace_attention
from miras_kernels.layers import PRESETS

from .demo import load_text, table

WIDTH, LAYERS, HEADS, INTERMEDIATE, LENGTH, BATCH = 128, 4, 4, 352, 256, 8
STEPS = {"teacher": 600, "transfer": 200, "finetune": 250}
RATES = {"teacher": 4e-3, "transfer": 1e-2, "finetune": 4e-3}
STRIDE = 16  # bytes between the beginnings of two rows of training text
RANKING = 64  # rows at the end of the training text on which layers are ranked
CLOSE = 0.05  # the goal: bits per byte above the teacher


def student(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256, hidden_size=WIDTH, intermediate_size=INTERMEDIATE, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        max_position_embeddings=LENGTH, tie_word_embeddings=True, initializer_range=WIDTH**-0.5, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def train(model: LlamaForCausalLM, rows: torch.Tensor, steps: int, seed: int) -> None:
    """With the language-model loss, from the start."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(seed)
    for i in logging.tqdm(range(steps), desc="teacher", unit="step", disable=None):
        ids = rows[torch.randint(len(rows), (BATCH,), generator=generator)]
        for group in optimizer.param_groups:
            group["lr"] = RATES["teacher"] * min((i + 1) / 20, 0.1 + 0.45 * (1 + math.cos(math.pi * i / steps)))
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def bits(model: LlamaForCausalLM, valid: torch.Tensor) -> float:
    """Bits per byte over windows that overlap by one byte: every byte but the first (and a short tail) is predicted once."""
    windows, total = valid.unfold(0, LENGTH, LENGTH - 1), 0.0
    for ids in windows.split(2 * BATCH):
        logits = model.eval()(input_ids=ids).logits[:, :-1]
        total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
    return total / math.log(2) / windows[:, 1:].numel()


def measure(teacher: LlamaForCausalLM, preset: str, rows: torch.Tensor, ranking: torch.Tensor, valid: torch.Tensor, seed: int) -> dict:
    """One preset: bits per byte after each stage, and of the comparisons."""
    began, given = time.process_time(), dict(init="from_attention")
    torch.manual_seed(seed)
    model = replace_attention(copy.deepcopy(teacher), preset, **given)
    untrained = copy.deepcopy(model)
    settings = dict(teacher=teacher, data=rows, held_out=ranking, seed=seed)
    transfer = Transfer(STEPS["transfer"], RATES["transfer"], BATCH)
    found = linearize(model, stages=[transfer, Rank(LAYERS // 2, 2 * BATCH)], **settings)
    ranked, losses = found.history[-1], found.history[-2]["losses"]
    after_transfer = bits(model, valid)
    for layer in ranked["kept"]:
        untrained.model.layers[layer].self_attn = copy.deepcopy(teacher.model.layers[layer].self_attn)
    before = bits(untrained, valid)
    linearize(model, stages=[Finetune(STEPS["finetune"], RATES["finetune"], BATCH, rank=16)], **settings)
    after_finetuning = bits(model, valid)

    scratch = replace_attention(student(seed + 1), preset, found.layers, **given)
    steps = STEPS["transfer"] + STEPS["finetune"]
    linearize(scratch, stages=[Finetune(steps, RATES["teacher"], BATCH, loss="lm", rank=None)], data=rows, seed=seed)
    return {
        "preset": preset, "layers": list(found.layers), "increase": ranked["increase"],
        "error": {str(i): [losses[0][i], sum(x[i] for x in losses[-10:]) / len(losses[-10:])] for i in range(LAYERS)},
        "bits": {"replaced": before, "transfer": after_transfer, "finetune": after_finetuning, "scratch": bits(scratch, valid)},
        "cpu_seconds": time.process_time() - began,
    }  # fmt: skip


def rows_of(document: dict) -> list[list[str]]:
    """The results as a table, the first row being the heading."""
    settings, found = document["settings"], document["results"]
    steps = settings["steps"]
    titles = {
        "replaced": "replaced, not trained",
        "transfer": f"after transfer ({steps['transfer']} steps)",
        "finetune": f"after finetuning ({steps['finetune']} steps)",
        "scratch": f"the hybrid from scratch ({steps['transfer'] + steps['finetune']} steps)",
    }
    return [
        [f"{settings['layers'] // 2} of {settings['layers']} layers are memories", *(x["preset"] for x in found)],
        [f"teacher ({steps['teacher']} steps)", *(f"{document['teacher']:.3f}" for _ in found)],
        *([title, *(f"{x['bits'][name]:.3f}" for x in found)] for name, title in titles.items()),
        ["layers with memories", *(", ".join(map(str, x["layers"])) for x in found)],
    ]


def text(document: dict) -> str:
    """What is printed."""
    lines = ["", "bits per byte", table(rows_of(document))]
    for x in document["results"]:
        above = x["bits"]["finetune"] - document["teacher"]
        verdict = "within" if above <= CLOSE else "NOT within"
        lines.append(f"{x['preset']}: {above:+.3f} bits per byte against the teacher, {verdict} {CLOSE}")
    return "\n".join([*lines, f"{document['cpu_seconds']:.0f} CPU seconds"])


def page(document: dict) -> str:
    """The table in docs/transformers.md."""
    head, *rows = rows_of(document)
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--presets", nargs="+", default=["yaad_linear", "yaad"], choices=PRESETS, metavar="NAME")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the results here, as JSON")
    args = parser.parse_args(arguments)
    began = time.process_time()
    settings = dict(width=WIDTH, layers=LAYERS, heads=HEADS, length=LENGTH, batch=BATCH, steps=STEPS, rates=RATES, seed=args.seed)
    document = {
        **results.heading("examples.linearize"), "machine": results.machine(), "threads": torch.get_num_threads(),
        "versions": results.versions("torch", "transformers", "miras-kernels"), "settings": settings,
    }  # fmt: skip
    training, valid = load_text()
    windows = training.unfold(0, LENGTH, STRIDE)
    ranking = training[-RANKING * LENGTH :].view(RANKING, LENGTH)
    rows = windows[: -RANKING * LENGTH // STRIDE - LENGTH // STRIDE]  # they end before the text of the ranking
    teacher = student(args.seed)
    train(teacher, rows, STEPS["teacher"], args.seed)
    document |= {"teacher": bits(teacher, valid), "parameters": sum(p.numel() for p in teacher.parameters()), "results": []}
    print(f"teacher: {document['teacher']:.3f} bits per byte", flush=True)
    for preset in args.presets:
        document["results"].append(measure(teacher, preset, rows, ranking, valid, args.seed))
        print(document["results"][-1], flush=True)
    document["cpu_seconds"] = time.process_time() - began
    print(text(document))
    if args.out is not None:
        results.write_json(document, args.out)


if __name__ == "__main__":
    main()
