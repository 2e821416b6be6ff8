"""The pictures that questions are asked about: a file, a member of a zip archive, or a row on the hub."""

from __future__ import annotations

import functools
import hashlib
import io
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from lzma import LZMAError
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image, UnidentifiedImageError

from flatbench.errors import InputError, shown
from flatbench.store.files import known_digest, read_regular
from flatbench.tasks.common.rgb import in_rgb, upright_size

Found = TypeVar("Found")


class Picture(ABC):
    """One image, read when it is asked for."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Where it is, for messages."""

    @abstractmethod
    def _bytes(self) -> bytes:
        """Its file's content."""

    def open(self) -> Image.Image:
        """The image upright in RGB, transparency on white. Raises InputError if it does not decode."""
        return self._decode(in_rgb)

    def size(self) -> tuple[int, int]:
        """Width and height. Raises InputError if it does not decode."""

        def measured(opened: Image.Image) -> tuple[int, int]:
            size = upright_size(opened)
            opened.draft("RGB", (1, 1))  # a JPEG is read whole, but decoded at an eighth of its size
            opened.load()
            return size

        return self._decode(measured)

    def _decode(self, use: Callable[[Any], Found]) -> Found:
        try:
            with Image.open(io.BytesIO(self._bytes())) as opened:
                return use(opened)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            reason = " ".join(str(error).split())
            if isinstance(error, UnidentifiedImageError):  # it names an address in memory
                reason = "of no known format"
            raise InputError(f"{self.name}: does not decode as an image: {reason}") from error

    def digest(self) -> str:
        """Hex SHA-256 of its content."""
        return hashlib.sha256(self._bytes()).hexdigest()


@dataclass(frozen=True)
class FilePicture(Picture):
    """An image file."""

    path: Path

    @property
    def name(self) -> str:
        """The path."""
        return str(self.path)

    def _bytes(self) -> bytes:
        return read_regular(self.path)

    def digest(self) -> str:
        """Hex SHA-256, read once as long as the file stays the same."""
        return known_digest(self.path)


@dataclass(frozen=True)
class ZipPicture(Picture):
    """A member of a zip archive."""

    archive: Path
    member: str

    @property
    def name(self) -> str:
        """The archive's path and the member's name."""
        return f"{self.archive}, {self.member}"

    def _bytes(self) -> bytes:
        try:
            return _archive(self.archive).read(self.member)
        # what zipfile and its decompressors raise for damaged archives
        except (
            zipfile.BadZipFile,
            OSError,
            EOFError,
            ValueError,
            RuntimeError,
            zlib.error,
            LZMAError,
        ) as error:
            raise InputError(f"{self.name}: cannot be read: {shown(error, 200)}") from error


@dataclass(frozen=True)
class TablePicture(Picture):
    """The image of a row of a data set of the hub, whose column is not decoded by `datasets`."""

    rows: Any
    row: int
    column: str
    table: str

    @property
    def name(self) -> str:
        """The data set, its split and the row."""
        return f"{self.table}, row {self.row}"

    def _bytes(self) -> bytes:
        found = self.rows[self.row][self.column]
        content = found["bytes"]
        return bytes(content) if content is not None else Path(found["path"]).read_bytes()

    @functools.cached_property
    def _digest(self) -> str:
        return super().digest()

    def digest(self) -> str:
        """Hex SHA-256, computed once: the table does not change."""
        return self._digest


def members(archive: Path) -> frozenset[str]:
    """Names of an archive's files. Raises InputError if it is no zip archive."""
    return frozenset(_archive(archive).namelist())


def _archive(path: Path) -> zipfile.ZipFile:
    try:
        state = path.stat()
        return _open_archive(path, state.st_mtime_ns, state.st_size)
    except (OSError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: not a zip archive: {error}") from error


@functools.lru_cache(maxsize=4)
def _open_archive(path: Path, mtime_ns: int, size: int) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)
