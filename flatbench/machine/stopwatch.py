"""Time steps on a device that runs asynchronously."""

from __future__ import annotations

import time

import torch


class Stopwatch:
    """Seconds of stretches of work: by CUDA's events on a GPU, by the wall clock elsewhere.

    Events are marks in the GPU's own queue of work, so neither starting nor stopping waits for it: the work
    runs as it would without a clock. Only `take` waits, until the last stretch is through. A stretch that
    stops before an asynchronous device is done must end in something that waits, unless that is a GPU.

    Attributes:
        clock: ``"cuda events"`` or ``"wall clock"``.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.clock = "cuda events" if device.type == "cuda" else "wall clock"
        self._start: torch.cuda.Event | float = 0.0
        self._stretches: list[tuple[torch.cuda.Event, torch.cuda.Event] | float] = []

    def start(self) -> None:
        """A stretch begins."""
        self._start = self._mark() if self.device.type == "cuda" else time.perf_counter()

    def stop(self) -> None:
        """The stretch ends."""
        if isinstance(self._start, float):
            self._stretches.append(time.perf_counter() - self._start)
        else:
            self._stretches.append((self._start, self._mark()))

    def _mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def take(self) -> list[float]:
        """Seconds of each stretch since last taken; waits for a GPU to have done them."""
        stretches, self._stretches = self._stretches, []
        return [stretch if isinstance(stretch, float) else _seconds(*stretch) for stretch in stretches]


def _seconds(begun: torch.cuda.Event, ended: torch.cuda.Event) -> float:
    ended.synchronize()
    return float(begun.elapsed_time(ended)) / 1e3  # which is in milliseconds
