"""The training loop, on accelerate: any optimizer of `flatbench.optim` runs in it and resumes from it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import get_scheduler

from flatbench.config.sections import TrainOptions
from flatbench.curvature.operators.losses import computes_in_half, precision_known
from flatbench.distributed import deepspeed, processes
from flatbench.distributed import shards as sharding
from flatbench.errors import DivergedError, InputError
from flatbench.machine import environment, random_streams
from flatbench.machine.energy import EnergyMeter
from flatbench.machine.memory import PeakMemory
from flatbench.machine.stopwatch import Stopwatch
from flatbench.machine.waiting import CoreWait
from flatbench.models import factors
from flatbench.seeding import derive_seed
from flatbench.tasks.base import Batch, Example, Splits, Task
from flatbench.training.accelerator import make_accelerator
from flatbench.training.batches import micro_batches, training_batches
from flatbench.training.compilation import CompiledForward
from flatbench.training.optimizer import build_optimizer


def fixed_batches(
    task: Task, examples: Sequence[Example], batch_size: int, device: torch.device
) -> Iterable[Batch]:
    """The examples in their order, in batches on ``device``."""
    for start in range(0, len(examples), batch_size):
        part = [examples[i] for i in range(start, min(start + batch_size, len(examples)))]
        yield {key: value.to(device) for key, value in task.collate(part).items()}


class Trainer:
    """One run's training, which can be stopped after any step and gone on with.

    Args:
        model: ready to train (see `flatbench.models.adapt`); moved to the accelerator's device.
        optimizer: a resolved ``optimizer`` section.
        seed: the run's seed; data order and dropout are streams of it.

    Attributes:
        history: a row a logging step (step, epoch, loss, lr, step_seconds, perturbation_norm) or
            evaluation (step, epoch, validation.*). ``step_seconds`` is the time of forward passes,
            backward passes and update, without loading data, on average over the steps since the last such
            row.
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
        self.accelerator = make_accelerator(train)
        self.processes = processes.Processes(
            self.accelerator, train.accelerate.device if train.accelerate else None
        )
        self.processes.check(model)
        # a model with a device map takes its inputs where it begins; and the process that only looks for the
        # state from which others will go on leaves the model where it is
        placed = getattr(model, "hf_device_map", None) is not None or self.processes.size < train.processes
        self.device = next(model.parameters()).device if placed else self.accelerator.device
        self.sharded = train.sharded and self.processes.size > 1
        self.sampler = training_batches(task, splits.train, train, seed)
        self.examples = task.training_examples(splits.train, seed)
        self.loader = self._prepare_loader()
        # the model goes to its device before the optimizer takes hold of its parameters
        #: DeepSpeed's, where it divides the model
        self._engine: Any = None
        self.model = self._prepare_model(model, placed)
        # not asked for what is not wrapped: to look for DeepSpeed's wrapper, accelerate imports all of it
        wrapped = self.model is not model
        self.bare = self.accelerator.unwrap_model(self.model) if wrapped else model
        self.compiled = CompiledForward(self.bare, train.compile, lengths=task.lengths(()) is not None)
        self.parameters = factors.trainable_parameters(self.bare)
        self.shards = sharding.shards(self.parameters)
        self.buffers = dict(self.bare.named_buffers())
        #: steps of the whole training, the last epoch of which may end early
        self.total_steps = train.steps or len(self.sampler) * train.epochs
        self.epochs = math.ceil(self.total_steps / len(self.sampler))
        shards = list(self.shards.values())
        self.optimizer = build_optimizer(
            self.bare, optimizer, train, self.total_steps, seed, shards, len(splits.train)
        )
        self.alone = self._perturbs_alone()
        self.scheduler = self._build_scheduler(self.total_steps)
        self._start_records()

    def _perturbs_alone(self) -> bool:
        """Whether each process perturbs by its own part of the batch. InputError where there is but one."""
        alone = bool(getattr(self.optimizer, "m_sharpness", False))
        if alone and max(self.processes.size, self.options.processes) == 1:
            raise InputError(
                "optimizer.m_sharpness: each process perturbs by its own part of the batch, and this run has "
                "one process; set train.processes"
            )
        return alone

    def _build_scheduler(self, total_steps: int) -> Any:
        """The learning rate's course, on the base optimizer."""
        warmup = math.floor(self.options.warmup * total_steps)
        schedule = self.options.schedule
        name = "constant_with_warmup" if schedule == "constant" and warmup else schedule
        return get_scheduler(name, self.optimizer.base, warmup, total_steps)

    def _start_records(self) -> None:
        """Nothing is done yet, and from here on time, memory and energy are measured."""
        self.history: list[dict[str, Any]] = []
        self.epoch = 0
        self.step = 0
        self.seconds = 0.0
        #: seconds and steps since the last row of the history
        self._pending = (0.0, 0)
        #: whether half precision takes part, once that is known: to ask takes as long as a step of few layers
        self._half: bool | None = None
        #: where the streams of random numbers were, in a state that was saved within an epoch
        self._random: Mapping[str, Any] | None = None
        self.peak_memory = PeakMemory(self.device)
        self.stopwatch = Stopwatch(self.device)
        self.energy, self.core_wait = EnergyMeter(self.device, self._gpus()), CoreWait()
        #: where it was trained, each place once
        self._places = [environment.place(self.device)]

    def _gpus(self) -> list[int]:
        """The GPUs whose energy is this run's: those of the model, or one a process."""
        placed = getattr(self.bare, "hf_device_map", None) or {}
        own = sorted({place for place in placed.values() if isinstance(place, int)})
        return own if self.processes.size == 1 else [*range(self.processes.size)]

    def _prepare_model(self, model: nn.Module, placed: bool) -> nn.Module:
        """The model as accelerate trains it, on its device or in shards over those of all processes."""
        accelerate = self.options.accelerate
        if not self.sharded or accelerate is None:
            prepared: nn.Module = self.accelerator.prepare(model, device_placement=[not placed])
            return prepared
        self._engine = sharding.shard(model, accelerate, self.device, self.processes.size)
        # where what trains is divided too, nothing is left that DistributedDataParallel could average
        divided = bool(sharding.shards(factors.trainable_parameters(model)))
        prepared = self.accelerator.prepare_model(model, device_placement=False, evaluation_mode=divided)
        return prepared

    def _prepare_loader(self) -> DataLoader[Any]:
        """This process's batches, on its device."""
        loader = self._loader(self.processes.share(self.sampler))
        if self.processes.size == 1:
            prepared: DataLoader[Any] = self.accelerator.prepare(loader)
        else:  # as for one process: accelerate would divide among all what is divided already
            prepared = prepare_data_loader(loader, self.device, 1, 0, put_on_device=True)
        return prepared

    def _loader(self, batches: Any) -> DataLoader[Any]:
        """The training examples in batches, by `TrainOptions.workers` processes.

        Workers end with the epoch: ones that stayed would draw their seed once for all epochs, and a resumed
        run, which draws it again, would see other random numbers from there on.
        """
        dataset: Any = self.examples
        return DataLoader(
            dataset,
            batch_sampler=batches,
            collate_fn=self.task.collate,
            num_workers=self.options.workers,
            # page-locked memory, from which a GPU copies while it computes
            pin_memory=self.device.type == "cuda",
        )

    # -- resuming -----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that going on needs, as tensors, numbers, strings, lists and dicts."""
        self.optimizer.eval()
        self._collect_times()
        state = {
            "epoch": self.epoch,
            "step": self.step,
            "seconds": self.seconds,
            "unlogged": list(self._pending),
            "random": random_streams.state() if self._steps_of_epoch() else None,
            "peak_memory": self.peak_memory.bytes(),
            "energy": self.energy.state_dict(),
            "core_wait": self.core_wait.state_dict(),
            "places": self._places,
            "parameters": self.weights(),
            "buffers": {name: b.detach().cpu().clone() for name, b in self.buffers.items()},
            "optimizer": self._optimizer_state(),
            "scheduler": self.scheduler.state_dict(),
            "history": self.history,
        }
        self.optimizer.train()
        return state

    def weights(self) -> dict[str, Tensor]:
        """Copies on the CPU of what trains, whole; of a sharded model all processes have to ask for them."""
        return {name: sharding.whole(p).detach().cpu().clone() for name, p in self.parameters.items()}

    def _optimizer_state(self) -> dict[str, Any]:
        """Of divided parameters, each process has a state of its own: then a list of them, in the first."""
        state: dict[str, Any] = self.optimizer.state_dict()
        return {"shards": self.processes.gathered(state)} if self.shards else state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave. Raises ValueError if it cannot be gone on with here."""
        if state["random"] is not None:
            random_streams.check(state["random"])
        for own, stored in ((self.parameters, state["parameters"]), (self.buffers, state["buffers"])):
            for name, tensor in own.items():
                sharding.put(tensor, stored[name])
        if self.shards:
            self.optimizer.load_state_dict(state["optimizer"]["shards"][self.processes.rank])
        elif "shards" not in state["optimizer"]:  # which one process alone could not use
            self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(dict(state["scheduler"]))
        self.epoch, self.step, self.seconds = state["epoch"], state["step"], state["seconds"]
        self._pending, self._random = tuple(state["unlogged"]), state["random"]
        self.peak_memory.at_least(state["peak_memory"])
        # states of earlier versions have none of these
        self.energy.load_state_dict(state.get("energy"))
        self.core_wait.load_state_dict(state.get("core_wait"))
        self._places = list(dict.fromkeys([*state.get("places", ()), *self._places]))
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
        while self.epoch < self.epochs:
            self._train_epoch(after_step)
            self.epoch += 1
            every = self.options.evaluate_every
            if every and self.epoch % every == 0 and self.epoch < self.epochs:
                self._validate()
            after_epoch(self)
        self.optimizer.eval()

    def _steps_of_epoch(self) -> int:
        """Steps of the epoch under way that are done; none after a last epoch that ended early."""
        return max(self.step - self.epoch * len(self.sampler), 0)

    def _train_epoch(self, after_step: Callable[[Trainer], None]) -> None:
        self.energy.start()
        with self.core_wait:
            for _ in self._epoch_steps():
                self.energy.look()
                if self.step == self.total_steps:
                    break
                if self._steps_of_epoch() < len(self.sampler):
                    after_step(self)
        self.energy.stop()

    def steps(self) -> Iterator[None]:
        """Take a step for each item that is asked for, epoch after epoch, beyond the last one too."""
        while True:
            yield from self._epoch_steps()
            self.epoch += 1

    def elapsed(self) -> float:
        """Seconds that its steps took so far; waits for a GPU to have done them."""
        self._collect_times()
        return self.seconds + self._pending[0]

    def _epoch_steps(self) -> Iterator[None]:
        """Take the epoch's steps that are left, and stop after each."""
        self.sampler.epoch, self.sampler.skip = self.epoch, self._steps_of_epoch()
        if hasattr(self.examples, "epoch"):
            self.examples.epoch = self.epoch
        if not self.sampler.skip:
            # one seed an epoch: dropout after resuming is what it would have been
            place = (self.processes.rank,) if self.processes.rank else ()
            set_seed(derive_seed(self.seed, "dropout", self.epoch, *place) % 2**32)
        self.model.train()
        self.optimizer.train()
        if self._half is None:
            self._half = computes_in_half(self.model)
        for batch, counted in zip(self.loader, self.processes.counted(self.sampler), strict=False):
            if self._random is not None:  # here, because making the loader's iterator draws a number too
                random_streams.restore(self._random)
                self._random = None
            self._train_step(batch, counted)
            yield

    def _train_step(self, batch: Batch, counted: bool = True) -> None:
        self.stopwatch.start()
        rate = self.scheduler.get_last_lr()[0]
        parts = micro_batches(batch, self.options.micro_batch_size)
        terms = [self.task.terms(part) for part in parts]
        if self.sharded:  # every pass gathers weights from all processes: they take as many, some for nothing
            missing = self.processes.most(len(parts), self.device) - len(parts)
            parts, terms = [*parts, *parts[-1:] * missing], [*terms, *[0] * missing]
        weights = self.processes.weights(terms, counted, self.device)
        self.optimizer.zero_grad()  # what is not there need not be watched while the closure adds its own
        with precision_known(self._half):
            loss = self.optimizer.step(lambda: self._backward(parts, weights))
        self.scheduler.step()
        self.step += 1
        due = self.step % self.options.log_every == 0 or self.step % len(self.sampler) == 0
        due = due or self.step == self.total_steps
        value = float(self.processes.mean(loss)) if due else 0.0
        self.stopwatch.stop()
        if due:
            self._collect_times()
            seconds, steps = self._pending
            self.seconds += seconds
            self._pending = (0.0, 0)
            self._log(value, rate, seconds / steps)

    def _collect_times(self) -> None:
        taken = self.stopwatch.take()
        seconds, steps = self._pending
        self._pending = seconds + sum(taken), steps + len(taken)

    def _backward(self, parts: Sequence[Batch], weights: Sequence[Any]) -> Tensor:
        """Leave the gradient of the batch's mean loss in the parameters, and return that loss.

        With several processes the gradient is that of the joint batch, and the loss is to be averaged; for
        m-sharpness both are the process's own.
        """
        self.optimizer.zero_grad()
        total = torch.zeros((), device=self.device)
        for i, (part, weight) in enumerate(zip(parts, weights, strict=True), start=1):
            # the forward pass too is inside: there DDP gets ready to exchange gradients
            more = i < len(parts) or self.alone
            with self.accelerator.no_sync(self.model) if more else contextlib.nullcontext():
                with self.compiled.active():
                    loss = self.task.loss(self.model, part)
                if weight is not None:  # so that a ragged last part counts for what it holds
                    loss = loss * weight
                self.accelerator.backward(loss)
            total += loss.detach()
        sharding.take_gradients(self.parameters, self.shards)
        if self._engine is not None:  # weights that it left gathered would not move with their parts
            deepspeed.release(self.bare)
        return total

    # -- recording ----------------------------------------------------------------------------------------

    def _log(self, loss: float, rate: float, step_seconds: float) -> None:
        norm = float(self.optimizer.perturbation_norm)
        if not math.isfinite(loss):
            raise DivergedError(f"the loss is {loss} at step {self.step} (epoch {self.epoch + 1})")
        place = {"step": self.step, "epoch": self.epoch + 1, "loss": loss, "lr": rate}
        self.history.append({**place, "step_seconds": step_seconds, "perturbation_norm": norm})

    def _validate(self) -> None:
        self.optimizer.eval()
        batches = fixed_batches(self.task, self.splits.validation, self.options.eval_batch_size, self.device)
        metrics = self.task.evaluate(self.bare, batches)
        if self.sharded:
            sharding.reshard(self.bare)
        named = {f"validation.{key}": value for key, value in metrics.items()}
        self.history.append({"step": self.step, "epoch": self.epoch, **named})
        self.optimizer.train()

    def cost(self) -> dict[str, Any]:
        """What `flatbench.subject.subject.Subject.training` describes."""
        seconds = [row["step_seconds"] for row in self.history if "step_seconds" in row]
        return {
            "step_seconds": seconds,
            "train_seconds": self.seconds,
            "gradients_per_step": self.optimizer.gradients_per_step,
            "skipped_perturbations": int(self.optimizer.skipped_perturbations),
            "peak_memory_bytes": self.peak_memory.bytes(),
            "peak_memory_source": self.peak_memory.source,
            "trainable_parameters": sharding.count(p for p in self.parameters.values() if p.requires_grad),
            "clock": self.stopwatch.clock,
            "device": "; ".join(self._places),
            "threads": torch.get_num_threads(),
            "energy_joules": self.energy.joules,
            "energy_source": self.energy.source,
            "energy_missing": self.energy.missing,
            "core_wait_share": self.core_wait.share,
        }
