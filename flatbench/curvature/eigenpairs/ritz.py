"""Ritz values of a Krylov space: their order and their residuals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

#: ``LM`` largest magnitude, ``LA`` largest algebraic, ``SA`` smallest algebraic; ARPACK's names
Which = Literal["LM", "LA", "SA"]


def wanted_key(value: float, which: Which) -> float:
    """Larger for what is more wanted."""
    return abs(value) if which == "LM" else value if which == "LA" else -value


def most_wanted_first(values: Sequence[float], which: Which) -> list[int]:
    """Places of the values, the most wanted one's first."""
    return sorted(range(len(values)), key=lambda i: -wanted_key(values[i], which))


@dataclass(frozen=True)
class Ritz:
    """Ritz pairs ``(θ_i, V s_i)``, most wanted first.

    Attributes:
        values: ``θ_i``.
        residuals: ``‖H V s_i − θ_i V s_i‖``.
        coefficients: ``s_i`` as the columns of ``(m, m)``, float64 on the CPU.
        rounding: what the operator's precision makes of an eigenvalue of its size, absolute.
    """

    values: Sequence[float]
    residuals: Sequence[float]
    coefficients: Tensor
    which: Which
    rounding: float

    def key(self, i: int) -> float:
        """How much the i-th value is wanted."""
        return wanted_key(self.values[i], self.which)
