"""A GPU is timed by events in its own queue, and nobody waits for it until the times are read."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from flatbench.machine.stopwatch import Stopwatch
from flatbench.runs.finish import finish
from tests.test_runner import prepared


class Queue:
    """A GPU that is ``busy`` milliseconds on after each stretch; its events know when they are reached."""

    def __init__(self) -> None:
        self.now, self.waits = 0.0, 0


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> Queue:
    queue = Queue()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: Any) -> None:
            assert stream == "stream of cuda:1"
            self.at = queue.now

        def synchronize(self) -> None:
            queue.waits += 1

        def elapsed_time(self, other: Event) -> float:
            return other.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    return queue


def test_events_are_read_late_and_leave_out_what_lies_between(queue: Queue) -> None:
    watch = Stopwatch(torch.device("cuda", 1))
    for milliseconds in (10, 20, 40):
        queue.now += 500  # loading
        watch.start()
        queue.now += milliseconds
        watch.stop()
    assert queue.waits == 0
    assert watch.take() == pytest.approx([0.01, 0.02, 0.04])
    assert queue.waits > 0
    assert watch.take() == []
    assert watch.clock == "cuda events"


def test_the_wall_clock_elsewhere() -> None:
    watch = Stopwatch(torch.device("cpu"))
    for seconds in (0.02, 0.0):
        time.sleep(0.05)
        watch.start()
        time.sleep(seconds)
        watch.stop()
    first, second = watch.take()
    assert first >= 0.02
    assert second < first
    assert watch.clock == "wall clock"


def test_a_trainings_times_are_taken_once_a_logged_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading waits for a GPU, so it may not happen at each step; every step's time is in the sum."""
    taken: list[int] = []
    take = Stopwatch.take

    def counted(watch: Stopwatch) -> list[float]:
        found = take(watch)
        taken.append(len(found))
        return [0.25] * len(found)

    monkeypatch.setattr(Stopwatch, "take", counted)
    train = {"epochs": 2, "batch_size": 10, "log_every": 4, "threads": 1}  # six steps an epoch
    directory = prepared(tmp_path, train=train)
    assert finish(directory.path) == "done"
    assert [count for count in taken if count] == [4, 2, 2, 4]  # steps 4, 6, 8, 12
    result = directory.result()
    assert result is not None
    assert result["training"]["train_seconds"] == pytest.approx(12 * 0.25)
    assert result["training"]["step_seconds"] == pytest.approx([0.25] * 4)
    assert result["training"]["clock"] == "wall clock"
    assert result["training"]["threads"] == 1
    assert result["training"]["device"]
