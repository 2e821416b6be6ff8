"""Being asked to stop (Ctrl-C, SIGTERM, a scheduler's signal): training stops after the step it is in.

While training goes on, a signal only leaves a note that the training loop reads after each step, so that it
can save where it is. Anywhere else the signal ends the work at once, which every file outlives: files are
written beside their place and moved there.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """This process was asked to stop.

    Attributes:
        signal: by which signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)  # what it is pickled by, on its way from a worker
        self.signal = signal.Signals(number)

    def __str__(self) -> str:
        return f"stopped by {self.signal.name}"


class _Note:
    """What was asked for, and what a signal may do now."""

    signal: int | None = None
    working = False
    deferred = False


_note = _Note()


def requested() -> int | None:
    """The signal that asked this process to stop, or None."""
    return _note.signal


def check() -> None:
    """Raise Stopped if this process was asked to stop."""
    if _note.signal is not None:
        raise Stopped(_note.signal)


def forget() -> None:
    """Work may begin again: what was asked for has been done."""
    _note.signal = None


@contextlib.contextmanager
def heeded(signals: Sequence[int] = SIGNALS, patient: bool = False) -> Iterator[None]:
    """Have signals mean "stop"; they mean what they meant before when the block ends.

    Args:
        patient: further signals do not cut short what the first one began. Worker processes are: a terminal's
            Ctrl-C reaches them beside the signal from the process that had started them.

    In a thread other than the main one, where Python knows no signals, nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, _: FrameType | None) -> None:
        first, _note.signal = _note.signal is None, number
        at_once = first and not _note.deferred if patient else not first or not _note.deferred
        if _note.working and at_once:
            raise Stopped(number)

    before: dict[int, Any] = {number: signal.signal(number, handle) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def working() -> Iterator[None]:
    """Work that a signal ends at once by raising Stopped; outside of it a signal is only noted."""
    before, _note.working = _note.working, True
    try:
        check()
        yield
    finally:
        _note.working = before


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Work that looks by itself, with `check`, where it can stop."""
    before, _note.deferred = _note.deferred, True
    try:
        yield
    finally:
        _note.deferred = before
