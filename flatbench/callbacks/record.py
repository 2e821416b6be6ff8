"""The measurements of a training in a parquet file, each step once, whatever interrupts it."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from flatbench.errors import InputError
from flatbench.store.files import read_parquet, replacing

log = logging.getLogger(__name__)

#: name of the file in the folder of a training's output
FILE = "sharpness.parquet"


class Record:
    """Rows by step, written whole after each.

    Args:
        path: the file; None keeps the rows in memory alone.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []

    def begin(self, step: int) -> dict[str, Any] | None:
        """Go on after so many steps: rows of later ones, which will be trained again, are dropped.

        Returns the last row that is left.
        """
        if self.path is not None and self.path.is_file():
            self.rows = [
                {str(k): v for k, v in row.items() if not _is_missing(v)}
                for row in read(self.path).to_dict("records")
            ]
        kept = [row for row in self.rows if row["step"] <= step]
        if len(kept) < len(self.rows):
            log.warning(
                "%s: %d rows of steps after %d are dropped; they are measured again",
                self.path or "sharpness",
                len(self.rows) - len(kept),
                step,
            )
        self.rows = kept
        return kept[-1] if kept else None

    @property
    def last_step(self) -> int:
        """The last step that has a row; -1 before the first."""
        return int(self.rows[-1]["step"]) if self.rows else -1

    def add(self, row: Mapping[str, Any]) -> None:
        """Keep a row, and write all."""
        self.rows.append(dict(row))
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.path) as temporary:
                self.frame().to_parquet(temporary, index=False)

    def frame(self) -> pd.DataFrame:
        """All rows as a table."""
        return pd.DataFrame(self.rows)


def read(path: Path) -> pd.DataFrame:
    """The table in a file of a `Record`, or in the folder that holds it. Raises InputError for another."""
    file = path / FILE if path.is_dir() else path
    try:
        table = read_parquet(file)[0]
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: no table of a watched training ({error})") from error
    if "step" not in table or "measure_seconds" not in table:
        raise InputError(f"{file}: no table of a watched training: it has no column 'step'")
    return table


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))
