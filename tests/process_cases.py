"""A small problem whose loss is a mean over unequal numbers of terms, and what a group of processes does."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import TokenClassifierOutput

from flatbench import optim, store, study
from flatbench.config.sections import TrainOptions
from flatbench.distributed import shards
from flatbench.store import training_state
from flatbench.study import plan
from flatbench.tasks.base import Example, Splits, Task
from flatbench.training.trainer import Trainer
from tests.conftest import SMALL

#: two whole batches, and one of two examples: of three processes, the last gets none
EXAMPLES, BATCH = 18, 8
#: of which looksam's sixth step is its second of two gradients, and swa averages the last
EPOCHS, STEPS = 2, 6
METHODS = optim.REGISTRY.names()
PER_PROCESS = ["sam", "asam", "gsam", "flat_lora"]
#: adapter and method: all methods that can train a model in shards
IN_SHARDS = [
    *(("lora", name) for name in METHODS),
    *(
        ("none", name)
        for name in METHODS
        if not optim.REGISTRY.load(name).needs_adapter and name != "ivon"  # which refuses parts
    ),
    ("dora", "sam"),
]
#: methods of each kind, which are tried with a second configuration
KEPT = ["plain", "sam", "flat_lora_rwp", "eflat_lora", "ema"]


def in_shards(by: str, size: int) -> list[tuple[str, str, bool]]:
    """What a group trains with a divider: adapter, method, and whether it does so a second time.

    Two processes do everything. Three leave out what others of theirs show: methods that know nothing of an
    adapter under one, and with DeepSpeed all but some without one, where each works on parts as with FSDP.
    """
    found = []
    for adapter, name in IN_SHARDS:
        some = name in {*KEPT, *PER_PROCESS} or adapter == "dora"
        own = optim.REGISTRY.load(name).needs_adapter or (adapter == "none" and by == "fsdp")
        if size == 2 or some or own:
            found += [(adapter, name, again) for again in ((False, True) if name in KEPT else (False,))]
    return found


def fsdp(**config: Any) -> dict[str, Any]:
    """A configuration of accelerate under which every linear layer of `Net` is a unit of its own."""
    own = {"fsdp_version": 2, "fsdp_auto_wrap_policy": "SIZE_BASED_WRAP", "fsdp_min_num_params": 20}
    return {"distributed_type": "FSDP", "fsdp_config": {**own, **config}}


def deepspeed(**config: Any) -> dict[str, Any]:
    """A configuration of accelerate for stage 3 of DeepSpeed."""
    return {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 3, **config}}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)
        self.dropout = nn.Dropout(0.0)

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        logits = self.head(torch.tanh(self.second(self.dropout(torch.tanh(self.first(x))))))
        return TokenClassifierOutput(loss=nn.functional.cross_entropy(logits.mT, labels), logits=logits)


class Ragged(Task):
    """Rows of five labels of which one to five count."""

    metric = "accuracy"
    target_modules = ("first", "second")

    def __init__(self, adapter: str = "lora") -> None:
        self.adapter = adapter

    def fingerprint(self) -> str:
        return "ragged"

    def splits(self, seed: int) -> Splits:
        generator = torch.Generator().manual_seed(seed)
        rows = []
        for i in range(EXAMPLES):
            labels = torch.randint(0, 3, (5,), generator=generator)
            labels[1 + i % 5 :] = -100
            rows.append({"x": torch.randn(5, 6, generator=generator, dtype=torch.float64), "labels": labels})
        return Splits(rows, rows, rows)

    def build_model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        if self.adapter == "none":
            return Net().double()
        config = peft.LoraConfig(
            r=2,
            lora_alpha=4,
            target_modules=["first", "second"],
            modules_to_save=["head"],
            use_dora=self.adapter == "dora",
        )
        return peft.get_peft_model(Net(), config).double()

    def collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        return {key: torch.stack([example[key] for example in examples]) for key in examples[0]}

    def metrics(self, logits: Tensor, labels: Tensor) -> dict[str, float]:
        return {}

    def terms(self, batch: Any) -> int:
        return int((batch["labels"] != -100).sum())


def trainer_of(name: str, base: str = "adamw", adapter: str = "lora", **options: Any) -> Trainer:
    """A method with its defaults, in batches of unequal terms."""
    known = optim.REGISTRY.options(name).model_fields
    values = {key: field.default for key, field in known.items()}
    if name == "ema":
        values["decay"] = 0.5
    own = {key: options.pop(key) for key in list(options) if key in known}
    spec = {"name": name, **values, **own, "base": {"name": base, **_momentum(name, base)}}
    train = TrainOptions(epochs=EPOCHS, batch_size=BATCH, lr=1e-2, log_every=1, max_grad_norm=0.5, **options)
    task = Ragged(adapter)
    return Trainer(task, task.build_model(0), task.splits(0), train, spec, 0)


def _momentum(name: str, base: str) -> dict[str, float]:
    return {"momentum": 0.9} if base == "sgd" and name in ("msam", "lora_mgpo") else {}


def whole(name: str) -> list[tuple[str, int | None]]:
    """The base optimizers and micro-batches with which a group trains a method.

    Micro-batches change gradients, which are then the same for any base.
    """
    if name == "lora_fa":
        return [("adamw", None), ("adamw", 2)]
    return [("sgd", None), ("sgd", 2), ("adamw", None)]


def base_of(name: str) -> str:
    # Adam divides by what is near zero, which makes any rounding large; LoRA-FA is an Adam itself
    return "adamw" if name == "lora_fa" else "sgd"


def trained(trainer: Trainer) -> dict[str, Any]:
    trainer.run()
    # compared with one process it is what was reached; the clock is not
    history = [{k: v for k, v in row.items() if k != "step_seconds"} for row in trainer.history]
    return {"parameters": trainer.weights(), "history": history}


@functools.cache
def alone(name: str, base: str, adapter: str = "lora", evaluate_every: int = 0) -> dict[str, Any]:
    """What one process trains; how many numbers of the model it does not train, and how many it does."""
    trainer = trainer_of(name, base, adapter, evaluate_every=evaluate_every)
    trains = [] if adapter == "none" else list(trainer.parameters)
    still = sum(p.numel() for key, p in trainer.bare.named_parameters() if key not in trains)
    return {**trained(trainer), "still": still, "count": trainer.cost()["trainable_parameters"]}


def prepared(
    folder: Path, method: str, processes: int, config: dict[str, Any] | None = None
) -> store.RunDirectory:
    """A small run by several processes, with a configuration of accelerate."""
    train = {**SMALL["train"], "batch_size": 16, "processes": processes, "evaluate_every": 1}
    if config is not None:
        train["accelerate"] = config
    loaded = study.Study({**SMALL, "methods": [method], "train": train}, "small.yaml")
    (run, *_) = plan.Plan(loaded, store.StudyFolder(folder, "small")).final([])
    directory = store.StudyFolder(folder, "small").run(run.id)
    directory.prepare(run.spec())
    return directory


def everything(folder: Path) -> None:
    """Every method by this group of processes, into a file for each method and process."""
    for name in METHODS:
        for base, micro in whole(name):
            trainer = trainer_of(name, base, micro_batch_size=micro)
            rank = trainer.processes.rank
            training_state.save(folder / f"{name}-{base}-{micro}-{rank}", trained(trainer))
    for name in PER_PROCESS:
        trainer = trainer_of(name, "sgd", m_sharpness=True)
        training_state.save(folder / f"{name}-m_sharpness-{trainer.processes.rank}", trained(trainer))


def everything_by_fsdp(folder: Path) -> None:
    """Every method by this group with the model in torch's shards, under an adapter and without one."""
    everything_in_shards(folder, "fsdp", fsdp(), fsdp(fsdp_reshard_after_forward=False))


def everything_by_deepspeed(folder: Path) -> None:
    """The same with the model in DeepSpeed's shards."""
    everything_in_shards(folder, "deepspeed", deepspeed(), deepspeed(offload_param_device="cpu"))


def everything_in_shards(folder: Path, by: str, usual: dict[str, Any], other: dict[str, Any]) -> None:
    """What `in_shards` lists, by this group; the second time in micro-batches, with evaluations.

    Args:
        by: what divides the model.
        usual: a configuration of accelerate that divides the model.
        other: another one, for the second time.
    """
    size = int(os.environ["WORLD_SIZE"])
    for adapter, name, again in in_shards(by, size):
        trainer = trainer_of(
            name,
            base_of(name),
            adapter,
            processes=size,
            accelerate=other if again else usual,
            micro_batch_size=2 if again else None,
            evaluate_every=int(again),
        )
        training_state.save(folder / f"{name}-{adapter}-{again}-{trainer.processes.rank}", sharded(trainer))
    for interrupted in (False, True):
        trainer = one_that_goes_on(folder, usual, interrupted)
        training_state.save(folder / f"interrupted-{interrupted}-{trainer.processes.rank}", trained(trainer))
    for name in PER_PROCESS:
        for accelerate in (None, usual):
            trainer = trainer_of(name, "sgd", processes=size, accelerate=accelerate, m_sharpness=True)
            kind = "whole" if accelerate is None else "shards"
            training_state.save(
                folder / f"{name}-m_sharpness-{kind}-{trainer.processes.rank}", trained(trainer)
            )


class Interrupted(Exception):
    pass


def one_that_goes_on(folder: Path, accelerate: dict[str, Any], interrupted: bool) -> Trainer:
    """One whose parameters, averages and moments are all in shards; from the state after its first epoch."""

    def make() -> Trainer:
        size = int(os.environ["WORLD_SIZE"])
        return trainer_of("ema", "adamw", "none", processes=size, accelerate=accelerate)

    def stop(trainer: Trainer) -> None:
        saved = trainer.state_dict()
        if trainer.processes.main:
            training_state.save(folder / "state", saved)
        torch.distributed.barrier()
        raise Interrupted

    trainer = make()
    if interrupted:
        with contextlib.suppress(Interrupted):
            trainer.run(stop)
        trainer = make()
        trainer.load_state_dict(training_state.load(folder / "state"))
        assert trainer.epoch == 1
    return trainer


def sharded(trainer: Trainer) -> dict[str, Any]:
    """What was trained, whole, and how much of the model lay in this process."""
    found = trained(trainer)
    own, parameters = 0, dict(trainer.bare.named_parameters())
    for name, p in parameters.items():
        if shards.is_divided(p):
            own += shards.own(p).numel()
        else:
            assert name in trainer.parameters, "what does not train is in shards"
    return {**found, "own": own, "count": trainer.cost()["trainable_parameters"]}
