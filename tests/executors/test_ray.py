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
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import psutil
import pytest
import yaml

from flatbench import claims, events, plan, sites, study
from flatbench.errors import InputError
from flatbench.executors import ray_driver
from flatbench.executors.drive import Drive
from flatbench.executors.ray import Ray
from flatbench.store import RunDirectory, StudyFolder
from tests.conftest import SMALL
from tests.test_kill import outcome

ray = pytest.importorskip("ray", reason="the ray executor needs Ray")

CONTENT = {**SMALL, "methods": ["lora", "sam"], "seeds": [0, 1], "measures": []}
CONTENT["train"] = {**SMALL["train"], "epochs": 80}
SITE = {"executor": {"name": "ray", "num_cpus": 2}, "backoff": 0.1}


def start(folder: Path, *options: str, site: dict[str, object] | None = None) -> subprocess.Popen[str]:
    """`flatbench run` on a small study, in a process group of its own as in a terminal."""
    folder.mkdir(exist_ok=True)
    (folder / "small.yaml").write_text(yaml.safe_dump(CONTENT, sort_keys=False))
    (folder / "site.yaml").write_text(yaml.safe_dump(site or SITE))
    code = "from flatbench.cli import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, "run", "small.yaml", *options],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        process_group=0,
    )


def finished(process: subprocess.Popen[str]) -> str:
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return said


def runs(folder: Path) -> list[RunDirectory]:
    return [RunDirectory(path) for path in (folder / "results" / "small" / "runs").glob("*")]


def training(process: subprocess.Popen[str], folder: Path) -> psutil.Process:
    """Wait until a run is within its training; the worker that trains it."""
    while process.poll() is None:
        for directory in runs(folder):
            holder = claims.holder(directory.path) if directory.state_file.is_file() else None
            if holder is not None and directory.result() is None:
                worker = psutil.Process(holder.pid)
                assert worker.name().startswith("ray::flatbench")
                return worker
        time.sleep(0.01)
    raise AssertionError(process.communicate()[0])


def happened(folder: Path) -> list[str]:
    return [event["event"] for directory in runs(folder) for event in events.read(directory.path)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[pd.DataFrame, dict[str, str]]:
    folder = tmp_path_factory.mktemp("local")
    finished(start(folder, "--jobs", "2"))
    return outcome(folder)


def assert_same(folder: Path, undisturbed: tuple[pd.DataFrame, dict[str, str]]) -> None:
    table, digests = outcome(folder)
    pd.testing.assert_frame_equal(table, undisturbed[0])
    assert digests == undisturbed[1]
    assert [happened(folder).count(what) for what in ("trained", "done")] == [4, 4]


def test_a_killed_worker_costs_nothing(
    tmp_path: Path, undisturbed: tuple[pd.DataFrame, dict[str, str]]
) -> None:
    process = start(tmp_path, "--site", "site.yaml")
    training(process, tmp_path).kill()
    said = finished(process).splitlines()
    assert_same(tmp_path, undisturbed)
    died = [e for d in runs(tmp_path) for e in events.read(d.path) if e["event"] == "worker died"]
    assert [event["how"] for event in died] == ["killed, or crashed"]
    # nothing of Ray's between the lines of the study
    assert len(said) == 6
    assert all(line.startswith("[") for line in said[1:5])


def test_stopped_and_killed_and_gone_on_with(
    tmp_path: Path, undisturbed: tuple[pd.DataFrame, dict[str, str]]
) -> None:
    process = start(tmp_path, "--executor", "ray", "--site", "site.yaml")
    training(process, tmp_path)
    started = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)  # Ctrl-C reaches the whole group
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.splitlines()[-1] == "interrupted; run the same command again to go on"
    assert "stopped" in happened(tmp_path)
    assert any(directory.state_file.is_file() for directory in runs(tmp_path))
    assert "worker died" not in happened(tmp_path)
    assert_nothing_left(started, 2)

    process = start(tmp_path, "--site", "site.yaml")
    while process.poll() is None and "resumed" not in happened(tmp_path):
        time.sleep(0.01)
    started = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate()
    assert_nothing_left(started, 10)

    finished(start(tmp_path, "--site", "site.yaml"))
    assert_same(tmp_path, undisturbed)


def assert_nothing_left(started: list[psutil.Process], seconds: float) -> None:
    assert len(started) > 5
    deadline = time.monotonic() + seconds
    while [p for p in started if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]:
        assert time.monotonic() < deadline, "Ray outlived the process that had started it"
        time.sleep(0.05)
    assert not list(Path(tempfile.gettempdir()).glob("flatbench-ray-*"))


@pytest.mark.long
@pytest.mark.parametrize("name", ["gcs_server", "raylet", "driver"])
def test_a_lost_local_cluster_is_started_again(tmp_path: Path, undisturbed: object, name: str) -> None:
    process = start(tmp_path, "--site", "site.yaml")
    training(process, tmp_path)
    of_ray = psutil.Process(process.pid).children(recursive=True)
    raylet = next(child for child in of_ray if child.name() == "raylet")
    victim = raylet.parent() if name == "driver" else next(c for c in of_ray if c.name() == name)
    assert victim is not None
    victim.kill()
    finished(process)
    assert_same(tmp_path, undisturbed)  # type: ignore[arg-type]


@pytest.mark.long
def test_a_signal_to_the_whole_group_saves(tmp_path: Path) -> None:
    process = start(tmp_path, "--site", "site.yaml")
    training(process, tmp_path)
    os.killpg(process.pid, signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    assert "stopped" in happened(tmp_path)
    assert any(directory.state_file.is_file() for directory in runs(tmp_path))


def prepared(root: Path, epochs: int = 1) -> list[Path]:
    content = {**CONTENT, "methods": ["lora"]}
    content["train"] = {**SMALL["train"], "epochs": epochs}
    loaded = study.Study(yaml.safe_load(yaml.safe_dump(content)), "small.yaml")
    folder = StudyFolder(root, "small")
    found = []
    for run in plan.Plan(loaded, folder).final([]):
        folder.run(run.id).prepare(run.spec())
        found.append(folder.run(run.id).path)
    return found


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
        assert process.wait(timeout=120) == 0, (folder / "log").read_text()
        yield f"127.0.0.1:{port}"
    finally:
        ray_driver.end_session(process.pid)
        shutil.rmtree(folder, ignore_errors=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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
