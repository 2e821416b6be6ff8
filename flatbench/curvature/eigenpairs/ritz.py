"""Ritz values of a Krylov space: their order, their residuals and what these say about errors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

#: ``LM`` largest magnitude, ``LA`` largest algebraic, ``SA`` smallest algebraic; ARPACK's names
Which = Literal["LM", "LA", "SA"]
Outside = Literal["larger", "separate", "close", "unknown"]

#: clusters of more Ritz values than this are not considered together
_LARGEST_CLUSTER = 8
#: relative error at which a value has settled enough to be compared with others
_COMPARABLE_ERROR = 0.05
#: on an error by the gap, which is itself estimated
SAFETY = 2.0


def wanted_key(value: float, which: Which) -> float:
    """Larger for what is more wanted."""
    return abs(value) if which == "LM" else value if which == "LA" else -value


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

    def errors(self, count: int) -> list[float]:
        """Estimated errors of the first ``count`` values, what rounding does to them included.

        The smallest of a value's residual and, for every cluster of neighbouring Ritz values that it belongs
        to, ``2·‖R‖²/gap``: R the cluster's residuals, and the gap that to the rest of the spectrum, which is
        taken to reach from its own Ritz values as far as their residuals.
        """
        line = sorted(range(len(self.values)), key=lambda i: self.values[i])
        values = [self.values[i] for i in line]
        residuals = [self.residuals[i] for i in line]
        below = [-math.inf, *itertools.accumulate(map(sum, zip(values, residuals, strict=True)), max)]
        lower = [v - r for v, r in zip(values, residuals, strict=True)]
        above = [*[*itertools.accumulate(reversed(lower), min)][::-1], math.inf]
        squares = [r * r for r in residuals]
        found = [0.0] * min(count, len(line))
        for place, i in enumerate(line):
            if i >= len(found):
                continue
            best = residuals[place]
            for size in range(1, _LARGEST_CLUSTER + 1):
                for first in range(max(0, place - size + 1), min(place, len(line) - size) + 1):
                    end = first + size
                    gap = min(values[first] - below[first], above[end] - values[end - 1])
                    if 0 < gap < math.inf:
                        best = min(best, SAFETY * sum(squares[first:end]) / gap)
            found[i] = best + self.rounding
        return found

    def contested(self, k: int, allowed: float) -> list[int]:
        """The values after the first k that, by their residuals, may belong among them."""
        least = wanted_key(self.values[k - 1], self.which) + allowed
        return [
            i
            for i in range(k, len(self.values))
            if wanted_key(self.values[i], self.which) + self.residuals[i] > least
        ]

    def outside(self, locked: Ritz, k: int, tol: float) -> tuple[Outside, list[float]]:
        """What a basis with k locked pairs tells about the spectrum outside of them; the pairs' errors by it.

        ``larger``: a more wanted value turned up. ``separate``: nothing out there comes so near to a locked
        value that its error could exceed ``tol`` relatively. ``close``: something does. ``unknown``: the best
        value outside has not settled; a residual that is merely small beside the locked values says nothing.
        """
        if len(self.values) <= k:
            return "unknown", []
        keys = [wanted_key(value, self.which) for value in self.values]
        before = [wanted_key(value, self.which) for value in locked.values[:k]]
        allowed = [tol * abs(value) + 2 * self.rounding for value in locked.values[:k]]
        if any(key > old + 2 * room for key, old, room in zip(keys, before, allowed, strict=False)):
            return "larger", []
        error = self.errors(k + 1)[k]
        if error > max(_COMPARABLE_ERROR * abs(self.values[k]), 2 * self.rounding):
            return "unknown", []
        errors = _errors_beside(before, locked.residuals[:k], keys[k] + error, self.rounding)
        if all(each <= room for each, room in zip(errors, allowed, strict=True)):
            return "separate", errors
        return ("close" if error <= max(tol * abs(self.values[k]), 2 * self.rounding) else "unknown"), []


def _errors_beside(
    keys: Sequence[float], residuals: Sequence[float], rest: float, rounding: float
) -> list[float]:
    """Errors of the most wanted values, the spectrum outside of them being less wanted than ``rest``."""
    found = []
    for i in range(len(keys)):
        best = residuals[i]
        for last in range(i, len(keys)):  # the cluster of the first values up to ``last``
            following = max(keys[last + 1] + residuals[last + 1], rest) if last + 1 < len(keys) else rest
            gap = keys[last] - following
            squared = sum(r**2 for r in residuals[: last + 1])
            best = min(best, SAFETY * squared / gap if gap > 0 else float("inf"))
        found.append(best + rounding)
    return found
