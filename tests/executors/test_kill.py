"""SIGKILL at any moment of a run: the study started again ends as if nothing had happened."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.executors.studies import STUDY, Outcome, assert_same, happened, left_over, runs, start, written
from tests.executors.studies import undisturbed as found_undisturbed
from tests.holds import Hold, gone, until

pytestmark = pytest.mark.slow


#: for kills at moments that nobody chose, runs have to be long
LONG: dict[str, Any] = {**STUDY, "seeds": [0, 1], "train": {**STUDY["train"], "epochs": 25}}


def test_killed_and_started_again(tmp_path: Path, undisturbed: Outcome) -> None:
    """With one job; `test_chaos.test_a_few_are_killed` kills a command with two, and its workers."""
    hold, folder = Hold(tmp_path / "holds"), written(tmp_path / "study", STUDY)
    moments: list[dict[str, Any]] = [
        {"events": ["epoch"]},
        {"events": ["epoch"]},  # its second one, where it has gone on from the first one's state
        {"events": [], "write": "state.safetensors"},  # while the one before is kept under another name
        {"events": ["trained"]},
        {"events": [], "write": "done.json"},
    ]
    for moment in moments:
        hold.close(*moment["events"], write=moment.get("write"))
        process = start(folder, hold=hold)
        (held,) = hold.wait(1, process)
        assert held.pid == process.pid
        process.kill()
        assert process.wait() == -signal.SIGKILL
    hold.open()
    assert start(folder, hold=hold).wait() == 0, (folder / "output.txt").read_text()
    assert_same(folder, undisturbed)
    directories = runs(folder)
    assert happened(*directories).count("trained") == len(directories)
    assert happened(*directories).count("resumed") >= 2
    assert not left_over(directories), "half-written files were left behind"


@pytest.fixture(scope="module")
def undisturbed_long(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return found_undisturbed(tmp_path_factory.mktemp("undisturbed_long"), LONG)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(4))
def test_killed_often(tmp_path: Path, undisturbed_long: Outcome, seed: int) -> None:
    """At moments that nobody chose."""
    folder = written(tmp_path / "study", LONG)
    killed = sum(killed_at_random(folder, 1 + seed % 2, random.Random(f"{seed} {i}")) for i in range(8))
    assert killed
    assert fresh(folder, 1 + seed % 2).wait() == 0
    assert_same(folder, undisturbed_long)
    assert not left_over(runs(folder)), "half-written files were left behind"


def fresh(folder: Path, jobs: int) -> subprocess.Popen[bytes]:
    """The command in a process that nobody has prepared."""
    code = "from flatbench.cli import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, "run", "small.yaml", "--jobs", str(jobs)],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def killed_at_random(folder: Path, jobs: int, chance: random.Random) -> bool:
    """Whether it could be killed before it was over."""
    process = fresh(folder, jobs)
    written_before = newest(folder)
    # importing torch takes seconds in which there is nothing to lose
    until("a new file", lambda: process.poll() is not None or newest(folder) != written_before)
    time.sleep(chance.uniform(0, 1))
    children: list[psutil.Process] = []
    killed = process.poll() is None
    if killed:
        children = psutil.Process(process.pid).children(recursive=True)
        os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert gone(children), "workers outlived the process that had started them"
    return killed


def newest(folder: Path) -> int:
    """When anything last changed in the run directories."""
    times = []
    for path in (folder / "results" / "small" / "runs").glob("*/*"):
        try:
            times.append(path.stat().st_mtime_ns)
        except FileNotFoundError:  # replaced while looking
            continue
    return max(times, default=0)
