"""The models of all tasks in shards, over a group of processes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from flatbench import optim
from flatbench.config.sections import AdapterOptions, TrainOptions
from flatbench.runs import open as opening
from flatbench.store import training_state
from flatbench.training.trainer import Trainer
from tests import process_cases
from tests.tasks.task_cases import CASES


def of_task(name: str, case: Any, adapter: str, **options: Any) -> Trainer:
    """A task of the contract suite, without dropout, of which each process has another."""
    torch.manual_seed(0)
    task = case.task()
    model = opening.adapted(task, task.build_model(0), AdapterOptions(name=adapter, r=2))
    for module in model.modules():
        for part, key in ((module, "p"), (module, "dropout_prob"), (module, "attention_dropout")):
            if isinstance(getattr(part, key, None), float):
                setattr(part, key, 0.0)
    method = "flat_lora_rwp" if adapter == "lora" else "sam"
    known = optim.REGISTRY.options(method).model_fields
    spec = {"name": method, **{key: field.default for key, field in known.items()}, "base": {"name": "sgd"}}
    train = TrainOptions(epochs=1, batch_size=6, lr=1e-1, log_every=1, evaluate_every=1, **options)
    return Trainer(task, model, task.splits(0), train, spec, 0)


TASKS = [(adapter, name) for name in CASES for adapter in ("lora", "none")]
#: torch's FSDP cannot divide the scale that CLIP trains without an adapter
BY_FSDP = [case for case in TASKS if case != ("none", "clip_classification")]


def by_fsdp(folder: Path) -> None:
    """Every task by this group, its model's layers in torch's shards."""
    layers = process_cases.fsdp(fsdp_auto_wrap_policy="TRANSFORMER_BASED_WRAP")
    tasks_in_shards(folder, BY_FSDP, layers)


def by_deepspeed(folder: Path) -> None:
    """Every task by this group, its model in DeepSpeed's shards."""
    tasks_in_shards(folder, TASKS, process_cases.deepspeed())


def tasks_in_shards(folder: Path, cases: list[tuple[str, str]], accelerate: dict[str, Any]) -> None:
    """Every task by this group, its model divided as a configuration of accelerate says."""
    size, rank = int(os.environ["WORLD_SIZE"]), os.environ["RANK"]
    # before there is a group, in which transformers would save models in the first process alone
    made = {name: make(folder / f"{name}-{rank}") for name, make in CASES.items()}
    for adapter, name in cases:
        trainer = of_task(name, made[name], adapter, processes=size, accelerate=accelerate)
        training_state.save(folder / f"{name}-{adapter}-{rank}.state", process_cases.trained(trainer))
