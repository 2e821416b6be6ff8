"""Convergence test for the Ritz values of a growing Krylov basis."""

from __future__ import annotations

from typing import Literal

from flatbench.curvature.eigenpairs.ritz import Ritz, wanted_key

#: an error this many times too large is where its further fall begins to be watched
CANDIDATE = 8

Stop = Literal["error", "residual"]


class Convergence:
    """Watches the Ritz values of a growing basis.

    A value has converged if its residual is within ``tol · |θ|``; or, with ``stop = "error"``, if its error
    by the gap is, and its residual has halved since that error was a few times larger. Without the second
    condition the mean of a cluster that is not resolved yet would pass: it looks like an eigenvalue, but its
    residual stands still.
    """

    def __init__(self, k: int, tol: float, stop: Stop) -> None:
        self.k, self.tol, self.stop = k, tol, stop
        #: place -> value and residual when first noticed
        self._candidates: dict[int, tuple[float, float]] = {}

    def forget(self) -> None:
        """Begin to watch anew, because the basis was replaced."""
        self._candidates = {}

    def observe(self, ritz: Ritz) -> None:
        """Take note of the Ritz values after a step."""
        if len(ritz.values) < self.k:
            return
        errors = ritz.errors(self.k)
        if all(error <= CANDIDATE * self._tolerance(ritz, i) for i, error in enumerate(errors)):
            errors = ritz.errors(
                max([self.k, *ritz.contested(self.k, self._tolerance(ritz, self.k - 1))]) + 1
            )
        for i, error in enumerate(errors):
            value, residual = ritz.values[i], ritz.residuals[i]
            old = self._candidates.get(i)
            if error > CANDIDATE * self._tolerance(ritz, i):
                self._candidates.pop(i, None)
            elif old is None or abs(value - old[0]) > old[1]:
                self._candidates[i] = (value, residual)

    def of_each(self, ritz: Ritz) -> list[bool]:
        """Whether each of the k most wanted values has converged."""
        errors = ritz.errors(self.k)
        found = []
        for i, error in enumerate(errors):
            allowed = self._tolerance(ritz, i)
            by_error = self.stop == "error" and error <= allowed and self._has_shrunk(ritz, i)
            found.append(ritz.residuals[i] <= allowed or by_error)
        return found

    def done(self, ritz: Ritz) -> bool:
        """Whether the wanted values have converged, and none of the others may belong among them."""
        if len(ritz.values) < self.k or not all(self.of_each(ritz)):
            return False
        allowed = self._tolerance(ritz, self.k - 1)
        rivals = ritz.contested(self.k, allowed)
        if not rivals or self.stop == "residual":
            return not rivals
        errors = ritz.errors(max(rivals) + 1)
        least = wanted_key(ritz.values[self.k - 1], ritz.which) + allowed
        return all(
            wanted_key(ritz.values[i], ritz.which) + errors[i] <= least and self._has_shrunk(ritz, i)
            for i in rivals
        )

    def _tolerance(self, ritz: Ritz, i: int) -> float:
        return max(self.tol * abs(ritz.values[i]), 2 * ritz.rounding)

    def _has_shrunk(self, ritz: Ritz, i: int) -> bool:
        old = self._candidates.get(i)
        return old is not None and ritz.residuals[i] <= 0.5 * old[1]
