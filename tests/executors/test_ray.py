"""The ray executor on clusters really started: the same table, nothing lost, nothing left running."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from flatbench.errors import InputError
from flatbench.executors import ray_driver
from flatbench.executors.ray import Ray
from flatbench.orchestration import site as sites
from flatbench.orchestration.queue import Drive
from flatbench.store import events
from tests import warm
from tests.executors import studies
from tests.executors.studies import PAIR, Outcome, assert_no_step_twice, assert_same, happened, runs, written
from tests.holds import PATIENCE, Hold, gone, until

pytestmark = pytest.mark.slow


ray = pytest.importorskip("ray", reason="the ray executor needs Ray")

#: one core, so that there is one worker, which has to import torch
SITE = {"executor": {"name": "ray", "num_cpus": 1}, "backoff": 0.1}


def start(folder: Path, hold: Hold, *options: str) -> warm.Command:
    """`flatbench run` on a small study, in a process group of its own as in a terminal.

    It plans in its own process, which has imported torch as no command has; others plan as they do.
    """
    return studies.start(folder, *options, "--site", "site.yaml", hold=hold, FLATBENCH_TEST_PLANS_HERE="1")


@pytest.fixture(autouse=True)
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where clusters of commands lie, and no others; a short name, as Ray's sockets need."""
    folder = Path(tempfile.mkdtemp(prefix="fb-", dir="/tmp"))
    monkeypatch.setenv("TMPDIR", str(folder))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def said(folder: Path) -> str:
    return (folder / "output.txt").read_text()


def test_killed_stopped_and_gone_on_with(tmp_path: Path, temporary: Path, undisturbed_pair: Outcome) -> None:
    """A worker is killed; then the command is stopped, killed, and run to its end."""
    hold, folder = Hold(tmp_path / "holds"), written(tmp_path / "study", PAIR, SITE)
    hold.close("epoch")
    process = start(folder, hold, "--executor", "ray")
    (victim,) = hold.wait(1, process)
    worker = psutil.Process(victim.pid)
    assert worker.name().startswith("ray::flatbench")
    worker.kill()
    until("another worker", lambda: [h for h in hold.held() if h.pid != victim.pid], process)
    died = [e for d in runs(folder) for e in events.read(d.path) if e["event"] == "worker died"]
    assert [event["how"] for event in died] == ["killed, or crashed"]

    started = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)  # Ctrl-C reaches the whole group
    assert process.wait() == 130
    assert said(folder).splitlines()[-1] == "interrupted; run the same command again to go on"
    assert "stopped" in happened(*runs(folder))
    assert any(directory.state_file.is_file() for directory in runs(folder))
    assert happened(*runs(folder)).count("worker died") == 1
    assert_nothing_left(started, temporary)

    before = happened(*runs(folder)).count("resumed")
    process = start(folder, hold)
    hold.wait(1, process)
    assert happened(*runs(folder)).count("resumed") > before
    started = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    assert_nothing_left(started, temporary)

    hold.open()
    (folder / "output.txt").unlink()
    assert start(folder, hold).wait() == 0, said(folder)
    assert_done(folder, undisturbed_pair)
    assert_no_step_twice(*runs(folder))
    # nothing of Ray's between the lines of the study
    lines = said(folder).splitlines()
    assert len(lines) == 4
    assert all(line.startswith("[") for line in lines[1:3])


def assert_done(folder: Path, undisturbed: Outcome) -> None:
    assert_same(folder, undisturbed)
    assert [happened(*runs(folder)).count(what) for what in ("trained", "done")] == [2, 2]


def assert_nothing_left(started: list[psutil.Process], temporary: Path) -> None:
    assert len(started) > 4
    assert gone(started), "Ray outlived the process that had started it"
    assert not list(temporary.glob("flatbench-ray-*"))


@pytest.mark.long
@pytest.mark.parametrize("name", ["gcs_server", "raylet", "driver"])
def test_a_lost_local_cluster_is_started_again(tmp_path: Path, undisturbed_pair: Outcome, name: str) -> None:
    hold, folder = Hold(tmp_path / "holds"), written(tmp_path / "study", PAIR, SITE)
    hold.close("epoch")
    process = start(folder, hold)
    hold.wait(1, process)
    of_ray = psutil.Process(process.pid).children(recursive=True)
    raylet = next(child for child in of_ray if child.name() == "raylet")
    victim = raylet.parent() if name == "driver" else next(c for c in of_ray if c.name() == name)
    assert victim is not None
    victim.kill()
    hold.open()
    assert process.wait() == 0, said(folder)
    assert_done(folder, undisturbed_pair)


@pytest.mark.long
def test_a_signal_to_the_whole_group_saves(tmp_path: Path) -> None:
    hold, folder = Hold(tmp_path / "holds"), written(tmp_path / "study", PAIR, SITE)
    hold.close("epoch")
    process = start(folder, hold)
    hold.wait(1, process)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait() == 143
    assert "stopped" in happened(*runs(folder))
    assert any(directory.state_file.is_file() for directory in runs(folder))


def prepared(root: Path) -> list[Path]:
    """Two runs of an epoch."""
    found = studies.prepared(root, epochs=1, methods=["lora"], measures=[])
    return [directory.path for directory in found]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A cluster that others have started, without our environment and in another folder."""
    port, folder = free_port(), Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", uuid.uuid4().hex)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("FLATBENCH_")}
    command = [
        str(Path(sys.executable).with_name("ray")),
        "start",
        "--head",
        f"--port={port}",
        "--num-cpus=2",
        "--include-dashboard=false",
        "--disable-usage-stats",
        f"--object-store-memory={ray_driver.OBJECT_STORE}",
        f"--temp-dir={folder}",
    ]
    # by files: what it leaves running would hold pipes open
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command, env=environment, cwd=folder, stdout=log, stderr=log, start_new_session=True
        )
    try:
        assert process.wait(timeout=PATIENCE) == 0, (folder / "log").read_text()
        yield f"127.0.0.1:{port}"
    finally:
        ray_driver.end_session(process.pid)
        shutil.rmtree(folder, ignore_errors=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.long  # runs on a cluster of our own are killed, stopped and gone on with above
def test_a_given_cluster(
    tmp_path: Path, cluster: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cache").mkdir()
    paths = prepared(Path("results"))
    # a relative path, and a variable that only this process has
    monkeypatch.setenv("FLATBENCH_CACHE", "cache")
    with Ray(address=cluster) as executor:
        states = {done.path: done.state for done in Drive(executor).run(paths)}
    assert states == dict.fromkeys(paths, "done")
    assert list((tmp_path / "cache").iterdir()), "FLATBENCH_* did not reach the workers"
    with Ray(address=cluster, resources={"rare": 1}) as executor:
        executor.submit(prepared(Path("more")))
        assert executor.ended(0.5) == []
    assert "no node of the Ray cluster has what a run asks for (1 CPU, 1 rare) now" in caplog.text


def test_what_a_machine_has_not_is_refused(tmp_path: Path) -> None:
    with Ray(num_cpus=1, cpus_per_run=3) as executor, pytest.raises(InputError) as refused:
        executor.submit([tmp_path])
    assert "a run asks for 3 CPU and this machine has 1 CPU" in str(refused.value)


def test_a_cluster_that_does_not_answer(tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    with Ray(address=address) as executor, pytest.raises(InputError) as refused:
        executor.submit([tmp_path])
    assert f"the Ray cluster at {address} cannot be reached: nothing answers there" in str(refused.value)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'flatbench-lora\[ray\]'"):
        Ray().warm()


WRONG = {
    "{name: ray, gpus_per_run: 1.5}": "executor.gpus_per_run: a part of one GPU, or whole ones",
    "{name: ray, cpus_per_run: 0}": "executor.cpus_per_run",
    "{name: ray, resources: {CPU: 1}}": "executor.resources: the option for CPU is cpus_per_run",
    "{name: ray, address: auto, num_cpus: 2}": "executor.num_cpus: for a cluster on this machine",
    "{name: ray, runtime_env: {env_vars: {A: b}}}": "executor.runtime_env: for a given cluster",
    "{name: ray, adress: auto}": "executor.adress: unknown key; did you mean 'address'?",
}


@pytest.mark.parametrize(("text", "message"), WRONG.items())
def test_options_that_cannot_be(text: str, message: str) -> None:
    site = sites.Site(executor=yaml.safe_load(text))
    with pytest.raises(InputError) as error:
        sites.executor(site, "site.yaml")
    assert message in str(error.value)


def test_how_tasks_end() -> None:
    from ray import exceptions

    said = {
        exceptions.WorkerCrashedError(): "killed, or crashed",
        exceptions.OutOfMemoryError(
            "pages\nof advice"
        ): "killed by Ray because the memory of its node was used up",
        exceptions.NodeDiedError("pages\nof advice"): "its node was lost",
        exceptions.LocalRayletDiedError(): "its node was lost",
        exceptions.TaskCancelledError(): "cancelled in Ray",
        exceptions.RaySystemError("\nsomething\nelse"): "System error: something",
    }
    for error, words in said.items():
        assert ray_driver.how(error).startswith(words.partition(":")[0])
