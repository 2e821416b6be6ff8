"""Published data files: where they are, reading them once, and their text, JSON and JSON lines."""

from __future__ import annotations

import contextlib
import functools
import gzip
import io
import json
import stat
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

from flatbench.errors import InputError
from flatbench.store.files import open_regular

#: a packed file that is larger is refused: a few kilobytes can unpack to all the memory there is
EXPANDED_BYTES = 1 << 29
#: characters of one line, and bytes of a JSON file that is read as a whole: what a parser makes of them takes
#: twenty times as much
LONGEST_LINE, LARGEST_JSON = 1 << 24, 1 << 26

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
            if not stat.S_ISREG(state.st_mode):
                raise InputError(f"data: no file, but a folder, a pipe or a device: {path}")
            key = (state.st_mtime_ns, state.st_size)
            return remembered(key, path, *args, **options)  # type: ignore[arg-type]  # see above: hashable

        # `wraps` makes the path a parameter without a name
        return cast(Callable[Concatenate[Path, P], T], found)

    return decorate


def read_bytes(path: Path, most: int | None = None) -> bytes | bytearray:
    """A file's content, unpacked if it ends in ``.gz``.

    Args:
        most: bytes that a packed file may hold; `EXPANDED_BYTES` if None.

    Raises InputError if it cannot be had, or holds more.
    """
    content, most = bytearray(), EXPANDED_BYTES if most is None else most
    with _open_unpacked(path) as file:
        if path.suffix != ".gz":
            return file.read()
        while piece := file.read(1 << 20):
            content += piece
            if len(content) > most:
                raise _too_large(path, most)
    return content


def read_text(path: Path, encoding: str = "utf-8-sig") -> str:
    """A file's text, unpacked if it ends in ``.gz``. Raises InputError if it is none."""
    try:
        return read_bytes(path).decode(encoding)
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not readable as UTF-8 text: {error}") from None


@contextlib.contextmanager
def _open_unpacked(path: Path) -> Iterator[io.BufferedReader | gzip.GzipFile]:
    """A file's bytes, unpacked if it ends in ``.gz``. What goes wrong in reading them is an InputError."""
    try:
        with open_regular(path) as file:
            yield gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else file
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not readable as UTF-8 text: {error}") from None
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error


def _too_large(path: Path, most: int) -> InputError:
    return InputError(
        f"{path}: unpacks to more than {most / 2**20:.3g} MiB; if that is as it should be, unpack it "
        "yourself and name that file"
    )


def text_lines(path: Path, encoding: str = "utf-8-sig", newline: str = "\n") -> Iterator[str]:
    """A file's lines with their ends, one at a time, unpacked if it ends in ``.gz``.

    Args:
        newline: where a line ends; "" for ``\n``, ``\r`` and both together.

    Raises InputError for what is no text, unpacks to more than `EXPANDED_BYTES`, or has a line of more than
    `LONGEST_LINE` characters.
    """
    with _open_unpacked(path) as file:
        text = io.TextIOWrapper(file, encoding, newline=newline)
        number, length = 0, 0
        while line := text.readline(LONGEST_LINE + 1):
            number, length = number + 1, length + len(line)
            if len(line) > LONGEST_LINE:
                raise InputError(f"{path}, line {number}: more than {LONGEST_LINE} characters in one line")
            if length > EXPANDED_BYTES and path.suffix == ".gz":
                raise _too_large(path, EXPANDED_BYTES)
            yield line


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises InputError for any other file, and for one that is too large."""
    content = read_bytes(path, LARGEST_JSON)
    if len(content) > LARGEST_JSON:
        raise InputError(f"{path}: more than {LARGEST_JSON / 2**20:.3g} MiB of JSON in one piece")
    try:
        return json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON: {error}") from None


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and named values of each line that is not empty. Raises InputError for one without."""
    # lines end at a line feed alone: texts hold other characters at which Python would split lines
    for number, line in enumerate(text_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}, line {number}: not JSON: {error}") from None
        if not isinstance(row, dict):
            raise InputError(f"{path}, line {number}: expected an object with named values")
        yield number, row
