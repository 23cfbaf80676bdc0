"""What the command lines of cpu.py and gpu.py share: lists of names, and results as JSON."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path


def names(parser: argparse.ArgumentParser, option: str, text: str | None, known: tuple, default: tuple) -> tuple:
    """A comma-separated list of names that are known, or the default where nothing was given."""
    chosen = default if text is None else tuple(name.strip() for name in text.split(","))
    for name in chosen:
        if name not in known:
            parser.error(f"{option}: unknown {name!r}: expected some of {', '.join(known)}")
    return chosen


def plain(x: object) -> object:
    """JSON has no infinities: they become null."""
    if isinstance(x, dict):
        return {str(key): plain(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [plain(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


def write_json(document: dict, path: Path) -> None:
    """The results, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".part")
    draft.write_text(json.dumps(plain(document), indent=1, allow_nan=False) + "\n")
    draft.replace(path)
