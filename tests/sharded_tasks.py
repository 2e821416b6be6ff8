"""The models of all tasks in shards, over a group of processes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import process_cases
import torch
from task_cases import CASES

from flatbench import opening, optim, state
from flatbench.options import AdapterOptions, TrainOptions
from flatbench.training import Trainer


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


#: adapter and task: the scale that CLIP trains without an adapter cannot be divided
TASKS = [
    (adapter, name)
    for name in CASES
    for adapter in ("lora", "none")
    if (adapter, name) != ("none", "clip_classification")
]


def tasks_in_shards(folder: Path) -> None:
    """Every task by this group, its model's layers in shards."""
    size, rank = int(os.environ["WORLD_SIZE"]), os.environ["RANK"]
    layers = process_cases.fsdp(fsdp_auto_wrap_policy="TRANSFORMER_BASED_WRAP")
    # before there is a group, in which transformers would save models in the first process alone
    made = {name: make(folder / f"{name}-{rank}") for name, make in CASES.items()}
    for adapter, name in TASKS:
        trainer = of_task(name, made[name], adapter, processes=size, accelerate=layers)
        state.save(folder / f"{name}-{adapter}-{rank}.state", process_cases.trained(trainer))
