"""Finding and reading study files: overrides from the command line, variables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flatbench.config.names import plain_name
from flatbench.config.plain import plain
from flatbench.config.yaml import parse, read_text
from flatbench.errors import InputError, shown, suggest
from flatbench.security.secrets import REDACTED, looks_like_a_secret, redacted


def folder() -> Path:
    """Where the predefined studies are: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parents[1]
    return package / "studies" if (package / "studies").is_dir() else package.parent / "studies"


def predefined() -> dict[str, Path]:
    """Name -> file of the predefined studies."""
    return {path.stem: path for path in sorted(folder().glob("*.yaml"))}


def describe(path: Path) -> str:
    """The ``description:`` of a study file."""
    return str((parse(path.read_text(encoding="utf-8")) or {}).get("description", ""))


def find(study: str) -> tuple[Path, str]:
    """The file of a predefined study or a path, and its name for messages. Raises InputError for neither."""
    path = predefined().get(study)
    if path is not None:
        return path, path.name
    if not _is_file(Path(study)):
        is_path = "/" in study or study.endswith((".yaml", ".yml"))
        raise InputError(
            f"unknown study '{study}'; {'no such file' if is_path else suggest(study, predefined())}"
        )
    return Path(study), study


#: stands for the value of a variable that has none, where a study is only looked at
UNSET = "(not set)"


def read(study: str, overrides: Sequence[str] = (), *, unset: bool = False) -> tuple[dict[str, Any], str]:
    """The content of a study with overrides and variables put in, and its name for messages.

    Args:
        unset: let variables without a value stand for `UNSET`.

    Raises InputError for a study that is not there, is no plain YAML, or uses a variable without a value.
    """
    path, source = find(study)
    content = _content(path, source)
    if not isinstance(content, dict):
        raise InputError(f"{source}: expected a mapping of sections, found {type(content).__name__}")
    for override in overrides:
        _override(content, override)
    variables = content.get("variables")
    if unset and isinstance(variables, dict):
        named = {name: f"{name} {UNSET}" if value is None else value for name, value in variables.items()}
        content["variables"] = named
    return plain(content, source), source


def _content(path: Path, source: str) -> Any:
    try:
        return parse(read_text(path))
    except (ValueError, OSError) as error:
        raise InputError(f"{source}: not readable as plain YAML: {redacted(str(error))}") from None


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long a name, or a zero in it
        return False


def override_value(override: str) -> Any:
    """What ``section.key=value`` sets, read as YAML. Raises InputError for what is not of this form."""
    path, equals, text = override.partition("=")
    if not equals or not all(path.strip().split(".")):
        raise InputError(
            f"--set {_tell(override)}: write it as section.key=value, for example train.epochs=1"
        )
    try:
        return parse(text)
    except ValueError as error:
        told = _tell(override)  # PyYAML quotes what it could not read
        problem = "not readable as YAML" if told.endswith(REDACTED) else redacted(str(error))
        raise InputError(f"--set {told}: {problem}") from None


def _tell(override: str) -> str:
    """What was typed, for messages, without what looks like a credential."""
    path, equals, text = override.partition("=")
    name = path.strip().rpartition(".")[2]
    if looks_like_a_secret(text, name):
        return f"{shown(redacted(path), 200)}={REDACTED}"
    return shown(redacted(f"{path}{equals}{text}"), 300)


def _override(content: dict[str, Any], override: str) -> None:
    value = override_value(override)
    keys = override.partition("=")[0].strip().split(".")
    node = content
    for key in keys[:-1]:
        inner = node.get(key)
        if isinstance(inner, str):  # a shorthand such as `task: digits`
            inner = {"name": inner}
        if not isinstance(inner, dict | None):
            raise InputError(f"--set {_tell(override)}: '{key}' holds no named values; set it as a whole")
        node[key] = dict(inner or {})
        node = node[key]
    node[keys[-1]] = value


def name_of(study: str) -> str:
    """The ``name:`` of a predefined study or study file; a bare word that is neither is a name itself."""
    if study in predefined() or _is_file(Path(study)):
        content = _content(predefined().get(study) or Path(study), study)
        return plain_name(content.get("name") if isinstance(content, dict) else None, f"{study}: name")
    return plain_name(study, "STUDY")
