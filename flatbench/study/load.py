"""Reading a study file, with what it may reach."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from flatbench.config import accelerate as accelerate_options
from flatbench.config import study_files
from flatbench.errors import InputError
from flatbench.security import remote_code
from flatbench.security.paths import Roots, check, named_paths, roots_of, usable
from flatbench.study.study import Study


def load(
    study: str, overrides: Sequence[str] = (), *, roots: Iterable[str | Path] = (), unset: bool = False
) -> Study:
    """Read a predefined study or a study file.

    A file may come from somebody else: the paths in it must lie below its folder, the working directory, a
    value among ``overrides``, one of ``roots``, or a folder of ``$FLATBENCH_ROOTS``, and it may ask for the
    code of those models only that `flatbench.security.remote_code` was told of. ``Study(content, source)``
    asks neither.

    Args:
        study: a predefined name, or the path of a YAML file.
        overrides: ``"train.epochs=1"`` and the like, values in YAML.
        roots: further folders in which the study may read.
        unset: the study is only looked at, and its variables may have no value.

    Raises:
        InputError: the study cannot be found, read, or is not valid; the message names file and field.
    """
    path, _ = study_files.find(study)
    content, source = study_files.read(study, overrides, unset=unset)
    allowed = roots_of(path, [study_files.override_value(text) for text in overrides], roots)
    loaded = Study(_with_accelerate(content, source, allowed), source)
    _admit(loaded, allowed)
    return loaded


def _with_accelerate(content: dict[str, Any], source: str, allowed: Roots) -> dict[str, Any]:
    """The study with the content of the file that ``train.accelerate`` names in its place."""
    train = content.get("train")
    named = train.get("accelerate") if isinstance(train, dict) else None
    if not isinstance(train, dict) or not isinstance(named, str):
        return content
    try:
        check("train.accelerate", usable(named), allowed)
        return {**content, "train": {**train, "accelerate": accelerate_options.read(named)}}
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
    except ValueError as error:
        raise InputError(f"{source}: train.accelerate: {error}") from None


def _admit(study: Study, allowed: Roots) -> None:
    """Raise InputError for a path that leaves the study's roots, or code that nobody asked for."""
    try:
        for condition in study.conditions:
            for options, where in condition.options():
                for field, text in named_paths(options, where):
                    check(field, text, allowed)
            if condition.model.get("trust_remote_code"):
                remote_code.check(condition.model["name_or_path"])
    except InputError as error:
        raise InputError(f"{study.source}: {error}") from None
