"""Event log of a run: a line of JSON for each event, in its directory; and its text log."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flatbench.security.secrets import redacted, redacted_all
from flatbench.store.files import read_regular, storage_error

FILE = "events.jsonl"
LOG = "run.log"
#: the event of a run that waits for a cluster to begin it
SUBMITTED = "submitted"


def record(directory: Path, event: str, **fields: Any) -> None:
    """Add a line to the run's events: the time, in UTC, what happened, and particulars.

    Raises StorageError if it cannot be written.
    """
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    said = redacted_all(fields)
    line = json.dumps({"time": now, "event": event, **said}, allow_nan=False) + "\n"
    path = directory / FILE
    try:
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(handle, line.encode())  # at once, so that lines of two processes do not mix
        finally:
            os.close(handle)
    except OSError as error:
        raise storage_error(path, error) from error


def read(directory: Path) -> list[dict[str, Any]]:
    """The run's events in the order in which they were written; what is no event,
    such as a line cut short by a kill, is left out."""
    return _parse(_content(directory))


def last(directory: Path) -> str | None:
    """What happened to the run last; None before anything did."""
    happened = read(directory)
    return happened[-1]["event"] if happened else None


def count(directory: Path, *events: str) -> int:
    """How often one of these events happened to the run."""
    content = _content(directory)
    # of thousands of runs next to none has any
    if not any(event.encode() in content for event in events):
        return 0
    return sum(entry["event"] in events for entry in _parse(content))


def _content(directory: Path) -> bytes:
    try:
        return read_regular(f"{directory}/{FILE}")
    except OSError:
        return b""


def _parse(content: bytes) -> list[dict[str, Any]]:
    found = []
    for line in content.decode("utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            event = json.loads(line)
            if isinstance(event, dict) and isinstance(event.get("event"), str):
                found.append(event)
    return found


class _LogFile(logging.FileHandler):
    """A log that a full or read-only disk keeps nobody from working: the next file written says so."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        pass


class _RedactingFormatter(logging.Formatter):
    """Lines without secrets: libraries log the addresses that they could not reach."""

    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record))


@contextlib.contextmanager
def logged(directory: Path) -> Iterator[None]:
    """Warnings, and log messages of all libraries from level WARNING on, end in the run's log as well.

    The file is made by the first of them.
    """
    handler = _LogFile(directory / LOG, delay=True, encoding="utf-8")
    handler.setFormatter(_RedactingFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handler.setLevel(logging.WARNING)
    root = logging.getLogger()
    root.addHandler(handler)
    show = warnings.showwarning

    def note(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        record = logging.LogRecord(
            category.__name__, logging.WARNING, str(where[0]), 0, str(message), None, None
        )
        handler.handle(record)
        show(message, category, *where, **more)

    warnings.showwarning = note
    try:
        yield
    finally:
        warnings.showwarning = show
        root.removeHandler(handler)
        handler.close()
