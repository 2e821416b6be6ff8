"""The slurm executor: jobs of submitit as processes of this machine, and on a cluster that a test plays."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from flatbench import adapters, claims, events
from flatbench.errors import InputError
from flatbench.executors.drive import Drive
from flatbench.executors.slurm import Slurm
from flatbench.store import RunDirectory
from tests.conftest import SMALL
from tests.executors import fake_slurm
from tests.executors.test_local import prepared
from tests.test_kill import newest, outcome

STUDY = {**SMALL, "methods": ["lora", "sam"], "seeds": [0, 1], "train": {**SMALL["train"], "epochs": 25}}


def submitits(folder: Path) -> list[psutil.Process]:
    """The processes of jobs whose files lie in this folder."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or ()
        if any("submitit." in word for word in words) and any(str(folder) in word for word in words):
            found.append(process)
    return found


def nothing_left(folder: Path) -> bool:
    _, alive = psutil.wait_procs(submitits(folder), timeout=20)
    return not alive


def start(folder: Path, *options: str) -> subprocess.Popen[bytes]:
    folder.mkdir(exist_ok=True)
    (folder / "small.yaml").write_text(yaml.safe_dump(STUDY, sort_keys=False))
    site = {"executor": {"name": "slurm", "cluster": "local", "at_once": 2}, "backoff": 0.1}
    (folder / "site.yaml").write_text(yaml.safe_dump(site))
    code = "from flatbench.cli import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, "run", "small.yaml", *options],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def finished(directories: list[RunDirectory], executor: Slurm) -> dict[str, str]:
    with executor:
        found = Drive(executor, backoff=0.1).run([d.path for d in directories])
        return {end.path.name: end.state for end in found}


def happened(directory: RunDirectory) -> list[str]:
    return [event["event"] for event in events.read(directory.path)]


def weights(directories: list[RunDirectory]) -> dict[str, str]:
    return {d.id: adapters.file_digest(d.adapter) for d in directories}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Weights of the runs that `prepared` makes of 150 epochs."""
    from flatbench import runner

    directories = prepared(tmp_path_factory.mktemp("undisturbed"), epochs=150)
    assert {runner.finish(directory.path) for directory in directories} == {"done"}
    return weights(directories)


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for key, value in fake_slurm.install(tmp_path / "slurm").items():
        monkeypatch.setenv(key, value)
    yield tmp_path
    assert nothing_left(tmp_path)


def until(what: str, condition: object, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


# --- processes of this machine ---


def test_ctrl_c_saves_and_the_study_goes_on_to_the_table_of_the_local_executor(tmp_path: Path) -> None:
    local = tmp_path / "local"
    assert start(local).wait(timeout=300) == 0
    folder = tmp_path / "jobs"
    process = start(folder, "--site", "site.yaml")
    runs = folder / "results" / "small" / "runs"
    until("no run was begun", lambda: newest(runs) and list(runs.glob("*/state.safetensors")), 120)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert nothing_left(folder)
    stopped = [path for path in runs.iterdir() if "stopped" in happened(RunDirectory(path))]
    assert all(claims.holder(path) is None for path in runs.iterdir())
    assert start(folder, "--site", "site.yaml").wait(timeout=300) == 0
    for path in stopped:
        assert happened(RunDirectory(path)).count("trained") == 1
    assert outcome(folder)[1] == outcome(local)[1]
    assert nothing_left(folder)
    results = [path for path in (folder / "results").rglob("*") if path.suffix == ".pkl"]
    assert not results


def test_a_killed_job_costs_nobody_a_run(tmp_path: Path, undisturbed: dict[str, str]) -> None:
    directories = prepared(tmp_path, epochs=150)[:2]

    def kill() -> None:
        until("no run was begun", lambda: any(d.state_file.is_file() for d in directories))
        for directory in directories:
            if (holder := claims.holder(directory.path)) is not None:
                os.kill(holder.pid, signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    states = finished(directories, Slurm(cluster="local", at_once=2, folder=tmp_path / "jobs"))
    assert set(states.values()) == {"done"}
    assert weights(directories) == {d.id: undisturbed[d.id] for d in directories}
    died = [e for d in directories for e in events.read(d.path) if e["event"] == "worker died"]
    assert died
    assert "its log" in died[0]["how"]


def test_the_debug_cluster_is_this_process(tmp_path: Path) -> None:
    directories = prepared(tmp_path, epochs=1)[:1]
    states = finished(directories, Slurm(cluster="debug", folder=tmp_path / "jobs"))
    assert list(states.values()) == ["done"]
    assert not submitits(tmp_path)


# --- a cluster ---


def test_a_study_is_an_array_of_jobs(cluster: Path, undisturbed: dict[str, str]) -> None:
    directories = prepared(cluster, epochs=150)
    executor = Slurm(
        folder=cluster / "jobs",
        at_once=2,
        cpus_per_run=1,
        memory_gb=1.5,
        minutes=30,
        setup=["export FROM_SETUP=1"],
        parameters={"partition": "long", "additional_parameters": {"mail-user": "me"}},
    )
    assert set(finished(directories, executor).values()) == {"done"}
    assert fake_slurm.submissions() == 1
    script = (cluster / "slurm" / "jobs" / "1000.script").read_text()
    for line in ("array=0-3%2", "mem=1536MB", "time=30", "partition=long", "mail-user=me"):
        assert f"#SBATCH --{line}\n" in script
    assert "export FROM_SETUP=1\n" in script
    assert weights(directories) == undisturbed
    assert {happened(d)[0] for d in directories} == {"submitted"}
    log = Path(events.read(directories[0].path)[0]["log"])
    assert log.parent == cluster / "jobs"
    assert log.is_file()


def test_a_preempted_job_saves_and_is_queued_again(cluster: Path, undisturbed: dict[str, str]) -> None:
    directories = prepared(cluster, epochs=150)[:1]
    directory = directories[0]

    def preempt() -> None:
        until("no run was begun", directory.state_file.is_file)
        fake_slurm.scancel("1000", "--signal", "SIGTERM")
        fake_slurm.scancel("1000", "--signal", "SIGUSR2")

    thread = threading.Thread(target=preempt, daemon=True)
    thread.start()
    assert set(finished(directories, Slurm(folder=cluster / "jobs")).values()) == {"done"}
    said = happened(directory)
    assert said.count("submitted") == 1
    assert said.index("stopped") < said.index("resumed")
    assert said.count("trained") == 1
    assert weights(directories) == {directory.id: undisturbed[directory.id]}


def test_jobs_outlive_the_command_and_are_found_again(
    cluster: Path, undisturbed: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    directories = prepared(cluster, epochs=150)[:2]
    paths = [directory.path for directory in directories]
    first = Slurm(folder=cluster / "jobs", at_once=1)
    with first:
        first.submit(paths)
        until("no run was begun", lambda: any(d.state_file.is_file() for d in directories))
    assert "jobs go on" in caplog.text
    assert "scancel 1000" in caplog.text
    assert set(finished(directories, Slurm(folder=cluster / "jobs", at_once=1)).values()) == {"done"}
    assert fake_slurm.submissions() == 1
    assert weights(directories) == {d.id: undisturbed[d.id] for d in directories}
    assert [happened(d).count("trained") for d in directories] == [1] * 2


def test_a_job_that_dies_is_submitted_anew(cluster: Path, undisturbed: dict[str, str]) -> None:
    directories = prepared(cluster, epochs=150)[:1]
    directory = directories[0]

    def kill() -> None:
        until("no run was begun", directory.state_file.is_file)
        os.killpg(fake_slurm.pid("1000"), signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    assert set(finished(directories, Slurm(folder=cluster / "jobs")).values()) == {"done"}
    died = [e for e in events.read(directory.path) if e["event"] == "worker died"]
    assert len(died) == 1
    assert "FAILED" in died[0]["how"]
    assert happened(directory).count("trained") == 1
    assert weights(directories) == {directory.id: undisturbed[directory.id]}


def test_status_tells_what_is_queued(tmp_path: Path) -> None:
    from flatbench import status
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
