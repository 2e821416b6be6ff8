"""GLUE's nine tasks as data: their layout in the published TSV files and on the hub; reading both."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flatbench.config import sources
from flatbench.errors import InputError, shown
from flatbench.tasks.common import hub as from_hub
from flatbench.tasks.common.published_files import folder_of, read_once, read_text
from flatbench.tasks.text.sequence_classification import Rows

HUB = sources.GLUE


@dataclass(frozen=True)
class Layout:
    """Where a task's texts and labels are.

    Attributes:
        folder: name of its folder in GLUE's download.
        texts: header names of one or two text columns; numbers for a file without a header.
        label: header name of the label's column, or its number.
        labels: what the files call the classes, in the hub's order; empty for a score.
        dev: split -> file of the labelled development sets, the main one first; on the hub each is called
            as the file without its ending, with "validation" for "dev".
        columns: number of columns of a file without a header.
        drops_incomplete: whether the published file holds rows without all texts, which are left out.
    """

    folder: str
    texts: tuple[str | int, ...]
    label: str | int
    labels: tuple[str, ...]
    dev: Mapping[str, str]
    columns: int = 0
    drops_incomplete: bool = False


_DEV = {"test": "dev.tsv"}
_PAIR = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")

LAYOUTS: dict[str, Layout] = {
    "cola": Layout("CoLA", (3,), 1, ("0", "1"), _DEV, columns=4),
    "sst2": Layout("SST-2", ("sentence",), "label", ("0", "1"), _DEV),
    "mrpc": Layout("MRPC", ("#1 String", "#2 String"), "Quality", ("0", "1"), _DEV),
    "stsb": Layout("STS-B", _PAIR, "score", (), _DEV),
    "qqp": Layout(
        "QQP",
        ("question1", "question2"),
        "is_duplicate",
        ("0", "1"),
        _DEV,
        drops_incomplete=True,
    ),
    "mnli": Layout(
        "MNLI",
        _PAIR,
        "gold_label",
        ("entailment", "neutral", "contradiction"),
        {"test": "dev_matched.tsv", "test_mismatched": "dev_mismatched.tsv"},
    ),
    "qnli": Layout("QNLI", ("question", "sentence"), "label", _ENTAILMENT, _DEV),
    "rte": Layout("RTE", _PAIR, "label", _ENTAILMENT, _DEV),
    "wnli": Layout("WNLI", _PAIR, "label", ("0", "1"), _DEV),
}


def read(
    task: str, data: str, revision: str | None, columns: Mapping[str, str] | None = None
) -> dict[str, Rows]:
    """The labelled files of a task: ``train``, ``test`` and, for MNLI, ``test_mismatched``.

    Args:
        data: a folder in GLUE's layout (that of the task, or the one above it), or a data set on the hub.
        columns: what a column is for (text, text_pair, label) -> the column, where it is not GLUE's.

    Raises:
        InputError: nothing is there, or a file is not as GLUE's are; the message names file, line and field.
    """
    layout = LAYOUTS[task]
    folder = _folder(layout, data)
    if folder is not None:
        files = {"train": "train.tsv", **layout.dev}
        own = _file_columns(layout, columns)
        return {split: _read_file(folder / name, task, own) for split, name in files.items()}
    wanted = source(task, data, revision, columns).wanted
    assert wanted is not None
    return {split: _from_hub(task, wanted, part) for split, part in _parts(layout).items()}


def _parts(layout: Layout) -> dict[str, str]:
    """Split -> split on the hub."""
    files = {"train": "train", **layout.dev}
    return {split: name.removesuffix(".tsv").replace("dev", "validation") for split, name in files.items()}


def source(
    task: str, data: str, revision: str | None, columns: Mapping[str, str] | None = None
) -> from_hub.Source:
    """Where the files of a task come from; arguments as of `read`. Raises InputError for unusable ones."""
    usual, layout = sources.data(HUB, task), LAYOUTS[task]
    assert usual is not None
    if folder_of(data) is not None:
        return from_hub.Source(usual, None, ())
    instead = "give a folder in GLUE's own TSV layout"
    wanted = from_hub.wanted(usual, data, revision, columns, instead, task)
    known = sources.data(wanted.name, wanted.configuration)
    return from_hub.Source(known, wanted, tuple(_parts(layout).values()), layout.labels)


def _folder(layout: Layout, data: str) -> Path | None:
    path = folder_of(data)
    if path is None:
        return None
    inside = path / layout.folder
    return inside if inside.is_dir() else path


def _file_columns(layout: Layout, columns: Mapping[str, str] | None) -> tuple[str | int, ...]:
    """Text column or columns, and that of the label. Raises InputError for columns of files without names."""
    if columns and layout.columns:
        raise InputError(f"columns: {layout.folder}'s files have no header, so that no column can be named")
    usual = {role: str(name) for role, name in zip(("text", "text_pair"), layout.texts, strict=False)}
    named = from_hub.mapped({**usual, "label": str(layout.label)}, columns)
    return (*layout.texts, layout.label) if layout.columns else tuple(name for _, name in named)


@read_once(kept=32)
def _read_file(path: Path, task: str, wanted: tuple[str | int, ...]) -> Rows:
    layout = LAYOUTS[task]
    texts, labels, incomplete = [], [], 0
    columns, lines = _columns(layout, path)
    places = [_place(columns, name, path) for name in wanted]
    for number, fields in lines:
        try:
            *row, label = _fields(fields, places, wanted, f"{path}, line {number}")
        except _IncompleteRowError as problem:
            if not layout.drops_incomplete:
                raise InputError(str(problem)) from None
            incomplete += 1
            continue
        texts.append(tuple(row))
        labels.append(_label(layout, label, f"{path}, line {number}, {_column_text(wanted[-1])}"))
    if not labels:
        raise InputError(f"{path}: no rows")
    return Rows(tuple(texts), tuple(labels), incomplete)


class _IncompleteRowError(Exception):
    """A row lacks a text or has too few fields."""


def _columns(layout: Layout, path: Path) -> tuple[list[str | int], Iterator[tuple[int, list[str]]]]:
    """Names of the columns, and (line number, fields) of every row.

    Lines end at a line feed and nowhere else, and quotes are data: GLUE's texts hold both quotes without
    partners and characters at which Python would split lines.
    """
    lines = read_text(path).split("\n")
    if lines[-1] == "":
        lines.pop()
    rows = ((i, line.removesuffix("\r").split("\t")) for i, line in enumerate(lines, start=1))
    if layout.columns:
        return list(range(layout.columns)), rows
    header = next(rows, (0, [""]))[1]
    return list(header), rows


def _place(columns: list[str | int], name: str | int, path: Path) -> int:
    if name not in columns:
        raise InputError(
            f"{path}: no column '{name}'; its header has {shown(', '.join(map(str, columns)), 300)}"
        )
    return columns.index(name)


def _column_text(name: str | int) -> str:
    return f"column '{name}'" if isinstance(name, str) else f"column {name + 1}"


def _fields(fields: list[str], places: list[int], names: tuple[str | int, ...], where: str) -> list[str]:
    found = []
    for place, name in zip(places, names, strict=True):
        column = _column_text(name)
        if place >= len(fields):
            raise _IncompleteRowError(f"{where}: {len(fields)} fields, so {column} is missing")
        if not fields[place].strip():
            raise _IncompleteRowError(f"{where}: {column} is empty")
        found.append(fields[place])
    return found


def _label(layout: Layout, text: str, where: str) -> float:
    if layout.labels:
        if text not in layout.labels:
            raise InputError(f"{where}: unknown label '{shown(text)}'; known: {', '.join(layout.labels)}")
        return layout.labels.index(text)
    try:
        score = float(text)
    except ValueError:
        score = float("nan")
    if not 0 <= score <= 5:
        raise InputError(f"{where}: '{shown(text)}' is no score from 0 to 5")
    return score


@functools.lru_cache(maxsize=32)
def _from_hub(task: str, wanted: from_hub.Wanted, split: str) -> Rows:
    table: Any = wanted.load(split)
    layout = LAYOUTS[task]
    from_hub.require_columns(table, wanted, split)
    texts, labels, incomplete = [], [], 0
    if layout.labels:
        numbers: list[Any] = from_hub.class_numbers(table, wanted, split, layout.labels)
    else:
        numbers = table[wanted.column("label")][:]
    columns = [table[column][:] for role, column in wanted.columns if role != "label"]
    for number, (*row, label) in enumerate(zip(*columns, numbers, strict=True)):
        where = f"{wanted.name} ({task}, {split}), row {number}"
        if not all(isinstance(text, str) and text.strip() for text in row):
            if not layout.drops_incomplete:
                raise InputError(f"{where}: a text is empty, or no text")
            incomplete += 1
            continue
        if not isinstance(label, int | float) or not 0 <= label <= (
            len(layout.labels) - 1 if layout.labels else 5
        ):
            raise InputError(f"{where}: label {label} is not known")
        texts.append(tuple(row))
        labels.append(label)
    return Rows(tuple(texts), tuple(labels), incomplete)
