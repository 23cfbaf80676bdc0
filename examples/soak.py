"""Train the named memories for thousands of steps: no loss that is not a number, no growth of memory.

    python -m examples.soak [--steps 3000] [--minutes 120] [--tokens 2048] [--seed 0] [--out bench/out/soak.json]

Each is a byte-level Llama of width 128 with 2 layers, batch 1, on the demo's text. They are trained in turns, a step each, and the
results so far are written every 100 steps.
"""

from __future__ import annotations

import argparse
import math
import re
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from bench.common import results
from examples.demo import load_text
from miras_kernels.hf import replace_attention

PRESETS = ("moneta", "yaad", "memora", "titans")
WIDTH, LAYERS, HEADS, INTERMEDIATE = 128, 2, 4, 256
LEARNING_RATE, WARMUP = 3e-3, 100
SETTLED = 200  # steps after which memory may no longer grow
GROWTH = 0.05  # of the process's memory that the later half of these steps may use more than the earlier half
POINTS = 100  # of a curve
EVERY = 100  # steps between two reports


def resident() -> float:
    """Megabytes of main memory that the process uses."""
    return int(re.search(r"VmRSS:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


class Training:
    """A model with a memory, its optimiser and its losses in bits per byte."""

    def __init__(self, preset: str, tokens: int, seed: int):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=256, hidden_size=WIDTH, intermediate_size=INTERMEDIATE, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
            max_position_embeddings=tokens, tie_word_embeddings=True, initializer_range=WIDTH**-0.5, bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        self.preset, self.model = preset, replace_attention(LlamaForCausalLM(config), preset, backend="cpp")
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95))
        self.losses: list[float] = []
        self.seconds = 0.0

    def step(self, ids: torch.Tensor) -> None:
        began = time.process_time()
        for group in self.optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min((len(self.losses) + 1) / WARMUP, 1)
        loss = self.model(input_ids=ids, labels=ids).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        if not (torch.isfinite(loss) and torch.isfinite(norm)):
            raise RuntimeError(f"{self.preset}, step {len(self.losses) + 1}: loss {loss.item()}, norm of its gradients {norm.item()}")
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item() / math.log(2))
        self.seconds += time.process_time() - began

    def result(self) -> dict:
        return {"preset": self.preset, "steps": len(self.losses), "cpu_seconds_per_step": round(self.seconds / len(self.losses), 4),
                "bits_per_byte": thinned(self.losses, lambda x: round(sum(x) / len(x), 4))}  # fmt: skip


def thinned(values: list[float], function: Callable[[list[float]], float]) -> list[list[float]]:
    """A curve of at most POINTS points: the last step of each group of steps, and what the group's values are together."""
    ends = sorted({(n + 1) * len(values) // POINTS for n in range(POINTS)} - {0})
    return [[end, function(values[first:end])] for first, end in zip([0, *ends], ends, strict=False)]


def growth(memory: list[float]) -> dict:
    """The largest memory in the earlier and the later half of the steps; much more in the later half is an error."""
    half = len(memory) // 2
    if half == 0:
        return {}
    earlier, later = max(memory[:half]), max(memory[half:])
    if later > (1 + GROWTH) * earlier:
        raise RuntimeError(f"memory has grown from {earlier:.0f} to {later:.0f} MB")
    return {"earlier_half_mb": round(earlier, 1), "later_half_mb": round(later, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3000, help="of each preset (default: 3000)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so many minutes (default: none)")
    parser.add_argument("--tokens", type=int, default=2048, help="bytes of a step (default: 2048)")
    parser.add_argument("--seed", type=int, default=0, help="of parameters and batches (default: 0)")
    parser.add_argument("--out", type=Path, default=Path("bench/out/soak.json"), help="default: bench/out/soak.json")
    args = parser.parse_args()
    for name in ("steps", "tokens"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: expected at least 1")
    logging.set_verbosity_error()
    text, _ = load_text()
    document = results.heading("examples.soak") | {
        "machine": results.machine(), "versions": results.versions("torch", "transformers", "miras-kernels"),
        "settings": {
            "tokens": args.tokens, "batch": 1, "width": WIDTH, "layers": LAYERS, "heads": HEADS, "seed": args.seed, "backend": "cpp",
            "threads": torch.get_num_threads(), "steps_wanted": args.steps,
        },
    }  # fmt: skip
    trainings = [Training(preset, args.tokens, args.seed) for preset in PRESETS]
    starts = torch.randint(len(text) - args.tokens + 1, (args.steps,), generator=torch.Generator().manual_seed(args.seed)).tolist()
    memory, began = [], time.perf_counter()
    for i, start in enumerate(starts):
        for training in trainings:
            training.step(text[start : start + args.tokens].unsqueeze(0))
        memory.append(resident())
        last = i + 1 == args.steps or time.perf_counter() - began > 60 * args.minutes
        if last or (i + 1) % EVERY == 0:
            document["results"] = [training.result() for training in trainings]
            document["memory"] = {"after_step": SETTLED, **growth(memory[SETTLED:]), "mb": thinned(memory, max)}
            results.write_json(document, args.out)
            latest = ", ".join(f"{t.preset} {sum(t.losses[-EVERY:]) / len(t.losses[-EVERY:]):.3f}" for t in trainings)
            print(f"step {i + 1} of {args.steps}: {latest} bits per byte, {memory[-1]:.0f} MB", flush=True)
        if last:
            break


if __name__ == "__main__":
    main()
