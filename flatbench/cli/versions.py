"""Compares a study's file with the version of it that ran last: names are equal sooner than studies are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flatbench.config import study_files
from flatbench.config.validation import validated
from flatbench.config.words import settings
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
        asked: StudyFile = validated(StudyFile, content, source)
        folder = StudyFolder(results, asked.name)
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
    return asked.model_dump(mode="json"), source, line if options else ""


def _differing(asked: StudyFile, ran: Mapping[str, Any]) -> Iterator[str]:
    """Settings that ran otherwise, those that have no value in the file left out."""
    whole, said, other = (
        dict(settings(content))
        for content in (asked.model_dump(mode="json"), asked.model_dump(mode="json", exclude_unset=True), ran)
    )
    for name in dict.fromkeys([*other, *said]):
        # variables are put into what they are of, and the content of accelerate's file in its name's place
        if name.startswith(("variables", "train.accelerate")):
            continue
        if whole.get(name) != other.get(name) and study_files.UNSET not in whole.get(name, ""):
            yield name
