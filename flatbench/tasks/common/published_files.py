"""Published data files: where they are, reading them once, and their text, JSON and JSON lines."""

from __future__ import annotations

import functools
import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

from flatbench.errors import InputError

#: a packed file that is larger is refused: a few kilobytes can unpack to all the memory there is
EXPANDED_BYTES = 1 << 30

P = ParamSpec("P")
T = TypeVar("T")


def folder_of(data: str | None, owner: bool = True) -> Path | None:
    """The folder that a task's ``data`` names; None where it names a data set on the hub, or nothing.

    Args:
        owner: whether a data set's name must have its owner, OWNER/NAME.

    Raises:
        InputError: it is no folder, and cannot be a name on the hub.
    """
    if not data:
        return None
    path = Path(data).expanduser()
    if path.is_dir():
        return path
    slashes = data.count("/")
    if path.is_absolute() or slashes > 1 or (owner and not slashes) or data.startswith((".", "~")):
        raise InputError(f"data: no such folder: {data}")
    return None


def find(folder: Path, names: Sequence[str]) -> Path | None:
    """The first of some files that is in a folder, each as it is called or with ``.gz``."""
    for name in names:
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                return path
    return None


def read_once(
    kept: int,
) -> Callable[[Callable[Concatenate[Path, P], T]], Callable[Concatenate[Path, P], T]]:
    """Keep what a function makes of a file as long as the file's time and size stay the same.

    The function's further arguments must be hashable. What it becomes raises InputError where there is no
    such file.

    Args:
        kept: of how many files at most.
    """

    def decorate(read: Callable[Concatenate[Path, P], T]) -> Callable[Concatenate[Path, P], T]:
        @functools.lru_cache(maxsize=kept)
        def remembered(state: tuple[int, int], path: Path, *args: Any, **options: Any) -> T:
            return read(path, *args, **options)

        @functools.wraps(read)
        def found(path: Path, *args: P.args, **options: P.kwargs) -> T:
            try:
                state = path.stat()
            except OSError:
                raise InputError(f"data: no such file: {path}") from None
            key = (state.st_mtime_ns, state.st_size)
            return remembered(key, path, *args, **options)  # type: ignore[arg-type]  # see above: hashable

        # `wraps` makes the path a parameter without a name
        return cast(Callable[Concatenate[Path, P], T], found)

    return decorate


def read_bytes(path: Path) -> bytes:
    """A file's content, unpacked if it ends in ``.gz``. Raises InputError if it cannot be had."""
    try:
        return _unpack(path)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error


def read_text(path: Path, encoding: str = "utf-8-sig") -> str:
    """A file's text, unpacked if it ends in ``.gz``. Raises InputError if it is none."""
    try:
        return _unpack(path).decode(encoding)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not readable as UTF-8 text: {error}") from None


def _unpack(path: Path) -> bytes:
    """A file's bytes. Raises InputError for a packed one of more than `EXPANDED_BYTES`."""
    if path.suffix != ".gz":
        return path.read_bytes()
    with gzip.open(path) as file:
        content = file.read(EXPANDED_BYTES + 1)
    if len(content) > EXPANDED_BYTES:
        raise InputError(
            f"{path}: unpacks to more than {EXPANDED_BYTES / 2**30:.3g} GiB; if that is as it should be, "
            "unpack it yourself and name that file"
        )
    return content


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises InputError for any other file."""
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON: {error}") from None


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and named values of each line that is not empty. Raises InputError for one without."""
    # lines end at a line feed alone: texts hold other characters at which Python would split lines
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}, line {number}: not JSON: {error}") from None
        if not isinstance(row, dict):
            raise InputError(f"{path}, line {number}: expected an object with named values")
        yield number, row
