"""Workers that are suspended, folders that turn read-only, and two versions of a study in one folder."""

from __future__ import annotations

import errno
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flatbench import study
from flatbench.errors import StorageError
from flatbench.executors.base import Ended, Executor
from flatbench.orchestration import queue
from flatbench.orchestration.run_study import _Version
from flatbench.orchestration.stages import Here
from flatbench.store import RunDirectory, StudyFolder, claims, events
from tests.conftest import SMALL
from tests.test_store import make

LEASE = 60.0


class Clock:
    """Seconds that pass when somebody waits."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Suspending(Executor):
    """Its first worker claims its run and is heard of no more; the second one is through at once."""

    slots, lease = 1, LEASE

    def __init__(self, clock: Clock, kills: bool) -> None:
        self.clock, self.kills = clock, kills
        self.given_up: list[float] = []
        self.submitted: list[Path] = []

    def submit(self, paths: Sequence[Path]) -> None:
        self.submitted += paths
        (path,) = paths
        claim = path / f"claim-{len(self.submitted):06}.json"
        claim.write_text("{}")
        os.utime(claim, ns=(len(self.submitted), len(self.submitted)))

    def give_up(self, path: Path) -> bool:
        self.given_up.append(self.clock.now)
        return self.kills

    def ended(self, timeout: float) -> list[Ended]:
        self.clock.now += timeout
        path = self.submitted[-1]
        if len(self.submitted) > 1 or (not self.kills and self.clock.now > 1000 + 5 * LEASE):
            return [Ended(path, "done")]
        return [Ended(path, None, "killed by SIGKILL")] if self.given_up and self.kills else []

    def close(self) -> None:
        pass


@pytest.mark.parametrize("kills", [True, False])
def test_a_suspended_worker_is_told_of_within_its_lease(
    kills: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(queue, "time", SimpleNamespace(monotonic=clock.monotonic, sleep=clock.sleep))
    run = make(StudyFolder(tmp_path, "s"))
    executor = Suspending(clock, kills)
    drive = queue.Drive(executor, backoff=1.0)
    said: list[tuple[float, str]] = []
    drive.say = lambda line: said.append((clock.now - 1000, line))
    assert [end.state for end in drive.run([run.path])] == ["done"]
    first, second = said[:2]
    assert LEASE / 2 <= first[0] < LEASE
    assert "is it suspended?" in first[1]
    assert run.id in first[1]
    assert LEASE <= second[0] <= 1.5 * LEASE
    assert len(executor.submitted) == (2 if kills else 1)
    assert ("tried again" in second[1]) == kills
    happened = [event["event"] for event in events.read(run.path)]
    assert happened.count("silent") == (1 if kills else len(executor.given_up))
    assert ("worker died" in happened) == kills


def test_silence_is_counted_while_somebody_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-Z stops the command and its workers alike: what then was not renewed is nobody's fault."""
    clock = Clock()
    monkeypatch.setattr(queue, "time", SimpleNamespace(monotonic=clock.monotonic))
    claim = tmp_path / "claim-000001.json"
    silences = queue.Silences()
    claim.write_text("{}")
    os.utime(claim, ns=(1, 1))
    silences.begin(tmp_path)  # what was left by another process
    for _ in range(9):
        clock.now += 10
        assert silences.look([tmp_path], 20) == []
    os.utime(claim, ns=(2, 2))
    assert silences.look([tmp_path], 20) == []
    clock.now += 10
    assert silences.look([tmp_path], 20) == [(tmp_path, 10)]
    clock.now += 10_000
    assert silences.look([tmp_path], 20) == [(tmp_path, 10)]
    clock.now += 15
    assert silences.look([tmp_path], 20) == [(tmp_path, 25)]
    assert silences.is_new(tmp_path)
    assert not silences.is_new(tmp_path)
    os.utime(claim, ns=(3, 3))
    clock.now += 1
    assert silences.look([tmp_path], 20) == []
    assert silences.look([], 20) == []


@pytest.fixture
def read_only(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A switch that makes all folders read-only: tests may run as root, whom permissions do not stop."""
    switch = SimpleNamespace(on=False)

    def refusing(function: Any, writes: Any) -> Any:
        def called(*arguments: Any, **options: Any) -> Any:
            if switch.on and writes(*arguments, **options):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS))
            return function(*arguments, **options)

        return called

    always = lambda *_, **__: True  # noqa: E731
    for name in ("replace", "rename", "unlink", "remove", "mkdir", "rmdir", "link", "utime"):
        monkeypatch.setattr(os, name, refusing(getattr(os, name), always))
    flags = os.O_WRONLY | os.O_RDWR | os.O_CREAT
    monkeypatch.setattr(os, "open", refusing(os.open, lambda path, how, *_, **__: how & flags))
    monkeypatch.setattr(
        io, "open", refusing(io.open, lambda file, mode="r", *_, **__: set(mode) & set("wax+"))
    )
    return switch


def test_a_claim_that_cannot_be_removed(tmp_path: Path, read_only: SimpleNamespace) -> None:
    run = make(StudyFolder(tmp_path, "s"))
    with claims.claimed(run.path):
        read_only.on = True
    with pytest.raises(StorageError, match=r"cannot be written \(Read-only file system\)"):
        claims.take(run.path)
    for work in (lambda: run.forget("done", "run"), run.clear, run.forget_states):
        with pytest.raises(StorageError, match="cannot be written"):
            work()
    assert claims.holder(run.path) is None
    read_only.on = False
    assert list(run.path.glob("claim-*"))
    claim = claims.take(run.path)
    assert claim is not None
    claim.release()
    assert not list(run.path.glob("claim-*"))


@pytest.mark.slow
def test_results_turn_read_only_in_the_midst_of_a_run(
    tmp_path: Path, read_only: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flatbench.runs import resume
    from flatbench.runs.finish import finish
    from tests.test_runner import prepared

    run = prepared(tmp_path, train={**SMALL["train"], "epochs": 2})
    save = resume.TrainingSession._save

    def once(session: Any) -> None:
        save(session)
        read_only.on = True

    monkeypatch.setattr(resume.TrainingSession, "_save", once)
    with pytest.raises(StorageError) as refused:
        finish(run.path)
    assert str(refused.value).endswith(
        "cannot be written (Read-only file system); choose another output folder"
    )
    read_only.on = False
    monkeypatch.setattr(resume.TrainingSession, "_save", save)
    assert run.state() == "interrupted"
    assert finish(run.path) == "done"
    assert not list(run.path.glob("claim-*"))
    assert "resumed" in [event["event"] for event in events.read(run.path)]


def content(**changes: Any) -> dict[str, Any]:
    return {**SMALL, "methods": ["lora"], **changes}


def test_two_versions_in_one_folder_are_both_told(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path, "small")
    one, other = (study.Study(content(seeds=[seed]), "small") for seed in (0, 1))
    first = Here(one, folder).stage(last=False)
    assert first.lines == []
    version = _Version(folder, first.study)
    assert version.other() == []
    run = folder.run(first.pending[0])
    with claims.claimed(run.path):
        second = Here(other, folder).stage(last=False)
    (line,) = second.lines
    assert "another version of this study is being run here (1 of its runs under way)" in line
    os.utime(folder.file, ns=(1, 1))
    (line,) = version.other()
    assert "another version of this study is being run here as well" in line
    assert version.other() == []
    assert Here(other, folder).stage(last=False).lines == []  # nobody works on the first any more
    again = _Version(folder, second.study)
    os.utime(folder.file, ns=(2, 2))
    assert again.other() == []  # the same version, written by another process


def test_no_claim_stays_in_a_finished_run(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path, "small")
    here = Here(study.Study(content(), "small"), folder)
    run: RunDirectory = folder.run(here.stage(last=False).pending[0])
    metrics = {split: {"loss": 0.5, "accuracy": 0.5} for split in ("train", "validation", "test")}
    run.write("result", {"metrics": metrics, "training": {}})
    run.write("measures/cost", {"config": run.spec()["measures"]["cost"], "values": {"step_ms": 1.0}})
    run.finish(["cost"])
    with claims.claimed(run.path) as claim:
        assert claim is not None
        left = {**claim.holder.__dict__, "started": 1.0}
    (run.path / "claim-000001.json").write_text(json.dumps(left))
    assert here.stage(last=False).pending == []
    assert not list(run.path.glob("claim-*"))
