"""Pydantic's findings as one line that names file, field and the nearest known name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from flatbench.config.registry import AT_OPTION, Options, Registry
from flatbench.errors import InputError, shown, suggest


def validated(model: type[Any], content: Any, source: str, where: str = "") -> Any:
    """``model`` made from ``content``.

    Raises InputError with ``source``, the field below ``where``, and what is wrong with it.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise InputError(f"{source}: {_first_problem(error, model, content, where)}") from None


def plugin(registry: Registry, raw: Mapping[str, Any], source: str, where: str) -> tuple[str, dict[str, Any]]:
    """Name and checked options of a plug-in from ``{"name": …, options}``."""
    options = dict(raw)
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise InputError(f"{source}: {where}.name: missing; {suggest('', registry.names())}")
    if name not in registry:
        raise InputError(
            f"{source}: {where}: unknown {registry.kind} '{shown(name)}'; {suggest(name, registry.names())}"
        )
    checked = validated(registry.options(name), options, source, where)
    return name, checked.model_dump(mode="json")


def as_mapping(raw: Any, source: str, where: str) -> dict[str, Any]:
    """A name alone as ``{"name": …}``. Raises InputError for what is neither a name nor a mapping."""
    if isinstance(raw, str):
        return {"name": raw}
    if not isinstance(raw, Mapping):
        raise InputError(f"{source}: {where}: expected a name or a mapping, found {type(raw).__name__}")
    return dict(raw)


def _first_problem(error: ValidationError, model: type[Any], content: Any, where: str) -> str:
    problems = error.errors()
    # of a union's branches, that of the type that was given says more than "not a string"
    problem = next((p for p in problems if p["type"] != "string_type"), problems[0])
    path = _path(problem, content)
    field = ".".join([where, *map(shown, path)] if where else map(shown, path)) or "the file"
    if problem["type"] == "extra_forbidden":
        owner = model
        for part in path[:-1]:
            annotation = owner.model_fields[part].annotation if part in owner.model_fields else None
            candidates = [annotation, *getattr(annotation, "__args__", ())]
            owner = next((c for c in candidates if isinstance(c, type) and issubclass(c, Options)), owner)
        return f"{field}: unknown key; {suggest(path[-1], owner.model_fields)}"
    if problem["type"] == "missing":
        return f"{field}: missing"
    if problem["type"] == AT_OPTION:
        return f"{field}: {problem['msg']}"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{field}: {message[:1].lower()}{message[1:]}, found {_value_text(problem.get('input'))}"


def _path(problem: Any, content: Any) -> list[str]:
    """The problem's place as a person would find it, without the names of a union's branches."""
    loc = [*problem["loc"], *([problem["ctx"]["option"]] if problem["type"] == AT_OPTION else [])]
    found, node = [], content
    for i, part in enumerate(loc):
        inside = (isinstance(node, Mapping) and part in node) or (
            isinstance(node, list | tuple) and isinstance(part, int) and part < len(node)
        )
        if inside or (i == len(loc) - 1 and problem["type"] == "missing") or not _is_union_branch(part):
            found.append(str(part) or "''")
            node = node[part] if inside else None
    return found


def _is_union_branch(part: Any) -> bool:
    """Pydantic puts the name of a union's branch into an error's place; a person did not write it."""
    return isinstance(part, str) and (part in {"str", "bool", "int", "float"} or "[" in part)


def _value_text(value: Any) -> str:
    return shown(value.get("name", value) if isinstance(value, Mapping) else repr(value))
