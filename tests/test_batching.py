"""Which examples make up a batch: every one once an epoch, found again after an interruption."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from torch import Tensor, nn
from transformers import GPT2LMHeadModel

from flatbench.config.sections import TrainOptions
from flatbench.curvature.operators.losses import computes_in_half
from flatbench.errors import InputError
from flatbench.machine import stopping
from flatbench.runs import open as opening
from flatbench.runs.finish import finish
from flatbench.store import RunDirectory
from flatbench.training.batches import POOLED, LengthGroupedBatches, ShuffledBatches
from flatbench.training.trainer import Trainer
from tests.tasks.task_cases import CASES, gpt2_folder, write_gsm8k
from tests.test_runner import prepared, stable


def lengths_of(count: int, seed: int = 0) -> list[int]:
    generator = random.Random(seed)
    return [generator.randint(1, 100) for _ in range(count)]


def epoch(sampler: ShuffledBatches, number: int) -> list[list[int]]:
    sampler.epoch = number
    return list(sampler)


def padding(batches: list[list[int]], lengths: list[int]) -> float:
    """Share of padded places among all."""
    places = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    return 1 - sum(lengths) / places


@pytest.mark.parametrize("count", [1, 7, 8, 400, 403, 8 * POOLED * 2 + 5])
def test_every_example_once_an_epoch_and_few_batches_that_are_not_full(count: int) -> None:
    sampler = LengthGroupedBatches(lengths_of(count), 8, seed=3)
    for number in (0, 1):
        batches = epoch(sampler, number)
        assert sorted(i for batch in batches for i in batch) == list(range(count))
        assert len(batches) == len(sampler)
        assert sum(len(batch) < 8 for batch in batches) == bool(count % 8)


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    lengths = lengths_of(500)
    whole = LengthGroupedBatches(lengths, 8, seed=3)
    first, second = epoch(whole, 0), epoch(whole, 1)
    assert first != second
    assert epoch(LengthGroupedBatches(lengths, 8, seed=3), 1) == second  # as after an interruption
    assert epoch(LengthGroupedBatches(lengths, 8, seed=4), 0) != first


@pytest.mark.parametrize("kind", [ShuffledBatches, LengthGroupedBatches])
def test_an_epoch_goes_on_where_it_was_interrupted(kind: Any) -> None:
    given = 100 if kind is ShuffledBatches else lengths_of(100)
    whole, resumed = kind(given, 8, seed=3), kind(given, 8, seed=3)
    resumed.skip = 5
    assert epoch(resumed, 2) == epoch(whole, 2)[5:]
    assert len(resumed) == len(whole) == 13


def test_batches_are_of_alike_length_and_come_in_no_order_of_it() -> None:
    lengths = lengths_of(2000)
    grouped = epoch(LengthGroupedBatches(lengths, 8, seed=0), 0)
    shuffled = epoch(ShuffledBatches(2000, 8, seed=0), 0)
    assert padding(grouped, lengths) < 0.05 < 0.3 < padding(shuffled, lengths)
    longest = pd.Series([max(lengths[i] for i in batch) for batch in grouped])
    assert abs(longest.corr(pd.Series(range(len(longest))))) < 0.3


def test_lengths_are_what_is_padded(tmp_path: Path) -> None:
    """A batch is as wide as its longest example, for every task with lengths (dynamic padding)."""
    found = 0
    for name in CASES:
        task = CASES[name](tmp_path / name).task()
        examples = task.splits(0).train
        lengths = task.lengths(examples)
        assert (lengths is None) == (task.lengths(()) is None)
        if lengths is None:
            continue
        found += 1
        assert len(lengths) == len(examples)
        assert len(set(lengths)) > 1
        for chosen in ([0], [1, 2], list(range(5))):
            batch = task.collate([examples[i] for i in chosen])
            assert batch["input_ids"].shape == (len(chosen), max(lengths[i] for i in chosen))
            counts: Tensor = batch["attention_mask"].sum(-1)
            assert counts.tolist() == [lengths[i] for i in chosen]
    assert found == 5


def test_a_task_without_lengths_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="group_by_length: the examples of Digits have no lengths"):
        prepared(tmp_path, train={"group_by_length": True})


def text_study(folder: Path, **train: Any) -> dict[str, Any]:
    if not (folder / "gpt2").is_dir():
        gpt2_folder(folder / "gpt2", GPT2LMHeadModel, resid_pdrop=0.1)
        write_gsm8k(folder / "data")
    return {
        "task": {
            "name": "causal_lm",
            "dataset": "gsm8k",
            "data": str(folder / "data"),
            "max_length": 64,
            "validation_examples": 10,
            "generation": None,
        },
        "model": {"name_or_path": str(folder / "gpt2")},
        "train": {"epochs": 2, "batch_size": 4, "lr": 1e-2, "log_every": 1, "threads": 1, **train},
        "measures": [],
    }


def finished(folder: Path, content: dict[str, Any], method: str = "lora") -> RunDirectory:
    directory = prepared(folder, method, **content)
    assert finish(directory.path) == "done"
    return directory


@pytest.mark.slow
def test_a_grouped_run_that_is_resumed_ends_as_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped within epochs and between them, with batches made beside and dropout."""
    content = text_study(tmp_path, group_by_length=True, workers=1)
    whole = finished(tmp_path / "whole", content)
    cut = prepared(tmp_path / "cut", **content)
    steps, real = {3, 8, 13}, Trainer._train_step

    def step(trainer: Trainer, *given: Any) -> None:
        real(trainer, *given)
        if trainer.step in steps:
            steps.discard(trainer.step)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Trainer, "_train_step", step)
    stops = 0
    with stopping.heeded():
        while cut.state() != "done":
            try:
                assert finish(cut.path) == "done"
            except stopping.Stopped:
                stops += 1
                stopping.forget()
    assert stops == 3
    assert stable(cut) == stable(whole)


@pytest.mark.slow
def test_grouping_changes_the_order_and_workers_change_nothing(tmp_path: Path) -> None:
    plain = stable(finished(tmp_path / "plain", text_study(tmp_path)))
    beside = stable(finished(tmp_path / "beside", text_study(tmp_path, workers=2)))
    grouped = stable(finished(tmp_path / "grouped", text_study(tmp_path, group_by_length=True)))
    assert beside == plain
    assert grouped["weights"] != plain["weights"]


def test_memory_is_pinned_where_there_is_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = prepared(tmp_path)
    run = opening.open_run(directory, trained=False)
    trainer = Trainer(run.task, run.model, run.splits, run.train, run.config["optimizer"], 0)
    assert trainer.accelerator.dataloader_config.non_blocking
    found = []
    for kind in ("cpu", "cuda"):
        trainer.device = type("Device", (), {"type": kind})()
        found.append(trainer._loader(trainer.sampler).pin_memory)
    assert found == [False, True]


def test_parameters_are_asked_for_their_precision_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To walk over all of a model's parameters in each step took a tenth of a small model's step."""
    directory = prepared(tmp_path)
    run = opening.open_run(directory, trained=False)
    trainer = Trainer(run.task, run.model, run.splits, run.train, run.config["optimizer"], 0)
    asked = []

    def ask(model: nn.Module) -> bool:
        asked.append(trainer.step)
        return computes_in_half(model)

    for module in ("flatbench.training.trainer", "flatbench.curvature.operators.losses"):
        monkeypatch.setattr(f"{module}.computes_in_half", ask)
    trainer.run(lambda _: None)
    assert trainer.total_steps > len(trainer.sampler) > 1
    assert asked == [0]


def test_new_options_at_their_defaults_are_not_hashed() -> None:
    dumped = TrainOptions().model_dump()
    assert not {"group_by_length", "workers", "compile"} & set(dumped)
