"""Experiment trackers are told what a run finds, once, and change nothing about it."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from flatbench import store, study
from flatbench.errors import InputError
from flatbench.machine import stopping
from flatbench.models import weights
from flatbench.orchestration import site
from flatbench.runs import finish as runner
from flatbench.runs import resume, trackers
from flatbench.store import RunDirectory, StudyFolder, events
from flatbench.study import plan
from tests import warm
from tests.conftest import SMALL

pytest.importorskip("tensorboard")

CONTENT = {
    **SMALL,
    "methods": ["lora"],
    "measures": [{"name": "sam_sharpness", "examples": 10, "steps": 1, "every": 2}, "cost"],
}
CONTENT["train"] = {**SMALL["train"], "epochs": 4, "evaluate_every": 2}


@pytest.fixture(autouse=True)
def told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test chooses its trackers, and none is left chosen."""
    monkeypatch.setenv(trackers.VARIABLE, "[]")


def prepared(root: Path) -> RunDirectory:
    loaded = study.Study(yaml.safe_load(yaml.safe_dump(CONTENT)), "small.yaml")
    folder = StudyFolder(root, "small")
    (run,) = plan.Plan(loaded, folder).final([])
    directory = folder.run(run.id)
    directory.prepare(run.spec())
    return directory


def written(directory: RunDirectory) -> dict[str, list[tuple[int, float]]]:
    """Name -> (step, value) in TensorBoard's files of a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(trackers.tensorboard_folder(directory) / directory.id))
    found.Reload()
    return {
        tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]
    }


@pytest.mark.slow
def test_tensorboard_is_told_all_that_the_history_and_the_table_hold(tmp_path: Path) -> None:
    plain = prepared(tmp_path / "plain")
    assert runner.finish(plain.path) == "done"
    directory = prepared(tmp_path / "tracked")
    trackers.choose(["tensorboard"], "site.yaml")
    assert runner.finish(directory.path) == "done"
    found = written(directory)
    history = store.history_of(directory)
    for column, tag in (("loss", "train/loss"), ("lr", "train/lr"), ("validation.loss", "validation/loss")):
        rows = history.dropna(subset=[column])
        assert [step for step, _ in found[tag]] == list(rows["step"])
        assert [value for _, value in found[tag]] == pytest.approx(list(rows[column]), rel=1e-6)
    assert len(found["sam_sharpness_merged/sharpness"]) == 2  # after every second epoch
    result = directory.result()
    assert result is not None
    ((_, accuracy),) = found["final/test.accuracy"]
    assert accuracy == pytest.approx(result["metrics"]["test"]["accuracy"])
    assert found["final/cost.step_ms"][0][1] > 0
    hyper = next((trackers.tensorboard_folder(directory) / directory.id).glob("hparams.yml"), None)
    assert hyper is None or yaml.safe_load(hyper.read_text())["train.lr"] == 1e-2
    # and nothing else is another: not the name, not a bit of the weights
    assert directory.id == plain.id
    assert weights.saved_digest(directory.adapter) == weights.saved_digest(plain.adapter)


def test_a_run_that_goes_on_tells_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trackers.choose(["tensorboard"], "site.yaml")
    directory = prepared(tmp_path)
    epochs = []

    def stop(self: Any, trainer: Any) -> None:
        after(self, trainer)
        epochs.append(trainer.epoch)
        if epochs == [1, 2]:
            raise stopping.Stopped(15)

    after = resume.TrainingSession.after_epoch
    monkeypatch.setattr(resume.TrainingSession, "after_epoch", stop)
    with pytest.raises(stopping.Stopped):
        runner.finish(directory.path)
    before = written(directory)["train/loss"]
    assert runner.finish(directory.path) == "done"
    whole = written(directory)["train/loss"]
    assert whole[: len(before)] == before
    steps = [step for step, _ in whole]
    assert steps == sorted(set(steps))
    assert len(steps) == store.history_of(directory)["loss"].notna().sum()
    assert len(written(directory)["final/test.accuracy"]) == 1


def test_rows_that_were_told_but_not_saved_are_not_told_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is killed was ahead of its saved state: the run makes those rows again."""
    trackers.choose(["tensorboard"], "site.yaml")
    directory = prepared(tmp_path)
    made: list[list[int]] = [[]]

    def die(self: Any, history: Any) -> None:
        rows(self, history)
        made[-1] = [row["step"] for row in history if "loss" in row]
        if len(made) == 1 and history and history[-1]["epoch"] == 3:
            raise KeyboardInterrupt  # nothing catches it, as nothing catches a kill

    rows = trackers.Trackers.rows
    monkeypatch.setattr(trackers.Trackers, "rows", die)
    # the state of the third epoch is lost with the process
    save = resume.TrainingSession._save
    monkeypatch.setattr(resume.TrainingSession, "_save", lambda self: self.trainer.epoch < 3 and save(self))
    with pytest.raises(KeyboardInterrupt):
        runner.finish(directory.path)
    before = written(directory)["train/loss"]
    assert before[-1][0] == made[0][-1]
    monkeypatch.setattr(resume.TrainingSession, "_save", save)
    made.append([])
    assert runner.finish(directory.path) == "done"
    resumed = [event for event in events.read(directory.path) if event["event"] == "resumed"]
    assert resumed[0]["step"] < before[-1][0]
    whole = written(directory)["train/loss"]
    assert whole[: len(before)] == before
    assert [step for step, _ in whole] == made[1]
    assert len(set(made[1])) == len(made[1])


@pytest.mark.parametrize("moment", ["start", "store_init_configuration", "finish"])
def test_it_may_fail_at_any_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    from accelerate.tracking import TensorBoardTracker

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(TensorBoardTracker, moment, fail)
    trackers.choose(["tensorboard"], "site.yaml")
    directory = prepared(tmp_path)
    assert runner.finish(directory.path) == "done"
    assert trackers.failures(directory) == ["tensorboard failed: OSError: no space left"]


def test_a_tracker_that_fails_is_told_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from accelerate.tracking import TensorBoardTracker

    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to https://user:secret@tracker.example/api?token=abc")

    monkeypatch.setattr(TensorBoardTracker, "log", fail)
    trackers.choose(["tensorboard"], "site.yaml")
    directory = prepared(tmp_path)
    assert runner.finish(directory.path) == "done"
    (failed,) = [event for event in events.read(directory.path) if event["event"] == "tracker failed"]
    assert failed["tracker"] == "tensorboard"
    assert "ConnectionError" in failed["error"]
    assert "secret" not in failed["error"]
    assert trackers.failures(directory) == [f"tensorboard failed: {failed['error']}"]
    assert "tensorboard is told no more of this run" in caplog.text


@pytest.mark.slow
def test_the_command_line_takes_trackers_from_the_site_file(tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(CONTENT))
    (tmp_path / "site.yaml").write_text("trackers: [{name: tensorboard, flush_secs: 5}]\n")
    done = warm.completed("run", "small.yaml", "--site", "site.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = StudyFolder(tmp_path / "results", "small")
    (directory,) = folder.directories()
    assert written(directory)["train/loss"]
    assert store.table(folder)["state"].tolist() == ["done"]


REFUSED = {
    "[tensorbord]": "trackers[0]: unknown tracker 'tensorbord'; did you mean 'tensorboard'?",
    "[tensorboard, tensorboard]": "trackers[1]: 'tensorboard' stands in the list twice",
    "[{name: tensorboard, flush_sec: 3}]": "trackers[0].flush_sec: unknown key",
    "[{name: wandb, id: mine}]": "trackers[0].id: it is set by flatbench",
    "[{name: wandb, settings: {api_key: abc}}]": "trackers[0].settings.api_key: secrets do not belong",
}


@pytest.mark.parametrize(("text", "message"), REFUSED.items())
def test_what_is_no_tracker_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "site.yaml").write_text(f"trackers: {text}\n")
    with pytest.raises(InputError) as refused:
        trackers.choose(site.read(tmp_path / "site.yaml").trackers, "site.yaml")
    assert str(refused.value).startswith(f"site.yaml: {message}")
    assert "abc" not in str(refused.value)


def test_a_tracker_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "mlflow" else find(name))
    with pytest.raises(InputError, match="mlflow is not installed here; pip install mlflow"):
        trackers.choose(["mlflow"], "site.yaml")


class Library:
    """Stands for wandb: what accelerate's own tracker calls, kept."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.config = self
        self.id = "theirs"

    def init(self, **options: Any) -> Library:
        self.calls.append(("init", options))
        return self

    def update(self, values: Any, **_: Any) -> None:
        self.calls.append(("config", values))

    def log(self, values: Any, step: int | None = None, **_: Any) -> None:
        self.calls.append(("log", (step, values)))

    def finish(self) -> None:
        self.calls.append(("finish", None))


def test_wandb_is_given_the_run_and_asked_to_go_on_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library: Any = Library()
    library.__spec__ = importlib.util.find_spec("json")
    monkeypatch.setitem(sys.modules, "wandb", library)
    trackers.choose([{"name": "wandb", "project": "mine", "tags": ["a"]}], "site.yaml")
    directory = prepared(tmp_path)
    assert runner.finish(directory.path) == "done"
    (kind, options), *rest = library.calls
    assert (kind, options["project"], options["tags"], options["name"]) == (
        "init",
        "mine",
        ["a"],
        directory.id,
    )
    assert options["resume"] == "never"
    assert [what for what, _ in rest].count("finish") == 1
    told = json.loads((directory.path / "trackers.json").read_text())["wandb"]
    assert told["id"] == "theirs"
    with trackers.Trackers(directory) as again:
        again.result()
    reopened = [options for what, options in library.calls if what == "init"][1]
    assert (reopened["resume"], reopened["id"]) == ("allow", "theirs")
    assert len([1 for what, _ in library.calls if what == "log"]) == len(
        [1 for what, _ in rest if what == "log"]
    )
