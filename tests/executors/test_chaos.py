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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
import yaml

from flatbench import claims, events
from flatbench.files import TEMPORARY
from flatbench.store import StudyFolder
from tests.conftest import SMALL
from tests.test_kill import outcome

#: a worker is the process that holds a run's claim; the coordinator is the command that the user started
VICTIMS = ("worker", "worker at a write", "coordinator")
SITES: dict[str, Any] = {
    "local": {"name": "local", "jobs": 2},
    "slurm": {"name": "slurm", "cluster": "local", "at_once": 2},
    "ray": {"name": "ray", "num_cpus": 2},
}
_MARK = "FLATBENCH_CHAOS"


def study(runs: int) -> dict[str, Any]:
    """Four methods, tuned over two learning rates, and so many seeds that there are ``runs`` runs in all."""
    return {
        **SMALL,
        "methods": ["lora", "sam", "flat_lora", "eflat_lora"],
        "tune": {"grid": {"lr": [1e-2, 3e-2]}, "seeds": [9]},
        "seeds": list(range((runs - 8) // 4)),
        "train": {**SMALL["train"], "epochs": 60},
        "measures": [{"name": "sam_sharpness", "examples": 20, "steps": 2}],
    }


class Chaos:
    """One study in one folder, and the processes that came of it."""

    def __init__(self, folder: Path, runs: int, executor: Any) -> None:
        self.folder, self.mark = folder, uuid.uuid4().hex
        folder.mkdir()
        (folder / "small.yaml").write_text(yaml.safe_dump(study(runs), sort_keys=False))
        site = {"executor": executor, "retries": 1000, "backoff": 0.05, "lease": 10, "grace": 20}
        (folder / "site.yaml").write_text(yaml.safe_dump(site))
        self.study = StudyFolder(folder / "results", "small")

    def start(self) -> subprocess.Popen[bytes]:
        code = "from flatbench.cli import main; main()"
        with (self.folder / "output.txt").open("ab") as output:
            return subprocess.Popen(
                [sys.executable, "-c", code, "run", "small.yaml", "--site", "site.yaml"],
                cwd=self.folder,
                env={**os.environ, _MARK: self.mark},
                stdout=output,
                stderr=output,
            )

    def alive(self) -> list[psutil.Process]:
        """Every process that descends from this study's."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(_MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def holders(self) -> list[claims.Holder]:
        paths = (self.study.path / "runs").glob("*/claim-*")
        return [h for path in {p.parent for p in paths} if (h := claims.holder(path)) is not None]

    def writing(self) -> claims.Holder | None:
        """Who writes a file at this very moment."""
        for path in (self.study.path / "runs").glob(f"*/{TEMPORARY}*"):
            if "clock" not in path.name and (holder := claims.holder(path.parent)) is not None:
                return holder
        return None

    def kill(self, victim: str, chance: random.Random, coordinator: subprocess.Popen[bytes]) -> bool:
        """Kill one of the study's processes at a moment of its work that nobody chose.

        Returns False if the study was over before.
        """
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and coordinator.poll() is None:
            if victim == "worker at a write":
                found = self.writing()
                holders = [found] if found is not None else []
            else:
                holders = self.holders()
                time.sleep(chance.uniform(0, 1.5))
            if holders:
                pid = coordinator.pid if victim == "coordinator" else chance.choice(holders).pid
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
                return True
        return False


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """What comes of a study of so many runs, made once for all executors."""
    made: dict[int, tuple[pd.DataFrame, dict[str, str]]] = {}

    def of(runs: int) -> tuple[pd.DataFrame, dict[str, str]]:
        if runs not in made:
            chaos = Chaos(tmp_path_factory.mktemp("undisturbed") / "study", runs, SITES["local"])
            assert chaos.start().wait(timeout=900) == 0, (chaos.folder / "output.txt").read_text()
            made[runs] = outcome(chaos.folder)
        return made[runs]

    return of


@pytest.mark.parametrize("executor", SITES)
def test_a_few_are_killed(tmp_path: Path, undisturbed: Any, executor: str) -> None:
    survives(tmp_path / "study", undisturbed, executor, runs=12, kills=3)


@pytest.mark.long
@pytest.mark.parametrize("executor", SITES)
def test_thirty_are_killed(tmp_path: Path, undisturbed: Any, executor: str) -> None:
    survives(tmp_path / "study", undisturbed, executor, runs=40, kills=32)


def survives(folder: Path, undisturbed: Any, executor: str, runs: int, kills: int) -> None:
    expected_table, expected_digests = undisturbed(runs)
    chaos = Chaos(folder, runs, SITES[executor])
    chance = random.Random(f"{executor} {runs}")
    victims = (VICTIMS * kills)[:kills]
    said = folder / "output.txt"
    coordinator = chaos.start()
    for number, victim in enumerate(chance.sample(victims, kills)):
        assert chaos.kill(victim, chance, coordinator), f"over after {number} kills: {said.read_text()}"
        if victim == "coordinator":
            coordinator.wait()
            coordinator = chaos.start()
    print(f"{executor}: killed {dict(Counter(victims))} of a study of {runs} runs")
    assert coordinator.wait(timeout=900) == 0, said.read_text()
    table, digests = outcome(folder)
    assert len(digests) == runs
    assert digests == expected_digests
    pd.testing.assert_frame_equal(table, expected_table)
    for directory in chaos.study.directories():
        happened = Counter(event["event"] for event in events.read(directory.path))
        assert happened["trained"] <= 1, f"{directory.path} was trained to its end twice"
    _, left = psutil.wait_procs(chaos.alive(), timeout=30)
    assert not left, [process.cmdline() for process in left]
    files = [p.name for p in (chaos.study.path / "runs").rglob("*")]
    assert not [name for name in files if name.startswith((".", "claim", "state"))]
