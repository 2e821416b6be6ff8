"""Pydantic's findings as one line that names file, field and the nearest known name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from flatbench.errors import InputError, suggest
from flatbench.registry import Options


def validated(model: type[Any], content: Any, source: str, where: str = "") -> Any:
    """``model`` made from ``content``.

    Raises InputError with ``source``, the field below ``where``, and what is wrong with it.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise InputError(f"{source}: {_first_problem(error, model, where)}") from None


def _first_problem(error: ValidationError, model: type[Any], where: str) -> str:
    problems = error.errors()
    # of a union's branches, that of the type that was given says more than "not a string"
    problem = next((p for p in problems if p["type"] != "string_type"), problems[0])
    path = [str(part) for part in problem["loc"] if not _is_union_branch(part)]
    field = ".".join([where, *path] if where else path) or "the file"
    if problem["type"] == "extra_forbidden":
        owner = model
        for part in path[:-1]:
            annotation = owner.model_fields[part].annotation if part in owner.model_fields else None
            candidates = [annotation, *getattr(annotation, "__args__", ())]
            owner = next((c for c in candidates if isinstance(c, type) and issubclass(c, Options)), owner)
        return f"{field}: unknown key; {suggest(path[-1], owner.model_fields)}"
    if problem["type"] == "missing":
        return f"{field}: missing"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{field}: {message[:1].lower()}{message[1:]}, found {_short(problem.get('input'))}"


def _is_union_branch(part: Any) -> bool:
    """Pydantic puts the name of a union's branch into an error's place; a person did not write it."""
    return isinstance(part, str) and (part in {"str", "bool", "int", "float"} or "[" in part)


def _short(value: Any) -> str:
    text = str(value.get("name", value)) if isinstance(value, Mapping) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
