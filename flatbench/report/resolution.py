"""How a rise of the loss that rounding hides is written: not as a number that it is not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flatbench.report.numbers import significant

#: the values of measures that are rises, of which ``below_resolution`` speaks
RISES = ("sharpness", "mean_rise")


def below(value: float, error: float) -> str:
    """What is written for a rise that cannot be told from 0.

    >>> below(1e-5, 2e-5)
    'below resolution (≤ 3e-05)'
    """
    return f"below resolution (≤ {significant(abs(value) + error, 2)})"


def unresolved(values: Mapping[str, Any]) -> dict[str, str]:
    """What to write in the place of those of a measure's values that rounding hides, by their names."""
    found = {}
    for name, hidden in values.items():
        if not name.startswith("below_resolution") or not hidden:
            continue
        place = name.removeprefix("below_resolution")
        for rise in RISES:
            value, error = values.get(f"{rise}{place}"), values.get(f"rounding_error{place}")
            if value is not None and error is not None:
                found[f"{rise}{place}"] = below(value, error)
    return found
