"""Points of a landscape on disk, a line a point, so that an interrupted one goes on where it stopped."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flatbench.errors import InputError

#: raised when the same request would give other numbers
FORMAT = 1
Index = tuple[int, ...]  # draw, then the place on the grid


class Stream:
    """A JSON-lines file: a header that says what is computed, a line a point, a last line with the summary.

    The file is written line by line; a last line cut off by an interruption is dropped. Without a path
    everything is kept in memory only.

    Args:
        key: digest of the request; a file of another request is begun anew.
        request: JSON-able, for a person who opens the file.

    Attributes:
        known: index -> split -> quantity -> value, as read from the file and added since.
        summary: what `finish` stored, or None while the landscape is not complete.
    """

    def __init__(self, path: Path | None, key: str, request: Mapping[str, Any]) -> None:
        self.path, self.key, self.request = path, key, dict(request)
        self.known: dict[Index, dict[str, dict[str, float]]] = {}
        self.summary: dict[str, Any] | None = None
        self.resumed = 0
        self._file: Any = None
        if path is not None and path.is_file():
            self._read(path)

    def _read(self, path: Path) -> None:
        lines = path.read_text(encoding="utf-8").splitlines()
        entries = []
        for line in lines:
            try:
                entries.append(json.loads(line))
            except ValueError:  # cut off while it was written
                break
        if not entries or entries[0].get("key") != self.key or entries[0].get("format") != FORMAT:
            return
        for entry in entries[1:]:
            if "summary" in entry:
                self.summary = entry["summary"]
            else:
                self.known[tuple(entry["at"])] = _numbers(entry["values"])
        self.resumed = len(self.known)

    def __enter__(self) -> Stream:
        if self.path is None or self.summary is not None:
            return self
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("w", encoding="utf-8")
        except OSError as error:
            raise InputError(
                f"{self.path}: cannot be written ({error.strerror}); choose another place"
            ) from error
        self._write({"format": FORMAT, "key": self.key, "request": self.request})
        for index, values in self.known.items():
            self._write({"at": index, "values": _jsonable(values)})
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def add(self, index: Index, values: dict[str, dict[str, float]]) -> None:
        """Keep one computed point."""
        self.known[index] = values
        if self._file is not None:
            self._write({"at": index, "values": _jsonable(values)})

    def finish(self, summary: dict[str, Any]) -> None:
        """Keep what is said about the landscape as a whole; it is complete now."""
        self.summary = summary
        if self._file is not None:
            self._write({"summary": summary})

    def _write(self, entry: Mapping[str, Any]) -> None:
        try:
            self._file.write(json.dumps(entry, allow_nan=False) + "\n")
            self._file.flush()
            if "summary" in entry:
                os.fsync(self._file.fileno())
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written ({error.strerror})") from error


def _jsonable(values: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float | None]]:
    """Values that are not finite become null: JSON has no word for them."""
    return {
        split: {name: value if math.isfinite(value) else None for name, value in found.items()}
        for split, found in values.items()
    }


def _numbers(values: Mapping[str, Mapping[str, float | None]]) -> dict[str, dict[str, float]]:
    return {
        split: {name: math.nan if value is None else value for name, value in found.items()}
        for split, found in values.items()
    }
