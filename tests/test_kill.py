"""SIGKILL at moments that nobody chose: the study started again ends as if nothing had happened."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest
import yaml

from flatbench import adapters, store
from flatbench.store import StudyFolder
from tests.conftest import SMALL

STUDY = {
    **SMALL,
    "methods": ["lora", "eflat_lora", {"name": "sam", "grid": {"rho": [0.05]}}],
    "tune": {"grid": {"lr": [1e-2]}, "seeds": [9]},
    "seeds": [0, 1],
    "train": {**SMALL["train"], "epochs": 25},
    "measures": [{"name": "sam_sharpness", "examples": 20, "steps": 2}],
}


def start(folder: Path, jobs: int) -> subprocess.Popen[bytes]:
    folder.mkdir(exist_ok=True)
    (folder / "small.yaml").write_text(yaml.safe_dump(STUDY, sort_keys=False))
    code = "from flatbench.cli import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, "run", "small.yaml", "--jobs", str(jobs)],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def outcome(folder: Path) -> tuple[pd.DataFrame, dict[str, str]]:
    """The table without clocks, and a digest of each run's weights."""
    study = StudyFolder(folder / "results", "small")
    table = store.table(study)
    clocks = [c for c in table.columns if c.endswith("seconds")]
    digests = {d.id: adapters.file_digest(d.adapter) for d in study.directories()}
    return table.drop(columns=clocks), digests


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[pd.DataFrame, dict[str, str]]:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert start(folder, 2).wait(timeout=300) == 0
    return outcome(folder)


@pytest.mark.parametrize("jobs", [1, 2])
def test_killed_and_started_again(tmp_path: Path, undisturbed: object, jobs: int) -> None:
    kills(tmp_path, undisturbed, jobs, count=2, seed=jobs)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(4))
def test_killed_often(tmp_path: Path, undisturbed: object, seed: int) -> None:
    kills(tmp_path, undisturbed, 1 + seed % 2, count=8, seed=seed)


def kills(folder: Path, undisturbed: object, jobs: int, count: int, seed: int) -> None:
    chance = random.Random(seed)
    runs = folder / "results" / "small" / "runs"
    killed = 0
    for _ in range(count):
        process = start(folder, jobs)
        children: list[psutil.Process] = []
        written = newest(runs)
        deadline = time.monotonic() + 120
        while process.poll() is None and newest(runs) == written and time.monotonic() < deadline:
            time.sleep(0.02)  # importing torch takes seconds in which there is nothing to lose
        time.sleep(chance.uniform(0, 1))
        if process.poll() is None:
            children = psutil.Process(process.pid).children(recursive=True)
            os.kill(process.pid, signal.SIGKILL)
            killed += 1
        process.wait()
        _, alive = psutil.wait_procs(children, timeout=20)
        assert not alive, "workers outlived the process that had started them"
    assert killed
    assert start(folder, jobs).wait(timeout=300) == 0
    table, digests = outcome(folder)
    expected_table, expected_digests = undisturbed  # type: ignore[misc]
    assert digests == expected_digests
    pd.testing.assert_frame_equal(table, expected_table)
    left = [p for p in runs.rglob("*") if p.name.startswith(".") or "state" in p.name]
    assert not left, "half-written files were left behind"


def newest(runs: Path) -> int:
    """When anything last changed among the training states."""
    times = []
    for path in runs.glob("*/*"):
        try:
            times.append(path.stat().st_mtime_ns)
        except FileNotFoundError:  # replaced while looking
            continue
    return max(times, default=0)
