"""The local executor loses nothing when its workers die."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import psutil
import yaml
from conftest import SMALL

from flatbench import plan, study
from flatbench.executors.drive import Drive
from flatbench.executors.local import Local
from flatbench.store import RunDirectory, StudyFolder


def prepared(root: Path, epochs: int) -> list[RunDirectory]:
    content = {**SMALL, "methods": ["lora", "sam"], "seeds": [0, 1]}
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
