"""Files that are whole or not there: written beside their place, then moved to it."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import io
import json
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from flatbench.errors import FlatbenchError, InputError, StorageError

if TYPE_CHECKING:
    import pandas as pd

#: what is being written is called this, a name and a random word, until it is whole
TEMPORARY = ".flatbench-"


@contextlib.contextmanager
def replacing(path: Path, durable: bool = False) -> Iterator[Path]:
    """A temporary path beside ``path`` to write a file or folder to; moved there when the block ends well.

    Args:
        durable: have it on the disk before it is moved, so that a power cut leaves the old or the new.

    Raises StorageError when the disk is full or the place cannot be written; nothing half-written stays.
    """
    temporary = path.with_name(f"{TEMPORARY}{path.name}-{uuid.uuid4().hex[:8]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if durable:
            _flush(temporary)
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(temporary, path)
    except OSError as error:
        raise storage_error(path, error) from error
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))  # its way of saying that writing failed
        if number is None:
            raise
        code = int(number[1])
        raise storage_error(path, OSError(code, os.strerror(code))) from error
    finally:
        remove(temporary)


def _flush(path: Path) -> None:
    for file in [path] if path.is_file() else [inner for inner in path.rglob("*") if inner.is_file()]:
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def remove(path: Path) -> None:
    """Remove a file or folder, if it is there and can be."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def delete(path: Path) -> None:
    """Remove a file, if it is there. Raises StorageError if it cannot be removed."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise storage_error(path, error) from error


def storage_error(path: Path, error: OSError) -> FlatbenchError:
    """What went wrong in writing, in one line and with what to do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(f"{path}: no space left; free some and run the same command again to go on")
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return StorageError(f"{path}: a file is where a folder should be; choose another output folder")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return StorageError(f"{path}: cannot be written ({error.strerror}); choose another output folder")
    return FlatbenchError(f"{path}: {error}")


def write_text(path: Path, text: str, durable: bool = False) -> None:
    """Write a whole text file or nothing."""
    with replacing(path, durable) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any, durable: bool = False) -> None:
    """Write a whole JSON file or nothing."""
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n", durable)


def open_regular(path: Path | str) -> io.BufferedReader:
    """A file to read. Raises OSError where there is none, and for pipes and devices, which could not end."""
    # a pipe would be waited for already in opening it
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "no regular file")
    return os.fdopen(handle, "rb")


def read_regular(path: Path | str) -> bytes:
    """A file's content. Raises OSError as `open_regular` does."""
    with open_regular(path) as file:
        return file.read()


def read_parquet(path: Path | str) -> tuple[pd.DataFrame, dict[bytes, bytes]]:
    """A parquet file's columns under the names that its schema gives them, and the schema's metadata.

    What pandas' own metadata says of names, types and an index is left aside: a forged one would turn one
    column into another. Raises OSError as `open_regular` does, and ValueError for a file that is no parquet.
    """
    from pyarrow import parquet

    with open_regular(path) as file:
        table = parquet.read_table(file)
    table.validate(full=True)  # texts that are no UTF-8 would show when they are looked at
    frame: pd.DataFrame = table.to_pandas(ignore_metadata=True)
    return frame, table.schema.metadata or {}


def file_digest(path: Path) -> str:
    """Hex SHA-256 of a file. Raises OSError as `open_regular` does."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def known_digest(path: Path) -> str:
    """Hex SHA-256 of a file, read once as long as its time and size stay the same."""
    state = path.stat()
    return _digest_of(path, state.st_mtime_ns, state.st_size)


@functools.lru_cache(maxsize=100_000)
def _digest_of(path: Path, mtime_ns: int, size: int) -> str:
    return file_digest(path)


def read_json(path: Path | str) -> Any:
    """A JSON file's content. Raises InputError if it is missing or damaged."""
    try:
        return json.loads(read_regular(path).decode())
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: damaged ({error})") from None


def read_mapping(path: Path | str, *keys: str) -> dict[str, Any]:
    """A JSON file's mapping. Raises InputError if it is missing, damaged, or lacks one of the keys."""
    content = read_json(path)
    if not isinstance(content, dict) or not set(keys) <= set(content):
        raise InputError(f"{path}: damaged (no mapping{' with ' + ', '.join(keys) if keys else ''})")
    return content
