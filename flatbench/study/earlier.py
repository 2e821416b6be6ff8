"""A study that goes on from another one's adapters: which is run first, and which of its runs is taken."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from flatbench.config import study_files
from flatbench.errors import InputError
from flatbench.security.paths import check, roots_of
from flatbench.store import StudyFolder


def earlier(
    study: str, overrides: Sequence[str] = (), *, roots: Iterable[str | Path] = ()
) -> list[tuple[str, list[str]]]:
    """The studies to run before ``study``, the first one first, each with the overrides that it takes over.

    Only values of ``variables`` are handed on: where data and models lie holds for all of them.

    Args:
        roots: further folders in which a study may name files; see `flatbench.study.load`.

    Raises:
        InputError: a study that cannot be read or lies outside its roots, or that comes after itself.
    """
    roots = list(roots)
    handed = [text for text in overrides if text.startswith("variables.")]
    found: list[tuple[str, list[str]]] = []
    seen, name = {study}, _named(study, overrides, roots)
    while name is not None:
        if name in seen:
            raise InputError(f"{study}: after: '{name}' would have to be run before itself")
        seen.add(name)
        variables = study_files.read(name)[0].get("variables") or {}
        own = [text for text in handed if text.partition("=")[0].removeprefix("variables.") in variables]
        found.insert(0, (name, own))
        name = _named(name, own, roots)
    return found


def _named(study: str, overrides: Sequence[str], roots: Sequence[str | Path]) -> str | None:
    name = study_files.read(study, overrides)[0].get("after")
    if not isinstance(name, str):
        return None
    if name not in study_files.predefined():
        values = [study_files.override_value(text) for text in overrides]
        try:
            check("after", name, roots_of(study_files.find(study)[0], values, roots))
        except InputError as error:
            raise InputError(f"{study}: {error}") from None
    return name


def trained_adapter(results: Path, study: str, method: str, source: str) -> Path | None:
    """The adapter that a method's final run with the study's first seed ended with; None before that.

    Args:
        results: folder of the results of studies.
        source: the study that goes on from it, for messages.

    Raises:
        InputError: the study has no such method, or several conditions or configurations to choose from.
    """
    folder = StudyFolder(results, study_files.name_of(study))
    if not (folder.path / "study.json").is_file():
        return None
    content = folder.read()
    if method not in content["methods"]:
        raise InputError(
            f"{source}: after: {study} has no method '{method}' whose adapter it could start from; it has "
            f"{', '.join(content['methods'])}"
        )
    finals = [run for run in content["runs"] if run["stage"] == "final" and run["method"] == method]
    places = {(run["condition"], str(run["hyper"])) for run in finals}
    if len(places) > 1:
        raise InputError(
            f"{source}: after: {study} has {len(places)} conditions or configurations of '{method}', and "
            "which of their adapters to start from is not said; give it one condition, and tune it"
        )
    for run in finals:
        directory = folder.run(run["id"])
        if directory.spec()["config"]["seed"] == content["seeds"][0] and directory.state() == "done":
            return directory.adapter
    return None
