"""``linearize``: replace the attention of a pretrained model by memories and train it to do what it did."""

from __future__ import annotations

import argparse
import copy
import math
import sys
from pathlib import Path
from typing import Any

import torch

from .shared import positive, print_rows


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"expected a number between 0 and 1, got {text!r}")
    return value


def _count(text: str) -> int:
    return 0 if text == "0" else positive(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a causal language model of transformers with its tokenizer: a folder, or a name on the Hub")
    parser.add_argument("--text", type=Path, nargs="+", required=True, metavar="FILE", help="training text, UTF-8")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the result and of checkpoint.pt, from which the same command goes on"
    )
    parser.add_argument("--preset", default="yaad_linear", metavar="NAME", help="of miras_kernels.layers.PRESETS (default: yaad_linear)")
    parser.add_argument("--keep", type=_count, default=0, metavar="N", help="layers that keep attention: those that lose most (default: 0)")
    parser.add_argument("--length", type=positive, default=512, help="tokens per row (default: 512)")
    parser.add_argument("--batch", type=positive, default=8, help="rows per step (default: 8)")
    parser.add_argument("--transfer", type=_count, default=1000, metavar="STEPS", help="of attention transfer (default: 1000)")
    parser.add_argument("--finetune", type=_count, default=1000, metavar="STEPS", help="of finetuning (default: 1000)")
    parser.add_argument("--lr", type=float, nargs=2, default=(1e-3, 2e-4), metavar=("TRANSFER", "FINETUNE"), help="default: 1e-3 2e-4")
    parser.add_argument(
        "--loss", default="kl", choices=("kl", "lm"), help="of finetuning: the teacher's predictions, or the text (default: kl)"
    )
    parser.add_argument("--rank", type=_count, default=16, help="of the low-rank changes; 0: train everything in full (default: 16)")
    parser.add_argument(
        "--held-out", type=_share, default=0.05, metavar="SHARE", help="of the text, its end, not trained on (default: 0.05)"
    )
    parser.add_argument("--save-every", type=positive, default=200, metavar="STEPS", help="default: 200")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=_count, default=0)


def _rows(args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """Training and held-out rows ``[N, T]``.

    Raises:
        ValueError: the text is too short.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    text = "\n\n".join(path.read_text(encoding="utf-8") for path in args.text)
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)
    count = len(ids) // args.length
    if count < 2:
        raise ValueError(f"--text: expected at least 2 rows of {args.length} tokens (--length), got {len(ids)} tokens")
    rows = ids[: count * args.length].view(count, args.length)
    held_out = min(count - 1, max(1, round(count * args.held_out)))
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(args.out)
    return rows[:-held_out], rows[-held_out:]


def _linearize(args: argparse.Namespace) -> Any:
    from transformers import AutoModelForCausalLM

    from ..hf import Finetune, Rank, Transfer, linearize, replace_attention

    stages: list[Any] = []
    if args.transfer:
        stages.append(Transfer(args.transfer, args.lr[0], args.batch))
    if args.keep:
        stages.append(Rank(args.keep, args.batch))
    if args.finetune:
        stages.append(Finetune(args.finetune, args.lr[1], args.batch, args.loss, args.rank or None))
    teacher = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(args.device)
    torch.manual_seed(args.seed)
    model = replace_attention(copy.deepcopy(teacher), args.preset, init="from_attention")
    rows, held_out = _rows(args)
    run = linearize(model, teacher=teacher, data=rows, held_out=held_out, stages=stages, folder=args.out, save_every=args.save_every,
                    seed=args.seed)  # fmt: skip
    run.model.save_pretrained(args.out)
    return run


def run(args: argparse.Namespace) -> int:
    """Print the losses on held-out text after every stage, and save the model."""
    try:
        found = _linearize(args)
    except ImportError as error:
        print(f'linearize needs transformers: pip install "miras-kernels[hf]" ({error})', file=sys.stderr)
        return 2
    except (FloatingPointError, OSError, TypeError, ValueError) as error:
        print(f"linearize: {error}", file=sys.stderr)
        return 2
    title = "held-out text, nats per token (perplexity)"
    print_rows(title, [(x["name"], f"{x['held_out']:.4f} ({math.exp(x['held_out']):.2f})") for x in found.history])
    print(f"memories in layers {', '.join(map(str, found.layers))}; saved in {args.out}")
    return 0
