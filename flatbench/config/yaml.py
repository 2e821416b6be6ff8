"""Plain YAML, with the numbers and truth values of YAML 1.2, and a bound on what grows."""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from flatbench.errors import shown

#: characters in a study file
LARGEST_FILE = 1_000_000
#: commas and lines in it: PyYAML takes a minute for a million
MOST_VALUES = 100_000
#: brackets that open in it: for each, PyYAML goes through those that are open
MOST_BRACKETS = 20_000
#: mappings that one ``<<`` may put together, and values that they may have
_MOST_MERGED, _LARGEST_MERGED = 16, 1000


_MERGE = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with YAML 1.2's core schema; it refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == _MERGE:
                continue  # what is merged may be given again beside it, which counts
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
            if key.tag == _MERGE and len(value.value) > _MOST_MERGED:
                self._check_merge_size(node)
        super().flatten_mapping(node)
        if len(node.value) > _LARGEST_MERGED:  # of merged mappings that merge others, each ten times
            self._check_merge_size(node)

    def _check_merge_size(self, node: yaml.MappingNode) -> None:
        problem = f"more than {_MOST_MERGED} mappings or {_LARGEST_MERGED} values put together with <<"
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def _whole_number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node))
    base = {"0o": 8, "0x": 16}.get(text[:2], 10)
    return int(text, base)


# PyYAML implements YAML 1.1, where 010 is 8, 1:30 is 90, `no` is false, and 1e-3 a text
_CORE = {
    "bool": (re.compile(r"true|True|TRUE|false|False|FALSE"), "tTfF"),
    "int": (re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"), "-+0123456789"),
    "float": (
        re.compile(
            r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
        ),
        "-+.0123456789",
    ),
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in found if tag.rpartition(":")[2] not in (*_CORE, "timestamp")]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _name, (_form, _first) in _CORE.items():
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_name}", re.compile(f"({_form.pattern})$"), list(_first)
    )
_Loader.add_constructor("tag:yaml.org,2002:int", _whole_number)


def read_text(path: Path) -> str:
    """A YAML file's text. Raises ValueError or OSError for what is no file, no text, or too large."""
    if not path.is_file():  # a pipe would be waited for
        raise ValueError("no such file")
    if path.stat().st_size > LARGEST_FILE:
        raise ValueError(f"more than {LARGEST_FILE} characters")
    return path.read_text(encoding="utf-8")


def parse(text: str) -> Any:
    """The content of a YAML text, read by the safe loader.

    Raises ValueError with one line for anything but plain YAML.
    """
    count = text.count(",") + text.count("\n")
    if count > MOST_VALUES:
        raise ValueError(f"{count} commas and lines; at most {MOST_VALUES} are read")
    brackets = text.count("[") + text.count("{")
    if brackets > MOST_BRACKETS:
        raise ValueError(f"{brackets} brackets; at most {MOST_BRACKETS} are read")
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError, ValueError, TypeError, LookupError, AttributeError) as error:
        # beside YAMLError, PyYAML lets out what its own readers of `!!bool x`, `!!int ""` and the like raise
        raise ValueError(shown(" ".join(f"{error or type(error).__name__}".split()), 300)) from None
