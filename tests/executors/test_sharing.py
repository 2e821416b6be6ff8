"""Several `flatbench run` of one study on one folder share the work, and any of them may die."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.executors.studies import (
    STUDY,
    Outcome,
    assert_no_step_twice,
    assert_same,
    happened,
    left_over,
    runs,
    start,
    written,
)
from tests.holds import Hold, until

pytestmark = pytest.mark.slow


def test_they_share_the_work_and_none_waits_in_vain(tmp_path: Path, undisturbed: Outcome) -> None:
    hold, folder = Hold(tmp_path / "holds"), written(tmp_path / "study", STUDY)
    hold.close("epoch")
    processes = [start(folder, hold=hold) for _ in range(3)]
    held = hold.wait(3)
    assert {one.pid for one in held} == {process.pid for process in processes}
    assert len({one.run for one in held}) == 3
    hold.open()
    assert [process.wait() for process in processes] == [0] * 3
    assert_same(folder, undisturbed)
    assert_no_step_twice(*runs(folder))
    assert all(happened(directory).count("trained") == 1 for directory in runs(folder))


def test_the_other_takes_over_when_one_is_killed(tmp_path: Path, undisturbed: Outcome) -> None:
    hold, folder = Hold(tmp_path / "holds"), written(tmp_path / "study", STUDY)
    hold.close("epoch")
    first = start(folder, hold=hold)
    (under,) = hold.wait(1, first)
    second = start(folder, hold=hold)
    hold.wait(2, second)
    first.send_signal(signal.SIGKILL)
    first.wait()
    hold.open()
    assert second.wait() == 0, (folder / "output.txt").read_text()
    assert_same(folder, undisturbed)
    assert all(happened(directory).count("trained") == 1 for directory in runs(folder))
    (taken,) = [directory for directory in runs(folder) if directory.path.name == under.run.name]
    assert {"taken over", "resumed"} <= set(happened(taken))
    assert_no_step_twice(*runs(folder))
    assert not left_over(runs(folder))


def test_it_waits_for_what_the_other_works_on(tmp_path: Path, undisturbed: Outcome) -> None:
    """The last run of a stage is another's: nobody makes it twice, and nobody goes on without it."""
    hold, folder = Hold(tmp_path / "holds"), written(tmp_path / "study", STUDY)
    hold.close("epoch")
    first = start(folder, hold=hold)
    (under,) = hold.wait(1, first)
    first.send_signal(signal.SIGSTOP)  # it holds its claim, and lets the lease be
    hold.open()
    second = start(folder)
    others = [directory for directory in runs(folder) if directory.path.name != under.run.name]
    until("the other tuning runs", lambda: all(d.state() == "done" for d in others), second)
    assert second.poll() is None
    first.send_signal(signal.SIGCONT)
    assert [first.wait(), second.wait()] == [0, 0]
    assert_same(folder, undisturbed)
    assert all(happened(directory).count("trained") == 1 for directory in runs(folder))
