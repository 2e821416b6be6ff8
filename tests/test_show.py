"""`flatbench show` counts runs; those of a large study that was planned before without data and models."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console, RenderableType

from flatbench import study, tasks
from flatbench.cli import large, planned
from flatbench.store import StudyFolder, events
from flatbench.study.plan import Plan
from tests.conftest import SMALL

TUNED = {
    **SMALL,
    "methods": ["lora", "sam"],
    "seeds": [0, 1, 2],
    "tune": {"grid": {"lr": [0.01, 0.1]}, "seeds": [9]},
}


_WAITING = ("final", "runs,", "once", "hyper-parameters", "are", "chosen", "on", "validation", "data")


def text(found: RenderableType) -> str:
    console = Console(width=150, file=io.StringIO(), record=True)
    console.print(found, soft_wrap=True)
    return console.export_text()


def counted(told: str) -> list[list[str]]:
    return [line.split() for line in told.splitlines() if line.startswith(("stage", "tune", "final", "and"))]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StudyFolder:
    """A tuned study that was planned, of which one run is done and one has failed."""
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text(yaml.safe_dump(TUNED))
    made = StudyFolder(Path("results"), "small")
    plan = Plan(study.load("small.yaml"), made)
    for run in plan.tuning:
        made.run(run.id).prepare(run.spec())
    done, failed = (made.run(run.id) for run in plan.tuning[:2])
    metrics = {split: {"loss": 0.5, "accuracy": 0.5} for split in ("train", "validation")}
    done.write("result", {"metrics": metrics, "training": {}})
    done.finish([])
    times = {"begun": "2026-01-01T00:00:00.000+00:00", "done": "2026-01-01T00:01:00.000+00:00"}
    lines = [json.dumps({"event": event, "time": time}) for event, time in times.items()]
    (done.path / events.FILE).write_text("\n".join([*lines, "[" * 100_000, "3", '{"event": []}']))
    failed.write("failure", {"state": "failed", "error": "x", "traceback": ""})
    made.write(plan.snapshot())
    return made


def test_a_large_study_is_counted_from_its_results(
    folder: StudyFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = text(planned.runs(study.load("small.yaml"), folder))
    assert large.runs("small.yaml", (), folder) is None  # it is small
    monkeypatch.setattr(large, "LARGE", 1)

    def fail(*_: Any) -> None:
        raise AssertionError("a task was loaded")

    monkeypatch.setattr(tasks, "load", fail)
    found = large.runs("small.yaml", (), folder)
    assert found is not None
    assert counted(text(found)) == counted(whole)
    assert counted(whole)[1:] == [
        ["tune", "lora", "1", "done,", "1", "failed"],
        ["tune", "sam", "2", "planned"],
        ["final", "lora", "3", "planned"],
        ["and", "3", *_WAITING],
    ]
    assert "7 runs: 4 tuning, 3 final" in text(found)
    # of two runs of lora that a minute of one is known of
    assert "at least 2 minutes on this machine" in text(found)


def test_another_version_is_planned_anew(folder: StudyFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large, "LARGE", 1)
    assert large.runs("small.yaml", ("train.epochs=2",), folder) is None
    Path("small.yaml").write_text(yaml.safe_dump({**TUNED, "seeds": "many"}))
    assert large.runs("small.yaml", (), folder) is None
    Path("small.yaml").write_text(yaml.safe_dump(TUNED))
    folder.file.write_text("{")
    assert large.runs("small.yaml", (), folder) is None
    folder.file.unlink()
    assert large.runs("small.yaml", (), folder) is None


def test_runs_of_a_trial_differ_by_their_seed(tmp_path: Path) -> None:
    """What they have in common is made once; a run's identity is as if it had been made for it."""
    loaded = study.Study({**SMALL, "seeds": [0, 1], "grid": {"train.epochs": [1, 2]}}, "small")
    found = Plan(loaded, StudyFolder(tmp_path, "small")).final([])
    alone = []
    for seed in (0, 1):
        own = study.Study({**SMALL, "seeds": [seed], "grid": {"train.epochs": [1, 2]}}, "small")
        alone += Plan(own, StudyFolder(tmp_path, "small")).final([])
    assert {run.id for run in found} == {run.id for run in alone}
    assert len({run.id for run in found}) == 2 * 2 * len(SMALL["methods"])
