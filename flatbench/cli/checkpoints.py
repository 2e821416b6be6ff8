"""Output of `flatbench measure` on saved checkpoints, and of `flatbench report` of a watched training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich.markup import escape
from rich.table import Table

from flatbench.errors import InputError
from flatbench.report import watched
from flatbench.report.numbers import significant


def print_measured(
    console: Any,
    folders: Sequence[Path],
    data: str,
    other: str | None,
    measures: Sequence[str],
    memory: str | None,
    scratch: Path | None,
    output: Path | None,
    options: Mapping[str, Any],
) -> None:
    """Measure checkpoints, print the table, and write it where that is asked for.

    Raises InputError for folders and data that cannot be used.
    """
    from flatbench.curvature.operators.memory import limited, parsed
    from flatbench.notebook import many
    from flatbench.notebook.tables import read_data

    for folder in folders:
        if (folder / "run.json").is_file() or (folder / "study.json").is_file():
            raise InputError(f"{folder}: a flatbench run or study brings its own data; leave --data away")
    many.places(folders)  # before data are read
    splits = {"data": read_data(data, "--data", options.get("label_column"))}
    if other is not None:
        splits["other"] = read_data(other, "--other", options.get("label_column"))
    with limited(None if memory is None else parsed(memory), scratch):
        found = many.measure_folders(folders, splits, measures or many.USUAL, **options)
    console.print(_table(watched.shown(found.table)))
    if not found.differences.empty:
        console.print("first less second, 95 % intervals by groups of the same examples:")
        console.print(_table(_number_texts(found.differences)))
    for note in found.notes:
        console.print(f"note: {escape(note)}", soft_wrap=True)
    if output is not None:
        files = watched.write_watched(found.table, output)
        if not found.differences.empty:
            found.differences.to_csv(output / "differences.csv", index=False)
            files.append("differences.csv")
        console.print(f"{len(files)} files in {escape(str(output))}: {', '.join(files)}", soft_wrap=True)


def print_watched(console: Any, source: Path, output: Path) -> None:
    """Print the table of a watched training, and write it with its figure."""
    table = watched.read_watched(source)
    folder = output / (source if source.is_dir() else source.parent).resolve().name
    console.print(_table(watched.shown(table)))
    files = watched.write_watched(table, folder)
    console.print(f"{len(files)} files in {escape(str(folder))}: {', '.join(files)}", soft_wrap=True)


def _number_texts(differences: pd.DataFrame) -> pd.DataFrame:
    numbers = {"difference", "low", "high"}
    return pd.DataFrame(
        {
            c: differences[c].map(lambda v: significant(v, 3)) if c in numbers else differences[c].map(str)
            for c in differences
        }
    )


def _table(frame: pd.DataFrame) -> Table:
    made = Table(*map(str, frame.columns), box=None, padding=(0, 2, 0, 0))
    for row in frame.itertuples(index=False):
        made.add_row(*(escape(str(cell)) for cell in row))
    return made
