"""Cells of tables: a text, a class, a score, or the reason why it is none. Tasks and checkpoints share it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from flatbench.errors import InputError, shown


def require_columns(columns: Iterable[Any], wanted: Sequence[str], where: str) -> None:
    """Raise InputError for a wanted column that is not there, or there twice."""
    there = list(map(str, columns))
    for column in wanted:
        if column not in there:
            raise InputError(f"{where}: no column '{column}'; it has {shown(', '.join(there), 300)}")
        if there.count(column) > 1:
            raise InputError(f"{where}: column '{column}' is there {there.count(column)} times; rename one")


def missing(value: Any) -> bool:
    """Whether a cell holds nothing: None, NaN, or pandas' NA and NaT."""
    return value is None or value is pd.NaT or value is pd.NA or (isinstance(value, float) and value != value)


def text(value: Any, where: str) -> str:
    """The text of a cell. Raises InputError for an empty one, and for what is no text."""
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where} is empty or no text")
    return value


def as_text(value: Any) -> str:
    """A label as a CSV file would say it, so that 1 in JSON is the "1" of a CSV; empty if missing."""
    if missing(value) or value != value:
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value)


def score(value: Any, where: str) -> float:
    """The finite number of a cell. Raises InputError for anything else."""
    said = as_text(value)
    try:
        number = float(said)
    except ValueError:
        number = float("nan")
    if not math.isfinite(number):
        raise InputError(f"{where}: '{shown(said)}' is no number")
    return number


def class_number(value: Any, numbers: Mapping[str, int], where: str) -> int:
    """The number of a class that a cell names. Raises InputError for one that is not known."""
    said = as_text(value)
    if said not in numbers:
        known = ", ".join(shown(name, 40) for name in list(numbers)[:10]) + (
            ", …" if len(numbers) > 10 else ""
        )
        raise InputError(f"{where}: unknown label '{shown(said)}'; known: {known}")
    return numbers[said]
