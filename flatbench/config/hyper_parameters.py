"""Hyper-parameters as one text, the same on a terminal, in a table and in a figure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def hyper_text(choice: Mapping[str, Any]) -> str:
    """``lr 0.01, rho 0.1`` from hyper-parameters by name; those without a value are left out."""
    return ", ".join(f"{key} {_value_text(value)}" for key, value in choice.items() if _present(value))


def _present(value: Any) -> bool:
    return value is not None and not (isinstance(value, float) and value != value)


def _value_text(value: Any) -> str:
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int | float):
        return f"{value:.12g}"  # two values that are written alike would be taken for one configuration
    return json.dumps(value, default=str, sort_keys=True)
