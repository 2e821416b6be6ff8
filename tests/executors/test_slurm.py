"""The slurm executor: jobs of submitit as processes of this machine, and on a cluster that a test plays."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from flatbench.errors import InputError
from flatbench.executors.slurm import Slurm
from flatbench.orchestration.queue import Drive
from flatbench.store import RunDirectory, claims, events
from tests import warm
from tests.executors import fake_slurm
from tests.executors.studies import (
    PAIR,
    Outcome,
    assert_no_step_twice,
    assert_same,
    happened,
    prepared,
    runs,
    start,
    weights,
    written,
)
from tests.holds import Hold, gone

pytestmark = pytest.mark.slow


def submitits(folder: Path) -> list[psutil.Process]:
    """The processes of jobs whose files lie in this folder."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or ()
        if any("submitit." in word for word in words) and any(str(folder) in word for word in words):
            found.append(process)
    return found


def nothing_left(folder: Path) -> bool:
    return gone(submitits(folder))


def finished(
    directories: list[RunDirectory], executor: Slurm, meanwhile: Callable[[], None] = lambda: None
) -> set[str]:
    """How runs end while something is done to them in another thread, whose error is raised here."""
    raised: list[BaseException] = []

    def do() -> None:
        try:
            meanwhile()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=do, daemon=True)
    with executor:
        thread.start()
        states = {end.state for end in Drive(executor, backoff=0.1).run([d.path for d in directories])}
    thread.join()
    if raised:
        raise raised[0]
    return states


@pytest.fixture
def hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hold]:
    """Heeded by jobs that are submitted from now on."""
    found = Hold(tmp_path / "holds")
    for key, value in found.environment().items():
        monkeypatch.setenv(key, value)
    yield found
    found.open()


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    warm.server()
    for key, value in fake_slurm.install(tmp_path / "slurm").items():
        monkeypatch.setenv(key, value)
    yield tmp_path
    assert nothing_left(tmp_path)


# --- processes of this machine ---


def test_stopped_gone_on_with_and_killed(tmp_path: Path, hold: Hold, undisturbed_pair: Outcome) -> None:
    """Ctrl-C saves, the study goes on to the table of the local executor, and a killed job costs no run."""
    site = {"executor": {"name": "slurm", "cluster": "local", "at_once": 2}, "backoff": 0.1}
    folder = written(tmp_path / "study", PAIR, site)
    hold.close("epoch")
    process = start(folder, "--site", "site.yaml", FLATBENCH_TEST_PLANS_HERE="1")
    hold.wait(2, process)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130
    assert nothing_left(folder)
    directories = runs(folder)
    assert [happened(directory)[-1] for directory in directories] == ["stopped"] * 2
    assert all(claims.holder(directory.path) is None for directory in directories)

    def kill() -> None:
        victim, _ = hold.wait(2)
        os.kill(victim.pid, signal.SIGKILL)
        hold.open()

    executor = Slurm(cluster="local", at_once=2, folder=folder / "slurm-jobs")
    assert finished(directories, executor, kill) == {"done"}
    assert [happened(directory).count("trained") for directory in directories] == [1, 1]
    assert_same(folder, undisturbed_pair)
    assert_no_step_twice(*directories)
    (died,) = [e for d in directories for e in events.read(d.path) if e["event"] == "worker died"]
    assert "its log" in died["how"]
    assert nothing_left(folder)
    assert not list((folder / "results").rglob("*.pkl"))


def test_the_debug_cluster_is_this_process(tmp_path: Path) -> None:
    directories = prepared(tmp_path, epochs=1)[:1]
    assert finished(directories, Slurm(cluster="debug", folder=tmp_path / "jobs")) == {"done"}
    assert not submitits(tmp_path)


# --- a cluster ---


def test_a_study_is_an_array_of_jobs(cluster: Path, undisturbed_weights: dict[str, str]) -> None:
    directories = prepared(cluster)
    executor = Slurm(
        folder=cluster / "jobs",
        at_once=2,
        cpus_per_run=1,
        memory_gb=1.5,
        minutes=30,
        setup=["export FROM_SETUP=1"],
        parameters={"partition": "long", "additional_parameters": {"mail-user": "me"}},
    )
    assert finished(directories, executor) == {"done"}
    assert fake_slurm.submissions() == 1
    script = (cluster / "slurm" / "jobs" / "1000.script").read_text()
    for line in ("array=0-3%2", "mem=1536MB", "time=30", "partition=long", "mail-user=me"):
        assert f"#SBATCH --{line}\n" in script
    assert "export FROM_SETUP=1\n" in script
    assert weights(directories) == undisturbed_weights
    assert {happened(d)[0] for d in directories} == {"submitted"}
    log = Path(events.read(directories[0].path)[0]["log"])
    assert log.parent == cluster / "jobs"
    assert log.is_file()


def test_a_preempted_job_saves_and_is_queued_again(
    cluster: Path, hold: Hold, undisturbed_weights: dict[str, str]
) -> None:
    directory = prepared(cluster)[0]
    hold.close("epoch")

    def preempt() -> None:
        hold.wait(1)
        # the first one ends the hold; the other one, which tells submitit to ask for another job, may come
        # while the run saves or after it has let its claim go
        os.kill(hold.held()[0].pid, signal.SIGSTOP)
        fake_slurm.scancel("1000", "--signal", "SIGTERM")
        fake_slurm.scancel("1000", "--signal", "SIGUSR2")
        hold.open()
        fake_slurm.scancel("1000", "--signal", "SIGCONT")

    assert finished([directory], Slurm(folder=cluster / "jobs"), preempt) == {"done"}
    said = happened(directory)
    assert said.count("submitted") == 1
    assert said.index("stopped") < said.index("resumed")
    assert said.count("trained") == 1
    assert weights([directory]) == {directory.id: undisturbed_weights[directory.id]}
    assert_no_step_twice(directory)


def test_jobs_outlive_the_command_and_are_found_again(
    cluster: Path, hold: Hold, undisturbed_weights: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    directories = prepared(cluster)[:2]
    hold.close("epoch")
    with Slurm(folder=cluster / "jobs", at_once=1) as first:
        first.submit([directory.path for directory in directories])
        hold.wait(1)
    assert "jobs go on" in caplog.text
    assert "scancel 1000" in caplog.text
    assert finished(directories, Slurm(folder=cluster / "jobs", at_once=1), hold.open) == {"done"}
    assert fake_slurm.submissions() == 1
    assert weights(directories) == {d.id: undisturbed_weights[d.id] for d in directories}
    assert [happened(d).count("trained") for d in directories] == [1] * 2


def test_a_job_that_dies_is_submitted_anew(
    cluster: Path, hold: Hold, undisturbed_weights: dict[str, str]
) -> None:
    directory = prepared(cluster)[0]
    hold.close("epoch")

    def kill() -> None:
        hold.wait(1)
        fake_slurm.kill("1000")
        hold.open()

    assert finished([directory], Slurm(folder=cluster / "jobs"), kill) == {"done"}
    (died,) = [e for e in events.read(directory.path) if e["event"] == "worker died"]
    assert "FAILED" in died["how"]
    assert fake_slurm.submissions() == 2
    assert happened(directory).count("trained") == 1
    assert weights([directory]) == {directory.id: undisturbed_weights[directory.id]}
    assert_no_step_twice(directory)


def test_status_tells_what_is_queued(tmp_path: Path) -> None:
    from flatbench.cli import status
    from flatbench.store import StudyFolder

    folder = StudyFolder(tmp_path, "small")
    (directory,) = prepared(tmp_path, epochs=1)[:1]
    place = {"id": directory.id, "stage": "final", "condition": "", "method": "lora", "hyper": {}}
    folder.write({"runs": [place]})
    assert [run.state for run in status.survey(folder)] == ["planned"]
    events.record(directory.path, events.SUBMITTED, cluster="slurm", job="7", log="7.err")
    (run,) = status.survey(folder)
    assert run.state == json.loads(run.line())["state"] == "queued"
    events.record(directory.path, "worker died", how="job 7 ended as CANCELLED")
    assert [run.state for run in status.survey(folder)] == ["planned"]


# --- what is refused ---


def test_no_cluster_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="no srun"):
        Slurm(folder=tmp_path / "jobs")


def test_submitit_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(InputError, match=r"flatbench-lora\[slurm\]"):
        Slurm(folder=tmp_path / "jobs")


def test_unknown_parameters_and_failing_submissions(cluster: Path) -> None:
    directories = prepared(cluster, epochs=1)[:1]
    paths = [directory.path for directory in directories]
    with (
        Slurm(folder=cluster / "jobs", parameters={"partitoin": "long"}) as executor,
        pytest.raises(InputError, match="partitoin"),
    ):
        executor.submit(paths)
    (cluster / "slurm" / "bin" / "sbatch").write_text("#!/bin/sh\necho 'invalid account' >&2\nexit 1\n")
    with (
        Slurm(folder=cluster / "jobs") as executor,
        pytest.raises(InputError, match=r"could not be submitted: .*invalid account"),
    ):
        executor.submit(paths)
    with pytest.raises(InputError, match="parameters are sbatch's"):
        Slurm(cluster="local", folder=cluster / "jobs", parameters={"partition": "long"})


def test_pickled_data_stays_out_of_the_results(tmp_path: Path) -> None:
    directories = prepared(tmp_path, epochs=1)[:1]
    executor = Slurm(cluster="local", folder=tmp_path / "small" / "jobs")
    with pytest.raises(InputError, match="name another one"), executor:
        executor.submit([directory.path for directory in directories])
