"""The README.md beside a saved model: which memories it has, how to load it, and what it was made from."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard
from transformers import PreTrainedModel

from .. import __version__
from . import plan

__all__ = ["model_card", "replace_generated", "write_card"]

_GENERATED = "This model card has been automatically generated."  # in the card that transformers uploads

_TEXT = """---
library_name: transformers
tags:
- miras-kernels
{base}---
# {name}

A language model some of whose layers are associative memories, trained while they read: {count} of {layers} layers{kept}.

| layers | memory | bias | retention gate | chunk size | heads | |
| --- | --- | --- | --- | --- | --- | --- |
{rows}

It was made from {origin} with miras-kernels {version}.

## Loading

It needs `pip install miras-kernels`.

```python
from miras_kernels.hf import load

model = load("the name of this repository, or its folder")
```

After `import miras_kernels.hf`, `{auto}.from_pretrained` loads it too; without that import it needs `trust_remote_code=True`.
"""


def model_card(model: PreTrainedModel) -> str:
    """The text of the README.md."""
    from .classes import auto_class

    config, groups = model.config, plan.read(model.config)
    count = sum(len(group.layers) for group in groups if group.mode == "replace")
    source = str(getattr(config, "name_or_path", "") or "")
    published = source.count("/") == 1 and not source.startswith((".", "/", "~")) and not Path(source).exists()
    taken = any(group.init == "from_attention" for group in groups)
    origin = f"[{source}](https://huggingface.co/{source})" if published else "a model without a published name"
    return _TEXT.format(
        base=f"base_model: {source}\n" if published else "",
        name=type(model).__name__.removeprefix("FSDP"),
        auto=auto_class(type(model)),
        count=sum(len(group.layers) for group in groups),
        layers=config.num_hidden_layers,
        kept="" if count == config.num_hidden_layers else "; the others are attention" if count else ", beside attention",
        rows="\n".join(map(_row, groups)),
        origin=origin + (", whose attention layers' projections the memories use," if taken else ""),
        version=__version__,
    )


def write_card(model: PreTrainedModel, folder: str | Path) -> None:
    """Write README.md unless there is one."""
    path = Path(folder) / "README.md"
    if not path.exists():
        path.write_text(model_card(model), encoding="utf-8")


def replace_generated(model: PreTrainedModel, folder: str | Path) -> None:
    """Write README.md in place of the one that transformers has generated for an upload, if that is what is there; its tags stay."""
    path = Path(folder) / "README.md"
    generated = ModelCard.load(path) if path.exists() else None
    if generated is None or _GENERATED not in generated.text:
        return
    card = ModelCard(model_card(model))
    card.data.tags += [tag for tag in generated.data.tags or () if tag not in card.data.tags]
    card.save(path)


def _row(group: plan.Memories) -> str:
    rule = group.preset
    size = "linear" if rule.memory == "linear" else f"MLP, {rule.expansion} hidden units a channel"
    cells = [
        ", ".join(map(str, group.layers)), f"{rule.source} ({size}{', momentum' if rule.momentum else ''})", f"`{rule.bias}`",
        f"`{rule.retention}`", str(rule.chunk_size), f"{group.num_heads}", "beside attention" if group.mode == "parallel" else "",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"
