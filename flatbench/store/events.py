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

from flatbench.security.secrets import redacted
from flatbench.store.files import storage_error

FILE = "events.jsonl"
LOG = "run.log"
#: the event of a run that waits for a cluster to begin it
SUBMITTED = "submitted"


def record(directory: Path, event: str, **fields: Any) -> None:
    """Add a line to the run's events: the time, in UTC, what happened, and particulars.

    Raises StorageError if it cannot be written.
    """
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    said = {key: redacted(value) if isinstance(value, str) else value for key, value in fields.items()}
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
    """The run's events in the order in which they were written; a line cut short by a kill is left out."""
    try:
        text = (directory / FILE).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    found = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


class _RedactingFormatter(logging.Formatter):
    """Lines without secrets: libraries log the addresses that they could not reach."""

    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record))


@contextlib.contextmanager
def logged(directory: Path) -> Iterator[None]:
    """Warnings, and log messages of all libraries from level WARNING on, end in the run's log as well.

    The file is made by the first of them.
    """
    handler = logging.FileHandler(directory / LOG, delay=True, encoding="utf-8")
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
