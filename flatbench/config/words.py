"""Settings and texts as a reader of a report or a terminal takes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

#: options of tasks that a condition may vary, in words
_OPTIONS: Mapping[str, Callable[[str], str]] = {
    "label_noise": lambda v: f"{100 * float(v):g} % wrong labels",
    "task": str,
    "name": str,
    "shots": lambda v: f"{int(v)} example{'s' if int(v) != 1 else ''} a class",
    "train_examples": lambda v: f"{int(v):,} training examples",
}


def condition_words(label: str) -> str:
    """A condition for a reader; what has no words stays as it is.

    >>> condition_words("task.label_noise=0.2, adapter.r=8")
    '20 % wrong labels, adapter.r=8'
    """
    parts = []
    for part in label.split(", "):
        key, equals, value = part.partition("=")
        words = _OPTIONS.get(key.removeprefix("task.")) if equals and key.startswith("task.") else None
        try:
            parts.append(words(value) if words else part)
        except ValueError:
            parts.append(part)
    return ", ".join(parts)


def settings(content: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """A study's sections as settings by name; items of a list by their own.

    >>> dict(settings({"seeds": [0, 1], "methods": [{"name": "sam", "lr": 0.1}]}))
    {'seeds': '[0, 1]', 'methods[sam].name': 'sam', 'methods[sam].lr': '0.1'}
    """
    if isinstance(content, Mapping) and content:
        for key, value in content.items():
            yield from settings(value, f"{path}.{key}" if path else str(key))
    elif isinstance(content, list) and any(isinstance(item, Mapping) for item in content):
        for i, item in enumerate(content):
            name = item.get("name", i) if isinstance(item, Mapping) else item
            yield from settings(item, f"{path}[{name}]")
    elif path not in ("description", "name"):
        yield path, str(content)


def folded(text: str) -> str:
    """What texts have in common that differ in case and white space alone, as many tokenizers see them.

    >>> folded(" A  good Film") == folded("a good film")
    True
    """
    return " ".join(text.split()).casefold()
