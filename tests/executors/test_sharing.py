"""Two `flatbench run` of one study on one folder share the work, and either may die."""

from __future__ import annotations

import signal
import time
from pathlib import Path

from flatbench import events
from flatbench.store import StudyFolder
from tests.test_kill import outcome, start


def steps(folder: Path) -> int:
    """Optimizer steps that were made in all, in whichever process."""
    runs = (folder / "results" / "small" / "runs").iterdir()
    return sum(e["steps"] for run in runs for e in events.read(run) if e["event"] == "epoch")


def trainings(folder: Path) -> list[int]:
    """How often each run was trained to its end."""
    study = StudyFolder(folder / "results", "small")
    return [
        sum(event["event"] == "trained" for event in events.read(directory.path))
        for directory in study.directories()
    ]


def test_two_share_the_work_and_neither_waits_in_vain(tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    assert start(alone, 1).wait(timeout=300) == 0
    both = tmp_path / "both"
    processes = [start(both, 1), start(both, 2)]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    assert steps(both) == steps(alone)
    assert trainings(both) == trainings(alone) == [1] * 9
    assert outcome(both)[1] == outcome(alone)[1]


def test_the_other_takes_over_when_one_is_killed(tmp_path: Path) -> None:
    first = start(tmp_path, 1)
    runs = tmp_path / "results" / "small" / "runs"
    while not list(runs.glob("*/state.safetensors")):
        time.sleep(0.01)
    second = start(tmp_path, 1)
    time.sleep(0.5)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert second.wait(timeout=300) == 0
    assert trainings(tmp_path) == [1] * 9
