"""Rows of run directories that have not changed since they were last read: thousands load at once."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flatbench.errors import FlatbenchError

#: raised when rows are made differently
_VERSION = 2
#: a folder younger than this may change once more within the same tick of the file system's clock
_STABLE_SECONDS = 2.0

Row = dict[str, Any]


class RowCache:
    """What was read from each run directory, kept in one JSON file beside them.

    Files of a run are replaced by renaming, so a change shows in the modification time of the folder that
    holds them. A cache that is missing, damaged or cannot be written costs time and nothing else.

    Args:
        file: the cache.
        read: reads a run directory anew; its answer must be JSON-able.
    """

    def __init__(self, file: Path, read: Callable[[Path], Row]) -> None:
        self.file, self.read = file, read
        self._rows: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError):
            content = json.loads(file.read_text(encoding="utf-8"))
            if isinstance(content, dict) and content.get("version") == _VERSION:
                self._rows = content["rows"]
        self._dirty = False

    def row(self, directory: Path) -> Row:
        """The row of a run directory, from the cache where its folders are as they were."""
        signature = _signature(directory)
        kept = self._rows.get(directory.name)
        if kept is not None and kept[0] == signature:
            return dict(kept[1])
        row = self.read(directory)
        if signature and time.time() - max(signature) / 1e9 > _STABLE_SECONDS:
            self._rows[directory.name] = [signature, row]
            self._dirty = True
        return dict(row)

    def save(self) -> None:
        """Write what was learned, if anything was."""
        from flatbench.store.files import write_text

        if self._dirty:
            with contextlib.suppress(FlatbenchError):
                write_text(self.file, json.dumps({"version": _VERSION, "rows": self._rows}))


def _signature(directory: Path) -> list[int]:
    """Modification times, in nanoseconds, of the run's folder and of its measures' folder."""
    found = []
    for folder in (directory, directory / "measures"):
        with contextlib.suppress(FileNotFoundError):
            found.append(os.stat(folder).st_mtime_ns)
    return found
