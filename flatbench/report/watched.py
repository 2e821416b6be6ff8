"""Sharpness over the steps of one training: the table and the figure of a watch, or of its checkpoints."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from flatbench.errors import InputError
from flatbench.report.figures import style
from flatbench.report.numbers import significant
from flatbench.report.text.glossary import ANSWERS
from flatbench.store.files import read_parquet, replacing, write_text

#: the two ends of a value's interval
_ENDS = {
    "critical_sharpness": ("lower_bound", "upper_bound"),
    "relative_critical_sharpness": ("lower_bound", "upper_bound"),
    "eigenvalue_1": ("eigenvalue_1", "upper_bound_1"),
}
#: columns of a table that is shown beside the values that are drawn
_FIRST = ("checkpoint", "step", "epoch", "base")


def is_watched(path: Path) -> bool:
    """Whether a path is the file of a watched training, or a folder that holds one and no study."""
    file = path / "sharpness.parquet" if path.is_dir() else path
    if not file.is_file() or file.suffix != ".parquet" or (path / "study.json").is_file():
        return False
    from pyarrow import parquet

    try:
        names = set(parquet.read_schema(file).names)
    except (OSError, ValueError):
        return False
    return {"step", "measure_seconds"} <= names


def read_watched(path: Path) -> pd.DataFrame:
    """The table of a watched training. Raises InputError where the file cannot be read."""
    file = path / "sharpness.parquet" if path.is_dir() else path
    try:
        return read_parquet(file)[0]
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: cannot be read ({error})") from error


def drawn(table: pd.DataFrame) -> list[str]:
    """The columns that are a measure's answer, in the table's order."""
    found = [str(c) for c in table if str(c).rpartition(".")[2] in ANSWERS and "." in str(c)]
    return [c for c in found if pd.to_numeric(table[c], errors="coerce").notna().any()]


def shown(table: pd.DataFrame) -> pd.DataFrame:
    """The columns for a reader, as text: what a row is, each answer, and why one is missing."""
    columns = [c for c in _FIRST if c in table and table[c].notna().any()]
    found = pd.DataFrame({c: table[c].map(_text) for c in columns})
    labels = dict.fromkeys(str(c).rpartition(".")[0] for c in table if "." in str(c))
    answers = [str(c) for c in table if "." in str(c) and str(c).rpartition(".")[2] in ANSWERS]
    for label in labels:
        reasons = [c for c in (f"{label}.{w}" for w in ("skipped", "failed", "left_out")) if c in table]
        own = [c for c in answers if c.rpartition(".")[0] == label]
        for column in own:
            found[column] = [_cell(row, column, reasons) for row in table.to_dict("records")]
        if not own and reasons:
            found[label] = [_cell(row, "", reasons) for row in table.to_dict("records")]
    if "failed" in table and table["failed"].notna().any():
        found["failed"] = table["failed"].map(_text)
    return found


def _text(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float):
        return f"{value:.0f}" if value.is_integer() else significant(value, 3)
    return str(value)


def _cell(row: dict[Any, Any], column: str, reasons: Sequence[str]) -> str:
    value = _number(row.get(column))
    if value is not None:
        return significant(value, 3)
    label, _, name = column.rpartition(".")
    low, high = (_number(row.get(f"{label}.{end}")) for end in _ENDS.get(name, ("", "")))
    if high is not None:  # a search without a bracket leaves a bound
        return f"below {significant(high, 3)}"
    if low:
        return f"above {significant(low, 3)}"
    return next((str(row[r]) for r in reasons if isinstance(row.get(r), str)), "")


def _number(value: Any) -> float | None:
    if value is None or isinstance(value, str) or math.isnan(value):
        return None
    return float(value)


def write_watched(table: pd.DataFrame, folder: Path, name: str = "sharpness") -> list[str]:
    """Write a table as CSV, parquet and Markdown, and its figure where it has steps. Returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / f"{name}.csv") as temporary:
        table.to_csv(temporary, index=False)
    with replacing(folder / f"{name}.parquet") as temporary:
        table.to_parquet(temporary, index=False)
    write_text(folder / f"{name}.md", shown(table).to_markdown(index=False, disable_numparse=True) + "\n")
    files = [f"{name}.csv", f"{name}.parquet", f"{name}.md"]
    if "step" in table and table["step"].notna().sum() > 1 and drawn(table):
        files += draw(table, folder, name)
    return files


def draw(table: pd.DataFrame, folder: Path, name: str) -> list[str]:
    """Draw every answer over the steps, each in a panel, with its interval where it has one."""
    rows = table[table["step"].notna()].sort_values("step")
    columns = drawn(rows)
    with style.styled():
        figure, axes = style.panels(len(columns))
        for axis, column in zip(axes, columns, strict=True):
            label, _, value = column.rpartition(".")
            y = pd.to_numeric(rows[column], errors="coerce")
            here = y.notna()
            axis.plot(rows["step"][here], y[here], marker="o", ms=3.5)
            low, high = _interval(rows, label, value, y)
            if low is not None and high is not None:
                axis.fill_between(rows["step"][here], low[here], high[here], alpha=0.2, lw=0)
            axis.set_xlabel("Step")
            axis.set_ylabel(ANSWERS[value])
            axis.set_title(style.plain(label))
            if float(y[here].min()) > 0 and float(y[here].max()) > 30 * float(y[here].min()):
                axis.set_yscale("log")
        style.wrap_labels(axes)
        return style.save(figure, folder, name)


def _interval(rows: pd.DataFrame, label: str, value: str, y: Any) -> tuple[Any, Any]:
    """The two ends of an answer's interval: of its search or certificate, or its sampling error's."""
    ends = [f"{label}.{end}" for end in _ENDS.get(value, ())]
    if len(ends) == 2 and all(end in rows for end in ends):
        low, high = (pd.to_numeric(rows[end], errors="coerce").fillna(y) for end in ends)
        return low, high
    error = f"{label}.sampling_error"
    if error in rows:
        half = pd.to_numeric(rows[error], errors="coerce").fillna(0.0)
        return y - half, y + half
    return None, None
