"""The training loop, on accelerate: any optimizer of `flatbench.optim` runs in it and resumes from it."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import get_scheduler

from flatbench import adapters, optim, random_streams
from flatbench.errors import DivergedError
from flatbench.memory import PeakMemory
from flatbench.options import BaseOptimizerOptions, TrainOptions
from flatbench.seeding import derive_seed
from flatbench.tasks.base import Batch, Example, Splits, Task


class ShuffledBatches(Sampler[list[int]]):
    """Batches of indices in an order that depends on the seed and the epoch alone.

    So an interrupted run sees after resuming what it would have seen, whatever was drawn before.
    """

    def __init__(self, examples: int, batch_size: int, seed: int) -> None:
        self.examples, self.batch_size, self.seed = examples, batch_size, seed
        self.epoch = 0
        #: batches of the epoch that were made before an interruption
        self.skip = 0

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", self.epoch))
        order = torch.randperm(self.examples, generator=generator).tolist()
        for start in range(self.skip * self.batch_size, self.examples, self.batch_size):
            yield order[start : start + self.batch_size]

    def __len__(self) -> int:
        return math.ceil(self.examples / self.batch_size)


def fixed_batches(
    task: Task, examples: Sequence[Example], batch_size: int, device: torch.device
) -> Iterable[Batch]:
    """The examples in their order, in batches on ``device``."""
    for start in range(0, len(examples), batch_size):
        part = [examples[i] for i in range(start, min(start + batch_size, len(examples)))]
        yield {key: value.to(device) for key, value in task.collate(part).items()}


def build_optimizer(
    model: nn.Module, spec: Mapping[str, Any], train: TrainOptions, total_steps: int, seed: int = 0
) -> Any:
    """The optimizer that a resolved ``optimizer`` section describes, around its base optimizer.

    Weight decay acts on matrices only. Clipping is a hook of the base optimizer, so that in a method with
    two gradients it is the second one that is clipped. Where the section leaves ``total_steps`` or ``seed``
    open, the method gets the run's: its number of steps, and a stream of its seed.
    """
    parameters = list(adapters.trainable_parameters(model).values())
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": train.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    base = _base_optimizer([g for g in groups if g["params"]], train.lr, spec["base"])
    limit = train.max_grad_norm
    if limit is not None:

        def clip(*_: Any) -> None:
            torch.nn.utils.clip_grad_norm_(parameters, limit)

        base.register_step_pre_hook(clip)
    options = {key: value for key, value in spec.items() if key not in ("name", "base")}
    own = {"total_steps": total_steps, "seed": derive_seed(seed, "perturbation")}
    options |= {key: value for key, value in own.items() if key in options and options[key] is None}
    return optim.REGISTRY.load(spec["name"])(base, model, **options)


def _base_optimizer(
    groups: list[dict[str, Any]], lr: float, spec: Mapping[str, Any]
) -> torch.optim.Optimizer:
    options = BaseOptimizerOptions.model_validate(spec)
    if options.name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=options.momentum, nesterov=options.nesterov)
    kind = torch.optim.AdamW if options.name == "adamw" else torch.optim.Adam
    return kind(groups, lr=lr, betas=options.betas, eps=options.eps)


class Trainer:
    """One run's training, which can be stopped after any step and gone on with.

    Args:
        model: ready to train (see `adapters.adapt`); moved to the accelerator's device.
        optimizer: a resolved ``optimizer`` section.
        seed: the run's seed; data order and dropout are streams of it.

    Attributes:
        history: a row a logging step (step, epoch, loss, lr, step_seconds, perturbation_norm) or
            evaluation (step, epoch, validation.*). ``step_seconds`` is the time of forward passes,
            backward passes and update, without loading data.
    """

    def __init__(
        self,
        task: Task,
        model: nn.Module,
        splits: Splits,
        train: TrainOptions,
        optimizer: Mapping[str, Any],
        seed: int,
    ) -> None:
        self.task, self.splits, self.options, self.seed = task, splits, train, seed
        # accelerate keeps one precision a process, and a worker makes runs of several
        AcceleratorState._reset_state()
        self.accelerator = Accelerator(mixed_precision="bf16" if train.precision == "bf16" else "no")
        self.device = self.accelerator.device
        self.sampler = ShuffledBatches(len(splits.train), train.batch_size, seed)
        dataset: Any = splits.train
        self.loader = self.accelerator.prepare(
            DataLoader(dataset, batch_sampler=self.sampler, collate_fn=task.collate)
        )
        # the model goes to its device before the optimizer takes hold of its parameters
        self.model: nn.Module = self.accelerator.prepare(model)
        bare = self.accelerator.unwrap_model(self.model)
        total_steps = len(self.sampler) * train.epochs
        self.optimizer = build_optimizer(bare, optimizer, train, total_steps, seed)
        warmup = math.floor(train.warmup * total_steps)
        schedule = "constant_with_warmup" if train.schedule == "constant" and warmup else train.schedule
        self.scheduler = get_scheduler(schedule, self.optimizer.base, warmup, total_steps)
        self.parameters = adapters.trainable_parameters(bare)
        self.buffers = dict(bare.named_buffers())
        self.history: list[dict[str, Any]] = []
        self.epoch = 0
        self.step = 0
        self.seconds = 0.0
        #: seconds and steps since the last row of the history
        self._unlogged = (0.0, 0)
        #: where the streams of random numbers were, in a state that was saved within an epoch
        self._random: Mapping[str, Any] | None = None
        self.peak_memory = PeakMemory(self.device)

    # -- resuming -----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that going on needs, as tensors, numbers, strings, lists and dicts."""
        self.optimizer.eval()
        state = {
            "epoch": self.epoch,
            "step": self.step,
            "seconds": self.seconds,
            "unlogged": list(self._unlogged),
            "random": random_streams.state() if self._steps_of_epoch() else None,
            "peak_memory": self.peak_memory.bytes(),
            "parameters": {name: p.detach().cpu().clone() for name, p in self.parameters.items()},
            "buffers": {name: b.detach().cpu().clone() for name, b in self.buffers.items()},
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "history": self.history,
        }
        self.optimizer.train()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave. Raises ValueError if it cannot be gone on with here."""
        if state["random"] is not None:
            random_streams.check(state["random"])
        with torch.no_grad():
            for own, stored in ((self.parameters, state["parameters"]), (self.buffers, state["buffers"])):
                for name, tensor in own.items():
                    tensor.copy_(stored[name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(dict(state["scheduler"]))
        self.epoch, self.step, self.seconds = state["epoch"], state["step"], state["seconds"]
        self._unlogged, self._random = tuple(state["unlogged"]), state["random"]
        self.peak_memory.at_least(state["peak_memory"])
        self.history = list(state["history"])

    # -- training -----------------------------------------------------------------------------------------

    def run(
        self,
        after_epoch: Callable[[Trainer], None] = lambda trainer: None,
        after_step: Callable[[Trainer], None] = lambda trainer: None,
    ) -> None:
        """Train to the end.

        Args:
            after_epoch: called after each epoch.
            after_step: called after each step but an epoch's last. The state may be saved in either, which
                changes nothing about what follows, and an exception raised there ends the training.

        The model is left at its unperturbed point. Raises DivergedError at the first logged loss that is
        not finite.
        """
        while self.epoch < self.options.epochs:
            self._train_epoch(after_step)
            self.epoch += 1
            every = self.options.evaluate_every
            if every and self.epoch % every == 0 and self.epoch < self.options.epochs:
                self._validate()
            after_epoch(self)
        self.optimizer.eval()

    def _steps_of_epoch(self) -> int:
        """Steps of the epoch under way that are done."""
        return self.step - self.epoch * len(self.sampler)

    def _train_epoch(self, after_step: Callable[[Trainer], None]) -> None:
        self.sampler.epoch, self.sampler.skip = self.epoch, self._steps_of_epoch()
        if not self.sampler.skip:
            # one seed an epoch: dropout after resuming is what it would have been
            set_seed(derive_seed(self.seed, "dropout", self.epoch) % 2**32)
        self.model.train()
        self.optimizer.train()
        for batch in self.loader:
            if self._random is not None:  # here, because making the loader's iterator draws a number too
                random_streams.restore(self._random)
                self._random = None
            self._train_step(batch)
            if self._steps_of_epoch() < len(self.sampler):
                after_step(self)

    def _train_step(self, batch: Batch) -> None:
        start = time.perf_counter()
        rate = self.scheduler.get_last_lr()[0]
        loss = self.optimizer.step(lambda: self._backward(batch))
        self.scheduler.step()
        self.step += 1
        due = self.step % self.options.log_every == 0 or self.step % len(self.sampler) == 0
        value = float(loss) if due else 0.0  # waits for the device, so that the clock is right
        seconds, steps = self._unlogged
        seconds, steps = seconds + time.perf_counter() - start, steps + 1
        self._unlogged = seconds, steps
        if due:
            self.seconds += seconds
            self._unlogged = (0.0, 0)
            self._log(value, rate, seconds / steps)

    def _backward(self, batch: Batch) -> Tensor:
        """Leave the gradient of the batch's mean loss in the parameters, and return that loss."""
        self.optimizer.zero_grad()
        parts = self._micro_batches(batch)
        terms = [self.task.terms(part) for part in parts]
        total = torch.zeros((), device=self.device)
        for part, count in zip(parts, terms, strict=True):
            more = part is not parts[-1]
            with self.accelerator.no_sync(self.model) if more else contextlib.nullcontext():
                loss = self.task.loss(self.model, part)
                if len(parts) > 1:  # weighted, so that a ragged last part counts for what it holds
                    loss = loss * (count / sum(terms))
                self.accelerator.backward(loss)
            total += loss.detach()
        return total

    def _micro_batches(self, batch: Batch) -> list[Batch]:
        size = self.options.micro_batch_size
        count = len(next(iter(batch.values())))
        if size is None or count <= size:
            return [batch]
        return [{k: v[i : i + size] for k, v in batch.items()} for i in range(0, count, size)]

    # -- recording ----------------------------------------------------------------------------------------

    def _log(self, loss: float, rate: float, step_seconds: float) -> None:
        row = {
            "step": self.step,
            "epoch": self.epoch + 1,
            "loss": loss,
            "lr": rate,
            "step_seconds": step_seconds,
            "perturbation_norm": float(self.optimizer.perturbation_norm),
        }
        if not math.isfinite(loss):
            raise DivergedError(f"the loss is {loss} at step {self.step} (epoch {self.epoch + 1})")
        self.history.append(row)

    def _validate(self) -> None:
        self.optimizer.eval()
        batches = fixed_batches(self.task, self.splits.validation, self.options.eval_batch_size, self.device)
        metrics = self.task.evaluate(self.model, batches)
        self.history.append(
            {"step": self.step, "epoch": self.epoch, **{f"validation.{k}": v for k, v in metrics.items()}}
        )
        self.optimizer.train()

    def cost(self) -> dict[str, Any]:
        """What `flatbench.measures.base.Subject.training` describes."""
        seconds = [row["step_seconds"] for row in self.history if "step_seconds" in row]
        return {
            "step_seconds": seconds,
            "train_seconds": self.seconds,
            "gradients_per_step": self.optimizer.gradients_per_step,
            "skipped_perturbations": int(self.optimizer.skipped_perturbations),
            "peak_memory_bytes": self.peak_memory.bytes(),
            "peak_memory_source": self.peak_memory.source,
            "trainable_parameters": sum(p.numel() for p in self.parameters.values()),
        }
