"""The smallest step along a line that raises a loss, bracketed by a few losses.

The search is that of arXiv 2601.16979 (steps that grow or shrink by factors until the loss has risen at one
end and not at the other, then smaller and smaller brackets), with a model of the line that spares most
passes: ``ψ(η) = (L(θ − η·Δ) − L(θ))/η`` is a straight line in η where L is quadratic, and η_c is its zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

#: a step grows or shrinks by at most this factor at once
FACTOR = 16.0


@dataclass(frozen=True)
class Crossing:
    """Where a line search found the loss to rise.

    Attributes:
        below: largest step at which the loss has not risen, 0 where none was found.
        above: smallest step at which it has, infinite where none was found.
        rises: every step that was tried, and the rise of the loss there.
        slope: ``⟨∇L, Δ⟩`` at the start, positive for a descent; None where it is not known.
    """

    below: float
    above: float
    rises: Mapping[float, float] = field(default_factory=dict)
    slope: float | None = None

    @property
    def step(self) -> float | None:
        """η_c: the zero of ψ, between ``below`` and ``above``; None while either is missing."""
        if self.below == 0 or not math.isfinite(self.above):
            return None
        return min(max(_zero(self), self.below), self.above)

    def trusted(self, error: float) -> Crossing:
        """What is left of it where a rise may be off by ``error``: of smaller ones the sign is not known."""
        clear = {step: rise for step, rise in self.rises.items() if abs(rise) > error}
        return _bracket(clear, self.slope)


def first_rise(
    rise: Callable[[float], float],
    start: float,
    *,
    slope: float | None = None,
    tolerance: float = 1 / 16,
    tries: int = 7,
) -> Crossing:
    """Bracket the smallest step that raises the loss.

    Args:
        rise: ``L(θ − η·Δ) − L(θ)`` of a step η; infinite where the loss is not finite.
        start: the first step to try.
        slope: ``⟨∇L, Δ⟩`` at θ, if it is known.
        tolerance: stop when the ends of the bracket differ by no more than this share.
        tries: stop after so many calls of ``rise``.
    """
    rises: dict[float, float] = {}
    found = _bracket(rises, slope)
    if slope is not None and slope <= 0:  # no descent: the smallest step is raising already
        return found
    step, width, cut = start, math.inf, False
    while len(rises) < tries:
        rises[step] = rise(step)
        found = _bracket(rises, slope)
        if found.below and found.above <= found.below * (1 + tolerance):
            break
        before, width = width, found.above / found.below if found.below else math.inf
        # a model that does not shorten the bracket much is not to be followed twice in a row
        cut = not cut and math.isfinite(width) and width > before**0.5
        step = math.sqrt(found.below * found.above) if cut else _next(found, tolerance)
        if step in rises or not (math.isfinite(step) and step > 0):
            break
    return found


def _bracket(rises: Mapping[float, float], slope: float | None) -> Crossing:
    """The first two neighbours among the steps between which the loss rises."""
    below, above = 0.0, math.inf
    for step in sorted(rises):
        if rises[step] > 0:
            above = step
            break
        below = step
    return Crossing(below, above, dict(rises), slope)


def _next(found: Crossing, tolerance: float) -> float:
    """The step to try next: a little to that side of the zero on which the bracket is wider."""
    aside = 1 + tolerance / 3
    zero = _zero(found)
    if not math.isfinite(found.above):
        wanted = zero * aside if zero > found.below else FACTOR * found.below
        # where the loss goes on falling beyond each zero of the model, steps grow all the faster
        least = min(1.5 + 1.5 * max(len(found.rises) - 2, 0), FACTOR)
        return min(max(wanted, least * found.below), FACTOR * found.below)
    if not found.below:
        wanted = zero / aside if zero > 0 else found.above / FACTOR
        return min(max(wanted, found.above / FACTOR), found.above / 1.1)
    if not found.below < zero < found.above:
        return math.sqrt(found.below * found.above)
    wanted = zero / aside if zero / found.below > found.above / zero else zero * aside
    inside = found.below < wanted < found.above
    return wanted if inside else math.sqrt(found.below * found.above)


def _zero(found: Crossing) -> float:
    """The zero of ψ, by the parabola through its three points that are nearest to the crossing.

    By the line through two where there are no more, or where the parabola's zero is not in the bracket. NaN
    where there are not two, or where ψ does not rise between them.
    """
    points = [(step, rise / step) for step, rise in found.rises.items() if math.isfinite(rise)]
    if found.slope is not None:
        points.append((0.0, -found.slope))
    points.sort(key=lambda point: max(found.below - point[0], point[0] - found.above, 0.0))
    if len(points) < 2:
        return math.nan
    (a, low), (b, high) = sorted(points[:2])
    chord = (high - low) / (b - a)
    if chord <= 0:
        return math.nan
    line = a - low / chord
    if len(points) == 2:
        return line
    c, third = points[2]
    bend = ((third - high) / (c - b) - chord) / (c - a)
    # ψ(η) = bend·η² + linear·η + constant, at the zero where it rises
    linear = chord - bend * (a + b)
    constant = low - chord * a + bend * a * b
    square = linear**2 - 4 * bend * constant
    if square < 0 or linear + math.sqrt(square) <= 0:
        return line
    zero = -2 * constant / (linear + math.sqrt(square))
    return zero if found.below < zero < found.above else line
