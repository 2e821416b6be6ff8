"""Moments at which runs in other processes wait for a test, and generous waiting for what happens there."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import psutil

T = TypeVar("T")

FOLDER = Path(__file__).parent / "holding"
#: seconds for what happens within a second or two on a machine that has nothing else to do
PATIENCE = 300.0


class Ends(Protocol):
    """A process that may end before what a test waits for."""

    pid: int

    def poll(self) -> int | None: ...


class Held(NamedTuple):
    """A run that waits: its process, its directory, and at what."""

    pid: int
    run: Path
    at: str


class Hold:
    """A folder of holds, see `tests.holding.sitecustomize`; nothing is held at first."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()

    def environment(self) -> dict[str, str]:
        """What processes need in their environment to heed it."""
        path = [str(FOLDER), *filter(None, [os.environ.get("PYTHONPATH")])]
        return {"FLATBENCH_TEST_HOLDS": str(self.folder), "PYTHONPATH": os.pathsep.join(path)}

    def close(self, *events: str, write: str | None = None) -> None:
        """From now on have runs wait at these events only, or before they write a file of such a name."""
        for event in events:
            (self.folder / event).touch()
        if write is not None:
            fresh = self.folder / "new-write"
            fresh.write_text(write)
            fresh.replace(self.folder / "write")
        now = {*events, *(["write"] if write is not None else [])}
        for file in self.folder.iterdir():
            if file.name not in now and not file.name.startswith(("held-", "new-")):
                file.unlink()

    def open(self) -> None:
        """Let all go."""
        self.close()

    def held(self) -> list[Held]:
        """Who waits now, and lives."""
        found = []
        for file in self.folder.glob("held-*"):
            _, pid, at = file.name.split("-", 2)
            try:
                run = Path(file.read_text())
                alive = psutil.Process(int(pid)).status() != psutil.STATUS_ZOMBIE
            except (FileNotFoundError, psutil.NoSuchProcess):
                continue
            if alive:
                found.append(Held(int(pid), run, at))
        return sorted(found)

    def wait(self, count: int = 1, beside: Ends | None = None, at: str | None = None) -> list[Held]:
        """Wait until so many runs are held, in whichever processes."""

        def enough() -> list[Held]:
            found = [held for held in self.held() if at in (None, held.at)]
            return found if len(found) >= count else []

        return until(f"{count} held runs", enough, beside)


def until(what: str, condition: Callable[[], T], beside: Ends | None = None) -> T:
    """Wait until something is true, and return it.

    Args:
        beside: a process without which it never will be.
    """
    deadline = time.monotonic() + PATIENCE
    while True:
        over = beside is not None and beside.poll() is not None
        found = condition()
        if found:
            return found
        assert not over, f"the process ended before there was: {what}"
        assert time.monotonic() < deadline, f"in vain waited for: {what}"
        time.sleep(0.02)


def gone(processes: Sequence[psutil.Process]) -> bool:
    """Wait until these processes have ended; whoever is their parent by now may not have heard of it."""
    until("the end of processes", lambda: not any(lives(process) for process in processes))
    return True


def lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
