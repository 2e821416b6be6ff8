"""A run directory in, its task, data and model out: as they were at its start, or as it was trained."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flatbench import tasks
from flatbench.config.sections import AdapterOptions, TrainOptions
from flatbench.errors import InputError
from flatbench.machine.device import device
from flatbench.models import weights
from flatbench.models.adapt import adapt, start_digest, start_from
from flatbench.seeding import derive_seed
from flatbench.store import RunDirectory
from flatbench.tasks.base import Splits, Task


@dataclass
class OpenRun:
    """A run's task, data and model as its configuration describes them.

    Attributes:
        model: pretrained weights and a fresh adapter, or what was trained if it was loaded.
    """

    config: Mapping[str, Any]
    task: Task
    splits: Splits
    model: nn.Module

    @property
    def train(self) -> TrainOptions:
        """The ``train`` section."""
        return TrainOptions.model_validate(self.config["train"])

    @property
    def target_modules(self) -> list[str]:
        """Names of the modules that the study's adapter treats, for full fine-tuning too."""
        adapter = self.config["adapter"]
        if adapter.get("target"):  # the model itself tells, whose layers were made for it
            return []
        return list(adapter["target_modules"] or self.task.target_modules)


@functools.lru_cache(maxsize=2)
def _task(description: str) -> Task:
    """Tasks are kept: a worker makes many runs of one task, and reading or tokenising it takes seconds."""
    task, model = json.loads(description)
    return tasks.load(task, model)


def open_run(
    directory: RunDirectory, trained: bool, adapter: AdapterOptions | None = None, spread: bool = True
) -> OpenRun:
    """Open a run directory.

    Args:
        trained: load what was trained; otherwise the model is at its start.
        adapter: another adapter than the run's, at its start.
        spread: heed the study's ``model.device_map``; otherwise the model is where it is to be divided from.

    Raises:
        InputError: no run directory, no trained weights, or damaged ones.
    """
    config = directory.spec()["config"]
    if trained:
        weights.check(directory.adapter)
        written = (directory.result() or {}).get("weights")
        if written not in (None, weights.saved_digest(directory.adapter)):
            raise InputError(
                f"{weights.weights_file(directory.adapter)}: not the safetensors file that this run wrote; "
                "train it again with --fresh"
            )
    model_options = config["model"]
    if not spread:
        model_options = {k: v for k, v in model_options.items() if k != "device_map"}
    described = json.dumps([config["task"], model_options])
    task, data = _task(described), directory.spec()["data"]
    same = task.fingerprint() == data
    if not same:  # a task of before: its files have changed since
        _task.cache_clear()
        task = _task(described)
        same = task.fingerprint() == data
    if not same:
        raise InputError(
            f"{directory.path}: its data or its pretrained model is not what it was when the run was made; "
            "put it back, or run the study again, which makes new runs"
        )
    seed = config["seed"]
    model = task.build_model(seed)
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(seed, "initialisation", "adapter"))
        options = adapter or AdapterOptions.model_validate(config["adapter"])
        model = adapted(task, model, options)
    if trained:
        weights.load(model, directory.adapter)
    elif options.init_from is not None:
        if start_digest(options) != config["adapter_start"]:
            raise InputError(
                f"adapter.init_from: {options.init_from}: not the weights that were there when the run was "
                "made; put them back, or run the study again, which makes new runs"
            )
        start_from(model, Path(options.init_from).expanduser())
    return OpenRun(config, task, task.splits(seed), model)


def train_options(directory: RunDirectory) -> TrainOptions:
    """A run's ``train`` section, with the smaller micro-batch that it went on with if memory ran out."""
    options = TrainOptions.model_validate(directory.spec()["config"]["train"])
    smaller = (directory.environment() or {}).get("micro_batch_size")
    return options if smaller is None else options.model_copy(update={"micro_batch_size": smaller})


def adapted(task: Task, model: nn.Module, options: AdapterOptions) -> nn.Module:
    """A task's model under an adapter, on the modules that the study names, or else the task."""
    # a task may know no modules to adapt in its model; the study names them then
    named = options.name == "none" or options.target is not None
    targets = options.target_modules or ([] if named else task.target_modules)
    return adapt(model, options, targets, task.modules_to_save)


def place(model: nn.Module) -> torch.device:
    """Put a model on its device, unless its study says where it lies; where its inputs go."""
    if getattr(model, "hf_device_map", None) is not None:
        return next(model.parameters()).device
    model.to(device())
    return device()
