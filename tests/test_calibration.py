"""Steps of a method and of plain LoRA in turns: what is timed, and that the run does not notice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flatbench import store, study
from flatbench.config.sections import AdapterOptions
from flatbench.errors import DivergedError, InputError, NotApplicableError
from flatbench.machine import random_streams
from flatbench.runs import measure as measuring
from flatbench.runs import paired_cost, resume
from flatbench.runs.finish import finish
from flatbench.store import RunDirectory
from flatbench.study import plan
from tests.conftest import SMALL
from tests.test_runner import prepared, stable

pytestmark = pytest.mark.slow


PAIRED = {"name": "cost", "paired": True, "pairs": 3}


def finished(tmp_path: Path, method: Any = "lora", **changes: Any) -> dict[str, Any]:
    directory = prepared(tmp_path, method, **changes)
    assert finish(directory.path) == "done"
    return directory.measures()["cost"]["values"]


@pytest.mark.parametrize(
    "method",
    [
        pytest.param("sam", marks=pytest.mark.long),
        pytest.param("full_ft", marks=pytest.mark.long),
        "eflat_lora",
        {"name": "dora", "adapter": "dora", "optimizer": "plain"},
    ],
)
def test_the_run_finds_the_same_with_it(tmp_path: Path, method: Any) -> None:
    alone = prepared(tmp_path / "alone", method)
    beside = prepared(tmp_path / "beside", method, cost="paired")
    assert alone.id == beside.id
    for directory in (alone, beside):
        assert finish(directory.path) == "done"
    assert stable(alone) == stable(beside)
    ours, theirs = (d.measures()["cost"]["values"] for d in (alone, beside))
    assert ours.keys() < theirs.keys()
    assert ours["gflops_per_example"] == theirs["gflops_per_example"]
    assert theirs["paired_pairs"] == 15
    assert theirs["paired_ratio_q1"] <= theirs["paired_ratio"] <= theirs["paired_ratio_q3"]


def test_lora_beside_lora_takes_about_its_time(tmp_path: Path) -> None:
    found = finished(tmp_path, measures=[PAIRED])
    assert 0.3 < found["paired_ratio"] < 3
    assert found["paired_gradients_per_step"] == 1
    assert found["paired_reference"] == "LoRA of rank 2"
    assert found["paired_step_ms"] > 0
    assert found["paired_lora_step_ms"] > 0


@pytest.mark.parametrize(
    ("optimizer", "block", "gradients"),
    [
        ({"name": "sam"}, 4, 2),
        ({"name": "sam", "every": 3}, 6, 4 / 3),
        ({"name": "sam", "every": 5}, 5, 6 / 5),
        ({"name": "eflat_lora"}, 4, 1),
    ],
)
def test_a_block_holds_whole_periods_of_the_method(
    tmp_path: Path, optimizer: dict[str, Any], block: int, gradients: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paired_cost, "_BLOCK_SECONDS", 0.0)
    found = finished(tmp_path, {"name": "m", "optimizer": optimizer}, measures=[PAIRED])
    assert found["paired_block"] == block
    assert found["paired_gradients_per_step"] == pytest.approx(gradients)


def test_blocks_alternate_and_the_first_of_a_pair_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Times that are made up: the machine gets slower all the time, and the ratio does not see it."""
    order: list[str] = []
    seconds = {"sam": 2.0, "plain": 1.0}

    def block(side: Any, steps: int) -> float:
        name = "plain" if type(side.trainer.optimizer).__name__ == "Plain" else "sam"
        order.append(name)
        return seconds[name] * 1.02 ** len(order)

    monkeypatch.setattr(paired_cost._TimedMethod, "block", block)
    directory = prepared(tmp_path, "sam")
    found = paired_cost.paired(directory, 5)
    assert order == [
        "sam",
        "plain",
        "sam",
        "plain",
        "plain",
        "sam",
        "sam",
        "plain",
        "plain",
        "sam",
        "sam",
        "plain",
    ]
    assert found["paired_ratio"] == pytest.approx(2.0, rel=0.021)
    assert found["paired_ratio_q1"] < 2.0 < found["paired_ratio_q3"]


def test_blocks_of_short_steps_are_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paired_cost._TimedMethod, "block", lambda side, steps: steps / 1024)
    assert paired_cost.paired(prepared(tmp_path, "sam"), 3)["paired_block"] == 103


def test_both_sides_see_the_same_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[int, list[float]] = {}
    step = resume.Trainer._train_step

    def watched(trainer: Any, batch: Any, counted: bool = True) -> None:
        seen.setdefault(id(trainer), []).append(float(batch["pixel_values"].double().sum()))
        step(trainer, batch, counted)

    monkeypatch.setattr(paired_cost, "_BLOCK_SECONDS", 0.0)
    monkeypatch.setattr(resume.Trainer, "_train_step", watched)
    paired_cost.paired(prepared(tmp_path, "sam"), 3)
    first, second = seen.values()
    assert first == second
    assert len(first) == 16


def test_random_numbers_and_files_are_left_as_they_were(tmp_path: Path) -> None:
    directory = prepared(tmp_path, "sam")
    before = random_streams.state()
    found = sorted(directory.path.rglob("*"))
    paired_cost.paired(directory, 3)
    after = random_streams.state()
    assert torch.equal(before.pop("torch"), after.pop("torch"))
    assert before == after
    assert sorted(directory.path.rglob("*")) == found


def test_with_the_smaller_micro_batch_that_memory_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    made = paired_cost.Trainer.__init__

    def watched(trainer: Any, *arguments: Any) -> None:
        made(trainer, *arguments)
        sizes.append(trainer.options.micro_batch_size)

    monkeypatch.setattr(paired_cost.Trainer, "__init__", watched)
    directory = prepared(tmp_path, "sam")
    directory.write("environment", {"micro_batch_size": 4})
    paired_cost.paired(directory, 3)
    assert sizes == [4, 4]


def test_interrupted_it_is_taken_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = prepared(tmp_path, "sam", measures=[PAIRED])
    with monkeypatch.context() as patch:
        patch.setattr(paired_cost, "_time_blocks", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            finish(directory.path)
    assert directory.state() == "trained"
    weights = (directory.result() or {})["weights"]
    assert finish(directory.path) == "done"
    assert (directory.result() or {})["weights"] == weights
    assert directory.measures()["cost"]["values"]["paired_ratio"] > 0


# -- where there is none ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "reason"),
    [(MemoryError(), "memory ran out"), (DivergedError("the loss is nan"), "the loss is nan")],
)
def test_without_it_the_rest_of_the_cost_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(paired_cost, "_time_blocks", fail)
    found = finished(tmp_path, measures=[PAIRED])
    assert reason in found["paired_missing"]
    assert found["step_ms"] > 0


def test_not_for_runs_of_several_processes(tmp_path: Path) -> None:
    directory = prepared(tmp_path, train={**SMALL["train"], "processes": 2})
    with pytest.raises(NotApplicableError, match="2 processes"):
        paired_cost.paired(directory, 3)


def test_a_bug_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(paired_cost, "_time_blocks", fail)
    directory = prepared(tmp_path, measures=[PAIRED])
    assert finish(directory.path) == "failed"


# -- how a study asks -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("adapter", "rank"),
    [
        ({"r": 3, "init": "pissa", "target_modules": ["query"]}, 3),
        ({"r": 3, "dora": True, "rslora": True}, 3),
        ({"name": "none"}, 8),
    ],
)
def test_plain_lora_of_any_adapter(adapter: dict[str, Any], rank: int) -> None:
    options = AdapterOptions.model_validate(adapter)
    plain = paired_cost.plain_lora(options)
    assert (plain.name, plain.init, plain.dora, plain.rslora) == ("lora", True, False, False)
    assert (plain.r, plain.target_modules) == (rank, options.target_modules)


def measures(**changes: Any) -> dict[str, Any]:
    return study.Study({**SMALL, **changes}, "s.yaml").measures


def test_cost_paired_is_the_measures_option() -> None:
    paired = {"name": "cost", "paired": True}
    assert measures(measures=["cost"]) == {"cost": {"name": "cost"}}  # as stored before there were pairs
    assert measures(measures=[paired])["cost"] == paired
    assert measures(cost="paired", measures=["cost"])["cost"] == paired
    assert measures(cost="paired", measures=["slice"])["cost"] == paired
    assert measures(cost="paired", measures=[{"name": "cost", "pairs": 9}])["cost"] == {**paired, "pairs": 9}
    assert measures(cost="paired", measures=[{"name": "cost", "paired": False}])["cost"] == {"name": "cost"}


def test_cost_leaves_studies_without_it_as_they_were(tmp_path: Path) -> None:
    """What was written of a study does not change, and no run's id with it."""
    plain, paired = (study.Study({**SMALL, **more}, "s.yaml") for more in ({}, {"cost": "paired"}))
    assert "cost" not in plain.file.model_dump()
    assert paired.file.model_dump()["cost"] == "paired"
    folder = store.StudyFolder(tmp_path, "small")
    assert [r.id for r in plan.Plan(plain, folder).final([])] == [
        r.id for r in plan.Plan(paired, folder).final([])
    ]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"cost": "pair"}, "cost"),
        ({"measures": [{"name": "cost", "pairs": 5}]}, "pairs"),
        ({"measures": [{"name": "cost", "paired": True, "pairs": 1}]}, "pairs"),
    ],
)
def test_what_cannot_be_asked(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(InputError, match=field):
        measures(**changes)


def test_measured_later(tmp_path: Path) -> None:
    """A run that was trained without pairs is timed in pairs by `flatbench measure`."""
    directory = prepared(tmp_path, "sam")
    assert finish(directory.path) == "done"
    measuring.take_measures(RunDirectory(directory.path), {"cost": PAIRED})
    assert directory.measures()["cost"]["values"]["paired_pairs"] == 3
