"""Checksums of a finished run's files, by which a later reader knows that they are what was written."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from flatbench.errors import InputError
from flatbench.store.files import file_digest, known_digest

#: what a run consists of beside the files of its folders; logs and events are no results
_FILES = ("run.json", "environment.json", "result.json", "history.parquet")
_FOLDERS = ("adapter", "measures")

_whole = ContextVar("whole", default=False)


@contextlib.contextmanager
def verifying(whole: bool = True) -> Iterator[None]:
    """Within it, every file is read and compared, though its size and time are as they were."""
    token = _whole.set(whole)
    try:
        yield
    finally:
        _whole.reset(token)


def files_of(run: Path) -> list[str]:
    """The files that a run's results consist of, by their paths within its folder."""
    found = [name for name in _FILES if (run / name).is_file()]
    for folder in _FOLDERS:
        for path in sorted((run / folder).rglob("*")):
            # what a writer that was killed left beside its place has a name that begins with a dot
            if path.is_file() and not path.name.startswith("."):
                found.append(path.relative_to(run).as_posix())
    return found


def of_file(path: Path) -> dict[str, Any]:
    """Size in bytes, time of the last change in nanoseconds, and SHA-256 of a file."""
    state = path.stat()
    return {"size": state.st_size, "mtime_ns": state.st_mtime_ns, "sha256": file_digest(path)}


def differences(run: Path, recorded: Mapping[str, Any]) -> dict[str, str]:
    """What is wrong with a finished run's files: path within the run -> what.

    A file of the recorded size and time is taken as it was, unless within `verifying`; one of another time,
    such as a copy, is read.

    Args:
        recorded: path -> what `of_file` gave when the run ended.

    Raises InputError if ``recorded`` is not that.
    """
    found: dict[str, str] = {}
    folder = os.fspath(run)
    for name, entry in recorded.items():
        try:
            size, time, digest = entry["size"], entry["mtime_ns"], entry["sha256"]
        except (KeyError, TypeError):
            raise InputError(f"{run / 'done.json'}: damaged (no checksum of {name})") from None
        path = f"{folder}/{name}"
        try:
            state = os.stat(path)
        except OSError:
            found[name] = "is missing"
            continue
        if state.st_size != size:
            found[name] = f"has {state.st_size} bytes; {size} were written"
        elif (state.st_mtime_ns != time or _whole.get()) and known_digest(Path(path)) != digest:
            found[name] = "is not as it was written"
    with contextlib.suppress(OSError):
        for name in os.listdir(f"{folder}/measures"):
            if name.endswith(".json") and not name.startswith(".") and f"measures/{name}" not in recorded:
                found[f"measures/{name}"] = "was not written by this run"
    return found
