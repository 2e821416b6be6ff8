"""Finding and reading study files: plain YAML, overrides from the command line, variables."""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import yaml

from flatbench.config.plain import plain
from flatbench.errors import InputError, shown, suggest

#: what may name a study, a method and so a folder: nothing that leaves its parent folder
NAME = r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}"


#: characters in a study file
LARGEST_FILE = 1_000_000
#: mappings that one ``<<`` may put together, and values that they may have
_MOST_MERGED, _LARGEST_MERGED = 16, 1000


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader that also reads ``1e-3`` as a number and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                continue  # PyYAML has a message of its own
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"'{key}' is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        for key, value in node.value:
            if key.tag == "tag:yaml.org,2002:merge" and len(value.value) > _MOST_MERGED:
                self._too_much_merged(node)
        super().flatten_mapping(node)
        if len(node.value) > _LARGEST_MERGED:  # of merged mappings that merge others, each ten times
            self._too_much_merged(node)

    def _too_much_merged(self, node: yaml.MappingNode) -> None:
        problem = f"more than {_MOST_MERGED} mappings or {_LARGEST_MERGED} values put together with <<"
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


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
    except (yaml.YAMLError, RecursionError, ValueError, TypeError, LookupError, AttributeError) as error:
        # beside YAMLError, PyYAML lets out what its own readers of `!!bool x`, `!!int ""` and the like raise
        raise ValueError(shown(" ".join(f"{error or type(error).__name__}".split()), 300)) from None


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


def read(study: str, overrides: Sequence[str] = ()) -> tuple[dict[str, Any], str]:
    """The content of a study with overrides and variables put in, and its name for messages.

    Raises InputError for a study that is not there, is no plain YAML, or uses a variable without a value.
    """
    path, source = find(study)
    content = _content(path, source)
    if not isinstance(content, dict):
        raise InputError(f"{source}: expected a mapping of sections, found {type(content).__name__}")
    for override in overrides:
        _override(content, override)
    return plain(content, source), source


def _content(path: Path, source: str) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
        if len(text) > LARGEST_FILE:
            raise ValueError(f"more than {LARGEST_FILE} characters")
        return parse(text)
    except (ValueError, OSError) as error:
        raise InputError(f"{source}: not readable as plain YAML: {error}") from None


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


def name_of(study: str) -> str:
    """The ``name:`` of a predefined study or study file; a bare word that is neither is a name itself."""
    if study in predefined() or _is_file(Path(study)):
        content = _content(predefined().get(study) or Path(study), study)
        return plain_name(content.get("name") if isinstance(content, dict) else None, f"{study}: name")
    return plain_name(study, "STUDY")


def plain_name(name: Any, where: str) -> str:
    """``name`` if it can name a folder. Raises InputError for one that could lead out of its parent."""
    if not isinstance(name, str) or not re.fullmatch(NAME, name):
        raise InputError(
            f"{where}: a study's name is made of letters, digits, '.', '_', '+' and '-', not "
            f"{shown(repr(name))}"
        )
    return name
