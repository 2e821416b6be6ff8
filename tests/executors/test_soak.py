"""Hundreds of runs leave nothing in the processes that make them: no memory, no open files, no processes."""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import pytest
import yaml

from tests.conftest import SMALL

#: growth that is none, between the first third of a soak and its end: megabytes, file handles
MEMORY, HANDLES = 30.0, 4


class Sample(NamedTuple):
    """The processes of a study at one moment: the coordinator first, then those that it started."""

    pids: list[int]
    megabytes: list[float]
    handles: list[int]


def start(folder: Path, runs: int) -> subprocess.Popen[bytes]:
    content: dict[str, Any] = {
        **SMALL,
        "methods": ["lora", "sam", "flat_lora", "eflat_lora"],
        "seeds": list(range(runs // 4)),
        "train": {**SMALL["train"], "epochs": 1},
        "measures": [{"name": "sam_sharpness", "examples": 10, "steps": 1}, "cost"],
    }
    (folder / "small.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    code = "from flatbench.cli import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, "run", "small.yaml", "--jobs", "2"],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def samples(process: subprocess.Popen[bytes], runs: Path) -> list[Sample]:
    """Five samples a second until the study is over, from the first finished run on."""
    found = []
    coordinator = psutil.Process(process.pid)
    while process.poll() is None:
        time.sleep(0.2)
        try:
            family = [coordinator, *coordinator.children(recursive=True)]
            family = [p for p in family if "resource_tracker" not in " ".join(p.cmdline())]
            memory, handles = [p.memory_info().rss / 1e6 for p in family], [p.num_fds() for p in family]
        except psutil.Error:
            continue
        if any(runs.glob("*/done.json")):
            found.append(Sample([p.pid for p in family], memory, handles))
    return found


def growth(values: Sequence[float]) -> float:
    """From the first third's median, without its first half that warms up, to the last sixth's."""
    sixth = max(1, len(values) // 6)
    return float(np.median(values[-sixth:]) - np.median(values[sixth : 2 * sixth]))


def soak(folder: Path, runs: int) -> None:
    process = start(folder, runs)
    found = samples(process, folder / "results" / "small" / "runs")
    assert process.wait(timeout=60) == 0
    assert len(list((folder / "results" / "small" / "runs").glob("*/done.json"))) == runs
    seen = Counter(pid for sample in found for pid in sample.pids)
    lasting = {pid for pid, count in seen.items() if count > 5}  # others came for a moment, as git does
    assert len(lasting) == 3, "there are more than a coordinator and two workers"
    working = [sample for sample in found if set(sample.pids) == lasting]
    assert len(working) > 0.8 * len(found)
    for number, who in enumerate(("coordinator", "worker", "worker")):
        memory = growth([sample.megabytes[number] for sample in working])
        handles = growth([sample.handles[number] for sample in working])
        print(f"{runs} runs, {who}: {memory:+.1f} MB, {handles:+.0f} file handles")
        assert memory < MEMORY
        assert handles <= HANDLES
    peak = max(sample.megabytes[0] for sample in working)
    print(f"{runs} runs, coordinator: {peak:.0f} MB at most")
    assert peak < 300


def test_a_hundred_runs(tmp_path: Path) -> None:
    soak(tmp_path, 100)


@pytest.mark.long
def test_a_thousand_runs(tmp_path: Path) -> None:
    soak(tmp_path, 1000)
