"""Many runs leave nothing in the processes that make them: no memory, no open files, no processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest

from tests.conftest import SMALL
from tests.executors.studies import written
from tests.holds import Hold, until

pytestmark = pytest.mark.slow


#: file handles that are no growth, between a soak's first third and its end
HANDLES = 3


class Sample(NamedTuple):
    """One of a study's processes, after so many of its runs."""

    pid: int
    megabytes: float
    handles: int


def study(runs: int) -> dict[str, Any]:
    """Short runs."""
    return {
        **SMALL,
        "task": {"name": "digits", "train_size": 20, "validation_size": 20, "test_size": 20},
        "methods": ["lora", "sam", "flat_lora", "eflat_lora"],
        "seeds": list(range(runs // 4)),
        "train": {**SMALL["train"], "epochs": 1},
        "measures": [{"name": "sam_sharpness", "examples": 10, "steps": 1}, "cost"],
    }


def samples(process: subprocess.Popen[bytes]) -> list[Sample]:
    """The coordinator first, then the server that its workers are forks of, then those."""
    coordinator = psutil.Process(process.pid)
    family = [coordinator, *coordinator.children(recursive=True)]
    family = [p for p in family if "resource_tracker" not in " ".join(p.cmdline())]
    assert len(family) == 4, "there are more than a coordinator, a server and two workers"
    return [Sample(p.pid, p.memory_info().rss / 1e6, p.num_fds()) for p in family]


def soak(folder: Path, runs: int, megabytes: float) -> None:
    """Look at all processes twice, each time when both workers are through with a run and wait.

    Args:
        megabytes: growth that is none.
    """
    hold = Hold(folder / "holds")
    study_folder = written(folder / "study", study(runs))
    found = study_folder / "results" / "small" / "runs"
    code = "from flatbench.cli import main; main()"
    with (folder / "output.txt").open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", code, "run", "small.yaml", "--jobs", "2"],
            cwd=study_folder,
            env={**os.environ, **hold.environment()},
            stdout=output,
            stderr=output,
        )

    def after(count: int) -> list[Sample]:
        until(f"{count} runs", lambda: len(list(found.glob("*/done.json"))) >= count, process)
        hold.close("done")
        hold.wait(2, process)
        taken = samples(process)
        hold.open()
        return taken

    first, last = after(runs // 3), after(runs - 4)
    # it is small because it never imports torch
    assert not any("libtorch" in place.path for place in psutil.Process(process.pid).memory_maps())
    assert process.wait() == 0, (folder / "output.txt").read_text()
    assert len(list(found.glob("*/done.json"))) == runs
    for before, after_it, who in zip(first, last, ("coordinator", "server", "worker", "worker"), strict=True):
        assert before.pid == after_it.pid, "a worker was replaced"
        memory, handles = after_it.megabytes - before.megabytes, after_it.handles - before.handles
        print(f"{runs} runs, {who}: {memory:+.1f} MB, {handles:+d} file handles")
        assert memory < megabytes
        assert handles <= HANDLES
    print(f"{runs} runs, coordinator: {last[0].megabytes:.0f} MB")
    assert last[0].megabytes < 300


def test_some_runs(tmp_path: Path) -> None:
    """A megabyte that each leaves would be seen, and a file that every fourth leaves open."""
    soak(tmp_path, 32, megabytes=15)


@pytest.mark.long
def test_a_thousand_runs(tmp_path: Path) -> None:
    soak(tmp_path, 1000, megabytes=30)
