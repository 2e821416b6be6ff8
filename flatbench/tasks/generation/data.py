"""E2E and GSM8K as prompts with their references: the published files, or the same rows from the hub."""

from __future__ import annotations

import csv
import hashlib
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from flatbench.errors import InputError, shown
from flatbench.tasks.common import hub as from_hub
from flatbench.tasks.common.published_files import find, folder_of, json_lines, read_once, read_text


@dataclass(frozen=True)
class Pairs:
    """Sources and references, a pair a row; several rows may share a source (E2E's meanings).

    Attributes:
        fields: per row the values that a prompt's template may name.
        references: per row the text to generate.
    """

    fields: tuple[dict[str, str], ...]
    references: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.references)

    @cached_property
    def sources(self) -> tuple[tuple[str, ...], ...]:
        """Per row what is asked, for telling sources apart."""
        return tuple(tuple(fields.values()) for fields in self.fields)

    def take(self, indices: Iterable[int]) -> Pairs:
        """Some of the rows."""
        chosen = list(indices)
        return Pairs(tuple(self.fields[i] for i in chosen), tuple(self.references[i] for i in chosen))

    @cached_property
    def digest(self) -> str:
        """Hex SHA-256 of all rows."""
        found = hashlib.sha256()
        for source, reference in zip(self.sources, self.references, strict=True):
            found.update(repr((source, reference)).encode())
        return found.hexdigest()


@dataclass(frozen=True)
class Source:
    """Where a data set's rows are.

    Attributes:
        files: split -> names that its file may have, each also with ".gz".
        fields: field of a prompt's template -> column of the files.
        reference: column of the text to generate.
        hub: data set on the hub, with its configuration.
        hub_columns: column of the files -> column on the hub.
        hub_splits: split -> split on the hub.
        prompt: the template of prompts unless a study gives one.
        derived: further fields of a template: name -> what makes it of the row's fields.
    """

    files: dict[str, tuple[str, ...]]
    fields: dict[str, str]
    reference: str
    hub: tuple[str, str | None]
    hub_columns: dict[str, str]
    hub_splits: dict[str, str]
    prompt: str
    derived: Mapping[str, Callable[[Mapping[str, str]], str]] = field(default_factory=dict)

    def values(self, fields: Mapping[str, str]) -> dict[str, str]:
        """All that a row has for a template."""
        return {**fields, **{name: make(fields) for name, make in self.derived.items()}}


#: attributes of E2E's meanings -> what the LoRA paper's data files call them; the others keep their names
LINEARISED_NAMES = {"eatType": "Type", "priceRange": "price", "familyFriendly": "family friendly"}


def linearised(fields: Mapping[str, str]) -> str:
    """E2E's ``name[Alimentum], eatType[pub]`` as ``name : Alimentum | Type : pub``.

    Raises InputError for a meaning that is not written like that.
    """
    meaning = fields["mr"]
    if not re.fullmatch(r"\s*[^\[\],]+\[[^\[\]]*\](\s*,\s*[^\[\],]+\[[^\[\]]*\])*\s*", meaning):
        raise InputError(
            f"prompt: the meaning '{shown(meaning)}' is no list of attribute[value], which {{linearised}} "
            "needs; use {mr}"
        )
    pairs = re.findall(r"([^\[\],]+)\[([^\[\]]*)\]", meaning)
    return " | ".join(
        f"{LINEARISED_NAMES.get(name.strip(), name.strip())} : {value.strip()}" for name, value in pairs
    )


SOURCES = {
    "e2e": Source(
        files={
            "train": ("trainset.csv",),
            "validation": ("devset.csv",),
            "test": ("testset_w_refs.csv",),
        },
        fields={"mr": "mr"},
        reference="ref",
        hub=("tuetschek/e2e_nlg", None),
        hub_columns={"mr": "meaning_representation", "ref": "human_reference"},
        hub_splits={"train": "train", "validation": "validation", "test": "test"},
        prompt="{mr} ||",
        derived={"linearised": linearised},
    ),
    "gsm8k": Source(
        files={"train": ("train.jsonl",), "test": ("test.jsonl",)},
        fields={"question": "question"},
        reference="answer",
        hub=("openai/gsm8k", "main"),
        hub_columns={"question": "question", "answer": "answer"},
        hub_splits={"train": "train", "test": "test"},
        prompt="Question: {question}\nAnswer:",
    ),
}


def read(name: str, data: str | None, revision: str | None) -> dict[str, Pairs]:
    """The published splits of a data set.

    Args:
        data: a folder of the published files; another name on the hub; the usual name there if None.

    Raises:
        InputError: nothing is there, or a file is not as published; the message names file, line and field.
    """
    source = SOURCES[name]
    folder = folder_of(data)
    if folder is not None:
        return {split: _read_file(_find(folder, names), name) for split, names in source.files.items()}
    hub = (data, None) if data and data != source.hub[0] else source.hub
    return {split: _from_hub(name, *hub, revision, part) for split, part in source.hub_splits.items()}


def _find(folder: Path, names: Sequence[str]) -> Path:
    path = find(folder, names)
    if path is None:
        raise InputError(f"data: no {' or '.join(names)} (or the same with .gz) in {folder}")
    return path


@read_once(kept=16)
def _read_file(path: Path, name: str) -> Pairs:
    rows = _csv_rows(path) if ".csv" in path.suffixes else json_lines(path)
    return _pairs(SOURCES[name], rows, str(path), lambda column: column)


def _csv_rows(path: Path) -> Iterable[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True)
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: {error}") from None


def _pairs(
    source: Source, rows: Iterable[tuple[int, dict[str, Any]]], where: str, column: Callable[[str], str]
) -> Pairs:
    fields, references = [], []
    for number, row in rows:
        values = {}
        for name, wanted in (*source.fields.items(), ("", source.reference)):
            value = row.get(column(wanted))
            if column(wanted) not in row:
                raise InputError(
                    f"{where}, line {number}: no column '{column(wanted)}'; it has {', '.join(map(str, row))}"
                )
            if not isinstance(value, str) or not value.strip():
                raise InputError(f"{where}, line {number}: '{column(wanted)}' is empty")
            values[name] = value
        references.append(values.pop(""))
        fields.append(values)
    if not references:
        raise InputError(f"{where}: no rows")
    return Pairs(tuple(fields), tuple(references))


@lru_cache(maxsize=16)
def _from_hub(name: str, hub: str, configuration: str | None, revision: str | None, split: str) -> Pairs:
    table: Any = from_hub.load(
        hub, configuration, revision=revision, split=split, instead="give a folder of the published files"
    )
    source = SOURCES[name]
    rows = enumerate(table, start=1)
    return _pairs(source, rows, f"{hub} ({split})", lambda column: source.hub_columns[column])
