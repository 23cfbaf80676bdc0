"""Train the named memories for thousands of steps: no loss that is not a number, no growth of memory.

    python -m examples.soak [--steps 3000] [--tokens 2048] [--presets moneta yaad memora titans] [--seed 0] [--out bench/out/soak.json]

Each is a byte-level Llama of width 128 with 2 layers, batch 1, on the demo's text. Results are written after every preset; presets that the
file has already, with at least as many steps, are not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from bench.common import results
from examples.demo import load_text
from miras_kernels.hf import replace_attention

PRESETS = ("moneta", "yaad", "memora", "titans")
WIDTH, LAYERS, HEADS, INTERMEDIATE = 128, 2, 4, 256
LEARNING_RATE, WARMUP = 4e-3, 100
SETTLED = 200  # steps after which memory may no longer grow
GROWTH = 0.05  # of the process's memory that the later half of these steps may use more than the earlier half
POINTS = 100  # of a curve
COLUMNS = ("step", "bits per byte, mean since the row before", "MB, the largest since the row before")


def resident() -> float:
    """Megabytes of main memory that the process uses."""
    return int(re.search(r"VmRSS:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def soak(preset: str, text: torch.Tensor, steps: int, tokens: int, seed: int) -> dict:
    """Train for ``steps`` steps; the curve has bits per byte, and memory in MB, of each group of steps."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256, hidden_size=WIDTH, intermediate_size=INTERMEDIATE, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        max_position_embeddings=tokens, tie_word_embeddings=True, initializer_range=WIDTH**-0.5, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = replace_attention(LlamaForCausalLM(config), preset, backend="cpp")
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95))
    starts = torch.randint(len(text) - tokens + 1, (steps,), generator=torch.Generator().manual_seed(seed)).tolist()
    losses, memory, began = [], [], time.process_time()
    for i, start in enumerate(starts):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min((i + 1) / WARMUP, 0.1 + 0.45 * (1 + math.cos(math.pi * i / steps)))
        ids = text[start : start + tokens].unsqueeze(0)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if not (torch.isfinite(loss) and torch.isfinite(norm)):
            raise RuntimeError(f"{preset}, step {i + 1}: the loss is {loss.item()}, the norm of its gradients {norm.item()}")
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item() / math.log(2))
        memory.append(resident())
        if (i + 1) % 100 == 0:
            print(f"{preset}: step {i + 1} of {steps}, {sum(losses[-100:]) / 100:.3f} bits per byte, {memory[-1]:.0f} MB", flush=True)
    seconds = (time.process_time() - began) / steps
    ends = sorted({(n + 1) * steps // POINTS for n in range(POINTS)} - {0})
    groups = zip([0, *ends], ends, strict=False)
    curve = [[end, round(sum(losses[first:end]) / (end - first), 4), round(max(memory[first:end]), 1)] for first, end in groups]
    return {"preset": preset, "steps": steps, "cpu_seconds_per_step": round(seconds, 4), **growth(preset, memory[SETTLED:]), "curve": curve}


def growth(preset: str, memory: list[float]) -> dict:
    """The largest memory in the earlier and the later half of the steps; much more in the later half is an error."""
    half = len(memory) // 2
    if half == 0:
        return {"memory_mb": None}
    earlier, later = max(memory[:half]), max(memory[half:])
    if later > (1 + GROWTH) * earlier:
        raise RuntimeError(f"{preset}: memory has grown from {earlier:.0f} to {later:.0f} MB")
    return {"memory_mb": {"earlier_half": round(earlier, 1), "later_half": round(later, 1)}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3000, help="of each preset (default: 3000)")
    parser.add_argument("--tokens", type=int, default=2048, help="bytes of a step (default: 2048)")
    parser.add_argument("--presets", nargs="+", default=PRESETS, choices=PRESETS)
    parser.add_argument("--seed", type=int, default=0, help="of parameters and batches (default: 0)")
    parser.add_argument("--out", type=Path, default=Path("bench/out/soak.json"), help="default: bench/out/soak.json")
    args = parser.parse_args()
    for name in ("steps", "tokens"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: expected at least 1")
    logging.set_verbosity_error()
    text, _ = load_text()
    settings = {"tokens": args.tokens, "batch": 1, "width": WIDTH, "layers": LAYERS, "heads": HEADS, "seed": args.seed,
                "threads": torch.get_num_threads(), "backend": "cpp", "curve": list(COLUMNS)}  # fmt: skip
    document = results.heading("examples.soak") | {
        "machine": results.machine(), "versions": results.versions("torch", "transformers", "miras-kernels"), "settings": settings,
        "results": [],
    }  # fmt: skip
    if args.out.exists():
        before = json.loads(args.out.read_text())
        if before["settings"] == settings:
            document["results"] = [r for r in before["results"] if r["steps"] >= args.steps]
    for preset in args.presets:
        if preset not in [r["preset"] for r in document["results"]]:
            document["results"].append(soak(preset, text, args.steps, args.tokens, args.seed))
            results.write_json(document, args.out)


if __name__ == "__main__":
    main()
