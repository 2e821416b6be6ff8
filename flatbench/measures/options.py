"""Checks a measure's options when it is made without a study file, by the same rules."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from flatbench.config.registry import Options, options_model
from flatbench.errors import InputError


def checked(measure: type, **options: Any) -> Options:
    """The options, validated. Raises InputError with the first thing that is wrong."""
    try:
        return options_model(measure)(**options)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{measure.__name__}: {where}: {first['msg']}") from error
