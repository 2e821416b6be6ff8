"""Notes of a run in sentences: data that its task cut, left out or found too little of, and others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from flatbench.config.words import folded

#: classes that a note names
_MOST_CLASSES = 5


def notes(data: Mapping[str, Any]) -> list[str]:
    """One note each for what is short in what `flatbench.tasks.base.Task.describe` recorded.

    It knows these entries: ``truncated`` (split -> examples that were cut; beside it ``examples`` and
    ``max_length``), ``truncated_prompts``, ``fewer_than_shots`` (split -> class -> examples),
    ``incomplete_rows`` and ``unlabelled_rows``; ``also_in_train`` and ``also_in_validation`` (split
    -> examples), ``classes``, and ``head_of_others`` (the classes of a stored head that was not taken).

    >>> notes({"truncated": {"train": 3, "test": 0}, "examples": {"train": 64}, "max_length": 32})
    ['3 of 64 train texts were cut at max_length 32']
    >>> notes({"fewer_than_shots": {"train": {"lilac": 2}, "validation": {}}})
    ['fewer examples than shots for train: lilac (2)']
    >>> notes({"also_in_train": {"test": 7}, "examples": {"test": 100}})
    ['7 of 100 test examples are in train as well: they may have been learned by heart']
    """
    return [
        *_truncation_notes(data),
        *_shortage_notes(data),
        *_omission_notes(data),
        *_repetition_notes(data),
        *_class_notes(data),
        *_head_notes(data),
    ]


def of_result(result: Mapping[str, Any] | None) -> list[str]:
    """All that a result.json notes: of the data, and what was done in another way than it was asked for."""
    found = result or {}
    return [*notes(found.get("data") or {}), *found.get("notes", ())]


def _truncation_notes(data: Mapping[str, Any]) -> Iterator[str]:
    sizes = _mapping_or_empty(data.get("examples"))
    limit = f" at max_length {data['max_length']}" if data.get("max_length") else ""
    for split, count in _mapping_or_empty(data.get("truncated")).items():
        if count:
            whole = f" of {sizes[split]}" if split in sizes else ""
            yield f"{count}{whole} {split} texts were cut{limit}"
    if data.get("truncated_prompts"):
        yield f"{data['truncated_prompts']} class prompts were cut at the model's number of tokens"


def _shortage_notes(data: Mapping[str, Any]) -> Iterator[str]:
    for split, classes in _mapping_or_empty(data.get("fewer_than_shots")).items():
        found = [f"{name} ({count})" for name, count in _mapping_or_empty(classes).items()]
        if found:
            more = f" and {len(found) - _MOST_CLASSES} more classes" if len(found) > _MOST_CLASSES else ""
            yield f"fewer examples than shots for {split}: {', '.join(found[:_MOST_CLASSES])}{more}"


def _omission_notes(data: Mapping[str, Any]) -> Iterator[str]:
    for entry, lacking in (("incomplete_rows", "a text"), ("unlabelled_rows", "an agreed label")):
        if data.get(entry):
            yield f"{data[entry]} rows of the files without {lacking} were left out"


def _repetition_notes(data: Mapping[str, Any]) -> Iterator[str]:
    sizes = _mapping_or_empty(data.get("examples"))
    for earlier, why in (
        ("train", "they may have been learned by heart"),
        ("validation", "what is chosen there is chosen on them"),
    ):
        for split, count in _mapping_or_empty(data.get(f"also_in_{earlier}")).items():
            whole = f" of {sizes[split]}" if split in sizes else ""
            yield f"{count}{whole} {split} examples are in {earlier} as well: {why}"


def _class_notes(data: Mapping[str, Any]) -> Iterator[str]:
    """Classes that a slip has made two of one."""
    classes = data.get("classes")
    alike: dict[str, list[str]] = {}
    for name in map(str, classes if isinstance(classes, list) else ()):
        alike.setdefault(folded(name), []).append(name)
    for names in alike.values():
        if len(names) > 1:
            yield f"the classes {', '.join(map(repr, names))} differ in case or blanks alone"


def _mapping_or_empty(value: Any) -> Mapping[str, Any]:
    """The value if it is a mapping: a third party's task may call something else so."""
    return value if isinstance(value, Mapping) else {}


def _head_notes(data: Mapping[str, Any]) -> Iterator[str]:
    """A head that was trained for other classes, or for these in another order."""
    stored = data.get("head_of_others")
    if isinstance(stored, list) and stored:
        named = ", ".join(map(str, stored[:_MOST_CLASSES])) + (", …" if len(stored) > _MOST_CLASSES else "")
        yield (
            f"the model's head was trained for the classes {named}, in this order, and the task has others "
            "or another order: the head starts from random weights"
        )
