"""Check stored metrics and measures: a file with values that cannot be is damaged, whoever wrote it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flatbench.errors import InputError, shown

#: the least and the most that a metric can be, by its name; others are any finite number
BOUNDS = {
    "accuracy": (0.0, 1.0),
    "f1": (0.0, 1.0),
    "macro_f1": (0.0, 1.0),
    "matthews": (-1.0, 1.0),
    "pearson": (-1.0, 1.0),
    "spearman": (-1.0, 1.0),
}
#: beyond a bound by rounding
_ROUNDING = 1e-6
#: names of values that are numbers in every measure, a plug-in's too
_NUMERIC = re.compile(r".*_\d+|loss|sharpness|trace|seconds|.*error")


def check_metrics(metrics: Any, file: Path) -> None:
    """Raise InputError unless a result's metrics are split -> name -> a number within its bounds, or None."""
    if not isinstance(metrics, Mapping) or not all(isinstance(own, Mapping) for own in metrics.values()):
        raise InputError(f"{file}: damaged (metrics are no mapping of splits to values)")
    for split, own in metrics.items():
        for name, value in own.items():
            field = f"metrics.{split}.{name}"
            if value is None:
                continue
            if not _is_number(value):
                raise InputError(f"{file}: damaged ({field}: {shown(repr(value))} is no finite number)")
            low, high = BOUNDS.get(name, (-math.inf, math.inf))
            if not low - _ROUNDING <= value <= high + _ROUNDING:
                raise InputError(
                    f"{file}: damaged ({field}: {shown(repr(value))} is not within {low:g} and {high:g})"
                )


def check_measure(stored: Mapping[str, Any], file: Path) -> None:
    """Raise InputError for a measure whose values no measure gives: NaN, or text where a number belongs."""
    values = stored.get("values", {})
    if not isinstance(values, Mapping):
        raise InputError(f"{file}: damaged (values: no mapping)")
    for name, value in values.items():
        if isinstance(value, str) and (_NUMERIC.fullmatch(name) or _reads_as_number(value)):
            raise InputError(f"{file}: damaged (values.{name}: {shown(repr(value))} is text, not a number)")
        for number in _floats(value):
            if not math.isfinite(number):
                raise InputError(f"{file}: damaged (values.{name}: {number} is no finite number)")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _reads_as_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _floats(value: Any) -> Iterator[float]:
    if isinstance(value, float):
        yield value
    elif isinstance(value, list):
        for part in value:
            yield from _floats(part)
