"""The local executor loses nothing when its workers die."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import yaml

from flatbench import claims, events, plan, study
from flatbench.executors.drive import Drive
from flatbench.executors.local import Local
from flatbench.store import RunDirectory, StudyFolder
from tests.conftest import SMALL


def prepared(root: Path, epochs: int, **more: Any) -> list[RunDirectory]:
    content = {**SMALL, "methods": ["lora", "sam"], "seeds": [0, 1], **more}
    content["train"] = {**SMALL["train"], "epochs": epochs}
    loaded = study.Study(yaml.safe_load(yaml.safe_dump(content)), "small.yaml")
    folder = StudyFolder(root, "small")
    directories = []
    for run in plan.Plan(loaded, folder).final([]):
        directories.append(folder.run(run.id))
        directories[-1].prepare(run.spec())
    return directories


def kill_a_worker(directories: list[RunDirectory], killed: list[int]) -> None:
    """As soon as a run is under way, kill the process that trains it."""
    while not any(d.state_file.is_file() for d in directories):
        time.sleep(0.01)
    workers = [
        child
        for child in psutil.Process().children(recursive=True)
        if "spawn_main" in " ".join(child.cmdline())
    ]
    busiest = max(workers, key=lambda worker: worker.cpu_times().user)
    os.kill(busiest.pid, signal.SIGKILL)
    killed.append(busiest.pid)


def test_a_killed_worker_costs_nobody_a_run(tmp_path: Path) -> None:
    directories = prepared(tmp_path, epochs=150)
    paths = [d.path for d in directories]
    killed: list[int] = []
    killer = threading.Thread(target=kill_a_worker, args=(directories, killed), daemon=True)
    with Local(jobs=2) as executor:
        killer.start()
        states = {done.path: done.state for done in Drive(executor, backoff=0.1).run(paths)}
        killer.join(timeout=60)
        again = prepared(tmp_path / "again", epochs=1)  # the executor goes on to work
        states |= {done.path: done.state for done in Drive(executor).run([d.path for d in again])}
    assert killed
    assert len(states) == 8
    assert set(states.values()) == {"done"}
    assert not [c for c in psutil.Process().children() if "spawn_main" in " ".join(c.cmdline())]


def test_workers_that_die_between_runs_are_replaced(tmp_path: Path) -> None:
    directories = prepared(tmp_path, epochs=1)
    with Local(jobs=2) as executor:
        executor.warm()
        workers = {c.pid: c for c in psutil.Process().children() if "spawn_main" in " ".join(c.cmdline())}
        assert len(workers) == 2
        for worker in workers.values():
            worker.kill()
        while any(psutil.pid_exists(pid) for pid in workers):  # the executor sees it and waits for them
            time.sleep(0.05)
        states = {
            done.path: done.state for done in Drive(executor, retries=0).run([d.path for d in directories])
        }
    assert set(states.values()) == {"done"}
    assert not any("worker died" in e["event"] for d in directories for e in events.read(d.path))


def test_a_worker_asked_to_stop_while_it_measures_stops_no_study(tmp_path: Path) -> None:
    slow = {"name": "sam_sharpness", "examples": 60, "steps": 1500}
    directories = prepared(tmp_path, epochs=1, measures=[slow], seeds=[0])
    first = directories[0].path

    def stop_it() -> None:
        while not (first / "result.json").is_file():
            time.sleep(0.01)
        time.sleep(0.1)
        holder = claims.holder(first)
        assert holder is not None
        os.kill(holder.pid, signal.SIGTERM)

    stopper = threading.Thread(target=stop_it, daemon=True)
    with Local(jobs=2) as executor:
        stopper.start()
        ends = [end.state for end in Drive(executor, backoff=0.1).run([d.path for d in directories])]
    assert ends == ["done", "done"]
    said = {event["event"]: event for event in events.read(first)}
    assert said["worker died"]["how"] == "stopped by SIGTERM"
    assert said["stopped"]["by"] == "stopped by SIGTERM"
    assert [event["event"] for event in events.read(first)].count("trained") == 1
