"""Rows of finished runs, kept so that thousands load at once."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flatbench.errors import FlatbenchError
from flatbench.machine import cache

#: raised when rows are made differently
_VERSION = 3

Row = dict[str, Any]


class RowCache:
    """What was read from each finished run, by the content of its done.json.

    That holds checksums of the run's other files. The cache lies in the user's own cache folder and not
    beside the results: what comes with a results folder decides nothing. A cache that is missing, damaged or
    cannot be written costs time and nothing else.

    Args:
        results: the study's folder, which names the cache's file.
        read: reads a run directory anew; its answer must be JSON-able.
    """

    def __init__(self, results: Path, read: Callable[[Path], Row]) -> None:
        name = hashlib.sha256(str(Path(results).resolve()).encode()).hexdigest()[:16]
        self.file, self.read = cache.folder() / "tables" / f"{name}.json", read
        self._rows: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError, RecursionError):
            content = json.loads(self.file.read_text(encoding="utf-8"))
            if isinstance(content, dict) and isinstance(rows := content.get("rows"), dict):
                self._rows = rows if content.get("sha256") == _digest(rows) else {}
        self._current: dict[str, Any] = {}
        self._dirty = False

    def row(self, directory: Path, seal: bytes | None) -> Row:
        """The row of a run directory.

        Args:
            seal: its done.json, if the files that it names were found as they were written; else the row is
                read.
        """
        if seal is None:
            return self.read(directory)
        key = hashlib.sha256(seal).hexdigest()
        row = self._rows.get(key)
        if row is None:
            row = self.read(directory)
            self._dirty = True
        self._current[key] = row
        return dict(row)

    def save(self) -> None:
        """Write what was learned, if anything was, and leave out what no run has any more."""
        from flatbench.store.files import write_text

        if self._dirty:
            content = {"sha256": _digest(self._current), "rows": self._current}
            with contextlib.suppress(FlatbenchError):
                write_text(self.file, json.dumps(content))


def _digest(rows: Mapping[str, Any]) -> str:
    found = hashlib.sha256(str(_VERSION).encode())
    for entry in sorted(rows.items()):  # one by one: the text of all takes more memory than the rows
        found.update(json.dumps(entry, sort_keys=True).encode())
    return found.hexdigest()
