"""Trackers are told everything once, however often a run is interrupted or they fail, and never harm it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import yaml
from typer.testing import CliRunner

from flatbench import cli
from flatbench.errors import InputError
from flatbench.runs import finish as runner
from flatbench.runs import resume, trackers
from flatbench.runs.trackers import VARIABLE, choose, chosen
from flatbench.store import RunDirectory, events
from tests.conftest import SMALL
from tests.test_runner import Killed, prepared, stable

pytestmark = pytest.mark.slow


TRAIN = {**SMALL["train"], "evaluate_every": 1, "log_every": 2}
TRACKED = {"name": "sam_sharpness", "examples": 10, "every": 2}


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    yield
    os.environ.pop(VARIABLE, None)


def scalars(directory: RunDirectory) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a run: (step, value) by name, and of nothing else in the folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(trackers.tensorboard_folder(directory) / directory.id))
    shown.Reload()
    # files of one second come in any order
    return {tag: sorted((e.step, e.value) for e in shown.Scalars(tag)) for tag in shown.Tags()["scalars"]}


def expected(directory: RunDirectory) -> dict[str, list[tuple[int, float]]]:
    """What the run's own files say."""
    found: dict[str, list[tuple[int, float]]] = {}
    history = pd.read_parquet(directory.path / "history.parquet")
    for row in history.to_dict("records"):
        for key, value in row.items():
            if key == "step" or isinstance(value, str) or pd.isna(value):
                continue
            if key == "epoch" and pd.isna(row["loss"]):
                continue
            name = str(key).replace(".", "/", 1) if "." in str(key) else f"train/{key}"
            found.setdefault(name, []).append((int(row["step"]), value))
    result = directory.result()
    assert result is not None
    named = {f"{s}.{k}": v for s, values in result["metrics"].items() for k, v in values.items()}
    for label, stored in directory.measures().items():
        named |= {f"{label}.{k}": v for k, v in stored["values"].items()}
    last = int(history["step"].max())
    numbers = {k: float(v) for k, v in named.items() if isinstance(v, int | float)}
    return found | {f"final/{key}": [(last, value)] for key, value in numbers.items()}


def same(told: dict[str, list[tuple[int, float]]], known: dict[str, list[tuple[int, float]]]) -> None:
    assert told.keys() == known.keys()
    for name, points in known.items():
        assert [step for step, _ in told[name]] == [step for step, _ in points], name
        # TensorBoard keeps 32 bits
        assert [v for _, v in told[name]] == pytest.approx([float(v) for _, v in points], rel=1e-6), name


# -- with TensorBoard, for real ---------------------------------------------------------------------------


@pytest.fixture
def tensorboard() -> None:
    choose(["tensorboard"], "site.yaml")


@pytest.mark.usefixtures("tensorboard")
def test_it_shows_what_the_run_recorded(tmp_path: Path) -> None:
    directory = prepared(tmp_path, "sam", train=TRAIN, measures=["cost", TRACKED])
    assert runner.finish(directory.path) == "done"
    told = scalars(directory)
    same(told, expected(directory))
    steps = [step for step, _ in told["train/loss"]]
    assert steps == [2, 4, 6, 8, 10, 12]
    assert len(told["validation/accuracy"]) == 2
    assert [step for step, _ in told["sam_sharpness_merged/sharpness"]] == [8]
    assert {"train/lr", "final/test.accuracy", "final/cost.step_ms"} <= told.keys()


@pytest.mark.usefixtures("tensorboard")
def test_its_configuration(tmp_path: Path) -> None:
    directory = prepared(tmp_path, "sam")
    assert runner.finish(directory.path) == "done"
    (file,) = trackers.tensorboard_folder(directory).rglob("hparams.yml")
    told = yaml.safe_load(file.read_text())
    assert told["method"] == "sam"
    assert told["optimizer.rho"] == directory.spec()["config"]["optimizer"]["rho"]
    assert told["train.lr"] == 0.01
    assert told["adapter.r"] == 2
    assert told["seed"] == 0


def test_a_run_finds_the_same_with_it(tmp_path: Path) -> None:
    alone = prepared(tmp_path / "alone", {"name": "d", "adapter": {"dropout": 0.3}, "optimizer": "sam"})
    assert runner.finish(alone.path) == "done"
    choose(["tensorboard"], "site.yaml")
    told = prepared(tmp_path / "told", {"name": "d", "adapter": {"dropout": 0.3}, "optimizer": "sam"})
    assert told.id == alone.id
    assert runner.finish(told.path) == "done"
    ours, theirs = stable(alone), stable(told)
    theirs["files"].remove("trackers.json")
    assert ours == theirs


@pytest.mark.parametrize("step", [1, 3, 6, 7, 11])
@pytest.mark.usefixtures("tensorboard")
def test_interrupted_at_any_step_it_shows_each_point_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Killed where nothing but epochs is saved: steps after the last epoch are trained twice."""
    directory = prepared(tmp_path, train=TRAIN)
    after_step = resume.TrainingSession.after_step

    def killed(begun: Any, trainer: Any) -> None:
        after_step(begun, trainer)
        if trainer.step == step:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(resume.TrainingSession, "after_step", killed)
        with pytest.raises(Killed):
            runner.finish(directory.path)
    assert runner.finish(directory.path) == "done"
    told, known = scalars(directory), expected(directory)
    for each in (told, known):  # of the steps that were made again, other times than were shown
        each.pop("train/step_seconds")
    same(told, known)


@pytest.mark.usefixtures("tensorboard")
def test_begun_afresh_it_shows_the_new_beginning_alone(tmp_path: Path) -> None:
    directory = prepared(tmp_path, train=TRAIN)
    assert runner.finish(directory.path) == "done"
    directory.clear()
    assert runner.finish(directory.path) == "done"
    same(scalars(directory), expected(directory))


@pytest.mark.usefixtures("tensorboard")
def test_a_measure_that_is_asked_for_later_is_told_then(tmp_path: Path) -> None:
    directory = prepared(tmp_path, train=TRAIN)
    assert runner.finish(directory.path) == "done"
    spec = directory.spec()
    directory.prepare({**spec, "measures": {**spec["measures"], "slice": {"name": "slice", "points": 3}}})
    assert runner.finish(directory.path) == "done"
    told = scalars(directory)
    assert "final/slice.mean_rise" in told
    same(told, expected(directory))


def test_a_run_that_was_trained_untold_is_told_whole(tmp_path: Path) -> None:
    directory = prepared(tmp_path, train=TRAIN)
    assert runner.finish(directory.path) == "done"
    directory.forget("done")
    choose(["tensorboard"], "site.yaml")
    assert runner.finish(directory.path) == "done"
    same(scalars(directory), expected(directory))


@pytest.mark.long
@pytest.mark.usefixtures("tensorboard")
def test_of_several_processes_the_first_one_tells(tmp_path: Path) -> None:
    directory = prepared(tmp_path, train={**TRAIN, "processes": 2})
    assert runner.finish(directory.path) == "done"
    same(scalars(directory), expected(directory))


# -- trackers that fail, and how the others are called ----------------------------------------------------


class Fake:
    """Takes the place of one of accelerate's trackers; notes what happens, and fails where it is told to."""

    made: list[Fake]
    fails: str | None = None

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.arguments, self.options = arguments, options
        self.points: list[tuple[int, str, float]] = []
        self.configuration: Any = None
        self.finished = False
        self.made.append(self)

    @property
    def tracker(self) -> Any:
        return SimpleNamespace(
            id=self.options.get("id"), info=SimpleNamespace(run_id=self.options.get("run_id") or "theirs")
        )

    def _may(self, what: str) -> None:
        if self.fails == what:
            raise ConnectionError(f"no way to https://me:secret@example.org ({what})")

    def start(self) -> None:
        self._may("start")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self._may("configuration")
        self.configuration = values

    def log(self, values: dict[str, Any], step: int) -> None:
        if step > 4:
            self._may("log")
        if "final/test.loss" in values:
            self._may("result")
        self.points += [(step, key, value) for key, value in values.items()]

    def finish(self) -> None:
        self.finished = True
        self._may("finish")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[Fake]:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    class Own(Fake):
        made: list[Fake] = []

    for name in ("wandb", "trackio", "mlflow"):
        monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, name, Own)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: SimpleNamespace(origin=name))
    return Own


@pytest.mark.parametrize("where", ["start", "configuration", "log", "result", "finish"])
def test_a_tracker_that_fails_does_not_fail_the_run(tmp_path: Path, fake: type[Fake], where: str) -> None:
    fake.fails = where
    choose(["wandb", "tensorboard"], "site.yaml")
    directory = prepared(tmp_path, train=TRAIN)
    assert runner.finish(directory.path) == "done"
    failed = [e for e in events.read(directory.path) if e["event"] == "tracker failed"]
    assert len(failed) == 1
    assert failed[0]["tracker"] == "wandb"
    assert failed[0]["error"] == f"ConnectionError: no way to https://[redacted]@example.org ({where})"
    assert "wandb is told no more" in (directory.path / "run.log").read_text()
    assert trackers.failures(directory) == [f"wandb failed: {failed[0]['error']}"]
    assert all(tracker.finished for tracker in fake.made if where != "start")
    same(scalars(directory), expected(directory))  # the other one is told everything


def test_after_a_failure_a_resumed_run_tells_what_is_missing(
    tmp_path: Path, fake: type[Fake], monkeypatch: pytest.MonkeyPatch
) -> None:
    choose(["wandb"], "site.yaml")
    directory = prepared(tmp_path, train=TRAIN)
    fake.fails = "log"
    with monkeypatch.context() as patch:
        patch.setattr(runner, "_finish_training", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            runner.finish(directory.path)
    fake.fails = None
    assert runner.finish(directory.path) == "done"
    first, second = fake.made
    assert first.options["id"] == second.options["id"]
    losses = [step for made in fake.made for step, key, _ in made.points if key == "train/loss"]
    assert losses == [2, 4, 6, 8, 10, 12]


@pytest.mark.parametrize(
    ("entry", "arguments", "options"),
    [
        ("wandb", ("small",), {"resume": ("never", "allow"), "id": True}),
        (
            {"name": "wandb", "project": "p", "mode": "offline"},
            ("p",),
            {"resume": ("never", "allow"), "mode": ("offline", "offline")},
        ),
        ("trackio", ("small",), {"resume": ("never", "allow")}),
        ("mlflow", (), {"experiment_name": ("small", "small"), "run_id": (None, "theirs")}),
        ({"name": "mlflow", "experiment_name": "e"}, (), {"experiment_name": ("e", "e")}),
    ],
)
def test_how_each_is_called_at_first_and_when_it_goes_on(
    tmp_path: Path,
    fake: type[Fake],
    monkeypatch: pytest.MonkeyPatch,
    entry: Any,
    arguments: tuple[str, ...],
    options: dict[str, Any],
) -> None:
    choose([entry], "site.yaml")
    directory = prepared(tmp_path, train=TRAIN)
    with monkeypatch.context() as patch:
        patch.setattr(runner, "_finish_training", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            runner.finish(directory.path)
    assert runner.finish(directory.path) == "done"
    made = fake.made
    assert [one.arguments for one in made] == [arguments] * 2
    name = "run_name" if "mlflow" in str(entry) else "name"
    assert {one.options[name] for one in made} == {directory.id}
    for key, values in options.items():
        if values is True:
            assert made[0].options[key] == made[1].options[key]
            assert made[0].options[key].startswith(directory.id)
        else:
            assert tuple(one.options[key] for one in made) == values
    assert made[0].configuration
    assert made[1].configuration is None  # it has it already
    points = [(step, key) for one in made for step, key, _ in one.points]
    assert len(points) == len(set(points))
    assert ("final/test.accuracy") in {key for _, key in points}


def test_begun_afresh_is_another_run_of_the_tracker(tmp_path: Path, fake: type[Fake]) -> None:
    choose(["wandb"], "site.yaml")
    directory = prepared(tmp_path)
    assert runner.finish(directory.path) == "done"
    directory.clear()
    assert runner.finish(directory.path) == "done"
    first, second = fake.made
    assert first.options["id"] != second.options["id"]
    assert second.options["resume"] == "never"
    assert second.configuration


def test_the_terminal_says_what_failed(tmp_path: Path, fake: type[Fake]) -> None:
    fake.fails = "start"
    file, site = tmp_path / "small.yaml", tmp_path / "site.yaml"
    file.write_text(yaml.safe_dump({**SMALL, "methods": ["lora"]}))
    site.write_text("trackers: [wandb]\n")
    arguments = ["run", str(file), "--site", str(site), "--output", str(tmp_path)]
    found = CliRunner().invoke(cli.app, arguments)
    assert found.exit_code == 0, found.output
    assert "wandb failed: ConnectionError" in found.output


# -- what a site file may say -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (["tensorbord"], r"s.yaml: trackers\[0\]: unknown tracker.*did you mean 'tensorboard'"),
        ([{"project": "p"}], r"trackers\[0\]: unknown tracker"),
        ([3], r"trackers\[0\]: expected a name or a mapping"),
        (["tensorboard", "tensorboard"], r"trackers\[1\]: 'tensorboard' stands in the list twice"),
        ([{"name": "tensorboard", "max_que": 3}], r"trackers\[0\].max_que: .*'max_queue'"),
        ([{"name": "wandb", "id": "x"}], r"trackers\[0\].id: it is set by flatbench"),
        ([{"name": "wandb", "settings": {"api_key": "x"}}], r"trackers\[0\].settings.api_key: secrets"),
        ([{"name": "mlflow", "tags": [{"my_token": 1}]}], r"trackers\[0\].tags\[0\].my_token: secrets"),
        ([{"name": "wandb", "notes": float("inf")}], r"trackers\[0\]: not plain"),
    ],
)
def test_what_is_refused(fake: type[Fake], entries: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        choose(entries, "s.yaml")
    assert VARIABLE not in os.environ


@pytest.mark.parametrize("text", ["[", "3", '["tensorboard"]', '[{"name": "nobody"}]', "{}"])
def test_a_variable_that_is_damaged(text: str) -> None:
    os.environ[VARIABLE] = text
    if text == "{}":
        assert chosen() == []
        return
    with pytest.raises(InputError, match=VARIABLE):
        chosen()


def test_numbers_are_grouped_and_others_left_out() -> None:
    row = {
        "step": 3,
        "loss": 0.5,
        "perturbation_norm": float("nan"),
        "validation.f1.macro": 1,
        "a.skipped": "x",
    }
    assert trackers.numbers(row) == {"train/loss": 0.5, "validation/f1.macro": 1}
