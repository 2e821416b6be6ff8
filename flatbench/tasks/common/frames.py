"""Users' own tables, CSV, TSV, JSON lines and parquet, with every value as it stands in the file."""

from __future__ import annotations

import csv
import functools
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from flatbench.errors import InputError, shown
from flatbench.store.files import open_regular
from flatbench.tasks.common import columns
from flatbench.tasks.common.published_files import EXPANDED_BYTES, LONGEST_LINE, json_lines, text_lines

#: rows of a table
MOST_ROWS = 5_000_000
#: names of columns that a message lists; times by which texts are packed in a parquet file
_MOST_NAMES, _MOST_PACKED = 100, 20


def _delimited_rows(separator: str, path: Path, wanted: Sequence[str] | None) -> pd.DataFrame:
    """A CSV or TSV file whose first line names its columns, and whose other lines have as many fields.

    pandas takes the first field of longer lines for an index and moves the others one column on, and fills
    shorter ones up.
    """
    limit = csv.field_size_limit(LONGEST_LINE)
    try:
        rows = csv.reader(text_lines(path, newline=""), delimiter=separator, strict=True)
        header = next(rows, None)
        if not header:
            raise ValueError("its first line names no columns")
        _check_names(header, wanted or (), path)
        wanted = header if wanted is None else wanted
        places = [header.index(name) for name in wanted]
        kept: list[list[str]] = [[] for _ in wanted]
        for row in rows:
            if row and len(row) != len(header):
                raise ValueError(f"line {rows.line_num} has {len(row)} fields, and the header {len(header)}")
            if row:  # empty lines are none
                for cells, place in zip(kept, places, strict=True):
                    cells.append(row[place])
                _check_count(len(kept[0]))
    except csv.Error as error:
        raise ValueError(f"line {rows.line_num}: {error}") from None
    finally:
        csv.field_size_limit(limit)
    return pd.DataFrame(dict(zip(wanted, kept, strict=True)), dtype=object)


def _json_lines(path: Path, wanted: Sequence[str] | None) -> pd.DataFrame:
    there: dict[str, None] = {}
    kept: list[dict[str, Any]] = []
    for _, row in json_lines(path):
        if len(there) < _MOST_NAMES:
            there.update(dict.fromkeys(row))
        kept.append(row if wanted is None else {name: row[name] for name in wanted if name in row})
        _check_count(len(kept))
    found = {name: None for row in kept for name in row}
    if kept and wanted is not None:  # a column that some lines lack is there
        _check_names([*there, *(found.keys() - there.keys())], wanted, path)
    wanted = list(found) if wanted is None else wanted
    # objects: pandas would take some texts for dates
    return pd.DataFrame(kept, columns=list(wanted), dtype=object)


def _parquet(path: Path, wanted: Sequence[str] | None) -> pd.DataFrame:
    """The columns under the names that the schema gives them, whatever pandas' own metadata says."""
    from pyarrow import parquet

    with open_regular(path) as opened:
        file = parquet.ParquetFile(opened)
        _check_names(file.schema_arrow.names, wanted or (), path)
        _check_count(file.metadata.num_rows)
        texts = _text_columns(file.schema_arrow, wanted or file.schema_arrow.names, nested=wanted is None)
        # values that repeat are kept once, until it is known how large they are together
        table = parquet.ParquetFile(opened, read_dictionary=texts).read(
            columns=None if wanted is None else list(wanted)
        )
        table.validate(full=True)  # pyarrow looks for texts that are no UTF-8, and places in no dictionary
        _check_sizes(table, os.fstat(opened.fileno()).st_size)
    for name in texts:
        place = table.column_names.index(name)
        table = table.set_column(place, name, table.column(name).cast("string"))
    # whole numbers stay what they are beside missing ones
    frame: pd.DataFrame = table.to_pandas(ignore_metadata=True, integer_object_nulls=True)
    return frame


def _text_columns(schema: Any, wanted: Sequence[str], nested: bool) -> list[str]:
    """The columns that hold texts. Raises ValueError for others than numbers, if not ``nested``."""
    from pyarrow import types

    found = []
    for name in wanted:
        kind = schema.field(name).type
        value = kind.value_type if types.is_dictionary(kind) else kind
        if types.is_string(value) or types.is_large_string(value) or types.is_string_view(value):
            found.append(name)
        elif nested:
            continue
        elif types.is_nested(value) or str(value).endswith(("binary", "binary_view", "]")):
            raise ValueError(f"column '{shown(name)}' holds neither texts nor numbers ({shown(kind)})")
    return found


def _check_sizes(table: Any, size: int) -> None:
    """Raise ValueError where a few texts that repeat are far more together than the file's bytes."""
    import pyarrow
    import pyarrow.compute

    total = 0
    for chunk in (chunk for column in table.columns for chunk in column.chunks):
        if pyarrow.types.is_dictionary(chunk.type) and len(chunk.dictionary):
            lengths = pyarrow.compute.binary_length(chunk.dictionary)
            total += pyarrow.compute.sum(lengths.take(chunk.indices)).as_py() or 0
    if total > max(EXPANDED_BYTES, _MOST_PACKED * size):
        raise ValueError(f"its texts unpack to {total / 2**20:.3g} MiB")


def _check_names(names: Sequence[str], wanted: Sequence[str], path: Path) -> None:
    """Raise InputError for two columns of one name, and for one that is not there."""
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice is not None:
        raise InputError(f"{path}: two columns are called '{shown(twice)}'; rename one")
    columns.require_columns(names, wanted, str(path))


def _check_count(rows: int) -> None:
    if rows > MOST_ROWS:
        raise ValueError(f"more than {MOST_ROWS:,} rows; take a part of them")


#: ending of a file -> how it is read
READERS: dict[str, Callable[[Path, Sequence[str] | None], pd.DataFrame]] = {
    ".csv": functools.partial(_delimited_rows, ","),
    ".tsv": functools.partial(_delimited_rows, "\t"),
    ".jsonl": _json_lines,
    ".parquet": _parquet,
}


def read_frame(option: str, name: str, wanted: Sequence[str] | None) -> pd.DataFrame:
    """A file's rows.

    Args:
        option: names the file in messages.
        name: the file; its ending, before ``.gz`` if it has that, says how it is read.
        wanted: columns that it must have; None for all that it has, whatever they hold.

    Returns the columns that are wanted, in their order.

    Raises InputError for what cannot be read, is too large, has columns of one name, or lacks one.
    """
    path = Path(name).expanduser()
    ending = next((suffix for suffix in path.suffixes if suffix in READERS), None)
    if ending is None:
        raise InputError(f"{option}: {name}: expected a file ending in {', '.join(READERS)}")
    if not path.is_file():
        raise InputError(f"{option}: no such file: {name}")
    try:
        frame = READERS[ending](path, wanted)
    except InputError as error:
        raise InputError(f"{option}: {error}") from None
    # what pandas and pyarrow raise for damaged files, which can ask for all the memory there is
    except (ValueError, TypeError, OSError, ImportError, RecursionError, MemoryError) as error:
        reason = "not enough memory for it" if isinstance(error, MemoryError) else error
        raise InputError(
            f"{option}: {name}: cannot be read: {shown(' '.join(str(reason).split()), 200)}"
        ) from error
    if frame.empty:
        raise InputError(f"{option}: {name}: no rows")
    return frame
