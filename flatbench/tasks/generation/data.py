"""E2E and GSM8K as prompts with their references: the published files, or the same rows from the hub."""

from __future__ import annotations

import csv
import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from flatbench.config import sources
from flatbench.errors import InputError, shown
from flatbench.tasks.common import hub as from_hub
from flatbench.tasks.common.published_files import find, folder_of, json_lines, read_once, text_lines


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
        hub: name on the hub and its configuration, as the table of sources has it; what a column there is for
            is called as the column of the files.
        prompt: the template of prompts unless a study gives one.
        derived: further fields of a template: name -> what makes it of the row's fields.
    """

    files: dict[str, tuple[str, ...]]
    fields: dict[str, str]
    reference: str
    hub: tuple[str, str | None]
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
        prompt="{mr} ||",
        derived={"linearised": linearised},
    ),
    "gsm8k": Source(
        files={"train": ("train.jsonl",), "test": ("test.jsonl",)},
        fields={"question": "question"},
        reference="answer",
        hub=("openai/gsm8k", "main"),
        prompt="Question: {question}\nAnswer:",
    ),
}


def read(
    name: str, data: str | None, revision: str | None, columns: Mapping[str, str] | None = None
) -> dict[str, Pairs]:
    """The published splits of a data set.

    Args:
        data: a folder of the published files; another name on the hub; the usual name there if None.
        columns: what a column is for (mr and ref, or question and answer) -> the column.

    Raises:
        InputError: nothing is there, or a file is not as published; the message names file, line and field.
    """
    source = SOURCES[name]
    folder = folder_of(data)
    if folder is not None:
        roles = (*source.fields.values(), source.reference)
        own = from_hub.mapped({role: role for role in roles}, columns)
        return {split: _read_file(_find(folder, names), name, own) for split, names in source.files.items()}
    wanted = source_of(name, data, revision, columns).wanted
    assert wanted is not None
    return {split: _from_hub(name, wanted, split) for split in source.files}


def source_of(
    name: str, data: str | None, revision: str | None, columns: Mapping[str, str] | None = None
) -> from_hub.Source:
    """Where a data set comes from; arguments as of `read`. Raises InputError for unusable ones."""
    usual = sources.data(*SOURCES[name].hub)
    assert usual is not None
    if folder_of(data) is not None:
        return from_hub.Source(usual, None, ())
    wanted = from_hub.wanted(usual, data, revision, columns, "give a folder of the published files")
    known = sources.data(wanted.name, wanted.configuration)
    return from_hub.Source(known, wanted, tuple(SOURCES[name].files))


def _find(folder: Path, names: Sequence[str]) -> Path:
    path = find(folder, names)
    if path is None:
        raise InputError(f"data: no {' or '.join(names)} (or the same with .gz) in {folder}")
    return path


@read_once(kept=16)
def _read_file(path: Path, name: str, columns: tuple[tuple[str, str], ...]) -> Pairs:
    rows = _csv_rows(path) if ".csv" in path.suffixes else json_lines(path)
    return _pairs(SOURCES[name], rows, str(path), dict(columns))


def _csv_rows(path: Path) -> Iterable[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(text_lines(path, newline=""), strict=True)
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: {error}") from None


def _pairs(
    source: Source, rows: Iterable[tuple[int, dict[str, Any]]], where: str, columns: Mapping[str, str]
) -> Pairs:
    fields, references = [], []
    for number, row in rows:
        values = {}
        for name, wanted in (*source.fields.items(), ("", source.reference)):
            column = columns[wanted]
            value = row.get(column)
            if column not in row:
                raise InputError(
                    f"{where}, line {number}: no column '{column}'; it has {', '.join(map(str, row))}; say "
                    f"which it is, as columns: {{{wanted}: …}}"
                )
            if not isinstance(value, str) or not value.strip():
                raise InputError(f"{where}, line {number}: '{column}' is empty, or no text")
            values[name] = value
        references.append(values.pop(""))
        fields.append(values)
    if not references:
        raise InputError(f"{where}: no rows")
    return Pairs(tuple(fields), tuple(references))


@lru_cache(maxsize=16)
def _from_hub(name: str, wanted: from_hub.Wanted, split: str) -> Pairs:
    table: Any = wanted.load(split)
    from_hub.require_columns(table, wanted, split)
    return _pairs(SOURCES[name], enumerate(table, start=1), f"{wanted.name} ({split})", dict(wanted.columns))
