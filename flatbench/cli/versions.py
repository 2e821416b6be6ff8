"""Whether results are of the study as its file says it: names are equal sooner than studies are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flatbench.config import study_files
from flatbench.config.validation import validated
from flatbench.errors import InputError
from flatbench.store import StudyFolder
from flatbench.study.schema import StudyFile

#: options that are named
_MOST = 5


def told(study: str, results: Path, ran: Any = None) -> str:
    """A line where a study's file says otherwise than what ran last in its folder; "" where it does not.

    Where the file cannot be read, or results are named directly, there is nothing to compare.

    Args:
        study: as it was given: a predefined name, a file, or anything else that results are found by.
        ran: the study's sections in study.json, if they were read already.
    """
    asked, source, found = _compared(study, results, ran)
    return found or told_of_earlier(asked.get("after"), source, results)


def told_of_earlier(after: str | None, source: str, results: Path) -> str:
    """The same of the study that another one goes on from, whose adapters are others when it is run again."""
    found = _compared(after, results)[2] if after else ""
    return f"{source} comes after {after}, which `flatbench run` would run anew: {found}" if found else ""


def _compared(study: str, results: Path, ran: Any = None) -> tuple[dict[str, Any], str, str]:
    """What the study's file asks for, the file's name, and the line."""
    try:
        content, source = study_files.read(study, unset=True)
        asked = validated(StudyFile, content, source).model_dump(mode="json")
        folder = StudyFolder(results, asked["name"])
        ran = folder.read()["study"] if ran is None else ran
    except (InputError, KeyError):
        return {}, study, ""
    options = [] if Path(study).is_dir() or not isinstance(ran, dict) else [*_differing(asked, ran)]
    more = f" and {len(options) - _MOST} more" if len(options) > _MOST else ""
    line = (
        f"these results are of another version than {source} ({', '.join(options[:_MOST])}{more} differ): "
        f"{folder.path} tells of what ran there last, with --set or before the file was edited, and leaves "
        "out finished runs of other versions"
    )
    return asked, source, line if options else ""


def _differing(asked: Mapping[str, Any], ran: Mapping[str, Any], where: str = "") -> Iterator[str]:
    """Options of the file that ran otherwise, those that had no value in it left out."""
    for key, value in asked.items():
        other, name = ran.get(key), f"{where}{key}"
        if key not in ran or (not where and key in ("description", "variables")):
            continue  # the first decides nothing, and the second is put into what it is of
        if isinstance(value, str) and isinstance(other, dict):
            continue  # a file's name, and what was in it
        if isinstance(value, dict) and isinstance(other, dict) and where == "":
            yield from _differing(value, other, f"{name}.")
            yield from (f"{name}.{more}" for more in other if more not in value)
        elif value != other and study_files.UNSET not in str(value):
            yield name
