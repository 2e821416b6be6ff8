"""How long a process waited for a core while it had work: whether times that it took are its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

#: a directory a thread, each with the scheduler's record of it (Linux)
_THREADS = Path("/proc/self/task")


class CoreWait:
    """Seconds in which this process's threads ran, and in which they were ready but no core was free.

    From the Linux scheduler's own record (``/proc/self/task/*/schedstat``), so that a sleeping thread
    counts for neither, and another process on another core for nothing. Threads that end while it
    counts are not counted. What the host of a virtual machine takes, and what others do to the memory's
    speed, is not seen.
    """

    def __init__(self) -> None:
        self.ran, self.waited = 0.0, 0.0
        self._measurable = True
        self._start: Mapping[str, tuple[int, int]] | None = None

    def __enter__(self) -> CoreWait:
        """Count from here on."""
        self._start = _read()
        return self

    def __exit__(self, *_: object) -> None:
        """Count until here."""
        begun, ended = self._start, _read()
        if begun is None or ended is None:
            self._measurable = False
            return
        for thread, (ran, waited) in ended.items():
            before = begun.get(thread, (0, 0))
            self.ran += (ran - before[0]) / 1e9
            self.waited += (waited - before[1]) / 1e9
        self._start = None

    @property
    def share(self) -> float | None:
        """Waiting as a share of waiting and running, 0 to 1; None where the system records none."""
        total = self.ran + self.waited
        return self.waited / total if self._measurable and total > 0 else None

    def state_dict(self) -> dict[str, Any]:
        """For a run that will be gone on with elsewhere."""
        return {"ran": self.ran, "waited": self.waited, "known": self._measurable}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Go on from `state_dict`; without one, what came before is not known."""
        if state is None:
            self._measurable = False
            return
        self.ran, self.waited, self._measurable = state["ran"], state["waited"], state["known"]


def _read() -> dict[str, tuple[int, int]] | None:
    """Nanoseconds of each thread on a core and in the queue for one; None where nothing records them."""
    found = {}
    try:
        for place in _THREADS.iterdir():
            try:
                ran, waited, _ = map(int, (place / "schedstat").read_text().split())
            except FileNotFoundError:  # the thread has just ended
                continue
            found[place.name] = (ran, waited)
    except (OSError, ValueError):
        return None
    return found or None
