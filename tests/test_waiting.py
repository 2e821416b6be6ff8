"""Waiting for a core, as the scheduler records it: added up by thread, and unknown where nothing records
it."""

from __future__ import annotations

from pathlib import Path

import pytest

from flatbench.machine import waiting
from flatbench.machine.waiting import CoreWait


def record(place: Path, **threads: tuple[int, int]) -> None:
    """Write a scheduler's record of each thread: nanoseconds on a core, and in the queue for one."""
    for name, (ran, waited) in threads.items():
        (place / name).mkdir(parents=True, exist_ok=True)
        (place / name / "schedstat").write_text(f"{ran} {waited} 7\n")


def test_waiting_is_added_up_by_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "_THREADS", tmp_path)
    wait = CoreWait()
    record(tmp_path, a=(5_000, 100))
    with wait:
        record(tmp_path, a=(3_000_005_000, 1_000_000_100), b=(1_000_000_000, 0))  # b is new
    assert wait.share == pytest.approx(1 / 5)
    resumed = CoreWait()
    resumed.load_state_dict(wait.state_dict())
    with resumed:
        pass
    assert resumed.share == pytest.approx(1 / 5)


def test_what_nothing_records_is_not_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "_THREADS", tmp_path / "none")
    wait = CoreWait()
    with wait:
        pass
    assert wait.share is None
    # nor the part of a run that an earlier version trained
    monkeypatch.setattr(waiting, "_THREADS", tmp_path)
    record(tmp_path, a=(1, 1))
    wait = CoreWait()
    wait.load_state_dict(None)
    with wait:
        record(tmp_path, a=(10, 1))
    assert wait.share is None


def test_of_this_process() -> None:
    wait = CoreWait()
    assert wait.share is None
    with wait:
        sum(i * i for i in range(200_000))
    if Path("/proc/self/schedstat").exists():
        assert wait.share is not None
        assert 0 <= wait.share < 1
        assert wait.ran > 0
