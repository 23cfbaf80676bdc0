"""How :func:`miras_kernels.hf.linearize` runs its stages."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from . import plan
from .attention import MemoryAttention
from .hosts import Host, attentions
from .stages import Finetune, Rank, Rows, Transfer

__all__ = ["Run", "matrices"]

WARMUP, FLOOR = 0.05, 0.1  # share of the steps in which the learning rate rises; its last value over its largest


@dataclasses.dataclass
class Run:
    """A model that is being linearised, and how far it is.

    Attributes:
        index, step: the stage, and how many of its steps are done.
        history: see :class:`~miras_kernels.hf.Linearized`.
        optimizer, adapters: what an interrupted stage goes on from; None at its beginning.
        save: called after ``save_every`` steps and after each stage, with the state of the optimiser and of the low-rank changes.
    """

    model: PreTrainedModel
    teacher: PreTrainedModel | None
    host: Host
    data: Rows
    held_out: Rows | None
    seed: int
    save_every: int
    index: int = 0
    step: int = 0
    history: list[dict] = dataclasses.field(default_factory=list)
    optimizer: dict | None = None
    adapters: dict | None = None
    save: Callable[..., None] = lambda *state: None

    def memories(self) -> dict[int, MemoryAttention]:
        """The replaced layers."""
        return {i: layer for i, layer in enumerate(attentions(self.model.base_model, self.host)) if isinstance(layer, MemoryAttention)}

    def original(self, i: int) -> nn.Module:
        """A copy of the teacher's attention in layer i, for the model."""
        assert self.teacher is not None
        old = copy.deepcopy(attentions(self.teacher.base_model, self.host)[i]).requires_grad_(True).train(self.model.training)
        for module in old.modules():
            if hasattr(module, "config"):
                module.config = self.model.config
        weight = next(attentions(self.model.base_model, self.host)[i].parameters())
        return old.to(weight.device, self.model.dtype)

    def put(self, i: int, attention: nn.Module) -> None:
        setattr(getattr(self.model.base_model, self.host.layers)[i], self.host.attention, attention)

    def restore(self, layers: Sequence[int]) -> None:
        """Give layers the teacher's attention back, and say so in the configuration."""
        for i in layers:
            self.put(i, self.original(i))
        groups = [dataclasses.replace(x, layers=tuple(i for i in x.layers if i not in layers)) for x in plan.read(self.model.config)]
        self.model.config.miras = plan.write(group for group in groups if group.layers)

    @torch.no_grad()
    def loss(self, model: PreTrainedModel, batch_size: int) -> float:
        """Mean cross entropy (nats) of all tokens of the held-out rows but the first of each."""
        assert self.held_out is not None
        training, total = model.training, 0.0
        model.eval()
        try:
            for at in range(0, len(self.held_out), batch_size):
                ids = self.held_out.batch(range(at, min(at + batch_size, len(self.held_out)))).to(_device(model))
                logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
                total += F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
        finally:
            model.train(training)
        return total / len(self.held_out) / (self.held_out.length - 1)

    def run(self, stage: Transfer | Rank | Finetune) -> None:
        """A stage, from where it was left; its entry of the history is the last one."""
        if self.step == 0 and not (self.history and self.history[-1].get("stage") == self.index):
            self.history.append({"name": stage.name, "stage": self.index})
        if isinstance(stage, Transfer):
            self._transfer(stage)
        elif isinstance(stage, Rank):
            self._rank(stage)
        else:
            self._finetune(stage)

    def _transfer(self, stage: Transfer) -> None:
        assert self.teacher is not None
        teacher, memories = self.teacher, self.memories()
        self.history[-1].setdefault("layers", list(memories))
        found: dict[int, Tensor] = {}

        def hook(i: int):
            def after(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
                found[i] = _error(memories[i], args[0] if args else kwargs["hidden_states"], kwargs.get("position_embeddings"), output)

            return after

        def step(ids: Tensor) -> list[Tensor]:
            with torch.no_grad():
                teacher.base_model(input_ids=ids.to(_device(teacher)), use_cache=False)
            return [found[i].cpu() for i in memories]

        layers = attentions(teacher.base_model, self.host)
        hooks = [layers[i].register_forward_hook(hook(i), with_kwargs=True) for i in memories]
        groups = {f"layer {i}": list(memory.parameters()) for i, memory in memories.items()}
        try:
            with _trained(self.model, groups):
                self._train(stage, groups, step)
        finally:
            for handle in hooks:
                handle.remove()

    def _rank(self, stage: Rank) -> None:
        memories = self.memories()
        originals = {i: self.original(i) for i in memories}
        try:
            for i in memories:
                self.put(i, originals[i])
            least, increase = self.loss(self.model, stage.batch_size), {}
            for i in logging.tqdm(memories, desc=stage.name, unit="layer", leave=False, disable=None):
                self.put(i, memories[i])
                increase[i] = self.loss(self.model, stage.batch_size) - least
                self.put(i, originals[i])
                if not math.isfinite(increase[i]):
                    raise FloatingPointError(f"rank: the loss with a memory in layer {i} is not finite")
        finally:
            for i in memories:
                self.put(i, memories[i])
        kept = sorted(sorted(memories, key=lambda i: -increase[i])[: stage.keep])
        self.restore(kept)
        self.history[-1] |= {"increase": {str(i): value for i, value in increase.items()}, "kept": kept}

    def _finetune(self, stage: Finetune) -> None:
        model, teacher = self.model.train(), self.teacher
        adapters = nn.ModuleDict()
        trained = list(model.parameters())
        if stage.rank is not None:
            torch.manual_seed(self._seed(0))
            for name, module in matrices(model, self.host).items():
                adapters[name.replace(".", "/")] = LowRank(module, stage.rank)
            trained = [p for memory in self.memories().values() for p in memory.parameters()]
            if self.adapters is not None:
                adapters.load_state_dict(self.adapters)
        everything = {"model": [*{id(p): p for p in trained}.values(), *adapters.parameters()]}

        def step(ids: Tensor) -> list[Tensor]:
            logits = model(input_ids=ids.to(_device(model)), use_cache=False).logits[:, :-1].float().flatten(0, 1)
            if stage.loss == "lm":
                loss = F.cross_entropy(logits, ids[:, 1:].flatten().to(logits.device))
            else:
                assert teacher is not None
                with torch.no_grad():
                    wanted = teacher(input_ids=ids.to(_device(teacher)), use_cache=False).logits[:, :-1].float().flatten(0, 1)
                wanted = wanted.to(logits.device).log_softmax(-1)
                loss = F.kl_div(logits.log_softmax(-1), wanted, log_target=True, reduction="batchmean")
            loss.backward()
            return [loss.detach().cpu()]

        try:
            with _trained(model, everything):
                self._train(stage, everything, step, adapters)
        finally:
            for adapter in adapters.values():
                adapter.merge()  # type: ignore[operator]

    def _seed(self, step: int) -> int:
        return ((self.seed * 1000 + self.index) * 10**8 + step) % 2**63

    def _train(self, stage: Transfer | Finetune, groups: dict[str, list[nn.Parameter]], step: Callable, adapters: nn.Module | None = None):
        """AdamW on the losses that ``step(ids)`` has gone backward from; each group's gradient is clipped to a norm of 1."""
        parameters, entry = [p for group in groups.values() for p in group], self.history[-1]
        optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=0.0)
        if self.optimizer is not None:
            optimizer.load_state_dict(self.optimizer)
        losses = entry.setdefault("losses", [])
        for p in parameters:
            p.grad = None
        with logging.tqdm(total=stage.steps, initial=self.step, desc=stage.name, unit="step", disable=None) as bar:
            while self.step < stage.steps:
                torch.manual_seed(self._seed(self.step))  # of dropout
                found = step(self.data.draw(stage.batch_size, self.step, self._seed(0)))
                norms = [clip_grad_norm_(group, 1.0) for group in groups.values()]
                for label, loss, norm in zip(groups, found, norms, strict=True):
                    if not (torch.isfinite(loss) and torch.isfinite(norm)):
                        raise FloatingPointError(
                            f"{stage.name}: expected a finite loss and gradient, got {loss.item():g} and {norm.item():g} ({label}, step "
                            f"{self.step} of {stage.steps}); the model is that of the step before. A smaller lr (now {stage.lr:g}) may help"
                        )
                for group in optimizer.param_groups:
                    group["lr"] = _rate(stage, self.step)
                optimizer.step()
                optimizer.zero_grad()
                values = [x.item() for x in found]
                losses.append(values if stage.name == "transfer" else values[0])
                self.step += 1
                bar.set_postfix_str(f"loss {sum(values) / len(values):.4f}", refresh=False)
                bar.update()
                if self.step % self.save_every == 0 and self.step < stage.steps:
                    self.save(optimizer.state_dict(), None if adapters is None else adapters.state_dict())


def matrices(model: PreTrainedModel, host: Host) -> dict[str, Any]:
    """The modules of the decoder layers that are a matrix, by name, outside of memories: what low-rank finetuning changes."""
    found: dict[str, Any] = {}
    for number, layer in enumerate(getattr(model.base_model, host.layers)):
        inside = {id(x) for part in layer.modules() if isinstance(part, MemoryAttention) for x in part.modules()}
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear | Conv1D) and id(module) not in inside:
                found[f"{number}.{name}"] = module
    return found


class LowRank(nn.Module):
    """Adds ``b a x`` to the output of a matrix product, until :meth:`merge` adds ``b a`` to the matrix."""

    def __init__(self, module: nn.Module, rank: int):
        super().__init__()
        weight: Any = module.weight
        out, width = reversed(weight.shape) if isinstance(module, Conv1D) else weight.shape
        where: dict[str, Any] = dict(device=weight.device, dtype=weight.dtype)
        self.a = nn.Parameter(torch.randn(rank, width).to(**where) / width**0.5)
        self.b = nn.Parameter(torch.zeros(out, rank, **where))
        self.module = [module]  # in a list, not to be a child
        self.hook = module.register_forward_hook(lambda module, args, out: out + F.linear(F.linear(args[0], self.a), self.b))

    @torch.no_grad()
    def merge(self) -> None:
        self.hook.remove()
        change, weight = self.b @ self.a, self.module[0].weight
        weight.add_(change.T if isinstance(self.module[0], Conv1D) else change)  # type: ignore[operator]


def _error(memory: MemoryAttention, x: Tensor, position_embeddings: Any, output: Any) -> Tensor:
    """A memory's relative squared error, after its backward."""
    place = next(memory.parameters())
    move = lambda t: t.detach().to(place.device, place.dtype)
    angles = tuple(map(move, position_embeddings)) if memory.turns else None
    with torch.enable_grad():
        out, _ = memory(move(x), angles)
        wanted = (output[0] if isinstance(output, tuple) else output).detach().to(place.device).float()
        loss = (out.float() - wanted).square().mean() / wanted.square().mean().clamp(min=1e-12)
        loss.backward()
    return loss.detach()


def _rate(stage: Transfer | Finetune, step: int) -> float:
    """The learning rate of a step."""
    rising = max(1, round(WARMUP * stage.steps))
    if step < rising:
        return stage.lr * (step + 1) / rising
    return stage.lr * (FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * (step - rising) / max(1, stage.steps - rising))) / 2)


def _device(model: PreTrainedModel) -> torch.device:
    """Where its token ids belong."""
    return model.get_input_embeddings().weight.device


@contextlib.contextmanager
def _trained(model: PreTrainedModel, groups: dict[str, list[nn.Parameter]]) -> Iterator[None]:
    """Only these parameters have gradients."""
    before, wanted = {p: p.requires_grad for p in model.parameters()}, {id(p) for group in groups.values() for p in group}
    try:
        for p in before:
            p.requires_grad_(id(p) in wanted)
        yield
    finally:
        for p, flag in before.items():
            p.requires_grad_(flag)
            p.grad = None
