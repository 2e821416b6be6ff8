"""Names of settings in words, for whoever reads a report or a terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping

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
