"""Plain YAML, read by a safe loader that knows ``1e-3`` and refuses what grows without bound."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

from flatbench.errors import shown

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
                self._check_merge_size(node)
        super().flatten_mapping(node)
        if len(node.value) > _LARGEST_MERGED:  # of merged mappings that merge others, each ten times
            self._check_merge_size(node)

    def _check_merge_size(self, node: yaml.MappingNode) -> None:
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
