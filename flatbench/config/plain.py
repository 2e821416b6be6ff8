"""Reduce a study file to plain text, numbers, lists and mappings, and substitute its variables."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from typing import Any

from flatbench.errors import InputError, shown, suggest
from flatbench.security.secrets import looks_like_a_secret

#: values in a study file, aliases written out
LARGEST = 100_000
#: characters of a key, of a variable, of any one text, and of all texts, variables put in
LONGEST_KEY, LONGEST_VARIABLE, LONGEST_TEXT, MOST_TEXT = 200, 4096, 100_000, 10_000_000
#: sections within sections
DEEPEST = 32
#: what a column of whole numbers can hold
_LARGEST_INTEGER = 2**63 - 1

_VARIABLE = re.compile(r"\$\{([^}]*)\}")


def plain(content: Mapping[str, Any], source: str) -> dict[str, Any]:
    """A copy of a study's content in which ``${name}`` stands for the study's variable ``name``.

    Raises InputError, with the field, for what JSON has no word for (dates, sets, infinity, keys that are no
    text), for what is too large or too deep, and for variables without a value.
    """
    variables = content.get("variables") or {}
    if not isinstance(variables, dict):
        raise InputError(f"{source}: variables: expected names and values")
    reader = _PlainReader(variables, source)
    return {
        reader.key(key, ""): reader.value(value, _join_place("", key), replaced=key != "variables")
        for key, value in content.items()
    }


class _PlainReader:
    def __init__(self, variables: Mapping[Any, Any], source: str) -> None:
        self.variables, self.source = variables, source
        self._count, self._characters = itertools.count(), 0

    def key(self, key: Any, where: str) -> str:
        if not isinstance(key, str):
            place = where or "the file"
            raise self._problem(place, f"the key {shown(repr(key))} is no text; put it in quotes")
        if len(key) > LONGEST_KEY:
            raise self._problem(where or "the file", f"a key of more than {LONGEST_KEY} characters")
        return self._text(key, _join_place(where, key))

    def value(self, node: Any, where: str, replaced: bool, depth: int = 1) -> Any:
        if next(self._count) > LARGEST:  # aliases can make a few lines endless
            raise self._problem(where, f"more than {LARGEST} values up to here")
        if depth > DEEPEST:
            raise self._problem(where, f"nested more than {DEEPEST} deep, or an alias that holds itself")
        if isinstance(node, str):
            return self._text(
                _VARIABLE.sub(lambda m: self._variable(m, where), node) if replaced else node, where
            )
        if isinstance(node, dict):
            return {
                self.key(key, where): self.value(inner, _join_place(where, key), replaced, depth + 1)
                for key, inner in node.items()
            }
        if isinstance(node, list):
            return [self.value(inner, f"{where}[{i}]", replaced, depth + 1) for i, inner in enumerate(node)]
        if node is None or isinstance(node, bool | int | float):
            return self._number(node, where)
        kind = type(node).__name__
        raise self._problem(where, f"a {kind} is neither text nor number, list nor mapping; put it in quotes")

    def _number(self, node: Any, where: str) -> Any:
        if isinstance(node, float) and not math.isfinite(node):
            raise self._problem(where, f"expected a finite number, found {node}")
        if isinstance(node, int) and abs(node) > _LARGEST_INTEGER:
            raise self._problem(where, "a whole number of more than 63 bits")
        return node

    def _text(self, text: str, where: str) -> str:
        self._characters += len(text)
        if len(text) > LONGEST_TEXT or self._characters > MOST_TEXT:
            raise self._problem(
                where, f"a text of more than {LONGEST_TEXT} characters, or {MOST_TEXT} in all"
            )
        self._refuse_secret(text, where)
        try:
            text.encode()
        except UnicodeEncodeError:
            raise self._problem(where, "half a character (a surrogate), which no file can hold") from None
        return text

    def _refuse_secret(self, text: str, where: str) -> None:
        """A study is written into every run and report."""
        name = where.removeprefix("variables.") if where.startswith("variables.") else ""
        if looks_like_a_secret(text, name):
            problem = "looks like a credential, which would stand in every run; leave it to the environment"
            raise self._problem(where, problem)

    def _variable(self, match: re.Match[str], where: str) -> str:
        name, own = match.group(1), f"variables.{match.group(1)}"
        if name not in self.variables:
            known = suggest(name, map(str, self.variables))
            raise self._problem(where, f"${{{shown(name)}}}: no such variable; {known}")
        value = self.variables[name]
        if value is None:
            raise self._problem(own, f"{shown(own)} has no value; give one: --set {shown(own)}=…")
        if not isinstance(value, str | bool | int | float):
            raise self._problem(own, f"expected a text, found {type(value).__name__}")
        text = value if isinstance(value, str) else str(self._number(value, own))
        if len(text) > LONGEST_VARIABLE:
            raise self._problem(own, f"a variable of more than {LONGEST_VARIABLE} characters")
        return text

    def _problem(self, where: str, problem: str) -> InputError:
        return InputError(f"{self.source}: {'.'.join(map(shown, where.split('.')))}: {problem}")


def _join_place(where: str, key: Any) -> str:
    name = str(key) or "''"
    return f"{where}.{name}" if where else name
