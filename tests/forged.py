"""Parquet files whose pandas metadata tell other names and an index than their schema has."""

from __future__ import annotations

import json
from pathlib import Path

from pyarrow import parquet


def forge_pandas_metadata(path: Path, one: str, other: str) -> None:
    """Let pandas' metadata give two columns each other's names, and make the first an index."""
    table = parquet.read_table(path)
    columns = [
        {"name": new, "field_name": old, "pandas_type": "unicode", "numpy_type": "object", "metadata": None}
        for new, old in ((other, one), (one, other))
    ]
    forged = {"index_columns": [one], "column_indexes": [], "columns": columns, "pandas_version": "3.0"}
    metadata = {**(table.schema.metadata or {}), b"pandas": json.dumps(forged).encode()}
    parquet.write_table(table.replace_schema_metadata(metadata), path)
