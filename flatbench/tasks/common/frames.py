"""Users' own tables, CSV, TSV, JSON lines and parquet, with every value as it stands in the file."""

from __future__ import annotations

import csv
import functools
import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd

from flatbench.errors import InputError, shown
from flatbench.tasks.common import columns
from flatbench.tasks.common.published_files import json_lines, read_text


def _delimited_rows(separator: str, path: Path) -> pd.DataFrame:
    """A CSV or TSV file whose first line names its columns, and whose other lines have as many fields.

    pandas takes the first field of longer lines for an index and moves the others one column on, and fills
    shorter ones up.
    """
    limit = csv.field_size_limit(sys.maxsize)
    try:
        rows = csv.reader(io.StringIO(read_text(path), newline=""), delimiter=separator, strict=True)
        header = next(rows, None)
        if not header:
            raise ValueError("its first line names no columns")
        kept = []
        for row in rows:
            if row and len(row) != len(header):
                raise ValueError(f"line {rows.line_num} has {len(row)} fields, and the header {len(header)}")
            if row:  # empty lines are none
                kept.append(row)
    except csv.Error as error:
        raise ValueError(f"line {rows.line_num}: {error}") from None
    finally:
        csv.field_size_limit(limit)
    return pd.DataFrame(kept, columns=header, dtype=object)


def _json_lines(path: Path) -> pd.DataFrame:
    # objects: pandas would take some texts for dates
    return pd.DataFrame([row for _, row in json_lines(path)], dtype=object)


def _parquet(path: Path) -> pd.DataFrame:
    """The columns under the names that the schema gives them, whatever pandas' own metadata says."""
    from pyarrow import parquet

    # whole numbers stay what they are beside missing ones
    table = parquet.read_table(path)
    frame: pd.DataFrame = table.to_pandas(ignore_metadata=True, integer_object_nulls=True)
    return frame


#: ending of a file -> how it is read
READERS: dict[str, Callable[[Path], pd.DataFrame]] = {
    ".csv": functools.partial(_delimited_rows, ","),
    ".tsv": functools.partial(_delimited_rows, "\t"),
    ".jsonl": _json_lines,
    ".parquet": _parquet,
}


def read_frame(option: str, name: str, wanted: Sequence[str]) -> pd.DataFrame:
    """A file's rows.

    Args:
        option: names the file in messages.
        name: the file; its ending, before ``.gz`` if it has that, says how it is read.
        wanted: columns that it must have.

    Raises InputError for what cannot be read, has columns of one name, or lacks one.
    """
    path = Path(name).expanduser()
    ending = next((suffix for suffix in path.suffixes if suffix in READERS), None)
    if ending is None:
        raise InputError(f"{option}: {name}: expected a file ending in {', '.join(READERS)}")
    if not path.is_file():
        raise InputError(f"{option}: no such file: {name}")
    try:
        frame = READERS[ending](path)
    except InputError as error:
        raise InputError(f"{option}: {error}") from None
    # what pandas and pyarrow raise for damaged files
    except (ValueError, TypeError, OSError, ImportError, RecursionError) as error:
        raise InputError(
            f"{option}: {name}: cannot be read: {shown(' '.join(str(error).split()), 200)}"
        ) from error
    doubled = frame.columns[frame.columns.duplicated()]
    if len(doubled):
        raise InputError(f"{option}: {name}: two columns are called '{shown(doubled[0])}'; rename one")
    columns.require_columns(frame.columns, wanted, f"{option}: {name}")
    if frame.empty:
        raise InputError(f"{option}: {name}: no rows")
    return frame
