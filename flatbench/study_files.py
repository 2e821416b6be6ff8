"""Finding and reading study files: plain YAML, overrides from the command line, variables."""

from __future__ import annotations

import itertools
import re
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import yaml

from flatbench.errors import InputError, suggest

#: what may name a study, a method and so a folder: nothing that leaves its parent folder
NAME = r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}"


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader that also reads ``1e-3`` as a number and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for i, key in enumerate(keys):
            if key in keys[:i]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"'{key}' is given twice", node.value[i][0].start_mark
                )
        return super().construct_mapping(node, deep)


# YAML 1.1, which PyYAML implements, wants a dot in a float; everybody writes 1e-3
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse(text: str) -> Any:
    """The content of a YAML text, read by the safe loader.

    Raises ValueError with one line for anything but plain YAML.
    """
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError, ValueError, TypeError) as error:
        raise ValueError(" ".join(str(error).split())) from None


def folder() -> Path:
    """Where the predefined studies are: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parent
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


def read(path: Path, source: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The content of a study file with overrides and variables put in.

    Raises InputError for a file that is no plain YAML, or uses a variable without a value.
    """
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise InputError(f"{source}: not readable as plain YAML: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{source}: expected a mapping of sections, found {type(content).__name__}")
    for override in overrides:
        _override(content, override)
    return _substitute(content, source)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long a name, or a zero in it
        return False


def override_value(override: str) -> Any:
    """What ``section.key=value`` sets, read as YAML. Raises InputError for what is not of this form."""
    path, equals, text = override.partition("=")
    if not equals or not all(path.strip().split(".")):
        raise InputError(f"--set {override}: write it as section.key=value, for example train.epochs=1")
    try:
        return parse(text)
    except ValueError as error:
        raise InputError(f"--set {override}: {error}") from None


def _override(content: dict[str, Any], override: str) -> None:
    value = override_value(override)
    keys = override.partition("=")[0].strip().split(".")
    node = content
    for key in keys[:-1]:
        inner = node.get(key)
        if isinstance(inner, str):  # a shorthand such as `task: digits`
            inner = {"name": inner}
        if not isinstance(inner, dict | None):
            raise InputError(f"--set {override}: '{key}' holds no named values; set it as a whole")
        node[key] = dict(inner or {})
        node = node[key]
    node[keys[-1]] = value


#: values in a study file, aliases written out
LARGEST = 100_000

_VARIABLE = re.compile(r"\$\{([^}]*)\}")


def _substitute(content: dict[str, Any], source: str) -> dict[str, Any]:
    """``${name}`` in every string replaced by the study's variable ``name``."""
    variables = content.get("variables") or {}
    if not isinstance(variables, dict):
        raise InputError(f"{source}: variables: expected names and values")

    def replace(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in variables:
            raise InputError(f"{source}: ${{{name}}}: no such variable; {suggest(name, map(str, variables))}")
        if variables[name] is None:
            raise InputError(f"{source}: variables.{name} has no value; give one: --set variables.{name}=…")
        return str(variables[name])

    nodes = itertools.count()

    def walk(node: Any) -> Any:
        if next(nodes) > LARGEST:  # aliases can make a few lines endless
            raise InputError(f"{source}: more than {LARGEST} values, or an alias that holds itself")
        if isinstance(node, str):
            return _VARIABLE.sub(replace, node)
        if isinstance(node, dict):
            return {key: walk(value) for key, value in node.items()}
        if isinstance(node, list):
            return [walk(value) for value in node]
        return node

    try:
        return {key: value if key == "variables" else walk(value) for key, value in content.items()}
    except RecursionError:
        raise InputError(f"{source}: an alias that holds itself") from None


def name_of(study: str) -> str:
    """The ``name:`` of a predefined study or study file; a bare word that is neither is a name itself."""
    if study in predefined() or _is_file(Path(study)):
        path = predefined().get(study) or Path(study)
        try:
            content = parse(path.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise InputError(f"{study}: not readable as plain YAML: {error}") from None
        return _plain_name(content.get("name") if isinstance(content, dict) else None, f"{study}: name")
    return _plain_name(study, "STUDY")


def _plain_name(name: Any, where: str) -> str:
    if not isinstance(name, str) or not re.fullmatch(NAME, name):
        raise InputError(
            f"{where}: a study's name is made of letters, digits, '.', '_', '+' and '-', not {name!r}"
        )
    return name
