"""Numbers as reports write them: rounded to 12 significant digits, so that every processor writes the same.

The last bits of a sum depend on the order of its terms, which depends on the vector instructions that numpy
finds. What is printed, ranked or compared with zero therefore goes through `rounded` first.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd

#: significant digits that are written; double precision has 15 to 17
DIGITS = 12


def rounded(value: float, scale: float = 0.0) -> float:
    """A number to `DIGITS` significant digits.

    Args:
        scale: size of the terms that it was computed from. A difference of large terms keeps only the digits
            that they have in common with it: what cancels to rounding noise becomes 0.

    NaN and infinities come back as they are.
    """
    if not math.isfinite(value):
        return float(value)
    if value == 0:
        return 0.0  # not -0.0
    cancelled = max(0, _exponent(scale) - _exponent(value)) if scale else 0
    if cancelled >= DIGITS:
        return 0.0
    return float(f"{value:.{DIGITS - 1 - cancelled}e}")


def _exponent(value: float) -> int:
    return math.floor(math.log10(abs(value))) if value and math.isfinite(value) else -400


def rounded_frame(frame: pd.DataFrame) -> pd.DataFrame:
    """A table with every floating-point number `rounded`, in columns of mixed objects too."""
    return frame.apply(_round_column)


def _round_column(column: pd.Series[Any]) -> pd.Series[Any]:
    if pd.api.types.is_float_dtype(column):
        return column.map(rounded)
    if column.dtype == object:
        return column.map(_round_object)
    return column


def _round_object(value: Any) -> Any:
    return rounded(float(value)) if isinstance(value, float | np.floating) else value


def fixed(value: float, decimals: int, sign: bool = False) -> str:
    """A number with so many decimals, with ``+`` before it if ``sign``."""
    return f"{rounded(value):{'+' if sign else ''}.{decimals}f}"


def off_zero(value: float, decimals: int, sign: bool = False) -> str:
    """As `fixed`, with one significant digit where that would write 0: the end of an interval that leaves
    out zero must not read as zero."""
    text = fixed(value, decimals, sign)
    if rounded(value) == 0 or float(text) != 0:
        return text
    return f"{'+' if sign and value > 0 else ''}{significant(value, 1)}"


def significant(value: float, digits: int) -> str:
    """A number with so many significant digits, such as ``0.0123`` or ``1.2e-05``."""
    return f"{rounded(value):.{digits}g}"
