"""Restrict the paths in a study file to folders that the user chose."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel

from flatbench.errors import InputError, shown

#: environment variable with more roots, separated as in PATH
VARIABLE = "FLATBENCH_ROOTS"


class _NamesAPath:
    """Marks an option that may name a file or a folder."""


NAMES_A_PATH = _NamesAPath()


def usable(text: str) -> str:
    """The text. Raises ValueError for what the operating system could not look for, so no option needs to."""
    if "\0" in text:
        raise ValueError("no path and no name: it holds a zero byte")
    if len(text) > 4096 or any(len(part.encode(errors="replace")) > 255 for part in text.split("/")):
        raise ValueError("no path and no name: it is too long")
    try:
        text.encode()
        Path(text).expanduser()
    except (RuntimeError, UnicodeError) as error:  # ~ of nobody; half a character
        raise ValueError(f"no path and no name: {error}") from None
    return text


#: type of an option that is a path, or the name of a model or data set where no such path is there
PathText = Annotated[str, AfterValidator(usable), NAMES_A_PATH]


class Roots:
    """Folders (or single files) below which paths may lie.

    Relative paths start at the working directory. Links and ``..`` are followed as the system does before
    a path is judged; one that is outside by its text alone is judged without looking at the disk.
    """

    def __init__(self, places: Iterable[str | Path]) -> None:
        given = [os.path.expanduser(place) for place in places]
        self._real_roots = [Path(os.path.realpath(place)) for place in given]
        self._literal_roots = [*self._real_roots, *(Path(os.path.abspath(place)) for place in given)]

    def hold(self, text: str) -> bool:
        """Whether a path lies below one of the roots, or is one."""
        path = os.path.expanduser(text)
        if not any(Path(os.path.abspath(path)).is_relative_to(root) for root in self._literal_roots):
            return False
        return any(Path(os.path.realpath(path)).is_relative_to(root) for root in self._real_roots)


def roots_of(study: Path, typed: Iterable[Any], named: Iterable[str | Path] = ()) -> Roots:
    """The roots of a study file: its folder, the working directory, and what the user named.

    Args:
        study: the study file.
        typed: values that the user typed; texts among them, which may be paths, are theirs to choose.
        named: folders that the user named as roots, beside those of ``$FLATBENCH_ROOTS``.
    """
    listed = [place for place in os.environ.get(VARIABLE, "").split(os.pathsep) if place]
    texts = [text for value in typed for text in _texts(value) if _is_usable(text)]
    return Roots([study.parent, Path.cwd(), *named, *listed, *texts])


def named_paths(options: BaseModel, where: str) -> Iterator[tuple[str, str]]:
    """(field, text) of every option marked as a path, those of sections inside included."""
    for name, field in type(options).model_fields.items():
        value = getattr(options, name)
        place = f"{where}.{name}"
        if isinstance(value, BaseModel):
            yield from named_paths(value, place)
        elif NAMES_A_PATH in field.metadata or _has_path_mark(field.annotation):
            yield from ((place, text) for text in _texts(value))


def check(field: str, text: str, roots: Roots) -> None:
    """Raise InputError if a path leaves the roots."""
    if not roots.hold(text):
        raise InputError(
            f"{field}: {text} lies outside the study's folder, the working directory and the folders named "
            f"on the command line; if this study may read it, add --root {text}"
        )


def inside(folder: Path, name: str, where: str) -> Path:
    """``folder / name`` for a file that a data file names.

    Raises InputError if that leaves the folder, or is longer than a path can be.

    Links in a folder are its owner's, as in folders of links to a store, and are not judged.
    """
    if "\0" in name or not Path(os.path.normpath(folder / name)).is_relative_to(os.path.normpath(folder)):
        raise InputError(f"{where}: {shown(repr(name))} lies outside {folder}; name files relative to it")
    try:
        os.lstat(folder / name)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise InputError(f"{where}: {shown(repr(name))} is too long for a file's name") from None
    return folder / name


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return []
    return [text for inner in value for text in _texts(inner)]


def _is_usable(text: str) -> bool:
    try:
        usable(text)
    except ValueError:
        return False
    return True


def _has_path_mark(annotation: Any) -> bool:
    return any(part is NAMES_A_PATH or _has_path_mark(part) for part in get_args(annotation))
