"""Whoever is killed, and whenever: the study ends with the table that it has when nobody is."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from flatbench.store import StudyFolder, claims, events
from flatbench.store.files import TEMPORARY
from tests.conftest import SMALL
from tests.executors.studies import STUDY, Outcome, assert_same, left_over, runs, written
from tests.executors.studies import undisturbed as found_undisturbed
from tests.holds import PATIENCE, Hold, gone, until

pytestmark = pytest.mark.slow


#: a worker is the process that holds a run's claim; the coordinator is the command that the user started
VICTIMS = ("worker", "worker at a write", "coordinator")
SITES: dict[str, Any] = {
    "local": {"name": "local", "jobs": 2},
    "slurm": {"name": "slurm", "cluster": "local", "at_once": 2},
    "ray": {"name": "ray", "num_cpus": 2},
}
_MARK = "FLATBENCH_CHAOS"


def study(count: int) -> dict[str, Any]:
    """Four methods, tuned over two learning rates, and so many seeds that there are ``count`` long runs."""
    return {
        **SMALL,
        "methods": ["lora", "sam", "flat_lora", "eflat_lora"],
        "tune": {"grid": {"lr": [1e-2, 3e-2]}, "seeds": [9]},
        "seeds": list(range((count - 8) // 4)),
        "train": {**SMALL["train"], "epochs": 60},
        "measures": [{"name": "sam_sharpness", "examples": 20, "steps": 2}],
    }


class Chaos:
    """One study in one folder, and the processes that came of it."""

    def __init__(self, folder: Path, content: dict[str, Any], executor: Any, **environment: str) -> None:
        self.environment = {**os.environ, **environment, _MARK: uuid.uuid4().hex}
        site = {"executor": executor, "retries": 1000, "backoff": 0.05}
        self.folder = written(folder, content, site)
        self.study = StudyFolder(folder / "results", "small")

    def start(self) -> subprocess.Popen[bytes]:
        code = "from flatbench.cli import main; main()"
        with (self.folder / "output.txt").open("ab") as output:
            return subprocess.Popen(
                [sys.executable, "-c", code, "run", "small.yaml", "--site", "site.yaml"],
                cwd=self.folder,
                env=self.environment,
                stdout=output,
                stderr=output,
            )

    def said(self) -> str:
        return (self.folder / "output.txt").read_text()

    def alive(self) -> list[psutil.Process]:
        """Every process that descends from this study's."""
        found = []
        for process in psutil.process_iter():
            try:
                marked = process.environ().get(_MARK) == self.environment[_MARK]
                if marked and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def holders(self) -> list[claims.Holder]:
        paths = (self.study.path / "runs").glob("*/claim-*")
        return [h for path in {p.parent for p in paths} if (h := claims.holder(path)) is not None]

    def writing(self) -> list[claims.Holder]:
        """Who writes a file at this very moment."""
        for path in (self.study.path / "runs").glob(f"*/{TEMPORARY}*"):
            if "clock" not in path.name and (holder := claims.holder(path.parent)) is not None:
                return [holder]
        return []

    def kill(self, victim: str, chance: random.Random, coordinator: subprocess.Popen[bytes]) -> bool:
        """Kill one of the study's processes at a moment of its work that nobody chose.

        Returns False if the study was over before.
        """
        find: Callable[[], list[claims.Holder]] = self.holders
        if victim == "worker at a write":
            find = self.writing
        else:
            until("a run under way", lambda: coordinator.poll() is not None or self.holders())
            time.sleep(chance.uniform(0, 1.5))
        while True:
            holders = until("a victim", lambda: coordinator.poll() is not None or find())
            if coordinator.poll() is not None or not isinstance(holders, list):
                return False
            try:
                os.kill(
                    coordinator.pid if victim == "coordinator" else chance.choice(holders).pid, signal.SIGKILL
                )
                return True
            except ProcessLookupError:
                continue

    def ends_as(self, expected: Outcome, coordinator: subprocess.Popen[bytes]) -> None:
        """Wait for the study, whose outcome is the expected one; nothing else is left of it."""
        assert coordinator.wait() == 0, self.said()
        assert_same(self.folder, expected)
        for directory in self.study.directories():
            happened = Counter(event["event"] for event in events.read(directory.path))
            assert happened["trained"] <= 1, f"{directory.path} was trained to its end twice"
        assert gone(self.alive())
        assert not left_over(runs(self.folder))


def test_a_few_are_killed(tmp_path: Path, undisturbed: Outcome) -> None:
    """On the local executor, at moments at which runs wait for it.

    With slurm and ray: `test_slurm.test_stopped_gone_on_with_and_killed` and
    `test_ray.test_killed_stopped_and_gone_on_with`, and many kills of each below.
    """
    hold = Hold(tmp_path / "holds")
    chaos = Chaos(tmp_path / "study", STUDY, SITES["local"], **hold.environment())
    hold.close("epoch")
    coordinator = chaos.start()
    victim, other = hold.wait(2, coordinator)
    os.kill(victim.pid, signal.SIGKILL)
    # the next one dies with a file half-way to its place; the state before it is kept under another name
    hold.close(write="state.safetensors")
    until("the other worker's hold", lambda: (other.pid, "write") in at_what(hold), coordinator)
    os.kill(other.pid, signal.SIGKILL)
    until("two new workers", lambda: len(hold.held()) == 2, coordinator)
    hold.close("trained")
    hold.wait(2, coordinator, at="trained")
    workers = psutil.Process(coordinator.pid).children(recursive=True)
    assert len(workers) >= 2
    coordinator.kill()
    coordinator.wait()
    assert gone(workers), "workers outlived the process that had started them"
    hold.open()
    chaos.ends_as(undisturbed, chaos.start())
    happened = Counter(e["event"] for d in runs(chaos.folder) for e in events.read(d.path))
    assert happened["worker died"] == 2
    assert happened["resumed"] >= 2
    assert happened["taken over"] >= 4


def at_what(hold: Hold) -> list[tuple[int, str]]:
    return [(held.pid, held.at) for held in hold.held()]


@pytest.fixture(scope="module")
def undisturbed_long(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return found_undisturbed(tmp_path_factory.mktemp("undisturbed_long"), study(40))


@pytest.mark.long
@pytest.mark.parametrize("executor", SITES)
def test_thirty_are_killed(tmp_path: Path, undisturbed_long: Outcome, executor: str) -> None:
    """At moments that nobody chose."""
    kills = 32
    chaos = Chaos(tmp_path / "study", study(40), SITES[executor])
    chance = random.Random(f"{executor} 40")
    victims = (VICTIMS * kills)[:kills]
    coordinator = chaos.start()
    for number, victim in enumerate(chance.sample(victims, kills)):
        assert chaos.kill(victim, chance, coordinator), f"over after {number} kills: {chaos.said()}"
        if victim == "coordinator":
            coordinator.wait(PATIENCE)
            coordinator = chaos.start()
    print(f"{executor}: killed {dict(Counter(victims))} of a study of 40 runs")
    chaos.ends_as(undisturbed_long, coordinator)
