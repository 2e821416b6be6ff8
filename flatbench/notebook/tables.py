"""Data for saved checkpoints from a file or the hub, as the command line names it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from flatbench.errors import InputError, shown
from flatbench.tasks.common import hub
from flatbench.tasks.common.frames import READERS, read_frame

INSTEAD = "give a file: --data FILE.csv, .tsv, .jsonl, .json or .parquet"
#: columns that hold labels, where none is named
_LABELS = ("labels", "label")


def read_data(source: str, option: str, label_column: str | None = None) -> list[dict[str, Any]] | Any:
    """The examples of a file, or of a data set on the hub.

    Args:
        source: a file whose ending is known, or ``NAME``, ``NAME:SPLIT`` or ``NAME:CONFIGURATION:SPLIT`` on
            the hub; the split ``train`` if none is named.
        option: names the source in messages.
        label_column: of a CSV or TSV file, a column to read as numbers where it holds nothing else.

    Raises InputError for what cannot be read.
    """
    path = Path(source).expanduser()
    endings = [*READERS, ".json"]
    if path.is_file() or path.suffix in endings or any(s in READERS for s in path.suffixes):
        return _file(path, option, label_column)
    name, *rest = source.split(":")
    if len(rest) > 2:
        raise InputError(f"{option}: {shown(source)}: expected NAME, NAME:SPLIT or NAME:CONFIGURATION:SPLIT")
    split = rest[-1] if rest else "train"
    configuration = rest[0] if len(rest) == 2 else None
    return hub.load(name, configuration, revision=None, instead=INSTEAD, split=split)


def _file(path: Path, option: str, label_column: str | None) -> list[dict[str, Any]]:
    if path.suffix == ".json":
        if not path.is_file():
            raise InputError(f"{option}: no such file: {path}")
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{option}: {path}: cannot be read: {shown(str(error), 200)}") from error
        if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
            raise InputError(f"{option}: {path}: expected a list of objects, one an example")
        return rows
    frame = read_frame(option, str(path), None)
    found: list[dict[str, Any]] = [
        {str(key): _plain(value) for key, value in row.items()} for row in frame.to_dict("records")
    ]
    if any(s in (".csv", ".tsv") for s in path.suffixes):
        for column in (label_column,) if label_column is not None else _LABELS:
            _numbers(found, column)
    return found


def _plain(value: Any) -> Any:
    """A cell of nested arrays, as parquet gives them, as one array; as lists where they differ in length."""
    if not isinstance(value, np.ndarray) or value.dtype != object:
        return value
    parts = [_plain(one) for one in value]
    alike = len({np.shape(part) for part in parts if isinstance(part, np.ndarray)}) == 1
    return np.stack(parts) if alike and all(isinstance(part, np.ndarray) for part in parts) else parts


def _numbers(rows: list[dict[str, Any]], column: str) -> None:
    """Make numbers of a column of text that holds nothing else."""
    texts = [row.get(column) for row in rows]
    if not all(isinstance(text, str) and re.fullmatch(r"\s*-?\d+(\.\d+)?\s*", text) for text in texts):
        return
    whole = all("." not in str(text) for text in texts)
    for row in rows:
        row[column] = int(row[column]) if whole else float(row[column])
