"""The six data sets of few-shot classification by prompts, in their published layouts or from the hub."""

from __future__ import annotations

import csv
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flatbench.config import sources
from flatbench.errors import InputError, shown
from flatbench.tasks.common import hub as from_hub
from flatbench.tasks.common.published_files import folder_of, json_lines, read_once, text_lines
from flatbench.tasks.text import glue_data
from flatbench.tasks.text.sequence_classification import Rows


@dataclass(frozen=True)
class Prompted:
    """A data set with the prompt and the label words of Gao et al. 2021 (LM-BFF, arXiv 2012.15723).

    Attributes:
        labels: what the files call the classes.
        words: a word a class, in the same order.
        template: with ``{a}``, for pairs ``{b}``, and ``{mask}``.
        hub: name on the hub and its configuration, as the table of sources has it.
        test: split of the hub that is the test set.
    """

    labels: tuple[str, ...]
    words: tuple[str, ...]
    template: str
    hub: tuple[str, str | None]
    test: str


_ENTAILMENT = "{a}? {mask}, {b}"

DATA = {
    "sst2": Prompted(
        ("0", "1"),
        ("terrible", "great"),
        "{a} It was {mask}.",
        (glue_data.HUB, "sst2"),
        "validation",
    ),
    "sst5": Prompted(
        ("0", "1", "2", "3", "4"),
        ("terrible", "bad", "okay", "good", "great"),
        "{a} It was {mask}.",
        ("SetFit/sst5", None),
        "test",
    ),
    "snli": Prompted(
        ("entailment", "neutral", "contradiction"),
        ("Yes", "Maybe", "No"),
        _ENTAILMENT,
        ("stanfordnlp/snli", None),
        "test",
    ),
    "mnli": Prompted(
        ("entailment", "neutral", "contradiction"),
        ("Yes", "Maybe", "No"),
        _ENTAILMENT,
        (glue_data.HUB, "mnli"),
        "validation_matched",
    ),
    "rte": Prompted(
        ("entailment", "not_entailment"),
        ("Yes", "No"),
        _ENTAILMENT,
        (glue_data.HUB, "rte"),
        "validation",
    ),
    "trec": Prompted(
        ("ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM"),
        ("Expression", "Entity", "Description", "Human", "Location", "Number"),
        "{mask}: {a}",
        ("CogComp/trec", None),
        "test",
    ),
}


def read(
    name: str, data: str | None, revision: str | None, columns: Mapping[str, str] | None = None
) -> dict[str, Rows]:
    """``train`` and ``test`` of a data set. Raises InputError naming file, line and field.

    Args:
        columns: what a column is for (text, text_pair, label) -> the column, where it is not the usual one.
    """
    folder = folder_of(data)
    if folder is not None:
        if name in glue_data.LAYOUTS:
            found = glue_data.read(name, str(folder), None, columns)
            return {split: found[split] for split in ("train", "test")}
        if columns and name != "snli":
            raise InputError(f"columns: the published files of {name} name no columns")
        own = from_hub.mapped(_SNLI, columns)
        return {split: _read_file(folder / FILES[name][split], name, own) for split in ("train", "test")}
    place = source(name, data, revision, columns)
    assert place.wanted is not None
    train, test = place.splits
    return {"train": _from_hub(name, place.wanted, train), "test": _from_hub(name, place.wanted, test)}


def source(
    name: str, data: str | None, revision: str | None, columns: Mapping[str, str] | None = None
) -> from_hub.Source:
    """Where a data set comes from; arguments as of `read`. Raises InputError for unusable ones."""
    hub, configuration = DATA[name].hub
    usual = sources.data(hub, configuration)
    assert usual is not None
    if folder_of(data) is not None:
        return from_hub.Source(usual, None, ())
    instead = "give a folder of the published files"
    wanted = from_hub.wanted(usual, data, revision, columns, instead, configuration)
    known = sources.data(wanted.name, wanted.configuration)
    return from_hub.Source(known, wanted, ("train", DATA[name].test), DATA[name].labels)


_SNLI = {"text": "sentence1", "text_pair": "sentence2", "label": "gold_label"}


#: data set -> names of the files of train and test
FILES: dict[str, Mapping[str, str]] = {
    "snli": {"train": "snli_1.0_train.jsonl", "test": "snli_1.0_test.jsonl"},
    "sst5": {"train": "train.csv", "test": "test.csv"},
    "trec": {"train": "train_5500.label", "test": "TREC_10.label"},
}


@read_once(kept=32)
def _read_file(path: Path, name: str, columns: tuple[tuple[str, str], ...]) -> Rows:
    known = DATA[name].labels
    texts, labels, unlabelled = [], [], 0
    for number, row, label in _ROWS[name](path, columns):
        where = f"{path}, line {number}"
        if name == "snli" and label == "-":
            unlabelled += 1  # annotators did not agree; published results leave these out
            continue
        if label not in known:
            raise InputError(f"{where}: unknown label '{shown(label)}'; known: {', '.join(known)}")
        if not all(isinstance(part, str) and part.strip() for part in row):
            raise InputError(f"{where}: a text is empty")
        texts.append(row)
        labels.append(known.index(label))
    if not labels:
        raise InputError(f"{path}: no rows")
    return Rows(tuple(texts), tuple(labels), unlabelled)


def _trec(path: Path, columns: Any) -> Any:
    """``COARSE:fine question``, a question a line."""
    # the only files that are not UTF-8
    for number, line in enumerate(text_lines(path, "latin-1"), start=1):
        if line.strip():
            label, _, question = line.partition(" ")
            yield number, (question.strip(),), label.partition(":")[0]


def _sst5(path: Path, columns: Any) -> Any:
    """``label,sentence`` without a header, as in LM-BFF's data."""
    reader = csv.reader(text_lines(path, newline=""))
    try:
        for row in reader:
            if len(row) != 2:
                raise InputError(
                    f"{path}, line {reader.line_num}: {len(row)} fields; expected label,sentence"
                )
            yield reader.line_num, (row[1],), row[0]
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: {error}") from None


def _snli(path: Path, columns: tuple[tuple[str, str], ...]) -> Any:
    """SNLI 1.0's JSON lines."""
    named = dict(columns)
    for number, row in json_lines(path):
        try:
            yield number, (row[named["text"]], row[named["text_pair"]]), row[named["label"]]
        except KeyError as error:
            raise InputError(f"{path}, line {number}: no field {error}") from None


_ROWS: dict[str, Callable[[Path, Any], Any]] = {"trec": _trec, "sst5": _sst5, "snli": _snli}


@functools.lru_cache(maxsize=32)
def _from_hub(name: str, wanted: from_hub.Wanted, split: str) -> Rows:
    table: Any = wanted.load(split)
    from_hub.require_columns(table, wanted, split)
    known = DATA[name].labels
    numbers = from_hub.class_numbers(table, wanted, split, known)
    columns = [table[column][:] for role, column in wanted.columns if role != "label"]
    texts, labels, unlabelled = [], [], 0
    for number, (*row, label) in enumerate(zip(*columns, numbers, strict=True)):
        if not all(isinstance(text, str) and text.strip() for text in row):
            raise InputError(f"data: {wanted.name} ({split}), row {number}: a text is empty, or no text")
        if not 0 <= label < len(known):
            unlabelled += 1
            continue
        texts.append(tuple(row))
        labels.append(label)
    if not labels:
        raise InputError(f"data: {wanted.name} ({split}): no row has a label; its labels are hidden")
    return Rows(tuple(texts), tuple(labels), unlabelled)
