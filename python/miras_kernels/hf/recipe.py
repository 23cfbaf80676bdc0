"""Linearising a pretrained model: its memories learn from its attention, then the whole is finetuned."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from .attention import MemoryAttention
from .classes import Family
from .hosts import Host, attentions
from .replace import _part
from .stages import STAGES, Finetune, Rank, Rows, Stage, Transfer
from .training import Run, matrices

__all__ = ["Linearized", "linearize"]

CHECKPOINT = "checkpoint.pt"
VERSION = 1


@dataclasses.dataclass(frozen=True)
class Linearized:
    """What :func:`linearize` returns.

    Attributes:
        model: the model that was given, trained.
        layers: the layers that have memories in place of attention now.
        history: JSON objects: ``{"name": "teacher"}``, ``{"name": "replaced"}`` (the model before the first stage), then one for each
            stage. All have ``"held_out"`` if there are held-out rows: the mean cross entropy in nats per token after it. ``"losses"``:
            of every step; for ``"transfer"`` those of the layers ``"layers"``. ``"rank"`` has ``"increase"`` (of the loss, in nats per
            token, by layer) and ``"kept"``, the layers that have attention again.
    """

    model: PreTrainedModel
    layers: tuple[int, ...]
    history: list[dict]


def linearize(
    model: PreTrainedModel,
    *,
    data: Any,
    teacher: PreTrainedModel | None = None,
    stages: Iterable[str | Transfer | Rank | Finetune] = ("transfer", "finetune"),
    held_out: Any = None,
    folder: str | Path | None = None,
    save_every: int = 200,
    seed: int = 0,
) -> Linearized:
    """Train a pretrained model whose attention has been replaced by memories, so that it does again what it did, in place.

    ::

        teacher = AutoModelForCausalLM.from_pretrained(name)
        model = replace_attention(copy.deepcopy(teacher), "yaad_linear", init="from_attention")
        stages = Transfer(steps=2000), Rank(keep=16), Finetune(steps=4000)
        linearize(model, teacher=teacher, data=rows, held_out=other_rows, stages=stages, folder="run").model.save_pretrained("linearised")

    The recipe of LoLCATs (arXiv 2410.10254) and RADLADS (arXiv 2505.03005), whose first stages MOHAWK (arXiv 2408.10189) and others
    share: every memory first learns its attention layer's outputs (:class:`Transfer`), attention comes back where it is missed most
    (:class:`Rank`), and the whole is finetuned (:class:`Finetune`). Stages may be in any order and repeated, with other settings or,
    in another call, with longer rows.

    Models are trained in their dtype, on their devices; use float32 weights, and ``with torch.autocast(...):`` around the call for
    16-bit products. The optimiser is AdamW; dropout is active in ``"finetune"``. The teacher is not changed.

    **Interruptions.** With ``folder``, a checkpoint (``checkpoint.pt``: the whole state of the model and of the optimiser) is written at
    the start, after every ``save_every`` steps and after each stage, and replaces the one before once it is complete. The same call with
    a model made in the same way, or with the one that the interruption left, goes on from it and ends with the same parameters as
    without the interruption; at the end, it only loads them.

    Args:
        model: a causal language model of the architectures of :func:`~miras_kernels.hf.replace_attention` with memories in place of
            attention in some layers. ``init="from_attention"`` starts closest to the teacher.
        data: the text, ``[N, T]`` token ids without padding: a tensor (also an overlapping view, ``ids.unfold(0, T, stride)``), or a
            sequence of rows, or of dictionaries with ``"input_ids"``. Batches are drawn from it in random order.
        teacher: a model of the same architecture and size that has attention in these layers; not sharing parameters with the model.
            Only ``Finetune(loss="lm")`` does without.
        stages: :class:`Transfer`, :class:`Rank`, :class:`Finetune`, or their names.
        held_out: rows as in ``data``, for ``"rank"`` and for the losses in the history; None: neither.
        folder: where the checkpoint is; None: there is none.
        save_every: steps.
        seed: of the order of rows, dropout, and the initial low-rank changes. The caller's random numbers are not used.

    Returns:
        The same model, the layers that have memories, and the losses.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came; the model is then unchanged. Rows of a sequence
            are checked when they are read.
        FloatingPointError: a loss or gradient is not finite. The model is that of the step before, and the checkpoint the last good one.
    """
    chosen = _stages(stages)
    path = None if folder is None else Path(folder) / CHECKPOINT
    checkpoint = None if path is None else _read(path)
    host = _check_model(model, chosen if checkpoint is None else chosen[checkpoint["index"] :])
    _check_teacher(teacher, model, host, chosen)
    for name, value, least in (("save_every", save_every, 1), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}: expected an integer >= {least}, got {value!r}")
    vocabulary = model.config.vocab_size
    rows = Rows("data", data, vocabulary)
    others = None if held_out is None else Rows("held_out", held_out, vocabulary)
    if others is None and any(isinstance(stage, Rank) for stage in chosen):
        raise ValueError("held_out: stage 'rank' measures losses on held-out rows; expected rows of token ids, got None")
    run = Run(model, teacher, host, rows, others, seed, save_every)
    settings = {
        "stages": [{"name": stage.name, **dataclasses.asdict(stage)} for stage in chosen],
        "seed": seed,
        "memories": model.config.miras,
        "data": [len(rows), rows.length],
        "held_out": None if others is None else [len(others), others.length],
    }
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if checkpoint is not None:
            _resume(run, path, settings, checkpoint)
        run.save = lambda *state: _save(run, path, settings, *state)
    modes = {x: x.training for x in (model, teacher) if x is not None}
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        if teacher is not None:
            teacher.eval()
        with torch.random.fork_rng(devices):
            _run(run, chosen)
    finally:
        for x, training in modes.items():
            x.train(training)
    return Linearized(model, tuple(run.memories()), run.history)


def _run(run: Run, stages: list) -> None:
    """The stages that are left."""
    if not run.history and run.held_out is not None:
        if run.teacher is not None:
            run.history.append({"name": "teacher", "held_out": run.loss(run.teacher, stages[0].batch_size)})
        run.history.append({"name": "replaced", "held_out": run.loss(run.model, stages[0].batch_size)})
    if (run.index, run.step) == (0, 0):
        run.save(None, None)  # the start, which is random too
    while run.index < len(stages):
        stage = stages[run.index]
        run.run(stage)
        if run.held_out is not None:
            run.history[-1]["held_out"] = run.loss(run.model, stage.batch_size)
        run.index, run.step, run.optimizer, run.adapters = run.index + 1, 0, None, None
        run.save(None, None)


# ---------------------------------------------------------------------------------------------------- checkpoints


def _save(run: Run, path: Path, settings: dict, optimizer: dict | None, adapters: dict | None) -> None:
    """Write a checkpoint beside the one that is there, then replace it."""
    state = {
        "version": VERSION, "settings": settings, "memories": run.model.config.miras, "index": run.index, "step": run.step,
        "history": run.history, "model": run.model.state_dict(), "optimizer": optimizer, "adapters": adapters,
    }  # fmt: skip
    new = path.with_suffix(".new")
    torch.save(state, new)
    os.replace(new, path)


def _read(path: Path) -> dict | None:
    """The checkpoint, if there is one.

    Raises:
        ValueError: it is none.
    """
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["version"] != VERSION:
            raise ValueError(f"of version {state['version']}, expected {VERSION}")
    except Exception as error:
        raise ValueError(f"folder: expected a checkpoint of linearize in {path}, or none, got a file that is none ({error})") from None
    return state


def _resume(run: Run, path: Path, settings: dict, state: dict) -> None:
    """Load a checkpoint.

    Raises:
        ValueError: it belongs to another run.
    """
    found, memories = state["settings"], state["memories"]
    if settings["memories"] == memories:  # the model that was interrupted: a stage may have given layers attention back
        settings["memories"] = found["memories"]
    differing = [name for name in settings if settings[name] != found[name]]
    if differing:
        name = differing[0]
        raise ValueError(
            f"folder: {path} belongs to another run, with {name} = {found[name]}; expected the same arguments as then (or another folder), "
            f"got {settings[name]}"
        )
    left = {i for group in memories["memories"] for i in group["layers"] if group["mode"] == "replace"}
    gone = [i for i in run.memories() if i not in left]
    if gone:
        run.restore(gone)
    run.model.load_state_dict(state["model"])
    for name in ("index", "step", "history", "optimizer", "adapters"):
        setattr(run, name, state[name])


# ---------------------------------------------------------------------------------------------------- checks


def _stages(stages: object) -> list:
    if isinstance(stages, str) or not isinstance(stages, Iterable):
        raise TypeError(f"stages: expected a sequence of {', '.join(map(repr, STAGES))}, got {stages!r}")
    found = []
    for stage in stages:
        if isinstance(stage, str) and stage not in STAGES:
            raise ValueError(f"stages: expected {', '.join(map(repr, STAGES))}, got {stage!r}")
        if not isinstance(stage, str | Stage):
            raise TypeError(f"stages: expected names, Transfer, Rank or Finetune, got {stage!r}")
        found.append(STAGES[stage]() if isinstance(stage, str) else stage)
    if not found:
        raise ValueError("stages: expected at least one, got none")
    return found


def _causal_lm(name: str, model: Any) -> tuple[PreTrainedModel, Family]:
    """A causal language model, and the classes of its architecture."""
    try:
        part, family = _part(model)
    except TypeError as error:
        raise TypeError(str(error).replace("model:", f"{name}:", 1)) from None
    if part is not model or not type(part).__name__.endswith(("ForCausalLM", "LMHeadModel")):
        raise TypeError(f"{name}: expected a causal language model (...ForCausalLM), got {type(model).__name__}")
    empty = [key for key, p in part.named_parameters() if p.device.type == "meta"]
    if empty:
        raise ValueError(f"{name}: expected loaded weights, got {empty[0]} without data (meta device)")
    return part, family


def _check_model(model: Any, stages: list) -> Host:
    part, family = _causal_lm("model", model)
    host = family.host
    layers = [i for i, x in enumerate(attentions(part.base_model, host)) if isinstance(x, MemoryAttention)]
    if not layers:
        raise ValueError(
            f"model: expected memories in place of attention in some layers (replace_attention, mode='replace'), got "
            f"{type(part).__name__} without"
        )
    kept = sum(stage.keep for stage in stages if isinstance(stage, Rank))
    if kept >= len(layers):
        raise ValueError(f"rank: keep: expected less than {len(layers)}, the number of layers with memories, got {kept}")
    changed = [(f"layer {i}: {name}", p) for i in layers for name, p in attentions(part.base_model, host)[i].named_parameters()]
    for stage in stages:
        if isinstance(stage, Finetune):
            full = part.named_parameters() if stage.rank is None else ((name, x.weight) for name, x in matrices(part, host).items())
            changed += full
    for name, p in changed:
        if not p.is_floating_point():
            raise ValueError(f"model: expected floating-point parameters where it is trained, got {p.dtype} ({name}); it is quantised")
    return host


def _check_teacher(teacher: Any, model: PreTrainedModel, host: Host, stages: list) -> None:
    if teacher is None:
        for stage in stages:
            if not (isinstance(stage, Finetune) and stage.loss == "lm"):
                raise ValueError(f"teacher: stage {stage.name!r} needs one; expected the model with attention, got None")
        return
    other, family = _causal_lm("teacher", teacher)
    wanted = _causal_lm("model", model)[1].original
    if family.original is not wanted:
        raise TypeError(f"teacher: expected the architecture of the model ({wanted.__name__}), got {family.original.__name__}")
    for name in ("hidden_size", "num_hidden_layers", "vocab_size"):
        here, there = getattr(model.config, name), getattr(other.config, name)
        if here != there:
            raise ValueError(f"teacher: expected {name} = {here}, as the model has, got {there}")
    for i, pair in enumerate(zip(*(attentions(x.base_model, host) for x in (model, other)), strict=True)):
        if all(isinstance(layer, MemoryAttention) for layer in pair):
            raise ValueError(f"teacher: expected attention in layer {i}, where the model has a memory, got a memory")
    shared = {id(p) for p in model.parameters()} & {id(p) for p in other.parameters()}
    if shared:
        raise ValueError(
            f"teacher: expected parameters of its own (copy.deepcopy before replace_attention), got {len(shared)} of the model's"
        )
