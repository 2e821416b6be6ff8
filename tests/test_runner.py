"""A run directory is finished from wherever it is, to the same end."""

from __future__ import annotations

import functools
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from flatbench import measures, optim, store, study, tasks
from flatbench.config.sections import AdapterOptions
from flatbench.errors import InputError
from flatbench.machine import stopping
from flatbench.models import weights
from flatbench.models.adapt import adapt
from flatbench.runs import measure as measuring
from flatbench.runs import open as opening
from flatbench.runs import resume
from flatbench.runs.finish import finish
from flatbench.store import RunDirectory, StudyFolder, claims, events, files, training_state
from flatbench.study import plan
from tests.conftest import SMALL

pytestmark = pytest.mark.slow


METHODS = [name for name in optim.REGISTRY.names() if name != "plain"] + ["lora", "full_ft"]


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the runner catches it."""


def prepared(tmp_path: Path, method: Any = "lora", **changes: Any) -> RunDirectory:
    content = {**SMALL, "methods": [method], **changes}
    loaded = study.Study(content, "small.yaml")
    folder = StudyFolder(tmp_path, "small")
    (run, *_) = plan.Plan(loaded, folder).final([])
    directory = folder.run(run.id)
    directory.prepare(run.spec())
    return directory


def stable(directory: RunDirectory) -> dict[str, Any]:
    """What must not depend on how often a run was interrupted: everything but clocks and memory."""
    result = directory.result()
    assert result is not None
    import pandas as pd

    history = pd.read_parquet(directory.path / "history.parquet").drop(columns="step_seconds")
    return {
        "metrics": result["metrics"],
        "weights": result["weights"],
        "history": history.to_csv(),
        "files": sorted(str(p.relative_to(directory.path)) for p in directory.path.rglob("*")),
    }


#: dropout, whose random numbers a run that goes on has to find again
DROPOUT = {**SMALL["adapter"], "dropout": 0.3}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """What a run of a method with `DROPOUT` finds that nothing interrupts, trained once for all tests."""
    folder = tmp_path_factory.mktemp("whole")

    @functools.cache
    def found(method: str) -> dict[str, Any]:
        directory = prepared(folder / method, method, adapter=DROPOUT)
        assert finish(directory.path) == "done"
        return stable(directory)

    return found


@pytest.fixture
def kill_at_replacement(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Have the n-th file replacement from now kill the run instead of happening."""
    real = os.replace

    def arm(count: int) -> None:
        left = [count]

        def replace(source: Any, target: Any) -> None:
            left[0] -= 1
            if left[0] == 0:
                raise Killed
            real(source, target)

        monkeypatch.setattr(os, "replace", replace)

    yield arm
    monkeypatch.undo()


@pytest.mark.parametrize("method", METHODS)
def test_resumed_equals_uninterrupted(
    tmp_path: Path, method: str, kill_at_replacement: Any, whole: Any
) -> None:
    expected = whole(method)
    cut = prepared(tmp_path, method, adapter=DROPOUT)
    kill_at_replacement(4)  # environment, state of epoch 1, progress; the state of epoch 2 is lost
    with pytest.raises(Killed):
        finish(cut.path)
    assert cut.state() == "interrupted"
    kill_at_replacement(10**9)
    assert finish(cut.path) == "done"
    assert stable(cut) == expected


def test_killed_at_every_write(tmp_path: Path, kill_at_replacement: Any, whole: Any) -> None:
    expected = whole("eflat_lora")
    for count in range(1, 40):
        cut = prepared(tmp_path / str(count), "eflat_lora", adapter=DROPOUT)
        kill_at_replacement(count)
        try:
            finished = finish(cut.path) == "done"
        except Killed:
            finished = False
        kill_at_replacement(10**9)
        assert finish(cut.path) == "done"
        assert stable(cut) == expected
        if finished:
            break
    else:
        pytest.fail("the run writes more files than this test foresees")
    assert count > 8


def test_a_finished_run_is_left_alone(tmp_path: Path) -> None:
    directory = prepared(tmp_path)
    assert finish(directory.path) == "done"
    before = {p: p.stat().st_mtime_ns for p in directory.path.rglob("*")}
    assert finish(directory.path) == "done"
    assert {p: p.stat().st_mtime_ns for p in directory.path.rglob("*")} == before


def test_a_state_of_another_layout_starts_anew(tmp_path: Path, kill_at_replacement: Any, whole: Any) -> None:
    expected = whole("lora")
    cut = prepared(tmp_path, adapter=DROPOUT)
    kill_at_replacement(4)
    with pytest.raises(Killed):
        finish(cut.path)
    kill_at_replacement(10**9)
    saved = training_state.load(cut.state_file)
    del saved["trainer"]["optimizer"]
    training_state.save(cut.state_file, saved)
    assert finish(cut.path) == "done"
    assert stable(cut) == expected
    assert "KeyError" in (cut.environment() or {})["restarted"]


@pytest.mark.parametrize("damage", ["cut short", "one bit", "only the one before"])
def test_a_damaged_state_gives_way_to_the_one_before(
    tmp_path: Path, damage: str, kill_at_replacement: Any, whole: Any
) -> None:
    expected = whole("lora")
    cut = prepared(tmp_path, adapter=DROPOUT)
    kill_at_replacement(5 if damage == "only the one before" else 6)
    with pytest.raises(Killed):
        finish(cut.path)
    kill_at_replacement(10**9)
    if damage == "only the one before":  # killed between the two moves
        assert not cut.state_file.exists()
        assert cut.state() == "interrupted"
    else:
        content = bytearray(cut.state_file.read_bytes())
        content[-3] ^= 1  # a weight: nothing but the checksum can tell
        cut.state_file.write_bytes(content[:1000] if damage == "cut short" else content)
    assert finish(cut.path) == "done"
    assert stable(cut) == expected
    resumed = [event for event in events.read(cut.path) if event["event"] == "resumed"]
    assert [event["epoch"] for event in resumed] == [1]
    if damage != "only the one before":
        assert "damaged" in (cut.environment() or {})["resumed"]


@pytest.mark.parametrize("method", METHODS)
def test_stopped_within_an_epoch_and_saved_after_every_step(
    tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch, whole: Any
) -> None:
    """Saving and stopping at any step changes no bit, dropout included."""
    expected = whole(method)
    cut = prepared(tmp_path, method, adapter=DROPOUT)
    monkeypatch.setattr(resume, "CHECKPOINT_SECONDS", 0.0)
    steps = {2, 5, 9}  # of 12, four an epoch
    real = resume.Trainer._train_step

    def step(trainer: Any, *given: Any) -> None:
        real(trainer, *given)
        if trainer.step in steps:
            steps.discard(trainer.step)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(resume.Trainer, "_train_step", step)
    stops = 0
    with stopping.heeded():
        while cut.state() != "done":
            try:
                assert finish(cut.path) == "done"
            except stopping.Stopped as stop:
                assert stop.signal == signal.SIGTERM
                stops += 1
                stopping.forget()
    assert stops == 3
    assert stable(cut) == expected
    made = [e["step"] for e in events.read(cut.path) if e["event"] == "resumed"]
    assert made == [2, 5, 9]  # not a step was made twice


def test_how_far_it_is_is_told_within_an_epoch_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "PROGRESS_SECONDS", 0.0)
    directory = prepared(tmp_path)
    told = []
    real = resume.Trainer._train_step

    def step(trainer: Any, *given: Any) -> None:
        told.append(directory.progress())
        real(trainer, *given)

    monkeypatch.setattr(resume.Trainer, "_train_step", step)
    assert finish(directory.path) == "done"
    assert told == pytest.approx([i / 12 for i in range(12)])


def test_the_saved_weights_are_the_evaluated_ones(tmp_path: Path) -> None:
    """EFlat-LoRA trains at a perturbed point; what is saved and evaluated is the other one."""
    directory = prepared(tmp_path, {"name": "eflat_lora", "optimizer": {"name": "eflat_lora", "rho": 0.5}})
    assert finish(directory.path) == "done"
    config = directory.spec()["config"]
    task = tasks.load(config["task"], config["model"])
    model = adapt(
        task.build_model(config["seed"]),
        AdapterOptions.model_validate(config["adapter"]),
        task.target_modules,
        task.modules_to_save,
    )
    weights.load(model, directory.adapter)
    splits = task.splits(config["seed"])
    batch = task.collate([splits.test[i] for i in range(len(splits.test))])
    result = directory.result()
    assert result is not None
    assert task.evaluate(model, [batch])["loss"] == pytest.approx(result["metrics"]["test"]["loss"], rel=1e-5)


@pytest.mark.parametrize(("lr", "state"), [(1e-2, "done"), (1e30, "diverged")])
def test_tuning_runs_are_evaluated_on_validation_data_alone(tmp_path: Path, lr: float, state: str) -> None:
    """The test split is not theirs, and training data, often the most of all, say nothing that is asked."""
    tune = {"grid": {"lr": [lr]}, "seeds": [9]}
    loaded = study.Study({**SMALL, "methods": ["lora"], "tune": tune}, "small.yaml")
    folder = StudyFolder(tmp_path, "small")
    (run,) = plan.Plan(loaded, folder).tuning
    directory = folder.run(run.id)
    directory.prepare(run.spec())
    assert finish(directory.path) == state
    result = directory.result()
    if state == "diverged":
        assert result is None
        return
    assert result is not None
    assert set(result["metrics"]) == {"validation"}
    assert directory.measures() == {}


def test_divergence_is_recorded(tmp_path: Path) -> None:
    directory = prepared(tmp_path, train={**SMALL["train"], "lr": 1e30}, methods=["full_ft"])
    assert finish(directory.path) == "diverged"
    failure = files.read_json(directory.path / "failure.json")
    assert "the loss is" in failure["error"]
    assert "Traceback" in failure["traceback"]
    assert directory.state() == "diverged"


def test_a_crash_is_recorded_and_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = prepared(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(resume.Trainer, "run", lambda *_: 1 / 0)
        assert finish(directory.path) == "failed"
    assert "ZeroDivisionError" in files.read_json(directory.path / "failure.json")["traceback"]
    assert finish(directory.path) == "done"
    assert not (directory.path / "failure.json").exists()


def test_a_last_update_that_breaks_the_weights_is_seen(tmp_path: Path) -> None:
    """The logged losses are those before each update; the last update's own shows after training only."""
    train = {**SMALL["train"], "lr": 1e37, "epochs": 1, "batch_size": 60}
    directory = prepared(tmp_path, "full_ft", train=train)
    assert finish(directory.path) == "diverged"
    assert "not finite after training" in files.read_json(directory.path / "failure.json")["error"]


def test_changed_data_is_not_measured_as_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = prepared(tmp_path)
    finish(directory.path)
    opening._task.cache_clear()
    monkeypatch.setattr(tasks.REGISTRY.load("digits"), "fingerprint", lambda _: "other data")
    with pytest.raises(InputError, match="not what it was when the run was made"):
        measuring.take_measures(directory, {"cost": {"name": "cost"}})
    opening._task.cache_clear()


def test_two_precisions_in_one_process(tmp_path: Path) -> None:
    for precision in ("fp32", "bf16"):
        train = {**SMALL["train"], "precision": precision, "epochs": 1}
        assert finish(prepared(tmp_path / precision, train=train).path) == "done"


def test_a_run_keeps_the_threads_it_was_begun_with(tmp_path: Path, kill_at_replacement: Any) -> None:
    directory = prepared(tmp_path, train={**SMALL["train"], "threads": None})
    kill_at_replacement(4)
    with pytest.raises(Killed):
        finish(directory.path, threads=1)
    kill_at_replacement(10**9)
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resume.Trainer, "cost", lambda _: seen.append(torch.get_num_threads()) or {})
        assert finish(directory.path, threads=2, jobs=2) == "done"
    assert seen == [1]
    assert (directory.environment() or {})["jobs"] == 1


def test_two_processes_never_work_on_one_run(tmp_path: Path) -> None:
    directory = prepared(tmp_path)
    with claims.claimed(directory.path) as mine:
        assert mine
        assert finish(directory.path) == "elsewhere"
    assert finish(directory.path) == "done"


def test_one_failing_measure_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = [{"name": "slice", "points": 3, "examples": 10}, "cost"]
    directory = prepared(tmp_path, measures=wanted)
    with monkeypatch.context() as patch:
        patch.setattr(measures.REGISTRY.load("slice"), "__call__", lambda *_: 1 / 0)
        assert finish(directory.path) == "failed"
        assert directory.state() == "failed"
    assert list(directory.measures()) == ["cost"]
    assert finish(directory.path) == "done"
    assert len(directory.measures()) == 2


def test_micro_batches_give_the_same_gradient(tmp_path: Path) -> None:
    whole = prepared(tmp_path / "whole", train={**SMALL["train"], "epochs": 1})
    parts = prepared(tmp_path / "parts", train={**SMALL["train"], "epochs": 1, "micro_batch_size": 5})
    results = []
    for directory in (whole, parts):
        assert finish(directory.path) == "done"
        results.append((directory.result() or {})["metrics"]["test"]["loss"])
    assert results[0] == pytest.approx(results[1], rel=1e-4)


def test_methods_with_one_seed_start_alike_and_see_the_same_batches(tmp_path: Path) -> None:
    first = {}
    for method in ("lora", "sam"):
        directory = prepared(tmp_path / method, method)
        finish(directory.path)
        rows = store.history_of(directory)
        first[method] = rows["loss"].iloc[0]
    assert first["lora"] == first["sam"]


def test_environment_tells_the_machine_but_no_names(tmp_path: Path) -> None:
    directory = prepared(tmp_path)
    finish(directory.path)
    environment = files.read_json(directory.path / "environment.json")
    assert environment["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert environment["threads"] == 1
    text = json.dumps(environment)
    assert str(Path.home()) not in text
    assert os.uname().nodename not in text


@pytest.mark.parametrize("damage", ["truncated", "pickle", "missing", "another model"])
def test_damaged_weights(tmp_path: Path, damage: str) -> None:
    directory = prepared(tmp_path)
    finish(directory.path)
    path = weights.weights_file(directory.adapter)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-50])
    elif damage == "pickle":
        path.unlink()
        torch.save({}, path.with_name("adapter_model.bin"))
    elif damage == "missing":
        path.unlink()
    else:
        other = prepared(tmp_path / "other", adapter={"r": 5})
        finish(other.path)
        path.write_bytes(weights.weights_file(other.adapter).read_bytes())
    with pytest.raises(InputError, match=r"safetensors|does not fit"):
        measuring.take_measures(directory, {"cost": {"name": "cost"}})
